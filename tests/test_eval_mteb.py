"""eval_mteb.py: arguments, and runs from end to end. Nothing here may reach a network."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from eval_packs import cli, load, scores, sts_rows, write_all_types, write_pack, write_sts

import eval_mteb
from evaluation.encoder import Noise
from evaluation.report import load_paper, read_run
from evaluation.run import run


mteb = pytest.importorskip("mteb")


pytestmark = pytest.mark.usefixtures("offline")


def test_all_seven_types_run_from_folders(saved_dir, tmp_path):
    main_scores = write_all_types(tmp_path / "data")
    tasks, encoder = load(saved_dir, tmp_path / "data", tmp_path / "out")
    assert {task.type for task in tasks} == set(load_paper()["categories"])
    assert run(tasks, [encoder], tmp_path / "out") == []

    scored = read_run(tmp_path / "out")
    assert scored.scores == {} and set(scored.other) == set(main_scores)
    for name, score in scored.other.items():
        record = scored.records[name]
        (entry,) = json.loads((tmp_path / "out" / record["result"]).read_text())["scores"]["test"]
        assert record["main_score"] == main_scores[name]
        assert score == pytest.approx(100 * entry[main_scores[name]]) and np.isfinite(score)
        assert record["texts"] > 0 and record["max_characters"] >= record["mean_characters"] > 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["means"] == {} and summary["other_mean"] == pytest.approx(np.mean(list(scored.other.values())))


def test_tasks_without_an_instruction_are_named_before_anything_runs(saved_dir, data_dir, tmp_path):
    file = tmp_path / "instructions.json"
    file.write_text('{"SciFact": "Find"}')
    write_sts(data_dir / "X-Bare", 4, {"name": "X-Bare", "type": "STS", "main_score": "spearman"})
    with pytest.raises(ValueError, match=rf"STS16, X-Bare.*{file}"):
        load(saved_dir, data_dir, tmp_path / "out", "--instructions", str(file))
    assert not (tmp_path / "out").exists()


def test_noisy_scores_stand_beside_clean_ones(saved_dir, data_dir, tmp_path):
    output = tmp_path / "out"
    eval_mteb.main([*cli(saved_dir, data_dir, output), "--tasks", "all", "--noise"])
    scored = read_run(output)
    assert set(scored.noisy) == {"STS16", "SciFact", "X-Mine"}
    clean = {**scored.scores, **scored.other}
    assert all(scored.noisy[task] != clean[task] for task in clean)

    # what a noisy score is: the clean score of data that hold the noise themselves
    noise = Noise.read(ROOT / "evaluation" / "noise.txt", 0)
    rows = [
        {key: noise(value) if isinstance(value, str) else value for key, value in row.items()} for row in sts_rows(1)
    ]
    write_pack(tmp_path / "noisy" / "STS16", {"default": {"test": rows}})
    eval_mteb.main([*cli(saved_dir, tmp_path / "noisy", tmp_path / "out2"), "--tasks", "STS16"])
    assert scores(tmp_path / "out2")["STS16"] == pytest.approx(scored.noisy["STS16"], abs=1e-3)

    rows = json.loads((output / "summary.json").read_text())["noise"]
    assert [row["task"] for row in rows] == ["SciFact", "STS16", "X-Mine", "Mean over 3 tasks"]
    for row in rows[:-1]:
        assert row["drop"] == pytest.approx(clean[row["task"]] - scored.noisy[row["task"]])
    assert rows[-1]["drop"] == pytest.approx(np.mean([row["drop"] for row in rows[:-1]]))
    assert "With noise" in (output / "summary.md").read_text()


def test_outputs_hold_no_paths_and_mteb_reads_them(saved_dir, data_dir, tmp_path):
    output = tmp_path / "out"
    eval_mteb.main([*cli(saved_dir, data_dir, output), "--tasks", "all", "--noise"])
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        for private in (str(tmp_path), str(saved_dir.parent), str(Path.home())):
            assert private not in path.read_text(), path
    results = mteb.ResultCache(output).load_results(require_model_meta=False)
    assert {result.task_name for model in results for result in model} >= {"STS16", "SciFact"}
    record = json.loads((output / "records" / "SciFact.json").read_text())
    for key in ("revision", "dtype", "commit", "mteb", "torch", "transformers", "batch_size", "seconds", "data"):
        assert record[key], key
    assert record["instruction"] == {
        "query": json.loads((ROOT / "instructions.json").read_text())["SciFact"],
        "document": None,
    }


@pytest.mark.parametrize(
    "argv, missing",
    [
        ([], "--model, --tasks, --output"),
        (["--compare", "a"], "--output"),
        (["--prefetch", "d"], "--tasks"),
        (["--print_prompts", "--model", "m"], "--tasks"),
    ],
)
def test_missing_arguments_are_named(argv, missing, capsys):
    with pytest.raises(SystemExit):
        eval_mteb.parse_args(argv)
    assert f"needs {missing}\n" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--print_prompts"], ["--analyze", "--output", "o"]])
def test_noise_is_only_for_scores(flags, capsys):
    with pytest.raises(SystemExit):
        eval_mteb.parse_args(["--model", "m", "--tasks", "STS16", "--noise", *flags])
    assert "--noise" in capsys.readouterr().err


def test_a_data_folder_switches_the_network_off(saved_dir, data_dir, monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    eval_mteb.main([*cli(saved_dir, data_dir, None), "--print_prompts", "--tasks", "STS16"])
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"


def test_help_needs_nothing_heavy():
    """The modules that are slow to import are imported when they are needed."""
    import ast

    files = [ROOT / "eval_mteb.py", ROOT / "saving_utils.py", *(ROOT / "evaluation").glob("*.py")]
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body if file.name != "tasks.py" else ():
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", ())]
            for module in names:
                known = {*sys.stdlib_module_names, "evaluation", "saving_utils"}
                assert module.partition(".")[0] in known, (file, module)
                assert module != "evaluation.tasks", file
