"""Loading embedded corpora into local LanceDB, Qdrant and FAISS. About ten seconds, most of them imports."""

import numpy as np
import pytest


pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("ray")  # which knows the ids' types

from benchmarks.stores import write_output  # noqa: E402
from serving.corpus import Output  # noqa: E402
from serving.loaders import INDEXES, Vectors, faiss_id, load_faiss, load_lance, load_qdrant, main, point_id  # noqa: E402
from serving.vectors import read_fingerprint  # noqa: E402


FINGERPRINT = {"weights": "a" * 64, "instruction": None, "dimensions": 16, "normalized": True}
LOADERS = {"lance": load_lance, "qdrant": load_qdrant, "faiss": load_faiss}


def unit_vectors(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def folder(tmp_path):
    """50 vectors, ids from 100, and a row with an error, in two files."""
    path = tmp_path / "vectors"
    write_output(path, list(range(100, 150)), unit_vectors(50), FINGERPRINT)
    (file,) = (path / "data").glob("*.parquet")
    row = pq.read_table(file).slice(0, 1).to_pylist()[0] | {"id": 999, "embedding": None, "error": "text is empty"}
    pq.write_table(pa.Table.from_pylist([row], pq.read_schema(file)), path / "data" / "1.parquet")
    return path


def content(to: str, uri: str) -> dict[int | str, np.ndarray]:
    """Vectors by ids."""
    if to == "lance":
        import lancedb

        rows = lancedb.connect(uri).open_table("corpus").to_arrow()
        return dict(zip(rows["id"].to_pylist(), map(np.asarray, rows["vector"].to_pylist()), strict=True))
    if to == "qdrant":
        from qdrant_client import QdrantClient

        client = QdrantClient(path=uri)
        points, _ = client.scroll("corpus", limit=1000, with_vectors=True)
        client.close()
        assert all(point.id == point_id(point.payload["id"]) for point in points)
        return {point.payload["id"]: np.asarray(point.vector) for point in points}
    import faiss

    index = faiss.read_index(uri)
    return {int(number): index.reconstruct(int(number)) for number in faiss.vector_to_array(index.id_map)}


def load(to: str, uri: str, folder, precision=None, truncate_dim=None, index=None) -> int:
    return LOADERS[to](Vectors(str(folder), precision, truncate_dim), uri, "corpus", index or INDEXES[to][0])


@pytest.mark.parametrize("to", LOADERS)
def test_loading_twice_changes_nothing_and_new_rows_take_the_old_ones_places(to, folder, tmp_path, capsys):
    pytest.importorskip({"lance": "lancedb", "qdrant": "qdrant_client", "faiss": "faiss"}[to])
    uri = str(tmp_path / f"store.{to}")
    expected = dict(zip(range(100, 150), unit_vectors(50), strict=True))
    for _ in range(2):
        assert main([str(folder), "--to", to, "--uri", uri]) == 0
        assert "50 vectors of 16 numbers, float32" in capsys.readouterr().out
        found = content(to, uri)
        assert found.keys() == expected.keys()
        for row_id, vector in expected.items():
            np.testing.assert_allclose(found[row_id], vector, atol=1e-6)

    write_output(folder, list(range(100, 160)), unit_vectors(60, seed=1), FINGERPRINT)
    assert load(to, uri, folder) == 60
    found = content(to, uri)
    for row_id, vector in zip(range(100, 160), unit_vectors(60, seed=1), strict=True):
        np.testing.assert_allclose(found[row_id], vector, atol=1e-6)

    write_output(folder, [100], unit_vectors(1), {**FINGERPRINT, "weights": "b" * 64})
    assert main([str(folder), "--to", to, "--uri", uri]) == 2
    assert "weights" in capsys.readouterr().err
    assert content(to, uri).keys() == found.keys()


@pytest.mark.parametrize("precision", ["float16", "int8", "binary"])
def test_faiss_precisions(folder, tmp_path, precision):
    faiss = pytest.importorskip("faiss")
    vectors = unit_vectors(50)
    for index in INDEXES["faiss"]:
        uri = str(tmp_path / index)
        assert load("faiss", uri, folder, precision, 8, index) == 50
        assert read_fingerprint(uri) == {**FINGERPRINT, "dimensions": 8, "precision": precision}
        if precision == "binary":
            scores, found = faiss.read_index_binary(uri).search(np.packbits(vectors[:, :8] > 0, axis=1), 1)
            assert (scores == 0).all()
        else:
            scores, found = faiss.read_index(uri).search(vectors[:, :8], 1)
            assert found[:, 0].tolist() == list(range(100, 150))
            lengths = np.linalg.norm(vectors[:, :8], axis=1)
            np.testing.assert_allclose(scores[:, 0], lengths, atol=1e-3 if precision == "float16" else 0.02)
    assert not list(tmp_path.glob("*.tmp"))


def test_lance_precisions_and_indexes(folder, tmp_path):
    lancedb = pytest.importorskip("lancedb")
    write_output(folder, list(range(600)), unit_vectors(600), FINGERPRINT)
    vectors = unit_vectors(600)
    for precision, index, distance in (
        ("float16", "none", "cosine"),
        ("float16", "ivf_hnsw_sq", "cosine"),
        ("binary", "ivf_flat", "hamming"),
    ):
        uri = str(tmp_path / f"{precision}-{index}")
        assert load("lance", uri, folder, precision, index=index) == 600
        assert load("lance", uri, folder, precision, index=index) == 600
        table = lancedb.connect(uri).open_table("corpus")
        assert [i.columns for i in table.list_indices()] == [["id"]] + [["vector"]] * (index != "none")
        sought = np.packbits(vectors > 0, axis=1) if precision == "binary" else vectors
        found = [table.search(query).distance_type(distance).limit(3).to_list() for query in sought[:20]]
        assert all(row_id in [row["id"] for row in rows] for row_id, rows in enumerate(found) if distance == "cosine")
        assert all(rows[0]["_distance"] < 0.01 for rows in found)
    for precision, index in (("int8", "none"), ("binary", "ivf_pq")):
        with pytest.raises(ValueError, match="LanceDB"):
            load("lance", str(tmp_path / "no"), folder, precision, index=index)


def test_ids_that_are_strings(folder, tmp_path):
    faiss = pytest.importorskip("faiss")
    names = [f"größe {number}" for number in range(50)]
    write_output(tmp_path / "named", names, unit_vectors(50), FINGERPRINT)
    uri = str(tmp_path / "named.faiss")
    load("faiss", uri, tmp_path / "named")
    rows = pq.read_table(f"{uri}.ids.parquet").to_pylist()
    assert {row["id"]: row["number"] for row in rows} == {name: faiss_id(name) for name in names}
    index = faiss.read_index(uri)
    np.testing.assert_allclose(index.reconstruct(faiss_id("größe 7")), unit_vectors(50)[7], atol=1e-6)
    assert point_id(5) == 5 and point_id(-5) != point_id(5) and point_id("5") == point_id("5") != 5


@pytest.mark.parametrize("precision", ["float16", "int8", "binary"])
def test_what_is_stored_small_can_be_loaded(tmp_path, precision):
    pytest.importorskip("faiss")
    write_output(tmp_path / "small", list(range(50)), unit_vectors(50), FINGERPRINT, precision)
    vectors = np.concatenate([found for _, found, _ in Vectors(str(tmp_path / "small")).batches()])
    cosines = (vectors * unit_vectors(50)).sum(1)
    assert cosines.min() > {"float16": 0.99999, "int8": 0.999, "binary": 0.6}[precision]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert load("faiss", str(tmp_path / "a.faiss"), tmp_path / "small") == 50


def test_what_is_refused(folder, tmp_path, capsys):
    uri = str(tmp_path / "store")
    for more, told in (
        (["--to", "faiss", "--index", "ivf_pq"], "flat, hnsw"),
        (["--to", "faiss", "--truncate_dim", "17"], "at most 16"),
        (["--to", "faiss", "--truncate_dim", "9", "--precision", "binary"], "multiple of 8"),
    ):
        assert main([str(folder), "--uri", uri, *more]) == 2
        assert told in capsys.readouterr().err
    output = Output(str(folder))
    output.write({name: value for name, value in output.read().items() if name != "embedded"})
    assert main([str(folder), "--uri", uri, "--to", "faiss"]) == 2
    assert "finished" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
