"""Checks a model folder and pushes it to the Hub in one commit.

    python -m scripts.push_to_hub runs/mine/model user/name --dry_run     # checks, and lists what would go
    python -m scripts.push_to_hub runs/mine/model user/name
    python -m scripts.push_to_hub . user/name                             # this repository itself

A folder goes out when a stranger could use it: all files are there and whole, the card is complete, nothing is unsafe to
load or names a path of this machine, and the model loads and embeds in a fresh process without a network. Everything
that is wrong is told at once. In a git clone the tracked files are the folder. Checking runs the folder's own code.
"""

import argparse
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from configuration_causal2vec import Causal2VecConfig
from saving_utils import EVAL_RESULTS, REPLACED, SHIPPED_CODE, check_adapter_base, code_hashes, is_weights, read_json
from scripts.cli import TOLD, exit_code


PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".h5", ".msgpack", ".npz", ".pyc")
REQUIRED = (
    "README.md",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "encoder_tokenizer/tokenizer.json",
    "encoder_tokenizer/tokenizer_config.json",
    "processor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_causal2vec_config.json",
    "instructions.json",
    *SHIPPED_CODE,
)
REQUIRED_OF_ADAPTER = ("README.md", "adapter_config.json", "adapter_model.safetensors")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")  # any string may be a token
MACHINE_PATH = re.compile(r"(?<![\w./~-])(/(?:home|root|Users|mnt|private)/[\w.-]+|[A-Za-z]:\\{1,2}\w[\w.-]*)")

# What the check in a fresh process runs, in the order: sys.argv[1] is the folder.
LOAD = """
import socket, sys
def refuse(*args): raise OSError("the check runs without a network")
socket.socket.connect = socket.getaddrinfo = refuse
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, use_safetensors=True, dtype="auto")
vectors = model.encode(["a text", ""], instruction="an instruction", convert_to_tensor=True)
assert vectors.shape == (2, model.config.embedding_size) and torch.isfinite(vectors).all(), vectors
"""


def files_to_push(folder: Path) -> list[Path]:
    """
    What belongs to the model, relative to the folder: in a git clone the tracked files, else all but hidden ones and what
    the scripts of this repository leave behind.
    """
    if (folder / ".git").exists():
        listed = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "-z"], capture_output=True, text=True, check=True
        )
        files = [Path(name) for name in listed.stdout.split("\0") if name and (folder / name).is_file()]
    else:
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(
        file
        for file in files
        if not any(is_hidden(part) or part == "__pycache__" or part.endswith(".egg-info") for part in file.parts)
        and not any(file.is_relative_to(made) for made in ("runs", "bases"))
    )


def is_hidden(part: str) -> bool:
    """Whether a file or folder of this name stays where it is: `.eval_results` is the Hub's."""
    return part.startswith(".") and part != EVAL_RESULTS


def problems(folder: Path, files: list[Path], max_bytes: float) -> Iterator[str]:
    """Everything about the files that would hurt those who pull them; of files that are no JSON, that alone."""
    broken = list(json_problems(folder, files))
    if broken:  # what is left reads them
        yield from broken
        return
    has_adapter = Path("adapter_config.json") in files
    is_adapter = has_adapter and not any(is_weights(file.as_posix()) for file in files)
    required = REQUIRED_OF_ADAPTER if is_adapter else REQUIRED
    config = read_json(folder / "config.json") if Path("config.json") in files else {}
    if config.get("baseline") is not None and config.get("encoder_config") is None:
        required = [name for name in required if not name.startswith("encoder_tokenizer/")]
    missing = [name for name in required if Path(name) not in files]
    if missing:
        yield f"missing: {', '.join(missing)}. Save the folder again with `model.save_pretrained`."
    for file in files:
        if file.suffix in PICKLES:
            yield f"{file}: {file.suffix} files can run code when they are loaded; keep weights as .safetensors only."
        if (folder / file).is_symlink():
            yield f"{file} is a link; put the file itself there."
        size = (folder / file).stat().st_size
        if size > max_bytes:
            yield f"{file}: {size / 1e9:.1f} GB are more than {max_bytes / 1e9:g} GB; save with a smaller `max_shard_size`."
        elif file.suffix == ".safetensors":
            yield from safetensors_problems(folder, file)
        if file.suffix != ".safetensors" and file.name not in VOCABULARIES:
            yield from path_problems(folder, file)
    if is_adapter:
        try:
            check_adapter_base(folder)
        except ValueError as error:
            yield str(error)
    else:
        yield from weights_problems(folder, files)
        yield from auto_map_problems(folder, files)
    if has_adapter and not is_adapter:
        yield (
            "adapter_config.json: an adapter beside weights is passed over or preferred, depending on who loads the folder. "
            "Push the merged model, or the adapter in a folder of its own."
        )
    if Path("README.md") in files:
        yield from card_problems(folder, is_adapter)


def json_problems(folder: Path, files: list[Path]) -> Iterator[str]:
    for file in files:
        if file.suffix == ".json":
            try:
                read_json(folder / file)
            except ValueError as error:
                yield f"{str(error).removeprefix(f'{folder}/')} The file is damaged; save it again."


def safetensors_problems(folder: Path, file: Path) -> Iterator[str]:
    """Whether the header can be read and the file is as long as it says."""
    size = (folder / file).stat().st_size
    with open(folder / file, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            header = json.loads(stream.read(length)) if length <= size - 8 else None
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, TypeError, KeyError):
            yield f"{file}: no safetensors header; the file is damaged. Save it again."
            return
    if 8 + length + max(ends, default=0) != size:
        yield f"{file}: {8 + length + max(ends, default=0)} bytes expected, {size} found; it is cut off. Save it again."


def weights_problems(folder: Path, files: list[Path]) -> Iterator[str]:
    """Whether there are weights, and no others beside them: one file, or an index and the shards that it names."""
    index, single = Path("model.safetensors.index.json"), Path("model.safetensors")
    if index not in files:
        if single not in files:
            yield f"missing: {single}, or its shards with {index}."
        return
    shards = set(read_json(folder / index)["weight_map"].values())
    absent = sorted(shard for shard in shards if Path(shard) not in files)
    if absent:
        yield f"{index} names {', '.join(absent)}, which is not there. Save the model again."
    others = {file.as_posix() for file in files if is_weights(file.as_posix())} - shards - {index.as_posix()}
    if others:
        yield f"{index} does not name {', '.join(sorted(others))}, which is there too. Remove the weights that are old."


def auto_map_problems(folder: Path, files: list[Path]) -> Iterator[str]:
    """Whether AutoConfig and AutoModel find their classes in this very folder."""
    if Path("config.json") not in files:
        return
    auto_map = read_json(folder / "config.json").get("auto_map", {})
    for name in ("AutoConfig", "AutoModel"):
        reference = auto_map.get(name, "")
        if "--" in reference or Path(f"{reference.split('.')[0]}.py") not in files:
            yield f"config.json: auto_map gives {reference!r} for {name}; it must name a class in a file of the folder."


def path_problems(folder: Path, file: Path) -> Iterator[str]:
    """Paths that exist on this machine only: in JSON any absolute path, in other text what looks like a home folder."""
    try:
        text = (folder / file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return  # not text
    found = {match[1] for match in MACHINE_PATH.finditer(text)}
    if file.suffix == ".json":
        found |= {value for value in _strings(json.loads(text)) if re.match(r"/[\w.-]+/[\w./-]+$", value)}
    if found:
        yield f"{file} names paths of a machine: {', '.join(sorted(found)[:3])}. Write what others can use instead."


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def card_problems(folder: Path, is_adapter: bool) -> Iterator[str]:
    """What a reader of the card would miss."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    data, text = card.data.to_dict(), card.text
    for key, example in (
        ("license", "apache-2.0"),
        ("base_model", "intfloat/e5-base-v2"),
        ("library_name", "sentence-transformers"),
    ):
        if not data.get(key):
            yield f"README.md: the front matter has no `{key}`, such as {example}."
    expected = {
        "the training data (a heading with `data` or `training`, or `datasets` in the front matter)": data.get(
            "datasets"
        )
        or re.search(r"^#+ .*(data|training)", text, re.IGNORECASE | re.MULTILINE),
        "its limits (a heading with `limits`)": re.search(r"^#+ .*limit", text, re.IGNORECASE | re.MULTILINE),
        "how to pin a commit (`revision=`)": "revision=" in text,
    }
    if not is_adapter and (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        instruction = config.get("query_instruction")
        expected["the instruction of queries"] = (instruction or "instruction") in " ".join(text.split())
        size = embedding_size(config)
        expected[f"the embedding's size ({size})"] = size is None or str(size) in text
        for name, digest in code_hashes(folder).items():
            expected[f"the SHA-256 of {name} ({digest})"] = digest in text
    absent = [what for what, found in expected.items() if not found]
    if absent:
        yield f"README.md does not say {'; '.join(absent)}. `python -m training.card FOLDER` writes a complete card of a run."


def embedding_size(config: dict) -> int | None:
    """How many numbers an embedding has; `None` for a configuration that cannot be, of which loading tells more."""
    try:
        return Causal2VecConfig.from_dict(config).embedding_size
    except (TypeError, ValueError):
        return None


def load_problem(folder: Path) -> str | None:
    """Whether the model loads and embeds in a fresh process that has no network and no cache."""
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HF_HOME": home, "HF_MODULES_CACHE": f"{home}/modules", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        result = subprocess.run(
            [sys.executable, "-c", LOAD, str(folder.resolve())],
            env=environment,
            cwd=home,
            capture_output=True,
            text=True,
        )
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    return (
        None if result.returncode == 0 else f"the model does not load in a fresh process: {lines[-1] if lines else '?'}"
    )


def check(folder: Path, max_bytes: float = 5e9) -> list[Path]:
    """
    The files that may go out.

    Raises:
        ValueError: something is wrong; says all of it.
    """
    if not folder.is_dir():
        raise ValueError(f"FOLDER must be a folder, got {folder}.")
    files = files_to_push(folder)
    found = list(problems(folder, files, max_bytes))
    if not found and Path("adapter_config.json") not in files and (problem := load_problem(folder)):
        found.append(problem)
    if found:
        raise ValueError("\n  ".join([f"{folder} is not ready to be pushed:", *found]))
    return files


def push(folder: Path, files: list[Path], args: argparse.Namespace) -> str:
    """Pushes the files in one commit, and removes weights that they replace; returns the commit's URL."""
    from glob import escape

    from huggingface_hub import HfApi

    api = HfApi()
    repo_id = api.create_repo(args.repo_id, private=args.private or None, exist_ok=True).repo_id
    if args.revision:
        api.create_branch(repo_id, branch=args.revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=args.revision,
        commit_message=args.message,
        allow_patterns=[escape(file.as_posix()) for file in files],
        delete_patterns=list(REPLACED),
    )
    return commit.commit_url


def main(argv: list[str] | None = None) -> int:
    """Checks and pushes; see [`exit_code`] for what it returns."""
    parser = argparse.ArgumentParser(prog="python -m scripts.push_to_hub", description=__doc__.split("\n")[0])
    parser.add_argument(
        "folder", type=Path, help="what `save_pretrained` or train.py left, or a clone of this repository"
    )
    parser.add_argument("repo_id", help="user/name on the Hub; made if it does not exist")
    parser.add_argument("--dry_run", action="store_true", help="check and list the files, push nothing")
    parser.add_argument("--private", action="store_true", help="if the repository is made, make it private")
    parser.add_argument("--revision", help="branch to push to, made if it does not exist (default: main)")
    parser.add_argument("--message", default="Upload Causal2Vec model", help="the commit's message")
    parser.add_argument("--max_gb", type=float, default=5.0, help="largest file in GB (default: 5)")
    args = parser.parse_args(argv)
    told = (*TOLD, RuntimeError)  # which huggingface_hub raises
    return exit_code("push_to_hub", lambda: check_and_push(args), told, one_line=False)


def check_and_push(args: argparse.Namespace) -> None:
    """Lists what goes out, and pushes it unless this is a dry run."""
    files = check(args.folder, args.max_gb * 1e9)
    for file in files:
        print(f"{(args.folder / file).stat().st_size:>15,}  {file.as_posix()}")
    what = f"{len(files)} files, {sum((args.folder / file).stat().st_size for file in files) / 1e6:,.1f} MB"
    if args.dry_run:
        print(f"Would push {what}, to {args.repo_id}.")
    else:
        print(f"Pushed {what}: {push(args.folder, files, args)}")


if __name__ == "__main__":
    sys.exit(main())
