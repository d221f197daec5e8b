"""Vectors in .parquet, .npy and .lance, with what made them; written part by part, so that an interruption loses one part.

Parts stand in a hidden folder beside the output until all are there. Invariants: a part belongs to the rows whose hash it
carries and to the settings of its folder; an output is replaced by a complete one or left alone.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from saving_utils import read_json, write_json
from scripts.tables import Rows, needs
from serving.precision import arrow_type
from serving.vectors import fingerprint_file, with_fingerprint, write_fingerprint


SUFFIXES = (".parquet", ".npy", ".lance")
GROUP = 1 << 14  # rows of a Parquet row group, and of what is copied at a time


class Parts:
    """
    What has been encoded for an output.

    Args:
        output: The file to be.
        settings: What makes the vectors, with the `fingerprint` and `precision` of them.
        column: Of the vectors.

    Raises:
        ValueError: parts of other settings are there, or another process writes them.
    """

    def __init__(self, output: Path, settings: dict, column: str):
        from filelock import FileLock, Timeout

        self.output, self.settings, self.column = output, settings, column
        self.folder = output.with_name(f".{output.name}.parts")
        self.suffix = ".npy" if output.suffix == ".npy" else ".parquet"  # Lance's rows are kept as Parquet too
        with naming(output):
            self.folder.mkdir(exist_ok=True)
        self.lock = FileLock(self.folder / "lock", timeout=0)
        try:
            self.lock.acquire()
        except Timeout as error:
            raise ValueError(f"Another process writes {output}. Wait until it is done.") from error
        made = self.folder / "settings.json"
        if not made.exists():
            write_json(made, settings)
        elif (found := read_json(made)) != json.loads(json.dumps(settings)):
            names = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
            raise ValueError(
                f"{output} was begun with another {' and another '.join(names)}. Go on with the same, or remove "
                f"{self.folder} to start anew."
            )
        self.there = {int(path.name.split(".")[0]): path for path in self.folder.glob(f"*.*{self.suffix}")}

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *error) -> None:
        self.lock.release()

    def has(self, number: int, rows: Rows) -> bool:
        """
        Whether these rows, the `number`-th that were read, are encoded already.

        Raises:
            ValueError: other rows are.
        """
        path = self.there.get(number)
        if path is not None and path != self.path(number, rows):
            raise ValueError(
                f"The input is not what {self.output} was begun with: other rows came where {rows.lines[0]} to "
                f"{rows.lines[-1]} are now. Remove {self.folder} to start anew."
            )
        return path is not None

    def path(self, number: int, rows: Rows) -> Path:
        """The file of a part."""
        return self.folder / f"{number:09d}.{digest(rows)}{self.suffix}"

    def write(self, number: int, rows: Rows, vectors: np.ndarray) -> None:
        """Adds a part, `(rows, ...)` as it is stored."""
        path = self.path(number, rows)
        with self.new_file(path) as file:
            if self.suffix == ".npy":
                file.write(npy_header(vectors.shape, vectors.dtype))
                file.write(np.ascontiguousarray(vectors).data)  # np.save could not say why the disk took no more
            else:
                import pyarrow.parquet as pq

                pq.write_table(self.add_vectors(to_table(rows.columns), vectors), file)
        self.there[number] = path

    def add_vectors(self, table, vectors: np.ndarray):
        """The table with its vectors as the last column."""
        import pyarrow as pa

        if self.column in table.column_names:
            raise ValueError(f"The input has a column {self.column!r} already: name another --embedding_column.")
        of = arrow_type(self.settings["fingerprint"]["dimensions"], self.settings["precision"])
        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), of.value_type)
        return table.append_column(self.column, pa.FixedSizeListArray.from_arrays(flat, of.list_size))

    def join(self, count: int) -> tuple[int, int]:
        """
        Makes the output of the first `count` parts, which are all, and removes them. Returns the shape of the vectors.

        Raises:
            ValueError: more parts are there.
        """
        if len(self.there) > count:
            raise ValueError(
                f"The input ends before what {self.output} was begun with. Remove {self.folder} to start anew."
            )
        paths = [self.there[number] for number in range(count)]
        shape = {".npy": self.join_npy, ".parquet": self.join_parquet, ".lance": self.join_lance}[self.output.suffix](
            paths
        )
        self.lock.release()
        shutil.rmtree(self.folder)
        return shape

    def join_npy(self, paths: list[Path]) -> tuple[int, int]:
        """Writes NAME.npy, and what made it to NAME.npy.json."""
        arrays = [np.load(path, mmap_mode="r") for path in paths[:1]]
        rows = sum(np.load(path, mmap_mode="r").shape[0] for path in paths)
        shape = rows, arrays[0].shape[1]
        with self.new_file(self.output) as file:
            file.write(npy_header(shape, arrays[0].dtype))
            for path in paths:
                file.write(np.load(path).data)
            fingerprint_file(self.output).unlink(missing_ok=True)
        write_fingerprint(self.output, self.settings["fingerprint"])
        return shape

    def join_parquet(self, paths: list[Path]) -> tuple[int, int]:
        """Writes NAME.parquet, with what made it in the metadata of its schema."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema, total = self.common_schema(paths), 0
        with self.new_file(self.output) as file, pq.ParquetWriter(file, schema) as writer:
            group: list = []
            for table in self.tables(paths, schema):
                group.append(table)
                total += len(table)
                if sum(map(len, group)) >= GROUP:
                    writer.write_table(pa.concat_tables(group), row_group_size=GROUP)
                    group = []
            if group:
                writer.write_table(pa.concat_tables(group))
        return total, schema.field(self.column).type.list_size

    def join_lance(self, paths: list[Path]) -> tuple[int, int]:
        """Writes the table NAME.lance, with what made it in the metadata of its schema."""
        import lancedb
        import pyarrow as pa

        schema = self.common_schema(paths)
        batches = (batch for table in self.tables(paths, schema) for batch in table.to_batches())
        reader = pa.RecordBatchReader.from_batches(schema, batches)
        try:
            table = lancedb.connect(self.output.parent).create_table(self.output.stem, reader, schema=schema)
        except RuntimeError as error:
            raise OSError(f"Cannot write {self.output}: {error}") from error
        return table.count_rows(), schema.field(self.column).type.list_size

    def common_schema(self, paths: list[Path]):
        """Of all parts: types that were told from some rows are widened to fit the others, or else are JSON."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        types: dict[str, list] = {}
        for path in paths:
            for field in pq.read_schema(path):
                found = types.setdefault(field.name, [])
                if field.type not in found:
                    found.append(field.type)
        vectors = types.pop(self.column)[0]  # the last column, also where later parts have new ones
        schema = pa.schema([(name, common_type(found)) for name, found in types.items()] + [(self.column, vectors)])
        return with_fingerprint(schema, self.settings["fingerprint"])

    def tables(self, paths: list[Path], schema) -> Iterator:
        """The parts, each in the common schema."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for path in paths:
            table = pq.read_table(path)
            columns = []
            for field in schema:
                if field.name not in table.column_names:
                    columns.append(pa.nulls(len(table), field.type))
                elif table.schema.field(field.name).type == field.type:
                    columns.append(table[field.name])
                else:
                    columns.append(as_type(table[field.name].to_pylist(), field.type))
            yield pa.Table.from_arrays(columns, schema=schema)

    @contextmanager
    def new_file(self, target: Path) -> Iterator[BinaryIO]:
        """A file to write; it takes the place of `target` if all goes well."""
        unfinished = self.folder / "unfinished"
        with naming(self.output):
            file = open(unfinished, "wb")
            try:
                yield file
                file.close()
                os.replace(unfinished, target)
            finally:
                with suppress(OSError):  # of a full disk, which is told already
                    file.close()
                unfinished.unlink(missing_ok=True)


def check_output(output: Path) -> None:
    """Raises ValueError unless an output can be written, as far as can be told before."""
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--output must end in one of {', '.join(SUFFIXES)}, got {output}.")
    if not output.parent.is_dir():
        raise ValueError(f"There is no folder {output.parent} for {output}; make it first.")
    if output.suffix == ".lance":
        if output.is_dir() and any(output.iterdir()):
            raise ValueError(f"{output} is there already. Choose another --output, or remove it.")
        needs("lancedb", "lancedb", ".lance outputs")
    elif output.is_dir():
        raise ValueError(f"--output must be a file, and {output} is a folder.")
    if output.suffix == ".parquet":
        needs("pyarrow.parquet", "pyarrow", ".parquet outputs")


def digest(rows: Rows) -> str:
    """A hash of all that rows hold."""
    found = hashlib.blake2b(digest_size=8)
    if isinstance(rows.columns, list):
        found.update(json.dumps(rows.columns).encode())
    else:
        for batch in rows.columns.to_batches():
            found.update(batch.serialize())
    return found.hexdigest()


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What a .npy file of that shape begins with."""
    header = io.BytesIO()
    kind = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
    return header.getvalue()


def to_table(columns):
    """Rows as a `pyarrow.Table`; a column of values that have no type in common holds them as JSON."""
    import pyarrow as pa

    if not isinstance(columns, list):
        return columns
    names = dict.fromkeys(name for row in columns for name in row)
    return pa.table({name: typed([row.get(name) for row in columns]) for name in names})


def typed(values: list):
    """An array of values, or of their JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        array = pa.array(values)
        pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([("", array.type)])).close()  # not all types can be kept
        return array
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return as_type(values, pa.string())


def as_type(values: list, kind):
    """An array of that type; strings are made by JSON."""
    import pyarrow as pa

    if not pa.types.is_string(kind):
        return pa.array(values, kind)
    return pa.array([v if v is None or isinstance(v, str) else json.dumps(v, default=str) for v in values], kind)


def common_type(types: list):
    """The type that values of all these fit into; JSON, a string, for want of another."""
    import pyarrow as pa

    try:
        kind = pa.unify_schemas([pa.schema([("", t)]) for t in types], promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()
    return pa.string() if pa.types.is_null(kind) else kind


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Says which file could not be written, and why."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"Cannot write {path}: {error.strerror or error}.") from error
