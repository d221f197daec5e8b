"""Trains and scores the paper's ablations on one stated budget, and shows them beside the paper's numbers.

    make bases                                                           # once: the recipe's backbones
    python -m scripts.ablation --train_dir TRAIN --data_dir EVAL         # everything, three seeds; hours
    python -m scripts.ablation --train_dir TRAIN --data_dir EVAL --study pooling tokens --seeds 5
    python -m scripts.ablation --redraw                                  # table and picture from what is finished

A variant is the recipe with a few changed arguments of train.py (`VARIANTS`), scored like eval_mteb.py does. Each
finished (variant, seed) leaves a JSON in `output/runs` and is never run again; models and data go to `--work`.
Invariants: an output folder holds runs of one budget on one list of tasks; variants are compared on the same tasks, and
differences are taken between runs of the same seed; missing runs are shown as such.
"""

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import eval_mteb
from evaluation.encoder import Noise, log
from evaluation.plots import new_figure, save_figure
from evaluation.report import markdown_table, read_run
from evaluation.run import environment, run
from saving_utils import read_json, write_json, write_text


ROOT = Path(__file__).resolve().parent.parent

# Packs of short texts, so that a run is scored in minutes.
QUICK_TASKS = (
    "STSBenchmark STS12 STS14 STS15 STS16 EmotionClassification TweetSentimentExtractionClassification "
    "X-TrecQAReranking X-MSRPParaphrase SummEval-A"
).split()

# Variant -> what it changes in the recipe; None takes an argument out.
VARIANTS: dict[str, dict] = {
    "default": {},
    "last_token": {"baseline": "last_token", "train_encoder": None},
    "eos": {"pooling": "eos"},
    "average": {"pooling": "average"},
    "eos_encoder": {"pooling": "eos_encoder"},
    "embedding_concat": {"baseline": "embedding_concat"},
    "tokens_2": {"num_contextual_tokens": 2},
    "tokens_4": {"num_contextual_tokens": 4},
    "tokens_8": {"num_contextual_tokens": 8},
    "token_prepending": {"baseline": "token_prepending", "train_encoder": None},
    "before_instruction": {"contextual_position": "before_instruction"},
    "bidirectional": {"bidirectional": True},
    "encoder_frozen": {"train_encoder": "frozen"},
    "icl": {"max_examples": 5, "icl_max_seq_length": 512},
    "last_token_on": dict.fromkeys(
        "encoder train_encoder decoder query_instruction max_seq_length encoder_max_seq_length".split()
    ),
    "causal2vec_on": {},
}
# Variants that start from another one's trained model: they train it further, or join its decoder to the encoder.
GO_ON, JOIN = {"last_token_on": "last_token"}, {"causal2vec_on": "last_token"}
NOISY = ("last_token", "default")  # also scored with noise in their inputs
ENCODER = "encoder:"  # prefix of variants with an encoder of --encoders


@dataclass(frozen=True)
class Row:
    """A variant in a table, with the paper's scores for S-LLaMA-1.3B and Mistral-7B on MTEB-MINI, where it has them."""

    variant: str
    label: str
    llama: float | None = None
    mistral: float | None = None


# Differences are from the first row of a study.
STUDIES: dict[str, tuple[str, list[Row]]] = {
    "components": (
        "Components (Table 2)",
        [
            Row("last_token", "last token, no encoder", 61.81, 64.84),
            Row("eos", "with Contextual token", 62.19, 65.44),
            Row("default", "with Contextual token and concatenation", 62.83, 65.85),
        ],
    ),
    "fusion": (
        "Embedding fusion (Table 4)",
        [
            Row("default", "Causal2Vec", 62.83, 65.85),
            Row("embedding_concat", "embedding concatenation", 61.92, 65.02),
        ],
    ),
    "tokens": (
        "Number of Contextual tokens (Table 5)",
        [
            Row("default", "1", 62.83, 65.85),
            Row("tokens_2", "2", 62.77, 65.76),
            Row("tokens_4", "4", 62.51, 65.72),
            Row("tokens_8", "8", 62.67, 65.68),
        ],
    ),
    "encoders": (
        "Encoders, and token prepending (Table 6)",
        [
            Row("default", "the recipe's encoder (the paper: E5-base-v2)", 62.83, 65.85),
            Row("encoder:gte-small", "GTE-small", 62.71, 65.45),
            Row("encoder:e5-small-v2", "E5-small-v2", 62.70, 65.41),
            Row("encoder:e5-large-v2", "E5-large-v2", 62.31, 65.71),
            Row("last_token", "no encoder", 61.81, 64.84),
            Row("token_prepending", "token prepending (TP)", 61.66, 64.93),
        ],
    ),
    "encoder_lora": (
        "Encoder frozen or trained with LoRA (Table 10)",
        [
            Row("default", "encoder with LoRA", 62.83, 65.64),
            Row("encoder_frozen", "encoder frozen", 62.57, 65.85),
        ],
    ),
    "embedder": (
        "On an embedding model with last-token pooling (Table 11)",
        [
            Row("last_token", "the embedding model (the paper: e5-mistral)", None, 65.75),
            Row("last_token_on", "trained on for as many steps"),
            Row("causal2vec_on", "Causal2Vec on it", None, 66.59),
        ],
    ),
    "pooling": (
        "Pooling (Table 12)",
        [
            Row("default", "concatenation", 62.83, 65.85),
            Row("eos_encoder", "EOS with projected encoder output (Concat-bi)", 62.44, 65.59),
            Row("average", "average", 62.67, 65.55),
            Row("eos", "EOS only", 62.19, 65.44),
        ],
    ),
    "position": (
        "Place of the Contextual token (Table 14)",
        [
            Row("default", "after the instruction", 62.83, 65.85),
            Row("before_instruction", "before the instruction", 62.69, 65.55),
        ],
    ),
    "attention": (
        "Attention (Table 15)",
        [
            Row("default", "causal", 62.83, 65.85),
            Row("bidirectional", "bidirectional", 62.52, 65.77),
        ],
    ),
    "icl": (
        "In-context examples in training and evaluation (Table 1)",
        [
            Row("default", "without (the paper: over MTEB's 56 tasks)", None, 66.10),
            Row("icl", "with", None, 66.85),
        ],
    ),
}
NOISE_TITLE = "Noise appended to every text (Table 3)"
# Mistral-7B over 30 tasks: without noise, with it; then the same over the 6 retrieval tasks.
NOISE_PAPER = {"last_token": (64.84, 58.69, 49.44, 44.02), "default": (65.85, 60.95, 50.81, 47.56)}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.ablation",
        description=__doc__.partition("\n\nEvery")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ["all", "noise", *STUDIES]
    add = parser.add_argument
    add(
        "--study", nargs="+", default=["all"], choices=names, metavar="STUDY", help=f"{', '.join(names)} (default: all)"
    )
    add("--seeds", type=int, default=3, help="runs per variant, from the recipe's seed on (default: 3)")
    add(
        "--recipe",
        default=str(ROOT / "recipes" / "smollm2-135m.json"),
        help="what variants change; settings.json of a study goes on with it (default: recipes/smollm2-135m.json)",
    )
    add("--max_steps", type=int, default=40, help="training steps of a run (default: 40)")
    add("--batch_size", type=int, default=32, help="rows per training step (default: 32)")
    add("--train_dir", help="training data, if not where the recipe says")
    add("--data_dir", help="evaluation data: one folder per task, as for eval_mteb.py")
    add("--tasks", nargs="+", default=QUICK_TASKS, metavar="TASK", help=f"tasks (default: {' '.join(QUICK_TASKS)})")
    add("--eval_batch_size", type=int, default=32, help="texts per forward pass (default: 32)")
    add(
        "--noise",
        default=str(ROOT / "evaluation" / "noise.txt"),
        metavar="FILE",
        help="lines for the noise test (default: evaluation/noise.txt)",
    )
    add("--icl", metavar="DIR", help="in-context examples, DIR/<task>.json; without, the ICL variant is not run")
    add("--encoders", nargs="+", default=[], metavar="NAME=FOLDER", help="other encoders to try, such as gte-small=DIR")
    add("--output", type=Path, default=ROOT / "results" / "ablation", help="results (default: results/ablation)")
    add("--work", type=Path, default=ROOT / "runs" / "ablation", help="models and caches (default: runs/ablation)")
    add("--dry_run", action="store_true", help="list the runs that are still to do, and stop")
    add("--redraw", action="store_true", help="write table and picture again from finished runs, and stop")
    args = parser.parse_args(argv)
    args.encoders = dict(entry.partition("=")[::2] for entry in args.encoders)
    if not all(args.encoders.values()):
        parser.error("--encoders takes NAME=FOLDER")
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    if not (args.redraw or args.data_dir):
        parser.error("needs --data_dir")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.redraw:
        return draw(args.output)
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before anything that reads them
    recipe = base_recipe(args)
    todo = [
        (variant, recipe["seed"] + i)
        for i in range(args.seeds)  # all variants with one seed first: half a study is then still a comparison
        for variant in wanted(args)
        if not result_file(args.output, variant, recipe["seed"] + i).exists()
    ]
    if args.dry_run:
        print("\n".join([f"{len(todo)} runs to do:", *(f"{variant}, seed {seed}" for variant, seed in todo)]))
        return

    from evaluation.tasks import select_tasks

    tasks = select_tasks(args.tasks, args.data_dir)
    check_settings((args.output, args.work), study_settings(args, recipe, tasks))
    for number, (variant, seed) in enumerate(todo, 1):
        log(f"[{number}/{len(todo)}] {variant}, seed {seed}")
        run_variant(args, recipe, tasks, variant, seed)
        draw(args.output)
    draw(args.output)


def base_recipe(args: argparse.Namespace) -> dict:
    """The recipe on this study's budget, with the paper's loss alone and no time spent on extras."""
    recipe = read_json(args.recipe)
    recipe = recipe.get("recipe", recipe)
    if not {"encoder", "decoder"} <= set(recipe):
        raise ValueError(f"{args.recipe}: expected a recipe that joins an encoder and a decoder, got {sorted(recipe)}.")
    left_out = "matryoshka_dims load_best_model_at_end metric_for_best_model eval_steps dev_rows gradcache"
    for name in left_out.split():
        recipe.pop(name, None)
    recipe |= {
        "max_steps": args.max_steps,
        "warmup_steps": max(1, args.max_steps // 10),
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": str(args.work / "run"),
    }
    recipe.setdefault("seed", 42)
    return recipe | ({"data_dir": args.train_dir} if args.train_dir else {})


def wanted(args: argparse.Namespace) -> list[str]:
    """The variants of the chosen studies that can be run, in order of dependency."""
    chosen = [name for name in STUDIES if {name, "all"} & set(args.study)]
    variants = {row.variant for name in chosen for row in STUDIES[name][1]}
    if {"noise", "all"} & set(args.study):
        variants |= set(NOISY)
    variants |= {start for variant, start in {**GO_ON, **JOIN}.items() if variant in variants}
    if args.icl is None:
        variants.discard("icl")
    encoders = [ENCODER + name for name in args.encoders] if "encoders" in chosen else []
    return [name for name in VARIANTS if name in variants] + encoders


def study_settings(args: argparse.Namespace, recipe: dict, tasks: Sequence) -> dict:
    """The settings shared by all runs of an output folder."""
    from training.card import without_machine_paths

    places = ("output_dir", "data_dir", "seed")
    settings = {
        "recipe": {key: value for key, value in recipe.items() if key not in places},
        "tasks": {task.name: [part.metadata.dataset["revision"] for part in task.leaves()] for task in tasks},
        "noise": Noise.read(args.noise, 0).digest,
    }
    return without_machine_paths(settings)


def check_settings(folders: Sequence[Path], settings: dict) -> None:
    """Records the shared settings in folders. Raises ValueError if one holds runs of another budget."""
    files = [folder / "settings.json" for folder in folders]
    for file in filter(Path.exists, files):
        found = read_json(file)
        differing = [key for key in settings if found.get(key) != settings[key]]
        if differing:
            raise ValueError(
                f"{file.parent} holds runs with another {' and '.join(differing)}. Use other folders for --output and "
                "--work."
            )
    for file in files:
        write_json(file, settings)


def result_file(output: Path, variant: str, seed: int) -> Path:
    return output / "runs" / f"{variant.replace(':', '-')}.{seed}.json"


def run_variant(args: argparse.Namespace, recipe: dict, tasks: Sequence, variant: str, seed: int) -> None:
    """Trains and scores one variant with one seed, and writes its JSON."""
    from training.card import without_machine_paths

    model, trained = train_variant(args, recipe, variant, seed)
    started = time.monotonic()
    record = score(args, tasks, model, variant, seed)
    file = result_file(args.output, variant, seed)
    flags = without_machine_paths(variant_flags(args, recipe, variant))
    write_json(file, {"variant": variant, "seed": seed, "flags": flags, "train": trained, **record})
    log(f"{variant}, seed {seed}: {fmean(record['scores'].values()):.2f}, scored in {time.monotonic() - started:.0f} s")
    if variant not in {**GO_ON, **JOIN}.values():
        shutil.rmtree(model)


def variant_flags(args: argparse.Namespace, recipe: dict, variant: str) -> dict:
    """What a variant changes in the recipe."""
    if not variant.startswith(ENCODER):
        return dict(VARIANTS[variant])
    return {"encoder": args.encoders[variant.removeprefix(ENCODER)]}


def train_variant(args: argparse.Namespace, recipe: dict, variant: str, seed: int) -> tuple[Path, dict]:
    """Trains a variant unless that was done; returns its folder and the facts of its training."""
    import train

    model = args.work / "models" / result_file(args.output, variant, seed).stem
    if not model.exists():
        flags = variant_flags(args, recipe, variant)
        if variant in GO_ON:
            flags["model"] = str(train_variant(args, recipe, GO_ON[variant], seed)[0])
        if variant in JOIN:
            flags["decoder"] = decoder_of(train_variant(args, recipe, JOIN[variant], seed)[0], args.work / "decoder")
        arguments = {key: value for key, value in {**recipe, **flags, "seed": seed}.items() if value is not None}
        write_json(args.work / "recipe.json", arguments)
        for path in (args.work / "run").glob("*"):  # of the run before; the data it has read are kept
            if path.name != "data":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(scores_folder(args, variant, seed), ignore_errors=True)
        finished = train.main([str(args.work / "recipe.json")])
        model.parent.mkdir(parents=True, exist_ok=True)
        finished.rename(model)
    facts = read_json(model / "training.json")
    seconds = next((entry["train_runtime"] for entry in reversed(facts["log"]) if "train_runtime" in entry), None)
    losses = [entry["loss"] for entry in facts["log"] if "loss" in entry]
    return model, {"steps": facts["steps"], "losses": losses, "seconds": seconds, "plan": facts["plan"]}


def decoder_of(model: Path, folder: Path) -> str:
    """Saves the decoder of a trained model with its tokenizer, as a backbone to join."""
    from modeling_causal2vec import Causal2VecModel

    shutil.rmtree(folder, ignore_errors=True)
    trained = Causal2VecModel.from_pretrained(str(model))
    trained.decoder.save_pretrained(folder)
    trained.processor.tokenizer.save_pretrained(folder)
    return str(folder)


def scores_folder(args: argparse.Namespace, variant: str, seed: int) -> Path:
    return args.work / "scores" / result_file(args.output, variant, seed).stem


def score(args: argparse.Namespace, tasks: Sequence, model: Path, variant: str, seed: int) -> dict:
    """
    Main scores per task, times 100, also with noise if the noise test needs them.

    Raises:
        RuntimeError: a task failed; running again repeats that task alone.
    """
    flags = ["--batch_size", str(args.eval_batch_size)]
    if variant == "icl":
        flags += ["--icl", args.icl]
        tasks = [task for task in tasks if Path(args.icl, f"{task.name}.json").is_file()]
        if not tasks:
            raise ValueError(f"--icl {args.icl} has no examples for any of {' '.join(args.tasks)}.")
    output = scores_folder(args, variant, seed)
    names = [task.name for task in tasks]
    options = ["--model", str(model), "--name", variant, "--tasks", *names, "--data_dir", args.data_dir]
    encoder = eval_mteb.load_encoder(eval_mteb.parse_args([*options, "--output", str(output), *flags]), tasks)
    noisy = [encoder.with_noise(Noise.read(args.noise, 0))] if variant in NOISY else []
    failed = run(tasks, [encoder, *noisy], output)
    if failed:
        raise RuntimeError(f"{variant}, seed {seed}: {', '.join(failed)} failed, see above. Run again to repeat them.")
    found = read_run(output)
    return {
        "scores": {**found.scores, **found.other},
        "types": found.types,
        "noisy": found.noisy or None,
        "seconds": sum(record["seconds"] or 0 for record in found.records.values()),
        **environment(encoder),
    }


# ------------------------------------------------------------------------------------------------- table and picture

Runs = dict[str, dict[int, dict]]  # variant -> seed -> what its JSON holds


def read_runs(output: Path) -> Runs:
    """
    All finished runs of a folder.

    Raises:
        FileNotFoundError: there are none.
    """
    runs: Runs = {}
    for file in sorted((output / "runs").glob("*.json")):
        record = read_json(file)
        runs.setdefault(record["variant"], {})[record["seed"]] = record
    if not runs:
        raise FileNotFoundError(f"{output} holds no finished run of this study.")
    return runs


def rows_of(study: str, runs: Runs) -> list[Row]:
    """The rows of a study, including encoders that the paper did not try."""
    rows = STUDIES[study][1]
    if study != "encoders":
        return rows
    known = {row.variant for row in rows}
    return rows + [Row(v, v.removeprefix(ENCODER)) for v in sorted(runs) if v.startswith(ENCODER) and v not in known]


def shared_tasks(variants: Sequence[str], runs: Runs) -> list[str]:
    """The tasks that all runs of these variants were scored on."""
    records = [record["scores"] for variant in variants for record in runs.get(variant, {}).values()]
    return [task for task in records[0] if all(task in scores for scores in records)] if records else []


def means(variant: str, runs: Runs, tasks: Sequence[str], key: str = "scores") -> dict[int, float]:
    """Seed -> mean over tasks; nothing without any."""
    records = runs.get(variant, {}) if tasks else {}
    return {seed: fmean(record[key][task] for task in tasks) for seed, record in records.items() if record[key]}


def differences(values: dict[int, float], reference: dict[int, float]) -> dict[int, float]:
    """Seed -> difference from the reference's run of that seed."""
    return {seed: value - reference[seed] for seed, value in values.items() if seed in reference}


def cell(values: dict[int, float], signed: bool = False) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "not run" if not signed else ""
    mean = f"{fmean(values.values()):{'+' if signed else ''}.2f}"
    return f"{mean} ± {stdev(values.values()):.2f}" if len(values) > 1 else mean


def published(row: Row, first: Row) -> list[str]:
    """The paper's scores of a row and their differences from the first row's."""
    cells = []
    for name in ("llama", "mistral"):
        value, reference = getattr(row, name), getattr(first, name)
        cells += ["" if value is None else f"{value:.2f}"]
        cells += ["" if None in (value, reference) or row == first else f"{value - reference:+.2f}"]
    return cells


def study_table(study: str, runs: Runs) -> str:
    """One study's table: our scores and differences from the first row, beside the paper's."""
    title, rows = STUDIES[study][0], rows_of(study, runs)
    tasks = shared_tasks([row.variant for row in rows], runs)
    reference = means(rows[0].variant, runs, tasks)
    lines = []
    for row in rows:
        found = means(row.variant, runs, tasks)
        difference = differences(found, reference) if row != rows[0] else {}
        lines.append([row.label, cell(found), str(len(found)), cell(difference, signed=True), *published(row, rows[0])])
    headers = ["variant", f"here, {len(tasks)} tasks" if tasks else "here", "seeds", "difference"]
    headers += ["S-LLaMA-1.3B", "difference", "Mistral-7B", "difference"]
    return f"## {title}\n\n{markdown_table(headers, lines)}\n"


def noise_table(runs: Runs) -> str:
    """How much the two methods lose under noise, over all tasks and over retrieval and reranking."""
    lines = []
    for variant in NOISY:
        records = {variant: {seed: r for seed, r in runs.get(variant, {}).items() if r["noisy"]}}
        tasks = shared_tasks([variant], records)
        types = next(iter(records[variant].values()))["types"] if records[variant] else {}
        searching = [task for task in tasks if types[task] in ("Retrieval", "Reranking")]
        clean, noisy = means(variant, records, tasks), means(variant, records, tasks, "noisy")
        drop = differences(noisy, clean)
        among = differences(means(variant, records, searching, "noisy"), means(variant, records, searching))
        paper = NOISE_PAPER[variant]
        lines.append(
            [variant, cell(clean), cell(noisy), cell(drop, signed=True), cell(among, signed=True)]
            + [f"{paper[0]:.2f}", f"{paper[1]:.2f}", f"{paper[1] - paper[0]:+.2f}", f"{paper[3] - paper[2]:+.2f}"]
        )
    headers = ["variant", "here", "with noise", "change", "of it in retrieval and reranking"]
    headers += ["Mistral-7B", "with noise", "change", "of it in retrieval"]
    return f"## {NOISE_TITLE}\n\n{markdown_table(headers, lines)}\n"


def draw(output: Path) -> None:
    """Writes `ablation.md` and `ablation.png` from the finished runs of a folder."""
    runs, settings = read_runs(output), read_json(output / "settings.json")
    recipe = settings["recipe"]
    tasks = list(settings["tasks"])
    intro = (
        f"Each run: {recipe['max_steps']} steps of {recipe['per_device_train_batch_size']} rows, encoder "
        f"`{recipe['encoder']}`, decoder `{recipe['decoder']}`; then the mean of the main scores (times 100) of "
        f"{', '.join(tasks)}. ± is the standard deviation over seeds; differences are from a study's first row, between "
        "runs of the same seed. The paper's numbers are of other backbones, data and tasks (MTEB-MINI): compare "
        "directions, not sizes. Written by `python -m scripts.ablation --redraw`."
    )
    names = [name for name in [*VARIANTS, *sorted(set(runs) - set(VARIANTS))] if name in runs]
    per_task = [
        [name, *(cell({s: r["scores"][t] for s, r in runs[name].items() if t in r["scores"]}) for t in tasks)]
        for name in names
    ]
    parts = ["# Ablations\n", f"{intro}\n", *(study_table(study, runs) for study in STUDIES), noise_table(runs)]
    parts.append(f"## Scores per task\n\n{markdown_table(['variant', *tasks], per_task)}\n")
    write_text(output / "ablation.md", "\n".join(parts))
    plot(runs, output / "ablation.png")


def panel(study: str, runs: Runs) -> list[tuple[str, list[float], list[float | None]]]:
    """
    For each row of a study: its label, its differences from the first row (one per seed), and the paper's two
    differences.
    """
    rows = rows_of(study, runs)
    tasks = shared_tasks([row.variant for row in rows], runs)
    reference = means(rows[0].variant, runs, tasks)
    lines = []
    for row in rows:
        found = differences(means(row.variant, runs, tasks), reference)
        pairs = [(getattr(row, name), getattr(rows[0], name)) for name in ("llama", "mistral")]
        paper = [None if None in pair else pair[0] - pair[1] for pair in pairs]
        lines.append((row.label + ("" if found else " (not run)"), list(found.values()), paper))
    return lines


def noise_panel(runs: Runs) -> list[tuple[str, list[float], list[float | None]]]:
    """The same of the change under noise."""
    lines = []
    for variant in NOISY:
        records = [record for record in runs.get(variant, {}).values() if record["noisy"]]
        found = [fmean(r["noisy"][task] - r["scores"][task] for task in r["noisy"]) for r in records]
        clean, noisy, *_ = NOISE_PAPER[variant]
        lines.append((variant + ("" if found else " (not run)"), found, [None, noisy - clean]))
    return lines


def plot(runs: Runs, path: Path) -> None:
    """One line per variant: differences from the study's first row, one dot per seed, beside the paper's two."""
    panels = {title: panel(study, runs) for study, (title, _) in STUDIES.items()} | {NOISE_TITLE: noise_panel(runs)}
    sizes = [len(lines) for lines in panels.values()]
    height = 0.24 * sum(sizes) + 0.4 * len(sizes) + 0.6
    figure, all_axes = new_figure(8, height, nrows=len(panels), sharex=True, height_ratios=sizes)
    for axis, (title, lines) in zip(all_axes, panels.items()):
        for y, (_, found, paper) in enumerate(lines):
            for value, marker, color in zip(paper, "^D", ("#D55E00", "#009E73")):
                if value is not None:
                    axis.scatter(value, y, marker=marker, s=22, facecolors="none", edgecolors=color, zorder=3)
            axis.scatter(found, [y] * len(found), s=14, color="#0072B2", alpha=0.5, zorder=2)
            if found:
                axis.plot([fmean(found)] * 2, [y - 0.35, y + 0.35], color="#0072B2", linewidth=2)
        axis.set_yticks(range(len(lines)), [label for label, _, _ in lines], fontsize=7)
        axis.set_ylim(len(lines) - 0.4, -0.6)
        axis.set_xscale("symlog", linthresh=1)  # differences of a tenth and of tens
        axis.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=1)
        axis.set_title(title, loc="left", fontsize=8)
    ticks = (-30, -10, -3, -1, -0.5, 0, 0.5, 1, 3, 10, 30)
    all_axes[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
    all_axes[-1].minorticks_off()
    figure.supxlabel(
        "difference from the first row (of noise: from without): bar and dots, mean and seeds here;\n"
        "in the paper triangle, S-LLaMA-1.3B, and diamond, Mistral-7B",
        fontsize=7,
    )
    save_figure(figure, path)


if __name__ == "__main__":
    main()
