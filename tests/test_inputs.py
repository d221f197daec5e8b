"""evaluation/inputs.py: what the model reads, and how long it is."""

import json

import numpy as np
import pytest
from conftest import ROOT
from eval_packs import cli, retrieval_configs, sts_rows

import eval_mteb
from evaluation.identity import folder_identity


mteb = pytest.importorskip("mteb")


pytestmark = pytest.mark.usefixtures("offline")


def test_print_prompts_shows_the_rows_that_the_model_reads(saved_dir, tiny_model, data_dir, tmp_path, capsys):
    eval_mteb.main([*cli(saved_dir, data_dir, None), "--print_prompts", "--tasks", "STS16", "SciFact"])
    printed = capsys.readouterr().out
    instructions = json.loads((ROOT / "instructions.json").read_text())
    processor = tiny_model.processor

    def decoder_row(text, instruction):
        return processor.tokenizer.decode(processor([text], instruction=instruction)["input_ids"][0])

    pair, configs = sts_rows(1)[0], retrieval_configs(2)
    document = configs["corpus"]["test"][0]
    for heading, row in {
        "STS16, text": decoder_row(pair["sentence1"], instructions["STS16"]),
        "SciFact, query": decoder_row(configs["queries"]["test"][0]["text"], instructions["SciFact"]),
        "SciFact, document": decoder_row(f"{document['title']} {document['text']}", None),
    }.items():
        assert f"{heading}, decoder reads:\n{row}\n" in printed
    assert "SciFact, document, encoder reads:\n[CLS]" in printed
    assert printed.count(instructions["SciFact"]) == 1
    assert printed.count("<|contextual|>") == 3


def test_lengths_and_norms_are_what_they_say(saved_dir, tiny_model, data_dir, tmp_path):
    icl, output = tmp_path / "icl", tmp_path / "out"
    icl.mkdir()
    for name in ("STS16", "SciFact", "X-Mine"):
        (icl / f"{name}.json").write_text(json.dumps([{"query": "example", "response": "yes"}] * 2))
    eval_mteb.main([*cli(saved_dir, data_dir, output), "--tasks", "STS16", "SciFact", "--analyze", "--icl", str(icl)])
    lengths = json.loads((output / "lengths.json").read_text())
    norms = json.loads((output / "norms.json").read_text())
    instruction = json.loads((ROOT / "instructions.json").read_text())["SciFact"]
    queries = [row["text"] for row in retrieval_configs(2)["queries"]["test"]]
    examples = json.loads((icl / "SciFact.json").read_text())
    rows = tiny_model.processor(queries, instruction=instruction)["attention_mask"]
    longer = tiny_model.processor(queries, instruction=instruction, examples=examples)["attention_mask"]
    assert lengths["SciFact"]["without_examples"] == pytest.approx(rows.sum(1).float().mean().item())
    assert lengths["SciFact"]["with_examples"] == pytest.approx(longer.sum(1).float().mean().item())
    assert lengths["SciFact"]["with_examples"] > lengths["SciFact"]["without_examples"] + 10
    vectors = tiny_model.encode(queries, instruction=instruction, normalize_embeddings=False)
    contextual, eos = tiny_model.split_states(vectors)
    assert norms["SciFact"]["contextual"] == pytest.approx(np.linalg.norm(contextual, axis=1).mean(), rel=1e-5)
    assert norms["SciFact"]["eos"] == pytest.approx(np.linalg.norm(eos, axis=1).mean(), rel=1e-5)
    for name in ("lengths.png", "norms.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    settings = json.loads((output / "settings.json").read_text())
    assert settings["revision"] == folder_identity(saved_dir, True)
    with pytest.raises(ValueError, match="another dtype"):
        eval_mteb.main([*cli(saved_dir, data_dir, output), "--tasks", "STS16", "--analyze", "--dtype", "bf16"])
