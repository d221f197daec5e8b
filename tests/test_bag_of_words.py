"""bag_of_words.py: what the EOS state is taught, and that it learns it."""

import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file

import bag_of_words
import bundle
import train
from modeling_causal2vec import Causal2VecModel


WORDS = "cats dogs sleep eat run fast slow red blue green old new".split()


@pytest.fixture(scope="module")
def run(backbone_dir, tmp_path_factory):
    """Returns a function that runs bag_of_words.py, or another script's `main`, on rows of random words."""
    folder = tmp_path_factory.mktemp("data")
    draw = [random.Random(i).sample(WORDS, 3) for i in range(200)]
    rows = [{"query": " ".join(words), "positive": " ".join(words[1:])} for i, words in enumerate(draw)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.json").write_text(json.dumps([{"name": "rows", "path": "rows.jsonl", "instructions": ["find"]}]))

    def run(output, *flags, main=bag_of_words.main, **changes):
        recipe = {
            "encoder": backbone_dir("bert"),
            "decoder": backbone_dir("llama"),
            "projector_identity": 100.0,
            "output_dir": str(output),
            "data_file": str(folder / "data.json"),
            "data_dir": str(folder),
            "per_device_train_batch_size": 1,
            "max_steps": 6,
            "warmup_steps": 1,
            "weight_decay": 0.0,
            "logging_steps": 1,
            "save_steps": 3,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        } | changes
        path = folder / "recipe.json"
        path.write_text(json.dumps({name: value for name, value in recipe.items() if value is not None}))
        return main([str(path), *flags])

    words = {"tokens_per_batch": 256, "heldout_texts": 16, "embedding_scale": 30.0, "learning_rate": 3e-2}
    return lambda *args, **changes: run(*args, **(words | changes))


def test_word_vectors_by_hand():
    table = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 2.0], [0.0, -2.0]])  # centred, and its axes apart
    texts = [[2, 0, 0, 1], [2, 0], [2, 3], [2], [2], [2], [2], [2]]  # frequencies 1/4, 1/8, 1, 1/8
    words = bag_of_words.WordVectors(table, [torch.tensor(ids) for ids in texts])
    lengths = torch.tensor([2.0, 3.0, 0.0, 3.0]).square() * math.log(2) ** 2
    torch.testing.assert_close(words.table.norm(dim=-1), lengths)
    ids = torch.tensor([[0, 3, 2, 1]])
    target = words(ids, torch.tensor([[True, True, True, False]]))  # the last is padding, say
    torch.testing.assert_close(target.norm(dim=-1), torch.ones(1))
    cosines = target @ torch.nn.functional.normalize(words.table[[0, 3]], dim=-1).T
    torch.testing.assert_close(cosines, torch.tensor([[4.0, 9.0]]) / math.sqrt(4**2 + 9**2))


def test_batches_are_drawn_by_their_number():
    texts = ["word " * (1 + i % 50) for i in range(3000)]
    lengths = [1 + i % 50 for i in range(3000)]
    batches = bag_of_words.WordBatches(texts, lengths, ["find"], tokens=100, size=40, seed=1)
    again = bag_of_words.WordBatches(texts, lengths, ["find"], tokens=100, size=40, seed=1)
    assert [batches[i] for i in range(40)] == [again[i] for i in range(40)]
    assert {batches[i][1] for i in range(40)} == {None, "find"}
    assert {0, 1, 2, 3, 4, 5} >= {len(batches[i][2]) for i in range(40)} > {0}
    for i in range(40):
        counts = [text.count("word") for text in batches[i][0]]
        assert len(counts) >= 2 and max(counts) - min(counts) <= 34


def test_eos_learns_the_words(run, tmp_path):
    folder = run(tmp_path / "words", max_steps=60)
    facts = json.loads((tmp_path / "words" / "words.json").read_text())
    assert facts["heldout_cosine"] > 0.5
    assert (tmp_path / "words" / "words.png").is_file()
    model = Causal2VecModel.from_pretrained(folder)
    texts = ["cats dogs run fast", "old green blue red", "fast run dogs cats", "red blue green old"]
    states = model.encode(texts, convert_to_tensor=True)[:, -model.config.hidden_size :]
    cosines = torch.nn.functional.cosine_similarity(states[:2, None], states[None, 2:], dim=-1)  # (2, 2)
    assert cosines.diagonal().min() > cosines.flip(1).diagonal().max() + 0.2


def test_what_is_changed_and_what_is_not(run, tmp_path):
    start = tmp_path / "start"
    run(
        start,
        max_steps=1,
        main=lambda argv: train.load_model(train.parse(argv, bag_of_words.WordArguments)[0]).save_pretrained(start),
    )
    before = load_file(start / "model.safetensors")
    after = load_file(run(tmp_path / "words") / "model.safetensors")
    (table,) = [name for name in before if "decoder" in name and "embed_tokens" in name]
    model = Causal2VecModel.from_pretrained(tmp_path / "words" / "model")
    eos = model.processor.tokenizer.eos_token_id
    scale = torch.full((len(before[table]), 1), 30.0)
    scale[eos] = 1
    rows = slice(0, model.config.contextual_token_id)  # the slot's own row is never read
    torch.testing.assert_close(after[table][rows], (before[table] * scale)[rows])
    for name in before:
        trained = "decoder.layers" in name and before[name].ndim == 2
        if name != table and "decoder.norm" not in name and "projector" not in name:
            assert torch.equal(before[name], after[name]) != trained, name
    assert (after["decoder.norm.weight"] == 0).sum() == 1


def test_an_interrupted_run_resumes(run, check_resuming):
    check_resuming(run, bag_of_words.WordTrainer)


def test_train_goes_on_from_it(run, tmp_path):
    """And the Contextual token's state is still the encoder's vector."""
    folder = run(tmp_path / "words")
    names = ("tokens_per_batch", "heldout_texts", "embedding_scale", "encoder", "decoder", "projector_identity")
    changes = dict.fromkeys(names) | {"model": str(folder), "train_decoder": "full", "learning_rate": 1e-5}
    flags = ("--max_steps", "2", "--per_device_train_batch_size", "4")
    model = Causal2VecModel.from_pretrained(run(tmp_path / "pairs", *flags, main=train.main, **changes))
    state = model.encode(["cats run"], convert_to_tensor=True)[:, : model.config.hidden_size]
    batch = model.processor(["cats run"])
    vector = model.get_encoder_embedding(batch["encoder_ids"], batch["encoder_attention_mask"]).detach()
    vector = torch.nn.functional.pad(vector, (0, state.shape[1] - vector.shape[1]))
    assert torch.nn.functional.cosine_similarity(state, vector).item() > 0.999


def test_lengths_of_the_states(run, saved_dir, tmp_path):
    """EOS states are as long as asked for, longer where `eos_factor` is; neither that nor dividing turns a state."""
    folder, texts = run(tmp_path / "words", max_steps=30, eos_norm=2.0), ["cats run", "old green dogs", "red"]
    models = [Causal2VecModel.from_pretrained(folder) for _ in range(3)]
    bag_of_words.lengthen_eos(models[1], 2.0)
    bundle.divide_states(models[2], 4.0)
    parts = torch.stack(
        [
            model.encode(texts, convert_to_tensor=True, normalize_embeddings=False).unflatten(-1, (2, -1))
            for model in models
        ]
    )  # (models, texts, halves, hidden_size)
    ratios = (parts[:, :, 1].norm(dim=-1) / parts[:, :, 0].norm(dim=-1)).mean(1)
    assert 1.4 < ratios[0] < 2.6 and 1.7 < ratios[1] / ratios[0] < 2.3
    for other in parts[1:]:
        assert torch.nn.functional.cosine_similarity(parts[0], other, dim=-1).min() > 0.99
    assert torch.allclose(ratios[0], ratios[2], rtol=0.02)
    with pytest.raises(ValueError, match="one gain of 0"):
        bag_of_words.lengthen_eos(Causal2VecModel.from_pretrained(saved_dir), 2.0)


def test_states_of_a_model_without_projector(make_model):
    with pytest.raises(ValueError, match="'last_token' has none"):
        bundle.divide_states(make_model(baseline="last_token"), 8.0)


def test_a_model_without_encoder_is_stored_in_half_precision(make_model, tmp_path):
    model = make_model(baseline="last_token")
    model.save_pretrained(tmp_path / "model")
    bundle.store_half(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored and {tensor.dtype for tensor in stored.values()} == {torch.float16}
    read = type(model).from_pretrained(tmp_path / "model")
    assert read.dtype == torch.float32


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pooling": "average"}, "pooling concat"),
        ({"pooling": "eos_encoder"}, "pooling concat"),
        ({"contextual_position": "before_instruction"}, "behind the instruction"),
        ({"num_contextual_tokens": 2}, "one Contextual token"),
        ({"baseline": "last_token"}, "Contextual token"),
        ({"decoder": "gpt_neox"}, "LayerNorm; got GPTNeoX"),
        ({"heldout_texts": 10_000}, "leaves no text"),
        ({"heldout_texts": -5}, "--heldout_texts must be at least 1"),
        ({"per_device_train_batch_size": 8}, "--per_device_train_batch_size must be 1"),
        ({"streaming": True}, "--streaming cannot be"),
        ({"projector_identity": None}, "needs --projector_identity"),
        ({"nonsense": 1}, "unknown arguments"),
    ],
)
def test_what_cannot_be(run, backbone_dir, tmp_path, changes, message):
    if "decoder" in changes:
        changes = changes | {"decoder": backbone_dir(changes["decoder"]), "projector_identity": None}
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "refused", **changes)
