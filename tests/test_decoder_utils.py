"""decoder_utils.py: no batching and no packing changes a vector."""

import importlib.util
import logging
import sys
from types import SimpleNamespace
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from conftest import TEXTS, gradients, plain
from hypothesis import given, settings
from hypothesis import strategies as st

import decoder_utils
from decoder_utils import Packing, groups_of_like_length, packed_states


INSTRUCTION = "Given a question, retrieve passages that answer it"


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt_neox", "olmo2"]  # Gemma 2 has no SDPA


@pytest.fixture
def model(make_model):
    return make_model()


class TestNoMask:
    @pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
    def test_padding_on_the_right_needs_none(self, family, make_model):
        model = make_model(family)
        model.prefix_cache.max_bytes = 0
        masks = []
        model.decoder.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        with torch.no_grad():
            masked = model(**model.processor(TEXTS, INSTRUCTION)).embeddings
            unmasked = model(**model.processor(TEXTS, INSTRUCTION, return_prefix_ids=True), packed=False).embeddings
        assert masks[0] is not None and masks[1] is None
        torch.testing.assert_close(unmasked, masked, atol=1e-5, rtol=1e-5)

    def test_a_decoder_that_looks_ahead_keeps_it(self, model):
        model.decoder.config.is_causal = False
        with torch.no_grad():
            masked = model(**model.processor(TEXTS, INSTRUCTION)).embeddings
            found = model(**model.processor(TEXTS, INSTRUCTION, return_prefix_ids=True)).embeddings
        torch.testing.assert_close(found, masked, atol=1e-5, rtol=1e-5)
        assert np.abs(model.encode(TEXTS) - plain(model, TEXTS)).max() <= 1e-5


class TestGroups:
    @settings(max_examples=60, deadline=None)
    @given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40))
    def test_little_padding(self, lengths):
        groups = groups_of_like_length(lengths, waste=0.15, min_tokens=128)
        assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
        for group in groups:
            longest = max(lengths[row] for row in group)
            padded = [i for i, row in enumerate(group) if lengths[row] < 0.85 * longest]
            assert all(i * longest < 128 for i in padded)

    def test_the_encoder_reads_rows_of_like_length_together(self, model):
        seen = []
        model.encoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        texts = ["hi"] * 40 + TEXTS[:2] * 10
        encoded = model.encode(texts, batch_size=60, packed=True)
        assert len(seen) > 1 and sum(rows for rows, _ in seen) == 60
        assert sum(rows * length for rows, length in seen) < 60 * max(length for _, length in seen)
        assert np.abs(encoded - plain(model, texts)).max() <= 1e-5


class TestPacked:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_any_lengths_with_and_without_prefix(self, family, make_model, monkeypatch):
        model = make_model(family)
        results = []
        monkeypatch.setattr(
            "modeling_causal2vec.packed_states", lambda *args: results.append(packed_states(*args)) or results[-1]
        )
        text = st.text(alphabet="abc dé.", max_size=60) | st.sampled_from(TEXTS)

        @settings(max_examples=6, deadline=None, derandomize=True)
        @given(texts=st.lists(text, min_size=2, max_size=7), instruction=st.sampled_from([None, INSTRUCTION]))
        def check(texts, instruction):
            encoded = model.encode(texts, instruction=instruction, packed=True)
            assert np.abs(encoded - plain(model, texts, instruction)).max() <= 1e-5

        check()
        assert results and all(states is not None for states in results)
        assert model.prefix_cache.hits > 0
        assert model.decoder.config._attn_implementation == "sdpa"

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_gpus_kernel_gets_the_same_rows(self, family, make_model, monkeypatch):
        # The kernel itself needs a GPU: here one with its contract stands in for it.
        calls = []

        def varlen_attn(query, key, value, query_ends, key_ends, max_q, max_k, *, scale, window_size, enable_gqa):
            assert query_ends.dtype == key_ends.dtype == torch.int32 and window_size[1] == 0
            calls.append(len(key) > len(query))
            outputs = []
            ends = zip(query_ends[:-1], query_ends[1:], key_ends[:-1], key_ends[1:])
            for q_start, q_end, k_start, k_end in ends:
                length, kept = int(q_end - q_start), int(k_end - k_start - (q_end - q_start))
                assert length <= max_q and kept + length <= max_k
                back = torch.arange(kept, kept + length)[:, None] - torch.arange(kept + length)
                mask = (back >= 0) & ((back <= window_size[0]) | torch.tensor(window_size[0] == -1))
                q, k, v = (
                    t[start:end].transpose(0, 1)
                    for t, start, end in ((query, q_start, q_end), (key, k_start, k_end), (value, k_start, k_end))
                )
                attended = torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
                )
                outputs.append(attended.transpose(0, 1))
            return torch.cat(outputs)

        monkeypatch.setattr(decoder_utils, "varlen_attn", varlen_attn)
        monkeypatch.setattr(decoder_utils, "has_varlen_kernel", lambda query: True)
        model = make_model(family)
        for instruction in (None, INSTRUCTION):
            encoded = model.encode(TEXTS, instruction=instruction, packed=True)
            assert np.abs(encoded - plain(model, TEXTS, instruction)).max() <= 1e-5
        assert set(calls) == {False, True}

    def test_the_gpus_kernel_is_not_used_on_a_cpu(self):
        assert not decoder_utils.has_varlen_kernel(torch.zeros(1))

    def test_a_kernel_without_grouped_heads_is_not_used(self, monkeypatch):
        def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
            """As torch 2.11's."""

        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen_attn))
        spec = importlib.util.spec_from_file_location("packing_beside_an_older_torch", decoder_utils.__file__)
        older = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, older)
        spec.loader.exec_module(older)
        assert older.varlen_attn is None

    def test_what_the_kernel_is_given_is_what_torch_takes(self, monkeypatch):
        if decoder_utils.varlen_attn is None:
            pytest.skip("this torch has no kernel for grouped heads")
        monkeypatch.setattr(decoder_utils, "varlen_attn", create_autospec(decoder_utils.varlen_attn))
        rows = torch.zeros(1, 2, 5, 8)  # (1, heads, total, head_dim)
        decoder_utils._attend_varlen(
            rows, rows[:, :1], rows[:, :1], decoder_utils.Packing([3, 2]), None, None, 0.5, 0.0
        )
        decoder_utils.varlen_attn.assert_called_once()

    def test_the_decoder_reads_no_padding(self, model):
        seen = []
        model.decoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
        )
        model.encode(TEXTS, packed=True)
        assert seen == [(1, int(model.processor(TEXTS)["attention_mask"].sum()))]

    def test_gradients(self, model):
        batch = model.processor(TEXTS, INSTRUCTION, return_prefix_ids=True)
        plain, packed = (gradients(model, batch, packed=packed) for packed in (False, True))
        for name, gradient in plain.items():
            assert (packed[name] - gradient).abs().max() <= 1e-5 * max(1.0, gradient.abs().max()), name

    def test_other_attention_reads_padded_rows(self, make_model, caplog):
        model = make_model(decoder_kwargs={"attn_implementation": "eager"})
        with caplog.at_level(logging.DEBUG, logger="decoder_utils"):
            encoded = model.encode(TEXTS, instruction=INSTRUCTION, packed=True)
        assert np.abs(encoded - plain(model, TEXTS, INSTRUCTION)).max() <= 1e-5
        assert "its attention cannot be replaced" in caplog.text

    def test_a_layer_that_was_not_asked(self, model, caplog, monkeypatch):
        monkeypatch.setattr(model.decoder.config, "num_hidden_layers", 3)  # one more than there are
        with caplog.at_level(logging.DEBUG, logger="decoder_utils"):
            assert packed_states(model.decoder, torch.zeros(2, 4, 32), Packing([4, 2])) is None
        assert "not all of its layers" in caplog.text

    def test_the_name_works_as_an_attention_of_its_own(self, model):
        before = model.encode(TEXTS, instruction=INSTRUCTION)
        model.set_attn_implementation({"decoder_config": decoder_utils.PACKED_ATTENTION})
        assert np.abs(model.encode(TEXTS, instruction=INSTRUCTION) - before).max() <= 1e-5
        assert np.abs(model.encode(TEXTS, instruction=INSTRUCTION, packed=True) - before).max() <= 1e-5
