"""What a saved folder holds besides weights, configuration and tokenizers, so that it works for a stranger.

These are the files that sentence-transformers reads, the instructions and a model card. Invariant: a folder that is
written anew has no config.json until everything else is in its place, so that a half-written one does not load.
"""

import ast
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# Every Python file that a saved folder carries: the modeling file and what it imports, sentence-transformers' module, and
# what the Hub's Inference Endpoints run.
SHIPPED_CODE = (
    "configuration_causal2vec.py",
    "decoder_utils.py",
    "encoding_utils.py",
    "handler.py",
    "loading_utils.py",
    "modeling_causal2vec.py",
    "prefix_cache.py",
    "runtime_utils.py",
    "saving_utils.py",
    "sentence_causal2vec.py",
    "tokenization_utils.py",
)

# Those of them that a vector comes from: the others find, load, keep and show files.
_OTHER_CODE = ("handler.py", "loading_utils.py", "runtime_utils.py", "saving_utils.py", "sentence_causal2vec.py")
VECTOR_CODE = tuple(name for name in SHIPPED_CODE if name not in _OTHER_CODE)

EVAL_RESULTS = ".eval_results"  # the folder where the Hub looks for scores

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What new weights replace, as the Hub's patterns.
REPLACED = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", *ADAPTER_FILES)

# sentence-transformers' list of modules: ours alone, in the root of the folder. It pools and normalises itself.
_ST_MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_causal2vec.Causal2VecSTModule"}]

# Not `feature-extraction`: the Hub would offer transformers' pipeline of that name, which reads one tokenizer alone.
PIPELINE_TAG, LIBRARY = "sentence-similarity", "sentence-transformers"
TAGS = ("causal2vec", "transformers", "sentence-transformers", "text-embeddings", "custom_code")

_CARD = """---
library_name: {library}
pipeline_tag: {pipeline_tag}
tags:
{tags}
{base_model}---

# {name}

{use}
## Limits

{limits} What the weights were trained on, their scores and their licence were not recorded when this folder was saved;
state them here before you publish it.

## Code and pinning

{code}
"""

# What every card says, a run's too (training/card.py).
_USE = """A [Causal2Vec](https://arxiv.org/abs/2507.23386) text embedding model:
{works}.
{dim} numbers per text, compared by cosine. It needs `torch` 2.11 and `transformers` 5.17, or newer ones; below them it
stops with an error.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("path or id", revision="<40-digit commit>", trust_remote_code=True)
queries = model.encode(["how much protein should a female eat"], instruction={instruction!r})
passages = model.encode(["As a general guideline, women need 46 grams of protein per day."])
print(queries @ passages.T)
```

Queries carry an instruction, passages none. `encode_query` uses {query_instruction}; `instructions.json` has those of
MTEB's tasks. With sentence-transformers,
`SentenceTransformer("path or id", revision="<40-digit commit>", trust_remote_code=True)` gives the same vectors; a `prompt`
is an instruction. The revision counts for an id alone, and is the commit whose code you have read.
"""
_CODE = """Loading runs the Python files of this repository, and `trust_remote_code=True` agrees to that. Read them, then pin the
commit that you have read: `from_pretrained(id, revision="<40-digit commit>", trust_remote_code=True)`.

{hashes}"""


def is_hub_id(name: str | None) -> bool:
    """Whether a name is an id on the Hub, `owner/name`, and not a folder."""
    return name is not None and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def resolve_base(base: str | None, adapter: str | Path) -> str | None:
    """The model that an adapter was made for: a folder, relative to the adapter's own or not, or a Hub id."""
    if not base:
        return None
    beside = Path(adapter, base)
    return str(beside) if beside.is_dir() else base


def check_adapter_base(folder: str | Path) -> None:
    """Raises ValueError for a folder with an adapter that others could not load: its base must be on the Hub."""
    config = Path(folder, "adapter_config.json")
    if config.is_file():
        base = read_json(config).get("base_model_name_or_path")
        if not is_hub_id(base):
            raise ValueError(
                f"adapter_config.json names the base {base!r}, which nobody else has. Push the base first and write its id "
                "`owner/name` there as `base_model_name_or_path`, or push the merged model."
            )


def push_to_hub(
    self,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | str | None = None,
    **kwargs,
):
    """
    A method of the model, its configuration and its processor, as everywhere in transformers: pushes in one commit what
    `save_pretrained(folder, **kwargs)` writes. Weights that it replaces go with that commit; a card of the repository's
    own stays but for its hashes, and transformers' template of one is never written.

    Raises:
        ValueError: the model is an adapter, and its base is not on the Hub.
    """
    from huggingface_hub import HfApi, ModelCard  # slow to import, and of no use to most who import this file
    from huggingface_hub.errors import EntryNotFoundError

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        self.save_pretrained(folder, **kwargs)
        check_adapter_base(folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        card = Path(folder, "README.md")
        try:
            theirs = Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text(encoding="utf-8")
        except EntryNotFoundError:
            theirs = None
        if theirs is not None and "[More Information Needed]" not in theirs:
            card.write_text(theirs, encoding="utf-8")
            refresh_hashes(folder)
        tags = [*(getattr(self, "model_tags", None) or ()), *([tags] if isinstance(tags, str) else tags or ())]
        if tags and card.is_file():
            content = ModelCard.load(card)
            content.data.tags = list(dict.fromkeys([*(content.data.tags or ()), *tags]))
            content.save(card)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            commit_description=commit_description,
            create_pr=create_pr,
            delete_patterns=list(REPLACED) if holds_weights(folder) else None,
        )


def write_sentence_transformers_files(folder: str | Path, config) -> None:
    """Writes what `SentenceTransformer(folder, trust_remote_code=True)` reads; the prompts are instructions."""
    settings = {
        "model_type": "SentenceTransformer",
        "requirements": {"sentence-transformers": ">=6", "transformers": ">=5.17"},
        "prompts": {"query": config.query_instruction or "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    files = {
        "modules.json": _ST_MODULES,
        "config_sentence_transformers.json": settings,
        "sentence_causal2vec_config.json": {"normalize": True},
    }
    for name, content in files.items():
        Path(folder, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def card_sections(
    folder: str | Path, config, encoder: str | None, decoder: str, instruction: str | None = None
) -> dict:
    """
    What every card says of its model: `use`, `limits` (of length) and `code`, as Markdown.

    Args:
        encoder, decoder (`str`): What the card calls them.
        instruction (`str`, *optional*): For the example, where the configuration has none.
    """
    stored = config.query_instruction
    of_encoder = f",\nwhat the encoder reads at {config.encoder_max_seq_length}" if config.has_encoder else ""
    return {
        "use": _USE.format(
            works=in_words(config, encoder, decoder),
            dim=config.embedding_size,
            instruction=stored or instruction or "Given a question, retrieve passages that answer it",
            query_instruction=f"`{stored}`" if stored else "none unless it is given one",
        ),
        "limits": f"Inputs longer than {config.max_seq_length} tokens (with in-context examples {config.icl_max_seq_length})"
        f" are cut at their end{of_encoder}.",
        "code": _CODE.format(hashes=code_table(folder)),
    }


def write_plain_card(folder: str | Path, config) -> None:
    """Writes a model card that says what the configuration and the code say, and nothing about training."""
    parts = tuple(filter(None, (config, config.encoder_config, config.decoder_config)))
    bases = [part.name_or_path for part in parts if is_hub_id(part.name_or_path)]
    encoder = config.encoder_config and f"an encoder of type `{config.encoder_config.model_type}`"
    decoder = f"a decoder of type `{config.decoder_config.model_type}`"
    text = _CARD.format(
        library=LIBRARY,
        pipeline_tag=PIPELINE_TAG,
        tags="\n".join(f"- {tag}" for tag in TAGS),
        name=config.name_or_path.rsplit("/", 1)[-1] if is_hub_id(config.name_or_path) else "Causal2Vec",
        base_model="".join(["base_model:\n", *(f"- {base}\n" for base in dict.fromkeys(bases))]) if bases else "",
        **card_sections(folder, config, encoder, decoder),
    )
    Path(folder, "README.md").write_text(text, encoding="utf-8")


def in_words(config, encoder: str | None, decoder: str) -> str:
    """What a model of this configuration does, as a clause for its card, with names for its two backbones."""
    tokens = config.num_contextual_tokens
    clause = {
        None: f"{encoder} reads the text and gives {'one Contextual token' if tokens == 1 else f'{tokens} Contextual tokens'},"
        f" which {decoder} reads with the text",
        "last_token": f"a baseline, in which {decoder} reads the text alone and EOS's state is the embedding",
        "embedding_concat": f"a baseline, in which EOS's state of {decoder} and the mean of {encoder} are concatenated",
        "token_prepending": f"a baseline, in which each layer of {decoder} reads the EOS state of the one before it ahead "
        "of the text",
    }[config.baseline]
    fields = ("pooling", "contextual_position", "bidirectional")
    changed = [
        f"`{name}={value!r}`" for name in fields if (value := getattr(config, name)) != getattr(type(config), name)
    ]
    return clause + (f", with {' and '.join(changed)}" if changed else "")


def code_table(folder: str | Path) -> str:
    """A Markdown table of the folder's shipped Python files and their SHA-256."""
    rows = [f"| `{name}` | `{digest}` |" for name, digest in code_hashes(folder).items()]
    return "\n".join(["| file | SHA-256 |", "|---|---|", *rows])


def refresh_hashes(folder: str | Path) -> None:
    """Brings the SHA-256 rows that a card has up to date."""
    card = Path(folder, "README.md")
    old = card.read_text(encoding="utf-8")
    new = old
    for name, digest in code_hashes(folder).items():
        new = re.sub(rf"(\| `{re.escape(name)}` \| `)[0-9a-f]{{64}}(` \|)", rf"\g<1>{digest}\g<2>", new)
    if new != old:
        card.write_text(new, encoding="utf-8")


def code_hashes(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each shipped Python file that the folder has."""
    paths = [Path(folder, name) for name in SHIPPED_CODE]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()}


def read_json(path: str | Path):
    """
    The contents of a JSON file, with or without a byte order mark.

    Raises:
        ValueError: it is not JSON; the message holds file, line and column.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (RecursionError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path}{line}: {json_fault(error)}.") from None


def json_fault(error: Exception) -> str:
    """What is wrong with JSON that Python did not read."""
    match error:
        case UnicodeDecodeError():
            return f"invalid UTF-8 at byte {error.start}"
        case json.JSONDecodeError():
            return f"not JSON: {error.msg} at column {error.colno}"
        case RecursionError():
            return "nested too deep"
    return f"not JSON: {error}"  # an integer of 5,000 digits


def code_identity(folder: str | Path) -> str:
    """SHA-256 of what the folder's `VECTOR_CODE` does: without comments, docstrings and layout; on any Python the same."""
    digest = hashlib.sha256()
    for name in VECTOR_CODE:
        tree = ast.parse(Path(folder, name).read_text(encoding="utf-8"))
        digest.update(ascii(_meaning(tree)).encode())
    return digest.hexdigest()


def _meaning(node):
    """A syntax tree as tuples. What is empty is left out, as newer versions of Python have fields that older ones lack."""
    if isinstance(node, list):
        return tuple(map(_meaning, node))
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    body = fields.get("body")
    if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
        if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
            fields["body"] = body[1:]
    return type(node).__name__, *((name, _meaning(value)) for name, value in fields.items() if value not in (None, []))


def write_json(path: str | Path, value) -> None:
    """Writes JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    incomplete.write_bytes(text.encode("utf-8"))
    os.replace(incomplete, path)


@contextmanager
def new_files(target: str | Path) -> Iterator[Path]:
    """
    Gives a new folder and moves what was written there into `target` at the end. Where an error came up, `target` stays as
    it was; code that was imported from `target` can be saved into it.
    """
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as temporary:
        yield Path(temporary)
        move_into(Path(temporary), target)


def move_into(source: Path, target: Path) -> None:
    """
    Moves a complete new folder's files into an existing one, and takes out the weights and adapters that new weights
    replace. An error puts the old files back; config.json goes first and comes last, so that what a power cut leaves does
    not load. Files that are the same stay untouched; others of the target are kept.
    """
    config = Path("config.json")
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    new = [file for file in files if not _same_content(source / file, target / file)]
    stale = []
    if holds_weights(source):
        there = [Path(path.name) for path in target.iterdir() if is_weights(path.name) or path.name in ADAPTER_FILES]
        stale = [file for file in there if file not in files]
    if not new and not stale:
        return
    if config in files:
        new = [*(file for file in new if file != config), config]
    old, taken, placed = Path(tempfile.mkdtemp(prefix=".replaced-", dir=target)), [], []
    try:
        for file in reversed([*stale, *new]):
            if (target / file).is_file():
                _move(target / file, old / file)
                taken.append(file)
        for file in new:
            _move(source / file, target / file)
            placed.append(file)
    except BaseException:
        for file in placed:
            (target / file).unlink()
        for file in reversed(taken):
            _move(old / file, target / file)
        shutil.rmtree(old, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def holds_weights(folder: str | Path) -> bool:
    """Whether a folder holds (a part of) a model's own weights, and not only an adapter's."""
    return Path(folder).is_dir() and any(is_weights(path.name) for path in Path(folder).iterdir())


def is_weights(name: str) -> bool:
    """Whether transformers takes a file of this name for (a part of) the model."""
    return re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json", name) is not None


def _same_content(first: Path, second: Path) -> bool:
    if not second.is_file() or first.stat().st_size != second.stat().st_size:
        return False
    with open(first, "rb") as a, open(second, "rb") as b:
        return all(chunk == b.read(2**20) for chunk in iter(lambda: a.read(2**20), b""))
