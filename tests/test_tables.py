"""Rows of tables: what is read, what is refused, and that memory does not grow with a file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from scripts import tables
from scripts.tables import read_rows


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows_of(path: str, text_column: str = "text", size: int = 2, **kwargs) -> list[tuple]:
    return [
        (line, text, row)
        for rows in read_rows(path, text_column, size, **kwargs)
        for line, text, row in zip(
            rows.lines, rows.texts, rows.columns if isinstance(rows.columns, list) else rows.columns.to_pylist()
        )
    ]


def error_of(path: str, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        rows_of(path, **kwargs)
    return str(error.value)


def test_lines_of_a_text(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\ntwo\rthree\x00\x0b")
    assert [row[:2] for row in rows_of(path)] == [(1, "one"), (2, ""), (3, "two"), (4, "three\x00\x0b")]
    assert rows_of(path)[0][2] == {"text": "one"}


def test_rows_of_jsonl(tmp_path):
    rows = [
        {"id": 1, "text": "a\u2028b"},
        {"title": "T", "text": "b"},
        {"title": "", "text": "c"},
        {"title": None, "text": "\ud800", "tags": ["\udfff", {"\ud801": 1}]},
    ]
    path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows)))
    found = rows_of(path)
    assert [row[:2] for row in found] == [(1, "a\u2028b"), (3, "T\nb"), (5, "c"), (7, "\ufffd")]
    assert found[0][2] == rows[0] and found[3][2]["tags"] == ["\ufffd", {"\ufffd": 1}]
    path = write(tmp_path / "b.ndjson", '{"title": "x", "text": "y", "body": "z"}')
    assert rows_of(path, "title")[0][1] == "x" and rows_of(path, "body")[0][1] == "x\nz"


def test_rows_of_csv_and_tsv(tmp_path):
    path = write(tmp_path / "a.csv", 'id,text\r\n1,"two\r\nlines, ""quoted"""\r\n\r\n2,\r\n')
    assert rows_of(path) == [
        (2, 'two\r\nlines, "quoted"', {"id": "1", "text": 'two\r\nlines, "quoted"'}),
        (5, "", {"id": "2", "text": ""}),
    ]
    path = write(tmp_path / "a.tsv", "text\ttitle\na, b\tT\n".encode("utf-16"))
    assert [row[:2] for row in rows_of(path)] == [(2, "T\na, b")]
    assert rows_of(write(tmp_path / "b.csv", "text\n")) == rows_of(write(tmp_path / "c.csv", "")) == []


def test_rows_of_parquet_keep_their_types(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table(
        {
            "id": pa.array([1, 2, 3], pa.int32()),
            "text": pa.array(["a", "b", "c"]).dictionary_encode(),
            "title": ["T", None, ""],
        }
    )
    path = str(tmp_path / "a.parquet")
    pq.write_table(table, path, row_group_size=2)
    found = [*read_rows(path, "text", 2)]
    assert [(rows.lines, rows.texts) for rows in found] == [([1, 2], ["T\na", "b"]), ([3], ["c"])]
    assert found[0].columns.schema.field("id").type == pa.int32() and found[1].columns["id"].to_pylist() == [3]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"text": "b"\n',
            '{path}:3 must be a JSON object on one line, got \'{{"text": "b"',
        ),
        ("a.jsonl", b"[" * 100_000, "{path}:1 must be a JSON object on one line, got '[["),
        ("a.jsonl", b'["text"]\n', '{path}:1 must be a JSON object, got \'["text"]'),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', "{path}:2 must have a string under 'text', got None."),
        ("a.jsonl", b'{"text": 1}\n', "{path}:1 must have a string under 'text', got 1. Name another column"),
        ("a.jsonl", b'{"id": 1, "b": 2}\n', "{path}:1 must have a string under 'text', got the columns id, b."),
        ("a.csv", b"id,text\n1,a\n2\n", "{path}:3 must have 2 fields, as the header has, got 1."),
        ("a.csv", b"id,text\n1,a,b\n", "{path}:2 must have 2 fields, as the header has, got 3."),
        ("a.csv", b"id;text\n1;a\n", "{path}:2 must have a string under 'text', got the columns id;text."),
        ("a.csv", b"text,text\n", "{path}:1 must name each column once, got text, text."),
        ("a.csv", b'text\n"a\nb\n', "{path}:2 must be a row of fields between ',': unexpected end of data."),
        ("a.txt", b"one\ntwo\xe9\n", "{path} must be UTF-8 text, or have a byte order mark, got b'\\xe9' near line "),
        ("a.txt", b"\xff\xfea", "{path} must be UTF-8 text, or have a byte order mark, got b'a' near line 1"),
        ("a.parquet", b"PAR1 and no more", "Cannot read {path} as Parquet: "),
        ("a.parquet", b"", "Cannot read {path} as Parquet: "),
        ("gone.csv", None, "Cannot read {path}: No such file or directory."),
    ],
)
def test_bad_rows_are_told_with_file_and_line(tmp_path, name, content, expected):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = str(tmp_path / name) if content is None else write(tmp_path / name, content)
    assert error_of(path).startswith(expected.format(path=path))


def test_bad_rows_of_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a", "b", None], "n": [1, 2, 3]}), path)
    assert error_of(path).startswith(f"{path}:3 must have a string under 'text', got None.")
    assert error_of(path, text_column="n").startswith(f"{path}:1 must have a string under 'n', got 1.")
    assert error_of(path, text_column="body").startswith(
        f"{path} must have a string under 'body', got the columns text, n."
    )
    assert error_of("-", kind="parquet").startswith("Parquet cannot be read from standard input")


def test_a_row_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_CHARS", 100)
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "' + "a" * 100)
    assert error_of(path).startswith(f"{path}:2 must have less than 100 characters.")
    path = write(tmp_path / "a.csv", 'text\n"' + "a\n" * 100)
    assert error_of(path).startswith(f"{path}:2 must be a row of fields between ',': field larger than field limit")


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    assert error_of(write(tmp_path / "a.parquet", b"")) == 'Parquet files need pyarrow: pip install "pyarrow"'


MEASURE = """
import json, resource, sys
from scripts.tables import read_rows
kind, size, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with open(path, "w") as file:
    if kind == "csv":
        file.write("id,text\\n")
    for i in range(size):
        text = f"{i} " * 200
        file.write({"parquet": "", "jsonl": json.dumps({"id": i, "text": text}), "csv": f"{i},{text}", "txt": text}[kind] + "\\n")
if kind == "parquet":
    import pyarrow as pa, pyarrow.parquet as pq
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:  # rows of a size that compression cannot change much
        import random
        for i in range(0, size, 1000):
            texts = [random.randbytes(600).hex() for _ in range(1000)]
            writer.write_table(pa.table({"id": range(1000), "text": texts}), row_group_size=1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(len(rows.texts) for rows in read_rows(path, "text", 512))
assert count == size, count
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="getrusage counts memory in other units")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_a_file(tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"a.{kind}"
    command = [sys.executable, "-c", MEASURE, kind, "60000", str(path)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert path.stat().st_size > 60e6 and float(told) < 20, f"reading took {told} MiB"
