"""Writes a trained model into this folder as the bundled checkpoint, and gets its encoder back out.

    python bundle.py runs/tiny/model            # weights in half precision, configuration, tokenizers -> repository root
    python bundle.py runs/labelled/model --divide_states 8
    python bundle.py --export_encoder bases/encoder
    python bundle.py --export_decoder runs/decoder bases/decoder

Weights are stored as float16 and read as float32: half the download, and full-precision arithmetic unless a user asks
for another `dtype`. The bundled encoder was frozen in training, so the exported one is the base it started from.
"""

import argparse
import json
import os
import shutil
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


def forget_origin(folder: Path, *others: str) -> None:
    """Takes out of saved tokenizers that they were loaded from a folder, which is true of nobody's copy, and `others`."""
    for path in folder.rglob("tokenizer_config.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        for name in ("is_local", "local_files_only", *others):
            values.pop(name, None)
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def divide_states(model, divisor: float) -> None:
    """
    Divides what the decoder's layers hand on, which the norms in them do not notice, so that states as large as those of
    bag_of_words.py fit into float16: word embeddings, what the projector gives, and what each layer adds.

    Raises:
        ValueError: the model has no projector.
    """
    if model.projector is None:
        raise ValueError(f"--divide_states is for a model with a projector; the baseline {model.baseline!r} has none.")
    writers = [model.get_input_embeddings(), model.projector.linear_2]
    for layer in model.decoder.layers:
        writers += [layer.self_attn.o_proj, layer.mlp.down_proj]
    for writer in writers:
        for parameter in writer.parameters():
            parameter.data /= divisor


def bundle(model_dir: str, divisor: float | None = None) -> None:
    """Copies all but code, card and instructions into the repository root, file by file, each replaced at once."""
    from modeling_causal2vec import Causal2VecModel

    with tempfile.TemporaryDirectory(dir=ROOT) as temporary:
        model = Causal2VecModel.from_pretrained(model_dir, dtype="float32")
        if divisor is not None:
            divide_states(model, divisor)
        model.save_pretrained(temporary)
        store_half(Path(temporary))
        forget_origin(Path(temporary))
        for path in sorted(Path(temporary).rglob("*")):
            target = ROOT / path.relative_to(temporary)
            if path.is_file() and path.suffix != ".py" and path.name not in ("README.md", "instructions.json"):
                target.parent.mkdir(exist_ok=True)
                os.replace(path, target)
                print(f"{target.relative_to(ROOT)}  {target.stat().st_size:,} bytes")


def export_encoder(folder: str) -> None:
    """Saves the bundled checkpoint's encoder and its tokenizer."""
    from modeling_causal2vec import Causal2VecModel

    model = Causal2VecModel.from_pretrained(ROOT)
    model.encoder.save_pretrained(folder)
    model.processor.encoder_tokenizer.save_pretrained(folder)
    forget_origin(Path(folder), "auto_map", "processor_class")  # of Causal2Vec's processor, which is not in the folder


def export_decoder(source: str, folder: str) -> None:
    """Copies a pretrained decoder with its tokenizer and its pretrain.json, weights in half precision."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "pretrain.json"):
        shutil.copyfile(Path(source) / name, Path(folder) / name)
    store_half(Path(folder))
    forget_origin(Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model_dir", nargs="?", help="a folder that train.py left behind")
    parser.add_argument(
        "--divide_states", type=float, metavar="D", help="divide what layers hand on, so that it fits into float16"
    )
    parser.add_argument("--export_encoder", metavar="FOLDER", help="where the bundled encoder goes")
    parser.add_argument(
        "--export_decoder", nargs=2, metavar=("SOURCE", "FOLDER"), help="what pretrain.py left, and where it goes"
    )
    args = parser.parse_args()
    if args.model_dir:
        bundle(args.model_dir, args.divide_states)
    elif args.export_encoder:
        export_encoder(args.export_encoder)
    elif args.export_decoder:
        export_decoder(*args.export_decoder)
    else:
        parser.error("nothing to do: give a model folder or one of the exports")


if __name__ == "__main__":
    main()
