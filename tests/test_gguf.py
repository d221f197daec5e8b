"""A decoder from a GGUF file: joined, trained, saved and loaded like any other."""

import pytest
import torch
from conftest import TEXTS
from safetensors.torch import load_file
from transformers import AutoTokenizer

import loading_utils
from loading_utils import load_backbone
from modeling_causal2vec import Causal2VecModel


def join(backbone_dir, gguf_dir, **kwargs) -> Causal2VecModel:
    return Causal2VecModel.from_encoder_decoder_pretrained(
        backbone_dir("bert"), str(gguf_dir), decoder_kwargs={"gguf_file": "tiny.gguf"}, **kwargs
    )


def test_a_gguf_decoder_is_joined_and_saved(backbone_dir, gguf_dir, tmp_path):
    model = join(backbone_dir, gguf_dir)
    expected = load_file(gguf_dir / "plain" / "model.safetensors")
    loaded = model.decoder.state_dict()
    assert len(loaded) == len(expected) > 10
    for name, tensor in loaded.items():
        of_file = expected[f"model.{name}"]
        torch.testing.assert_close(tensor[: len(of_file)], of_file, rtol=0, atol=1e-6)
    assert model.dtype == torch.float32 and model.config.template_prefix == "<|im_start|>user\n"
    plain = AutoTokenizer.from_pretrained(gguf_dir / "plain")
    for text in TEXTS:
        assert model.processor.tokenizer(text)["input_ids"] == plain(text)["input_ids"]

    before = model.encode(TEXTS, instruction="Find it")
    model.save_pretrained(tmp_path / "model")
    again = Causal2VecModel.from_pretrained(tmp_path / "model")
    assert (again.encode(TEXTS, instruction="Find it") == before).all() and abs(before).max() > 0.01
    assert "gguf" not in (tmp_path / "model" / "config.json").read_text() + str(again.config)
    assert str(gguf_dir) not in "".join(path.read_text() for path in (tmp_path / "model").glob("*.json"))


def test_a_gguf_decoder_can_be_trained(backbone_dir, gguf_dir):
    model = join(backbone_dir, gguf_dir).train()
    model(**model.processor(TEXTS)).embeddings.sum().backward()
    for name, weight in model.decoder.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


def test_what_is_asked_of_the_backbone_is_kept(gguf_dir):
    model = load_backbone(str(gguf_dir), gguf_file="tiny.gguf", dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"


def test_a_row_ends_in_one_eos(backbone_dir, gguf_dir):
    processor = join(backbone_dir, gguf_dir).processor
    assert processor.tokenizer.eos_token == processor.template_suffix == "<|im_end|>"
    rows = processor(TEXTS)
    for ids, mask in zip(rows["input_ids"], rows["attention_mask"]):
        assert (ids[mask.bool()] == processor.tokenizer.eos_token_id).nonzero().tolist() == [[int(mask.sum()) - 1]]


def test_the_special_tokens_are_the_files(backbone_dir, gguf_dir, monkeypatch):
    from_pretrained = AutoTokenizer.from_pretrained

    def mistaken(*args, **kwargs):  # as transformers 5.17 is
        tokenizer = from_pretrained(*args, **kwargs)
        tokenizer.eos_token, tokenizer.pad_token = tokenizer.bos_token, None
        return tokenizer

    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", mistaken)
        tokenizer = join(backbone_dir, gguf_dir).processor.tokenizer
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == ["<s>", "<|im_end|>", "<pad>"]


def test_without_the_package_it_is_named(backbone_dir, gguf_dir, monkeypatch):
    monkeypatch.setattr(loading_utils, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match="pip install gguf"):
        join(backbone_dir, gguf_dir)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.02, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_off(gguf_dir, tmp_path, kept):
    whole = (gguf_dir / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match="cut.gguf"):
        load_backbone(str(tmp_path), gguf_file="cut.gguf")
