"""Writes a trained model into this folder as the bundled checkpoint.

    python bundle.py runs/mine/model            # weights in half precision, configuration, tokenizers -> repository root

Weights are stored as float16 and read as float32: half the download, and full-precision arithmetic unless a user asks
for another `dtype`.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parent


def store_half(folder: Path) -> None:
    """Rewrites a saved model's weights as float16, to be read as float32."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(path).items()}
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError(f"{path}: some weights are not finite in float16.")
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("encoder_config"), config.get("decoder_config")):
        if part is not None and "dtype" in part:
            part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def forget_origin(folder: Path) -> None:
    """Takes out of saved tokenizers that they were loaded from a folder, which is true of nobody's copy."""
    for path in folder.rglob("tokenizer_config.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        for name in ("is_local", "local_files_only"):
            values.pop(name, None)
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def bundle(model_dir: str) -> None:
    """Copies all but code, card and instructions into the repository root, file by file, each replaced at once."""
    from modeling_causal2vec import Causal2VecModel

    with tempfile.TemporaryDirectory(dir=ROOT) as temporary:
        model = Causal2VecModel.from_pretrained(model_dir, dtype="float32")
        model.save_pretrained(temporary)
        store_half(Path(temporary))
        forget_origin(Path(temporary))
        for path in sorted(Path(temporary).rglob("*")):
            target = ROOT / path.relative_to(temporary)
            if path.is_file() and path.suffix != ".py" and path.name not in ("README.md", "instructions.json"):
                target.parent.mkdir(exist_ok=True)
                os.replace(path, target)
                print(f"{target.relative_to(ROOT)}  {target.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model_dir", help="a folder that train.py left behind")
    bundle(parser.parse_args().model_dir)


if __name__ == "__main__":
    main()
