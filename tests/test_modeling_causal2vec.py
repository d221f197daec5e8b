"""modeling_causal2vec.py: every promised backbone, invariances, gradients, and the method recomputed from its file."""

import copy
import inspect
import json
import logging

import pytest
import torch
from conftest import (
    FP32_BOUND,
    PAIRS,
    SAME,
    TEXTS,
    decoder_config,
    difference,
    embed,
    encoder_config,
    read_weights,
)
from torch.nn.functional import gelu, linear, normalize
from transformers import (
    AutoConfig,
    AutoModel,
    DynamicCache,
)

from configuration_causal2vec import Causal2VecConfig
from modeling_causal2vec import Causal2VecModel, masked_mean


HIDDEN = 32


# In bf16 (8 bits of mantissa) padding and batching reorder roundings. Of the numbers of a normalised embedding:
BF16_BOUND = 0.02
BF16_COSINE = 0.999


@pytest.fixture(params=PAIRS, ids="-".join)
def model(models, request):
    return models(*request.param)


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


def one_by_one(model, texts, **kwargs) -> torch.Tensor:
    return torch.cat([embed(model, model.processor(text, **kwargs)) for text in texts])


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

    def test_eager_equals_sdpa(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        eager = Causal2VecModel.from_pretrained(tmp_path, attn_implementation="eager")
        batch = model.processor(TEXTS)
        for side in ("left", "right"):
            padded = pad(batch, side, side)
            assert difference(embed(eager, padded), embed(model, padded)) <= 10 * FP32_BOUND  # another kernel

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

    def test_a_cached_prefix(self, model):
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
            one = DynamicCache(config=model.decoder.config)
            model.decoder(input_ids=torch.tensor([prefix]), past_key_values=one, use_cache=True)
            out = model(**batch, past_key_values=cache, use_cache=True)
        assert difference(out.embeddings, expected) <= FP32_BOUND
        assert out.past_key_values is cache
        longest = int(batch["attention_mask"].sum(-1).argmax())  # needs no mask
        alone = dict(
            input_ids=batch["input_ids"][longest, None], encoder_ids=model.processor(TEXTS[longest])["encoder_ids"]
        )
        assert difference(embed(model, alone, past_key_values=one), expected[longest, None]) <= FP32_BOUND

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
        with pytest.raises(ValueError, match=f"id {slot}.* row 1 .*{count} times"):
            model(**batch)

    def test_nothing_for_the_encoder(self, models):
        model = models("llama", "bert")
        with pytest.raises(ValueError, match="`encoder_ids`.*`encoder_embedding`"):
            model(input_ids=model.processor("hi")["input_ids"])

    def test_no_tokenizers(self, models):
        model = Causal2VecModel(copy.deepcopy(models("llama", "bert").config))
        with pytest.raises(ValueError, match="no tokenizers"):
            model.encode("hi")
        model.processor = models("llama", "bert").processor
        assert model.encode("hi").shape == (64,)

    def test_more_tokens_than_the_encoder_has_positions(self):
        """RoBERTa's first position is behind its padding id: 40 embeddings hold 38 tokens."""
        towers = dict(encoder_config=encoder_config("roberta", 200), decoder_config=decoder_config("llama", 300))
        with pytest.raises(ValueError, match="`encoder_max_seq_length` must be at most 38.*roberta.*39"):
            Causal2VecModel(
                Causal2VecConfig(**towers, encoder_max_seq_length=39, max_seq_length=64, icl_max_seq_length=64)
            )


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

    def test_forward_takes_what_the_processor_gives(self, models):
        model = models("llama", "bert")
        assert set(model.processor.model_input_names) <= set(inspect.signature(model.forward).parameters)
        # sentence-transformers' trainer takes every name that ends so for another sentence
        assert [name for name in model.processor.model_input_names if name.endswith("_input_ids")] == []


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


class TestConstruction:
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
