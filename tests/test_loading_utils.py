"""loading_utils.py: what loads and what is refused, saving, joining backbones. Adapters: test_adapters.py."""

import copy
import json
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec as is_available
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ENCODERS,
    FP32_BOUND,
    PAIRS,
    REFUSED,
    SAME,
    SHARD,
    TEXTS,
    change_config,
    change_weights,
    decoder_config,
    decoder_tokenizer,
    difference,
    embed,
    encoder_config,
    incomplete,
    read_weights,
    same,
    weights_in,
    wordpiece_tokenizer,
)
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from configuration_causal2vec import PROMPT_TEMPLATES, Causal2VecConfig
from evaluation.identity import folder_identity, load_backend, locate
from loading_utils import find_prompt_template, position_limit
from modeling_causal2vec import Causal2VecModel
from scripts import embed as embed_script
from tokenization_utils import Causal2VecProcessor


@pytest.fixture(params=PAIRS, ids="-".join)
def model(models, request):
    return models(*request.param)


@pytest.fixture
def folder(saved_dir, tmp_path) -> Path:
    return shutil.copytree(saved_dir, tmp_path / "hostile")


def refused(folder: Path, match: str, **kwargs) -> None:
    """One error that says what is wrong."""
    with pytest.raises((ValueError, TypeError, StrictDataclassFieldValidationError), match=match):
        Causal2VecModel.from_pretrained(folder, **kwargs)


def assert_same_weights(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


class TestSaving:
    def test_fp32_is_bit_identical(self, model, tmp_path):
        model.save_pretrained(tmp_path, max_shard_size="50KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1, "not sharded"
        assert not [*tmp_path.glob("*.bin"), *tmp_path.glob("*.pt"), *tmp_path.glob("*.pkl")]
        loaded = Causal2VecModel.from_pretrained(tmp_path)
        assert not loaded.training
        assert_same_weights(model, loaded)
        assert difference(loaded.encode(TEXTS), model.encode(TEXTS)) <= SAME
        assert loaded.config.to_dict() == model.config.to_dict()

    def test_buffers(self, model, tmp_path):
        """Loading starts from memory that was never written to: whatever is not in the file must be filled in."""
        model.save_pretrained(tmp_path)
        loaded = Causal2VecModel.from_pretrained(tmp_path)
        fresh = Causal2VecModel(copy.deepcopy(model.config))
        for other in (loaded, Causal2VecModel.from_pretrained(tmp_path, dtype=torch.bfloat16)):
            buffers = dict(other.named_buffers())
            assert buffers.keys() == dict(fresh.named_buffers()).keys() and buffers
            for name, buffer in fresh.named_buffers():
                assert torch.isfinite(buffers[name]).all()
                assert torch.equal(buffers[name], buffer.to(buffers[name].dtype)), name
                assert buffers[name].dtype == torch.float32 or "inv_freq" not in name

    @pytest.mark.parametrize("pair", [("llama", "bert"), ("gemma3", "bert"), ("llama", "modernbert")], ids="-".join)
    def test_bf16_is_bit_identical(self, models, pair, tmp_path):
        models(*pair).save_pretrained(tmp_path / "fp32")
        model = Causal2VecModel.from_pretrained(tmp_path / "fp32", dtype="bfloat16")
        model.save_pretrained(tmp_path / "bf16", max_shard_size="50KB")
        loaded = Causal2VecModel.from_pretrained(tmp_path / "bf16")
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        assert_same_weights(model, loaded)
        assert difference(loaded.encode(TEXTS), model.encode(TEXTS)) <= SAME

    def test_a_second_save_is_the_same(self, saved_dir, tmp_path):
        Causal2VecModel.from_pretrained(saved_dir).save_pretrained(tmp_path)
        for path in saved_dir.rglob("*"):
            if path.suffix in (".json", ".safetensors"):
                assert path.read_bytes() == (tmp_path / path.relative_to(saved_dir)).read_bytes(), path.name

    def test_a_folder_is_complete(self, saved_dir):
        assert incomplete(saved_dir) == []
        auto_map = json.loads((saved_dir / "config.json").read_text())["auto_map"]
        assert auto_map == {
            "AutoConfig": "configuration_causal2vec.Causal2VecConfig",
            "AutoModel": "modeling_causal2vec.Causal2VecModel",
        }
        text = "".join(path.read_text() for path in saved_dir.glob("*.json") if path.name != "tokenizer.json")
        assert str(saved_dir.parent.parent) not in text and "backbones" not in text, "a path of this machine"

    def test_a_subfolder(self, tiny_model, tmp_path):
        tiny_model.save_pretrained(tmp_path / "checkpoint-5")
        assert same(Causal2VecModel.from_pretrained(tmp_path, subfolder="checkpoint-5"), tiny_model)

    def test_only_the_main_process_writes(self, tiny_model, tmp_path):
        tiny_model.save_pretrained(tmp_path, is_main_process=False)
        assert [path.name for path in tmp_path.rglob("*.json")] == []

    def test_without_tokenizers_it_loads_and_says_so(self, tiny_model, folder):
        shutil.rmtree(folder / "encoder_tokenizer")
        loaded = Causal2VecModel.from_pretrained(folder)
        with pytest.raises(ValueError, match="no tokenizers"):
            loaded.encode("hi")
        batch = tiny_model.processor("hi")
        assert difference(embed(loaded, batch), embed(tiny_model, batch)) <= FP32_BOUND

    def test_every_weight_comes_from_the_file(self, folder):
        """Every number of the file is replaced by a sentinel; none may be initialised anew."""

        def mark(weights):
            for i, name in enumerate(sorted(weights)):
                weights[name] = torch.full_like(weights[name], i + 1)

        change_weights(folder, mark)
        model, info = Causal2VecModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        loaded = model.state_dict()
        assert len(loaded) > 40
        for i, name in enumerate(sorted(loaded)):
            assert (loaded[name] == i + 1).all(), name

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

    def test_a_file_is_no_folder(self, tiny_model, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="must be a folder"):
            tiny_model.save_pretrained(tmp_path / "file")

    def test_over_the_files_that_weights_may_still_be_read_from(self, tiny_model, tmp_path):
        (tmp_path / "README.md").write_text("mine")
        tiny_model.save_pretrained(tmp_path)
        Causal2VecModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
        assert same(Causal2VecModel.from_pretrained(tmp_path), tiny_model)
        assert (tmp_path / "README.md").read_text() == "mine"
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


class TestRefused:
    @pytest.mark.parametrize(
        "values, match",
        [
            ({"num_contextual_tokens": 2}, "missing keys.*projector.queries"),
            ({"baseline": "embedding_concat", "embedding_size": 56}, "unexpected keys.*projector"),
            ({"model_type": "llama"}, "model_type 'llama'"),
            ({"contextual_token_id": 100}, "`contextual_token_id` is 100"),  # an ordinary token
        ],
    )
    def test_another_models_configuration(self, folder, values, match):
        change_config(folder, **values)
        refused(folder, match)

    def test_no_configuration(self, folder):
        """transformers would make a new model of default sizes."""
        (folder / "config.json").unlink()
        refused(folder, "no config.json")

    @pytest.mark.parametrize(
        "change, match",
        [
            (lambda weights: weights.pop("projector.linear_1.weight"), "1 missing keys.*projector.linear_1.weight"),
            (lambda weights: weights.pop("decoder.norm.weight"), "1 missing keys.*decoder.norm.weight"),
            (lambda weights: weights.update({"lm_head.weight": torch.ones(3)}), "1 unexpected keys.*lm_head.weight"),
        ],
    )
    def test_other_tensors(self, folder, change, match):
        change_weights(folder, change)
        refused(folder, match)

    @pytest.mark.parametrize("ignore", [False, True])
    def test_tensors_of_another_shape(self, folder, ignore):
        """Also when transformers is told to initialise such tensors anew."""
        change_weights(folder, lambda tensors: tensors.update({"projector.linear_1.bias": torch.zeros(7)}))
        with pytest.raises((ValueError, RuntimeError), match="mismatch"):
            Causal2VecModel.from_pretrained(folder, ignore_mismatched_sizes=ignore)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_no_numbers(self, folder, value):
        def poison(tensors):
            tensors["decoder.layers.1.mlp.up_proj.weight"][3, 4] = value

        change_weights(folder, poison)
        refused(folder, "decoder.layers.1.mlp.up_proj.weight .* not finite")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: content[:-10],
            lambda content: b"",
            lambda content: b"\x00" * 4,
            lambda content: struct.pack("<Q", 2**60) + b"{}",
            lambda content: struct.pack("<Q", 5) + b"nope!",
        ],
    )
    def test_a_damaged_file(self, folder, damage):
        path = folder / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        refused(folder, "damaged or cut off")

    def test_pickled_weights_are_not_read(self, folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        with pytest.raises(OSError, match="safetensors"):
            Causal2VecModel.from_pretrained(folder, use_safetensors=True)


class TestTokenizers:
    @pytest.mark.parametrize("tower", ["decoder", "encoder"])
    def test_more_tokens_than_the_embedding(self, folder, tower):
        tokenizer = decoder_tokenizer() if tower == "decoder" else wordpiece_tokenizer()
        tokenizer.add_tokens([f"<new{i}>" for i in range(250)])
        tokenizer.save_pretrained(folder if tower == "decoder" else folder / "encoder_tokenizer")
        refused(folder, f"{tower}'s tokenizer has {len(tokenizer)} tokens")

    def test_none_for_the_slot(self, folder):
        decoder_tokenizer().save_pretrained(folder)
        refused(folder, "`contextual_token_id` is 320")


def test_keys_that_nothing_reads_are_ignored(folder, tiny_model, caplog):
    """Such as a newer transformers may write; a typo is told, too, and names of methods do no harm."""
    change_config(folder, max_seq_len=128, to_dict="x", of_transformers_9={"a": 1})
    model = Causal2VecModel.from_pretrained(folder)
    assert "['max_seq_len', 'of_transformers_9', 'to_dict']" in caplog.text
    assert same(model, tiny_model) and not {"max_seq_len", "of_transformers_9"} & model.config.to_dict().keys()


def test_what_trainer_writes_into_a_configuration_is_no_stranger(folder, tiny_model, caplog):
    """Some versions copy the tokenizer's special ids there, and `use_cache` is switched off for training."""
    change_config(folder, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False)
    assert same(Causal2VecModel.from_pretrained(folder), tiny_model)
    assert "has no" not in caplog.text


@pytest.fixture
def sharded(tiny_model, tmp_path) -> Path:
    tiny_model.save_pretrained(tmp_path, max_shard_size=SHARD)
    assert len(list(tmp_path.glob("model-0*.safetensors"))) > 2 and "model.safetensors" not in weights_in(tmp_path)
    return tmp_path


class TestShards:
    def test_they_load_everywhere(self, tiny_model, sharded):
        assert same(Causal2VecModel.from_pretrained(sharded), tiny_model)
        assert same(AutoModel.from_pretrained(sharded, trust_remote_code=True), tiny_model)
        assert same(load_backend(locate(str(sharded))).model, tiny_model)  # as eval_mteb.py does
        (sharded / "texts.txt").write_text("hi\n")
        vectors = sharded / "vectors.npy"
        assert (
            embed_script.main(["encode", str(sharded / "texts.txt"), "-o", str(vectors), "--model", str(sharded)]) == 0
        )
        assert np.abs(np.load(vectors)[0] - tiny_model.encode("hi")).max() <= 1e-6
        if is_available("sentence_transformers"):
            from sentence_transformers import SentenceTransformer

            assert same(SentenceTransformer(str(sharded), trust_remote_code=True, device="cpu"), tiny_model)
        weights = read_weights(sharded)
        assert all(torch.equal(weights[name], tensor) for name, tensor in tiny_model.state_dict().items())

    @pytest.mark.parametrize("before, after", [(None, SHARD), (SHARD, None), (SHARD, "30KB"), ("30KB", SHARD)])
    def test_old_files_never_win(self, tiny_model, other_model, tmp_path, before, after):
        """Neither a single file over shards, nor shards over others."""
        tiny_model.save_pretrained(tmp_path, max_shard_size=before or "5GB")
        old = weights_in(tmp_path)
        other_model.save_pretrained(tmp_path, max_shard_size=after or "5GB")
        index = tmp_path / "model.safetensors.index.json"
        if after:
            assert weights_in(tmp_path) == {index.name, *json.loads(index.read_text())["weight_map"].values()}
        else:
            assert weights_in(tmp_path) == {"model.safetensors"}
        assert weights_in(tmp_path) != old
        assert same(Causal2VecModel.from_pretrained(tmp_path), other_model)

    def test_two_sets_of_weights_are_refused(self, saved_dir, sharded):
        shutil.copy(saved_dir / "model.safetensors", sharded)  # as an upload over an older version leaves it
        refused(sharded, "model.safetensors.*shards")

    def test_every_shard_is_part_of_a_folders_identity(self, sharded):
        identities = {folder_identity(sharded, True)}
        for path in [*sharded.glob("model-0*.safetensors"), sharded / "model.safetensors.index.json"]:
            path.write_bytes(path.read_bytes() + b" ")
            identities.add(folder_identity(sharded, True))
        assert len(identities) == 1 + len(weights_in(sharded)) > 3

    @pytest.mark.parametrize("max_shard_size", ["5GB", SHARD])
    def test_a_checkpoint_that_is_there_in_part(self, tiny_model, tmp_path, max_shard_size):
        """Then the tests of the bundled checkpoint fail; a skip would look like success."""
        tiny_model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        assert incomplete(tmp_path) == []
        for path in [*tmp_path.glob("*.safetensors*"), tmp_path / "tokenizer.json"]:
            content = path.read_bytes()
            path.unlink()
            assert incomplete(tmp_path), path.name
            path.write_bytes(content)

    def test_a_missing_shard(self, sharded):
        shard = sorted(sharded.glob("model-0*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(REFUSED, match=shard.name):
            Causal2VecModel.from_pretrained(sharded)


class TestConfigurations:
    @pytest.mark.parametrize("kind", [str, Path])
    def test_of_another_folder(self, saved_dir, folder, kind):
        change_config(folder, max_seq_length=20)
        model = Causal2VecModel.from_pretrained(saved_dir, config=kind(folder))
        assert model.config.max_seq_length == model.processor.max_seq_length == 20
        refused(saved_dir, "no config.json", config=kind(folder / "encoder_tokenizer"))

    def test_of_a_baseline(self, make_model, tmp_path):
        make_model(baseline="last_token").save_pretrained(tmp_path)
        model = Causal2VecModel.from_pretrained(tmp_path, config=str(tmp_path))
        assert model.config.baseline == "last_token"

    def test_arguments_have_the_order_of_transformers(self):
        """`model.save_pretrained(folder, True)` once pushed to the Hub."""

        def positional(function) -> list[str]:
            parameters = signature(function).parameters.values()
            return [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]

        for ours, theirs in (
            (Causal2VecModel, PreTrainedModel),
            (Causal2VecConfig, PreTrainedConfig),
            (Causal2VecProcessor, Causal2VecProcessor.__base__),
        ):
            for method in ("save_pretrained", "push_to_hub"):
                mine, base = positional(getattr(ours, method)), positional(getattr(theirs, method))
                assert len(mine) >= 2 and mine == base[: len(mine)]

    def test_a_state_dict_is_what_is_saved(self, tiny_model, other_model, tmp_path, monkeypatch):
        monkeypatch.setattr(Causal2VecModel, "push_to_hub", lambda *args, **kwargs: pytest.fail("pushed"))
        state = other_model.state_dict()
        tiny_model.save_pretrained(tmp_path, True, state)
        assert state.keys() == other_model.state_dict().keys(), "it was emptied"
        assert same(Causal2VecModel.from_pretrained(tmp_path), other_model)


class TestOneDtype:
    """Whatever the two backbones' own configurations say."""

    @pytest.fixture
    def config(self, tiny_model) -> Causal2VecConfig:
        config = copy.deepcopy(tiny_model.config)
        config.dtype = None
        config.encoder_config.dtype, config.decoder_config.dtype = torch.float16, torch.bfloat16
        return config

    @staticmethod
    def dtypes(model) -> set:
        return {parameter.dtype for parameter in model.parameters()}

    def test_constructor(self, config):
        assert self.dtypes(Causal2VecModel(copy.deepcopy(config))) == {torch.float32}
        for dtype in (torch.bfloat16, "bfloat16"):  # as loaded, and as left by a save
            config.dtype = dtype
            assert self.dtypes(Causal2VecModel(copy.deepcopy(config))) == {torch.bfloat16}

    def test_several_contextual_tokens(self, config):
        config.num_contextual_tokens, config.dtype = 2, torch.bfloat16
        assert self.dtypes(Causal2VecModel(config)) == {torch.bfloat16}

    @pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
    def test_from_config(self, config, saved_dir, dtype):
        options = {} if dtype is None else {"dtype": dtype}
        model = Causal2VecModel._from_config(copy.deepcopy(config), **options)
        assert self.dtypes(model) == {dtype or torch.float32}
        remote = AutoConfig.from_pretrained(saved_dir, trust_remote_code=True)
        remote.dtype, remote.decoder_config.dtype = None, torch.bfloat16
        assert self.dtypes(AutoModel.from_config(remote, trust_remote_code=True, **options)) == {dtype or torch.float32}

    @pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float32])
    @pytest.mark.parametrize("told", [None, "float16"])
    def test_from_pretrained(self, folder, dtype, told):
        change_config(folder, "decoder_config", dtype="bfloat16")
        change_config(folder, dtype=told)
        model = Causal2VecModel.from_pretrained(folder, **({} if dtype is None else {"dtype": dtype}))
        expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        expected = expected or (torch.float32 if told is None else torch.float16)
        assert self.dtypes(model) == {expected}
        assert {config.dtype for config in (model.config, model.encoder.config, model.decoder.config)} == {expected}
        vectors = model.encode(TEXTS)
        assert vectors.dtype == np.float32 and np.isfinite(vectors).all()
        assert model(**model.processor("hi")).embeddings.dtype == expected

    @pytest.mark.parametrize("dtype", [None, "float32", torch.float16])
    def test_joining(self, make_model, join, llama_dir, backbone_dir, dtype):
        AutoModel.from_pretrained(backbone_dir("llama"), dtype="bfloat16").save_pretrained(llama_dir)
        expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        assert self.dtypes(join(dtype=dtype)) == {expected or torch.bfloat16}

    def test_one_per_tower_is_refused(self, saved_dir):
        refused(saved_dir, "whole model", dtype={"": "float32", "encoder_config": "bfloat16"})


@pytest.fixture(scope="module")
def counting_attention() -> list[str]:
    """Registers an attention that is SDPA and notes which module called it."""
    calls = []

    def attend(module, *args, **kwargs):
        calls.append(type(module).__name__)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("counting", attend)
    AttentionMaskInterface.register("counting", sdpa_mask)
    return calls


class TestLoadingOptions:
    @pytest.mark.parametrize(
        "attn_implementation, encoder, decoder",
        [
            ("eager", "eager", "eager"),
            ("sdpa", "sdpa", "sdpa"),
            ({"encoder_config": "eager", "decoder_config": "sdpa"}, "eager", "sdpa"),
            ({"encoder_config": "sdpa", "decoder_config": "eager"}, "sdpa", "eager"),
            ({"decoder_config": "eager"}, "sdpa", "eager"),
        ],
        ids=str,
    )
    def test_attention(self, tiny_model, saved_dir, attn_implementation, encoder, decoder):
        model = Causal2VecModel.from_pretrained(saved_dir, attn_implementation=attn_implementation)
        for tower, config, expected in (
            (model.encoder, model.config.encoder_config, encoder),
            (model.decoder, model.config.decoder_config, decoder),
        ):
            seen = {module.config._attn_implementation for module in tower.modules() if hasattr(module, "config")}
            assert seen == {config._attn_implementation} == {expected}
        assert difference(model.encode(TEXTS), tiny_model.encode(TEXTS)) <= FP32_BOUND

    @pytest.mark.parametrize("how", ["loaded", "set", "set on joined"])
    def test_the_chosen_attention_is_the_one_that_runs(self, saved_dir, make_model, counting_attention, how):
        def called(attn_implementation) -> list[str]:
            if how == "loaded":
                model = Causal2VecModel.from_pretrained(saved_dir, attn_implementation=attn_implementation)
            else:
                model = make_model() if how == "set on joined" else Causal2VecModel.from_pretrained(saved_dir)
                model.set_attn_implementation(attn_implementation)
            counting_attention.clear()
            model.encode("hi")
            return sorted(counting_attention)

        encoder, decoder = ["BertSelfAttention"] * 2, ["LlamaAttention"] * 2
        assert called("sdpa") == []
        assert called("counting") == encoder + decoder
        assert called({"encoder_config": "counting", "decoder_config": "eager"}) == encoder
        assert called({"encoder_config": "eager", "decoder_config": "counting"}) == decoder

    def test_attention_that_a_tower_cannot_do(self, models, tmp_path):
        model = models("llama", "mpnet")
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="MPNetModel does not support"):
            Causal2VecModel.from_pretrained(tmp_path, attn_implementation="sdpa")
        mixed = Causal2VecModel.from_pretrained(
            tmp_path, attn_implementation={"encoder_config": "eager", "decoder_config": "sdpa"}
        )
        assert difference(mixed.encode(TEXTS), model.encode(TEXTS)) <= FP32_BOUND

    def test_device_map(self, tiny_model, saved_dir):
        pytest.importorskip("accelerate", reason="device_map needs accelerate")
        assert same(Causal2VecModel.from_pretrained(saved_dir, device_map="auto"), tiny_model)

    @pytest.mark.parametrize("offloaded", ["decoder", "encoder", "projector", "decoder.embed_tokens", ""])
    def test_offloaded_weights(self, make_model, tmp_path, offloaded):
        accelerate = pytest.importorskip("accelerate")
        model = make_model()
        expected = model.encode(TEXTS, instruction="Find it for me")
        parts = ["encoder", "projector", *(f"decoder.{name}" for name, _ in model.decoder.named_children())]
        device_map = {part: "disk" if part.startswith(offloaded) else "cpu" for part in parts}
        accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path)
        assert any(parameter.is_meta for parameter in model.parameters())
        for _ in range(2):
            assert difference(model.encode(TEXTS, instruction="Find it for me"), expected) <= FP32_BOUND

    @pytest.mark.filterwarnings("ignore")  # of torch.ao, which is to move to another package
    @pytest.mark.parametrize("embeddings", [False, True])
    def test_quantised(self, tiny_model, embeddings):
        from torch.ao.quantization import default_dynamic_qconfig, float_qparams_weight_only_qconfig, quantize_dynamic

        spec = {torch.nn.Linear: default_dynamic_qconfig}
        if embeddings:
            spec["decoder.embed_tokens"] = float_qparams_weight_only_qconfig
        quantised = quantize_dynamic(tiny_model, spec)
        assert not list(quantised.projector.parameters())
        for _ in range(2):
            vectors = quantised.encode(TEXTS, instruction="Find it for me")
            cosines = (vectors * tiny_model.encode(TEXTS, instruction="Find it for me")).sum(-1)
            assert (cosines > 0.99).all() and not (cosines > 0.999999).all()
        assert quantised.prefix_cache.hits > 0


def test_attention_for_an_unknown_tower_is_refused(saved_dir):
    with pytest.raises(ValueError, match=r"'decoder_config', 'encoder_config'.*'encoder'"):
        Causal2VecModel.from_pretrained(saved_dir, attn_implementation={"encoder": "eager"})


@pytest.fixture
def llama_dir(backbone_dir, tmp_path) -> Path:
    """A copy of the decoder's folder, to change."""
    return Path(shutil.copytree(backbone_dir("llama"), tmp_path / "llama"))


@pytest.fixture
def join(backbone_dir, llama_dir):
    """Returns a function that joins BERT and what `llama_dir` holds by then."""

    def join(**kwargs) -> Causal2VecModel:
        return Causal2VecModel.from_encoder_decoder_pretrained(backbone_dir("bert"), str(llama_dir), **kwargs)

    return join


class TestJoining:
    def test_config(self, make_model):
        model = make_model()
        assert not model.training
        assert model.config.contextual_token_id == 320 == len(model.processor.tokenizer) - 1
        assert model.config.decoder_config.vocab_size == 321
        assert (model.config.max_seq_length, model.config.icl_max_seq_length) == (512, 512)  # at most
        assert (model.config.template_prefix, model.config.template_suffix) == ("", "")
        assert model.processor.tokenizer.convert_ids_to_tokens(320) == "<|contextual|>"
        assert 320 not in model.processor("<|contextual|>")["input_ids"][0, 2:]

    @pytest.mark.parametrize(
        "encoder, positions", [(e, 38 if e in ("roberta", "mpnet", "xlm-roberta") else 40) for e in ENCODERS]
    )
    def test_encoder_max_seq_length_is_what_the_encoder_can_take(self, models, encoder, positions):
        model = models("llama", encoder)
        assert position_limit(model.encoder) == positions == model.config.encoder_max_seq_length
        batch = model.processor(TEXTS[1] * 3)
        assert batch["encoder_ids"].shape == (1, positions)
        assert torch.isfinite(embed(model, batch)).all()

    def test_weights_are_the_backbones(self, make_model, backbone_dir):
        model = make_model("qwen3", "roberta")
        encoder, decoder = (load_file(f"{backbone_dir(name)}/model.safetensors") for name in ("roberta", "qwen3"))
        for part, saved in (("encoder", encoder), ("decoder", decoder)):
            loaded = getattr(model, part).state_dict()
            assert len(loaded) > 10
            for name, tensor in loaded.items():
                assert torch.equal(tensor[: len(saved[name])], saved[name]), name
        assert set(encoder) - set(model.encoder.state_dict()) == {"pooler.dense.weight", "pooler.dense.bias"}

    def test_two_calls_share_nothing(self, make_model):
        one, two = make_model(), make_model()
        assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in two.parameters()}
        assert one.config.decoder_config is not two.config.decoder_config

    @pytest.mark.parametrize("name", PROMPT_TEMPLATES)
    def test_templates_follow_the_chat_template(self, name, llama_dir, join):
        marker, template_prefix, template_suffix = PROMPT_TEMPLATES[name]
        tokenizer = decoder_tokenizer()
        if name != "none":
            tokenizer.chat_template = f"{{% for message in messages %}}{marker}{{{{ message.content }}}}{{% endfor %}}"
        tokenizer.save_pretrained(llama_dir)
        for arguments in ({}, {"template_prefix": "Q: ", "template_suffix": " A:"}, {"template_suffix": ""}):
            model = join(**arguments)
            if arguments:  # the caller's
                template_prefix, template_suffix = arguments.get("template_prefix", ""), arguments["template_suffix"]
            for part in (model.config, model.processor):
                assert (part.template_prefix, part.template_suffix) == (template_prefix, template_suffix)
            row = model.processor.tokenizer.decode(model.processor("hi", instruction="Find it")["input_ids"][0])
            assert row == f"<s>{template_prefix}Find it<|contextual|>hi{template_suffix}</s>"

    def test_chat_templates_of_known_models(self):
        assert find_prompt_template(None) == ("", "")
        assert find_prompt_template("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}") == ("", "")
        assert find_prompt_template("{{'<|im_start|>' + m.role}}") == ("<|im_start|>user\n", "<|im_end|>")
        assert find_prompt_template("{{ '[INST] ' + m.content + ' [/INST]' }}") == ("[INST] ", " [/INST]")

    def test_the_contextual_token_is_added_once(self, make_model, llama_dir, join):
        first = make_model()
        first.decoder.save_pretrained(llama_dir)
        first.processor.tokenizer.save_pretrained(llama_dir)
        again = join()
        assert len(again.processor.tokenizer) == len(first.processor.tokenizer) == 321
        assert again.config.contextual_token_id == 320
        assert torch.equal(again.get_input_embeddings().weight, first.get_input_embeddings().weight)

    def test_spare_embeddings_are_kept(self, make_model, llama_dir, join):
        """Many decoders have more embeddings than tokens."""
        decoder = make_model().decoder
        decoder.resize_token_embeddings(400)
        decoder.save_pretrained(llama_dir)
        model = join()
        assert model.config.decoder_config.vocab_size == 400
        assert model.config.contextual_token_id == 320

    def test_heads_are_left_behind(self, backbone_dir, tmp_path):
        torch.manual_seed(0)
        causal_lm = AutoModelForCausalLM.from_config(decoder_config("llama", 320))
        masked_lm = AutoModelForMaskedLM.from_config(encoder_config("bert", 110))
        for model, name, backbone in ((causal_lm, "lm", "llama"), (masked_lm, "mlm", "bert")):
            shutil.copytree(backbone_dir(backbone), tmp_path / name)
            model.save_pretrained(tmp_path / name)
        saved = {*load_file(tmp_path / "lm/model.safetensors"), *load_file(tmp_path / "mlm/model.safetensors")}
        assert "lm_head.weight" in saved and any(name.startswith("cls.") for name in saved)
        model = Causal2VecModel.from_encoder_decoder_pretrained(str(tmp_path / "mlm"), str(tmp_path / "lm"))
        assert torch.equal(model.decoder.layers[0].mlp.up_proj.weight, causal_lm.model.layers[0].mlp.up_proj.weight)
        assert torch.equal(
            model.encoder.embeddings.word_embeddings.weight, masked_lm.bert.embeddings.word_embeddings.weight
        )
        for name in model.state_dict():
            assert "pooler" not in name and "lm_head" not in name and ".cls." not in name

    def test_tied_word_embeddings(self, llama_dir, join, tmp_path):
        config = decoder_config("llama", 320)
        config.tie_word_embeddings = True
        AutoModelForCausalLM.from_config(config).save_pretrained(llama_dir)
        model = join()
        model.save_pretrained(tmp_path / "saved")
        assert_same_weights(model, Causal2VecModel.from_pretrained(tmp_path / "saved"))

    def test_a_backbone_with_a_missing_tensor(self, llama_dir, join):
        change_weights(llama_dir, lambda weights: weights.pop("norm.weight"))
        with pytest.raises(ValueError, match="lacks 1 tensors.*norm.weight"):
            join()

    def test_attention_per_backbone(self, make_model, counting_attention):
        model = make_model(
            encoder_kwargs={"attn_implementation": "eager"}, decoder_kwargs={"attn_implementation": "counting"}
        )
        assert model.config.encoder_config._attn_implementation == model.encoder.config._attn_implementation == "eager"
        counting_attention.clear()
        model.encode("hi")
        assert counting_attention == ["LlamaAttention"] * 2

    def test_settings_reach_the_configuration(self, make_model):
        model = make_model(
            text_prefix="query: ", max_seq_length=20, query_instruction="Find it", contextual_token="<x>"
        )
        assert model.config.text_prefix == model.processor.text_prefix == "query: "
        assert model.processor(TEXTS[1])["input_ids"].shape == (1, 20)
        assert model.config.query_instruction == "Find it"
        assert model.processor.tokenizer.convert_ids_to_tokens(model.config.contextual_token_id) == "<x>"

    def test_a_setting_that_does_not_exist(self, make_model):
        with pytest.raises(TypeError, match="text_prefx"):
            make_model(text_prefx="query: ")

    def test_no_tokenizer_files(self, backbone_dir, tmp_path):
        """AutoTokenizer then makes up a tokenizer that knows no word."""
        shutil.copytree(backbone_dir("bert"), tmp_path, dirs_exist_ok=True)
        for path in tmp_path.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(ValueError, match="encoder's tokenizer has no vocabulary"):
            Causal2VecModel.from_encoder_decoder_pretrained(str(tmp_path), backbone_dir("llama"))
