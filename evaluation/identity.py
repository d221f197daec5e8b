"""Which model is scored: found by folder, Hub id or package, identified by a hash of its weights, tokenizers and code.

Invariant: two different local checkpoints never have the same name and revision.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from evaluation.encoder import Causal2VecBackend, Instructions, MTEBEncoder, SentenceTransformerBackend
from saving_utils import code_identity, holds_weights, read_json, resolve_base


ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Location:
    """A model's location and name."""

    path: str  # folder or Hub id
    name: str
    revision: str  # commit on the Hub, or a hash of a folder's content
    commit: str | None  # to load from the Hub
    is_causal2vec: bool


def locate(model: str, revision: str | None = None, name: str | None = None) -> Location:
    """
    Finds a model and its identity without loading it.

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
    A hash of everything that determines a local model's vectors: weights, configurations, tokenizers, an adapter's
    local base and, for Causal2Vec, the code.

    Comments, docstrings and other files do not affect it.
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
        digest.update(code_identity(ROOT).encode())
    return digest.hexdigest()[:40]


def decoder_alone(model):
    """The decoder of a model as the baseline `last_token`, without encoder and Contextual token; weights are shared."""
    from configuration_causal2vec import Causal2VecConfig
    from modeling_causal2vec import Causal2VecModel
    from tokenization_utils import Causal2VecProcessor

    kept = (
        "decoder_config contextual_token_id template_prefix template_suffix text_prefix query_instruction max_seq_length "
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
    """Loads the model, with this clone's code if it is Causal2Vec's, else with sentence-transformers."""
    import torch

    from runtime_utils import default_device

    device = device or str(default_device())
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
    Registers a checkpoint with mteb, so that `mteb.get_model(register(model))` loads it. Weights are not read yet.

    Args:
        model: A folder or Hub id of Causal2Vec.
        revision: Of a Hub id: branch, tag or commit.
        name: The model's name in mteb, `owner/name`. Defaults to the Hub id, or `local/` and the folder's name.

    Returns:
        The name.

    Raises:
        ValueError: not a Causal2Vec checkpoint; `mteb.get_model` loads other models by itself.
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
    The loader in our `ModelMeta`, called by `mteb.get_model` and `mteb.evaluate(meta, tasks)`.

    Args:
        name: What mteb calls the model.
        path: Folder or Hub id. Defaults to the name.

    Raises:
        ValueError: the folder has changed since `revision` was computed.
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
    """The `datasets` in the model card of a folder; None if it names none."""
    card = Path(location.path) / "README.md"
    if not card.is_file():
        return None
    from huggingface_hub import ModelCard

    datasets = ModelCard.load(card).data.to_dict().get("datasets")
    return None if datasets is None else {datasets} if isinstance(datasets, str) else set(map(str, datasets))
