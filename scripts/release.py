"""Installs a trained model as this repository's checkpoint.

    python -m scripts.release runs/mine/model

Weights are stored as float16 in shards of at most 90 MB, and read as float32: half the download, and full-precision
arithmetic unless a user asks for another `dtype`. The root's code, card and instructions stay; of the card only the
hashes of the code are refreshed. All files are moved in at the end, so an error leaves the old checkpoint whole. The golden
vectors are then of other weights: `python -m serving.check --make`, and its engines again.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from modeling_causal2vec import Causal2VecModel
from saving_utils import new_files, read_json, refresh_hashes


ROOT = Path(__file__).resolve().parent.parent
KEPT = ("README.md", "instructions.json")  # the root has its own


def release(model_dir: str | Path, root: Path = ROOT, max_shard_size: str = "90MB") -> None:
    """Raises ValueError: some weights are not finite in float16."""
    model = Causal2VecModel.from_pretrained(model_dir, dtype=torch.float32).to(torch.float16)
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{model_dir}: {name} is not finite in float16.")
    with new_files(root) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        for path in [*folder.glob("*.py"), *(folder / name for name in KEPT)]:
            path.unlink(missing_ok=True)
        for facts in Path(model_dir).glob("training.*"):  # the run's arguments, log and curve
            shutil.copy(facts, folder)
        read_as_float32(folder / "config.json")
        for path in folder.rglob("tokenizer_config.json"):
            forget_origin(path)
    refresh_hashes(root)


def read_as_float32(config: Path) -> None:
    values = read_json(config)
    for part in (values, values.get("encoder_config"), values.get("decoder_config")):
        if part is not None:
            part["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def forget_origin(config: Path) -> None:
    """Removes the path of the folder that a saved tokenizer was loaded from."""
    values = read_json(config)
    for name in ("is_local", "local_files_only"):
        values.pop(name, None)
    config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.release", description=__doc__.split("\n")[0])
    parser.add_argument("model_dir", help="a folder that train.py left")
    release(parser.parse_args(argv).model_dir)
    for path in sorted(ROOT.glob("*.safetensors")):
        print(f"{path.stat().st_size:>15,}  {path.name}")


if __name__ == "__main__":
    main()
