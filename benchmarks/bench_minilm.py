"""Speed beside all-MiniLM-L6-v2, the bundled encoder used alone, both through sentence-transformers.

    make bases                                                            # where bases/ is missing
    python benchmarks/bench_minilm.py --data_dir ../shared/data/eval
    python benchmarks/bench_minilm.py --redraw benchmarks/results/minilm

Each side is used as its users would: Causal2Vec with the instruction of queries or of the task, documents without one,
the baseline without any; tokenization is in the time. All models and precisions take turns within one run, each round in
another order, after a warm-up round; medians over rounds, and ratios within the run are what counts. Tokens are without
padding; of Causal2Vec the decoder's include the instruction, which is computed once, and the baseline reads as many
tokens of a long text as Causal2Vec's encoder does. --model is a folder because its code is run.

Left behind: OUTPUT.json (also the last line of stdout) and OUTPUT.md.
"""

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_encode import interleaved, log, read_instruction, read_texts, size_without_embeddings  # noqa: E402

from eval_report import markdown_table, write_json, write_text  # noqa: E402
from mteb_encoder import locate  # noqa: E402


SIDES = ("causal2vec", "baseline")
ONE_BY_ONE = "queries, one at a time"


def read_kinds(data_dir: str | None, count: int) -> dict[str, list[str]]:
    """`count` texts of each kind, from all over their packs; without packs, of this repository."""
    short = read_texts(data_dir, "STSBenchmark")
    queries, long = (read_texts(data_dir, "SciFact", part) for part in ("queries", "corpus"))
    if data_dir is None:
        long = [" ".join(short[start : start + 10]) for start in range(0, len(short), 10)]
    kinds = {ONE_BY_ONE: queries, "short texts": short, "long texts": long}
    return {kind: texts[:: max(1, len(texts) // count)][:count] for kind, texts in kinds.items()}


def load(args: argparse.Namespace, dtype: str) -> dict:
    from sentence_transformers import SentenceTransformer

    shared = {"device": "cpu", "model_kwargs": {"dtype": dtype}}
    ours = SentenceTransformer(args.model, trust_remote_code=True, **shared)
    baseline = SentenceTransformer(args.baseline, **shared)
    baseline.max_seq_length = min(baseline.max_seq_length, ours[0].processor.encoder_max_seq_length)
    return {"causal2vec": ours, "baseline": baseline}


def run_of(model, kind: str, texts: list[str], prompt: str | None, batch_size: int):
    """A function that embeds the texts once."""
    if kind == ONE_BY_ONE:
        return lambda: [model.encode(text, prompt=prompt, show_progress_bar=False) for text in texts]
    return lambda: model.encode(texts, prompt=prompt, batch_size=batch_size, show_progress_bar=False)


def tokens_per_text(model, texts: list[str], prompt: str | None) -> dict[str, float]:
    """What each tower reads, without padding."""
    rows = [model[0].preprocess([text], prompt=prompt) for text in texts]
    masks = {"decoder": "attention_mask", "encoder": "encoder_attention_mask"}
    if masks["encoder"] not in rows[0]:
        masks = {"encoder": "attention_mask"}
    return {tower: sum(int(row[mask].sum()) for row in rows) / len(texts) for tower, mask in masks.items()}


def measure(args: argparse.Namespace) -> dict:
    import sentence_transformers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    models = {(dtype, side): model for dtype in args.dtype for side, model in load(args, dtype).items()}
    ours, baseline = (models[args.dtype[0], side] for side in SIDES)
    towers = {name: getattr(ours[0].model, name) for name in ("decoder", "projector", "encoder")}
    prompts = {ONE_BY_ONE: ours.prompts["query"] or None, "short texts": read_instruction("STSBenchmark")}
    results = {
        "revision": locate(args.model).revision,
        "device": f"{torch.get_num_threads()} CPU threads ({platform.machine()})",
        **{module.__name__: module.__version__ for module in (torch, transformers, sentence_transformers)},
        **{name: getattr(args, name) for name in ("batch_size", "repeats")},
        "real_texts": args.data_dir is not None,
        "dimension": dict(zip(SIDES, (model.get_embedding_dimension() for model in (ours, baseline)))),
        "parameters": {  # outside embedding tables
            "causal2vec": {name: size_without_embeddings(tower) for name, tower in towers.items()},
            "baseline": {"encoder": size_without_embeddings(baseline)},
        },
        "rows": [],
    }
    for kind, texts in read_kinds(args.data_dir, args.texts).items():
        prompt = {"causal2vec": prompts.get(kind), "baseline": None}
        tokens = {side: tokens_per_text(models[args.dtype[0], side], texts, prompt[side]) for side in SIDES}
        runs = {key: run_of(model, kind, texts, prompt[key[1]], args.batch_size) for key, model in models.items()}
        seconds = interleaved(runs, args.repeats, "cpu")
        for dtype in args.dtype:
            of_side = {side: seconds[dtype, side] for side in SIDES}
            speed = {side: len(texts) / statistics.median(values) for side, values in of_side.items()}
            row = {"kind": kind, "dtype": dtype, "texts": len(texts), "tokens_per_text": tokens, "seconds": of_side}
            ratio = speed["causal2vec"] / speed["baseline"]
            results["rows"].append({**row, "texts_per_second": speed, "ratio": ratio})
            log(f"{kind}, {dtype}: {speed}, ratio {ratio:.2f}")
    return results


def make_table(results: dict) -> str:
    header = ["texts", "precision", "tokens, decoder + encoder", "tokens, baseline"]
    header += ["texts per second", "texts per second, baseline", "ratio"]
    rows = []
    for row in results["rows"]:
        tokens = [" + ".join(f"{n:.1f}" for n in row["tokens_per_text"][side].values()) for side in SIDES]
        speeds = [f"{row['texts_per_second'][side]:.1f}" for side in SIDES]
        rows.append([row["kind"], row["dtype"], *tokens, *speeds, f"{row['ratio']:.2f}"])
    lines = [f"{side}: vectors of {results['dimension'][side]} numbers, parameters outside embedding tables: "
             + ", ".join(f"{tower} {n / 1e6:.1f}M" for tower, n in results["parameters"][side].items()) + "."
             for side in SIDES]  # fmt: skip
    return "\n".join([markdown_table(header, rows), "", f"{results['device']}.", *lines]) + "\n"


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT), help="Causal2Vec folder, whose code is run. Default: this one.")
    parser.add_argument(
        "--baseline", default=str(ROOT / "bases" / "encoder"), help="The encoder alone, folder or Hub id."
    )
    parser.add_argument("--data_dir", help="Folder of evaluation packs. Default: texts of this repository.")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--texts", type=int, default=256, help="Texts of each kind.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads. Default: torch's.")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "minilm"), help="Without ending.")
    parser.add_argument("--redraw", metavar="OUTPUT", help="Write the table of OUTPUT.json again, measure nothing.")
    args = parser.parse_args(arguments)
    if args.redraw:
        results = json.loads(Path(f"{args.redraw}.json").read_text(encoding="utf-8"))
    else:
        if not Path(args.model).is_dir():
            parser.error(f"--model must be a folder, got {args.model!r}")
        if args.threads:
            torch.set_num_threads(args.threads)
        results = measure(args)
        write_json(Path(f"{args.output}.json"), results)
    write_text(Path(f"{args.redraw or args.output}.md"), make_table(results))
    print(make_table(results))
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
