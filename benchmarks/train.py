"""Training speed and memory: train.py with GradCache against sentence-transformers' own trainer.

Both train the same checkpoint on the same rows in the same order of datasets, batch size, mini-batch size and precision:
decoder and projector in full, encoder frozen. The opponent is SentenceTransformerTrainer with
CachedMultipleNegativesRankingLoss over this repository's sentence-transformers module, so the model code is the same and
what differs is the training loop. Each measurement is a process of its own (its peak memory is then its own); the two
take turns, and the first step of each, a warm-up, is not counted. Quote the ratio: both sides of it were measured in one
run, on a machine that may be busy.

    python -m benchmarks.train --data_dir TRAIN

Prints a table and, as its last line, JSON; writes train.json and train.png to benchmarks/results/.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from evaluation.plots import new_figure, save_figure
from saving_utils import read_json, write_json


ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def step_timer():
    """A callback that notes the time at the end of every optimizer step."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        def __init__(self):
            self.ends: list[float] = []

        def on_step_end(self, *args, **kwargs):
            self.ends.append(time.perf_counter())

    return StepTimer()


def data_file(args, folder: str) -> str:
    """A data file with the one dataset that is trained on."""
    from training.data import read_data_file

    (spec,) = read_data_file(str(ROOT / "recipes/data/bundled.json"), [args.dataset])
    path = Path(folder, "data.json")
    path.write_text(json.dumps([{"name": spec.name, "path": spec.path, "instructions": spec.instructions}]))
    return str(path)


def run_ours(args, folder: str) -> list[float]:
    import train

    timer = step_timer()
    flags = {
        "model": args.model,
        "output_dir": f"{folder}/run",
        "data_file": data_file(args, folder),
        "data_dir": args.data_dir,
        "train_decoder": "full",
        "train_encoder": "frozen",
        "train_max_length": args.max_length,
        "per_device_train_batch_size": args.mini_batch_size,
        "gradient_accumulation_steps": args.batch_size // args.mini_batch_size,
        "max_steps": args.steps + 1,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": "true",
    }
    flags = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    train.main([*flags, "--gradcache", *(["--bf16"] if args.bf16 else [])], callbacks=[timer])
    return timer.ends


def run_sentence_transformers(args, folder: str) -> list[float]:
    import datasets
    import torch
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    from modeling_causal2vec import Causal2VecModel
    from sentence_causal2vec import Causal2VecSTModule
    from training.data import load_rows, read_data_file

    (spec,) = read_data_file(data_file(args, folder))
    module = Causal2VecSTModule(Causal2VecModel.from_pretrained(args.model, dtype="float32"))
    module.max_seq_length = args.max_length
    model = SentenceTransformer(modules=[module])
    module.model.encoder.requires_grad_(False)
    rows = [row for row in load_rows(spec, args.data_dir, f"{folder}/data") if row["negatives"]]
    rows = datasets.Dataset.from_list(
        [{"anchor": row["query"], "positive": row["positive"], "negative": row["negatives"][0]} for row in rows]
    )
    timer = step_timer()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=f"{folder}/run",
            per_device_train_batch_size=args.batch_size,
            max_steps=args.steps + 1,
            learning_rate=1e-4,
            bf16=args.bf16,
            use_cpu=not torch.accelerator.is_available(),
            prompts={"anchor": spec.instructions[0]},
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        loss=CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=args.mini_batch_size),
        callbacks=[timer],
    )
    trainer.train()
    return timer.ends


RUNNERS = {"causal2vec": run_ours, "sentence-transformers": run_sentence_transformers}


def measure(args) -> None:
    """One measurement in this process; prints it as JSON."""
    from training.outputs import peak_gigabytes

    with tempfile.TemporaryDirectory() as folder:
        ends = RUNNERS[args.only](args, folder)
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    print(json.dumps({"rows_per_second": args.batch_size / seconds, "peak_memory_bytes": 1e9 * peak_gigabytes()}))


def compare(args) -> dict:
    """Measures both in turn, `args.repeats` times."""
    runs: dict[str, list[dict]] = {name: [] for name in RUNNERS}
    for repeat in range(args.repeats):
        for name in RUNNERS:
            precision = "--bf16" if args.bf16 else "--no-bf16"
            command = [sys.executable, "-m", "benchmarks.train", *sys.argv[1:], "--only", name, precision]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            runs[name].append(json.loads(output.strip().splitlines()[-1]))
            print(f"repeat {repeat + 1}, {name}: {runs[name][-1]}", file=sys.stderr)
    ours, theirs = (runs[name] for name in RUNNERS)
    return {
        "settings": {key: value for key, value in vars(args).items() if key not in ("only", "redraw", "data_dir")},
        "runs": runs,
        "speed_ratio": statistics.median(
            a["rows_per_second"] / b["rows_per_second"] for a, b in zip(ours, theirs, strict=True)
        ),
        "memory_ratio": statistics.median(
            a["peak_memory_bytes"] / b["peak_memory_bytes"] for a, b in zip(ours, theirs, strict=True)
        ),
    }


def report(result: dict) -> None:
    """Prints the table and draws the picture."""
    print("| trainer | rows per second | peak memory, GB |\n|---|---|---|")
    panels = (("rows_per_second", "rows per second", 1), ("peak_memory_bytes", "peak memory, GB", 1e9))
    medians = {
        name: {key: statistics.median(run[key] for run in runs) / unit for key, _, unit in panels}
        for name, runs in result["runs"].items()
    }
    for name, values in medians.items():
        print(f"| {name} | {values['rows_per_second']:.1f} | {values['peak_memory_bytes']:.2f} |")
    print(f"speed ratio {result['speed_ratio']:.2f}, memory ratio {result['memory_ratio']:.2f}")

    figure, axes = new_figure(7, 2.6, ncols=2)
    for axis, (key, label, unit) in zip(axes, panels):
        axis.barh(list(medians), [values[key] for values in medians.values()], color=["#2a6f97", "#a9a9a9"])
        for place, runs in enumerate(result["runs"].values()):
            axis.plot([run[key] / unit for run in runs], [place] * len(runs), "k.", markersize=4)
        axis.set_xlabel(label)
        axis.invert_yaxis()
    axes[1].set_yticklabels([])
    save_figure(figure, RESULTS / "train.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT), help="checkpoint to train; default: the bundled one")
    parser.add_argument("--data_dir", default=".", help="folder of the training files (default: the working directory)")
    parser.add_argument("--dataset", default="medquad", help="dataset of recipes/data/bundled.json with hard negatives")
    parser.add_argument("--batch_size", type=int, default=128, help="rows per step")
    parser.add_argument("--mini_batch_size", type=int, default=32, help="rows embedded at a time")
    parser.add_argument("--max_length", type=int, default=128, help="decoder tokens per row")
    parser.add_argument("--steps", type=int, default=4, help="counted steps per measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each trainer")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                        help="bfloat16 instead of float32; default: on a GPU, and on a CPU that is fast in it")  # fmt: skip
    parser.add_argument("--only", choices=list(RUNNERS), help=argparse.SUPPRESS)
    parser.add_argument("--redraw", action="store_true", help="draw again from the JSON, measure nothing")
    args = parser.parse_args()
    if args.only:
        measure(args)
        return
    path = RESULTS / "train.json"
    if args.redraw:
        result = read_json(path)
    else:
        if args.bf16 is None:
            import torch

            from runtime_utils import has_fast_bfloat16

            args.bf16 = torch.accelerator.is_available() or has_fast_bfloat16()
        result = compare(args)
        result["settings"]["model"] = Path(args.model).resolve().name
        write_json(path, result)
    report(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
