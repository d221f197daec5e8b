"""benchmarks/encode.py: it runs in a clone alone, at any decoder size, and redraws itself."""

import contextlib
import io
import json

import pytest
import torch

from benchmarks import encode as bench


@pytest.fixture(scope="module")
def run(saved_dir, tmp_path_factory):
    """One tiny run: its folder and its results, which are the last line of its output too."""
    folder = tmp_path_factory.mktemp("bench")
    decoder = dict(
        model_type="mistral", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    (folder / "decoder.json").write_text(
        json.dumps({**decoder, "num_key_value_heads": 2, "max_position_embeddings": 512})
    )
    (folder / "STS12.json").write_text(json.dumps([{"query": "a cat", "response": "a small cat"}]))  # room is left
    threads = torch.get_num_threads()
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.MonkeyPatch.context() as patch:
        patch.delitem(bench.PRECISIONS, "float32 compiled")  # compiling takes minutes
        patch.setattr(bench, "has_fast_bfloat16", lambda: True)  # this small, it is quick on any processor
        results = bench.main(
            f"--model {saved_dir} --decoder_config {folder / 'decoder.json'} --tasks STS12 --texts 6 --long_texts 2 "
            "--corpus_texts 8 --precision_texts 8 --queries 2 --repeats 1 --batch_size 3 --device cpu "
            f"--examples_dir {folder} --output {folder} --name tiny".split()
        )
    assert torch.get_num_threads() == threads
    assert json.loads(told.getvalue().splitlines()[-1]) == results
    return folder, results


class TestRun:
    def test_results(self, run):
        folder, results = run
        assert json.loads((folder / "tiny.json").read_text()) == results
        precision = results["precision"]
        assert precision["float32"]["cosine"] > 0.99999 > precision["bfloat16"]["cosine"] > 0.99
        assert all(values["short texts per second"] > 0 for values in precision.values())
        for row in results["ratios"]:
            assert row["met"] == (row["value"] >= row["target"] if row["at_least"] else row["value"] <= row["target"])
        assert len(results["ratios"]) == 4 + 1 + 1 + 2

    def test_methods(self, run):
        methods = run[1]["tasks"]["STS12"]["methods"]
        assert len(methods) == 8
        tokens = {name: method["tokens_per_text"] for name, method in methods.items()}
        assert tokens["causal2vec shared"] == tokens["causal2vec examples shared"] < tokens["last-token"]
        assert tokens["last-token"] < tokens["echo"] and tokens["causal2vec"] < tokens["causal2vec examples"]
        assert all(method["gflops_per_text"] > 0 and method["ms_per_text"] > 0 for method in methods.values())
        assert methods["causal2vec shared"]["gflops_per_text"] < methods["causal2vec"]["gflops_per_text"]

    def test_redraw(self, run):
        folder, results = run
        drawn = [folder / name for name in ("tiny.md", "tiny-methods.png", "tiny-ratios.png")]
        table = drawn[0].read_text()
        for file in drawn:
            file.unlink()
        assert bench.main(["--redraw", str(folder / "tiny.json")]) == results
        assert drawn[0].read_text() == table and all(file.stat().st_size > 100 for file in drawn)


def test_vectors_that_differ_stop_it():
    with pytest.raises(AssertionError, match="differ"):
        bench.check_equal(torch.eye(3), torch.eye(3).flip(0), "float32")


def test_a_missing_pack(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data_dir"):
        bench.read_texts(str(tmp_path), "STS12")
