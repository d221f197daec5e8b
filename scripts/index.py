"""Passages and their vectors in an embedded LanceDB table, which `DIR/NAME.lance` holds as a whole.

A row is a passage: where it stands, its text, its vector, and what its file held when it was read; a file without text has
one row without either. Invariants: all vectors of a table have the fingerprint that its schema carries, and a file has its
old passages or its new ones, the old ones until the new ones are complete. An interruption loses what was not yet written,
of at most `BATCH` passages.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.passages import Facts, Passage, Splitters, examine, read_passages
from scripts.tables import needs
from serving.vectors import KEY, check_fingerprint


BATCH = 512  # passages that are embedded and written at a time
CACHE = 2**26  # bytes of what LanceDB remembers of a table while it is written; by default that grows with the table
KEPT = timedelta(minutes=10)  # how long a search that is under way finds what has been replaced
TOKENS = b"causal2vec.passage_tokens"
FTS_COLUMN, VECTOR_COLUMN = "text", "vector"


class UnreadableFile(ValueError):
    """A file cannot be read, in whole or in part."""


class Hit(NamedTuple):
    """A passage that was found; `score` is its cosine to the query, or that of the fusion of two rankings."""

    score: float
    path: str
    line: int | None
    page: int | None
    text: str


class Index:
    """
    A table that is there, opened.

    Args:
        path: The folder `DIR/NAME.lance`.
        writes: Whether more is written than searched, which needs no large cache.

    Raises:
        ValueError: there is no such table, it is damaged, or it is not one of passages.
    """

    def __init__(self, path: str, writes: bool = False):
        lancedb, self.path = needs("lancedb", "lancedb", "Indexes"), check_name(path)
        if not self.path.is_dir():
            raise ValueError(f'There is no index {path}. Make it: python -m scripts.embed index FOLDER --db "{path}"')
        session = lancedb.Session(index_cache_size_bytes=CACHE, metadata_cache_size_bytes=CACHE) if writes else None
        try:
            self.table = lancedb.connect(self.path.parent, session=session).open_table(self.path.stem)
            metadata = self.table.schema.metadata or {}
            self.fingerprint, self.tokens = json.loads(metadata[KEY]), int(metadata[TOKENS])
        except (KeyError, ValueError, OSError, RuntimeError) as error:
            raise ValueError(
                f"{path} is no index of passages, or is damaged: {error}. Make it anew elsewhere."
            ) from error

    @classmethod
    def create(cls, path: str, fingerprint: dict, tokens: int) -> "Index":
        """A new, empty table for vectors of this fingerprint and passages of at most so many tokens."""
        lancedb, name = needs("lancedb", "lancedb", "Indexes"), check_name(path)
        import pyarrow as pa
        from lancedb.index import FTS

        fields = [
            ("path", pa.string()),
            ("line", pa.int64()),
            ("page", pa.int64()),
            (FTS_COLUMN, pa.string()),
            (VECTOR_COLUMN, pa.list_(pa.float32(), fingerprint["dimensions"])),
            ("number", pa.int64()),  # of a passage in its file
            ("last", pa.bool_()),  # so that the file is there as a whole
            ("digest", pa.string()),
            ("size", pa.int64()),
            ("mtime_ns", pa.int64()),
        ]
        metadata = {KEY: json.dumps(fingerprint), TOKENS: str(tokens)}
        table = lancedb.connect(name.parent).create_table(name.stem, schema=pa.schema(fields, metadata=metadata))
        table.create_index(FTS_COLUMN, config=FTS())
        return cls(path, writes=True)

    def check(self, fingerprint: dict, ignore: Sequence[str] = ()) -> None:
        """Raises ValueError unless vectors of this fingerprint can be compared with those of the table."""
        try:
            check_fingerprint(self.fingerprint, fingerprint, f"the vectors of {self.path}", ignore)
        except ValueError as error:
            raise ValueError(f"{error} Another --db keeps both.") from error

    def count(self) -> int:
        """How many passages there are."""
        return self.table.count_rows(f"{FTS_COLUMN} IS NOT NULL")

    def search(self, vector: np.ndarray, top_k: int, text: str | None = None) -> list[Hit]:
        """
        The passages nearest to a vector, best first; with `text`, those that have its words too, by reciprocal rank fusion.
        """
        self.table.checkout_latest()
        columns = ["path", "line", "page", FTS_COLUMN]
        if text is None or not text.strip():
            query = self.table.search(vector, vector_column_name=VECTOR_COLUMN).distance_type("cosine")
            query = query.select([*columns, "_distance"])
        else:
            from lancedb.rerankers import RRFReranker

            query = self.table.search(query_type="hybrid", vector_column_name=VECTOR_COLUMN, fts_columns=FTS_COLUMN)
            query = query.vector(vector).text(text).distance_type("cosine").rerank(RRFReranker())
        rows = query.limit(top_k).to_list()
        scores = [row["_relevance_score"] if "_relevance_score" in row else 1 - row["_distance"] for row in rows]
        return [Hit(score, *(row[name] for name in columns)) for score, row in zip(scores, rows, strict=True)]

    def known(self) -> dict[str, dict[str, dict]]:
        """Per path and digest the last row of a file that is there as a whole, or else its first row."""
        columns = ["path", "digest", "last", "size", "mtime_ns"]
        query = self.table.search().where("last OR number = 0").select(columns).limit(self.table.count_rows() + 1)
        found: dict[str, dict[str, dict]] = {}
        for batch in query.to_batches():
            for row in batch.to_pylist():
                versions = found.setdefault(row["path"], {})
                if row["last"] or row["digest"] not in versions:
                    versions[row["digest"]] = row
        return found

    def drop(self, paths: Sequence[str]) -> None:
        """Takes files out."""
        for start in range(0, len(paths), 500):
            self.table.delete(f"path IN ({', '.join(map(quote, paths[start : start + 500]))})")

    def finish(self) -> None:
        """Joins small files, and brings the full-text index up to date, and one of the vectors, which others may have made."""
        self.table.optimize(cleanup_older_than=KEPT)


class Update:
    """
    Brings files into an index, those that are not there as they are.

    Args:
        embed: From a list of texts to their vectors.
        text_column: Of tables.
    """

    def __init__(self, index: Index, embed, splitters: Splitters, text_column: str):
        self.index, self.embed, self.splitters, self.text_column = index, embed, splitters, text_column
        self.known = index.known()
        self.rows: list[dict] = []  # not yet written
        self.outdated: list[tuple[str, str]] = []  # paths and digests of which all rows are in `rows` or written
        self.embedded = 0  # passages
        self.guessed: list[str] = []  # files that were taken for Windows-1252

    def is_new(self, path: str) -> bool:
        """Whether a file has another size or time of change than the one in the index, or is there in part."""
        try:
            there = os.stat(path)
        except OSError:  # which `add` tells
            return True
        known = [(row["last"], row["size"], row["mtime_ns"]) for row in self.known.get(path, {}).values()]
        return known != [(True, there.st_size, there.st_mtime_ns)]

    def add(self, path: str) -> int:
        """
        Embeds a file's passages, from where an interruption has left off. Returns how many the file has; -1 if it was there.

        Raises:
            UnreadableFile: it cannot be read as a whole; what was there of it before stays.
        """
        try:
            there, facts = os.stat(path), examine(path)
        except (OSError, ValueError) as error:
            raise UnreadableFile(str(error)) from error
        versions = self.known.get(path, {})
        if versions.get(facts.digest, {}).get("last"):
            if len(versions) > 1:
                self.outdated.append((path, facts.digest))
            return -1
        file = {"path": path, "digest": facts.digest, "size": there.st_size, "mtime_ns": there.st_mtime_ns}
        this_file = f"path = {quote(path)} AND digest = {quote(facts.digest)}"
        done = self.index.table.count_rows(this_file) if facts.digest in versions else 0
        number = -1
        try:
            for number, (passage, last) in enumerate(with_last(self.passages(path, facts))):
                if number >= done:
                    where = {"line": passage.line, "page": passage.page, FTS_COLUMN: passage.text}
                    self.rows.append({**where, **file, "number": number, "last": last})
                    if len(self.rows) >= BATCH:
                        self.write()
        except UnreadableFile:
            self.rows = [row for row in self.rows if row["path"] != path]
            self.index.table.delete(this_file)
            raise
        if number < 0:
            self.rows.append({**file, "number": 0, "last": True})
        if facts.encoding == "cp1252":
            self.guessed.append(path)
        if versions:
            self.outdated.append((path, facts.digest))
        return number + 1

    def passages(self, path: str, facts: Facts) -> Iterator[Passage]:
        """The passages of a file; what fails here is the file, and not what becomes of its passages."""
        try:
            yield from read_passages(path, self.splitters, self.text_column, facts.encoding)
        except ValueError as error:
            raise UnreadableFile(str(error)) from error

    def write(self) -> None:
        """Embeds and writes what has been gathered, then takes out what it replaces."""
        import pyarrow as pa

        texts = [row[FTS_COLUMN] for row in self.rows if FTS_COLUMN in row]
        if self.rows:
            vectors = iter(self.embed(texts) if texts else ())
            for row in self.rows:
                row[VECTOR_COLUMN] = next(vectors) if FTS_COLUMN in row else None
            try:
                self.index.table.add(pa.Table.from_pylist(self.rows, schema=self.index.table.schema))
            except RuntimeError as error:  # as LanceDB tells of a full disk
                raise OSError(f"Cannot write {self.index.path}: {error}") from error
            self.embedded += len(texts)
            self.rows = []
        for path, digest in self.outdated:
            self.index.table.delete(f"path = {quote(path)} AND digest != {quote(digest)}")
        self.outdated = []

    def gone(self, roots: Sequence[str], files: Sequence[str], unreadable: Sequence[str]) -> list[str]:
        """Files of the index that are no longer under the roots, those aside that only cannot be seen at the moment."""
        inside = lambda path, folders: any(is_under(path, folder) for folder in folders)  # noqa: E731
        seen = set(files)
        return [
            path for path in self.known if path not in seen and inside(path, roots) and not inside(path, unreadable)
        ]


def check_name(path: str) -> Path:
    """The folder of a table."""
    if Path(path).suffix != ".lance" or not Path(path).absolute().parent.is_dir():
        raise ValueError(f"An index must be a folder NAME.lance within a folder that is there, got {path}.")
    return Path(path).absolute()


@contextmanager
def locked(path: str) -> Iterator[None]:
    """
    Holds an index for one writer.

    Raises:
        ValueError: another one has it.
    """
    from filelock import FileLock, Timeout

    name = check_name(path)
    lock = FileLock(name.with_name(f".{name.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"Another process writes to {path}. Wait until it is done.") from error
    try:
        yield
    finally:
        lock.release()


def is_under(path: str, folder: str) -> bool:
    """Whether a path is a folder's, or within it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def quote(text: str) -> str:
    """A string of SQL."""
    return "'" + text.replace("'", "''") + "'"


def with_last(passages: Iterator[Passage]) -> Iterator[tuple[Passage, bool]]:
    """Each passage, and whether it is the last."""
    before = next(passages, None)
    for passage in passages:
        yield before, False
        before = passage
    if before is not None:
        yield before, True
