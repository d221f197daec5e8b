"""Training data: rows from files, batches of one dataset each, collated for Causal2Vec (section 4.1, appendix A).

A data file (recipes/data/*.json) lists datasets; each is a file or Hub id of rows in any of the usual layouts, its
instructions and its sample ratio. Invariants: all rows of a global batch, over accumulation steps and ranks, come from
one dataset and share one instruction; every row is seen once per epoch; what a row becomes depends on the seed, the
epoch and the row alone, so that a resumed run sees what it would have seen.
"""

import codecs
import gzip
import hashlib
import itertools
import json
import logging
import os
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from saving_utils import json_fault, read_json


logger = logging.getLogger(__name__)

QUERY_NAMES = ("query", "anchor", "sentence1", "question")
POSITIVE_NAMES = ("positive", "sentence2", "answer", "pos")
NEGATIVE_NAMES = re.compile(r"negatives?|neg|negative_\d+")  # and not what mined rows have beside them: negative_score
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass
class DatasetSpec:
    """
    One entry of a data file.

    Args:
        name (`str`): The name in logs and errors.
        path (`str`): A .jsonl, .jsonl.gz or .parquet file, relative to the data directory or to where the command runs,
            or a Hub dataset id.
        instructions (list of `str`): For its queries; several alternate from batch to batch.
        symmetric (list of `str`): Those instructions under which documents carry the instruction too.
        sample_ratio (`float`): Share of its rows that an epoch uses, drawn anew each epoch. When streaming, its weight
            relative to the other datasets.
        license (`str`, *optional*): For the model's card.
    """

    name: str
    path: str
    instructions: list[str]
    symmetric: list[str] = field(default_factory=list)
    sample_ratio: float = 1.0
    license: str | None = None

    def __post_init__(self):
        for name in ("instructions", "symmetric"):
            texts = getattr(self, name)
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"Dataset {self.name!r}: `{name}` must be a list of strings, got {texts!r}.")
        if not self.instructions:
            raise ValueError(f"Dataset {self.name!r} needs a list of at least one instruction, got [].")
        if not set(self.symmetric) <= set(self.instructions):
            raise ValueError(f"Dataset {self.name!r}: `symmetric` must list some of its instructions.")
        if not 0 < self.sample_ratio <= 1:
            raise ValueError(f"Dataset {self.name!r}: `sample_ratio` must be in (0, 1], got {self.sample_ratio}.")


class BadRow(ValueError):
    """A row that cannot be trained on; the message holds file, line and reason."""


def read_data_file(path: str, names: list[str] | None = None) -> list[DatasetSpec]:
    """
    Reads a data file, or only some of its datasets.

    Raises:
        ValueError: see `read_json`; an unknown or repeated name, an unknown field, or nothing listed.
    """
    entries = read_json(path)
    try:
        specs = [DatasetSpec(**entry) for entry in entries]
    except TypeError as error:
        raise ValueError(
            f"{path}: each entry has the fields {list(DatasetSpec.__dataclass_fields__)}: {error}"
        ) from None
    by_name = {spec.name: spec for spec in specs}
    if len(by_name) < len(specs) or not specs:
        raise ValueError(f"{path} must list at least one dataset, each name once; got {[s.name for s in specs]}.")
    unknown = [name for name in names or [] if name not in by_name]
    if unknown:
        raise ValueError(f"Unknown dataset {unknown}; {path} lists {sorted(by_name)}.")
    return [by_name[name] for name in names] if names else specs


def normalise_row(row: dict, where: str) -> dict:
    """
    Converts a row of any layout to `{"query", "positive", "negatives"}`.

    Query: `query` or `anchor`; positive: `positive` (a string or a list, whose first counts); negatives: `negative`,
    `negatives`, `neg`, `negative_1` ... `negative_n`.

    Raises:
        BadRow: a field is missing, empty, of the wrong type, or holds half of a character.
    """
    if not isinstance(row, dict):
        raise BadRow(f"{where}: expected an object with query and positive, got {type(row).__name__}")
    query = next((row[name] for name in QUERY_NAMES if name in row), None)
    positive = next((row[name] for name in POSITIVE_NAMES if name in row), None)
    if isinstance(positive, list):
        positive = positive[0] if positive else None
    negatives: list = []
    for name, value in row.items():
        if NEGATIVE_NAMES.fullmatch(name):
            negatives.extend(value if isinstance(value, list) else [] if value is None else [value])
    for name, value in (("query", query), ("positive", positive), *(("negative", value) for value in negatives)):
        if value is None:
            raise BadRow(f"{where}: no {name}; the row has {sorted(row)}")
        if not isinstance(value, str):
            raise BadRow(f"{where}: {name} must be a string, got {type(value).__name__}")
        if not value.strip():
            raise BadRow(f"{where}: {name} is empty")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can write one half of a surrogate pair; Arrow and tokenizers cannot
            raise BadRow(f"{where}: {name} is no Unicode text: a lone surrogate at character {error.start}") from None
    return {"query": query, "positive": positive, "negatives": negatives}


def read_rows(path: str, skip_bad_rows: bool = False) -> Iterator[dict]:
    """
    Yields the normalised rows of a .jsonl, .jsonl.gz or .parquet file.

    Raises:
        BadRow: at the first unusable row; with `skip_bad_rows` such rows are counted and logged instead.
        OSError: the file cannot be read, or is damaged.
    """
    return _checked(_raw_rows(path), path, skip_bad_rows)


def _checked(rows: Iterable[tuple[str, bytes | dict]], name: str, skip_bad_rows: bool) -> Iterator[dict]:
    skipped = 0
    for where, row in rows:
        try:
            yield normalise_row(_parse(row, where), where)
        except BadRow as error:
            if not skip_bad_rows:
                raise
            skipped += 1
            if skipped <= 5:
                logger.warning("skipped: %s", error)
    if skipped:
        logger.warning("%s: skipped %d bad rows", name, skipped)


def _raw_rows(path: str) -> Iterator[tuple[str, bytes | dict]]:
    try:
        yield from _parquet_rows(path) if path.endswith(".parquet") else _lines(path)
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: pyarrow's, and parquet's invalid UTF-8
        raise OSError(f"{path} cannot be read: {error}. If it is damaged or cut off, get the file again.") from error


def _parquet_rows(path: str) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


def _lines(path: str) -> Iterator[tuple[str, bytes]]:
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield f"{path}, line {number}", line


def _parse(row: bytes | dict, where: str) -> dict:
    if isinstance(row, dict):
        return row
    try:
        return json.loads(row.decode("utf-8"))
    except (RecursionError, ValueError) as error:
        raise BadRow(f"{where}: {json_fault(error)}") from None


def load_rows(spec: DatasetSpec, data_dir: str, cache_dir: str, skip_bad_rows: bool = False):
    """
    The rows of one dataset as a memory-mapped `datasets.Dataset` with `query`, `positive` and `negatives`.

    Files are read and checked once; the Arrow copy in `cache_dir` is reused until the file changes.

    Raises:
        BadRow, OSError: see `read_rows`.
        FileNotFoundError: no such file in `data_dir`, and the path does not look like a Hub id.
        ValueError: no usable row.
    """
    import datasets

    features = datasets.Features(
        {
            "query": datasets.Value("string"),
            "positive": datasets.Value("string"),
            "negatives": datasets.List(datasets.Value("string")),
        }
    )
    generator, source = _source(spec, data_dir, skip_bad_rows, cache_dir=cache_dir)
    if generator is _file_rows:
        path = source["path"]
        if next(read_rows(path, skip_bad_rows), None) is None:
            raise ValueError(f"Dataset {spec.name!r}: {path} holds no usable row.")
        stat = os.stat(path)
        source["version"] = f"{stat.st_size}-{stat.st_mtime_ns}"
    try:
        return datasets.Dataset.from_generator(generator, features=features, cache_dir=cache_dir, gen_kwargs=source)
    except datasets.exceptions.DatasetGenerationError as error:  # which only says that there was one
        raise error.__cause__ or error from None


def stream_rows(spec: DatasetSpec, data_dir: str, skip_bad_rows: bool = False):
    """
    The rows of one dataset as a `datasets.IterableDataset`, read from the file or the Hub as needed. Nothing is kept on
    disk; an unusable row stops the run, or is skipped, when it is reached.

    Raises:
        BadRow, FileNotFoundError: see `load_rows`.
    """
    import datasets

    generator, source = _source(spec, data_dir, skip_bad_rows, streaming=True)
    return datasets.IterableDataset.from_generator(generator, gen_kwargs=source)


def _source(spec: DatasetSpec, data_dir: str, skip_bad_rows: bool, **hub_options) -> tuple[Callable, dict]:
    """The generator of a dataset's rows, and its arguments."""
    import datasets

    path = find_file(spec, data_dir)
    if path is not None:
        return _file_rows, {"path": path, "skip_bad_rows": skip_bad_rows}
    rows = datasets.load_dataset(spec.path, split="train", **hub_options)
    return _hub_rows, {"rows": rows, "name": spec.path, "skip_bad_rows": skip_bad_rows}


def find_file(spec: DatasetSpec, data_dir: str) -> str | None:
    """
    The file of a dataset, in `data_dir` or the working directory, or `None` if its path is a Hub id.

    Raises:
        FileNotFoundError: no such file, and the path does not look like a Hub id.
        ValueError: the file has another suffix.
    """
    path = os.path.join(data_dir, spec.path)
    if os.path.isfile(path):
        if not path.endswith(SUFFIXES):
            raise ValueError(f"Dataset {spec.name!r}: expected a file ending in {SUFFIXES}, got {path}.")
        return path
    if os.path.isfile(spec.path) and spec.path.endswith(SUFFIXES):
        return spec.path
    if spec.path.endswith(SUFFIXES) or spec.path.count("/") > 1:
        raise FileNotFoundError(f"Dataset {spec.name!r}: no file {spec.path}, neither in {data_dir} nor here.")
    return None


def _file_rows(path: str, skip_bad_rows: bool, version: str = "") -> Iterator[dict]:
    yield from read_rows(path, skip_bad_rows)


def _hub_rows(rows: Iterable[dict], name: str, skip_bad_rows: bool) -> Iterator[dict]:
    yield from _checked(((f"{name}, row {number}", row) for number, row in enumerate(rows)), name, skip_bad_rows)


class Key(NamedTuple):
    """Which row of which dataset goes into a place of a batch, with which instruction and examples."""

    dataset: int
    row: int
    epoch: int
    instruction: int


@dataclass
class Example:
    """One training row, ready to collate."""

    dataset: str
    row: int
    query: str
    positive: str
    negatives: list[str]
    instruction: str
    document_instruction: str | None
    examples: list[dict]


class TrainingData(torch.utils.data.Dataset):
    """
    All datasets of a run; `self[key]` gives an [`Example`].

    Args:
        specs, rows: The datasets, in the same order; `rows` may also be streams, see [`StreamedBatches`].
        num_negatives (`int`): Hard negatives per row, drawn from those it has.
        max_examples (`int`): In-context examples per query: 0 to this many, drawn at random.
        seed (`int`): The seed of all draws.
    """

    def __init__(
        self, specs: list[DatasetSpec], rows: list, num_negatives: int = 1, max_examples: int = 0, seed: int = 42
    ):
        self.specs, self.rows = specs, rows
        self.num_negatives, self.max_examples, self.seed = num_negatives, max_examples, seed

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def __getitem__(self, key: Key) -> Example:
        return self.dress(key, self.rows[key.dataset], key.row)

    def dress(self, key: Key, rows: Sequence[dict], place: int) -> Example:
        """The training example made of `rows[place]`, with in-context examples drawn from `rows`."""
        spec, row = self.specs[key.dataset], rows[place]
        rng = random.Random(f"{self.seed} {key.dataset} {key.row} {key.epoch}")
        instruction = spec.instructions[key.instruction]
        negatives = row["negatives"]
        if len(negatives) > self.num_negatives:
            negatives = rng.sample(negatives, self.num_negatives)
        return Example(
            dataset=spec.name,
            row=key.row,
            query=row["query"],
            positive=row["positive"],
            negatives=list(negatives),
            instruction=instruction,
            document_instruction=instruction if instruction in spec.symmetric else None,
            examples=self._draw_examples(rows, row, rng) if self.max_examples else [],
        )

    def _draw_examples(self, rows, row: dict, rng: random.Random) -> list[dict]:
        """Draws 0 to `max_examples` other rows, none with this row's query or positive."""
        wanted = rng.randint(0, self.max_examples)
        own = {row["query"], row["positive"]}
        examples: list[dict] = []
        for index in rng.sample(range(len(rows)), min(len(rows), 4 * self.max_examples)):
            if len(examples) == wanted:
                break
            other = rows[index]
            if not own & {other["query"], other["positive"]}:
                examples.append({"query": other["query"], "response": other["positive"]})
        return examples


class SingleDatasetBatchSampler:
    """
    Yields micro-batches of [`Key`]s, epoch after epoch, until `num_global_batches` global batches are complete.

    The `micro_batches` micro-batches of a global batch (accumulation steps x ranks) follow each other, so accelerate
    deals them to the ranks as they come. A dataset's rows that do not fill a global batch are dropped for that epoch;
    they are other rows in the next.

    Raises:
        ValueError: a dataset has fewer rows than a global batch.
    """

    def __init__(
        self,
        data: TrainingData,
        batch_size: int,
        micro_batches: int = 1,
        num_global_batches: int | None = None,
        seed: int = 42,
    ):
        self.data, self.batch_size, self.micro_batches, self.seed = data, batch_size, micro_batches, seed
        self.drop_last = True  # accelerate asks for it
        self.global_batch_size = batch_size * micro_batches
        self.rows_per_epoch = [int(len(rows) * spec.sample_ratio) for spec, rows in zip(data.specs, data.rows)]
        for spec, count in zip(data.specs, self.rows_per_epoch):
            if count < self.global_batch_size:
                raise ValueError(
                    f"Dataset {spec.name!r} gives {count} rows per epoch, fewer than the {self.global_batch_size} of a "
                    "global batch. Use smaller batches, a larger sample_ratio, or leave it out."
                )
        self.global_batches_per_epoch = sum(count // self.global_batch_size for count in self.rows_per_epoch)
        self.num_global_batches = num_global_batches or self.global_batches_per_epoch

    def __len__(self) -> int:
        return self.num_global_batches * self.micro_batches

    @property
    def dropped(self) -> dict[str, int]:
        """Rows per epoch and dataset that do not fill a global batch."""
        return {spec.name: count % self.global_batch_size for spec, count in zip(self.data.specs, self.rows_per_epoch)}

    def epoch(self, epoch: int) -> list[list[Key]]:
        """The global batches of one epoch, in order."""
        rng = random.Random(f"{self.seed} {epoch}")
        batches = []
        for index, (spec, rows) in enumerate(zip(self.data.specs, self.data.rows)):
            chosen = rng.sample(range(len(rows)), self.rows_per_epoch[index])
            for number in range(len(chosen) // self.global_batch_size):
                instruction = (number + epoch) % len(spec.instructions)
                part = chosen[number * self.global_batch_size : (number + 1) * self.global_batch_size]
                batches.append([Key(index, row, epoch, instruction) for row in part])
        rng.shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[list[Key]]:
        done = epoch = 0
        while done < self.num_global_batches:
            for batch in self.epoch(epoch)[: self.num_global_batches - done]:
                for start in range(0, self.global_batch_size, self.batch_size):
                    yield batch[start : start + self.batch_size]
                done += 1
            epoch += 1


class StreamedBatches(torch.utils.data.IterableDataset):
    """
    Yields this rank's micro-batches of [`Example`]s from streams, until `num_global_batches` global batches are complete.

    Rows come through a shuffle buffer. A dataset's turn is drawn with a chance in proportion to its `sample_ratio`; where
    its stream ends it starts over, less the rows that did not fill a global batch. In-context examples come from the same
    global batch. Every rank reads all of the streams and keeps its part.

    Raises:
        ValueError: a dataset has fewer rows than a global batch; known when its stream ends.
    """

    def __init__(
        self,
        data: TrainingData,
        batch_size: int,
        micro_batches: int = 1,
        num_global_batches: int = 1,
        shuffle_buffer: int = 10_000,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.data, self.batch_size, self.micro_batches = data, batch_size, micro_batches
        self.global_batch_size = batch_size * micro_batches
        self.num_global_batches, self.shuffle_buffer = num_global_batches, shuffle_buffer
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.num_global_batches * self.micro_batches // self.world_size

    def __iter__(self) -> Iterator[list[Example]]:
        worker = torch.utils.data.get_worker_info()
        turn, turns = (0, 1) if worker is None else (worker.id, worker.num_workers)
        mine = itertools.islice(self._micro_batches(), self.rank, None, self.world_size)
        for keys, rows, places in itertools.islice(mine, turn, None, turns):
            yield [self.data.dress(key, rows, place) for key, place in zip(keys, places)]

    def _micro_batches(self) -> Iterator[tuple[list[Key], list[dict], range]]:
        rng = random.Random(self.data.seed)
        ratios = [spec.sample_ratio for spec in self.data.specs]
        streams = [self._global_batches(index) for index in range(len(ratios))]
        for _ in range(self.num_global_batches):
            keys, rows = next(rng.choices(streams, ratios)[0])
            for start in range(0, self.global_batch_size, self.batch_size):
                places = range(start, start + self.batch_size)
                yield keys[start : places.stop], rows, places

    def _global_batches(self, index: int) -> Iterator[tuple[list[Key], list[dict]]]:
        """One dataset's global batches, pass after pass."""
        spec = self.data.specs[index]
        stream = self.data.rows[index].shuffle(seed=self.data.seed, buffer_size=self.shuffle_buffer)
        for epoch in itertools.count():
            stream.set_epoch(epoch)
            rows = iter(stream)
            for number in itertools.count():
                batch = list(itertools.islice(rows, self.global_batch_size))
                if len(batch) < self.global_batch_size:
                    break
                start, instruction = number * self.global_batch_size, (number + epoch) % len(spec.instructions)
                yield [Key(index, start + i, epoch, instruction) for i in range(len(batch))], batch
            if number == 0:
                raise ValueError(
                    f"Dataset {spec.name!r} has {len(batch)} rows, fewer than the {self.global_batch_size} of a global "
                    "batch. Use smaller batches, or leave it out."
                )
            logger.info("%s: end of pass %d, %d rows dropped", spec.name, epoch + 1, len(batch))


class Collator:
    """
    Makes the tensors of a micro-batch: `queries` and `documents` (positives first, then all hard negatives), each the
    processor's tensors, and `query_ids` (batch,), `document_ids` (documents,): one number per distinct text, by
    which the loss knows duplicates on every rank. `decoder_tokens` counts, `dataset` and `rows` say where it came from.
    """

    def __init__(self, processor, max_length: int | None = None, share_prefix: bool = True):
        self.processor, self.max_length, self.share_prefix = processor, max_length, share_prefix

    def __call__(self, batch: list[Example]) -> dict:
        queries = [example.query for example in batch]
        documents = [example.positive for example in batch] + [text for e in batch for text in e.negatives]
        sides = {
            "queries": self.encode_queries(batch),
            "documents": dict(
                self.processor(
                    documents,
                    batch[0].document_instruction,
                    max_length=self.max_length,
                    return_prefix_ids=self.share_prefix,
                )
            ),
        }
        return {
            **sides,
            "decoder_tokens": sum(
                int(side["attention_mask"].sum()) + side.get("prefix_ids", side["input_ids"][:0]).numel()
                for side in sides.values()
            ),
            "query_ids": torch.tensor([text_id(text) for text in queries]),
            "document_ids": torch.tensor([text_id(text) for text in documents]),
            "dataset": batch[0].dataset,
            "rows": [example.row for example in batch],
        }

    def encode_queries(self, batch: list[Example]) -> dict:
        """Queries with as many of their examples as leave room for them."""
        examples = [self.processor.fit_examples(batch[0].instruction, example.examples) for example in batch]
        return dict(
            self.processor(
                [example.query for example in batch],
                batch[0].instruction,
                examples=examples if any(examples) else None,
                max_length=None if any(examples) else self.max_length,
                return_prefix_ids=self.share_prefix,
            )
        )


def text_id(text: str) -> int:
    """The same 63-bit number for the same text in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1
