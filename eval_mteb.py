"""Scores a Causal2Vec checkpoint, or any sentence-transformers model, on MTEB as the paper does (section 4.1, B.3).

    python eval_mteb.py --model . --tasks mini --output results/mine
    python eval_mteb.py --model . --tasks all --data_dir DATA --output results/mine          # without a network
    python eval_mteb.py --compare results/mine results/other paper:Mistral-7B --output results/compared
    torchrun --nproc_per_node 8 eval_mteb.py --model . --tasks mteb56 --dtype bf16 --output results/mine

Invariants: an output folder holds one model in one setting; a result counts when it is complete, is then not computed
again, and is never reused for another model, instruction, text or setting.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from eval_report import plot_lengths, plot_norms, read_run, write_comparison, write_json, write_summary
from mteb_encoder import (
    DTYPES,
    Examples,
    Instructions,
    MTEBEncoder,
    Noise,
    load_backend,
    locate,
    log,
    model_meta,
    ranks,
    read_json,
    sha256,
    start_processes,
)


ROOT = Path(__file__).resolve().parent


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\nInvariants")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to do (default: score --model on --tasks into --output)")
    what.add_argument("--print_prompts", action="store_true", help="print the exact text per task and side, and stop")
    what.add_argument("--prefetch", metavar="DIR", help="fill DIR with the data of --tasks from the Hub, and stop")
    what.add_argument(
        "--compare",
        nargs="+",
        metavar="RESULT",
        help="compare output folders and published models (paper:NAME); writes tables and PNGs to --output, and stops",
    )
    what.add_argument("--readme", metavar="FILE", help="with --compare: also replace the marked table in this file")
    what.add_argument(
        "--analyze",
        action="store_true",
        help="measure sequence lengths, with --icl also with examples (Figure 6), and the norms of the two states "
        "(Figure 5) on some texts of each task; writes numbers and PNGs to --output, and stops",
    )
    what.add_argument("--analyze_texts", type=int, default=256, help="texts per task for --analyze (default: 256)")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        help="folder or Hub id of a Causal2Vec checkpoint or of a sentence-transformers model, which is scored with its "
        "own stored prompts and no instructions; or package:NAME for a model folder inside an installed Python package",
    )
    model.add_argument("--revision", help="commit, tag or branch on the Hub (default: main)")
    model.add_argument("--name", help="what results call the model (default: its Hub id or its folder's name)")
    model.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the model's weights (default: fp32)")
    model.add_argument("--device", help="such as cuda:0 or cpu (default: a GPU if there is one)")
    model.add_argument("--attn_implementation", help="such as sdpa or flash_attention_2 (default: transformers')")
    model.add_argument(
        "--pooling",
        choices=("contextual_eos", "last_token"),
        default="contextual_eos",
        help="last_token: the checkpoint's decoder alone, without encoder and Contextual token (default: the embedding "
        "that the checkpoint was trained for)",
    )
    model.add_argument("--max_length", type=int, help="longest decoder sequence in tokens (default: the checkpoint's)")
    model.add_argument(
        "--unnormalized",
        action="store_true",
        help="leave a Causal2Vec checkpoint's vectors at their length; cosine scores stay, classification and "
        "clustering change",
    )

    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="task names, categories (Retrieval, Reranking, Clustering, PairClassification, Classification, STS, "
        "Summarization), mteb56, mini (the paper's 30), or all (every folder of --data_dir)",
    )
    tasks.add_argument(
        "--data_dir", metavar="DIR", help="read tasks from folders in DIR, one per task, and never use the network"
    )
    tasks.add_argument(
        "--instructions",
        metavar="FILE",
        default=str(ROOT / "instructions.json"),
        help='JSON: task name -> instruction, or {"query": ..., "document": ...} (default: instructions.json here)',
    )
    tasks.add_argument(
        "--icl", metavar="DIR", help='in-context examples: DIR/<task>.json with a list of {"query", "response"}'
    )
    tasks.add_argument(
        "--noise",
        metavar="FILE",
        nargs="?",
        const=str(ROOT / "noise.txt"),
        help="also score with a line of FILE, chosen by text and seed, appended to every text before both encoder and "
        "decoder read it (Table 3; default: noise.txt here)",
    )
    tasks.add_argument("--noise_seed", type=int, default=0, help="for the choice of lines (default: 0)")

    run = parser.add_argument_group("run")
    run.add_argument("--output", metavar="DIR", help="where results go; run again to resume")
    run.add_argument("--batch_size", type=int, default=32, help="texts per forward pass (default: 32)")
    run.add_argument("--cache_dir", metavar="DIR", help="keep vectors there, so that an interrupted task goes on")
    run.add_argument("--overwrite", action="store_true", help="score these tasks again, whatever is there")

    args = parser.parse_args(argv)
    needed = ["output"] if args.compare else ["tasks"] if args.prefetch else ["model", "tasks", "output"]
    if args.print_prompts:
        needed = ["model", "tasks"]
    missing = [f"--{name}" for name in needed if not getattr(args, name)]
    if missing:
        parser.error(f"needs {', '.join(missing)}")
    if args.noise and (args.print_prompts or args.analyze):
        parser.error("--noise only changes what is scored; leave it out with --print_prompts and --analyze")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.compare:
        print(write_comparison(args.compare, args.output, args.readme))
        return
    if args.data_dir:  # before anything that reads them is imported
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

    from mteb_tasks import prefetch, select_tasks

    if args.prefetch:
        prefetch(select_tasks(args.tasks), args.prefetch)
        return
    tasks = select_tasks(args.tasks, args.data_dir)
    encoder = load_encoder(args, tasks)
    if args.print_prompts:
        print_prompts(encoder, tasks)
    elif args.analyze:
        analyze(encoder, tasks, args.output, args.analyze_texts)
    else:
        noisy = [encoder.with_noise(Noise.read(args.noise, args.noise_seed))] if args.noise else []
        failed = run(tasks, [encoder, *noisy], args.output, args.overwrite)
        if failed:
            sys.exit(
                f"{len(failed)} of {len(tasks)} tasks failed: {', '.join(failed)}. Run again to repeat these alone."
            )


def load_encoder(args: argparse.Namespace, tasks: Sequence) -> MTEBEncoder:
    """
    The wrapper around `--model` for these tasks.

    Raises:
        ValueError: a task has no instruction, or an option does not fit the kind of model.
        FileNotFoundError: the model, or examples, are not there.
    """
    location = locate(args.model, args.revision, args.name)
    only_ours = {
        "--icl": args.icl,
        "--pooling last_token": args.pooling == "last_token",
        "--max_length": args.max_length,
        "--unnormalized": args.unnormalized,
        "--analyze": args.analyze,
    }
    if not location.is_causal2vec and any(only_ours.values()):
        wrong = [option for option, given in only_ours.items() if given]
        raise ValueError(f"{', '.join(wrong)}: only for Causal2Vec checkpoints, and {args.model} is none.")
    instructions = Instructions.read(args.instructions, tasks) if location.is_causal2vec else None
    examples = Examples.read(args.icl, tasks)

    device = start_processes() or args.device
    backend = load_backend(
        location, args.dtype, device, args.attn_implementation, args.pooling, args.max_length, not args.unnormalized
    )
    label = args.name or location.name.removeprefix("local/")
    settings = {
        "label": f"{label}, last token" if args.pooling == "last_token" else label,
        "model": location.name,
        "revision": location.revision,
        "dtype": args.dtype,
        "pooling": args.pooling if location.is_causal2vec else None,
        "normalized": not args.unnormalized if location.is_causal2vec else None,
        "max_length": backend.max_tokens,
        "icl": True if args.icl else None,
    }
    return MTEBEncoder(
        backend,
        model_meta(location, backend),
        settings,
        instructions or backend.stored_prompt,
        examples,
        args.batch_size,
        Path(args.cache_dir) if args.cache_dir else None,
    )


# ------------------------------------------------------------------------------------------------------------ running


def run(tasks: Sequence, encoders: Sequence[MTEBEncoder], output: str | Path, overwrite: bool = False) -> list[str]:
    """
    Scores tasks, and keeps each result as soon as it is there.

    Args:
        tasks: From `select_tasks`.
        encoders: One, or one with and one without noise.
        output: A folder for this model in this setting.
        overwrite: Score again what is finished.

    Returns:
        The names of tasks that raised an error. The others have been scored.
    """
    output = Path(output)
    check_settings(output, encoders[0].settings)
    cache = result_cache(output, writes=ranks()[0] == 0)
    failed = []
    for position, task in enumerate(tasks, 1):
        for encoder in encoders:
            what = f"[{position}/{len(tasks)}] {task.name}" + (" with noise" if encoder.noise else "")
            wait_for_all()
            try:
                record = run_task(task, encoder, output, cache, overwrite)
            except Exception:
                traceback.print_exc()
                log(f"{what}: failed, see above")
                failed.append(task.name)
                continue
            if ranks()[0] == 0:
                results = read_run(output)
                score = (results.noisy if encoder.noise else {**results.scores, **results.other})[task.name]
                log(f"{what}: {record['main_score']} {score:.2f} in {record['seconds'] or 0:.0f} s")
                write_summary(output)
    return list(dict.fromkeys(failed))


def run_task(task, encoder: MTEBEncoder, output: Path, cache, overwrite: bool = False) -> dict:
    """
    Scores one task, unless that is done; returns its record.

    Raises:
        ValueError: what is there was made with other instructions, examples, noise or data.
    """
    import mteb

    # an aggregate has a result of its own, and one of each part
    names = list(dict.fromkeys([task.name, *(part.metadata.name for part in task.leaves())]))
    results = [cache.get_task_result_path(name, encoder.mteb_model_meta) for name in names]
    file = output / "records" / f"{task.name}{'.noise' if encoder.noise else ''}.json"
    record = {**describe_task(task, encoder), "result": results[0].relative_to(output).as_posix()}
    previous = read_json(file) if file.exists() else {}
    started = any(result.exists() for result in results) and not overwrite
    if started:
        differing = [key for key in record if previous.get(key) != record[key]]
        if differing:
            found, wanted = ({key: values.get(key) for key in differing} for values in (previous, record))
            raise ValueError(
                f"{file} records another {' and '.join(differing)}: {found} instead of {wanted}. Use another --output, or "
                "--overwrite."
            )
        if previous["finished"]:
            return previous

    rank, _ = ranks()
    if rank == 0:
        if overwrite:
            for result in results:
                result.unlink(missing_ok=True)
        write_json(file, {**record, "finished": False})  # before any result, so that none lacks it
    for side, examples in (record["examples"] or {}).items():
        if examples["count"] < examples["of"]:
            log(f"{task.name}, {side}: only {examples['count']} of {examples['of']} examples leave room for the text")
    encoder.lengths.clear()
    encoder.truncated.clear()
    task.reseed()
    evaluated = mteb.evaluate(
        encoder,
        task.task,
        cache=cache,
        co2_tracker=False,
        encode_kwargs={"batch_size": encoder.batch_size},
        overwrite_strategy="always" if overwrite else "only-missing",
        show_progress_bar=False,
    )
    lengths, counts = encoder.lengths, encoder.truncated
    truncated = {key: counts[key] for key in ("texts", "decoder", "encoder", "of") if counts}
    record |= {
        "finished": True,
        "seconds": evaluated[0].evaluation_time,
        "resumed": started,  # then the next four are of the rest
        "texts": len(lengths),
        "mean_characters": sum(lengths) / max(1, len(lengths)),
        "max_characters": max(lengths, default=0),
        "truncated": truncated or None,  # of different texts; not known of other models
        **encoder.settings,
        **environment(encoder),
    }
    if rank == 0:
        write_json(file, record)
    return record


def describe_task(task, encoder: MTEBEncoder) -> dict:
    """What a result depends on besides the model."""
    leaf = task.leaves()[0].metadata
    sides = ("query", "document") if task.type in ("Retrieval", "Reranking") else (None,)
    instructions, examples = {}, {}
    for side in sides:
        instructions[side or "text"], fitting = encoder.head(leaf, side)
        available = encoder.examples_for(leaf, instructions[side or "text"])
        if available:
            digest = sha256(json.dumps(fitting, sort_keys=True))[:12]
            examples[side or "text"] = {"count": len(fitting or ()), "of": len(available), "digest": digest}
    revisions = [part.metadata.dataset["revision"] for part in task.leaves()]
    return {
        "task": task.name,
        "type": task.type,
        "in_benchmark": task.in_benchmark,
        "main_score": task.task.metadata.main_score,
        "splits": list(task.task.eval_splits),
        "subsets": list(task.task.hf_subsets),
        "data": revisions[0] if len(revisions) == 1 else f"{revisions[0][:6]}{sha256(json.dumps(revisions))[:16]}",
        "instruction": instructions,
        "examples": examples or None,
        "noise": encoder.noise.digest if encoder.noise else None,
    }


def environment(encoder: MTEBEncoder) -> dict:
    """Where and with what a result was made."""
    import torch

    device = next(encoder.backend.model.parameters()).device
    return {
        "batch_size": encoder.batch_size,
        "processes": ranks()[1],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "commit": git_commit(),
        "python": platform.python_version(),
        **{package: package_version(package) for package in ("mteb", "torch", "transformers", "sentence-transformers")},
    }


def git_commit() -> str | None:
    """The commit of this code, with `+` when files differ from it; None outside a git clone."""
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "*.py", "instructions.json"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.strip() else "")


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_settings(output: Path, settings: dict) -> None:
    """Makes a folder that of one model in one setting. Raises ValueError when it belongs to another."""
    file = output / "settings.json"
    if file.exists():
        previous = read_json(file)
        differing = [key for key in settings if key != "label" and previous.get(key) != settings[key]]
        if differing:
            raise ValueError(
                f"{output} holds results of another "
                + ", ".join(f"{key} ({previous.get(key)}, now {settings[key]})" for key in differing)
                + ". Use another --output."
            )
    elif any(output.glob("results/*")):
        raise ValueError(f"{output} holds results but no settings.json. Use another --output.")
    if ranks()[0] == 0:
        write_json(file, settings)


def result_cache(output: Path, writes: bool = True):
    """mteb's own store of results, whose files appear under their names only when they are complete."""
    from mteb.cache import ResultCache

    class AtomicResultCache(ResultCache):
        def save_to_cache(self, task_result, model_name, model_revision=None, *, encode_kwargs=None) -> None:
            if not writes:
                return
            folder = self.get_task_result_path(task_result.task_name, model_name, model_revision).parent
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.cache_path, prefix=".incomplete-") as scratch:
                place = Path(scratch) / folder.relative_to(self.cache_path)
                place.mkdir(parents=True)
                if (folder / "run_settings.jsonl").exists():  # mteb adds to it
                    shutil.copy(folder / "run_settings.jsonl", place)
                ResultCache(scratch).save_to_cache(task_result, model_name, model_revision, encode_kwargs=encode_kwargs)
                for file in place.iterdir():
                    os.replace(file, folder / file.name)

    output.mkdir(parents=True, exist_ok=True)
    return AtomicResultCache(output)


def wait_for_all() -> None:
    if ranks()[1] > 1:
        import torch.distributed as dist

        dist.barrier()


# -------------------------------------------------------------------------------------------- looking at the inputs


class _Enough(Exception):
    """Ends a task whose texts have been seen."""


class TextCollector:
    """An encoder for mteb that keeps the texts it is given, and ends the task when it has seen every side."""

    def __init__(self, sides: set, mteb_model_meta):
        self.sides, self.mteb_model_meta = sides, mteb_model_meta
        self.texts: dict[str | None, list[str]] = {}

    def encode(self, inputs, *, task_metadata, hf_split=None, hf_subset=None, prompt_type=None, **kwargs):
        import numpy as np

        side = None if prompt_type is None else prompt_type.value
        self.texts[side] = [text for batch in inputs for text in batch["text"]]
        if self.sides <= set(self.texts):
            raise _Enough
        return np.ones((len(self.texts[side]), 2), dtype=np.float32)

    def similarity(self, embeddings1, embeddings2):
        raise NotImplementedError("Only collects texts.")

    similarity_pairwise = similarity


def collect_texts(task, sides: Sequence[str | None], encoder: MTEBEncoder) -> dict[str | None, list[str]]:
    """The texts that mteb gives to a model, per side; of an aggregate's first part."""
    leaf = task.leaves()[0]
    collector = TextCollector(set(sides), encoder.mteb_model_meta)
    try:
        leaf.evaluate(
            collector, leaf.eval_splits[0], subsets_to_run=list(leaf.hf_subsets)[:1], encode_kwargs={"batch_size": 256}
        )
    except _Enough:
        return collector.texts
    finally:
        leaf.unload_data()
    raise ValueError(f"{task.name} gave texts of {set(collector.texts)}, expected {set(sides)}.")


def prompts_of(encoder: MTEBEncoder, tasks: Sequence) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Task, side, and what the model reads of that side's first text."""
    for task in tasks:
        sides = ("query", "document") if task.type in ("Retrieval", "Reranking") else (None,)
        texts = collect_texts(task, sides, encoder)
        for side in sides:
            instruction, examples = encoder.head(task.leaves()[0].metadata, side)
            yield task.name, side or "text", encoder.backend.describe(texts[side][0], instruction, examples)


def print_prompts(encoder: MTEBEncoder, tasks: Sequence) -> None:
    for name, side, described in prompts_of(encoder, tasks):
        for reader, text in described.items():
            print(f"{name}, {side}, {reader} reads:\n{text}\n")


def analyze(encoder: MTEBEncoder, tasks: Sequence, output: str | Path, count: int) -> dict[str, dict]:
    """
    Figures 5 and 6 of the paper, over `count` texts of each task: queries, or any texts of a symmetric task.

    Returns:
        `lengths` and `norms`, each task -> numbers; also written as JSON, with a PNG of each.

    Raises:
        ValueError: `output` holds another model's, or those of another setting.
    """
    import numpy as np

    output, lengths, norms = Path(output), {}, {}
    check_settings(output, encoder.settings)
    for task in tasks:
        side = "query" if task.type in ("Retrieval", "Reranking") else None
        metadata = task.leaves()[0].metadata
        texts = sorted(set(collect_texts(task, [side], encoder)[side]))
        texts = random.Random(task.name).sample(texts, min(count, len(texts)))
        instruction, examples = encoder.head(metadata, side)

        def mean_length(examples, texts=texts, instruction=instruction) -> float:
            rows = [encoder.backend.rows([text], instruction, examples)["attention_mask"] for text in texts]
            return float(np.mean([row.sum() for row in rows]))

        lengths[task.name] = {"texts": len(texts), "without_examples": mean_length(None)}
        if encoder.examples_for.table:
            lengths[task.name] |= {"with_examples": mean_length(examples), "examples": len(examples or ())}
        config = encoder.backend.model.config
        if encoder.settings["pooling"] == "contextual_eos" and config.pooling == "concat" and config.baseline is None:
            vectors = encoder.backend.model.encode(
                texts, instruction=instruction, batch_size=encoder.batch_size, normalize_embeddings=False
            )
            states = zip(("contextual", "eos"), encoder.backend.model.split_states(vectors))
            norms[task.name] = {name: float(np.linalg.norm(state, axis=-1).mean()) for name, state in states}
        log(f"{task.name}: {lengths[task.name]} {norms.get(task.name, '')}")

    write_json(output / "lengths.json", lengths)
    plot_lengths(lengths, output / "lengths.png")
    if norms:
        write_json(output / "norms.json", norms)
        plot_norms(norms, output / "norms.png")
    return {"lengths": lengths, "norms": norms}


if __name__ == "__main__":
    main()
