"""training/card.py: every fact of a run and every score is in its card, where the Hub looks for it and where people do."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from huggingface_hub import ModelCard, parse_eval_result_entries
from transformers.pipelines import get_supported_tasks

from configuration_causal2vec import Causal2VecConfig
from saving_utils import EVAL_RESULTS
from scripts.push_to_hub import files_to_push
from training import card


@pytest.fixture
def folder(saved_dir, run_facts, tmp_path):
    """What a card needs of a trained folder."""
    for name in ("config.json", "decoder_utils.py"):
        (tmp_path / name).write_bytes((saved_dir / name).read_bytes())
    (tmp_path / "training.json").write_text(json.dumps(run_facts))
    return tmp_path


def made(folder, *flags) -> ModelCard:
    card.main([str(folder), *map(str, flags)])
    return ModelCard.load(folder / "README.md")


def test_what_the_card_says(folder):
    found = made(folder, "--name", "tester/tiny", "--license", "apache-2.0")
    data = found.data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "sentence-transformers"
    assert data["base_model"] == ["intfloat/e5-base-v2", "Qwen/Qwen3-0.6B"]
    assert data["datasets"] == ["sentence-transformers/all-nli"]
    config = Causal2VecConfig.from_pretrained(folder)
    told = " ".join(found.text.split())
    for fact in (
        "# tester/tiny",
        *("`intfloat/e5-base-v2`", "`Qwen/Qwen3-0.6B`", "`torch` 2.11", "`transformers` 5.17"),
        *(f"{2 * config.hidden_size} numbers", f"`{config.query_instruction}`", 'revision="'),
        *("3 steps", "8 rows", "temperature 0.05", "rate 0.0001", "seed 1", "loss 1.5000"),
        *("decoder: lora", "encoder: frozen", "16 numbers"),
        *(f"{config.max_seq_length} tokens", f"{config.icl_max_seq_length}", f"{config.encoder_max_seq_length}"),
        "| nli | sentence-transformers/all-nli | 1,000 | 800 | CC BY-SA 4.0 | find similar |",
        "| own | own.jsonl | 10 | 8 | ",
    ):
        assert fact in told, fact
    assert re.search(r"`decoder_utils.py` \| `[0-9a-f]{64}`", found.text)


def test_the_hub_offers_no_pipeline_of_transformers(folder, saved_dir):
    """Those read one tokenizer alone: `feature-extraction` would load and then refuse every text."""
    for found in (made(folder), ModelCard.load(saved_dir / "README.md")):
        data = found.data.to_dict()
        assert data["pipeline_tag"] == "sentence-similarity" and "sentence-transformers" in data["tags"]
        assert not {data["pipeline_tag"], *data["tags"]} & set(get_supported_tasks())


def test_names_that_are_folders(folder, run_facts):
    """Only the last part of a path; `.` has one too."""
    arguments = {**run_facts["arguments"], "encoder": None, "decoder": None, "model": "."}
    (folder / "training.json").write_text(json.dumps({**run_facts, "arguments": arguments}))
    found = made(folder, "--base_model", "org/one")
    assert found.data.base_model == ["org/one"] and f"# {folder.name}\n" in found.text
    assert "``" not in found.text.replace("```", "") and str(folder.parent) not in found.text


def test_scores_are_where_the_hub_looks(folder):
    results = ROOT / "results" / "all-MiniLM-L6-v2"
    summary = json.loads((results / "summary.json").read_text())
    found = made(folder, "--results", results)
    scores = {result.dataset_name: result for result in found.data.eval_results}
    assert len(scores) >= 8
    sts = scores["MTEB STSBenchmark"]
    assert (sts.task_type, sts.dataset_type, sts.dataset_split) == ("STS", "mteb/STSBenchmark", "test")
    assert sts.metric_type == "cosine_spearman" and sts.dataset_revision
    assert f"| MTEB STSBenchmark | STS | cosine_spearman | {sts.metric_value:.2f} |" in found.text
    assert f"{sts.metric_value:.4f}"[:5] in json.dumps(summary)
    assert "## Results" not in made(folder).text


def test_the_hubs_leaderboard_gets_what_was_scored_on_the_hubs_data(folder, tmp_path_factory, capsys):
    """By mteb's converter; scores on local copies stay in the card."""
    mteb = pytest.importorskip("mteb")
    results = shutil.copytree(ROOT / "results" / "all-MiniLM-L6-v2", tmp_path_factory.mktemp("scores") / "results")
    stale = folder / EVAL_RESULTS / "STS12.yaml"
    stale.parent.mkdir(exist_ok=True)
    stale.write_text("[]")
    data = made(folder, "--results", results).data
    assert not list(stale.parent.iterdir()) and "Scores of 0 tasks" in capsys.readouterr().out
    assert "mteb" in data.tags and "sentence-transformers" in data.tags and "mteb" not in made(folder).data.tags

    (file,) = results.rglob("STS16.json")
    dataset = mteb.get_task("STS16").metadata.dataset
    file.write_text(json.dumps({**json.loads(file.read_text()), "dataset_revision": dataset["revision"]}))
    made(folder, "--results", results)
    assert [path.name for path in stale.parent.iterdir()] == ["STS16.yaml"]
    entries = parse_eval_result_entries(yaml.safe_load((stale.parent / "STS16.yaml").read_text()))
    (overall,) = [entry for entry in entries if entry.task_id == "STS16"]
    assert (overall.dataset_id, overall.dataset_revision) == (dataset["path"], dataset["revision"])
    score = {result.dataset_name: result for result in made(folder, "--results", results).data.eval_results}[
        "MTEB STS16"
    ]
    assert overall.value == pytest.approx(score.metric_value, abs=1e-4) and "MTEB v" in overall.notes

    assert {Path(EVAL_RESULTS, "STS16.yaml")} == {path for path in files_to_push(folder) if path.suffix == ".yaml"}


def test_the_snippet_runs(folder, saved_dir, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", made(folder).text, re.DOTALL)
    exec(compile(code.replace("path or id", str(saved_dir)), "card", "exec"), {})
    assert re.match(r"\[\[-?\d\.\d+\]\]", capsys.readouterr().out)


def test_a_folder_without_facts(tmp_path, capsys):
    with pytest.raises(SystemExit):
        card.main([str(tmp_path)])
    assert "training.json" in capsys.readouterr().err
