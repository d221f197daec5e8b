"""Wraps a Causal2Vec checkpoint, or any sentence-transformers model, for mteb.

In retrieval and reranking only queries get the instruction; in all other tasks every text does. Invariants: a task
without an instruction is an error; vectors and similarities are fp32 whatever the model's dtype.
"""

import contextlib
import hashlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

from saving_utils import read_json


CHUNK = 4096  # texts per progress message and cache write


class Instructions:
    """
    The instruction of a task and a side. Queries and texts of symmetric tasks have one, documents have none.

    Args:
        table: Task name -> instruction, or a dict with `query` and `document` for the two sides.
        source: The origin of the table, for error messages.
    """

    def __init__(self, table: Mapping[str, str | dict], source: str = "the table"):
        self.table = dict(table)
        self.source = source

    @classmethod
    def read(cls, file: str | Path, tasks: Sequence) -> "Instructions":
        """
        Reads a file, and the `task.json` of tasks that the file does not name.

        Raises:
            ValueError: a task has no instruction; names all of them.
        """
        table = read_json(file)
        for task in tasks:
            if task.instruction is not None:
                table.setdefault(task.name, task.instruction)
            if task.name in table:  # the parts of an aggregate have its instruction
                table.update({part.metadata.name: table[task.name] for part in task.leaves()})
        missing = [task.name for task in tasks if task.name not in table]
        if missing:
            raise ValueError(
                f"No instruction for {', '.join(missing)}: add one to {file}, or to the task.json of a task of your own. "
                'An empty string "" means none.'
            )
        return cls(table, str(file))

    def __call__(self, task_metadata, side: str | None) -> str | None:
        name = task_metadata.name
        if name not in self.table:
            raise ValueError(f"No instruction for {name} in {self.source}; add one.")
        value = self.table[name]
        if isinstance(value, Mapping):
            return value.get(side or "query") or None
        return None if side == "document" else value or None


class Examples:
    """In-context examples of a task, for the texts that have an instruction."""

    def __init__(self, table: Mapping[str, list[dict]]):
        self.table = dict(table)

    @classmethod
    def read(cls, folder: str | Path | None, tasks: Sequence) -> "Examples":
        """Reads `folder/<task>.json`. Raises FileNotFoundError that names every task without a file."""
        if folder is None:
            return cls({})
        missing = [task.name for task in tasks if not (Path(folder) / f"{task.name}.json").is_file()]
        if missing:
            raise FileNotFoundError(f"--icl {folder} lacks {', '.join(f'{name}.json' for name in missing)}.")
        table = {}
        for task in tasks:
            examples = read_json(Path(folder) / f"{task.name}.json")
            table.update({part.metadata.name: examples for part in task.leaves()})
        return cls(table)

    def __call__(self, task_metadata, instruction: str | None) -> list[dict] | None:
        return self.table.get(task_metadata.name) if instruction else None


@dataclass(frozen=True)
class Noise:
    """Lines of unrelated text. The line appended to a text depends only on the text and the seed."""

    lines: tuple[str, ...]
    seed: int

    @classmethod
    def read(cls, file: str | Path, seed: int) -> "Noise":
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
        lines = tuple(line for line in lines if line)
        if not lines:
            raise ValueError(f"{file} has no lines of text.")
        return cls(lines, seed)

    def __call__(self, text: str) -> str:
        generator = random.Random(f"{self.seed}\n{text}")
        return f"{text} {generator.choice(self.lines)}"

    @property
    def digest(self) -> str:
        return sha256("\n".join([str(self.seed), *self.lines]))[:12]


class Causal2VecBackend:
    """A Causal2Vec checkpoint, used through `encode`."""

    def __init__(self, model, max_length: int | None = None, normalize: bool = True):
        self.model, self.max_length, self.normalize = model, max_length, normalize
        self.dim = model.config.embedding_size
        self.max_tokens = max_length or model.config.max_seq_length
        self.encoded = 0

    def encode(self, texts: list[str], instruction: str | None, examples: list[dict] | None, batch_size: int, side):
        self.encoded += len(texts)
        return self.model.encode(
            texts,
            instruction=instruction,
            examples=examples,
            batch_size=batch_size,
            max_length=self.max_length,
            normalize_embeddings=self.normalize,
            truncation="silent",
        )

    @property
    def truncated(self) -> Counter:
        """How many texts were truncated (`"texts"`; by either tower), and how many were encoded so far (`"of"`)."""
        return Counter(self.model.truncated, of=self.encoded)

    def count_truncated(self, texts: list[str], instruction: str | None, examples: list[dict] | None) -> Counter:
        """The same for other texts, without embedding them."""
        from tokenization_utils import count_cut

        cut = self.model.processor.towers_cut(texts, instruction, examples, self.max_length)
        return count_cut(cut) + Counter(of=len(texts))

    def rows(self, texts: list[str], instruction: str | None, examples: list[dict] | None):
        """The rows that the model reads."""
        return self.model.processor(texts, instruction=instruction, examples=examples, max_length=self.max_length)

    def fit(self, instruction: str | None, examples: list[dict] | None) -> list[dict] | None:
        """As many examples as leave a quarter of the longest sequence, at most 512 tokens, for the text."""
        return self.model.processor.fit_examples(instruction, examples or [], self.max_length) or None

    def describe(self, text: str, instruction: str | None, examples: list[dict] | None) -> dict[str, str]:
        """The rows of one text as strings."""
        processor, row = self.model.processor, self.rows([text], instruction, examples)
        described = {"decoder": processor.tokenizer.decode(row["input_ids"][0])}
        if "encoder_ids" in row:
            described["encoder"] = processor.encoder_tokenizer.decode(row["encoder_ids"][0])
        return described


class SentenceTransformerBackend:
    """Any model of sentence-transformers, as that library encodes."""

    def __init__(self, model):
        self.model = model
        self.dim, self.max_tokens = model.get_embedding_dimension(), model.max_seq_length

    def encode(self, texts: list[str], instruction: str | None, examples: None, batch_size: int, side: str | None):
        encode = {"query": self.model.encode_query, "document": self.model.encode_document}.get(side, self.model.encode)
        progress = sys.stderr.isatty() and len(texts) > 1000
        return encode(texts, prompt=instruction, batch_size=batch_size, show_progress_bar=progress)

    @property
    def truncated(self) -> Counter:
        return Counter()  # sentence-transformers does not say

    def count_truncated(self, texts: list[str], instruction: str | None, examples: None) -> Counter:
        return Counter()

    def fit(self, instruction: str | None, examples: None) -> None:
        return None

    def describe(self, text: str, instruction: str | None, examples: None) -> dict[str, str]:
        return {"text": (instruction or "") + text}

    def stored_prompt(self, task_metadata, side: str | None) -> str | None:
        """The prompt of the model's own configuration for a task and a side, found as mteb finds it, or its default."""
        from mteb.models.abs_encoder import get_prompt
        from mteb.types import PromptType

        prompts = {name: prompt for name, prompt in self.model.prompts.items() if prompt}
        found = get_prompt(prompts, task_metadata, None if side is None else PromptType(side))
        return found or prompts.get(self.model.default_prompt_name)


@dataclass
class MTEBEncoder:
    """
    mteb's encoder protocol around one of the models above.

    Args:
        backend: The model.
        mteb_model_meta: mteb's description of it. Name and revision are its identity.
        settings: Everything else that a vector depends on, and the model's display name (`label`).
        instruction_for: Maps a task's metadata and a side to an instruction.
        examples_for: Maps a task's metadata and an instruction to in-context examples.
        batch_size: Texts per forward pass.
        cache_dir: Folder of the vector cache; none by default.
        noise: What to append to every text.
    """

    backend: object
    mteb_model_meta: object
    settings: dict
    instruction_for: Callable
    examples_for: Callable = field(default_factory=lambda: Examples({}))
    batch_size: int = 32
    cache_dir: Path | None = None
    noise: Noise | None = None
    # Of the texts since someone last cleared these: their characters, and how many different ones were read only in part.
    lengths: list[int] = field(default_factory=list)
    truncated: Counter = field(default_factory=Counter)

    def encode(
        self, inputs, *, task_metadata, hf_split=None, hf_subset=None, prompt_type=None, **kwargs
    ):  # -> fp32 (texts, dim)
        texts = [text for batch in inputs for text in batch["text"]]
        side = None if prompt_type is None else prompt_type.value
        return self.embed(texts, task_metadata, side)

    def embed(self, texts: list[str], task_metadata, side: str | None):
        """Vectors of one side of a task, computed in cached chunks that are distributed over processes."""
        import numpy as np

        instruction, examples = self.prompt(task_metadata, side)
        texts = [self.noise(text) for text in texts] if self.noise else list(texts)
        self.lengths += [len(text) for text in texts]

        rank, world = ranks()
        size = max(1, min(CHUNK, -(-len(texts) // world)))
        chunks = [texts[start : start + size] for start in range(0, len(texts), size)]
        mine, told, failure = {}, time.monotonic(), None
        try:
            for i in range(rank, len(chunks), world):
                mine[i] = self._embed_chunk(chunks[i], instruction, examples, side)
                if time.monotonic() - told > 60:
                    told = time.monotonic()
                    log(f"{task_metadata.name}, {side or 'text'}: {i + 1} of {len(chunks)} chunks of {size} texts")
        except Exception as error:
            failure = error  # the other processes wait in `gather`
        done = gather(mine)
        if failure is not None:
            raise failure
        if len(done) < len(chunks):
            raise RuntimeError("Another process could not embed its share of the texts; its own error says why.")
        if not chunks:
            return np.zeros((0, self.backend.dim), dtype=np.float32)
        vectors, counts = zip(*(done[i] for i in range(len(chunks))))
        for count in counts:
            self.truncated.update(count)
        return np.concatenate(vectors)

    def prompt(self, task_metadata, side: str | None) -> tuple[str | None, list[dict] | None]:
        """The instruction and examples that precede the texts of one side of a task."""
        instruction = self.instruction_for(task_metadata, side)
        return instruction, self.backend.fit(instruction, self.examples_for(task_metadata, instruction))

    def _embed_chunk(self, texts: list[str], instruction: str | None, examples: list[dict] | None, side: str | None):
        """Vectors of texts, and how many were truncated."""
        import numpy as np

        cache, known = None, {}
        if self.cache_dir is not None:
            settings = {key: value for key, value in self.settings.items() if key != "label"}
            key = sha256(json.dumps([settings, instruction, examples, side], sort_keys=True))
            cache = VectorCache(self.cache_dir / f"{key}.sqlite")
            known = cache.read(texts)
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        counts = self.backend.count_truncated(list(known), instruction, examples)
        if missing:
            before = self.backend.truncated
            vectors = self.backend.encode(missing, instruction, examples, self.batch_size, side)
            vectors = np.asarray(vectors, dtype=np.float32)
            if not np.isfinite(vectors).all():
                raise ValueError(f"The model gave vectors that are not finite, in dtype {self.settings['dtype']}.")
            counts += self.backend.truncated - before
            known.update(zip(missing, vectors))
            if cache is not None:
                cache.write(missing, vectors)
        return np.stack([known[text] for text in texts]), counts

    def with_noise(self, noise: Noise) -> "MTEBEncoder":
        """The same model with noise in its inputs; its results are stored separately."""
        meta = self.mteb_model_meta.model_copy(update={"experiment_kwargs": {"noise": noise.digest}})
        return replace(self, noise=noise, mteb_model_meta=meta, lengths=[], truncated=Counter())

    def similarity(self, embeddings1, embeddings2):
        """Cosines of all pairs, in fp32, on the model's device: `(n, dim)` and `(m, dim)` -> `(n, m)`."""
        device = next(self.backend.model.parameters()).device
        return _unit(embeddings1).to(device) @ _unit(embeddings2).to(device).mT

    def similarity_pairwise(self, embeddings1, embeddings2):
        """Cosines of corresponding rows, in fp32: twice `(n, dim)` -> `(n,)`."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(-1)


class VectorCache:
    """
    A cache of vectors on disk, one SQLite file per model and prompt, so that a text shared by tasks, or seen before an
    interruption, is embedded once. Several processes may write; entries are always complete.
    """

    def __init__(self, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        with self._open() as database:
            database.execute("CREATE TABLE IF NOT EXISTS vectors (text TEXT PRIMARY KEY, vector BLOB) WITHOUT ROWID")

    @contextlib.contextmanager
    def _open(self):
        import sqlite3

        with contextlib.closing(sqlite3.connect(self.file, timeout=600)) as database, database:
            yield database

    def read(self, texts: list[str]) -> dict:
        """Text -> fp32 `(dim,)`, for the texts that are cached."""
        import numpy as np

        found = {}
        with self._open() as database:
            for text in dict.fromkeys(texts):
                row = database.execute("SELECT vector FROM vectors WHERE text = ?", (sha256(text),)).fetchone()
                if row is not None:
                    found[text] = np.frombuffer(row[0], dtype=np.float32)
        return found

    def write(self, texts: list[str], vectors) -> None:
        with self._open() as database:
            rows = ((sha256(text), vector.tobytes()) for text, vector in zip(texts, vectors, strict=True))
            database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)


def _unit(embeddings):
    import torch

    embeddings = torch.atleast_2d(torch.as_tensor(embeddings)).float()
    return torch.nn.functional.normalize(embeddings, dim=-1)


def ranks() -> tuple[int, int]:
    """This process's number and how many there are."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gather(mine: dict) -> dict:
    """The union of all processes' dictionaries."""
    _, world = ranks()
    if world == 1:
        return mine
    import torch.distributed as dist

    parts = [None] * world
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def start_processes() -> str | None:
    """Joins the process group of torchrun; returns this process's device, if it has its own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    import torch

    from runtime_utils import default_device

    if not torch.distributed.is_initialized():
        # Gloo, since vectors are exchanged on the CPU, with a long timeout, since a chunk may take long.
        torch.distributed.init_process_group("gloo", timeout=timedelta(hours=12))
    device = default_device().type
    return None if device == "cpu" else f"{device}:{os.environ['LOCAL_RANK']}"


def log(message: str) -> None:
    """Logs to standard error, from the first process only."""
    if ranks()[0] == 0:
        print(message, file=sys.stderr, flush=True)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
