"""Reading the files of a corpus, without Ray running. About two seconds, most of them Ray's import."""

import gzip
import io
import json

import pytest


pytest.importorskip("ray")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from serving.rows import find_inputs, id_type_of, lost_id, read_blocks  # noqa: E402


def read(content: bytes, path: str, id_type: str = "string", text_column: str | None = "text", block_rows: int = 100):
    """Rows of all blocks as tuples."""
    blocks = list(read_blocks(pa.BufferReader(content), path, "id", text_column, id_type, block_rows))
    assert all(len(block) <= block_rows for block in blocks)
    return [tuple(row.values()) for block in blocks for row in block.to_pylist()]


def parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


JSONL = b"""{"id": 1, "text": "one"}
{"id": "b", "text": null}

{"id": "c", "text": " "}
{"id": "d", "text": 5, "more": [1]}
{"id": "e"}
{"id": "f", "text": "half \\ud83d a character"}
{"text": "no id"}
not JSON
[1, 2]
{"id": "g", "text": "\xff"}
{"id": {"a": 1}, "text": "odd id"}
{"id": "", "text": "empty id"}
"""


def test_jsonl_rows_that_cannot_be_embedded_have_an_error():
    rows = read(JSONL, "a.jsonl", block_rows=5)
    assert rows[:6] == [
        ("1", "one", None),
        ("b", None, "text is null or missing"),
        ("c", None, "text is empty"),
        ("d", None, "text is int, not a string"),
        ("e", None, "text is null or missing"),
        ("f", "half \ufffd a character", None),
    ]
    assert [row[0] for row in rows[6:]] == [f"a.jsonl#{number}" for number in range(6, 12)]
    assert [row[2].split(":")[0] for row in rows[6:]] == [
        "no id",
        "no JSON object",
        "no JSON object",
        "no JSON object",
        "no id",
        "no id",
    ]
    assert rows[7][2].endswith("row 7 of a.jsonl") and {row[1] for row in rows[6:]} == {None}


def test_numbers_for_ids():
    content = b"".join(
        json.dumps({"id": row_id, "text": "a"}).encode() + b"\n" for row_id in (7, "8", -9, True, "x", 2**63, 1.0, None)
    )
    rows = read(content, "a.jsonl", "int64")
    assert [row[0] for row in rows[:3]] == [7, 8, -9]
    assert [row[0] for row in rows[3:]] == [lost_id("a.jsonl", number, "int64") for number in range(3, 8)]
    assert all(row[0] < 0 and row[1] is None and row[2] for row in rows[3:]) and len({row[0] for row in rows}) == 8


def test_csv():
    content = '\ufeffid,title,text\n1,a,"two\nlines, one field"\n2,b\n3,c,\n,d,text\n4,e,f,more\n'.encode()
    rows = read(content, "a.csv")
    assert rows[:3] == [
        ("1", "two\nlines, one field", None),
        ("2", None, "text is null or missing"),
        ("3", None, "text is empty"),
    ]
    assert rows[3][0] == "a.csv#3" and rows[4] == ("4", "f", None)
    assert read(b"id,text\n1," + b"x" * 200_000, "a.csv")[0][1] == "x" * 200_000


def test_parquet():
    table = pa.table({"text": ["one", None, "", "four"], "other": [1, 2, 3, 4], "id": pa.array([1, 2, 3, None])})
    rows = read(parquet(table), "a.parquet", "int64", block_rows=3)
    assert rows[:3] == [(1, "one", None), (2, None, "text is null or missing"), (3, None, "text is empty")]
    assert rows[3][0] == lost_id("a.parquet", 3, "int64")
    numbers = pa.table({"id": ["a", "b"], "text": [1.5, 2.5]})
    assert read(parquet(numbers), "a.parquet") == [(i, None, "text is float, not a string") for i in "ab"]
    damaged = pa.table({"id": ["a"], "text": pa.array([b"\xff"]).view(pa.string())})
    assert read(parquet(damaged), "a.parquet") == [("a", None, "text is not UTF-8")]
    coded = table.set_column(0, "text", table["text"].dictionary_encode())
    assert read(parquet(coded), "a.parquet", "int64") == rows


@pytest.mark.parametrize("path", ["a.csv", "a.parquet"])
def test_a_column_that_is_not_there(path):
    content = b"id,body\n1,a\n" if path == "a.csv" else parquet(pa.table({"id": [1], "body": ["a"]}))
    with pytest.raises(ValueError, match="'text', only id, body"):
        read(content, path)
    assert read(content, path, text_column=None) == [("1", None, None)]


def test_inputs(tmp_path):
    def write(name: str, content: bytes = b'{"id": 1, "text": "a"}\n') -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    a, b = write("a 1.jsonl"), write("sub/b.jsonl.gz", gzip.compress(b'{}\n{"id": "x", "text": "a"}\n'))
    c, other = write("c.csv", b"id,text\n1,a\n"), write("notes.txt")
    local, found = find_inputs([str(tmp_path)])
    assert list(found) == [a, c, b] and found[a].size == 23
    assert list(find_inputs([f"{tmp_path}/*.jsonl"])[1]) == [a]
    assert list(find_inputs([f"{tmp_path}/**.jsonl*"])[1]) == [a, b]
    assert list(find_inputs([c, a])[1]) == [a, c]
    assert [id_type_of(local, path, "id", "text") for path in (a, b, c)] == ["int64", "string", "string"]
    for columns in (("key", "text"), ("id", "body")):
        with pytest.raises(ValueError, match="nothing under '(key|body)'"):
            id_type_of(local, a, *columns)
    for pattern in (other, f"{tmp_path}/*.txt"):
        with pytest.raises(ValueError, match="must end in"):
            find_inputs([pattern])
    for pattern in (f"{tmp_path}/*.parquet", f"{tmp_path}/nothing"):
        with pytest.raises(ValueError, match="finds no file"):
            find_inputs([pattern])
