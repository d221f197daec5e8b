"""`fingerprint`: equal where vectors are, another where they are not. Some 5 seconds."""

import copy
import json
import shutil

import pytest
import torch
from conftest import ROOT, TEXTS
from transformers import AutoModel

import encoding_utils
from modeling_causal2vec import Causal2VecModel
from saving_utils import VECTOR_CODE, code_identity
from tokenization_utils import Causal2VecProcessor


INSTRUCTION = "Given a question, retrieve passages that answer it"


def differing(found: dict, expected: dict) -> set[str]:
    assert found.keys() == expected.keys()
    return {name for name in found if found[name] != expected[name]}


def test_it_is_flat_json(tiny_model):
    found = tiny_model.fingerprint()
    assert json.loads(json.dumps(found)) == found
    assert all(value is None or isinstance(value, (str, int)) for value in found.values())
    assert found["dimensions"] == 64 and found["normalized"] is True and found["dtype"] == "float32"
    assert found["max_length"] == tiny_model.config.max_seq_length


@pytest.mark.parametrize(
    "arguments, changed",
    [
        ({"instruction": INSTRUCTION}, {"instruction"}),
        ({"instruction": ""}, set()),
        ({"truncate_dim": 64}, set()),
        ({"truncate_dim": 32}, {"dimensions"}),
        ({"normalize_embeddings": False}, {"normalized"}),
        ({"max_length": 100}, {"max_length"}),
        ({"examples": []}, set()),
        ({"examples": [{"query": "a", "response": "b"}], "max_length": 512}, {"examples"}),
    ],
)
def test_arguments(tiny_model, arguments, changed):
    """Each changes the fingerprint exactly when it changes a vector."""
    plain = tiny_model.fingerprint()
    assert differing(tiny_model.fingerprint(**arguments), plain) == changed
    texts = [*TEXTS, "word " * 400]
    first, other = (
        tiny_model.encode(texts, truncation="silent"),
        tiny_model.encode(texts, truncation="silent", **arguments),
    )
    assert (first.shape == other.shape and abs(first - other).max() < 1e-6) == (not changed)


@pytest.mark.parametrize("arguments", [{"truncate_dim": 65}, {"truncate_dim": 0}, {"truncate_dim": True}])
def test_bad_arguments(tiny_model, arguments):
    with pytest.raises(ValueError, match="truncate_dim"):
        tiny_model.fingerprint(**arguments)
    with pytest.raises(TypeError, match="one per fingerprint"):
        tiny_model.fingerprint(instruction=["a"])


def test_it_is_the_same_from_other_files_and_code(tiny_model, tmp_path):
    """In shards, as remote code, with another attention, and after use."""
    expected = tiny_model.fingerprint()
    tiny_model.encode([*TEXTS, "word " * 400], truncation="silent")
    tiny_model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded = AutoModel.from_pretrained(tmp_path / "shards", trust_remote_code=True, attn_implementation="eager")
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert loaded.fingerprint() == expected == tiny_model.fingerprint() == copy.deepcopy(tiny_model).fingerprint()


def test_weights(tiny_model):
    """Every tower counts, and values as they are loaded."""
    expected = tiny_model.fingerprint()
    for tower in ("encoder", "projector", "decoder"):
        model = copy.deepcopy(tiny_model)
        assert model.fingerprint() == expected
        weight = list(getattr(model, tower).parameters())[-1]
        with torch.no_grad():
            weight.view(-1)[0] += 1
        assert differing(model.fingerprint(), expected) == {"weights"}, tower
        with torch.no_grad():
            weight.view(-1)[0] -= 1
    assert differing(copy.deepcopy(tiny_model).to(torch.bfloat16).fingerprint(), expected) == {"weights", "dtype"}


def test_weights_are_read_once(tiny_model, monkeypatch):
    model, reads = copy.deepcopy(tiny_model), []
    read = encoding_utils._weights_sha256
    monkeypatch.setattr(encoding_utils, "_weights_sha256", lambda *args: reads.append(1) or read(*args))
    model.fingerprint()
    model.fingerprint(INSTRUCTION, truncate_dim=2)
    model.encode(TEXTS)
    model.fingerprint()
    assert len(reads) == 1
    model.prefix_cache.clear()
    model.fingerprint()
    assert len(reads) == 2


def test_weights_elsewhere_are_refused(tiny_model):
    with pytest.raises(ValueError, match="not in memory"):
        copy.deepcopy(tiny_model).to("meta").fingerprint()


def test_configuration_and_tokenizers(make_model, tiny_model):
    expected = tiny_model.fingerprint()
    arguments = {"query_instruction": tiny_model.config.query_instruction}
    assert make_model(**arguments).fingerprint() == expected
    assert make_model(query_instruction="another").fingerprint() == expected
    assert differing(make_model(pooling="eos_encoder").fingerprint(), expected) == {"config"}
    assert differing(make_model(text_prefix="query: ").fingerprint(), expected) == {"config"}
    assert differing(make_model(max_seq_length=100).fingerprint(), expected) == {"max_length"}
    assert make_model(baseline="last_token").fingerprint()["dimensions"] == 32

    model = copy.deepcopy(tiny_model)
    tokenizer = copy.deepcopy(model.processor.tokenizer)
    model.processor.tokenizer("a text", truncation=True, max_length=5, padding="max_length")  # which it remembers
    assert model.fingerprint() == expected
    tokenizer.add_tokens(["protein"])
    model.processor = Causal2VecProcessor.from_config(model.config, tokenizer, model.processor.encoder_tokenizer)
    assert differing(model.fingerprint(), expected) == {"tokenizers"}


def test_adapters(tiny_model):
    """On, off and as strong as it is."""
    peft = pytest.importorskip("peft")
    expected, model = tiny_model.fingerprint(), copy.deepcopy(tiny_model)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    model.add_adapter(config)
    adapted = model.fingerprint()
    assert differing(adapted, expected) == {"weights"}
    model.disable_adapters()
    assert differing(model.fingerprint(), adapted) == {"weights"}
    model.enable_adapters()
    assert model.fingerprint() == adapted
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 2)
    assert differing(model.fingerprint(), adapted) == {"weights"}


def test_code_is_what_it_does(tmp_path):
    for name in VECTOR_CODE:
        shutil.copy(ROOT / name, tmp_path)
    expected = code_identity(ROOT)
    assert code_identity(tmp_path) == expected and len(expected) == 64
    for name in VECTOR_CODE:
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace('"""', '"""Another docstring. ', 1) + "\n\n# a comment\n")
        assert code_identity(tmp_path) == expected
        (tmp_path / name).write_text(text + "\nx = 1\n")
        assert code_identity(tmp_path) != expected
        (tmp_path / name).write_text(text)


def test_it_is_of_the_code_that_runs(saved_dir, tmp_path):
    folder = shutil.copytree(saved_dir, tmp_path / "changed")
    file = folder / "decoder_utils.py"
    file.write_text(file.read_text() + "\nx = 1\n")
    loaded = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert differing(loaded.fingerprint(), Causal2VecModel.from_pretrained(folder).fingerprint()) == {"code"}
