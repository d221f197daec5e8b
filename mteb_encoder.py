"""A Causal2Vec checkpoint, or any sentence-transformers model, as mteb wants it.

An instruction stands before queries of retrieval and reranking, not before documents, and before all texts of the other
tasks. Invariants: a task without an instruction is an error; two different local checkpoints never have the same name
and revision; vectors and similarities are fp32 whatever the model's dtype.
"""

import ast
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
from functools import partial
from pathlib import Path

from saving_utils import holds_weights, resolve_base


ROOT = Path(__file__).resolve().parent
# The code that a vector comes from.
CODE = (
    "configuration_causal2vec.py",
    "modeling_causal2vec.py",
    "packing.py",
    "prefix_cache.py",
    "token_prepending.py",
    "tokenization_utils.py",
)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
CHUNK = 4096  # texts between which progress is told and vectors are kept


# ---------------------------------------------------------------------------------------------- what stands before a text


class Instructions:
    """
    The instruction of a task and a side. Queries and the texts of symmetric tasks have one, documents do not.

    Args:
        table: Task name -> instruction; a dict with `query` and `document` says it for each side.
        source: Where the table comes from, for errors.
    """

    def __init__(self, table: Mapping[str, str | dict], source: str = "the table"):
        self.table = dict(table)
        self.source = source

    @classmethod
    def read(cls, file: str | Path, tasks: Sequence) -> "Instructions":
        """
        From a file, and from the `task.json` of tasks that the file does not name.

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
        """From `folder/<task>.json`. Raises FileNotFoundError that names every task without a file."""
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
    """Text that has nothing to do with any task. Which line a text gets depends on the text and the seed alone."""

    lines: tuple[str, ...]
    seed: int

    @classmethod
    def read(cls, file: str | Path, seed: int) -> "Noise":
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
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


# ------------------------------------------------------------------------------------------------- kinds of models


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
        """How many texts were read only in part (`"texts"`; by either tower), of how many encoded so far (`"of"`)."""
        return Counter(self.model.truncated, of=self.encoded)

    def count_truncated(self, texts: list[str], instruction: str | None, examples: list[dict] | None) -> Counter:
        """The same of other texts, which need no vectors."""
        from tokenization_utils import count_cut

        cut = self.model.processor.towers_cut(texts, instruction, examples, self.max_length)
        return count_cut(cut) + Counter(of=len(texts))

    def rows(self, texts: list[str], instruction: str | None, examples: list[dict] | None):
        """What the model reads."""
        return self.model.processor(texts, instruction=instruction, examples=examples, max_length=self.max_length)

    def fit(self, instruction: str | None, examples: list[dict] | None) -> list[dict] | None:
        """As many of the examples as leave a quarter of the longest sequence, at most 512 tokens, to the text."""
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


# ---------------------------------------------------------------------------------------------- the wrapper for mteb


@dataclass
class MTEBEncoder:
    """
    What mteb calls: its encoder protocol around one of the models above.

    Args:
        backend: The model.
        mteb_model_meta: mteb's description of it. Name and revision are its identity.
        settings: Everything else that a vector depends on, and what results call the model (`label`).
        instruction_for: From a task's metadata and a side to an instruction.
        examples_for: From a task's metadata and an instruction to in-context examples.
        batch_size: Texts per forward pass.
        cache_dir: Where to keep vectors; nowhere by default.
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
        """Vectors of one side of a task, computed in chunks, which are cached, and shared out among processes."""
        import numpy as np

        instruction, examples = self.head(task_metadata, side)
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

    def head(self, task_metadata, side: str | None) -> tuple[str | None, list[dict] | None]:
        """Instruction and examples that stand before the texts of one side of a task."""
        instruction = self.instruction_for(task_metadata, side)
        return instruction, self.backend.fit(instruction, self.examples_for(task_metadata, instruction))

    def _embed_chunk(self, texts: list[str], instruction: str | None, examples: list[dict] | None, side: str | None):
        """Vectors of texts, and the count of those read only in part."""
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
        """The same model with noise in its inputs; its results are kept apart."""
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
    Vectors of texts on disk, in one SQLite file per model and head, so that a text of several tasks or of an interrupted
    one is embedded once. Several processes may write; what is there was written whole.
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
        """Text -> fp32 `(dim,)`, of those that are there."""
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
    """The union of what all processes have."""
    _, world = ranks()
    if world == 1:
        return mine
    import torch.distributed as dist

    parts = [None] * world
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def start_processes() -> str | None:
    """Joins the processes that torchrun started; returns this one's device, if it has one of its own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    import torch

    if not torch.distributed.is_initialized():
        # Gloo, for vectors are on the CPU when they are exchanged; patient, for a chunk may take long.
        torch.distributed.init_process_group("gloo", timeout=timedelta(hours=12))
    return f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else None


# ------------------------------------------------------------------------------------------------- loading and identity


@dataclass(frozen=True)
class Location:
    """Where a model is, and what it is called."""

    path: str  # folder or Hub id
    name: str
    revision: str  # commit on the Hub, or a hash of a folder's content
    commit: str | None  # to load from the Hub
    is_causal2vec: bool


def locate(model: str, revision: str | None = None, name: str | None = None) -> Location:
    """
    Finds a model and its identity, without loading it.

    Raises:
        FileNotFoundError: no such folder, package or file `config.json`.
    """
    if model.startswith("package:"):
        model = str(package_model(model.removeprefix("package:")))
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
            raise FileNotFoundError(f"{folder} has neither config.json nor modules.json: not a saved model.")
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        is_causal2vec = config.get("model_type") == "causal2vec"
        name = name or folder.resolve().name
        return Location(
            str(folder),
            name if "/" in name else f"local/{name}",
            folder_identity(folder, is_causal2vec),
            None,
            is_causal2vec,
        )
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"No folder {model}.")
    from huggingface_hub import hf_hub_download

    file = Path(hf_hub_download(model, "config.json", revision=revision))
    commit = file.parent.name  # of the snapshot
    is_causal2vec = read_json(file).get("model_type") == "causal2vec"
    return Location(model, name if name and "/" in name else model, commit, commit, is_causal2vec)


def package_model(package: str) -> Path:
    """The folder of an installed Python package that holds a model."""
    from importlib.util import find_spec

    spec = find_spec(package)
    if spec is None:
        raise FileNotFoundError(f"No Python package {package!r} is installed.")
    folders = [
        file.parent for root in spec.submodule_search_locations or () for file in Path(root).rglob("modules.json")
    ]
    if len(folders) != 1:
        raise FileNotFoundError(
            f"The package {package!r} has {len(folders)} folders with a modules.json, expected one."
        )
    return folders[0]


def folder_identity(folder: Path, is_causal2vec: bool) -> str:
    """
    A hash of what determines a local model's vectors: weights, configurations, tokenizers, a local base that an adapter is
    of and, for ours, the code.

    Two different checkpoints never have the same one. Comments, docstrings and files of other kinds have no part in it.
    """
    patterns = ("*.safetensors", "*.bin", "*config*.json", "modules.json", "*.safetensors.index.json", "*.model")
    patterns += ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
    folders = [folder, folder / "encoder_tokenizer"]
    if (folder / "modules.json").is_file():
        folders += [folder / module["path"] for module in read_json(folder / "modules.json") if module["path"]]
    files = {file for place in folders for pattern in patterns for file in place.glob(pattern) if file.is_file()}
    if not any(file.suffix in (".safetensors", ".bin") for file in files):
        raise FileNotFoundError(f"{folder} holds no weights (*.safetensors or *.bin).")
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not holds_weights(folder):
        base = resolve_base(read_json(adapter).get("base_model_name_or_path"), folder)
        if base and holds_weights(base):
            digest.update(folder_identity(Path(base), is_causal2vec).encode())
    if is_causal2vec:
        digest.update(code_identity().encode())
    return digest.hexdigest()[:40]


def code_identity() -> str:
    """A hash of what the model's code does: its syntax tree without docstrings."""
    digest = hashlib.sha256()
    for name in CODE:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                    body[0] = ast.Pass()
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()


def decoder_alone(model):
    """The decoder of a model without encoder and Contextual token, the baseline `last_token`: weights are shared."""
    from configuration_causal2vec import Causal2VecConfig
    from modeling_causal2vec import Causal2VecModel
    from tokenization_utils import Causal2VecProcessor

    kept = (
        "decoder_config contextual_token_id prompt_head prompt_tail text_prefix query_instruction max_seq_length "
        "icl_max_seq_length bidirectional"
    )
    config = Causal2VecConfig(baseline="last_token", **{name: getattr(model.config, name) for name in kept.split()})
    alone = Causal2VecModel(config, decoder=model.decoder)
    alone.processor = Causal2VecProcessor.from_config(config, model.processor.tokenizer, None)
    return alone


def load_backend(
    location: Location,
    dtype: str = "fp32",
    device: str | None = None,
    attn_implementation: str | None = None,
    pooling: str = "contextual_eos",
    max_length: int | None = None,
    normalize: bool = True,
):
    """Loads the model: ours with the code that stands beside this file, others with sentence-transformers."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kwargs = {"dtype": getattr(torch, DTYPES[dtype])}
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    if location.is_causal2vec:
        from modeling_causal2vec import Causal2VecModel

        model = Causal2VecModel.from_pretrained(location.path, revision=location.commit or "main", **kwargs)
        model = decoder_alone(model) if pooling == "last_token" else model
        return Causal2VecBackend(model.to(device).eval(), max_length, normalize)
    from sentence_transformers import SentenceTransformer

    return SentenceTransformerBackend(
        SentenceTransformer(location.path, revision=location.commit, device=device, model_kwargs=kwargs)
    )


def register(model: str, revision: str | None = None, name: str | None = None) -> str:
    """
    Makes a checkpoint known to mteb, so that `mteb.get_model(register(model))` loads it. Weights are not read yet.

    Args:
        model: A folder or Hub id of Causal2Vec.
        revision: Of a Hub id: branch, tag or commit.
        name: What mteb calls it, `owner/name`. Defaults to the Hub id, or `local/` and the folder's name.

    Returns:
        The name.

    Raises:
        ValueError: the checkpoint is not one of Causal2Vec's; `mteb.get_model` loads such models by itself.
    """
    import torch
    from mteb.models.model_implementations import MODEL_REGISTRY

    from configuration_causal2vec import Causal2VecConfig
    from modeling_causal2vec import Causal2VecModel

    location = locate(model, revision, name)
    if not location.is_causal2vec:
        raise ValueError(f"{model} is not a Causal2Vec checkpoint; mteb.get_model({model!r}) loads it without this.")
    config = Causal2VecConfig.from_pretrained(location.path, revision=location.commit or "main")
    with torch.device("meta"):
        shapes = Causal2VecModel(config)
    meta = model_meta(location, Causal2VecBackend(shapes))
    MODEL_REGISTRY[meta.name] = meta
    return meta.name


def load_for_mteb(
    name: str, revision: str | None = None, device: str | None = None, path: str | None = None, **kwargs
) -> MTEBEncoder:
    """
    The loader in our `ModelMeta`: `mteb.get_model` and `mteb.evaluate(meta, tasks)` come here.

    Args:
        name: What mteb calls the model.
        path: Folder or Hub id. Defaults to the name.

    Raises:
        ValueError: the folder is no longer what `revision` stands for.
    """
    location = locate(path or name, revision, name if path else None)
    if location.commit is None and revision not in (None, location.revision):
        raise ValueError(f"{location.path} has changed: its revision was {revision} and is {location.revision}.")
    backend = load_backend(location, device=device, **kwargs)
    instructions = ROOT / "instructions.json"
    settings = {"label": name, "model": name, "revision": location.revision, "dtype": kwargs.get("dtype", "fp32")}
    instruction_for = (
        Instructions(read_json(instructions), str(instructions)) if location.is_causal2vec else backend.stored_prompt
    )
    return MTEBEncoder(backend, model_meta(location, backend), settings, instruction_for)


def model_meta(location: Location, backend):
    """mteb's description of a model."""
    from mteb.models import ModelMeta

    parameters = list(backend.model.parameters())
    return ModelMeta(
        loader=partial(load_for_mteb, path=location.path),
        name=location.name,
        revision=location.revision,
        release_date=None,
        languages=["eng-Latn"],
        n_parameters=sum(parameter.numel() for parameter in parameters),
        memory_usage_mb=round(sum(parameter.nbytes for parameter in parameters) / 2**20),
        max_tokens=backend.max_tokens,
        embed_dim=backend.dim,
        license=None,
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Transformers"] if location.is_causal2vec else ["Sentence Transformers", "PyTorch"],
        similarity_fn_name="cosine",
        use_instructions=location.is_causal2vec,
        training_datasets=training_datasets(location),
    )


def training_datasets(location: Location) -> set[str] | None:
    """What the model card of a folder names under `datasets`; None when it does not say."""
    card = Path(location.path) / "README.md"
    if not card.is_file():
        return None
    from huggingface_hub import ModelCard

    datasets = ModelCard.load(card).data.to_dict().get("datasets")
    return None if datasets is None else {datasets} if isinstance(datasets, str) else set(map(str, datasets))


# --------------------------------------------------------------------------------------------------------- helpers


def read_json(file: str | Path):
    """Raises ValueError that names the file when it is not JSON."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error


def log(message: str) -> None:
    """To standard error, once for all processes."""
    if ranks()[0] == 0:
        print(message, file=sys.stderr, flush=True)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
