"""Vectors in fewer bits. Some milliseconds."""

import numpy as np
import pytest

from serving.precision import PRECISIONS, arrow_type, check_precision, restore, store


@pytest.fixture
def vectors() -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("precision, lost", [("float32", 1e-6), ("float16", 1e-3), ("int8", 1e-2), ("binary", 0.4)])
def test_what_is_lost(vectors, precision, lost):
    stored = store(vectors, precision)
    restored = restore(stored, precision)
    assert stored.nbytes * 8 == vectors.size * {"float32": 32, "float16": 16, "int8": 8, "binary": 1}[precision]
    assert lost / 100 < np.abs(restored - vectors).max() < lost or precision == "float32"
    np.testing.assert_allclose(np.linalg.norm(restored, axis=1), 1, atol=1e-6)
    again = restore(store(restored, precision), precision)
    np.testing.assert_allclose(again, restored, atol=max(lost / 100, 1e-6))  # storing again loses nothing more
    assert (store(vectors[::-1], precision)[::-1] == stored).all()  # no vector depends on others


def test_nothing_breaks_on_zeros():
    assert not store(np.zeros((2, 8), np.float32), "int8").any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_arrow_types_hold_what_is_stored(vectors, precision):
    pa = pytest.importorskip("pyarrow")
    stored = store(vectors, precision)
    kind = arrow_type(64, precision)
    assert pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), stored.shape[1]).type == kind


def test_sizes_that_binary_cannot_have():
    check_precision("binary", 16)
    check_precision("int8", 12)
    with pytest.raises(ValueError, match="multiple of 8"):
        check_precision("binary", 12)
