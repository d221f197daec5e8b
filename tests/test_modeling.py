"""Causal2VecModel: every promised backbone, invariances, saving and loading, joining backbones, `encode`."""

import copy
import io
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
import transformers
from conftest import DECODERS, ENCODERS, TEXTS, decoder_config, decoder_tokenizer, encoder_config, read_weights
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu, linear, normalize
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DynamicCache,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import decoder_utils
import runtime_utils
from configuration_causal2vec import PROMPT_TEMPLATES, Causal2VecConfig
from loading_utils import find_prompt_template, position_limit
from modeling_causal2vec import Causal2VecModel, Causal2VecPreTrainedModel, masked_mean
from runtime_utils import half_precision_cost, has_fast_bfloat16


PAIRS = [(decoder, "bert") for decoder in DECODERS] + [("llama", encoder) for encoder in ENCODERS if encoder != "bert"]
HIDDEN = 32
FP32_BOUND = 1e-5  # of any number of an unnormalised embedding, whose numbers are about 1
# In bf16 (8 bits of mantissa) padding and batching reorder roundings. Of the numbers of a normalised embedding:
BF16_BOUND = 0.02
BF16_COSINE = 0.999
SAME = 1e-6  # the same computation; where weights lie in memory may still change a last bit


@pytest.fixture(scope="session")
def models(make_model):
    """Returns a function from a pair of families to their model, which no test changes."""
    cache = {}

    def get(decoder: str, encoder: str) -> Causal2VecModel:
        if (decoder, encoder) not in cache:
            cache[decoder, encoder] = make_model(decoder, encoder)
        return cache[decoder, encoder]

    return get


@pytest.fixture(params=PAIRS, ids="-".join)
def model(models, request):
    return models(*request.param)


@pytest.fixture(scope="session")
def bf16_dir(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bf16") / "model"
    make_model(dtype="bfloat16").save_pretrained(folder)
    return folder


def pad(batch: dict, side: str, encoder_side: str, extra: int = 0) -> dict:
    """The same rows with their padding elsewhere, and `extra` more of it."""
    out = {}
    for ids_name, mask_name, where, pad_id in (
        ("input_ids", "attention_mask", side, 0),
        ("encoder_ids", "encoder_attention_mask", encoder_side, 1),
    ):
        rows = [ids[mask.bool()] for ids, mask in zip(batch[ids_name], batch[mask_name])]
        width = max(map(len, rows)) + extra
        ids = torch.full((len(rows), width), pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if where == "left" else slice(0, len(row))
            ids[i, place], mask[i, place] = row, 1
        out[ids_name], out[mask_name] = ids, mask
    return out


def embed(model, batch, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **kwargs).embeddings


def one_by_one(model, texts, **kwargs) -> torch.Tensor:
    return torch.cat([embed(model, model.processor(text, **kwargs)) for text in texts])


def difference(left, right) -> float:
    return (torch.as_tensor(left) - torch.as_tensor(right)).abs().max().item()


class TestForward:
    def test_embeddings_are_the_two_states(self, model):
        batch = model.processor(TEXTS, instruction="Find it")
        with torch.no_grad():
            out = model(**batch, output_last_hidden_state=True)
        assert out.embeddings.shape == (len(TEXTS), 2 * HIDDEN) and out.embeddings.dtype == torch.float32
        assert out.last_hidden_state.shape == (*batch["input_ids"].shape, HIDDEN)
        assert out.past_key_values is None
        for i, (ids, mask) in enumerate(zip(batch["input_ids"].tolist(), batch["attention_mask"])):
            slot, eos = ids.index(model.config.contextual_token_id), int(mask.sum()) - 1
            assert ids[eos] == 2
            contextual_state, eos_state = model.split_states(out.embeddings[i])
            assert torch.equal(contextual_state, out.last_hidden_state[i, slot])
            assert torch.equal(eos_state, out.last_hidden_state[i, eos])

    def test_embeddings_say_something(self, model):
        embeddings = embed(model, model.processor(TEXTS))
        assert torch.isfinite(embeddings).all()
        for half in model.split_states(embeddings):
            distances = torch.cdist(half, half) + 100 * torch.eye(len(TEXTS))
            assert distances.min() > 0.1, "two texts have the same vector"
        assert not torch.allclose(embeddings.norm(dim=-1), torch.ones(len(TEXTS)), atol=0.1), "normalised already"

    def test_padding_never_matters(self, model):
        batch = model.processor(TEXTS, instruction="Find it")
        assert batch["attention_mask"].sum(-1).unique().numel() > 3
        assert batch["encoder_attention_mask"].sum(-1).unique().numel() > 3
        expected = one_by_one(model, TEXTS, instruction="Find it")
        for side in ("left", "right"):
            for encoder_side in ("left", "right"):
                for extra in (0, 3):
                    padded = pad(batch, side, encoder_side, extra)
                    if padded["encoder_ids"].shape[1] <= model.config.encoder_max_seq_length:
                        assert difference(embed(model, padded), expected) <= FP32_BOUND, (side, encoder_side, extra)

    def test_batch_size_and_order_never_matter(self, model):
        expected = one_by_one(model, TEXTS)
        for batch_size in (1, 2, 4, 32):
            vectors = model.encode(TEXTS, batch_size=batch_size, normalize_embeddings=False)
            assert difference(vectors, expected) <= FP32_BOUND
        order = [4, 0, 3, 5, 1, 2]
        vectors = model.encode([TEXTS[i] for i in order], batch_size=4, normalize_embeddings=False)
        assert difference(vectors, expected[order]) <= FP32_BOUND

    def test_attention_mask_may_be_left_out(self, model):
        batch = model.processor(TEXTS[1])
        without = {name: tensor for name, tensor in batch.items() if "mask" not in name}
        assert sorted(without) == ["encoder_ids", "input_ids"]
        assert difference(embed(model, without), embed(model, batch)) <= FP32_BOUND

    def test_encoder_embedding_computed_before(self, model):
        batch = model.processor(TEXTS, instruction="Find it")
        with torch.no_grad():
            vectors = model.get_encoder_embedding(batch["encoder_ids"], batch["encoder_attention_mask"])
        rest = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        expected = embed(model, batch)
        assert torch.equal(embed(model, rest, encoder_embedding=vectors), expected)
        shared = model.processor(TEXTS, instruction="Find it", return_prefix_ids=True)
        rest = {name: shared[name] for name in ("input_ids", "attention_mask", "prefix_ids")}
        for packed in (False, True):
            assert difference(embed(model, rest, encoder_embedding=vectors, packed=packed), expected) <= FP32_BOUND

    def test_later_positions_see_the_contextual_token_and_earlier_ones_do_not(self, model):
        batch = model.processor([TEXTS[1]] * 2, instruction="Find it")
        other = model.processor([TEXTS[4]] * 2)
        slot = batch["input_ids"][0].tolist().index(model.config.contextual_token_id)
        assert slot > 3
        with torch.no_grad():
            states = model(**batch, output_last_hidden_state=True).last_hidden_state
            batch["encoder_ids"], batch["encoder_attention_mask"] = (
                other["encoder_ids"],
                other["encoder_attention_mask"],
            )
            changed = model(**batch, output_last_hidden_state=True).last_hidden_state
        differences = (states - changed).abs().amax(-1)  # (batch, seq_len)
        assert (differences[:, :slot] == 0).all()
        reach = differences.shape[1]
        if getattr(model.decoder.config, "sliding_window", None):  # each layer passes it on to the 7 next positions
            reach = slot + 2 * 7 + 1
            assert reach < differences.shape[1]
        assert (differences[:, slot:reach] > 1e-4).all()

    def test_the_slots_own_embedding_is_never_read(self, make_model):
        model = make_model()
        before = model.encode(TEXTS)
        with torch.no_grad():
            model.get_input_embeddings().weight[model.config.contextual_token_id] = 1e4
        assert difference(model.encode(TEXTS), before) <= SAME

    def test_a_cached_head(self, model):
        instruction = "Given a question, retrieve passages that answer it"
        prefix = model.processor.encode_prefix(instruction)
        assert len(prefix) > 8, "shorter than the sliding window"
        batch = model.processor(TEXTS, instruction=instruction)
        expected = embed(model, batch)
        cache = DynamicCache(config=model.decoder.config)
        with torch.no_grad():
            model.decoder(input_ids=torch.tensor([prefix]), past_key_values=cache, use_cache=True)
            assert cache.get_seq_length() == len(prefix)
            cache.batch_repeat_interleave(len(TEXTS))
            batch["input_ids"] = batch["input_ids"][:, len(prefix) :]
            out = model(**batch, past_key_values=cache, use_cache=True)
        assert difference(out.embeddings, expected) <= FP32_BOUND
        assert out.past_key_values is cache

    def test_a_cached_head_without_a_mask(self, models):
        model = models("llama", "bert")
        batch = model.processor(TEXTS[1], instruction="Find it")
        prefix = model.processor.encode_prefix("Find it")
        cache = DynamicCache(config=model.decoder.config)
        with torch.no_grad():
            model.decoder(input_ids=torch.tensor([prefix]), past_key_values=cache, use_cache=True)
        rest = dict(input_ids=batch["input_ids"][:, len(prefix) :], encoder_ids=batch["encoder_ids"])
        assert difference(embed(model, rest, past_key_values=cache), embed(model, batch)) <= FP32_BOUND

    def test_no_cache_is_returned_unless_asked_for(self, models):
        model = models("llama", "bert")
        with torch.no_grad():
            assert model(**model.processor("hi")).past_key_values is None
            assert model(**model.processor("hi"), use_cache=True).past_key_values.get_seq_length() == 4

    def test_inputs_are_not_changed(self, models):
        model = models("llama", "bert")
        batch = model.processor(TEXTS)
        before = {name: tensor.clone() for name, tensor in batch.items()}
        embed(model, batch)
        for name, tensor in batch.items():
            assert torch.equal(tensor, before[name])


class TestForwardErrors:
    @pytest.mark.parametrize("count", [0, 2])
    def test_slots(self, models, count):
        model = models("llama", "bert")
        batch = model.processor(TEXTS[:3])
        slot = model.config.contextual_token_id
        batch["input_ids"][1, 1:3] = torch.tensor([5, 6] if count == 0 else [slot, slot])
        with pytest.raises(ValueError, match=f"id {slot}\\) exactly once; row 1 holds it {count} times"):
            model(**batch)

    def test_nothing_for_the_encoder(self, models):
        model = models("llama", "bert")
        with pytest.raises(ValueError, match="`encoder_ids`.*or an `encoder_embedding`"):
            model(input_ids=model.processor("hi")["input_ids"])

    def test_no_tokenizers(self, models):
        model = Causal2VecModel(copy.deepcopy(models("llama", "bert").config))
        with pytest.raises(ValueError, match="no tokenizers"):
            model.encode("hi")
        model.processor = models("llama", "bert").processor
        assert model.encode("hi").shape == (64,)

    def test_more_tokens_than_the_encoder_has_positions(self):
        """RoBERTa's first position is behind its padding id: 40 embeddings hold 38 tokens."""
        config = Causal2VecConfig(
            encoder_config=encoder_config("roberta", 200),
            decoder_config=decoder_config("llama", 300),
            max_seq_length=64,
            icl_max_seq_length=64,
            encoder_max_seq_length=39,
        )
        with pytest.raises(ValueError, match="`encoder_max_seq_length` must be at most 38.*roberta.*got 39"):
            Causal2VecModel(config)


class TestSlidingWindow:
    @pytest.mark.parametrize("decoder", ["mistral", "gemma2", "gemma3"])
    def test_it_is_shorter_than_the_text_and_matters(self, models, decoder):
        model = models(decoder, "bert")
        batch = model.processor(TEXTS[1])
        assert model.decoder.config.sliding_window == 8
        assert batch["input_ids"].shape[1] > 3 * 8
        wide_config = copy.deepcopy(model.config)
        wide_config.decoder_config.sliding_window = 512
        wide = Causal2VecModel(wide_config).eval()
        wide.load_state_dict(model.state_dict())
        assert difference(embed(wide, batch), embed(model, batch)) > 0.01
        short = model.processor("hi")
        assert short["input_ids"].shape[1] < 8
        assert difference(embed(wide, short), embed(model, short)) <= FP32_BOUND


class TestBfloat16:
    """The bound that the constants above state. Loaded, not cast: a cast would round rotary frequencies, too."""

    @pytest.mark.parametrize("pair", PAIRS, ids="-".join)
    def test_padding_batch_size_and_order(self, models, pair, tmp_path):
        models(*pair).save_pretrained(tmp_path)
        model = Causal2VecModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        expected = normalize(one_by_one(model, TEXTS).float(), dim=-1)
        batch = model.processor(TEXTS)
        others = [normalize(embed(model, pad(batch, side, side)).float(), dim=-1) for side in ("left", "right")]
        others += [torch.from_numpy(model.encode(TEXTS, batch_size=4))]
        for vectors in others:
            assert difference(vectors, expected) <= BF16_BOUND
            assert (vectors * expected).sum(-1).min() >= BF16_COSINE
        fp32 = torch.from_numpy(models(*pair).encode(TEXTS))
        assert 0 < difference(expected, fp32) <= BF16_BOUND, "no bf16 at all, or a bad one"

    def test_the_mean_of_many_tokens(self):
        """bfloat16 has no 511: what is counted and summed in it is up to 0.4% off."""
        states = torch.rand(2, 600, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
        mask = torch.zeros(2, 600, dtype=torch.long)
        mask[0, :511], mask[1, :1] = 1, 1
        expected = torch.stack([states[0, :511].float().mean(0), states[1, 0].float()])
        assert torch.equal(masked_mean(states, mask), expected.bfloat16())

    @pytest.mark.parametrize("how", ["dtype", "autocast"])
    def test_a_slow_dtype_is_told_once(self, bf16_dir, saved_dir, monkeypatch, caplog, how):
        cost = {"dtype": 98.7, "autocast": 87.6}[how]  # a message of its own
        monkeypatch.setattr(runtime_utils, "half_precision_cost", lambda dtype: cost)
        model = Causal2VecModel.from_pretrained(bf16_dir if how == "dtype" else saved_dir)
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
                model.encode(TEXTS, truncation="silent")
        assert caplog.text.count(f"{cost} times") == 1 and "float32" in caplog.text

    def test_neither_a_fast_dtype_nor_float32_is_told(self, bf16_dir, saved_dir, monkeypatch, caplog):
        for folder, cost in ((bf16_dir, 0.5), (saved_dir, 76.5)):
            monkeypatch.setattr(runtime_utils, "half_precision_cost", lambda dtype, cost=cost: cost)
            Causal2VecModel.from_pretrained(folder).encode(TEXTS, truncation="silent")
        assert "times" not in caplog.text

    def test_the_cost_is_measured_in_the_dtype_that_is_asked_for(self, monkeypatch):
        seen = []
        multiply = torch.Tensor.__matmul__
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append(multiply(a, b).dtype) or a)
        with torch.autocast("cpu", dtype=torch.float16):
            assert half_precision_cost.__wrapped__(torch.bfloat16) > 0
        assert set(seen) == {torch.float32, torch.bfloat16}
        assert has_fast_bfloat16() is (half_precision_cost(torch.bfloat16) <= 1)


class TestNames:
    def test_no_heads_in_the_state(self, model):
        names = list(model.state_dict())
        assert {name.split(".")[0] for name in names} == {"encoder", "projector", "decoder"}
        for name in names:
            assert "pooler" not in name and "lm_head" not in name and "embed_out" not in name
        assert [name for name in names if name.startswith("projector.")] == [
            "projector.linear_1.weight",
            "projector.linear_1.bias",
            "projector.linear_2.weight",
            "projector.linear_2.bias",
        ]

    def test_classes(self, models):
        model = models("llama", "bert")
        assert isinstance(model, Causal2VecPreTrainedModel) and isinstance(model, PreTrainedModel)
        assert model.config.model_type == "causal2vec"
        assert not any(parameter.is_meta for parameter in model.parameters())

    def test_forward_takes_what_the_processor_gives(self, models):
        import inspect

        model = models("llama", "bert")
        assert set(model.processor.model_input_names) <= set(inspect.signature(model.forward).parameters)
        # sentence-transformers' trainer takes every name that ends so for another sentence
        assert [name for name in model.processor.model_input_names if name.endswith("_input_ids")] == []


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
        names = {str(path.relative_to(saved_dir)) for path in saved_dir.rglob("*") if path.is_file()}
        assert names >= {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "encoder_tokenizer/tokenizer.json",
            "configuration_causal2vec.py",
            "modeling_causal2vec.py",
            "tokenization_utils.py",
        }
        auto_map = json.loads((saved_dir / "config.json").read_text())["auto_map"]
        assert auto_map == {
            "AutoConfig": "configuration_causal2vec.Causal2VecConfig",
            "AutoModel": "modeling_causal2vec.Causal2VecModel",
        }

    def test_a_subfolder(self, tiny_model, tmp_path):
        tiny_model.save_pretrained(tmp_path / "checkpoint-5")
        loaded = Causal2VecModel.from_pretrained(tmp_path, subfolder="checkpoint-5")
        assert difference(loaded.encode(TEXTS), tiny_model.encode(TEXTS)) <= SAME

    def test_only_the_main_process_writes(self, tiny_model, tmp_path):
        tiny_model.save_pretrained(tmp_path, is_main_process=False)
        assert [path.name for path in tmp_path.rglob("*.json")] == []

    def test_without_tokenizers_it_loads_and_says_so(self, tiny_model, saved_dir, tmp_path):
        shutil.copytree(saved_dir, tmp_path, dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "encoder_tokenizer")
        loaded = Causal2VecModel.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="no tokenizers"):
            loaded.encode("hi")
        batch = tiny_model.processor("hi")
        assert difference(embed(loaded, batch), embed(tiny_model, batch)) <= FP32_BOUND

    def test_loading_info(self, saved_dir):
        model, info = Causal2VecModel.from_pretrained(saved_dir, output_loading_info=True)
        assert isinstance(model, Causal2VecModel)
        assert not info["missing_keys"] and not info["unexpected_keys"]

    @pytest.mark.parametrize(
        "name", ["projector.linear_1.weight", "encoder.embeddings.word_embeddings.weight", "decoder.norm.weight"]
    )
    def test_a_missing_tensor(self, saved_dir, tmp_path, name):
        change_weights(saved_dir, tmp_path, lambda weights: weights.pop(name))
        with pytest.raises(ValueError, match=f"1 missing keys, such as .*{name}"):
            Causal2VecModel.from_pretrained(tmp_path)

    def test_an_unexpected_tensor(self, saved_dir, tmp_path):
        change_weights(saved_dir, tmp_path, lambda weights: weights.update({"lm_head.weight": torch.ones(3)}))
        with pytest.raises(ValueError, match="1 unexpected keys, such as .*lm_head.weight"):
            Causal2VecModel.from_pretrained(tmp_path)

    def test_a_tensor_of_another_shape(self, saved_dir, tmp_path):
        change_weights(saved_dir, tmp_path, lambda weights: weights.update({"projector.linear_1.bias": torch.ones(3)}))
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            Causal2VecModel.from_pretrained(tmp_path)

    def test_every_weight_comes_from_the_file(self, saved_dir, tmp_path):
        """Every number of the file is replaced by a sentinel; none may be initialised anew."""

        def mark(weights):
            for i, name in enumerate(sorted(weights)):
                weights[name] = torch.full_like(weights[name], i + 1)

        change_weights(saved_dir, tmp_path, mark)
        loaded = Causal2VecModel.from_pretrained(tmp_path).state_dict()
        assert len(loaded) > 40
        for i, name in enumerate(sorted(loaded)):
            assert (loaded[name] == i + 1).all(), name


def assert_same_weights(left, right):
    right = dict(right.state_dict())
    left = dict(left.state_dict())
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name


def change_weights(source, target, change):
    shutil.copytree(source, target, dirs_exist_ok=True)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def count_attention_calls(calls: list, module, *args, **kwargs):
    calls.append(type(module).__name__)
    return sdpa_attention_forward(module, *args, **kwargs)


@pytest.fixture(scope="module")
def counting_attention():
    """Registers an attention that is SDPA and notes which module called it."""
    calls: list[str] = []
    AttentionInterface.register("counting", lambda *args, **kwargs: count_attention_calls(calls, *args, **kwargs))
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

    def test_eager_equals_sdpa(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        eager = Causal2VecModel.from_pretrained(tmp_path, attn_implementation="eager")
        batch = model.processor(TEXTS)
        for side in ("left", "right"):
            padded = pad(batch, side, side)
            assert difference(embed(eager, padded), embed(model, padded)) <= 10 * FP32_BOUND  # another kernel

    @pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16, torch.float32], ids=str)
    def test_dtype_reaches_every_parameter(self, saved_dir, dtype):
        model = Causal2VecModel.from_pretrained(saved_dir, dtype=dtype)
        expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert {config.dtype for config in (model.config, model.encoder.config, model.decoder.config)} == {expected}
        vectors = model.encode(TEXTS)
        assert vectors.dtype == np.float32 and np.isfinite(vectors).all()
        assert model(**model.processor("hi")).embeddings.dtype == expected

    def test_dtype_of_the_file_unless_asked_otherwise(self, bf16_dir):
        assert Causal2VecModel.from_pretrained(bf16_dir).dtype == torch.bfloat16
        model = Causal2VecModel.from_pretrained(bf16_dir, dtype="float32")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    @pytest.mark.parametrize("device_map", ["cpu", "auto"])
    def test_device_map(self, tiny_model, saved_dir, device_map):
        pytest.importorskip("accelerate", reason="device_map needs accelerate")
        model = Causal2VecModel.from_pretrained(saved_dir, device_map=device_map)
        assert not any(parameter.is_meta for parameter in model.parameters())
        assert difference(model.encode(TEXTS), tiny_model.encode(TEXTS)) <= FP32_BOUND

    def test_towers_on_two_devices_of_a_map(self, tiny_model, saved_dir):
        pytest.importorskip("accelerate", reason="device_map needs accelerate")
        device_map = {"encoder": "cpu", "projector": "cpu", "decoder": "cpu"}
        model = Causal2VecModel.from_pretrained(saved_dir, device_map=device_map)
        assert difference(model.encode(TEXTS), tiny_model.encode(TEXTS)) <= SAME

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

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_towers_on_two_devices(self, tiny_model, saved_dir, tmp_path):
        for encoder, decoder in itertools.product(["cpu", 0, "disk"], repeat=2):
            device_map = {"encoder": encoder, "projector": encoder, "decoder": decoder}
            model = Causal2VecModel.from_pretrained(saved_dir, device_map=device_map, offload_folder=tmp_path)
            for packed in (False, True):
                vectors = model.encode(TEXTS, instruction="Find it for me", packed=packed)
                assert difference(vectors, tiny_model.encode(TEXTS, instruction="Find it for me")) <= 1e-4
            batch = model.processor(TEXTS, "Find it for me", return_prefix_ids=True)
            with torch.no_grad():
                mean = model.get_encoder_embedding(batch.pop("encoder_ids"), batch.pop("encoder_attention_mask"))
                embeddings = model(**batch, encoder_embedding=mean)
            expected = embed(tiny_model, tiny_model.processor(TEXTS, "Find it for me"))
            assert difference(embeddings.embeddings.cpu(), expected) <= 1e-4

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

    def test_construction_on_meta(self, model):
        with torch.device("meta"):
            empty = Causal2VecModel(copy.deepcopy(model.config))
        assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes

    def test_construction_from_a_configuration_alone(self, models):
        config = copy.deepcopy(models("llama", "bert").config)
        torch.manual_seed(3)
        model = Causal2VecModel(config)
        initializer_range = config.decoder_config.initializer_range
        assert model.projector.linear_1.weight.std().item() == pytest.approx(initializer_range, rel=0.2)
        assert (model.projector.linear_1.bias == 0).all() and (model.projector.linear_2.bias == 0).all()
        assert torch.isfinite(embed(model.eval(), models("llama", "bert").processor(TEXTS))).all()

    @pytest.mark.parametrize(
        "settings, expected",
        [
            ({"projector_bias": False}, {"linear_1.weight": (32, 24), "linear_2.weight": (32, 32)}),
            (
                {"projector_hidden_size": 48},
                {
                    "linear_1.weight": (48, 24),
                    "linear_1.bias": (48,),
                    "linear_2.weight": (32, 48),
                    "linear_2.bias": (32,),
                },
            ),
        ],
        ids=str,
    )
    def test_projector_settings(self, make_model, tmp_path, settings, expected):
        model = make_model(**settings)
        assert {name: tuple(value.shape) for name, value in model.projector.state_dict().items()} == expected
        model.save_pretrained(tmp_path)
        assert difference(Causal2VecModel.from_pretrained(tmp_path).encode(TEXTS), model.encode(TEXTS)) <= SAME

    def test_projector_activation(self, make_model):
        vectors = [make_model(projector_hidden_act=name).encode(TEXTS) for name in ("gelu", "relu")]
        assert difference(*vectors) > 0.01


def first_linear(tower) -> torch.nn.Module:
    return next(module for module in tower.modules() if isinstance(module, torch.nn.Linear))


class TestTraining:
    def gradients(self, model, seed: int = 0) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Gradients of one step with dropout, and how often each tower's first linear layer ran."""
        calls = [0, 0]

        def hook(i):
            def count(*_):
                calls[i] += 1

            return count

        hooks = [
            first_linear(tower).register_forward_hook(hook(i)) for i, tower in enumerate((model.encoder, model.decoder))
        ]
        model.train()
        model.zero_grad()
        torch.manual_seed(seed)
        embeddings = model(**model.processor(TEXTS, instruction="Find it")).embeddings
        (normalize(embeddings, dim=-1) @ torch.linspace(-1, 1, 2 * HIDDEN)).pow(2).sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        model.eval()
        for handle in hooks:
            handle.remove()
        return gradients, calls

    @pytest.mark.parametrize("pair", PAIRS, ids="-".join)
    def test_gradient_checkpointing(self, make_model, pair, caplog, monkeypatch):
        """In both towers, with the same dropout; and every parameter has a gradient, as DDP demands."""
        model = make_model(*pair)
        plain, calls = self.gradients(model)
        assert calls == [1, 1]
        assert any(module.p > 0 for module in model.encoder.modules() if isinstance(module, torch.nn.Dropout)) or (
            pair[1] == "modernbert"
        )
        for part in ("encoder.", "projector.", "decoder."):
            norms = [
                gradient.norm() for name, gradient in plain.items() if name.startswith(part) and gradient.dim() > 1
            ]
            assert len(norms) > 1 and min(norms) > 0, part
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        monkeypatch.setattr(logging.getLogger("modeling_causal2vec"), "propagate", True)
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its newer name
        checkpointed, calls = self.gradients(model)
        # MPNet has none, which `enable` says
        assert calls == [1 if pair[1] == "mpnet" else 2, 2], "nothing was computed again"
        assert ("MPNetModel keeps its activations" in caplog.text) == (pair[1] == "mpnet")
        assert plain.keys() == checkpointed.keys()
        for name, gradient in plain.items():
            assert difference(gradient, checkpointed[name]) <= 1e-6 * max(1, gradient.abs().max().item()), name
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        assert self.gradients(model)[1] == [1, 1]

    def test_dropout_is_on_while_training(self, make_model):
        model = make_model()
        one, two = self.gradients(model, seed=0)[0], self.gradients(model, seed=1)[0]
        assert difference(one["projector.linear_1.weight"], two["projector.linear_1.weight"]) > 0

    def test_a_step_changes_every_part(self, make_model):
        model = make_model()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()
        model(**model.processor(TEXTS)).embeddings[:, 0].sum().backward()
        optimizer.step()
        for part in ("encoder.", "projector.", "decoder."):
            moved = [difference(p, before[name]) for name, p in model.named_parameters() if name.startswith(part)]
            assert max(moved) > 0, part


class TestResizing:
    def test_only_the_decoder_grows_and_old_texts_keep_their_vectors(self, make_model, tmp_path):
        model = make_model()
        before = model.encode(TEXTS)
        vocab_size, encoder_vocab_size = model.config.decoder_config.vocab_size, model.config.encoder_config.vocab_size
        model.resize_token_embeddings(vocab_size + 9)
        assert model.get_input_embeddings() is model.decoder.get_input_embeddings()
        assert model.get_input_embeddings().weight.shape == (vocab_size + 9, HIDDEN)
        assert model.config.decoder_config.vocab_size == vocab_size + 9
        assert model.config.encoder_config.vocab_size == encoder_vocab_size
        assert difference(model.encode(TEXTS), before) <= SAME
        model.save_pretrained(tmp_path)
        loaded = Causal2VecModel.from_pretrained(tmp_path)
        assert loaded.config.decoder_config.vocab_size == vocab_size + 9
        assert difference(loaded.encode(TEXTS), before) <= SAME

    def test_new_tokens_are_used(self, make_model):
        model = make_model()
        before = model.encode(["protein", "zzz"])
        model.processor.tokenizer.add_tokens(["zzz"])
        model.resize_token_embeddings(len(model.processor.tokenizer))
        after = model.encode(["protein", "zzz"])
        assert model.processor("zzz")["input_ids"].max() == 321
        assert difference(before[0], after[0]) <= SAME
        assert difference(before[1], after[1]) > 1e-3


def test_torch_compile(models):
    model = models("llama", "bert")
    long, short = model.processor(TEXTS), model.processor(TEXTS[2:4])
    expected = embed(model, long), embed(model, short)
    graphs = []

    def run_as_it_is(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=run_as_it_is, fullgraph=True, dynamic=True)
    assert difference(embed(compiled, long), expected[0]) <= FP32_BOUND
    assert len(graphs) == 1 and sum("linear" in str(node.target) for node in graphs[0].graph.nodes) > 10
    assert difference(embed(compiled, short), expected[1]) <= FP32_BOUND
    torch.compiler.reset()


class TestJoining:
    def test_config(self, make_model):
        model = make_model()
        assert not model.training
        assert model.config.contextual_token_id == 320 == len(model.processor.tokenizer) - 1
        assert model.config.decoder_config.vocab_size == 321
        assert model.config.hidden_size == HIDDEN
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

    def test_lengths_are_at_most_the_defaults(self, models):
        config = models("llama", "bert").config
        assert (config.max_seq_length, config.icl_max_seq_length) == (512, 512)

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
    def test_templates_follow_the_chat_template(self, name, backbone_dir, tmp_path):
        marker, template_prefix, template_suffix = PROMPT_TEMPLATES[name]
        shutil.copytree(backbone_dir("llama"), tmp_path, dirs_exist_ok=True)
        tokenizer = decoder_tokenizer()
        if name != "none":
            tokenizer.chat_template = f"{{% for message in messages %}}{marker}{{{{ message.content }}}}{{% endfor %}}"
        tokenizer.save_pretrained(tmp_path)
        model = Causal2VecModel.from_encoder_decoder_pretrained(backbone_dir("bert"), str(tmp_path))
        assert (model.config.template_prefix, model.config.template_suffix) == (template_prefix, template_suffix)
        assert (model.processor.template_prefix, model.processor.template_suffix) == (template_prefix, template_suffix)
        row = model.processor.tokenizer.decode(model.processor("hi", instruction="Find it")["input_ids"][0])
        assert row == f"<s>{template_prefix}Find it<|contextual|>hi{template_suffix}</s>"

    def test_the_caller_overrides_the_template(self, backbone_dir, tmp_path):
        shutil.copytree(backbone_dir("llama"), tmp_path, dirs_exist_ok=True)
        tokenizer = decoder_tokenizer()
        tokenizer.chat_template = "[INST] {{ messages[0].content }} [/INST]"
        tokenizer.save_pretrained(tmp_path)
        model = Causal2VecModel.from_encoder_decoder_pretrained(
            backbone_dir("bert"), str(tmp_path), template_prefix="Q: ", template_suffix=" A:"
        )
        assert (model.config.template_prefix, model.config.template_suffix) == ("Q: ", " A:")
        bare = Causal2VecModel.from_encoder_decoder_pretrained(
            backbone_dir("bert"), str(tmp_path), template_prefix="", template_suffix=""
        )
        assert bare.processor("hi")["input_ids"].tolist() == [[1, 320, 286, 2]]

    def test_chat_templates_of_known_models(self):
        assert find_prompt_template(None) == ("", "")
        assert find_prompt_template("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}") == ("", "")
        assert find_prompt_template("{{'<|im_start|>' + m.role}}") == ("<|im_start|>user\n", "<|im_end|>")
        assert find_prompt_template("{{ '[INST] ' + m.content + ' [/INST]' }}") == ("[INST] ", " [/INST]")

    def test_the_contextual_token_is_added_once(self, make_model, backbone_dir, tmp_path):
        first = make_model()
        first.decoder.save_pretrained(tmp_path)
        first.processor.tokenizer.save_pretrained(tmp_path)
        again = Causal2VecModel.from_encoder_decoder_pretrained(backbone_dir("bert"), str(tmp_path))
        assert len(again.processor.tokenizer) == len(first.processor.tokenizer) == 321
        assert again.config.contextual_token_id == 320
        assert torch.equal(again.get_input_embeddings().weight, first.get_input_embeddings().weight)

    def test_spare_embeddings_are_kept(self, make_model, backbone_dir, tmp_path):
        """Many decoders have more embeddings than tokens."""
        first = make_model()
        first.decoder.resize_token_embeddings(400)
        first.decoder.save_pretrained(tmp_path)
        decoder_tokenizer().save_pretrained(tmp_path)
        model = Causal2VecModel.from_encoder_decoder_pretrained(backbone_dir("bert"), str(tmp_path))
        assert model.config.decoder_config.vocab_size == 400
        assert model.config.contextual_token_id == 320

    def test_another_contextual_token(self, make_model):
        model = make_model(contextual_token="<ctx>")
        assert model.processor.tokenizer.convert_ids_to_tokens(model.config.contextual_token_id) == "<ctx>"

    @pytest.mark.parametrize("token, use", [("</s>", "EOS"), ("<s>", "BOS"), ("<pad>", "padding"), ("Ġ", "text")])
    def test_a_contextual_token_that_has_another_use(self, make_model, token, use):
        with pytest.raises(ValueError, match=f"also used for {use}"):
            make_model(contextual_token=token)

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

    def test_tied_word_embeddings(self, backbone_dir, tmp_path):
        shutil.copytree(backbone_dir("llama"), tmp_path / "lm")
        config = decoder_config("llama", 320)
        config.tie_word_embeddings = True
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
        model = Causal2VecModel.from_encoder_decoder_pretrained(backbone_dir("bert"), str(tmp_path / "lm"))
        model.save_pretrained(tmp_path / "saved")
        loaded = Causal2VecModel.from_pretrained(tmp_path / "saved")
        assert_same_weights(model, loaded)

    @pytest.mark.parametrize(
        "family, name", [("bert", "encoder.layer.1.output.dense.weight"), ("llama", "norm.weight")]
    )
    def test_a_backbone_with_a_missing_tensor(self, backbone_dir, tmp_path, family, name):
        change_weights(backbone_dir(family), tmp_path, lambda weights: weights.pop(name))
        folders = {"bert": backbone_dir("bert"), "llama": backbone_dir("llama"), family: str(tmp_path)}
        with pytest.raises(ValueError, match=f"lacks 1 tensors.*{name}"):
            Causal2VecModel.from_encoder_decoder_pretrained(folders["bert"], folders["llama"])

    def test_dtype(self, make_model, backbone_dir, tmp_path):
        model = make_model(dtype="bfloat16")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.config.dtype == torch.bfloat16
        shutil.copytree(backbone_dir("llama"), tmp_path, dirs_exist_ok=True)
        AutoModel.from_pretrained(backbone_dir("llama"), dtype="float16").save_pretrained(tmp_path)
        model = Causal2VecModel.from_encoder_decoder_pretrained(backbone_dir("bert"), str(tmp_path))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}, "not the decoder's"

    def test_attention_per_backbone(self, make_model, counting_attention):
        model = make_model(
            encoder_kwargs={"attn_implementation": "eager"}, decoder_kwargs={"attn_implementation": "counting"}
        )
        assert model.config.encoder_config._attn_implementation == model.encoder.config._attn_implementation == "eager"
        counting_attention.clear()
        model.encode("hi")
        assert counting_attention == ["LlamaAttention"] * 2

    def test_settings_reach_the_configuration(self, make_model):
        model = make_model(text_prefix="query: ", max_seq_length=20, query_instruction="Find it")
        assert model.config.text_prefix == model.processor.text_prefix == "query: "
        assert model.processor(TEXTS[1])["input_ids"].shape == (1, 20)
        assert model.config.query_instruction == "Find it"

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

    def test_no_eos(self, backbone_dir):
        with pytest.raises(ValueError, match="no EOS token"):
            Causal2VecModel.from_encoder_decoder_pretrained(backbone_dir("bert"), backbone_dir("bert"))


def recompute(folder, batch) -> torch.Tensor:
    """The method from the file alone: plain AutoModel sub-models, one unpadded row at a time."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: tensor.float() for name, tensor in read_weights(folder).items()}
    towers = {}
    for name in ("encoder", "decoder"):
        tower_config = AutoConfig.for_model(**config[f"{name}_config"])
        tower_config.dtype = torch.float32
        tower = AutoModel.from_config(tower_config).eval()
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        missing, unexpected = tower.load_state_dict(own, strict=False)
        assert not unexpected and all(key.startswith("pooler.") for key in missing)
        towers[name] = tower
    vectors = []
    for ids, mask, encoder_ids, encoder_mask in zip(*batch.values()):
        ids, encoder_ids = ids[mask.bool()], encoder_ids[encoder_mask.bool()]
        mean = towers["encoder"](input_ids=encoder_ids[None]).last_hidden_state[0].mean(0)
        hidden = linear(mean, weights["projector.linear_1.weight"], weights["projector.linear_1.bias"])
        token = linear(gelu(hidden), weights["projector.linear_2.weight"], weights["projector.linear_2.bias"])
        slot = ids.tolist().index(config["contextual_token_id"])
        embeds = towers["decoder"].get_input_embeddings()(ids).clone()
        embeds[slot] = token
        states = towers["decoder"](inputs_embeds=embeds[None]).last_hidden_state[0]
        vectors.append(torch.stack([states[slot], states[-1]], dim=1).flatten())  # t0, e0, t1, e1, ...
    return torch.stack(vectors)


class TestRecomputation:
    @torch.no_grad()
    @pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
    def test_tiny(self, tiny_model, tmp_path, max_shard_size):
        tiny_model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "5GB")
        batch = tiny_model.processor(TEXTS, instruction="Find it")
        assert list(batch) == ["input_ids", "attention_mask", "encoder_ids", "encoder_attention_mask"]
        expected = recompute(tmp_path, batch)
        assert difference(embed(tiny_model, batch), expected) <= FP32_BOUND
        assert difference(tiny_model.encode(TEXTS, instruction="Find it"), normalize(expected, dim=-1)) <= FP32_BOUND
        assert difference(expected[0], expected[1]) > 0.1

    @torch.no_grad()
    def test_bundled(self, bundled_dir, bundled_model):
        texts = TEXTS[:4]
        assert bundled_model.dtype == torch.float32
        expected = normalize(recompute(bundled_dir, bundled_model.processor(texts, instruction="Find it")), dim=-1)
        assert difference(bundled_model.encode(texts, instruction="Find it"), expected) <= 1e-5
        assert difference(expected[0], expected[1]) > 0.01
        half = copy.deepcopy(bundled_model).half()  # of a range that states could leave
        assert (torch.from_numpy(half.encode(texts, instruction="Find it")) * expected).sum(-1).min() > 0.999


class TestEncode:
    def test_a_string_and_a_list(self, tiny_model):
        vectors = tiny_model.encode(TEXTS)
        assert isinstance(vectors, np.ndarray) and vectors.dtype == np.float32
        assert vectors.shape == (len(TEXTS), 64)
        assert tiny_model.encode(TEXTS[0]).shape == (64,)
        assert tiny_model.encode(TEXTS[:1]).shape == (1, 64)
        assert difference(tiny_model.encode(TEXTS[0]), vectors[0]) <= FP32_BOUND

    def test_an_empty_list(self, tiny_model):
        vectors = tiny_model.encode([])
        assert vectors.shape == (0, 64) and vectors.dtype == np.float32
        assert tiny_model.encode([], truncate_dim=10, instruction="Find it").shape == (0, 10)
        assert tiny_model.encode([], instruction=[]).shape == (0, 64)
        assert tuple(tiny_model.encode(iter(()), convert_to_tensor=True).shape) == (0, 64)

    def test_other_iterables(self, tiny_model):
        expected = tiny_model.encode(TEXTS)
        for texts in (tuple(TEXTS), (text for text in TEXTS), np.array(TEXTS), np.array(TEXTS, dtype=object)):
            assert difference(tiny_model.encode(texts), expected) <= SAME

    @pytest.mark.parametrize("batch_size", [1, 3, 100])
    def test_order_is_restored(self, tiny_model, batch_size):
        assert sorted(TEXTS, key=len) not in (TEXTS, TEXTS[::-1])
        vectors = tiny_model.encode(TEXTS, batch_size=batch_size)
        for text, vector in zip(TEXTS, vectors):
            assert difference(tiny_model.encode(text), vector) <= FP32_BOUND

    def test_equals_forward(self, tiny_model):
        raw = tiny_model.encode(TEXTS, normalize_embeddings=False)
        assert difference(raw, embed(tiny_model, tiny_model.processor(TEXTS))) <= FP32_BOUND
        assert (np.abs(np.linalg.norm(raw, axis=1) - 1) > 0.1).all()
        unit = tiny_model.encode(TEXTS)
        assert np.allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
        assert difference(unit, raw / np.linalg.norm(raw, axis=1, keepdims=True)) <= 1e-6

    @pytest.mark.parametrize("dim", [2, 7, 64])
    def test_any_prefix_keeps_half_of_each_state(self, tiny_model, dim):
        raw = tiny_model.encode(TEXTS, normalize_embeddings=False)
        expected = raw[:, :dim]
        for part, whole in zip(tiny_model.split_states(expected), tiny_model.split_states(raw)):
            assert part.shape[1] in (dim // 2, dim - dim // 2) and np.array_equal(part, whole[:, : part.shape[1]])
        assert (
            difference(tiny_model.encode(TEXTS, truncate_dim=dim, normalize_embeddings=False), expected) <= FP32_BOUND
        )
        unit = tiny_model.encode(TEXTS, truncate_dim=dim)
        assert unit.shape == (len(TEXTS), dim)
        assert difference(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True)) <= 1e-6
        assert tiny_model.encode("hi", truncate_dim=dim).shape == (dim,)

    @pytest.mark.parametrize("dim", [0, -2, 65, 8.0, "8", True], ids=repr)
    def test_no_such_dimension(self, tiny_model, dim):
        with pytest.raises(ValueError, match="`truncate_dim` must be an integer between 1 and 64"):
            tiny_model.encode(TEXTS, truncate_dim=dim)

    @pytest.mark.parametrize("batch_size", [0, -1, 2.0, "2", None, True], ids=repr)
    def test_no_such_batch_size(self, tiny_model, batch_size):
        with pytest.raises(ValueError, match="`batch_size` must be a positive integer"):
            tiny_model.encode(TEXTS, batch_size=batch_size)

    def test_tensors(self, tiny_model):
        vectors = tiny_model.encode(TEXTS, convert_to_tensor=True)
        assert isinstance(vectors, torch.Tensor) and vectors.dtype == torch.float32
        assert vectors.device.type == "cpu" and not vectors.requires_grad
        assert difference(vectors.numpy(), tiny_model.encode(TEXTS)) <= SAME
        assert tuple(tiny_model.encode("hi", convert_to_tensor=True).shape) == (64,)
        weight = torch.ones(64, requires_grad=True)
        (vectors @ weight).sum().backward()  # no tensor of the inference mode
        assert weight.grad.abs().sum() > 0

    def test_bf16_gives_fp32_numpy(self, bf16_dir):
        model = Causal2VecModel.from_pretrained(bf16_dir)
        assert model.dtype == torch.bfloat16
        for vectors in (model.encode(TEXTS), model.encode("hi"), model.encode([])):
            assert vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(model.encode(TEXTS), axis=1), 1, atol=1e-5), "normalised in bf16"

    def test_max_length(self, tiny_model):
        cut = tiny_model.encode(TEXTS[1], max_length=8)
        assert difference(cut, tiny_model.encode(TEXTS[1])) > 1e-3
        expected = embed(tiny_model, tiny_model.processor(TEXTS[1], max_length=8))
        assert difference(cut, normalize(expected, dim=-1)[0]) <= FP32_BOUND
        with pytest.raises(ValueError, match="leaves no room"):
            tiny_model.encode("hi", max_length=3)

    def test_modes_are_restored(self, make_model):
        model = make_model()
        assert not model.training
        expected = model.encode(TEXTS)
        assert not model.training
        model.train()
        model.encoder.eval()  # as for a frozen encoder
        modes = {name: module.training for name, module in model.named_modules()}
        assert difference(model.encode(TEXTS), expected) <= SAME, "dropout was on"
        assert {name: module.training for name, module in model.named_modules()} == modes
        with pytest.raises(ValueError):
            model.encode(TEXTS, max_length=3)
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert model.training and model.decoder.training and not model.encoder.training

    def test_threads_and_training_mode(self, make_model):
        """The first to come is the first to leave, while the other has yet to read its texts."""
        model = make_model().eval()
        expected = model.encode(TEXTS[0])
        model.train()
        modes = {name: module.training for name, module in model.named_modules()}
        second_is_in, first_is_out, vectors = threading.Event(), threading.Event(), {}

        def wait(*_):
            if threading.current_thread().name == "first":
                second.start()
                assert second_is_in.wait(60)
            else:
                second_is_in.set()
                assert first_is_out.wait(60)

        def encode():
            vectors[threading.current_thread().name] = model.encode(TEXTS[0])

        hook = model.encoder.register_forward_pre_hook(wait)
        first, second = (threading.Thread(target=encode, name=name, daemon=True) for name in ("first", "second"))
        first.start()
        first.join()
        assert not model.training, "the second is not done"
        hook.remove()
        first_is_out.set()
        second.join()
        for name in ("first", "second"):
            assert difference(vectors[name], expected) <= SAME, name
        assert {name: module.training for name, module in model.named_modules()} == modes

    def test_no_graph_is_built(self, make_model):
        model = make_model()
        seen = []
        model.projector.register_forward_hook(lambda *_: seen.append(torch.is_inference_mode_enabled()))
        model.encode("hi")
        assert seen == [True]
        assert all(parameter.grad is None for parameter in model.parameters())
        model(**model.processor("hi")).embeddings.sum().backward()  # and training goes on afterwards
        assert model.projector.linear_1.weight.grad.abs().sum() > 0

    def test_outputs_leave_the_model_batch_by_batch(self, make_model):
        model = make_model()
        sizes = []
        model.projector.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
        model.encode(TEXTS, batch_size=4)
        assert sizes == [4, 2]

    def test_an_instruction_matters(self, tiny_model):
        plain, with_instruction = tiny_model.encode(TEXTS), tiny_model.encode(TEXTS, instruction="Find it")
        assert np.linalg.norm(plain - with_instruction, axis=1).min() > 1e-2

    def test_one_instruction_per_text(self, tiny_model):
        instructions = ["Find it", None, "Sort", "", "Find it", "A much longer instruction than the others are"]
        vectors = tiny_model.encode(TEXTS, instruction=instructions, batch_size=4)
        for text, instruction, vector in zip(TEXTS, instructions, vectors):
            assert difference(tiny_model.encode(text, instruction=instruction), vector) <= FP32_BOUND
        assert difference(tiny_model.encode(TEXTS), vectors) > 1e-2

    def test_examples(self, tiny_model):
        examples = [{"query": "hi", "response": "ho"}, {"query": "a", "response": "b"}]
        vectors = tiny_model.encode(TEXTS, instruction="Find it", examples=examples, batch_size=4)
        expected = embed(tiny_model, tiny_model.processor(TEXTS, "Find it", examples))
        assert difference(vectors, normalize(expected, dim=-1)) <= FP32_BOUND
        assert np.linalg.norm(vectors - tiny_model.encode(TEXTS, instruction="Find it"), axis=1).min() > 1e-2
        assert difference(tiny_model.encode(TEXTS, examples=[]), tiny_model.encode(TEXTS)) <= SAME

    def test_examples_are_for_all_texts(self, tiny_model):
        with pytest.raises(TypeError, match="Example 0 must be a dict, got list"):
            tiny_model.encode(["hi", "ho"], examples=[[{"query": "a", "response": "b"}], []])

    def test_queries_and_documents(self, tiny_model, make_model):
        assert tiny_model.config.query_instruction.startswith("Given a question")
        queries = tiny_model.encode_query(TEXTS)
        assert difference(queries, tiny_model.encode(TEXTS, instruction=tiny_model.config.query_instruction)) <= SAME
        assert (
            difference(tiny_model.encode_query(TEXTS, instruction="Sort"), tiny_model.encode(TEXTS, instruction="Sort"))
            <= SAME
        )
        assert difference(tiny_model.encode_document(TEXTS), tiny_model.encode(TEXTS)) <= SAME
        assert difference(queries, tiny_model.encode_document(TEXTS)) > 1e-2
        without = make_model()
        assert without.config.query_instruction is None
        assert difference(without.encode_query(TEXTS), without.encode(TEXTS)) <= SAME

    def test_queries_and_documents_take_what_encode_takes(self, tiny_model):
        for method in (tiny_model.encode_query, tiny_model.encode_document):
            vectors = method(TEXTS, batch_size=2, truncate_dim=8, convert_to_tensor=True, normalize_embeddings=False)
            assert tuple(vectors.shape) == (len(TEXTS), 8)
            assert method("hi").shape == (64,)
            assert method([]).shape == (0, 64)

    def test_options_are_named(self, tiny_model):
        with pytest.raises(TypeError, match="positional"):
            tiny_model.encode(TEXTS, "Find it")

    def test_progress_bar(self, tiny_model, monkeypatch):
        transformers.utils.logging.enable_progress_bar()  # another test may have switched transformers' bars off
        for show, expected in ((True, True), (False, False), (None, False)):  # None: short work, no terminal
            stream = io.StringIO()
            monkeypatch.setattr("sys.stderr", stream)
            tiny_model.encode(TEXTS, batch_size=2, show_progress_bar=show)
            assert ("Encoding" in stream.getvalue()) is expected
            if show:
                assert "100%" in stream.getvalue()

    def test_scores_of_the_snippet(self, tiny_model):
        queries = tiny_model.encode(["how much protein should a female eat"], instruction="Find it")
        passages = tiny_model.encode(TEXTS)
        scores = queries @ passages.T
        assert scores.shape == (1, len(TEXTS)) and scores.dtype == np.float32
        assert (np.abs(scores) <= 1 + 1e-6).all()


class TestTruncation:
    """The encoder of the tiny model reads 40 tokens, its decoder 512."""

    TEXTS = ["hi", "a b " * 12, "hi", "word " * 30, "word " * 600]

    def test_texts_are_counted_and_told_once(self, make_model, caplog):
        model = make_model(max_seq_length=20)
        expected = model.encode(self.TEXTS, truncation="silent")
        assert model.truncated == {"texts": 3, "decoder": 3, "encoder": 2} and not caplog.records
        vectors = model.encode(self.TEXTS, batch_size=1)
        assert difference(vectors, expected) <= FP32_BOUND
        (record,) = caplog.records
        for fact in ("3 of 5", "3 by the decoder (at 20", "2 by the encoder (at 40"):
            assert fact in record.getMessage()
        model.encode(self.TEXTS[1:2], max_length=100)
        assert model.truncated == {"texts": 6, "decoder": 6, "encoder": 4} and len(caplog.records) == 1

    @pytest.mark.parametrize(
        "max_length, facts", [(20, ["position 1 ", "decoder", "20 tokens"]), (None, ["position 3 ", "encoder", "40"])]
    )
    def test_they_can_be_refused(self, tiny_model, max_length, facts):
        seen = []
        hook = tiny_model.encoder.register_forward_pre_hook(lambda *_: seen.append(1))
        with pytest.raises(ValueError) as error:
            tiny_model.encode(self.TEXTS, max_length=max_length, truncation="error")
        assert all(fact in str(error.value) for fact in facts) and not seen
        tiny_model.encode(self.TEXTS[:3], truncation="error")
        hook.remove()
        assert seen

    def test_no_such_choice(self, tiny_model):
        with pytest.raises(ValueError, match="`truncation` must be 'warn', 'error' or 'silent', got True"):
            tiny_model.encode("hi", truncation=True)


class EncodingDataset(torch.utils.data.Dataset):
    def __init__(self, model, texts):
        self.model, self.texts = model, texts

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return self.model.encode(self.texts[i])


def encode_and_send(pickled: bytes, texts: list[str], connection) -> None:
    connection.send(pickle.loads(pickled).encode(texts, batch_size=4))


class TestProcesses:
    def test_copies(self, tiny_model):
        expected = tiny_model.encode(TEXTS, instruction="Find it")
        for other in (copy.deepcopy(tiny_model), pickle.loads(pickle.dumps(tiny_model))):
            assert difference(other.encode(TEXTS, instruction="Find it"), expected) <= SAME
            with torch.no_grad():
                other.projector.linear_1.weight.zero_()
        assert difference(tiny_model.encode(TEXTS, instruction="Find it"), expected) <= SAME, "a copy shares weights"

    def test_a_data_loaders_worker(self, tiny_model):
        loader = torch.utils.data.DataLoader(EncodingDataset(tiny_model, TEXTS), batch_size=3, num_workers=1)
        vectors = torch.cat(list(loader))
        assert difference(vectors, tiny_model.encode(TEXTS)) <= FP32_BOUND

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_process_forked_while_a_thread_encodes(self, make_model):
        model = make_model()
        expected = model.encode(TEXTS, instruction="Find it")
        model.train()
        locked, forked = threading.Event(), threading.Event()

        def hold_all():
            with model._eval_mode(model), decoder_utils._SWITCHING, model.prefix_cache._lock, model._counting:
                locked.set()
                forked.wait(60)

        thread = threading.Thread(target=hold_all, daemon=True)
        thread.start()
        assert locked.wait(60) and not model.training
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # ends a child that waits for ever
            right = model.training
            for _ in range(2):
                right &= difference(model.encode(TEXTS, instruction="Find it", packed=True), expected) <= FP32_BOUND
            os._exit(0 if right and model.training else 1)
        forked.set()
        thread.join()
        assert os.waitpid(child, 0)[1] == 0 and model.training

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_no_fork_while_a_tokenizer_works(self, tiny_model):
        """A tokenizer's own locks would stay closed in the child."""
        working, order = threading.Event(), []

        def tokenize():
            with runtime_utils.TOKENIZING:
                working.set()
                time.sleep(0.2)
                order.append("tokenized")

        thread = threading.Thread(target=tokenize)
        thread.start()
        assert working.wait(60)
        child = os.fork()
        order.append("forked")
        if child == 0:
            signal.alarm(60)  # ends a child that waits for ever
            os._exit(0 if len(tiny_model.processor("hi")["input_ids"]) == 1 else 1)
        thread.join()
        assert os.waitpid(child, 0)[1] == 0 and order == ["tokenized", "forked"]
        tiny_model.processor("hi")

    def test_a_spawned_process(self, tiny_model):
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=encode_and_send, args=(pickle.dumps(tiny_model), TEXTS, sender))
        process.start()
        sender.close()
        try:
            vectors = receiver.recv()
        finally:
            process.join()
        assert process.exitcode == 0
        assert difference(vectors, tiny_model.encode(TEXTS)) <= FP32_BOUND


def test_attention_for_an_unknown_tower_is_refused(saved_dir):
    with pytest.raises(ValueError, match=r"keys \['decoder_config', 'encoder_config'\], got \['encoder'\]"):
        Causal2VecModel.from_pretrained(saved_dir, attn_implementation={"encoder": "eager"})


def test_a_length_beyond_the_decoders_positions_is_refused(tiny_model):
    with pytest.raises(ValueError, match="`max_length` must be at most 512"):
        tiny_model.encode("text", max_length=513)
