"""encoding_utils.py: `encode`, its batches, and how often it waits for an accelerator."""

import io

import numpy as np
import pytest
import torch
import transformers
from accelerator import DEVICE, Accelerator, OnDevice
from conftest import FP32_BOUND, SAME, TEXTS, difference, embed, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import encoding_utils
import prefix_cache
from encoding_utils import cut, sorted_batches
from modeling_causal2vec import Causal2VecModel


INSTRUCTION = "Given a question, retrieve passages that answer it"


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

    @pytest.mark.parametrize(
        "name, values",
        [
            ("truncate_dim", [0, -2, 65, 8.0, "8", True]),
            ("batch_size", [0, -1, 2.0, "2", None, True]),
            ("max_batch_tokens", [0, -1, 1.5, "many"]),
            ("truncation", [True, "no"]),
        ],
    )
    def test_arguments_that_cannot_work(self, tiny_model, name, values):
        for value in values:
            with pytest.raises(ValueError, match=f"`{name}` must be .*{value}"):
                tiny_model.encode(TEXTS, **{name: value})

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
        for length, told in ((3, "no room"), (513, "at most 512")):
            with pytest.raises(ValueError, match=told):
                tiny_model.encode("hi", max_length=length)

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
        with pytest.raises(TypeError, match="Example 0 .*list"):  # one list for all texts
            tiny_model.encode(["hi", "ho"], examples=[[{"query": "a", "response": "b"}], []])

    def test_queries_and_documents(self, tiny_model, make_model):
        instruction = tiny_model.config.query_instruction
        assert instruction.startswith("Given a question")
        queries, documents = tiny_model.encode_query(TEXTS), tiny_model.encode_document(TEXTS)
        assert difference(queries, tiny_model.encode(TEXTS, instruction=instruction)) <= SAME
        assert difference(documents, tiny_model.encode(TEXTS)) <= SAME and difference(queries, documents) > 1e-2
        other = tiny_model.encode_query(TEXTS, instruction="Sort")
        assert difference(other, tiny_model.encode(TEXTS, instruction="Sort")) <= SAME
        without = make_model()
        assert without.config.query_instruction is None
        assert difference(without.encode_query(TEXTS), without.encode(TEXTS)) <= SAME
        for method in (tiny_model.encode_query, tiny_model.encode_document):
            vectors = method(TEXTS, batch_size=2, truncate_dim=8, convert_to_tensor=True, normalize_embeddings=False)
            assert tuple(vectors.shape) == (len(TEXTS), 8)

    def test_progress_bar(self, tiny_model, monkeypatch):
        transformers.utils.logging.enable_progress_bar()  # another test may have switched transformers' bars off
        for show, expected in ((True, True), (False, False), (None, False)):  # None: short work, no terminal
            stream = io.StringIO()
            monkeypatch.setattr("sys.stderr", stream)
            tiny_model.encode(TEXTS, batch_size=2, show_progress_bar=show)
            assert ("Encoding" in stream.getvalue()) is expected
            if show:
                assert "100%" in stream.getvalue()


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


@pytest.fixture
def model(make_model):
    return make_model()


class TestBatches:
    @settings(max_examples=60, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 50), max_size=40),
        batch_size=st.integers(1, 9),
        max_tokens=st.none() | st.integers(1, 200),
    )
    def test_cut(self, lengths, batch_size, max_tokens):
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        batches = list(cut(order, lengths, batch_size, max_tokens))
        assert [place for batch in batches for place in batch] == order
        for batch in batches:
            assert 1 <= len(batch) <= batch_size
            if max_tokens is not None and len(batch) > 1:
                assert len(batch) * max(lengths[place] for place in batch) <= max_tokens

    def test_a_lower_budget_makes_smaller_batches(self, model):
        texts = TEXTS * 4

        def sizes(max_tokens):
            batches = sorted_batches(model.processor, texts, [None] * len(texts), batch_size=8, max_tokens=max_tokens)
            return [(len(rows), batch["input_ids"].numel()) for rows, batch, _ in batches]

        assert [rows for rows, _ in sizes(None)] == [8, 8, 8]
        budget = 100
        assert all(tokens <= budget or rows == 1 for rows, tokens in sizes(budget))
        assert len(sizes(budget)) > 3

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_heads_count_only_where_they_are_read(self, model, side):
        model.processor.tokenizer.padding_side = side
        instructions, budget = [INSTRUCTION] * len(TEXTS), 300

        def sizes(**kwargs):
            batches = sorted_batches(model.processor, TEXTS, instructions, max_tokens=budget, **kwargs)
            return [len(rows) for rows, _, _ in batches]

        assert len(sizes(count_prefix=False)) < len(sizes(count_prefix=True))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_longest_first_and_no_column_of_padding(self, model, side):
        model.processor.tokenizer.padding_side = model.processor.encoder_tokenizer.padding_side = side
        seen, lengths = [], []
        for rows, batch, _ in sorted_batches(model.processor, TEXTS, [INSTRUCTION] * len(TEXTS), batch_size=2):
            seen += rows
            lengths.append(batch["input_ids"].shape[1])
            for mask in ("attention_mask", "encoder_attention_mask"):
                assert batch[mask].any(0).all()
            assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert sorted(seen) == list(range(len(TEXTS)))
        assert lengths == sorted(lengths, reverse=True)

    def test_rows_of_a_task_stay_together(self, model):
        instructions = [("one", "two")[i % 2] for i in range(8)]
        texts = (TEXTS * 2)[:8]
        batches = sorted_batches(model.processor, texts, instructions, batch_size=4)
        assert [{instructions[row] for row in rows} for rows, _, _ in batches] == [{"one"}, {"two"}]

    def test_windows(self, model, monkeypatch):
        monkeypatch.setattr(encoding_utils, "WINDOW", 1)  # two texts are tokenized at a time
        assert np.abs(model.encode(TEXTS, batch_size=2) - plain(model, TEXTS)).max() <= 1e-5

    @pytest.mark.parametrize("budget", [1, 60, None])
    def test_a_budget_changes_no_vector(self, model, budget):
        encoded = model.encode(TEXTS, instruction=INSTRUCTION, max_batch_tokens=budget)
        assert np.abs(encoded - plain(model, TEXTS, INSTRUCTION)).max() <= 1e-5


class TestWaits:
    """For an accelerator, to which a CPU hands work ahead: see accelerator.py."""

    @pytest.fixture
    def accelerator(self, monkeypatch):
        monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # it has no tensors of other kinds
        monkeypatch.setattr(prefix_cache, "PLAIN", (*prefix_cache.PLAIN, OnDevice))
        with torch.no_grad(), Accelerator() as accelerator:
            yield accelerator

    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("decoder, dtype", [("llama", None), ("mistral", None), ("gemma3", "bfloat16")])
    def test_two_a_batch(self, make_model, accelerator, decoder, dtype, shared):
        """For the vectors, and for whether the encoder's mask hides anything, which transformers asks."""
        model = make_model(decoder, dtype=dtype)
        model.prefix_cache.max_bytes *= shared
        expected = model.encode(TEXTS * 3, instruction=INSTRUCTION, batch_size=2, packed=False)
        model.to(DEVICE)
        for _ in ("cold", "warm"):
            accelerator.waits.clear()
            vectors = model.encode(TEXTS * 3, instruction=INSTRUCTION, batch_size=2)
            assert np.abs(vectors - expected).max() <= (1e-5 if dtype is None else 0.02)
        assert (model.prefix_cache.hits > 0) == shared
        once = int(shared)  # for some numbers of the weights
        assert 9 < len(accelerator.waits) <= 9 * 2 + once, accelerator.waits

    @pytest.mark.parametrize(
        "wait",
        [
            lambda states: states.sum().item(),
            lambda states: bool((states > 9).any()),
            lambda states: states[states > 9],
            lambda states: states.nonzero(),
            lambda states: states.cpu(),
            lambda states: states.tolist(),
            lambda states: states + torch.ones(1).to(DEVICE),
        ],
        ids=["item", "bool", "mask", "nonzero", "cpu", "tolist", "copy"],
    )
    def test_one_more_is_seen(self, make_model, accelerator, wait):
        model = make_model().to(DEVICE)
        for expected in (2, 3):
            accelerator.waits.clear()
            model.encode(TEXTS)
            assert len(accelerator.waits) == expected
            model.projector.register_forward_hook(lambda module, inputs, output: [wait(output), None][1])

    @pytest.mark.parametrize("packed", [False, True])
    def test_towers_on_two_devices(self, make_model, accelerator, packed):
        """Each tower's inputs are brought to it, as with a `device_map`."""
        hooks = pytest.importorskip("accelerate.hooks")
        expected = make_model().encode(TEXTS, instruction=INSTRUCTION)
        for parts in (["decoder"], ["decoder", "projector"], ["encoder"], ["encoder", "projector"]):
            model = make_model()
            for part in ("encoder", "projector", "decoder"):
                device = DEVICE if part in parts else torch.device("cpu")
                hooks.add_hook_to_module(getattr(model, part).to(device), hooks.AlignDevicesHook(device))
            for _ in ("cold", "warm"):
                vectors = model.encode(TEXTS, instruction=INSTRUCTION, packed=packed)
                assert np.abs(vectors - expected).max() <= 1e-5
            assert accelerator.waits
