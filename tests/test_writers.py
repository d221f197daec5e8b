"""Vectors in files: written part by part, joined when all are there, and nothing lost or there twice."""

import json
from pathlib import Path

import numpy as np
import pytest

from scripts import writers
from scripts.tables import Rows
from scripts.writers import Parts, check_output, to_table
from serving.precision import store
from serving.vectors import read_fingerprint


FINGERPRINT = {"weights": "a", "dimensions": 8}
VECTORS = np.random.default_rng(0).normal(size=(7, 8)).astype(np.float32)
ROWS = [{"id": i, "text": f"text {i}", "n": [i] if i < 3 else None} for i in range(7)]


def settings(**other) -> dict:
    return {"fingerprint": FINGERPRINT, "precision": "float32", "text_column": "text"} | other


def window(rows: list[dict], start: int = 0) -> Rows:
    return Rows([start + i + 1 for i in range(len(rows))], [row["text"] for row in rows], rows)


def write_all(output: Path, precision: str = "float32", size: int = 3, column: str = "embedding") -> tuple[int, int]:
    with Parts(output, settings(precision=precision), column) as parts:
        for number, start in enumerate(range(0, len(ROWS), size)):
            rows = window(ROWS[start : start + size], start)
            assert not parts.has(number, rows)
            parts.write(number, rows, store(VECTORS[start : start + size], precision))
        return parts.join(number + 1)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".lance"])
def test_outputs_hold_the_vectors_and_what_made_them(tmp_path, suffix, precision):
    output, expected = tmp_path / f"a{suffix}", store(VECTORS, precision)
    if suffix != ".npy":
        pytest.importorskip("pyarrow" if suffix == ".parquet" else "lancedb")
    assert write_all(output, precision) == expected.shape
    if suffix == ".npy":
        found = np.load(output)
    else:
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            table = pq.read_table(output)
        else:
            import lancedb

            table = lancedb.connect(tmp_path).open_table("a").to_arrow()
        assert table.column_names == ["id", "text", "n", "embedding"]
        assert table.drop(["embedding"]).to_pylist() == ROWS
        found = np.array(table["embedding"].to_pylist())
        assert table.schema.field("embedding").type.value_type.to_pandas_dtype() == expected.dtype
        assert json.loads(table.schema.metadata[b"causal2vec.fingerprint"]) == FINGERPRINT
    np.testing.assert_array_equal(found, expected)
    if suffix != ".lance":
        assert read_fingerprint(output) == FINGERPRINT
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_row_groups_are_large(tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(writers, "GROUP", 4)
    write_all(tmp_path / "a.parquet", size=2)
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 3]


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_parts_are_resumed_and_checked(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    output, first, second = tmp_path / f"a{suffix}", window(ROWS[:3]), window(ROWS[3:], 3)
    output.write_bytes(b"old")
    with Parts(output, settings(), "embedding") as parts:
        parts.write(0, first, VECTORS[:3])
        with pytest.raises(ValueError, match="Another process writes"):
            Parts(output, settings(), "embedding")
    (parts.folder / "unfinished").write_bytes(b"of a part that was killed")
    assert output.read_bytes() == b"old"
    with pytest.raises(
        ValueError, match="was begun with another fingerprint and another precision. Go on with the same, or"
    ):
        Parts(output, settings(precision="int8", fingerprint={**FINGERPRINT, "weights": "b"}), "embedding")
    with Parts(output, settings(), "embedding") as parts:
        assert parts.has(0, first) and not parts.has(1, second)
        for rows in (ROWS[:2], [{**ROWS[0], "id": 9}, *ROWS[1:3]], [{**ROWS[0], "text": ""}, *ROWS[1:3]]):
            with pytest.raises(ValueError, match="not what .* was begun with: other rows came where 1 to . are now"):
                parts.has(0, window(rows))
        parts.write(1, second, VECTORS[3:])
        with pytest.raises(ValueError, match="The input ends before what"):
            parts.join(1)
        assert parts.join(2) == (7, 8)
    found = np.load(output) if suffix == ".npy" else None
    assert suffix != ".npy" or np.array_equal(found, VECTORS)


def test_rows_of_a_table_are_hashed_with_all_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    tables = [pa.table({"text": ["a"], "id": [number]}) for number in (1, 1, 2)]
    first, same, other = (writers.digest(Rows([1], ["a"], table)) for table in tables)
    assert first == same != other


def test_columns_of_any_values_are_kept(tmp_path):
    """Types that differ, within a part or between two, become JSON; what is missing is null."""
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [
        {"text": "a", "same": 1, "mixed": 1, "wide": 1, "later": None, "nested": {"a": 1}, "empty": {}, "big": 2**70},
        {"text": "b", "same": 2, "mixed": "x", "wide": 2, "only": [1.5]},
        {"text": "c", "same": 3, "mixed": 2, "wide": 0.5, "later": "z", "nested": {"b": ["ü"]}, "null": None},
    ]
    with Parts(tmp_path / "a.parquet", settings(), "embedding") as parts:
        parts.write(0, window(rows[:2]), VECTORS[:2])
        parts.write(1, window(rows[2:], 2), VECTORS[2:3])
        parts.join(2)
    table = pq.read_table(tmp_path / "a.parquet")
    found = table.drop(["embedding"]).to_pydict()
    assert table.column_names[-1] == "embedding"
    assert found["same"] == [1, 2, 3] and found["wide"] == [1.0, 2.0, 0.5] and found["later"] == [None, None, "z"]
    assert found["mixed"] == ["1", "x", "2"] and found["big"] == [str(2**70), None, None]
    assert found["only"] == [None, [1.5], None] and found["empty"] == ["{}", None, None] and found["null"] == [None] * 3
    assert found["nested"] == [{"a": 1, "b": None}, None, {"a": None, "b": ["ü"]}]


def test_parquet_rows_stay_what_they_are(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"id": pa.array([1, None], pa.int16()), "text": pa.array(["a", "b"]).dictionary_encode()})
    with Parts(tmp_path / "a.parquet", settings(), "vector") as parts:
        parts.write(0, Rows([1, 2], ["a", "b"], table), VECTORS[:2])
        parts.join(1)
    found = pq.read_table(tmp_path / "a.parquet")
    assert found.schema.field("id").type == pa.int16() and found.column_names == ["id", "text", "vector"]
    assert found["id"].to_pylist() == [1, None] and to_table(table) is table


def test_a_column_of_that_name_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    with Parts(tmp_path / "a.parquet", settings(), "id") as parts:
        with pytest.raises(ValueError, match="The input has a column 'id' already: name another --embedding_column"):
            parts.write(0, window(ROWS), VECTORS)


def test_outputs_that_cannot_be_written(tmp_path, monkeypatch):
    for name, message in {
        "a.csv": "--output must end in one of .parquet, .npy, .lance, got .*a.csv",
        "gone/a.npy": "There is no folder .*gone for .*a.npy; make it first",
        "folder.npy": "--output must be a file, and .*folder.npy is a folder",
        "full.lance": ".*full.lance is there already. Choose another --output, or remove it",
    }.items():
        (tmp_path / "folder.npy").mkdir(exist_ok=True)
        (tmp_path / "full.lance" / "data").mkdir(parents=True, exist_ok=True)
        with pytest.raises(ValueError, match=message):
            check_output(tmp_path / name)
    with pytest.raises(ValueError, match=r"Cannot write .*: File name too long"):
        Parts(tmp_path / ("a" * 250 + ".npy"), settings(), "embedding")
    for name, module in (("a.parquet", "pyarrow.parquet"), ("a.lance", "lancedb")):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(ValueError, match=f"{Path(name).suffix} outputs need .*: pip install"):
            check_output(tmp_path / name)
    check_output(tmp_path / "a.npy")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("suffix", ["npy", "parquet"])
@pytest.mark.parametrize("when", ["part", "whole"])
def test_a_full_disk_is_told_and_leaves_the_old_output(tmp_path, suffix, when):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    output = tmp_path / f"a.{suffix}"
    output.write_bytes(b"old")
    with Parts(output, settings(), "embedding") as parts:
        if when == "whole":
            parts.write(0, window(ROWS), VECTORS)
        (parts.folder / "unfinished").symlink_to("/dev/full")
        with pytest.raises(ValueError, match=f"Cannot write {output}: No space left on device"):
            parts.write(0, window(ROWS), VECTORS) if when == "part" else parts.join(1)
    assert output.read_bytes() == b"old"
    with Parts(output, settings(), "embedding") as parts:
        assert parts.has(0, window(ROWS)) == (when == "whole")
