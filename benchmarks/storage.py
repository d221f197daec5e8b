"""What smaller vectors lose: float32, float16, int8 and binary, at full and truncated dimensions.

    python -m benchmarks.storage --data_dir EVAL_PACKS --output benchmarks/results/storage
    python -m benchmarks.storage --redraw benchmarks/results/storage

Texts are embedded once; every variant is made from those vectors, documents and queries alike, by sentence-transformers'
quantize_embeddings as in its `precision=`. int8 takes each number's range from the documents (of an STS pack, from all
sentences). Binary keeps the signs and compares by the share of equal bits. Scores are Spearman's correlation and nDCG@10,
times 100. Left in --output: storage.json, storage.md and storage.png.
"""

import argparse
from pathlib import Path

import numpy as np

from evaluation.plots import new_figure, save_figure
from saving_utils import read_json, write_json, write_text


ROOT = Path(__file__).resolve().parent.parent
BITS = {"float32": 32, "float16": 16, "int8": 8, "binary": 1}


def cut(vectors: np.ndarray, dim: int) -> np.ndarray:
    """`truncate_dim`: the first `dim` numbers, scaled to length 1."""
    return vectors[:, :dim] / np.linalg.norm(vectors[:, :dim], axis=1, keepdims=True)


def store(vectors: np.ndarray, precision: str, ranges: np.ndarray) -> np.ndarray:
    """What is compared after storing in this precision: `(texts, dim)`, as float32."""
    from sentence_transformers.util import quantize_embeddings

    if precision == "int8":
        levels = quantize_embeddings(vectors, "int8", ranges=ranges).astype(np.float32)
        low, high = ranges
        vectors = low + (levels + 128) * (high - low) / 255
    elif precision == "binary":
        bits = np.unpackbits(quantize_embeddings(vectors, "ubinary"), axis=1)[:, : vectors.shape[1]]
        vectors = 2 * bits.astype(np.float32) - 1  # a product of signs counts equal bits less unequal ones
    elif precision == "float16":
        vectors = vectors.astype(np.float16).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def shorten(pack, max_documents: int | None) -> int | None:
    """Leaves a retrieval pack this many documents: all that answer a query, then the first others. Returns how many."""
    from training.dev import STSDev

    if isinstance(pack, STSDev):
        return None
    answers = set().union(*pack.relevant)
    others = [place for place in range(len(pack.corpus)) if place not in answers]
    kept = sorted([*answers, *others[: max(0, (max_documents or len(pack.corpus)) - len(answers))]])
    places = {place: new for new, place in enumerate(kept)}
    pack.corpus = [pack.corpus[place] for place in kept]
    pack.relevant = [{places[place] for place in wanted} for wanted in pack.relevant]
    return len(kept)


def measure(args: argparse.Namespace) -> dict:
    """Scores of all variants on all packs."""
    import torch

    from evaluation.identity import locate
    from modeling_causal2vec import Causal2VecModel
    from runtime_utils import default_device
    from training.dev import STSDev, load_pack

    model = Causal2VecModel.from_pretrained(args.model).to(default_device())
    instructions = read_json(ROOT / "instructions.json")
    full = model.config.embedding_size
    dims = [dim for dim in (full, full // 2, full // 4, full // 8) if dim % 16 == 0]
    rows = [{"dim": d, "precision": p, "bytes": d * bits / 8, "scores": {}} for d in dims for p, bits in BITS.items()]
    documents = {}
    for name in args.packs:
        pack = load_pack(str(Path(args.data_dir, name)), instructions.get(name, model.config.query_instruction))
        documents[name] = shorten(pack, args.max_documents)
        vectors = [side.numpy() for side in pack.embed(model, batch_size=args.batch_size)]
        for row in rows:
            first, second = (cut(side, row["dim"]) for side in vectors)
            known = np.concatenate([first, second]) if isinstance(pack, STSDev) else second
            ranges = np.stack([known.min(0), known.max(0)])
            first, second = (torch.from_numpy(store(side, row["precision"], ranges)) for side in (first, second))
            row["scores"][name] = 100 * pack.compare(first, second)
    return {"revision": locate(args.model).revision, "packs": args.packs, "documents": documents, "rows": rows}


def write(results: dict, output: Path) -> None:
    """The table and the picture of what was measured."""
    write_json(output / "storage.json", results)
    full = results["rows"][0]["scores"]
    lines = [
        "| numbers | precision | bytes per vector | " + " | ".join(results["packs"]) + " | loss |",
        "|" + "---|" * (len(results["packs"]) + 4),
    ]
    for row in results["rows"]:
        loss = np.mean([full[name] - row["scores"][name] for name in results["packs"]])
        scores = " | ".join(f"{row['scores'][name]:.2f}" for name in results["packs"])
        lines.append(f"| {row['dim']} | {row['precision']} | {row['bytes']:,.0f} | {scores} | {loss:.2f} |")
    for name, count in results["documents"].items():
        if count is not None:
            lines += ["", f"{name}: {count:,} documents."]
    write_text(output / "storage.md", "\n".join(lines) + "\n")

    figure, axes = new_figure(5 * len(results["packs"]), 3.6, ncols=len(results["packs"]), squeeze=False)
    for axis, name in zip(axes[0], results["packs"]):
        for precision in BITS:
            rows = [row for row in results["rows"] if row["precision"] == precision]
            axis.plot([r["bytes"] for r in rows], [r["scores"][name] for r in rows], marker="o", label=precision)
        axis.set(xscale="log", title=name, xlabel="bytes per vector", ylabel="score")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    save_figure(figure, output / "storage.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storage", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: this repository)")
    parser.add_argument("--data_dir", default="eval", help="folder of packs in mteb's layout")
    parser.add_argument("--packs", nargs="+", default=["STSBenchmark", "SciFact"], help="STS or retrieval packs")
    parser.add_argument("--max_documents", type=int, help="of a retrieval pack: all that answer, then the first others")
    parser.add_argument("--batch_size", type=int, default=32, help="texts per forward pass")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "storage", help="folder to write"
    )
    parser.add_argument(
        "--redraw", type=Path, metavar="FOLDER", help="only write table and picture of a storage.json anew"
    )
    args = parser.parse_args(argv)
    if args.redraw:
        write(read_json(args.redraw / "storage.json"), args.redraw)
    else:
        results = measure(args)
        write(results, args.output)
        print((args.output / "storage.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
