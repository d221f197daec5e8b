"""prefix_cache.py: sharing a prefix changes the time and nothing else."""

import copy
import logging
import pickle
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import DECODERS, TEXTS, gradients, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import parametrize, prune
from transformers import AutoConfig, AutoModel

from modeling_causal2vec import Causal2VecModel
from prefix_cache import ModuleScan, PrefixCache, SharedPrefix, compute_prefix, expand_prefix, make_bidirectional


INSTRUCTION = "Given a question, retrieve passages that answer it"
EXAMPLES = [
    {"query": "How much protein?", "response": "46 grams per day."},
    {"query": "What jumps over the lazy dog?", "response": "The quick brown fox."},
]
INSTRUCTIONS = [INSTRUCTION, "Is the dog lazy?", None, "x"]


@pytest.fixture
def model(make_model):
    return make_model()


@contextmanager
def decoder_tokens(model):
    """Counts the tokens that go through the decoder."""
    seen = []
    handle = model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    yield seen
    handle.remove()


class TestEqualsThePlainPath:
    @pytest.mark.parametrize("family", DECODERS)
    def test_any_lengths_and_prefixes(self, family, make_model):
        model = make_model(family)
        model.prefix_cache.min_tokens = 1
        text = st.text(alphabet="abc dé.", max_size=60) | st.sampled_from(TEXTS)
        rows = st.lists(st.tuples(text, st.sampled_from(INSTRUCTIONS)), min_size=1, max_size=7)

        @settings(max_examples=6, deadline=None, derandomize=True)
        @given(
            rows=rows,
            examples=st.sampled_from([None, EXAMPLES]),
            side=st.sampled_from(["left", "right"]),
            packed=st.booleans(),
        )
        def check(rows, examples, side, packed):
            texts, instructions = [row[0] for row in rows], [row[1] for row in rows]
            model.processor.tokenizer.padding_side = side
            expected = plain(model, texts, instructions, examples)
            for _ in ("cold", "warm"):
                encoded = model.encode(texts, instruction=instructions, examples=examples, batch_size=3, packed=packed)
                assert np.abs(encoded - expected).max() <= 1e-5

        check()
        assert model.prefix_cache.hits > 0

    @pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
    def test_eager_attention(self, family, make_model):
        model = make_model(family, decoder_kwargs={"attn_implementation": "eager"})
        expected = plain(model, TEXTS, INSTRUCTION)
        assert np.abs(model.encode(TEXTS, instruction=INSTRUCTION) - expected).max() <= 1e-5
        assert len(model.prefix_cache) == 1

    @pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
    def test_the_window_is_shorter_than_the_prefix(self, family, make_model):
        model = make_model(family)
        prefix_ids = model.processor.encode_prefix(INSTRUCTION)
        prefix = compute_prefix(model.decoder, prefix_ids)
        windows = [layer.sliding_window for layer in prefix.layers]
        assert 8 in windows and len(prefix_ids) > 8
        kept = [layer.keys.shape[-2] for layer in prefix.layers]
        assert kept == [len(prefix_ids) if window is None else window - 1 for window in windows]

    def test_each_large_group_of_texts_has_its_prefix(self, model):
        """Texts whose instruction is rare are read in whole rows, together."""
        texts, instructions = TEXTS * 2, [*INSTRUCTIONS, *INSTRUCTIONS, INSTRUCTION, INSTRUCTION, "x", None]
        expected = plain(model, texts, instructions)
        with decoder_tokens(model) as seen:
            encoded = model.encode(texts, instruction=instructions, batch_size=4, packed=False)
        assert np.abs(encoded - expected).max() <= 1e-5
        assert [rows for rows, _ in seen] == [4, 4, 1, 4] and len(model.prefix_cache) == 1

    def test_bfloat16_stays_close(self, make_model):
        model = make_model("qwen3", dtype=torch.bfloat16)
        shared = model.encode(TEXTS, instruction=INSTRUCTION)
        assert len(model.prefix_cache) == 1
        model.prefix_cache.max_entries = None
        whole = model.encode(TEXTS, instruction=INSTRUCTION)
        assert (shared * whole).sum(-1).min() > 0.999

    def test_forward_takes_tensors(self, model):
        batch = model.processor(TEXTS, INSTRUCTION)
        with torch.no_grad():
            whole = model(**batch).embeddings
            shared = model(**model.processor(TEXTS, INSTRUCTION, return_prefix_ids=True)).embeddings
        assert len(model.prefix_cache) == 1
        torch.testing.assert_close(shared, whole, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("kwargs", [{"use_cache": True}, {"output_last_hidden_state": True}, {"encoder_ids": None}])
    def test_forward_refuses_what_it_would_not_heed(self, model, kwargs):
        with pytest.raises(ValueError, match="encoder_ids" if "encoder_ids" in kwargs else "prefix_ids"):
            model(**{**model.processor(TEXTS, INSTRUCTION, return_prefix_ids=True), **kwargs})


class TestWhatIsSaved:
    def test_a_prefix_is_read_once(self, model):
        prefix_len = len(model.processor.encode_prefix(INSTRUCTION, EXAMPLES))
        with decoder_tokens(model) as cold:
            model.encode(TEXTS, instruction=INSTRUCTION, examples=EXAMPLES, batch_size=2, packed=False)
        assert cold[0] == (1, prefix_len)
        assert all(tokens < prefix_len for _, tokens in cold[1:])
        with decoder_tokens(model) as warm:
            model.encode(TEXTS, instruction=INSTRUCTION, examples=EXAMPLES, batch_size=2, packed=False)
        assert warm == cold[1:]
        assert (model.prefix_cache.hits, model.prefix_cache.misses) == (5, 1)

    def test_single_queries_warm_up(self, model):
        lengths = []
        for _ in range(3):
            with decoder_tokens(model) as seen:
                model.encode("hi", instruction=INSTRUCTION)
            lengths.append([tokens for _, tokens in seen])
        prefix_len = len(model.processor.encode_prefix(INSTRUCTION))
        assert lengths[0] == [prefix_len + lengths[2][0]]  # first: in one piece, as it may be the only one
        assert lengths[1] == [prefix_len, *lengths[2]]

    def test_rows_of_one_prefix_share_its_memory(self, model):
        prefix = compute_prefix(model.decoder, model.processor.encode_prefix(INSTRUCTION))
        expanded = expand_prefix(prefix, 5)
        for layer, own in zip(expanded.layers, prefix.layers):
            assert layer.keys.shape[0] == 5
            assert layer.keys.data_ptr() == own.keys.data_ptr()

    def test_short_prefixes_are_left_alone(self, model):
        model.encode(TEXTS)  # BOS
        assert (len(model.prefix_cache), model.prefix_cache.misses) == (0, 0)


def optimizer_step(model):
    model.requires_grad_(True)
    model(**model.processor(TEXTS, INSTRUCTION)).embeddings.pow(2).mean().backward()
    torch.optim.SGD(model.decoder.parameters(), lr=0.1).step()


def load_state_dict(model):
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})


def assign_state_dict(model):
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()}, assign=True)


def write_through_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def there_and_back(model):
    model.to(torch.bfloat16)
    model.to(torch.float32)


def another_parameter(model):
    projection = model.decoder.layers[0].self_attn.k_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach() * 1.5)


def another_module(model):
    attention = model.decoder.layers[0].self_attn
    attention.v_proj = copy.deepcopy(attention.v_proj)
    attention.v_proj.weight.data.mul_(1.5)


def another_layer(model):
    layer = copy.deepcopy(model.decoder.layers[0])
    layer.mlp.down_proj.weight.data.mul_(1.5)
    model.decoder.layers[0] = layer


CHANGES = [optimizer_step, load_state_dict, assign_state_dict, write_through_data, there_and_back]
CHANGES += [another_parameter, another_module, another_layer]


def pruned(model):
    """Adds a parameter and a buffer to a module."""
    prune.random_unstructured(model.decoder.layers[0].self_attn.k_proj, "weight", 0.5)


def parametrized(model):
    """Adds a module to one that had none."""
    parametrize.register_parametrization(model.decoder.layers[0].self_attn.v_proj, "weight", torch.nn.Tanh())


def both_ways(model):
    make_bidirectional(model.decoder)


CHANGES += [pruned, parametrized, both_ways]


class TestNeverStale:
    @pytest.mark.parametrize("change", CHANGES)
    def test_other_weights(self, model, change):
        before = model.encode(TEXTS, instruction=INSTRUCTION)
        assert len(model.prefix_cache) == 1
        change(model)
        after = model.encode(TEXTS, instruction=INSTRUCTION)
        assert np.abs(after - before).max() > 1e-4
        assert np.abs(after - plain(model, TEXTS, INSTRUCTION)).max() <= 1e-5

    def test_other_dtype(self, model):
        before = model.encode(TEXTS, instruction=INSTRUCTION)
        model.to(torch.float64)
        assert np.abs(model.encode(TEXTS, instruction=INSTRUCTION) - before).max() <= 1e-5
        assert model.prefix_cache.hits == 0

    def test_other_attention(self, model):
        model.encode(TEXTS, instruction=INSTRUCTION)
        model.set_attn_implementation("eager")
        model.encode(TEXTS, instruction=INSTRUCTION)
        assert (model.prefix_cache.hits, model.prefix_cache.misses) == (0, 2)

    def test_autocast(self, model):
        before = model.encode(TEXTS, instruction=INSTRUCTION)
        with torch.autocast("cpu", torch.bfloat16):
            model.encode(TEXTS, instruction=INSTRUCTION)
        assert np.array_equal(model.encode(TEXTS, instruction=INSTRUCTION), before)
        assert model.prefix_cache.hits == 0

    def test_resized_embeddings(self, model):
        model.encode(TEXTS, instruction=INSTRUCTION)
        model.resize_token_embeddings(400, mean_resizing=False)
        after = model.encode(TEXTS, instruction=INSTRUCTION)
        assert np.abs(after - plain(model, TEXTS, INSTRUCTION)).max() <= 1e-5
        assert model.prefix_cache.hits == 0

    def test_adapters(self, model):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=r"decoder\..*\.(q_proj|v_proj)", init_lora_weights=False)
        base = model.encode(TEXTS, instruction=INSTRUCTION)
        adapted = peft.get_peft_model(model, config, adapter_name="one").eval()
        adapted.add_adapter("two", config)

        def check(differs_from):
            vectors = model.encode(TEXTS, instruction=INSTRUCTION)
            assert np.abs(vectors - plain(model, TEXTS, INSTRUCTION)).max() <= 1e-5
            assert np.abs(vectors - differs_from).max() > 1e-3
            return vectors

        one = check(differs_from=base)
        adapted.set_adapter("two")
        two = check(differs_from=one)
        with adapted.disable_adapter():
            assert np.abs(check(differs_from=two) - base).max() <= 1e-5
        check(differs_from=base)
        misses = model.prefix_cache.misses
        adapted.merge_adapter()
        assert np.abs(check(differs_from=base) - two).max() <= 1e-5
        assert model.prefix_cache.misses > misses
        adapted.unmerge_adapter()
        check(differs_from=one)

    def test_modules_are_listed_once(self, model, monkeypatch):
        """A walk over the modules of a deep decoder takes longer than anything else that is done beside the towers."""
        walks = []
        walk = type(model).modules
        monkeypatch.setattr(type(model), "modules", lambda self: walks.append(1) or walk(self))
        for _ in range(3):
            model.encode(TEXTS, instruction=INSTRUCTION, batch_size=2)
        model.train()
        for _ in range(3):
            model(**model.processor(TEXTS, INSTRUCTION, return_prefix_ids=True))
        model.eval()
        assert len(walks) == 1
        another_module(model)
        model.encode(TEXTS, instruction=INSTRUCTION)
        assert len(walks) == 2

    def test_training_keeps_nothing(self, model):
        model.train()
        with torch.no_grad():
            model(**model.processor(TEXTS, INSTRUCTION, return_prefix_ids=True))
        model.eval()
        model(**model.processor(TEXTS, INSTRUCTION, return_prefix_ids=True))  # with gradients
        assert len(model.prefix_cache) == 0


class TestBounds:
    def test_switched_off(self, model):
        for name in ("max_bytes", "max_entries"):
            for nothing in (0, None):
                model.prefix_cache = PrefixCache(**{name: nothing})
                assert (
                    np.abs(model.encode(TEXTS, instruction=INSTRUCTION) - plain(model, TEXTS, INSTRUCTION)).max()
                    <= 1e-5
                )
                assert (len(model.prefix_cache), model.prefix_cache.misses) == (0, 0)

    def test_entries(self, model):
        model.prefix_cache.max_entries = 3
        for i in range(6):
            model.encode(TEXTS, instruction=f"instruction number {i}")
            assert len(model.prefix_cache) == min(i + 1, 3)

    def test_bytes(self, model):
        model.encode(TEXTS, instruction=INSTRUCTION)
        one = model.prefix_cache.nbytes
        keys = compute_prefix(model.decoder, model.processor.encode_prefix(INSTRUCTION)).layers[0].keys
        assert one == 2 * 2 * keys.nbytes  # layers, keys and values
        model.prefix_cache.max_bytes = int(2.5 * one)
        for i in range(5):
            model.encode(TEXTS, instruction=f"{INSTRUCTION} {i}")
            assert model.prefix_cache.nbytes <= 2.5 * one
        assert len(model.prefix_cache) == 2
        model.prefix_cache.max_bytes = one // 2
        model.encode(TEXTS, instruction="too large a prefix to keep, but one to share in this batch")
        assert len(model.prefix_cache) == 0

    def test_the_least_recently_used_goes_first(self):
        cache = PrefixCache(max_entries=2)
        prefix = SharedPrefix(1, ())
        for ids in ((1,), (2,)):
            assert cache.get(ids, ("weights",)) is None
            cache.put(ids, ("weights",), prefix)
        assert cache.get((1,), ("weights",)) is prefix
        cache.put((3,), ("weights",), prefix)
        assert [cache.get((i,), ("weights",)) is prefix for i in (1, 2, 3)] == [True, False, True]

    def test_what_other_weights_left_is_not_kept(self):
        cache = PrefixCache()
        cache.get((1,), ("new",))
        cache.put((1,), ("old",), SharedPrefix(1, ()))  # computed by a thread before the weights changed
        assert len(cache) == 0


class TestOnItsWay:
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_start_empty(self, model, duplicate):
        model.prefix_cache.max_entries = 7
        before = model.encode(TEXTS, instruction=INSTRUCTION)
        twin = duplicate(model)
        assert (len(twin.prefix_cache), twin.prefix_cache.max_entries, len(model.prefix_cache)) == (0, 7, 1)
        assert np.array_equal(twin.encode(TEXTS, instruction=INSTRUCTION), before)

    def test_it_is_not_saved(self, model, tmp_path):
        model.encode(TEXTS, instruction=INSTRUCTION)
        names = set(model.state_dict())
        model.save_pretrained(tmp_path)
        loaded = Causal2VecModel.from_pretrained(tmp_path)
        assert set(loaded.state_dict()) == names
        assert len(loaded.prefix_cache) == 0

    def test_threads(self, model):
        expected = {instruction: plain(model, TEXTS, instruction) for instruction in INSTRUCTIONS}
        worst = []

        def work(instruction):
            for _ in range(5):
                worst.append(np.abs(model.encode(TEXTS, instruction=instruction) - expected[instruction]).max())

        threads = [threading.Thread(target=work, args=(instruction,)) for instruction in INSTRUCTIONS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(worst) == 20 and max(worst) <= 1e-5
        assert len(model.prefix_cache) == 2 and model.prefix_cache.hits >= 8  # two prefixes are long enough to keep


class TestDecodersThatCannot:
    def check(self, model, caplog, reason):
        with caplog.at_level(logging.DEBUG, logger="prefix_cache"):
            vectors = model.encode(TEXTS, instruction=INSTRUCTION)
        assert np.abs(vectors - plain(model, TEXTS, INSTRUCTION)).max() <= 1e-5
        assert len(model.prefix_cache) == 0
        assert reason in caplog.text

    def test_no_cache_support(self, model, caplog):
        config = AutoConfig.for_model("openai-gpt", vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128)
        torch.manual_seed(0)
        model.decoder = AutoModel.from_config(config).eval()
        self.check(model, caplog, "it takes no past_key_values")

    def test_not_causal(self, model, caplog):
        model.decoder.config.is_causal = False
        assert not ModuleScan(model).is_causal()
        self.check(model, caplog, "not causal")

    def test_positions_that_depend_on_the_length(self, model, caplog):
        model.decoder.config.rope_parameters["rope_type"] = "dynamic"
        self.check(model, caplog, "dynamic rotary positions")


class TestGradients:
    def gradients(self, model, batch):
        """And the tokens that the decoder read."""
        with decoder_tokens(model) as seen:
            found = gradients(model, batch)
        return found, sum(rows * tokens for rows, tokens in seen)

    def check(self, model, instructions):
        model.train()
        whole_gradients, whole_tokens = self.gradients(model, model.processor(TEXTS, instructions))
        batch = model.processor(TEXTS, instructions, return_prefix_ids=True)
        shared_gradients, shared_tokens = self.gradients(model, batch)
        assert shared_gradients.keys() == whole_gradients.keys()
        for name, gradient in whole_gradients.items():
            scale = gradient.abs().max()
            assert scale > 0 or name.endswith("k_proj.bias"), name
            assert (shared_gradients[name] - gradient).abs().max() <= 1e-5 * max(1.0, scale), name
        return shared_tokens, whole_tokens

    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "olmo2"])
    def test_full(self, family, make_model):
        model = make_model(family)
        quiet(model)
        shared_tokens, whole_tokens = self.check(model, INSTRUCTION)
        assert shared_tokens < 0.8 * whole_tokens

    def test_different_prefixes_are_read_with_their_rows(self, model):
        quiet(model)
        shared_tokens, whole_tokens = self.check(model, [INSTRUCTION, "x", INSTRUCTION, "only here", "x", None])
        assert shared_tokens == whole_tokens

    def test_lora(self, model):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=r"decoder\..*\.(q_proj|k_proj|v_proj)", init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        quiet(model)
        shared_tokens, whole_tokens = self.check(model, INSTRUCTION)
        assert shared_tokens < 0.8 * whole_tokens
        assert all("lora" in name for name, p in adapted.named_parameters() if p.requires_grad)

    def test_gradient_checkpointing_reads_whole_rows(self, model):
        quiet(model)
        model.gradient_checkpointing_enable()
        shared_tokens, whole_tokens = self.check(model, INSTRUCTION)
        assert shared_tokens == whole_tokens

    def test_dropout_reads_whole_rows(self, make_model):
        model = make_model("gpt_neox")
        model.decoder.config.attention_dropout = 0.1
        model.train()
        with decoder_tokens(model) as seen:
            model(**model.processor(TEXTS, INSTRUCTION, return_prefix_ids=True))
        assert [tokens for _, tokens in seen] == [model.processor(TEXTS, INSTRUCTION)["input_ids"].shape[1]]


def quiet(model):
    """Switches dropout off, so that two passes can be compared."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("attention_probs_dropout_prob", "hidden_dropout_prob"):
        setattr(model.encoder.config, name, 0.0)
    assert model.encoder.config.hidden_dropout_prob == 0.0
