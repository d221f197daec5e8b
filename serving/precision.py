"""Vectors in fewer bits, under the names that sentence-transformers gives them as `precision=`.

No precision needs anything but the vector itself, so that vectors written at different times can be compared. Of an int8
vector its length is lost, which no cosine notices; binary keeps the signs, eight to a byte, for the Hamming distance.
"""

import numpy as np


PRECISIONS = ("float32", "float16", "int8", "binary")


def check_precision(precision: str, dim: int) -> None:
    """Raises ValueError unless vectors of `dim` numbers can be stored so."""
    if precision == "binary" and dim % 8:
        raise ValueError(f"Binary vectors need a multiple of 8 numbers, got {dim}; choose such a --truncate_dim.")


def store(vectors: np.ndarray, precision: str) -> np.ndarray:
    """`(texts, dim)` in float32 to what is stored: of int8 the largest number is 127, of binary `(texts, dim / 8)` bytes."""
    if precision == "binary":
        return np.packbits(vectors > 0, axis=1)
    if precision == "int8":
        scale = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return np.rint(vectors / scale * 127).astype(np.int8)
    return vectors.astype(precision)


def restore(stored: np.ndarray, precision: str) -> np.ndarray:
    """What `store` gave, as unit vectors in float32."""
    if precision == "binary":
        stored = np.unpackbits(stored, axis=1).astype(np.float32) * 2 - 1
    vectors = stored.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def arrow_type(dim: int, precision: str):
    """The type of a Parquet or LanceDB column of such vectors."""
    import pyarrow as pa

    width, number = {
        "float32": (dim, pa.float32()),
        "float16": (dim, pa.float16()),
        "int8": (dim, pa.int8()),
        "binary": (dim // 8, pa.uint8()),
    }[precision]
    return pa.list_(number, width)
