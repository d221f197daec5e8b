"""What nobody should have to trust: a folder that lies ends in one clear error, and what is shipped is what is listed.

What the shipped code may import and call is tested in test_remote_code.py.
"""

import importlib.util
import json
import re
import shutil
import struct
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXTS, decoder_tokenizer, wordpiece_tokenizer
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_relative_import_files

from configuration_causal2vec import Causal2VecConfig
from modeling_causal2vec import Causal2VecModel
from saving_utils import SHIPPED_CODE, code_hashes
from scripts.push_to_hub import PICKLES, files_to_push


@pytest.fixture
def folder(saved_dir, tmp_path) -> Path:
    return shutil.copytree(saved_dir, tmp_path / "hostile")


def change_config(folder: Path, part: str | None = None, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(values)
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, match: str, **kwargs) -> None:
    """One error that says what is wrong."""
    with pytest.raises((ValueError, TypeError, StrictDataclassFieldValidationError), match=match):
        Causal2VecModel.from_pretrained(folder, **kwargs)


def test_the_folder_itself_is_fine(folder, tiny_model):
    model = Causal2VecModel.from_pretrained(folder, use_safetensors=True)
    assert np.array_equal(model.encode(TEXTS), tiny_model.encode(TEXTS))


class TestConfiguration:
    @pytest.mark.parametrize(
        "values, match",
        [
            ({"_attn_implementation_internal": "../evil"}, "_attn_implementation_internal"),
            ({"max_seq_length": "512"}, "'max_seq_length' expected int, got str"),
            ({"max_seq_length": -1}, "`max_seq_length` must be at least 3"),
            ({"projector_hidden_size": -4}, "`projector_hidden_size` must be at least 1"),
            ({"hidden_size": -32}, "`hidden_size` must be the decoder's"),
            ({"projector_bias": "yes"}, "'projector_bias' expected bool"),
            ({"projector_hidden_act": "os.system"}, "`projector_hidden_act` must be one of"),
            ({"contextual_token_id": 10**6}, "`contextual_token_id` must lie in the decoder's vocabulary"),
            ({"contextual_token_id": -1}, "`contextual_token_id` must lie in the decoder's vocabulary"),
            ({"template_prefix": None}, "'template_prefix' expected str"),
            ({"pooling": "sum"}, "'pooling' expected one of"),
            ({"num_contextual_tokens": 0}, "`num_contextual_tokens` must be at least 1"),
            ({"num_contextual_tokens": 2}, "such as .*projector.queries"),
            ({"baseline": "unknown"}, "'baseline' expected one of"),
            ({"embedding_size": 65}, "`embedding_size` must be 64"),
            ({"baseline": "embedding_concat", "embedding_size": 56}, "does not hold this model's weights"),
            ({"encoder_config": []}, "'encoder_config' expected dict, got list"),
            ({"decoder_config": {"hidden_size": 3}}, "`decoder_config` needs a `model_type`"),
        ],
    )
    def test_own_fields(self, folder, values, match):
        change_config(folder, **values)
        refused(folder, match)

    def test_missing_file(self, folder):
        """transformers would make a new model of default sizes."""
        (folder / "config.json").unlink()
        refused(folder, "must hold a Causal2Vec model, but has no config.json")

    def test_another_model(self, folder):
        change_config(folder, model_type="llama")
        refused(folder, "must hold a Causal2Vec model, but has the model_type 'llama'")

    @pytest.mark.parametrize("part", ["encoder_config", "decoder_config"])
    @pytest.mark.parametrize(
        "values, match",
        [
            ({"vocab_size": -5}, "`vocab_size` of `{part}` must be a positive integer, got -5"),
            ({"num_hidden_layers": -1}, "`num_hidden_layers` of `{part}` must be a positive integer, got -1"),
            ({"model_type": "nonsense"}, "The `model_type` of `{part}` must be one of"),
            ({"_attn_implementation_internal": "../evil"}, r"_attn_implementation_internal.*\({part}\)"),
        ],
    )
    def test_fields_of_the_backbones(self, folder, part, values, match):
        change_config(folder, part, **values)
        refused(folder, match.format(part=part))

    def test_wrong_types_of_the_backbones(self, folder):
        change_config(folder, "decoder_config", num_hidden_layers="two")
        with pytest.raises(Exception, match="num_hidden_layers"):  # transformers' own error is as clear
            Causal2VecModel.from_pretrained(folder)


class TestWeights:
    def test_missing_tensors(self, folder):
        change_weights(folder, lambda tensors: tensors.pop("projector.linear_1.weight"))
        refused(folder, "1 missing keys, such as .*projector.linear_1.weight")

    def test_extra_tensors(self, folder):
        change_weights(folder, lambda tensors: tensors.update(surprise=torch.zeros(2)))
        refused(folder, "1 unexpected keys, such as .*surprise")

    @pytest.mark.parametrize("ignore", [False, True])
    def test_mismatched_shapes(self, folder, ignore):
        """Also when transformers is told to initialise such tensors anew."""
        change_weights(folder, lambda tensors: tensors.update({"projector.linear_1.bias": torch.zeros(7)}))
        with pytest.raises((ValueError, RuntimeError), match="mismatch"):
            Causal2VecModel.from_pretrained(folder, ignore_mismatched_sizes=ignore)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_no_numbers(self, folder, value):
        def poison(tensors):
            tensors["decoder.layers.1.mlp.up_proj.weight"][3, 4] = value

        change_weights(folder, poison)
        refused(folder, "decoder.layers.1.mlp.up_proj.weight holds values that are not finite")

    def test_truncated_file(self, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        refused(folder, "damaged or cut off")

    @pytest.mark.parametrize(
        "header", [b"", b"\x00" * 4, struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 5) + b"nope!"]
    )
    def test_broken_header(self, folder, header):
        (folder / "model.safetensors").write_bytes(header)
        refused(folder, "damaged or cut off")

    def test_pickled_weights_are_not_read(self, folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        with pytest.raises(OSError, match="safetensors"):
            Causal2VecModel.from_pretrained(folder, use_safetensors=True)


class TestTokenizers:
    def test_decoder_tokenizer_with_more_tokens_than_the_embedding(self, folder):
        tokenizer = decoder_tokenizer()
        tokenizer.add_tokens([f"<new{i}>" for i in range(50)])
        tokenizer.save_pretrained(folder)
        refused(folder, "decoder's tokenizer has 370 tokens, but the decoder embeds 321")

    def test_encoder_tokenizer_with_more_tokens_than_the_embedding(self, folder):
        tokenizer = wordpiece_tokenizer()
        tokenizer.add_tokens([f"<new{i}>" for i in range(50)])
        tokenizer.save_pretrained(folder / "encoder_tokenizer")
        refused(folder, "encoder's tokenizer has .* belongs to another model")

    def test_tokenizer_without_the_slot(self, folder):
        decoder_tokenizer().save_pretrained(folder)
        refused(folder, "`contextual_token_id` is 320, but that is no added token of the decoder's tokenizer")

    def test_slot_that_is_an_ordinary_token(self, folder):
        change_config(folder, contextual_token_id=100)
        refused(folder, "`contextual_token_id` is 100, but that is no added token of the decoder's tokenizer")


class TestWhatIsShipped:
    def test_the_list_is_what_the_code_imports(self):
        files = get_relative_import_files(ROOT / "modeling_causal2vec.py")
        assert {Path(file).name for file in files} == set(SHIPPED_CODE)

    def test_hashes_are_of_the_files(self, tmp_path):
        (tmp_path / "decoder_utils.py").write_bytes(b"abc")
        digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2's example
        assert code_hashes(tmp_path) == {"decoder_utils.py": digest}

    def test_repository_holds_no_pickles(self):
        files = files_to_push(ROOT)
        assert len(files) > 20
        assert [file for file in files if file.suffix in PICKLES] == []


@pytest.mark.parametrize(
    "package, version, oldest",
    [
        ("transformers", "4.57.1", "5.17"),
        ("transformers", "5.16.2", "5.17"),
        ("torch", "2.10.0+cpu", "2.11"),
        ("torch", "1.13.1", "2.11"),
    ],
)
def test_older_packages_are_refused_in_words(monkeypatch, package, version, oldest):
    other = types.ModuleType(package)
    other.__version__ = version
    monkeypatch.setitem(sys.modules, package, other)
    spec = importlib.util.spec_from_file_location("old", ROOT / "configuration_causal2vec.py")
    with pytest.raises(ImportError, match=rf"needs {package} {oldest} or newer, got {re.escape(version)}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_oldest_packages_are_the_same_everywhere(saved_dir):
    """In the error, the requirements, the cards and what CI installs."""
    code = (ROOT / "configuration_causal2vec.py").read_text()
    told = {
        "requirements": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"],
        "CI": (ROOT / "Makefile").read_text(),
        "README": (ROOT / "README.md").read_text(),
        "card": (saved_dir / "README.md").read_text(),
    }
    for package, oldest in (("torch", "2.11"), ("transformers", "5.17")):
        assert f"needs {package} {oldest} or newer" in code
        assert any(line.startswith(f"{package}>={oldest}") for line in told["requirements"])
        assert f"{package}=={oldest}.0" in told["CI"]
        assert f'"{package}>={oldest}"' in told["README"] and f"`{package}` {oldest}" in told["card"]


@pytest.mark.parametrize("package, version", [("transformers", "6.0.0.dev0"), ("torch", "3.0.0a0+git1234")])
def test_newer_packages_are_not(monkeypatch, package, version):
    monkeypatch.setattr(sys.modules[package], "__version__", version)
    spec = importlib.util.spec_from_file_location("new", ROOT / "configuration_causal2vec.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.Causal2VecConfig.model_type == Causal2VecConfig.model_type


class TestSaving:
    def test_over_the_folder_that_the_code_came_from(self, saved_dir, tmp_path):
        """As in a clone, whose files are imported as top-level modules: what was changed is there, and nothing else is."""
        clone = shutil.copytree(saved_dir, tmp_path / "clone")
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); sys.dont_write_bytecode = True\n"
            "from modeling_causal2vec import Causal2VecModel as M\n"
            "model = M.from_pretrained(sys.argv[1])\n"
            "model.save_pretrained(sys.argv[1])\n"
            "for part in (model.config, model.processor):\n"
            "    part.max_seq_length = 99\n"
            "    print(part.save_pretrained(sys.argv[1]))"
        )
        before = {path: path.read_bytes() for path in clone.rglob("*") if path.is_file()}
        result = subprocess.run([sys.executable, "-c", code, clone], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        changed = {clone / "config.json", clone / "processor_config.json"}
        assert result.stdout.splitlines() == ["None", str([str(clone / "processor_config.json")])]
        after = {path: path.read_bytes() for path in clone.rglob("*") if path.is_file()}
        assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == changed
        assert all(json.loads(after[path])["max_seq_length"] == 99 for path in changed)

    def test_no_path_of_this_machine(self, saved_dir):
        text = "".join(path.read_text() for path in saved_dir.glob("*.json") if path.name != "tokenizer.json")
        assert str(saved_dir.parent.parent) not in text and "backbones" not in text

    def test_a_file_is_no_folder(self, tiny_model, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="must be a folder"):
            tiny_model.save_pretrained(tmp_path / "file")

    def test_a_second_save_keeps_the_card_and_removes_old_shards(self, tiny_model, tmp_path):
        tiny_model.save_pretrained(tmp_path, max_shard_size="60KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        (tmp_path / "README.md").write_text("mine")
        tiny_model.save_pretrained(tmp_path)
        assert [path.name for path in tmp_path.glob("model*.safetensors*")] == ["model.safetensors"]
        assert (tmp_path / "README.md").read_text() == "mine"
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        again = Causal2VecModel.from_pretrained(tmp_path)
        assert np.array_equal(again.encode(TEXTS), tiny_model.encode(TEXTS))
        again.save_pretrained(tmp_path)  # over the files that its weights may still be read from
        assert np.array_equal(Causal2VecModel.from_pretrained(tmp_path).encode(TEXTS), tiny_model.encode(TEXTS))


def test_keys_that_nothing_reads_are_ignored(folder, tiny_model, caplog):
    """Such as a newer transformers may write; a typo is told, too, and names of methods do no harm."""
    change_config(folder, max_seq_len=128, to_dict="x", of_transformers_9={"a": 1})
    model = Causal2VecModel.from_pretrained(folder)
    assert "has no ['max_seq_len', 'of_transformers_9', 'to_dict']" in caplog.text
    assert np.array_equal(model.encode(TEXTS), tiny_model.encode(TEXTS))
    assert not {"max_seq_len", "of_transformers_9"} & model.config.to_dict().keys()


def test_what_trainer_writes_into_a_configuration_is_no_stranger(folder, tiny_model, caplog):
    """Some versions copy the tokenizer's special ids there, and `use_cache` is switched off for training."""
    change_config(folder, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False)
    assert np.array_equal(Causal2VecModel.from_pretrained(folder).encode(TEXTS), tiny_model.encode(TEXTS))
    assert "has no" not in caplog.text
