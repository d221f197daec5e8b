"""What search loses when vectors are stored smaller or indexed: recall of the exact ten nearest documents, per store.

    python -m benchmarks.corpus --data_dir TEXTS --folder work
    python -m benchmarks.stores --vectors work/out
    python -m benchmarks.stores --data_dir EVAL_PACKS --fill TEXTS

Documents are the first rows of what `serving.corpus` has written, queries the rows behind them; or documents and queries
are those of a retrieval pack, filled up with sentences of a text corpus. They are loaded by `serving.loaders` at each size
and precision, and searched with each store's own defaults. recall@10 is the share of the ten documents that an exact search
of whole float32 vectors finds; nDCG@10, times 100, is by the pack's own answers. Bytes are those on disk, without texts. int8 of LanceDB is float16 with an
index of int8; `parquet` is an exact search of what `serving.corpus` itself writes.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.corpus import read_sentences, read_vectors
from saving_utils import read_json, write_json


ROOT = Path(__file__).resolve().parent.parent
K = 10
# store, precision to load, index
CASES = [
    *(("parquet", precision, "exact") for precision in ("float32", "float16", "int8", "binary")),
    *(("lance", precision, "none") for precision in ("float32", "float16", "binary")),
    *(("lance", "float16", index) for index in ("ivf_flat", "ivf_sq", "ivf_hnsw_sq")),
    *(
        ("faiss", precision, index)
        for index in ("flat", "hnsw")
        for precision in ("float32", "float16", "int8", "binary")
    ),
]


def write_output(folder: Path, ids: list, vectors: np.ndarray, fingerprint: dict, precision: str = "float32") -> None:
    """What `serving.corpus` would have written, in one file: row `i` of `vectors` `(rows, dim)` is of `ids[i]`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from serving.corpus import Output, schema_of
    from serving.precision import store

    id_type = "string" if isinstance(ids[0], str) else "int64"
    options = {"id_type": id_type, "dim": vectors.shape[1], "precision": precision, "keep_text": False}
    output = Output(str(folder))
    output.write({"fingerprint": fingerprint, **options, "embedded": "all"})
    schema, stored = schema_of(options, fingerprint), store(vectors, precision)
    columns = {
        "id": ids,
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), stored.shape[1]),
        "n_tokens": np.ones(len(ids), np.int32),
        "truncated": np.zeros(len(ids), bool),
        "error": [None] * len(ids),
    }
    pq.write_table(pa.table([columns[name] for name in schema.names], schema=schema), folder / "data" / "0.parquet")


def cut(vectors: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` numbers, scaled to length 1."""
    return vectors[:, :dim] / np.linalg.norm(vectors[:, :dim], axis=1, keepdims=True)


def search(folder: Path, source: Path, case: tuple[str, str, str], queries: np.ndarray) -> tuple[np.ndarray, int]:
    """Loads `source` as a case says, and returns the ids `(queries, K)` found and the bytes on disk."""
    from serving.loaders import Vectors, load_faiss, load_lance
    from serving.precision import restore, store

    name, precision, index = case
    vectors = Vectors(str(source), precision, queries.shape[1])
    if name == "parquet":
        documents = np.concatenate([found for _, found, _ in vectors.batches()])
        stored = store(documents, precision)
        sought = restore(store(queries, precision), precision) if precision == "binary" else queries
        return np.argsort(-(sought @ restore(stored, precision).T), axis=1, kind="stable")[:, :K], stored.nbytes
    sought = store(queries, precision) if precision == "binary" else queries
    if name == "lance":
        import lancedb

        load_lance(vectors, str(folder / "lance"), "corpus", index)
        table = lancedb.connect(str(folder / "lance")).open_table("corpus")
        distance = "hamming" if precision == "binary" else "cosine"
        found = [
            table.search(query).distance_type(distance).select(["id", "_distance"]).limit(K).to_arrow()["id"]
            for query in sought
        ]
        found = np.array([ids.to_pylist() for ids in found])
    else:
        import faiss

        load_faiss(vectors, str(folder / "index.faiss"), "", index)
        read = faiss.read_index_binary if precision == "binary" else faiss.read_index
        found = read(str(folder / "index.faiss")).search(sought, K)[1]
    return found, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def vectors_of(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, list[set[int]] | None, dict]:
    """Vectors of documents and queries, where it is known which documents answer each, and the fingerprint."""
    if args.vectors:
        from serving.corpus import Output

        ids, vectors = read_vectors(args.vectors)
        vectors = vectors[np.argsort(ids)]
        queries = vectors[args.documents : args.documents + args.queries]
        return vectors[: args.documents], queries, None, Output(str(args.vectors)).read()["fingerprint"]
    from serving.loading import load_model
    from training.dev import load_pack

    model = load_model(args.model)
    instructions = read_json(ROOT / "instructions.json")
    pack = load_pack(str(args.data_dir / args.pack), instructions.get(args.pack, model.config.query_instruction))
    pack.corpus += read_sentences(args.fill, args.documents - len(pack.corpus))
    queries, documents = (side.numpy() for side in pack.embed(model, truncation="silent"))
    return documents, queries, pack.relevant, model.fingerprint()


def measure(
    documents: np.ndarray, queries: np.ndarray, relevant: list[set[int]] | None, fingerprint: dict, dims: list[int]
):
    """A row for each case and size."""
    from training.dev import ndcg_at_10

    exact = np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :K]
    rows = []
    with tempfile.TemporaryDirectory() as root:
        source = Path(root, "source")
        write_output(source, list(range(len(documents))), documents, fingerprint)
        for dim in dims:
            for number, case in enumerate(CASES):
                folder = Path(root, f"{dim}-{number}")
                folder.mkdir()
                found, size = search(folder, source, case, cut(queries, dim))
                recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), exact.tolist())])
                row = dict(zip(("store", "precision", "index"), case)) | {"dim": dim}
                row |= {"bytes": size / len(documents), "recall": float(recall)}
                rows.append(row | ({"ndcg": 100 * ndcg_at_10(found.tolist(), relevant)} if relevant else {}))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def table(results: dict) -> str:
    """The rows in Markdown, a size per pair of columns."""
    dims = results["dims"]
    shown = {"bytes": ",.0f", "recall": ".3f"} | ({"ndcg": ".2f"} if results["pack"] else {})
    head = ["store", "precision", "index", *(f"{name}, {dim}" for dim in dims for name in shown)]
    lines = ["| " + " | ".join(head) + " |", "|---" * 3 + "|--:" * (len(head) - 3) + "|"]
    for store, precision, index in CASES:
        cells = [store, precision, index]
        for row in results["rows"]:
            if (row["store"], row["precision"], row["index"]) == (store, precision, index):
                cells += [format(row[name], form) for name, form in shown.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stores", description=__doc__.split("\n")[0])
    parser.add_argument("--vectors", type=Path, help="an --output of serving.corpus, instead of a pack")
    parser.add_argument("--queries", type=int, default=100, help="rows of --vectors (default: 100)")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: this repository)")
    parser.add_argument("--data_dir", type=Path, help="folder of packs in mteb's layout")
    parser.add_argument("--pack", default="X-CosQACodeRetrieval", help="a retrieval pack")
    parser.add_argument("--fill", type=Path, help="folder of .txt.zst files")
    parser.add_argument("--documents", type=int, default=10000, help="the pack's and those filled in (default: 10000)")
    parser.add_argument("--dims", type=int, nargs="+", default=[768], help="numbers to keep (default: 768)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "stores.json")
    args = parser.parse_args(argv)
    if not args.vectors and not (args.data_dir and args.fill):
        parser.error("give --vectors, or --data_dir and --fill")
    documents, queries, relevant, fingerprint = vectors_of(args)
    results = {
        "pack": None if args.vectors else args.pack,
        "documents": len(documents),
        "queries": len(queries),
        "dims": args.dims,
    }
    results |= {
        "weights": fingerprint["weights"],
        "rows": measure(documents, queries, relevant, fingerprint, args.dims),
    }
    write_json(args.output, results)
    print(table(results))


if __name__ == "__main__":
    main()
