"""Exports a checkpoint as one ONNX graph that needs no torch, no transformers and no remote code.

    python -m serving.onnx export . OUT             # float32
    python -m serving.onnx export . OUT --int8      # a quarter of the size, about three times as fast on CPUs

OUT holds `model.onnx` (both towers, the projector and the pooling; any batch size and length; where the decoder's
attention is causal, the keys and values of a shared prefix as input and output), both tokenizers, `onnx_config.json` and
`onnx_runtime.py`, whose `Causal2VecONNX(OUT).encode` is the model's `encode`. Before anything stands in OUT, its vectors
are compared with the model's own, for the texts of serving/check.py.

int8 (`quantize`): weights get one scale per output channel, what they are multiplied with one scale per token, found at
run time. onnxruntime's own `quantize_dynamic` takes one scale for the whole batch, so that a vector would depend on the
texts beside it. Channels are balanced before, as in SmoothQuant (Xiao et al., 2023, arXiv:2211.10438), so that a few large
ones do not take all of a token's 255 steps.
"""

import argparse
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from scripts.cli import exit_code


LIMIT = 2**31 - 2**20  # bytes that a protobuf file may have, less some for the graph


def export(
    model: str,
    output: str | Path,
    int8: bool = False,
    truncate_dim: int | None = None,
    revision: str | None = None,
    float32: Sequence[str] = (),
    min_cosine: float | None = None,
) -> dict:
    """
    Args:
        model (`str`): Folder or Hub id.
        output: The folder to make; what is there of an earlier export is replaced.
        int8 (`bool`): Quantise the layers and word embeddings.
        truncate_dim (`int`, *optional*): Keep the first numbers of an embedding alone.
        revision (`str`, *optional*): Of a Hub id.
        float32: Names of modules that int8 leaves as they are, such as `decoder.layers.1.mlp`.
        min_cosine (`float`, *optional*): Least cosine of a vector to the model's own. Defaults to serving/check.py's.

    Returns:
        What onnx_config.json says.

    Raises:
        ValueError: the model cannot be exported, or the graph's vectors are not its own; says which and why.
    """
    from encoding_utils import check_truncate_dim
    from saving_utils import new_files, write_json
    from serving.check import TOLERANCE
    from serving.loading import load_model

    if float32 and not int8:
        raise ValueError("`float32` names what int8 leaves as it is; without int8 all of the graph is float32.")
    loaded = load_model(model, revision=revision, device="cpu")
    dim = loaded.config.embedding_size if truncate_dim is None else truncate_dim
    check_truncate_dim(dim, loaded.config.embedding_size)
    merge_adapters(loaded)
    with new_files(output) as folder:
        settings = write_tokenizers(loaded, folder)
        graph = trace(loaded, dim)
        kept = []
        if int8:
            kept = quantize(graph, channel_maxima(loaded), embeddings(loaded), float32)
        save_graph(graph, folder / "model.onnx")
        shutil.copyfile(Path(__file__).with_name("onnx_runtime.py"), folder / "onnx_runtime.py")
        weights = "int8" if int8 else "float32"
        settings |= {"embedding_size": dim, "weights": weights, "float32_layers": kept}
        settings["fingerprint"] = {**loaded.fingerprint(), "dtype": weights}
        write_json(folder / "onnx_config.json", settings)
        difference, cosine = check(loaded, folder, dim)
        least = TOLERANCE[weights]["cosine"] if min_cosine is None else min_cosine
        if cosine < least:
            raise ValueError(
                f"The graph's vectors are not the model's: the smallest cosine is {cosine:.5f}, and must be {least}."
                + (" Keep modules in float32 with --float32." if int8 else "")
            )
        settings["check"] = {"difference": difference, "cosine": cosine}
        write_json(folder / "onnx_config.json", settings)
    return settings


def merge_adapters(model) -> None:
    """Adds LoRA to the weights that it adapts."""
    for name, module in [(name, module) for name, module in model.named_modules() if hasattr(module, "base_layer")]:
        module.merge()
        model.set_submodule(name, module.base_layer)


def write_tokenizers(model, folder: Path) -> dict:
    """
    Writes both tokenizers as the model's processor uses them; returns the layout of a row.

    Raises:
        ValueError: a tokenizer is not one of the `tokenizers` library's.
    """
    from loading_utils import position_limit
    from tokenization_utils import PROCESSOR_SETTINGS

    processor = model.processor
    for tower, tokenizer, part in (
        ("decoder", processor.tokenizer, folder),
        ("encoder", processor.encoder_tokenizer, folder / "encoder_tokenizer"),
    ):
        if tokenizer is None:
            continue
        if not tokenizer.is_fast:
            raise ValueError(
                f"The {tower}'s tokenizer, {type(tokenizer).__name__}, runs in Python and has no tokenizer.json; without "
                "transformers nothing could run it."
            )
        values = json.loads(tokenizer.backend_tokenizer.to_str())
        values |= {"truncation": None, "padding": None}
        part.mkdir(exist_ok=True)
        (part / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    encoder = processor.encoder_tokenizer
    return {
        **{name: getattr(processor, name) for name in PROCESSOR_SETTINGS},
        "query_instruction": model.config.query_instruction,
        "position_limit": position_limit(model.decoder),
        "bos_ids": processor._bos_ids,
        "suffix_ids": [*processor._suffix_ids, processor.tokenizer.eos_token_id],
        "pad_token_id": processor._pad_token_id,
        "has_encoder": encoder is not None,
        "encoder_frame": processor._encoder_frame,
        "encoder_pad_token_id": 0 if encoder is None else encoder.pad_token_id or 0,
    }


def trace(model, dim: int):
    """
    The model's forward pass as an `onnx.ModelProto`.

    Raises:
        ValueError: torch cannot trace it.
    """
    import torch
    from torch import nn
    from transformers.cache_utils import DynamicCache

    class Graph(nn.Module):
        """`forward`, with the prefix's keys and values `(layers, 2, 1, key_value_heads, prefix_len, head_dim)`."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, encoder_ids=None, encoder_attention_mask=None, prefix=None):
            rows, cache = len(input_ids), None
            if prefix is not None:
                cache = DynamicCache()
                for layer, (keys, values) in enumerate(prefix.unbind(0)):
                    cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
                attention_mask = torch.cat([attention_mask.new_ones(rows, prefix.shape[-2]), attention_mask], dim=-1)
            outputs = self.model(
                input_ids,
                attention_mask,
                encoder_ids,
                encoder_attention_mask,
                past_key_values=cache,
                use_cache=prefix is not None,
            )
            if prefix is None:
                return outputs.embeddings[:, :dim]
            layers = outputs.past_key_values.layers
            states = torch.stack([torch.stack([layer.keys[:1], layer.values[:1]]) for layer in layers])
            return outputs.embeddings[:, :dim], states

    processor = model.processor
    inputs = dict(processor(["a text", "another text of more words"], instruction="Retrieve semantically similar text"))
    names = {"input_ids": ("batch", "length"), "attention_mask": ("batch", "length")}
    names |= {"encoder_ids": ("batch", "encoder_length"), "encoder_attention_mask": ("batch", "encoder_length")}
    names = {name: dict(enumerate(axes)) for name, axes in names.items() if name in inputs}
    prefix = example_prefix(model)
    if prefix is not None:
        inputs["prefix"], names["prefix"] = prefix, {4: "prefix_length"}
    sizes = {name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in names.items()}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Graph().eval(),
                (),
                kwargs=inputs,
                dynamic_shapes=sizes,
                input_names=[*inputs],
                output_names=["embeddings", "states"][: 1 + (prefix is not None)],
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch has many, and none says more than its text
        raise ValueError(f"torch cannot trace this model: {type(error).__name__}: {error}") from error
    graph = program.model_proto
    del graph.graph.value_info[:]  # of transposed weights they are wrong
    for value in graph.graph.input:
        for axis, name in names[value.name].items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    return graph


def example_prefix(model):
    """Keys and values of some prefix, or `None` for a decoder that must read whole rows."""
    import torch

    from prefix_cache import compute_prefix

    if model.config.baseline == "token_prepending" or model.prefix_cache.scan(model).why_not_shareable():
        return None
    with torch.no_grad():
        prefix = compute_prefix(model.decoder, model.processor.tokenizer("a b c d")["input_ids"])
    if prefix is None or len({layer.keys.shape for layer in prefix.layers}) > 1:
        return None
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in prefix.layers])


def channel_maxima(model) -> dict[str, np.ndarray]:
    """The largest number that each channel of a linear layer's input takes on some texts: module name -> `(in_features,)`."""
    import torch
    from torch import nn

    from serving.check import ROWS

    found: dict[str, torch.Tensor] = {}

    def hook(name: str, layer: nn.Module, inputs: tuple) -> None:
        largest = inputs[0].detach().abs().flatten(0, -2).amax(0)  # (in_features,)
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(partial(hook, name)) for name, module in layers]
    texts, instructions = zip(*ROWS)
    try:
        model.encode(texts, instruction=instructions, packed=False, truncation="silent")
    finally:
        for handle in hooks:
            handle.remove()
    return {name: largest.numpy() for name, largest in found.items()}


def embeddings(model) -> list[str]:
    """The names of both towers' word embeddings."""
    towers = [tower for tower in (model.encoder, model.decoder) if tower is not None]
    words = [tower.get_input_embeddings() for tower in towers]
    return [name for name, module in model.named_modules() if any(module is word for word in words)]


def quantize(graph, maxima: dict[str, np.ndarray], embeddings: Sequence[str], float32: Sequence[str] = ()) -> list[str]:
    """
    Makes a graph's linear layers and word embeddings int8, in place:

        x W = (x / b) (b W)  ->  (round(127 x / b / m) Q) m s      m = max |x / b| of each token
                                                                   s = max |b W| / 127 of each column, Q = round(b W / s)

    where b balances the channels: sqrt(max |x| / max |W|) of each, for the `maxima` of x that `channel_maxima` found. A word's
    embedding gets one scale.

    Returns:
        The names of layers that stay as they are, those in a module that `float32` names.

    Raises:
        ValueError: a name of `float32` is no module's that has such layers.
    """
    from onnx import helper, numpy_helper

    body = graph.graph
    weights = {tensor.name: tensor for tensor in body.initializer if len(tensor.dims) == 2}
    nodes, kept, balances, done = [], {}, {}, set()

    def add(op: str, inputs: list[str], output: str, **attributes) -> str:
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(name: str, value: np.ndarray) -> str:
        if name not in done:
            body.initializer.append(numpy_helper.from_array(value, name))
            done.add(name)
        return name

    def as_int8(name: str, axis: int, x: str = "") -> list[str]:
        """The names of the integers of a weight, balanced for the input `x`, and of their scales, along an axis."""
        new = f"{name}_{x}"
        if f"{new}_int8" not in done:
            values = numpy_helper.to_array(weights[name]) * np.reshape(balances.get(x, 1), (-1, 1))
            scale = np.maximum(np.abs(values).max(axis, keepdims=True), 1e-12).astype(np.float32) / 127
            constant(f"{new}_scale", scale.squeeze(0) if axis == 0 else scale)
            constant(f"{new}_int8", np.rint(values / scale).astype(np.int8))
        return [f"{new}_int8", f"{new}_scale"]

    def as_uint8(x: str) -> None:
        """A layer's input as integers around 128, `{x}_uint8`, and what they were divided by per token, `{x}_max`."""
        readers = [node for node in layers.values() if node.input[0] == x]
        balances[x] = np.float32(1)
        if (largest := maxima.get(module_of(readers[0]))) is not None:
            rows = np.max([np.abs(numpy_helper.to_array(weights[n.input[1]])).max(1) for n in readers], axis=0)
            balances[x] = np.sqrt(np.maximum(largest, 1e-5) / np.maximum(rows, 1e-5)).astype(np.float32)
        balanced = add("Mul", [x, constant(f"{x}_balance", 1 / balances[x])], f"{x}_balanced")
        largest = add(
            "ReduceMax", [add("Abs", [balanced], f"{x}_abs"), constant("last_axis", np.array([-1]))], f"{x}_largest"
        )
        largest = add("Max", [largest, constant("tiny", np.float32(1e-30))], f"{x}_max")
        step, zero = constant("step", np.float32(1 / 127)), constant("zero", np.uint8(128))
        add("QuantizeLinear", [add("Div", [balanced, largest], f"{x}_unit"), step, zero], f"{x}_uint8")

    layers = {}  # by their output
    for node in body.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            names = [name for name in float32 if f"{module_of(node)}.".startswith(f"{name}.")]
            kept |= {module_of(node): name for name in names}
            if not names:
                layers[node.output[0]] = node
    for node in body.node:
        output, module = node.output[0], module_of(node)
        if output in layers:
            x, weight = node.input
            if x not in balances:
                as_uint8(x)
            integers, scale = as_int8(weight, 0, x)
            inputs = [f"{x}_uint8", integers, "step", scale, "zero"]
            product = add("MatMulIntegerToFloat", inputs, f"{output}_unit", domain="com.microsoft")
            add("Mul", [product, f"{x}_max"], output)
        elif node.op_type == "Gather" and module in embeddings and node.input[0] in weights:
            parts = as_int8(node.input[0], axis=1)
            rows = [add("Gather", [part, node.input[1]], f"{output}{i}", axis=0) for i, part in enumerate(parts)]
            add("Mul", [add("Cast", rows[:1], f"{output}_float", to=1), rows[1]], output)
        else:
            nodes.append(node)
    if unknown := set(float32) - set(kept.values()):
        raise ValueError(f"No layer of the graph is in a module named {', '.join(sorted(unknown))}.")
    del body.node[:]
    body.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    left = [tensor for tensor in body.initializer if tensor.name in read]
    del body.initializer[:]
    body.initializer.extend(left)
    graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return sorted(kept)


def module_of(node) -> str:
    """The module of the model that a node of the graph came from, such as `decoder.layers.0.mlp.up_proj`."""
    scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "['']")
    path = [scope.removeprefix("model.") for scope in json.loads(scopes.replace("'", '"'))]
    return max(path[:-1], key=len, default="")


def save_graph(graph, file: Path) -> None:
    """Writes a graph without what torch notes of its making, weights in a file of their own where one could not hold them."""
    import onnx

    body = graph.graph
    for part in (graph, body, *body.node, *body.initializer, *body.input, *body.output):
        del part.metadata_props[:]
    large = sum(len(tensor.raw_data) for tensor in graph.graph.initializer) > LIMIT
    onnx.save(graph, file, save_as_external_data=large, location=f"{file.name}.data" if large else None)


def check(model, folder: Path, dim: int) -> tuple[float, float]:
    """How far the folder's vectors are from the model's own: largest difference of a number, smallest cosine."""
    from serving.check import ROWS, compare
    from serving.onnx_runtime import Causal2VecONNX

    texts, instructions = zip(*ROWS)
    vectors = model.encode(texts, instruction=instructions, truncate_dim=dim, truncation="silent")
    rows = [{"text": text, "instruction": its, "vector": vector} for (text, its), vector in zip(ROWS, vectors)]
    runtime = Causal2VecONNX(folder)
    return compare(lambda texts, its: runtime.encode(texts, its, truncation="silent"), {"rows": rows})


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.onnx", description=__doc__.split("\n")[0])
    command = parser.add_subparsers(required=True, metavar="command").add_parser(
        "export", help="make a folder that runs by numpy, tokenizers and onnxruntime alone"
    )
    command.add_argument("model", help="Causal2Vec folder or Hub id")
    command.add_argument("output", help="the folder to make")
    command.add_argument("--revision", help="of a Hub id: a commit, or a branch or tag, which may move")
    command.add_argument(
        "--int8", action="store_true", help="quantise weights, and at run time what they are read with"
    )
    command.add_argument("--float32", nargs="+", default=(), metavar="MODULE", help="what int8 leaves as it is")
    command.add_argument(
        "--min_cosine", type=float, help="least cosine to the model's own vectors (default: serving/check.py's)"
    )
    command.add_argument("--truncate_dim", type=int, help="keep the first numbers of an embedding alone")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(parse_arguments(arguments))

    def job():
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ValueError(f"{error}: pip install onnx onnxscript onnxruntime") from error
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        settings = export(**options)
        found, size = settings["check"], Path(options["output"], "model.onnx").stat().st_size
        print(
            f"{options['output']}: {settings['weights']}, {settings['embedding_size']} numbers, {size / 2**20:.0f} MiB; "
            f"smallest cosine to the model's vectors {found['cosine']:.6f}"
        )

    return exit_code("serving.onnx", job)


if __name__ == "__main__":
    sys.exit(main())
