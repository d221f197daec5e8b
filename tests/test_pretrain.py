"""pretrain.py and corpus_pairs.py: what becomes of a small corpus."""

import gzip
import json
import sys

import numpy as np
import pytest

import corpus_pairs
import pretrain


pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("one", "two"):
        documents = [
            "\n".join(f"Paragraph {p} of document {d} in {name} says {d * 31 + p}." for p in range(6))
            for d in range(400)
        ]
        (folder / f"{name}.txt").write_text("\n\n".join(documents))
    return folder


def run(monkeypatch, corpus, output, *flags):
    small = "--vocab_size 300 --hidden_size 64 --num_hidden_layers 1 --intermediate_size 64 --seq_len 32 --batch_size 4"
    small += " --max_steps 4 --save_steps 2 --heldout_tokens 640 --max_tokens 2000"
    argv = ["pretrain.py", "--corpus_dir", str(corpus), "--output_dir", str(output), *small.split(), *flags]
    monkeypatch.setattr(sys, "argv", argv)
    pretrain.main()
    return json.loads((output / "pretrain.json").read_text())


def test_a_decoder_that_goes_on_sees_other_tokens(monkeypatch, corpus, tmp_path):
    first = run(monkeypatch, corpus, tmp_path / "first")
    assert first["tokens_seen"] == 4 * 4 * 32 and 1 < first["heldout_perplexity"] < 400
    again = run(monkeypatch, corpus, tmp_path / "again", "--model", str(tmp_path / "first"), "--skip_tokens", "2000")
    assert again["heldout_perplexity"] < first["heldout_perplexity"]
    assert (again["tokens_seen_before"], again["tokens_seen"]) == (512, 512)
    assert len(again["samples"]) == 4 and all(sample["continuation"] for sample in again["samples"])
    tokens = {
        name: {part: np.load(tmp_path / name / f"{part}.npy") for part in ("train", "heldout")}
        for name in ("first", "again")
    }
    assert (tokens["first"]["heldout"] == tokens["again"]["heldout"]).all()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    read = {name: set(tokenizer.decode(parts["train"]).split("\n")[1:-1]) for name, parts in tokens.items()}
    assert len(read["first"]) > 20 and not read["first"] & read["again"]

    finished = run(monkeypatch, corpus, tmp_path / "first")  # nothing is left to train
    assert finished["heldout_loss"] == pytest.approx(first["heldout_loss"]) and finished["tokens_seen"] == 512
    for flags, told in ((("--vocab_size", "400"), "--vocab_size 300"), (("--shards", "one"), "--shards None")):
        with pytest.raises(ValueError, match=f"holds a run with {told}"):
            run(monkeypatch, corpus, tmp_path / "first", *flags)
    for flags, told in (
        (("--seed", "1"), "--seed must be 42, as for"),
        (("--skip_tokens", "10000000"), "lower --skip_tokens"),
    ):
        with pytest.raises(ValueError, match=told):
            run(monkeypatch, corpus, tmp_path / "refused", "--model", str(tmp_path / "first"), *flags)
    with pytest.raises(ValueError, match="another folder"):
        run(monkeypatch, corpus, tmp_path / "first", "--model", str(tmp_path / "first"))


def test_a_missing_shard(corpus):
    with pytest.raises(ValueError, match=r"No corpus file for \['three'\] .* found \['one', 'two'\]"):
        pretrain.corpus_files(str(corpus), ["one", "three"])


def test_two_files_of_one_name(tmp_path):
    for name in ("one.txt", "one.2.txt"):
        (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match="are both named one; rename one of them"):
        pretrain.corpus_files(str(tmp_path))


def test_neighbouring_paragraphs(corpus, tmp_path):
    assert list(corpus_pairs.neighbours("a b\nc d\ne f\ng h\nlonger than the limit", 2, 5)) == [
        ("a b", "c d"),
        ("e f", "g h"),
    ]
    assert list(corpus_pairs.neighbours("same\nsame\nx\nother", 2, 5)) == []
    outputs = [tmp_path / "pairs.jsonl.gz", tmp_path / "again.jsonl.gz"]
    for output in outputs:
        corpus_pairs.main(
            [
                "--corpus_dir",
                str(corpus),
                "--shards",
                "two",
                "--output",
                str(output),
                "--rows",
                "50",
                "--shortest",
                "10",
            ]
        )
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    rows = [json.loads(line) for line in gzip.open(outputs[0], "rt")]
    assert len(rows) == 50 and all("in two" in row["query"] and "in two" in row["positive"] for row in rows)
    number = [[int(row[side].split()[1]) for row in rows] for side in ("query", "positive")]
    assert all(b == a + 1 for a, b in zip(*number))
