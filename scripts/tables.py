"""Rows of .txt, .jsonl, .csv, .tsv and .parquet files, or of standard input, a few hundred at a time.

Invariant: memory does not grow with a file, and no row is skipped: one that cannot be read is an error that says where it
stands.
"""

import codecs
import csv
import importlib
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple


KINDS = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
MAX_CHARS = 1 << 24  # of a row; more is no text to embed, but a file that is damaged or of another kind
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",  # behind UTF-32's, which begin with it
    codecs.BOM_UTF16_BE: "utf-16",
}


class Rows(NamedTuple):
    """
    Some consecutive rows.

    Args:
        lines: Where each stands: the line it begins on, of a Parquet file its number.
        texts: What to embed: the text, under its title if there is one.
        columns: All they hold: a list of dicts, or the `pyarrow.Table` that a Parquet file has.
    """

    lines: list[int]
    texts: list[str]
    columns: Any


def read_rows(
    path: str, text_column: str, size: int, kind: str | None = None, encoding: str | None = None
) -> Iterator[Rows]:
    """
    Args:
        path (`str`): A file, or `-` for standard input.
        text_column (`str`): The column that is embedded, under that of the name `title`, if there is one.
        size (`int`): Most rows at a time. The same size cuts the same file at the same rows.
        kind (`str`, *optional*): Defaults to what the suffix says.
        encoding (`str`, *optional*): Defaults to what a byte order mark says, or UTF-8.

    Raises:
        ValueError: the file or a row cannot be read. Says which, what was expected, and what came.
    """
    kind = kind or KINDS[Path(path).suffix.lower()]
    if kind == "parquet":
        yield from read_parquet(path, text_column, size)
        return
    name = "standard input" if path == "-" else path
    with open_text(path, encoding, newline="" if kind in ("csv", "tsv") else None) as file:
        lines = read_lines(file, name)
        if kind == "txt":
            rows = ((number, {text_column: line.removesuffix("\n")}) for number, line in lines)
        else:
            rows = read_jsonl(lines, name) if kind == "jsonl" else read_csv(lines, name, "\t" if kind == "tsv" else ",")
        while block := list(islice(rows, size)):
            texts = [text_of(row, text_column, f"{name}:{line}") for line, row in block]
            yield Rows([line for line, _ in block], texts, [row for _, row in block])


def text_of(row: dict, text_column: str, where: str) -> str:
    """What of a row is embedded."""
    text, title = row.get(text_column), row.get("title") if text_column != "title" else None
    if not isinstance(text, str):
        found = f"{text!r:.80}" if text_column in row else f"the columns {', '.join(map(str, row)) or '(none)'}"
        raise ValueError(
            f"{where} must have a string under {text_column!r}, got {found}. Name another column with --text_column."
        )
    return f"{title}\n{text}" if isinstance(title, str) and title else text


def byte_order_encoding(head: bytes) -> str | None:
    """The encoding whose byte order mark a file begins with."""
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)


def open_text(path: str, encoding: str | None, newline: str | None) -> io.TextIOWrapper:
    """A file, or standard input, as text."""
    try:
        file = open(sys.stdin.fileno() if path == "-" else path, "rb", closefd=path != "-")
        encoding = encoding or byte_order_encoding(file.peek(4)) or "utf-8"
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror or error}.") from error
    return io.TextIOWrapper(file, encoding, newline=newline)


def read_lines(file: io.TextIOWrapper, name: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line, its end included."""
    number = 1
    try:
        while line := file.readline(MAX_CHARS):
            if len(line) == MAX_CHARS:
                raise ValueError(
                    f"{name}:{number} must have less than {MAX_CHARS:,} characters. Is it one row per line?"
                )
            yield number, line
            number += 1
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} must be UTF-8 text, or have a byte order mark, got {error.object[error.start : error.end]!r} near "
            f"line {number}. Convert it, for example with iconv."
        ) from error
    except OSError as error:
        raise ValueError(f"Cannot read {name}: {error.strerror or error}.") from error


def read_jsonl(lines: Iterable[tuple[int, str]], name: str) -> Iterator[tuple[int, dict]]:
    """Line number and columns of each row; blank lines are none."""
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}:{number} must be a JSON object on one line, got {line!r:.80}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{name}:{number} must be a JSON object, got {line!r:.80}.")
        yield number, clean(row) if "\\" in line else row


def clean(value):
    """The same without halves of characters, which JSON's escapes can hold and no file."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, list):
        return [clean(item) for item in value]
    return {clean(key): clean(item) for key, item in value.items()} if isinstance(value, dict) else value


def read_csv(lines: Iterable[tuple[int, str]], name: str, delimiter: str) -> Iterator[tuple[int, dict]]:
    """Line number and columns of each row behind the header, which names the columns."""
    csv.field_size_limit(MAX_CHARS)
    reader = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True)
    header, start = None, 1
    try:
        for fields in reader:
            if fields and header is None:
                header = fields
                if len(set(header)) < len(header):
                    raise ValueError(f"{name}:{start} must name each column once, got {', '.join(header):.200}.")
            elif fields:
                if len(fields) != len(header):
                    raise ValueError(
                        f"{name}:{start} must have {len(header)} fields, as the header has, got {len(fields)}."
                    )
                yield start, dict(zip(header, fields))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{name}:{start} must be a row of fields between {delimiter!r}: {error}.") from error


def read_parquet(path: str, text_column: str, size: int) -> Iterator[Rows]:
    """The rows of a Parquet file."""
    if path == "-":
        raise ValueError("Parquet cannot be read from standard input: its table of contents is at its end.")
    pq = needs("pyarrow.parquet", "pyarrow", "Parquet files")
    import pyarrow as pa

    number = 1
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            wanted = [text_column] + ["title"] * ("title" in names and text_column != "title")
            if text_column not in names:
                text_of(dict.fromkeys(names), text_column, path)
            for batch in file.iter_batches(size):
                table = pa.Table.from_batches([batch])
                rows = zip(*(table[name].to_pylist() for name in wanted))
                lines = list(range(number, number + len(table)))
                texts = [text_of(dict(zip(wanted, row)), text_column, f"{path}:{n}") for n, row in zip(lines, rows)]
                yield Rows(lines, texts, table)
                number += len(table)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"Cannot read {path} as Parquet: {error}") from error


def needs(module: str, package: str, what: str):
    """
    Imports a module of a package that only some commands need.

    Raises:
        ValueError: it is not there. Says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if module.partition(".")[0] not in str(error):  # it is there, and something that it needs is not
            raise
        raise ValueError(f'{what} need {package}: pip install "{package}"') from error
