"""benchmarks/bench_minilm.py: both sides are measured through sentence-transformers, and the table says what was."""

import json
import sys

import pytest
from conftest import ROOT


pytest.importorskip("sentence_transformers")
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_minilm  # noqa: E402


@pytest.fixture(scope="module")
def run(saved_dir, backbone_dir, tmp_path_factory):
    """One tiny run: its output and its results."""
    output = tmp_path_factory.mktemp("bench") / "minilm"
    results = bench_minilm.main(
        f"--model {saved_dir} --baseline {backbone_dir('bert')} --texts 4 --repeats 1 --batch_size 3 "
        f"--dtype float32 bfloat16 --output {output}".split()
    )
    return output, results


def test_results(run):
    output, results = run
    assert json.loads(output.with_suffix(".json").read_text()) == results
    assert results["dimension"] == {"causal2vec": 64, "baseline": 24}
    ours, alone = (results["parameters"][side]["encoder"] for side in ("causal2vec", "baseline"))
    assert ours + 24 * 24 + 24 == alone  # BERT's pooler, which Causal2Vec leaves out
    kinds = ["queries, one at a time", "short texts", "long texts"]
    assert [(row["kind"], row["dtype"]) for row in results["rows"]] == [
        (kind, dtype) for kind in kinds for dtype in ("float32", "bfloat16")
    ]
    for row in results["rows"]:
        seconds, speed, tokens = (row[key] for key in ("seconds", "texts_per_second", "tokens_per_text"))
        assert {side: 4 / values[0] for side, values in seconds.items()} == pytest.approx(speed)
        assert row["texts"] == 4 and row["ratio"] == pytest.approx(speed["causal2vec"] / speed["baseline"])
        assert tokens["causal2vec"]["decoder"] > 0
        assert tokens["causal2vec"]["encoder"] == tokens["baseline"]["encoder"] <= 40  # the positions of the encoder


def test_table_is_of_the_results(run):
    output, results = run
    table = output.with_suffix(".md").read_text()
    for row in results["rows"]:
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {row['kind']} | {row['dtype']} |")]
        cells = [cell.strip() for cell in line.split("|")[3:-1]]
        tokens = [" + ".join(f"{count:.1f}" for count in towers.values()) for towers in row["tokens_per_text"].values()]
        assert cells[:2] == tokens
        assert [float(cell) for cell in cells[2:4]] == [round(speed, 1) for speed in row["texts_per_second"].values()]
        assert float(cells[4]) == round(row["ratio"], 2)
    output.with_suffix(".md").unlink()
    assert bench_minilm.main(["--redraw", str(output)]) == results
    assert output.with_suffix(".md").read_text() == table


def test_only_a_folder_is_trusted(capsys):
    with pytest.raises(SystemExit):
        bench_minilm.main(["--model", "user/name"])
    assert "--model must be a folder, got 'user/name'" in capsys.readouterr().err
