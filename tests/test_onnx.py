"""serving/onnx.py and serving/onnx_runtime.py: the graph's vectors are the model's, its rows the processor's."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TEXTS
from hub_server import File, HubServer, Repo
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st


for name in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(name)

from saving_utils import write_json  # noqa: E402
from serving.onnx import embeddings, export, main, module_of, quantize, save_graph, trace, write_tokenizers  # noqa: E402
from serving.onnx_runtime import Causal2VecONNX  # noqa: E402
from tokenization_utils import Causal2VecProcessor  # noqa: E402


INSTRUCTION = "Given a question, retrieve passages that answer it"
EXAMPLES = [{"query": "what is a summit", "response": "the highest point"}, {"query": "</s>", "response": "x"}]

# Blocks what the environment must do without, and says so when it is asked for.
WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "safetensors", "huggingface_hub", "onnx"):
            raise ImportError(f"{name} was asked for")

sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="module")
def graph(tiny_model):
    return trace(tiny_model, tiny_model.config.embedding_size)


@pytest.fixture(scope="module")
def exported(saved_dir, graph, tmp_path_factory):
    """Returns a function from "float32" or "int8" to a folder. The graph is traced once, which takes the most time."""
    root = tmp_path_factory.mktemp("onnx")

    def get(weights: str) -> Path:
        if not (root / weights).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("serving.onnx.trace", lambda *_: copy.deepcopy(graph))
                export(str(saved_dir), root / weights, int8=weights == "int8")
        return root / weights

    return get


@pytest.fixture(scope="module")
def float32_dir(exported) -> Path:
    return exported("float32")


@pytest.fixture(scope="module")
def int8_dir(exported) -> Path:
    return exported("int8")


@pytest.fixture(scope="module")
def runtime(float32_dir):
    return Causal2VecONNX(float32_dir, num_threads=1)


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * second).sum(-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)


MIXED = [INSTRUCTION, None, INSTRUCTION, "Find", INSTRUCTION, None]


@pytest.mark.parametrize(
    "arguments",
    [
        dict(),
        dict(instruction=INSTRUCTION),
        dict(instruction=MIXED, batch_size=2),
        dict(instruction=INSTRUCTION, examples=EXAMPLES, max_batch_tokens=60),
        dict(max_length=12, truncation="silent"),
        dict(truncate_dim=10, normalize_embeddings=False),
    ],
    ids=lambda arguments: ",".join(arguments) or "plain",
)
def test_vectors_are_the_models(runtime, tiny_model, arguments):
    expected = tiny_model.encode(TEXTS, **arguments)
    found = runtime.encode(TEXTS, **arguments)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * max(1, np.abs(expected).max())


def test_a_prefix_is_read_once(float32_dir, tiny_model):
    runtime = Causal2VecONNX(float32_dir, num_threads=1)
    rows, run = [], runtime.session.run

    class Session:
        def run(self, outputs, inputs):
            rows.append(inputs["input_ids"].shape)
            return run(outputs, inputs)

    runtime.session = Session()
    alone = [runtime.encode(text, instruction=INSTRUCTION) for text in TEXTS]
    assert np.abs(runtime.encode(TEXTS, INSTRUCTION) - alone).max() < 1e-5
    prefix = len(tiny_model.processor.encode_prefix(INSTRUCTION))
    lengths = [len(row.ids) for row in tiny_model.processor.rows(TEXTS)]
    assert prefix >= 4
    assert rows[0] == (1, prefix + lengths[0]) and rows[1] == (1, lengths[1])
    assert rows[-1] == (len(TEXTS), max(lengths))
    runtime.encode([TEXTS[0]] * 20, [f"Instruction {i}" for i in range(20)])
    assert len(runtime._prefixes) == 16


def test_one_text_and_none(runtime, tiny_model):
    assert np.abs(runtime.encode("hi") - tiny_model.encode("hi")).max() < 1e-5
    assert runtime.encode([]).shape == (0, tiny_model.config.embedding_size)


def test_queries_carry_the_stored_instruction(runtime, tiny_model):
    assert np.abs(runtime.encode_query(TEXTS) - tiny_model.encode_query(TEXTS)).max() < 1e-5
    assert np.abs(runtime.encode_document(TEXTS) - tiny_model.encode_document(TEXTS)).max() < 1e-5


def test_cut_texts_are_told(runtime, caplog):
    texts = ["hi", "word " * 900]
    runtime.encode(texts)
    assert "1 of 2" in caplog.text
    with pytest.raises(ValueError, match="position 1"):
        runtime.encode(texts, truncation="error")


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(texts=["a", 1]), TypeError, "int"),
        (dict(texts=[b"a"]), TypeError, "bytes"),
        (dict(texts=["a"], instruction=["a", "b"]), ValueError, "one per text"),
        (dict(texts=["a"], instruction=[3]), TypeError, "int"),
        (dict(texts=["a"], batch_size=0), ValueError, "batch_size"),
        (dict(texts=["a"], truncate_dim=65), ValueError, "64"),
        (dict(texts=["a"], truncation="maybe"), ValueError, "maybe"),
        (dict(texts=["a"], max_length=2), ValueError, "at least 4"),
        (dict(texts=["a"], max_length=513), ValueError, "512"),
    ],
)
def test_bad_arguments_are_told(runtime, arguments, error, match):
    with pytest.raises(error, match=match):
        runtime.encode(**arguments)


def test_int8(int8_dir, float32_dir, tiny_model):
    runtime = Causal2VecONNX(int8_dir, num_threads=1)
    for instruction in (None, INSTRUCTION):
        found = runtime.encode(TEXTS, instruction)
        assert cosines(found, tiny_model.encode(TEXTS, instruction=instruction)).min() > 0.98
        alone = [runtime.encode(text, instruction) for text in TEXTS]
        assert cosines(found, np.stack(alone)).min() > 0.9999  # the texts beside it do not change a vector
    files = [(folder / "model.onnx").read_bytes() for folder in (int8_dir, float32_dir)]
    assert len(files[0]) < len(files[1])
    assert not any(str(ROOT).encode() in file or b"site-packages" in file for file in files)  # no path of this machine
    config = json.loads((int8_dir / "onnx_config.json").read_text(encoding="utf-8"))
    assert config["weights"] == "int8" and config["check"]["cosine"] >= 0.98


def test_int8_is_everywhere_but_where_float32_is_asked_for(graph, tiny_model):
    whole, part = copy.deepcopy(graph), copy.deepcopy(graph)
    words = embeddings(tiny_model)
    assert words == ["encoder.embeddings.word_embeddings", "decoder.embed_tokens"]
    assert quantize(whole, {}, words) == []
    kept = quantize(part, {}, words, ["decoder.layers.1.mlp", "encoder"])
    assert {name.rsplit(".", 1)[0] for name in kept if name.startswith("decoder")} == {"decoder.layers.1.mlp"}

    def layers(model, kind: str) -> set[str]:
        weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
        return {module_of(node) for node in model.graph.node if node.op_type == kind and node.input[1] in weights}

    linear = layers(graph, "MatMul")
    assert len(linear) == 2 * 6 + 2 * 7 and not layers(whole, "MatMul") and layers(part, "MatMul") == set(kept)
    floats = {tensor.name for tensor in whole.graph.initializer if tensor.data_type == 1}
    assert not floats & {f"{name}.weight" for name in words} and len(floats) > 20
    with pytest.raises(ValueError, match="decoder.layers.7"):
        quantize(copy.deepcopy(graph), {}, words, ["encoder", "decoder.layers.7"])


def test_balanced_channels_lose_less():
    """One channel that is a thousand times the others takes all of a token's steps, unless it is balanced."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    sizes = np.where(np.arange(32) == 3, 1000, 1).astype(np.float32)
    weight = generator.normal(size=(32, 16)).astype(np.float32) / sizes[:, None]
    x = generator.normal(size=(4, 5, 32)).astype(np.float32) * sizes
    layer = helper.make_node("MatMul", ["x", "weight"], ["y"])
    layer.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'model', 'model.decoder.layer', 'linear']")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", size])
        for name, size in (("x", 32), ("y", 16))
    ]
    graph = helper.make_graph([layer], "graph", ends[:1], ends[1:], [numpy_helper.from_array(weight, "weight")])
    plain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    losses = []
    for maxima in ({}, {"decoder.layer": np.abs(x).max((0, 1))}):
        model = copy.deepcopy(plain)
        quantize(model, maxima, [])
        session = onnxruntime.InferenceSession(model.SerializeToString())
        rows = session.run(None, {"x": x})[0]
        assert np.array_equal(session.run(None, {"x": x[:1, :2]})[0], rows[:1, :2])  # one scale per token
        losses.append(np.abs(rows - x @ weight).max() / np.abs(x @ weight).max())
    assert losses[0] > 0.2 and losses[1] < 0.02


def test_neither_torch_nor_transformers(float32_dir, int8_dir, tiny_model):
    """The snippet of docs/serving.md, in a process that cannot import them."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "onnx_runtime" in code]
    code = f"{WITHOUT_TORCH}\n{snippet}\nimport json\nprint(json.dumps([queries.tolist(), passages.tolist(), sorted(sys.modules)]))"
    for folder, least in ((float32_dir, 0.9999), (int8_dir, 0.98)):
        command = [sys.executable, "-c", code.replace("path/to/export", str(folder))]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        queries, passages, modules = json.loads(done.stdout.splitlines()[-1])
        assert not {"torch", "transformers"} & set(modules) and "onnx_runtime" in modules
        texts = [re.findall(r'"([^"]+)"', line) for line in re.findall(r"encode_\w+\(\[(.*?)\]\)", snippet, re.DOTALL)]
        assert cosines(np.array(queries), tiny_model.encode_query(texts[0])).min() > least
        assert cosines(np.array(passages), tiny_model.encode_document(texts[1])).min() > least


VARIANTS = {
    "last_token": dict(baseline="last_token"),
    "token_prepending": dict(baseline="token_prepending"),
    "bidirectional, three tokens": dict(bidirectional=True, num_contextual_tokens=3, encoder="roberta"),
    "sliding window, before the instruction": dict(
        decoder="gemma3", encoder="modernbert", contextual_position="before_instruction", template_prefix="<s>user: "
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, make_model, tmp_path, monkeypatch):
    """Also cut to a truncated size."""
    model = make_model(**VARIANTS[name])
    monkeypatch.setattr("serving.loading.load_model", lambda *_, **__: model)
    dim = model.config.embedding_size // 2
    export("model", tmp_path / "out", truncate_dim=dim)
    runtime = Causal2VecONNX(tmp_path / "out", num_threads=1)
    shares = runtime._prefix_shape is not None
    assert shares == (name == "last_token" or "sliding" in name)
    for instruction in (None, INSTRUCTION):
        found, expected = (
            encode(TEXTS, instruction=instruction, truncate_dim=size)
            for encode, size in ((runtime.encode, None), (model.encode, dim))
        )
        assert np.abs(found - expected).max() < 1e-5
    with pytest.raises(ValueError, match=str(dim)):
        runtime.encode(TEXTS, truncate_dim=dim + 1)


LAYOUTS = {
    "plain": dict(),
    "template": dict(template_prefix="<s>user\n", template_suffix="</s>", text_prefix="query: ", max_seq_length=24),
    "before": dict(contextual_position="before_instruction", num_slots=3, encoder_max_seq_length=9),
}
pieces = st.sampled_from(
    ["<s>", "</s>", "<pad>", "<|contextual|>", "[CLS]", "[SEP]", "\ud83d", "\ude00", "\udfff", "\x00", " ", "\n", "é"]
)
hostile = st.lists(pieces | st.text(max_size=8), max_size=8).map("".join)


@pytest.fixture(scope="module", params=LAYOUTS)
def two_ways(request, tiny_model, float32_dir, tmp_path_factory):
    """A processor, and a runtime that lays out rows as it should."""
    settings_ = {"contextual_token_id": tiny_model.config.contextual_token_id, "icl_max_seq_length": 200}
    settings_ |= LAYOUTS[request.param]
    old = tiny_model.processor
    processor = Causal2VecProcessor(old.tokenizer, old.encoder_tokenizer, **settings_)
    model = copy.copy(tiny_model)
    model._processor = processor
    folder = tmp_path_factory.mktemp("layout") / "model"
    shutil.copytree(float32_dir, folder)
    config = json.loads((folder / "onnx_config.json").read_text(encoding="utf-8"))
    write_json(folder / "onnx_config.json", config | write_tokenizers(model, folder))
    return processor, Causal2VecONNX(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(hostile, min_size=1, max_size=3), instruction=st.none() | hostile, icl=st.booleans())
@example(texts=["<|contextual|> and <s>", "\ud800 lone", "word " * 900], instruction="</s>\ud83d\ude00", icl=True)
@example(texts=[""], instruction="", icl=False)
def test_rows_are_the_processors(two_ways, texts, instruction, icl):
    processor, runtime = two_ways
    examples = EXAMPLES if icl else None
    try:
        expected = processor.rows(texts, instruction, examples)
    except ValueError:  # the prefix leaves no room
        with pytest.raises(ValueError, match="leaves no room"):
            runtime.rows(texts, [instruction] * len(texts), examples)
        return
    found = runtime.rows(texts, [instruction] * len(texts), examples)
    for row, its in zip(found, expected, strict=True):
        assert (list(row.prefix_ids), row.ids, row.encoder_ids, row.cut) == tuple(its)


def test_a_hub_id_from_the_command_line(saved_dir, tmp_path, tiny_model):
    """A commit of it. No code of the repository is run: it has none here."""
    files = [path for path in saved_dir.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors")]
    with HubServer() as hub:
        hub.repos["tester/tiny"] = Repo()
        content = {
            str(path.relative_to(saved_dir)): File(path.read_bytes(), path.suffix == ".safetensors") for path in files
        }
        hub.lfs |= {file.etag: file.content for file in content.values() if file.lfs}
        commit = hub.repos["tester/tiny"].commit("main", content)
        hub.repos["tester/tiny"].commit("main", {"README.md": File(b"moved on", False)})
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "serving.onnx", "export", "tester/tiny", str(tmp_path / "out")]
        command += ["--revision", commit, "--truncate_dim", "16"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "float32, 16 numbers" in done.stdout
    expected = tiny_model.encode(TEXTS, truncate_dim=16)
    assert np.abs(Causal2VecONNX(tmp_path / "out").encode(TEXTS) - expected).max() < 1e-5


def test_what_cannot_be_exported_is_told(saved_dir, tmp_path, capsys):
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "no config.json" in capsys.readouterr().err
    assert main(["export", str(saved_dir), str(tmp_path / "out"), "--truncate_dim", "65"]) == 2
    assert "between 1 and 64" in capsys.readouterr().err


def test_vectors_that_differ_leave_the_folder_as_it_was(float32_dir, saved_dir, graph, tmp_path, monkeypatch, capsys):
    from onnx import numpy_helper

    wrong = copy.deepcopy(graph)
    (weight,) = [tensor for tensor in wrong.graph.initializer if tensor.name.endswith("projector.linear_2.weight")]
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    monkeypatch.setattr("serving.onnx.trace", lambda *_: wrong)
    shutil.copytree(float32_dir, out := tmp_path / "out")
    assert main(["export", str(saved_dir), str(out)]) == 2
    assert "not the model's" in capsys.readouterr().err
    files = [path.relative_to(float32_dir) for path in float32_dir.rglob("*") if path.is_file()]
    assert len(files) == len([path for path in out.rglob("*") if path.is_file()]) == 5
    assert all((out / file).read_bytes() == (float32_dir / file).read_bytes() for file in files)


def test_weights_that_one_file_cannot_hold(graph, float32_dir, runtime, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.onnx.LIMIT", 1000)
    shutil.copytree(float32_dir, out := tmp_path / "out")
    (out / "model.onnx").unlink()
    save_graph(copy.deepcopy(graph), out / "model.onnx")
    assert (out / "model.onnx.data").stat().st_size > 100_000
    assert np.array_equal(Causal2VecONNX(out, num_threads=1).encode(TEXTS), runtime.encode(TEXTS))


def test_a_tokenizer_in_python_is_refused(tiny_model, tmp_path):
    class InPython:
        is_fast = False

    model = copy.copy(tiny_model)
    model._processor = copy.copy(tiny_model.processor)
    model._processor.encoder_tokenizer = InPython()
    with pytest.raises(ValueError, match="encoder's tokenizer, InPython"):
        write_tokenizers(model, tmp_path)


def test_an_incomplete_folder_is_told(float32_dir, tmp_path):
    shutil.copytree(float32_dir, out := tmp_path / "out")
    (out / "model.onnx").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model.onnx"):
        Causal2VecONNX(out)
