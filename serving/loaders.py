"""Loads what `serving.corpus` has written into LanceDB, Qdrant or FAISS.

    python -m serving.loaders vectors --to lance --uri my.lance --index ivf_hnsw_sq
    python -m serving.loaders vectors --to qdrant --uri http://127.0.0.1:6333
    python -m serving.loaders vectors --to faiss --uri my.faiss --index hnsw --precision float16

Rows take the place of those of the same id: loading twice changes nothing, and after an interruption the same command
goes through all rows again. A FAISS file is made anew and replaced in one step. Rows with an error are left out. The
vectors' fingerprint goes along, and a store that holds another one is refused.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from scripts.cli import exit_code, positive
from serving.corpus import Output
from serving.precision import PRECISIONS, arrow_type, check_precision, restore, store
from serving.vectors import KEY, check_fingerprint, read_fingerprint, with_fingerprint, write_fingerprint


BATCH = 16384  # rows in memory at a time
PACKAGES = {"lance": "lancedb", "qdrant": "qdrant_client", "faiss": "faiss"}
PIP = {"qdrant_client": "qdrant-client", "faiss": "faiss-cpu"}  # where the package to install has another name
INDEXES = {
    "lance": ("none", "ivf_flat", "ivf_sq", "ivf_pq", "ivf_rq", "ivf_hnsw_sq", "ivf_hnsw_pq"),
    "qdrant": ("hnsw",),
    "faiss": ("flat", "hnsw"),
}  # the first is the default


class Vectors:
    """
    What a folder of `serving.corpus` holds.

    Args:
        precision, truncate_dim: What to load of it, unless all as it is stored.

    Raises:
        ValueError: the folder is not finished, or its vectors cannot be stored so.
    """

    def __init__(self, folder: str, precision: str | None = None, truncate_dim: int | None = None):
        output = Output(folder)
        run = output.read()
        if "embedded" not in run:
            raise ValueError(f"{folder} must be a finished --output of serving.corpus: run that until it ends.")
        full = run["fingerprint"]["dimensions"]
        self.data, self.found = output.dataset(), run["precision"]
        self.precision, self.dim = precision or self.found, truncate_dim or full
        if self.dim > full:
            raise ValueError(f"--truncate_dim must be at most {full}, the numbers of these vectors, got {self.dim}.")
        check_precision(self.precision, self.dim)
        self.fingerprint = {**run["fingerprint"], "dimensions": self.dim, "precision": self.precision}
        self.id_type, self.keep_text = run["id_type"], run["keep_text"]

    def batches(self) -> Iterator[tuple[list, "np.ndarray", list[str] | None]]:  # noqa: F821
        """Ids, unit vectors `(rows, dim)` in float32, and texts where they are kept."""
        import pyarrow.compute as pc

        columns = ["id", "embedding"] + ["text"] * self.keep_text
        wanted = pc.field("error").is_null()
        for batch in self.data.to_batches(columns=columns, filter=wanted, batch_size=BATCH):
            if len(batch):
                stored = batch["embedding"].flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
                vectors = restore(restore(stored, self.found)[:, : self.dim], "float32")
                yield batch["id"].to_pylist(), vectors, batch["text"].to_pylist() if self.keep_text else None


def load_lance(vectors: Vectors, uri: str, name: str, index: str) -> int:
    """Into a LanceDB table with the columns `id`, `vector` and, where it is kept, `text`; returns its rows."""
    import lancedb
    import lancedb.index
    import pyarrow as pa

    from serving.rows import ID_TYPES

    if vectors.precision == "int8":
        raise ValueError(
            "LanceDB cannot search int8 columns: --precision float16 --index ivf_sq keeps int8 in the index."
        )
    is_binary = vectors.precision == "binary"
    if is_binary and index not in ("none", "ivf_flat"):
        raise ValueError(f"LanceDB indexes binary vectors by ivf_flat alone, got --index {index}.")
    fields = {"id": ID_TYPES[vectors.id_type], "vector": arrow_type(vectors.dim, vectors.precision)}
    fields |= {"text": pa.large_string()} if vectors.keep_text else {}
    schema = with_fingerprint(pa.schema(fields), vectors.fingerprint)

    def tables() -> Iterator[pa.RecordBatch]:
        for ids, found, texts in vectors.batches():
            stored = store(found, vectors.precision)
            columns = {"id": ids, "text": texts}
            columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), stored.shape[1])
            yield pa.record_batch([columns[field] for field in schema.names], schema=schema)

    database = lancedb.connect(uri)
    try:
        table = database.open_table(name)
    except ValueError:  # there is none
        table = database.create_table(name, schema=schema)
    held = json.loads((table.schema.metadata or {}).get(KEY, b"null"))
    check_fingerprint(held, vectors.fingerprint, f"the table {name} of {uri}")
    if table.count_rows() == 0:
        table.add(pa.RecordBatchReader.from_batches(schema, tables()))
        table.create_index("id", config=lancedb.index.BTree())
    else:
        for batch in tables():
            merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(pa.table(batch))
    if index != "none" and not any("vector" in held.columns for held in table.list_indices()):
        kinds = {"ivf_hnsw_sq": "HnswSq", "ivf_hnsw_pq": "HnswPq"}
        kind = getattr(lancedb.index, kinds.get(index, "Ivf" + index.removeprefix("ivf_").capitalize()))
        table.create_index("vector", config=kind(distance_type="hamming" if is_binary else "cosine"))
    table.optimize()
    return table.count_rows()


def load_qdrant(vectors: Vectors, uri: str, name: str, index: str, client=None) -> int:
    """
    Into a Qdrant collection, on a server or in a folder of its local mode; returns its points. An id that is a whole
    number from 0 stays one, any other becomes a UUID; the payload has it as `id`. int8 and binary vectors stand beside
    those in float16, as Qdrant's scalar and binary quantization.
    """
    from qdrant_client import QdrantClient, models

    client = client or (QdrantClient(url=uri) if "://" in uri else QdrantClient(path=uri))
    if not client.collection_exists(name):
        quantization = {
            "int8": models.ScalarQuantization(scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8)),
            "binary": models.BinaryQuantization(binary=models.BinaryQuantizationConfig()),
        }.get(vectors.precision)
        datatype = models.Datatype.FLOAT32 if vectors.precision == "float32" else models.Datatype.FLOAT16
        client.create_collection(
            name,
            models.VectorParams(size=vectors.dim, distance=models.Distance.COSINE, datatype=datatype),
            quantization_config=quantization,
            metadata={"fingerprint": vectors.fingerprint},
        )
    held = (client.get_collection(name).config.metadata or {}).get("fingerprint")
    check_fingerprint(held, vectors.fingerprint, f"the collection {name} of {uri}")
    for ids, found, texts in vectors.batches():
        payloads = [{"id": row_id, **({"text": texts[place]} if texts else {})} for place, row_id in enumerate(ids)]
        points = (
            models.PointStruct(id=point_id(row_id), vector=vector.tolist(), payload=payload)
            for row_id, vector, payload in zip(ids, found, payloads, strict=True)
        )
        client.upload_points(name, points, batch_size=256, wait=True)
    return client.count(name).count


def point_id(row_id: str | int) -> str | int:
    """What Qdrant takes for an id: a whole number from 0, or a UUID."""
    return row_id if isinstance(row_id, int) and row_id >= 0 else str(uuid.uuid5(uuid.NAMESPACE_OID, str(row_id)))


def load_faiss(vectors: Vectors, uri: str, name: str, index: str) -> int:
    """
    Into a file that holds an IndexIDMap2, of binary vectors an IndexBinaryIDMap2; returns its vectors. Ids that are
    strings become numbers, which `URI.ids.parquet` lists. int8 is FAISS's scalar quantizer, trained on the first batch.
    """
    import faiss
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    if Path(uri).exists():
        check_fingerprint(read_fingerprint(uri), vectors.fingerprint, uri)
    dim, is_hnsw, product = vectors.dim, index == "hnsw", faiss.METRIC_INNER_PRODUCT
    quantizers = {"float16": faiss.ScalarQuantizer.QT_fp16, "int8": faiss.ScalarQuantizer.QT_8bit}
    is_binary, quantizer = vectors.precision == "binary", quantizers.get(vectors.precision)
    if is_binary:
        bare = faiss.IndexBinaryHNSW(dim, 32) if is_hnsw else faiss.IndexBinaryFlat(dim)
    elif quantizer is None:
        bare = faiss.IndexHNSWFlat(dim, 32, product) if is_hnsw else faiss.IndexFlatIP(dim)
    elif is_hnsw:
        bare = faiss.IndexHNSWSQ(dim, quantizer, 32, product)
    else:
        bare = faiss.IndexScalarQuantizer(dim, quantizer, product)
    mapped = (faiss.IndexBinaryIDMap2 if is_binary else faiss.IndexIDMap2)(bare)
    names, numbers = [], []
    for ids, found, _ in vectors.batches():
        found = store(found, "binary") if is_binary else found
        if not mapped.is_trained:
            bare.train(found)
        numbers.append(np.array([faiss_id(row_id) for row_id in ids], np.int64))
        names += ids if vectors.id_type == "string" else []
        mapped.add_with_ids(found, numbers[-1])
    numbers = np.concatenate([np.empty(0, np.int64), *numbers])
    if len(np.unique(numbers)) < len(numbers):
        raise ValueError("Two ids have one 63-bit hash. Give the rows ids that are numbers.")
    if names:
        pq.write_table(pa.table({"number": numbers, "id": names}), f"{uri}.ids.parquet")
    temporary = f"{uri}.{os.getpid()}.tmp"
    try:
        (faiss.write_index_binary if is_binary else faiss.write_index)(mapped, temporary)
        write_fingerprint(uri, vectors.fingerprint)
        os.replace(temporary, uri)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return mapped.ntotal


def faiss_id(row_id: str | int) -> int:
    """A number as it is; of a string 63 bits of its hash."""
    if isinstance(row_id, int):
        return row_id
    return int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest()) >> 1


def load(args: argparse.Namespace) -> None:
    """Loads a folder, and says how many vectors there are now."""
    package = PACKAGES[args.to]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"--to {args.to} needs {package}: pip install {PIP.get(package, package)}.")
    index = args.index or INDEXES[args.to][0]
    if index not in INDEXES[args.to]:
        raise ValueError(f"--index of {args.to} must be one of {', '.join(INDEXES[args.to])}, got {index}.")
    vectors = Vectors(args.folder, args.precision, args.truncate_dim)
    count = {"lance": load_lance, "qdrant": load_qdrant, "faiss": load_faiss}[args.to](
        vectors, args.uri, args.name, index
    )
    print(f"{args.uri} holds {count:,} vectors of {vectors.dim} numbers, {vectors.precision}.")


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m serving.loaders", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", help="a finished --output of serving.corpus, local or s3://")
    add("--to", choices=PACKAGES, required=True, help="where to load it")
    add("--uri", required=True, help="lance: folder or URI; qdrant: URL, or folder of its local mode; faiss: file")
    add("--name", default="corpus", help="table or collection (default: corpus)")
    add(
        "--index",
        help="; ".join(f"{to}: {', '.join(kinds)}" for to, kinds in INDEXES.items()) + " (default: the first)",
    )
    add("--precision", choices=PRECISIONS, help="of what is kept for search (default: as it is stored)")
    add("--truncate_dim", type=positive, help="numbers to keep of each vector (default: all)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs it; see [`exit_code`] for what it returns."""
    args = build_parser().parse_args(argv)
    return exit_code("loaders", lambda: load(args))


if __name__ == "__main__":
    sys.exit(main())
