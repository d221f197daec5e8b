"""training/model.py: what is loaded, and which of its weights are trained."""

from pathlib import Path

import pytest
import torch
from conftest import TEXTS

from training.arguments import ModelArguments
from training.model import choose_parameters, load_model, name_of_base, scale_projector


@pytest.mark.parametrize("decoder", ["llama", "gemma3"])  # Gemma multiplies what it looks up
def test_a_new_projector_is_scaled_to_the_words(make_model, decoder):
    model = make_model(decoder)
    documents = dict(model.processor(TEXTS))
    before = model.projector(model.get_encoder_embedding(documents["encoder_ids"], documents["encoder_attention_mask"]))
    scale_projector(model, documents, 2.0)
    after = model.projector(model.get_encoder_embedding(documents["encoder_ids"], documents["encoder_attention_mask"]))
    ids = [id for row in model.processor(TEXTS)["input_ids"].tolist() for id in row]
    real = [id for id, is_real in zip(ids, documents["attention_mask"].flatten().tolist()) if is_real]
    words = torch.tensor([id for id in real if id != model.config.contextual_token_id])
    expected = 2 * model.decoder(input_ids=words[None], output_hidden_states=True).hidden_states[0].norm(dim=-1).mean()
    assert after.norm(dim=-1).mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.nn.functional.cosine_similarity(before, after).min() > 1 - 1e-5


def test_a_scale_that_is_not_positive(make_model):
    with pytest.raises(ValueError, match="contextual_token_norm must be positive, got 0"):
        scale_projector(make_model(), dict(make_model().processor(TEXTS)), 0.0)


def test_lora_stays_in_its_tower(make_model):
    args = ModelArguments(encoder="e", decoder="d", train_decoder="lora", train_encoder="frozen", lora_r=2)
    model = choose_parameters(make_model(), args)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    lora = [name for name in trained if "lora_" in name]
    assert lora and all(".decoder." in name for name in lora)
    assert {name.split(".")[-4] for name in lora} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert [name for name in trained if "projector" in name and "lora" not in name]
    assert not any("encoder" in name for name in trained)


def test_lora_on_both_towers(make_model):
    args = ModelArguments(train_decoder="lora", train_encoder="lora", lora_r=2)
    model = choose_parameters(make_model(), args)
    lora = [name for name, p in model.named_parameters() if "lora_" in name]
    assert any(".encoder." in name for name in lora) and any(".decoder." in name for name in lora)
    assert not any("projector" in name for name in lora)


@pytest.mark.parametrize(
    "train_decoder, train_encoder, told",
    [("lorra", "frozen", "lora.*full.*frozen"), ("full", "Lora", "lora.*full.*frozen"), ("lora", "full", "combined")],
)
def test_ways_that_there_are_not(make_model, train_decoder, train_encoder, told):
    with pytest.raises(ValueError, match=told):
        choose_parameters(make_model(), ModelArguments(train_decoder=train_decoder, train_encoder=train_encoder))


@pytest.mark.parametrize("how", ["lora", "full"])
def test_what_is_trained_is_fp32_under_bf16(make_model, how):
    args = ModelArguments(train_decoder=how, train_encoder="frozen", lora_r=2)
    model = choose_parameters(make_model(dtype="bfloat16"), args)
    dtypes = {p.requires_grad: set() for p in model.parameters()}
    for p in model.parameters():
        dtypes[p.requires_grad].add(p.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}


@pytest.mark.parametrize(
    "flags, named",
    [
        ({}, "../base"),
        ({"model": "models/mine"}, "../../models/mine"),
        ({"model": "user/model"}, "user/model"),
        ({"base_id": "user/base"}, "user/base"),
        ({"model": "models/mine", "base_id": "user/base"}, "user/base"),
    ],
)
def test_how_an_adapter_names_its_base(tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/mine", "run/base"):
        Path(folder).mkdir(parents=True)
    assert name_of_base(ModelArguments(**flags), Path("run/adapter")) == named


def test_going_on_from_a_baseline(make_model, tmp_path):
    make_model(baseline="token_prepending").save_pretrained(tmp_path / "start")
    args = ModelArguments(model=str(tmp_path / "start"))
    assert load_model(args).config.baseline == "token_prepending"


@pytest.mark.parametrize(
    "arguments, told",
    [
        ({"query_instruction": "find"}, "--query_instruction"),
        ({"max_seq_length": 64}, "--max_seq_length"),
        ({"text_prefix": "> "}, "--text_prefix"),
        ({"pooling": "eos", "bidirectional": True}, "--pooling --bidirectional"),
        ({"decoder_gguf_file": "tiny.gguf"}, "--decoder_gguf_file"),
        ({"encoder": "y"}, "either --model"),
    ],
)
def test_a_finished_model_stays_as_it_is(arguments, told):
    with pytest.raises(ValueError, match=told):
        load_model(ModelArguments(model="x", **arguments))
