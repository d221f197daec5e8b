"""The paper's ablations: each equals its definition, and saves, loads, trains and encodes like the default."""

import math

import numpy as np
import pytest
import torch
from conftest import TEXTS, gradients
from huggingface_hub.errors import StrictDataclassFieldValidationError
from test_configuration_causal2vec import make_config
from transformers import AutoModel, AutoProcessor

from configuration_causal2vec import Causal2VecConfig
from modeling_causal2vec import Causal2VecModel
from prefix_cache import ModuleScan


INSTRUCTION = "Given a question, retrieve passages that answer it"
EXAMPLES = [{"query": "what is it", "response": "a thing"}]

VARIANTS = {
    "concat": {},
    "average": {"pooling": "average"},
    "eos": {"pooling": "eos"},
    "eos_encoder": {"pooling": "eos_encoder"},
    "before": {
        "contextual_position": "before_instruction",
        "template_prefix": "[INST] ",
        "template_suffix": " [/INST]",
    },
    "two": {"num_contextual_tokens": 2},
    "eight": {"num_contextual_tokens": 8, "pooling": "average"},
    "bidirectional": {"bidirectional": True},
    "together": {
        "bidirectional": True,
        "num_contextual_tokens": 4,
        "contextual_position": "before_instruction",
        "pooling": "eos",
    },
    "last_token": {"baseline": "last_token"},
    "last_token_bidirectional": {"baseline": "last_token", "bidirectional": True},
    "embedding_concat": {"baseline": "embedding_concat"},
    "token_prepending": {"baseline": "token_prepending"},
    "token_prepending_before": {"baseline": "token_prepending", "contextual_position": "before_instruction"},
}
DIMS = {name: 32 for name in VARIANTS} | {
    **dict.fromkeys(("concat", "eos_encoder", "before", "two", "bidirectional"), 64),
    "embedding_concat": 32 + 24,
}
WITHOUT_ENCODER = [name for name in VARIANTS if "last_token" in name or "prepending" in name]


@pytest.fixture(scope="module")
def variants(make_model):
    """Returns a function from a variant's name to its model."""
    models = {}

    def get(name: str):
        if name not in models:
            models[name] = make_model(**VARIANTS[name])
        models[name].processor.tokenizer.padding_side = "right"
        return models[name]

    return get


@pytest.fixture(scope="module")
def folders(variants, tmp_path_factory):
    """Returns a function from a variant's name to a folder that its model was saved into."""
    root = tmp_path_factory.mktemp("variants")

    def get(name: str):
        if not (root / name).exists():
            variants(name).save_pretrained(root / name)
        return root / name

    return get


@torch.no_grad()
def naive(model, text: str, instruction: str | None = None, examples: list[dict] | None = None) -> np.ndarray:
    """The embedding of one text, by the paper's words and with masks written down; a decoder of Llama's kind."""
    config, row = model.config, model.processor(text, instruction, examples)
    ids = row["input_ids"][0]  # (seq_len,)
    states = model.decoder.embed_tokens.weight[ids].clone()  # (seq_len, 32)
    slots = (ids == config.contextual_token_id).nonzero()[:, 0].tolist()
    assert slots == list(range(slots[0], slots[0] + len(slots))) if slots else True
    vectors = tokens = None
    if model.encoder is not None:
        vectors = model.encoder(input_ids=row["encoder_ids"]).last_hidden_state[0]  # (encoder_seq_len, 24)
        mean = vectors.mean(0, keepdim=True)  # (1, 24)
        if model.projector is not None:
            vectors = mean if model.projector.queries is None else attend(model.projector.queries, vectors)
            tokens = model.projector.linear_2(torch.nn.functional.gelu(model.projector.linear_1(vectors)))
            assert len(tokens) == len(slots)
            states[slots] = tokens
    length = len(ids)
    ahead = torch.ones(length, length).triu(1).bool()  # what causal attention does not see
    mask = torch.zeros(1, 1, length, length)
    if not config.bidirectional:
        mask.masked_fill_(ahead, float("-inf"))
    position_ids = torch.arange(length)[None]
    hidden = states[None]  # (1, seq_len, 32)
    rotary = model.decoder.rotary_emb(hidden, position_ids)
    for i, layer in enumerate(model.decoder.layers):
        if config.baseline == "token_prepending" and i > 0:
            hidden[0, slots[0]] = hidden[0, -1]
        hidden = layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary)
    hidden = model.decoder.norm(hidden)[0]
    eos = hidden[-1]
    if config.baseline == "embedding_concat":
        return torch.cat([eos, mean[0]]).numpy()
    if config.baseline is not None or config.pooling == "eos":
        return eos.numpy()
    if config.pooling == "average":
        return ((hidden[slots[-1]] + eos) / 2).numpy()
    first = tokens[0] if config.pooling == "eos_encoder" else hidden[slots[-1]]
    return torch.stack([first, eos], dim=1).flatten().numpy()


def attend(queries, states: torch.Tensor) -> torch.Tensor:
    """Multi-head cross-attention, one head after the other."""
    attention, size = queries.attention, states.shape[-1]
    weights, biases = attention.in_proj_weight.split(size), attention.in_proj_bias.split(size)
    q, k, v = (x @ w.T + b for x, w, b in zip((queries.queries.weight, states, states), weights, biases))
    heads = []
    for part in torch.arange(size).chunk(attention.num_heads):
        scores = q[:, part] @ k[:, part].T / math.sqrt(len(part))  # (tokens, encoder_seq_len)
        heads.append(scores.softmax(-1) @ v[:, part])
    return torch.cat(heads, dim=-1) @ attention.out_proj.weight.T + attention.out_proj.bias


def unit(vectors) -> np.ndarray:
    return np.asarray(vectors) / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", VARIANTS)
class TestVectors:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_forward_is_the_definition(self, variants, name, side):
        model = variants(name)
        model.processor.tokenizer.padding_side = side
        expected = np.stack([naive(model, text, INSTRUCTION) for text in TEXTS])
        assert expected.shape == (len(TEXTS), DIMS[name])
        with torch.no_grad():
            found = model(**model.processor(TEXTS, INSTRUCTION)).embeddings.numpy()
        assert np.abs(found - expected).max() <= 2e-5
        assert np.linalg.norm(expected[0] - expected[1]) > 0.01

    def test_no_fast_path_changes_a_vector(self, variants, name):
        model = variants(name)
        model.prefix_cache.clear()
        expected = unit([naive(model, text, INSTRUCTION) for text in TEXTS])
        packed = [None, False] if model.config.baseline == "token_prepending" else [None, False, True]
        for choice in (*packed, *packed):  # the second time, with what is kept of the first
            found = model.encode(TEXTS, instruction=INSTRUCTION, batch_size=4, packed=choice)
            assert np.abs(found - expected).max() <= 1e-5
        prefix_ids = model.processor.rows("a text", INSTRUCTION)[0].prefix_ids
        worth_it = len(prefix_ids) >= model.prefix_cache.min_tokens and not model.config.bidirectional
        assert (model.prefix_cache.hits > 0) == worth_it
        assert ModuleScan(model).is_causal() != model.config.bidirectional

    def test_examples(self, variants, name):
        model = variants(name)
        expected = unit([naive(model, text, INSTRUCTION, EXAMPLES) for text in TEXTS[:3]])
        found = model.encode(TEXTS[:3], instruction=INSTRUCTION, examples=EXAMPLES)
        assert np.abs(found - expected).max() <= 1e-5
        assert np.abs(found - model.encode(TEXTS[:3], instruction=INSTRUCTION)).max() > 1e-3

    def test_truncation(self, variants, name):
        model = variants(name)
        full = model.encode(TEXTS, normalize_embeddings=False)
        found = model.encode(TEXTS, normalize_embeddings=False, truncate_dim=14)
        assert np.array_equal(found, full[:, :14])
        with pytest.raises(ValueError, match="`truncate_dim` must be an"):
            model.encode(TEXTS, truncate_dim=DIMS[name] + 2)

    def test_gradients_reach_all_weights_that_are_there(self, variants, name):
        model = variants(name)
        whole, shared = (
            gradients(model, model.processor(TEXTS, INSTRUCTION, return_prefix_ids=share)) for share in (False, True)
        )
        assert whole.keys() == {key for key, _ in model.named_parameters()}
        for key, gradient in whole.items():
            assert (shared[key] - gradient).abs().max() <= 1e-4 * max(1.0, gradient.abs().max()), key
            if model.projector is not None and "projector" in key and "in_proj_bias" not in key:
                assert gradient.abs().max() > 0, key


@pytest.mark.parametrize("name", VARIANTS)
class TestFolders:
    def test_round_trip(self, variants, folders, name):
        """Through the code in the folder."""
        model, again = variants(name), AutoModel.from_pretrained(folders(name), trust_remote_code=True)
        assert type(again).__module__.startswith("transformers_modules.")
        assert again.config.to_dict() == model.config.to_dict() | {"auto_map": again.config.auto_map}
        assert again.processor.to_dict() == model.processor.to_dict()
        vectors = again.encode(TEXTS, instruction=INSTRUCTION)
        assert np.array_equal(vectors, model.encode(TEXTS, instruction=INSTRUCTION))
        processor = AutoProcessor.from_pretrained(folders(name), trust_remote_code=True)
        expected, found = model.processor(TEXTS, INSTRUCTION), processor(TEXTS, INSTRUCTION)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    def test_what_is_in_it(self, variants, folders, name):
        keys = {key.split(".")[0] for key in variants(name).state_dict()}
        expected = {"encoder", "projector", "decoder"}
        if name in WITHOUT_ENCODER:
            expected = {"decoder"}
        elif name == "embedding_concat":
            expected = {"encoder", "decoder"}
        assert keys == expected
        assert (folders(name) / "encoder_tokenizer").exists() == (name not in WITHOUT_ENCODER)
        assert f"{DIMS[name]} numbers" in (folders(name) / "README.md").read_text().replace("\n", " ")

    def test_sentence_transformers(self, variants, folders, name):
        module = pytest.importorskip("sentence_transformers")
        model = module.SentenceTransformer(str(folders(name)), trust_remote_code=True, device="cpu")
        assert model.get_embedding_dimension() == DIMS[name]
        for kwargs in ({}, {"truncate_dim": 10}):
            found = model.encode(TEXTS, prompt=INSTRUCTION, normalize_embeddings=True, **kwargs)
            expected = variants(name).encode(TEXTS, instruction=INSTRUCTION, **kwargs)
            assert np.abs(found - expected).max() <= 1e-6

    def test_evaluation_and_publishing(self, folders, name):
        pytest.importorskip("mteb")
        from evaluation.encoder import Causal2VecBackend
        from evaluation.identity import decoder_alone, load_backend, locate, model_meta
        from scripts.push_to_hub import files_to_push, problems

        folder = folders(name)
        location = locate(str(folder))
        backend = load_backend(location, device="cpu")
        assert backend.dim == model_meta(location, backend).embed_dim == DIMS[name]
        assert backend.encode(TEXTS, INSTRUCTION, None, 4, None).shape == (len(TEXTS), DIMS[name])
        alone = Causal2VecBackend(decoder_alone(backend.model)).encode(TEXTS, INSTRUCTION, None, 4, None)
        assert alone.shape == (len(TEXTS), 32)
        if name == "last_token":
            assert np.abs(alone - backend.encode(TEXTS, INSTRUCTION, None, 4, None)).max() <= 1e-5
        found = list(problems(folder, files_to_push(folder), 1e9))
        assert not any("missing" in problem or "size" in problem for problem in found), found


class TestRows:
    def test_before_the_instruction(self, variants):
        model, default = variants("before"), variants("concat")
        slot, tokenizer = model.config.contextual_token_id, default.processor.tokenizer
        row = model.processor("hi", INSTRUCTION, EXAMPLES)["input_ids"][0].tolist()
        prefix = tokenizer("[INST] ", add_special_tokens=False)["input_ids"]
        assert row[: len(prefix) + 2] == [1, *prefix, slot]
        user = f"<instruct>{INSTRUCTION}\n<query>what is it\n<response>a thing\n\n{INSTRUCTION}"
        pieces = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (user, "hi", " [/INST]"))
        assert row[len(prefix) + 2 :] == [*(i for ids in pieces for i in ids), 2]

    def test_slots_stand_next_to_each_other_and_text_is_cut(self, variants):
        model = variants("eight")
        row = model.processor("word " * 50, "Find", max_length=30)["input_ids"][0].tolist()
        prefix = model.processor.encode_prefix("Find")
        assert len(row) == 30 and row[-1] == 2
        assert row[: len(prefix) + 8] == [*prefix, *[model.config.contextual_token_id] * 8]
        with pytest.raises(ValueError, match=f"max_length={len(prefix) + 10}"):
            model.processor("word", "Find", max_length=10)

    def test_as_many_slots_as_tokens(self, variants):
        model = variants("two")
        with pytest.raises(ValueError, match="2 times.* row 0 .*8 times"):
            model(**variants("eight").processor("hi"))

    @pytest.mark.parametrize("name", ["concat", "two"])
    def test_a_contextual_token_per_row(self, variants, name):
        """Given for more rows than there are, they would else go to the wrong ones."""
        model = variants(name)
        batch = model.processor(TEXTS[:3])
        vectors = model.get_encoder_embedding(batch["encoder_ids"], batch["encoder_attention_mask"])
        with pytest.raises(RuntimeError, match="shape"):
            model(**model.processor(TEXTS[:2]), encoder_embedding=vectors)

    def test_an_encoder_embedding_without_an_encoder(self, variants):
        model = variants("last_token")
        with pytest.raises(ValueError, match="has no encoder"):
            model(**model.processor(TEXTS[:2]), encoder_embedding=torch.zeros(2, 24))

    @pytest.mark.parametrize("name", ["concat", "two", "embedding_concat"])
    def test_an_encoder_embedding_computed_before(self, variants, name):
        model = variants(name)
        batch = dict(model.processor(TEXTS, INSTRUCTION))
        with torch.no_grad():
            expected = model(**batch).embeddings
            vectors = model.get_encoder_embedding(batch.pop("encoder_ids"), batch.pop("encoder_attention_mask"))
            assert torch.equal(model(**batch, encoder_embedding=vectors).embeddings, expected)

    @pytest.mark.parametrize("name", ["last_token", "embedding_concat"])
    def test_no_slot(self, variants, name):
        rows, expected = (variants(n).processor("hi", INSTRUCTION)["input_ids"][0] for n in (name, "concat"))
        assert rows.tolist() == expected[expected != variants("concat").config.contextual_token_id].tolist()


class TestSeveralTokens:
    @pytest.mark.parametrize("encoder", ["roberta", "distilbert", "mpnet", "modernbert"])
    def test_other_encoders(self, make_model, encoder):
        model = make_model(encoder=encoder, num_contextual_tokens=2)
        alone = torch.stack([model(**model.processor(text)).embeddings[0] for text in TEXTS])
        for side in ("left", "right"):
            model.processor.encoder_tokenizer.padding_side = side
            assert (model(**model.processor(TEXTS)).embeddings - alone).abs().max() <= 2e-5
        assert np.abs(model.encode(TEXTS, packed=True) - unit(alone.detach())).max() <= 1e-5

    def test_new_queries_differ(self, backbone_dir):
        """As transformers initialises them."""
        model = Causal2VecModel.from_encoder_decoder_pretrained(
            backbone_dir("bert"), backbone_dir("llama"), num_contextual_tokens=4
        )
        queries = model.projector.queries
        assert 0.1 < queries.queries.weight.std() < 0.3  # the tiny decoder's `initializer_range` is 0.2
        assert queries.attention.in_proj_weight.abs().max() > 0 and queries.attention.out_proj.weight.abs().max() > 0


class TestBidirectional:
    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_neox", "phi3"])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_padding_and_looking_ahead(self, make_model, family, attention):
        if (family, attention) == ("gemma2", "sdpa"):
            pytest.skip("it has none")
        model = make_model(family, bidirectional=True, decoder_kwargs={"attn_implementation": attention})
        alone = torch.stack([model(**model.processor(text)).embeddings[0] for text in TEXTS[:3]])
        together = model(**model.processor(TEXTS[:3])).embeddings
        assert (alone - together).abs().max() <= 2e-5
        batch = model.processor("a b")
        longer = {**batch, "contextual_token": torch.zeros(1, 32), "output_last_hidden_state": True}
        first = model(**longer).last_hidden_state[0, 0]
        longer["input_ids"] = longer["input_ids"].clone()
        longer["input_ids"][0, -2] = 7
        assert (model(**longer).last_hidden_state[0, 0] - first).abs().max() > 1e-4

    def test_a_decoder_without_a_switch(self, variants):
        from prefix_cache import make_bidirectional

        decoder = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match="`bidirectional`.*Linear"):
            make_bidirectional(decoder)


class TestTokenPrepending:
    def test_packing_is_refused(self, variants):
        with pytest.raises(ValueError, match="`packed`"):
            variants("token_prepending").encode(TEXTS, packed=True)

    def test_it_changes_what_text_sees(self, variants):
        """A change of the last word changes the second layer's states of the first."""
        model = variants("token_prepending")
        batches = [model.processor(text) for text in ("one two three four", "one two three five")]
        first, second = (model(**batch, output_last_hidden_state=True).last_hidden_state[0] for batch in batches)
        slot = int((batches[0]["input_ids"][0] == model.config.contextual_token_id).nonzero())
        assert torch.equal(first[slot - 1], second[slot - 1])
        assert (first[slot + 1] - second[slot + 1]).abs().max() > 1e-4

    @pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3", "phi3", "gpt_neox", "olmo2"])
    def test_other_decoders(self, make_model, family):
        model = make_model(family, baseline="token_prepending")
        plain = torch.stack([model(**model.processor(text, INSTRUCTION)).embeddings[0] for text in TEXTS])
        assert np.abs(model.encode(TEXTS, instruction=INSTRUCTION) - unit(plain.detach())).max() <= 1e-5

    def test_gradient_checkpointing(self, make_model):
        model = make_model(baseline="token_prepending").train()
        batch = model.processor(TEXTS, INSTRUCTION)
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            first, second = model(**batch).embeddings, model(**model.processor(TEXTS[:2])).embeddings
            (first.square().sum() + second.sum()).backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        for name, gradient in gradients[0].items():
            assert (gradients[1][name] - gradient).abs().max() <= 1e-4 * max(1.0, gradient.abs().max()), name

    def test_a_decoder_that_tells_its_layers_nothing(self, make_model):
        model = make_model(baseline="token_prepending")
        for layer in model.decoder.layers:
            layer._forward_pre_hooks.clear()
        with pytest.raises(ValueError, match="told 0 of its 2 layers"):
            model(**model.processor("hi"))


@pytest.mark.parametrize(
    "values, match",
    [
        ({"num_contextual_tokens": 8, "max_seq_length": 9}, "`max_seq_length` must be at least 10"),
        ({"pooling": "eos_encoder", "num_contextual_tokens": 2}, "needs `num_contextual_tokens=1`"),
        ({"baseline": "embedding_concat", "pooling": "eos"}, "`pooling` must be 'concat' for the baseline"),
        ({"baseline": "embedding_concat", "num_contextual_tokens": 2}, "it has no Contextual token"),
        (
            {"baseline": "embedding_concat", "contextual_position": "before_instruction"},
            "`contextual_position` must be 'after_instruction' for the baseline 'embedding_concat'",
        ),
        ({"baseline": "last_token"}, "'last_token' has no encoder"),
        ({"baseline": "token_prepending", "encoder_config": None, "bidirectional": True}, "every token sees EOS"),
    ],
)
def test_what_cannot_be_combined(values, match):
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=match):
        make_config(**values)


def test_an_encoder_too_few_or_too_many(backbone_dir):
    with pytest.raises(ValueError, match="`encoder`"):
        Causal2VecModel.from_encoder_decoder_pretrained(None, backbone_dir("llama"))
    with pytest.raises(ValueError, match="no encoder"):
        Causal2VecModel.from_encoder_decoder_pretrained(
            backbone_dir("bert"), backbone_dir("llama"), baseline="last_token"
        )


class TestSizes:
    def test_of_configurations(self):
        assert make_config().embedding_sizes == (32, 32)
        assert make_config(pooling="eos").embedding_sizes == (32,)
        assert make_config(baseline="embedding_concat").embedding_sizes == (32, 24)
        config = make_config(baseline="last_token", encoder_config=None)
        assert config.embedding_size == 32 and config.encoder_config is None
        again = Causal2VecConfig.from_dict(config.to_dict())
        assert again.encoder_config is None and again.baseline == "last_token"


def test_a_decoder_that_is_an_adapter(backbone_dir, make_model, tmp_path):
    """An embedding model that was published as LoRA, as some are (appendix C.3)."""
    from peft import LoraConfig, PeftModel, get_peft_model

    decoder = AutoModel.from_pretrained(backbone_dir("llama"))
    adapted = get_peft_model(decoder, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    make_model().processor.tokenizer.save_pretrained(tmp_path / "adapter")
    model = Causal2VecModel.from_encoder_decoder_pretrained(backbone_dir("bert"), str(tmp_path / "adapter"))
    ids = torch.tensor([[1, 5, 9, 2]])
    expected = PeftModel.from_pretrained(AutoModel.from_pretrained(backbone_dir("llama")), tmp_path / "adapter").eval()
    plain = AutoModel.from_pretrained(backbone_dir("llama"))
    with torch.no_grad():
        found = model.decoder(ids).last_hidden_state
        assert (found - expected(ids).last_hidden_state).abs().max() <= 1e-5
        assert (found - plain(ids).last_hidden_state).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "model")
    assert np.array_equal(Causal2VecModel.from_pretrained(tmp_path / "model").encode(TEXTS), model.encode(TEXTS))
