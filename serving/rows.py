"""The rows of a corpus, as Ray Data reads them from parquet, jsonl or csv files, local or on S3.

Blocks have the columns `id`, `text` and `error`. A row that cannot be embedded has an error instead of a text, and keeps
its id or, without a usable one, is named by where it stands, so that it is the same row in every run.
"""

import csv
import fnmatch
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileInfo, FileSelector, FileSystem
from ray.data.datasource import FileBasedDatasource


SUFFIX = re.compile(r"\.(parquet|jsonl|ndjson|csv)(?:\.(?:gz|bz2|zst|lz4))?$", re.IGNORECASE)
PEEKED = 100  # rows that tell what a file is like
MAGIC = re.compile(r"[*?\[]")
ID_TYPES = {"string": pa.string(), "int64": pa.int64()}


class Rows(FileBasedDatasource):
    """Files as Ray Data reads them; the arguments are those of `read_blocks`."""

    def __init__(self, paths: list[str], how: dict, **kwargs):
        super().__init__(paths, **kwargs)
        self.how = how

    def _open_input_source(self, filesystem, path: str, **kwargs):
        if file_kind(path) == "parquet":  # its table of contents is at the end
            return filesystem.open_input_file(path)
        return super()._open_input_source(filesystem, path, **kwargs)

    def _read_stream(self, file, path: str) -> Iterator[pa.Table]:
        return read_blocks(file, path, **self.how)


def read_blocks(
    file, path: str, id_column: str, text_column: str | None, id_type: str, block_rows: int
) -> Iterator[pa.Table]:
    """
    Args:
        file: Opened for reading bytes; it is read in parts.
        path: Its name; the suffix says what it holds.
        id_column, text_column: Where to look; without a text column ids alone are read, and no text is missed.
        id_type: "int64", or "string", which numbers are turned into.
        block_rows: Most rows of a block.

    Raises:
        ValueError: the file lacks a column.
    """
    rows = enumerate(read_rows(file, path, id_column, text_column, block_rows))
    while block := list(islice(rows, block_rows)):
        checked = []
        for number, (raw_id, raw_text, error) in block:
            row_id = usable_id(raw_id, id_type)
            text = None
            if row_id is None:
                row_id = lost_id(path, number, id_type)
                error = f"{error or 'no id'}: row {number} of {path}"
            elif text_column is not None:
                text, error = usable_text(raw_text)
            checked.append((row_id, text, error))
        ids, texts, errors = zip(*checked, strict=True)
        yield pa.table(
            {
                "id": pa.array(ids, ID_TYPES[id_type]),
                "text": pa.array(texts, pa.large_string()),
                "error": pa.array(errors, pa.string()),
            }
        )


def file_kind(path: str) -> str:
    """
    "parquet", "jsonl" or "csv".

    Raises:
        ValueError: the suffix is none of theirs.
    """
    if not (found := SUFFIX.search(path)):
        raise ValueError(f"{path} must end in .parquet, .jsonl, .ndjson or .csv, the last three also in .gz or .zst.")
    return {"ndjson": "jsonl"}.get(found[1].lower(), found[1].lower())


def read_rows(file, path: str, id_column: str, text_column: str | None, block_rows: int) -> Iterator[tuple]:
    """Id, text and error of each row, the first two as they stand in the file, which is read in parts."""
    columns = [id_column] + [text_column] * (text_column is not None)
    kind = file_kind(path)
    if kind == "parquet":
        parquet = pq.ParquetFile(file)
        check_columns(path, columns, parquet.schema_arrow.names)
        for batch in parquet.iter_batches(block_rows, columns=columns):
            ids, *texts = (raw_values(batch.column(name)) for name in columns)
            yield from zip(ids, *(texts or [[None] * len(ids)]), [None] * len(ids), strict=True)
        return
    lines = io.BufferedReader(file, 1 << 20)
    if kind == "csv":
        csv.field_size_limit(sys.maxsize)
        rows = csv.DictReader(io.TextIOWrapper(lines, "utf-8-sig", errors="replace", newline=""))
        check_columns(path, columns, rows.fieldnames or [])
        yield from ((row[id_column], row[text_column] if text_column else None, None) for row in rows)
        return
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield row.get(id_column), row.get(text_column), None
        else:
            yield None, None, "no JSON object"


def check_columns(path: str, wanted: list[str], found: list[str]) -> None:
    """Raises ValueError where a file lacks a column."""
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(
            f"{path} has no column {missing[0]!r}, only {', '.join(found)}. Name others by --id_column and --text_column."
        )


def raw_values(column: pa.Array) -> list:
    """Python's values of a column; strings stay bytes, as nothing says that they are UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.binary())
    elif pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return column.to_pylist()


def usable_id(raw, id_type: str) -> str | int | None:
    """The id in its type; None unless the value gives one."""
    if isinstance(raw, bytes):
        raw = raw.decode("utf-8", errors="replace")
    if id_type == "string":
        raw = str(raw) if isinstance(raw, int) and not isinstance(raw, bool) else raw
        return usable_text(raw)[0] if isinstance(raw, str) else None
    if isinstance(raw, str) and re.fullmatch(r"-?\d{1,19}", raw, re.ASCII):
        raw = int(raw)
    return raw if isinstance(raw, int) and not isinstance(raw, bool) and -(2**63) <= raw < 2**63 else None


def usable_text(raw) -> tuple[str | None, str | None]:
    """The text and no error, or the reverse."""
    if isinstance(raw, bytes):
        try:
            raw = raw.decode("utf-8")
        except UnicodeDecodeError:
            return None, "text is not UTF-8"
    if raw is None:
        return None, "text is null or missing"
    if not isinstance(raw, str):
        return None, f"text is {type(raw).__name__}, not a string"
    if not raw.strip():
        return None, "text is empty"
    return re.sub("[\ud800-\udfff]", "\ufffd", raw), None  # JSON escapes can hold half a character


def lost_id(path: str, number: int, id_type: str) -> str | int:
    """An id for a row without one; negative where ids are numbers."""
    place = f"{path}#{number}"
    if id_type == "string":
        return place
    return -1 - (int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest()) >> 1)


def filesystem(path: str) -> tuple[FileSystem, str]:
    """pyarrow's filesystem for a path or a URI, and the path in it."""
    return FileSystem.from_uri(path if "://" in path else os.path.abspath(path))


def find_inputs(patterns: list[str]) -> tuple[FileSystem, dict[str, FileInfo]]:
    """
    Where the files are, and what is known of each by its path; of a folder all that can be read. `*` stays within a
    folder, `**` does not.

    Raises:
        ValueError: a pattern finds no file, or one of another kind; or they are not all in one place.
    """
    place, found = None, {}
    for pattern in patterns:
        files, path = filesystem(pattern)
        if place is not None and files != place:
            raise ValueError(f"--input must be all local or all in one place, got {' '.join(patterns)}.")
        place = files
        root = MAGIC.split(path)[0].rpartition("/")[0] if MAGIC.search(path) else path
        info = files.get_file_info(root)
        infos = (
            [info] if info.is_file else files.get_file_info(FileSelector(root, allow_not_found=True, recursive=True))
        )
        matching = {info.path: info for info in infos if info.is_file and matches(info.path, path)}
        if not matching:
            raise ValueError(f"--input {pattern} finds no file.")
        found |= matching
    for path in found:
        file_kind(path)
    return place, dict(sorted(found.items()))


def matches(path: str, pattern: str) -> bool:
    """Whether a file is one of a glob's, or the named one, or stands in the named folder and can be read."""
    if not MAGIC.search(pattern):
        return path == pattern or SUFFIX.search(path) is not None
    return fnmatch.fnmatchcase(path, pattern) and ("**" in pattern or path.count("/") == pattern.count("/"))


def id_type_of(files: FileSystem, path: str, id_column: str, text_column: str) -> str:
    """
    "int64" if the first id is a number, or else "string".

    Raises:
        ValueError: the first rows have no id or no text, as when a column has another name.
    """
    is_parquet = file_kind(path) == "parquet"
    with files.open_input_file(path) if is_parquet else files.open_input_stream(path) as file:
        rows = list(islice(read_rows(file, path, id_column, text_column, PEEKED), PEEKED))
    ids = [raw for raw, _, _ in rows if usable_id(raw, "string") is not None]
    for name, option, found in (
        (id_column, "--id_column", ids),
        (text_column, "--text_column", [raw for _, raw, _ in rows if usable_text(raw)[0]]),
    ):
        if not found:
            raise ValueError(f"The first {len(rows)} rows of {path} have nothing under {name!r}; see {option}.")
    return "int64" if isinstance(ids[0], int) and usable_id(ids[0], "int64") is not None else "string"
