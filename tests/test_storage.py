"""benchmarks/storage.py: the variants are what a vector store would hold, and the table says what was measured."""

import json

import numpy as np
import pytest
from conftest import TEXTS

from benchmarks import storage
from evaluation.identity import folder_identity
from serving import precision


pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def vectors(tiny_model) -> np.ndarray:
    return tiny_model.encode(TEXTS)


@pytest.mark.parametrize("dim", [16, 64])
def test_cut_is_truncate_dim(tiny_model, vectors, dim):
    assert np.abs(storage.cut(vectors, dim) - tiny_model.encode(TEXTS, truncate_dim=dim)).max() < 1e-6


def test_precisions(vectors):
    ranges = np.stack([vectors.min(0), vectors.max(0)])
    assert np.abs(storage.store(vectors, "float32", ranges) - vectors).max() < 1e-6
    half = storage.store(vectors, "float16", ranges)
    assert 0 < np.abs(half - vectors).max() < 1e-3
    int8 = storage.store(vectors, "int8", ranges)
    assert np.abs(half - vectors).max() < np.abs(int8 - vectors).max() < 2 * (ranges[1] - ranges[0]).max() / 255
    binary = storage.store(vectors, "binary", ranges)
    equal = ((vectors[:, None] > 0) == (vectors[None] > 0)).mean(-1)  # share of equal signs
    assert np.abs(binary @ binary.T - (2 * equal - 1)).max() < 1e-6


def test_binary_is_stored_as_sentence_transformers_does(vectors):
    from sentence_transformers.util import quantize_embeddings

    assert (precision.store(vectors, "binary") == quantize_embeddings(vectors, "ubinary")).all()


def test_table_and_picture(tmp_path):
    rows = [
        {"dim": 8, "precision": "float32", "bytes": 32.0, "scores": {"A": 80.0, "B": 60.0}},
        {"dim": 8, "precision": "binary", "bytes": 1.0, "scores": {"A": 78.0, "B": 55.0}},
    ]
    storage.write({"revision": "x", "packs": ["A", "B"], "documents": {"A": None, "B": 7}, "rows": rows}, tmp_path)
    table = (tmp_path / "storage.md").read_text()
    assert "| 8 | binary | 1 | 78.00 | 55.00 | 3.50 |" in table
    assert "B: 7 documents." in table
    assert (tmp_path / "storage.png").stat().st_size > 1000
    before = (tmp_path / "storage.json").read_text()
    storage.main(["--redraw", str(tmp_path)])
    assert (tmp_path / "storage.json").read_text() == before
    assert json.loads(before)["packs"] == ["A", "B"]


def test_shortened_corpus_keeps_every_answer():
    from training.dev import RetrievalDev

    pack = RetrievalDev("x", ["q1", "q2"], ["a", "b", "c", "d", "e"], [{3}, {0, 4}], None)
    assert storage.shorten(pack, 4) == 4
    assert pack.corpus == ["a", "b", "d", "e"] and pack.relevant == [{2}, {0, 3}]
    assert storage.shorten(pack, None) == 4 and storage.shorten(pack, 1) == 3


def test_a_pack_is_measured(saved_dir, tmp_path):
    import datasets

    pairs = {"sentence1": TEXTS[:4], "sentence2": TEXTS[2:6], "score": [1.0, 2.0, 3.0, 4.0]}
    folder = tmp_path / "packs" / "STSBenchmark" / "data"
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict(pairs).to_parquet(folder / "test-00000-of-00001.parquet")
    packs = ["--data_dir", str(tmp_path / "packs"), "--packs", "STSBenchmark"]
    storage.main(["--model", str(saved_dir), *packs, "--output", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "storage.json").read_text())
    assert results["revision"] == folder_identity(saved_dir, True)
    rows = results["rows"]
    assert [(row["dim"], row["precision"]) for row in rows[:5]] == [
        (64, "float32"), (64, "float16"), (64, "int8"), (64, "binary"), (32, "float32"),
    ]  # fmt: skip
    assert rows[0]["scores"]["STSBenchmark"] == pytest.approx(rows[1]["scores"]["STSBenchmark"], abs=1e-6)
