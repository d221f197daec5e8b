"""evaluation/run.py: records, and runs that are interrupted, resumed, repeated or changed."""

import json
from dataclasses import replace

import numpy as np
import pytest
from eval_packs import cli, counting, load, retrieval_configs, scores, sts_rows, write_pack, write_sts

import eval_mteb
from evaluation.encoder import Instructions
from evaluation.report import read_run
from evaluation.run import result_cache, run


mteb = pytest.importorskip("mteb")


pytestmark = pytest.mark.usefixtures("offline")


def test_another_setting_needs_another_folder(saved_dir, data_dir, tmp_path):
    output = tmp_path / "out"
    eval_mteb.main([*cli(saved_dir, data_dir, output), "--tasks", "STS16"])
    for name, *value in (("dtype", "bf16"), ("pooling", "last_token"), ("max_length", "16"), ("unnormalized",)):
        with pytest.raises(ValueError, match=f"another {name.replace('un', '')}"):
            eval_mteb.main([*cli(saved_dir, data_dir, output), "--tasks", "STS16", f"--{name}", *value])
    eval_mteb.main(["--output", str(output), "--export", str(tmp_path / "kept")])
    assert scores(tmp_path / "kept") == scores(output)
    settings = json.loads((output / "settings.json").read_text())
    assert not read_run(tmp_path / "kept").records["STS16"].keys() & settings.keys()
    with pytest.raises(ValueError, match="--output"):
        eval_mteb.main([*cli(saved_dir, data_dir, tmp_path / "kept"), "--tasks", "STS16"])


def test_results_made_with_another_instruction_or_other_data_are_not_reused(saved_dir, data_dir, tmp_path, capsys):
    output, file = tmp_path / "out", tmp_path / "instructions.json"
    eval_mteb.main([*cli(saved_dir, data_dir, output), "--tasks", "STS16"])
    before = scores(output)
    file.write_text('{"STS16": "Something else"}')
    changed = [*cli(saved_dir, data_dir, output), "--tasks", "STS16", "--instructions", str(file)]
    with pytest.raises(SystemExit, match="1 of 1.*STS16"):
        eval_mteb.main(changed)
    assert "another instruction" in capsys.readouterr().err
    assert scores(output) == before
    eval_mteb.main([*changed, "--overwrite"])
    assert scores(output) != before

    before = scores(output)
    write_sts(data_dir / "STS16", seed=9)
    with pytest.raises(SystemExit, match="STS16"):
        eval_mteb.main(changed)
    assert "another data" in capsys.readouterr().err
    eval_mteb.main([*changed, "--overwrite"])
    assert scores(output) != before


def test_an_interrupted_run_goes_on_where_it_was(saved_dir, data_dir, tmp_path):
    output = tmp_path / "out"
    tasks, encoder = load(saved_dir, data_dir, output)
    whole = counting(encoder)
    run(tasks, [whole], tmp_path / "whole")

    with pytest.raises(KeyboardInterrupt):  # every task calls twice
        run(tasks, [counting(encoder, fail_at=3)], output)
    assert set(scores(output)) == {tasks[0].name}
    assert not json.loads((output / "records" / f"{tasks[1].name}.json").read_text())["finished"]

    rest = counting(encoder)
    assert run(tasks, [rest], output) == []
    assert rest.backend.calls == whole.backend.calls - 2
    assert scores(output) == scores(tmp_path / "whole")

    nothing = counting(encoder)
    run(tasks, [nothing], output)
    assert nothing.backend.calls == 0


def test_a_finished_split_is_not_computed_again(saved_dir, tmp_path):
    task = {"name": "X-Two", "type": "STS", "main_score": "spearman", "instruction": "", "eval_splits": ["a", "b"]}
    write_pack(tmp_path / "data" / "X-Two", {"default": {"a": sts_rows(1), "b": sts_rows(2)}}, task)
    tasks, encoder = load(saved_dir, tmp_path / "data", tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(tasks, [counting(encoder, fail_at=2)], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no finished results"):
        read_run(tmp_path / "out")
    rest = counting(encoder)
    run(tasks, [rest], tmp_path / "out")
    assert rest.backend.calls == 2
    run(tasks, [encoder], tmp_path / "whole")
    assert scores(tmp_path / "out") == scores(tmp_path / "whole")


def test_scoring_again_can_be_interrupted_too(saved_dir, data_dir, tmp_path):
    """What was there before is not taken for the new result."""
    output = tmp_path / "out"
    tasks, encoder = load(saved_dir, data_dir, output, "--tasks", "STS16")
    run(tasks, [encoder], output)
    before = scores(output)
    changed = replace(encoder, instruction_for=Instructions({"STS16": "Another"}), lengths=[])
    with pytest.raises(KeyboardInterrupt):
        run(tasks, [counting(changed, fail_at=1)], output, overwrite=True)
    assert run(tasks, [changed], output) == []
    assert scores(output) != before
    run(tasks, [changed], tmp_path / "whole")
    assert scores(output) == scores(tmp_path / "whole")


def test_parts_of_an_aggregate_are_not_reused_under_another_instruction(saved_dir, tmp_path, capsys):
    from evaluation.tasks import select_tasks

    (whole,) = select_tasks(["CQADupstackRetrieval"])
    for seed, part in enumerate(whole.leaves()):
        write_pack(tmp_path / "data" / part.metadata.name, retrieval_configs(seed))
    output = tmp_path / "out"
    tasks, encoder = load(saved_dir, tmp_path / "data", output)
    with pytest.raises(KeyboardInterrupt):  # in the third part
        run(tasks, [counting(encoder, fail_at=5)], output)
    changed = replace(
        encoder, instruction_for=Instructions({name: "Another" for name in encoder.instruction_for.table})
    )
    assert run(tasks, [changed], output) == ["CQADupstackRetrieval"]
    assert "another instruction" in capsys.readouterr().err
    rest = counting(encoder)
    assert run(tasks, [rest], output) == []
    assert rest.backend.calls == 2 * (12 - 2)
    parts = [
        json.loads(next((output / "results").rglob(f"{part.metadata.name}.json")).read_text())
        for part in whole.leaves()
    ]
    main_scores = [100 * part["scores"]["test"][0]["main_score"] for part in parts]
    assert scores(output) == {"CQADupstackRetrieval": pytest.approx(np.mean(main_scores), abs=1e-4)}
    assert max(main_scores) > 0


def test_a_half_written_result_never_appears(saved_dir, data_dir, tmp_path, monkeypatch):
    from mteb.results import TaskResult

    def write_half(self, path):
        path.write_text('{"dataset_revision": "x", "sc')
        raise KeyboardInterrupt

    output = tmp_path / "out"
    tasks, encoder = load(saved_dir, data_dir, output)
    with monkeypatch.context() as patch:
        patch.setattr(TaskResult, "to_disk", write_half)
        with pytest.raises(KeyboardInterrupt):
            run(tasks, [encoder], output)
    assert not list(output.rglob("SciFact.json"))[1:]  # the record, which says that it is not finished
    assert run(tasks, [encoder], output) == []
    assert set(scores(output)) == {"SciFact", "STS16", "X-Mine"}
    assert not [path for path in output.rglob("*") if "incomplete" in path.name]


def test_a_task_that_fails_does_not_stop_the_others(saved_dir, data_dir, tmp_path, capsys):
    output = tmp_path / "out"
    tasks, encoder = load(saved_dir, data_dir, output)
    failing = counting(encoder, fail_at=0, error=RuntimeError)
    assert run(tasks, [failing], output) == [tasks[0].name]
    assert "as if killed" in capsys.readouterr().err
    assert set(scores(output)) == {task.name for task in tasks[1:]}
    assert run(tasks, [encoder], output) == []


def test_only_the_first_process_writes(tmp_path, saved_dir, data_dir):
    from mteb.results import TaskResult

    tasks, encoder = load(saved_dir, data_dir, tmp_path / "out")
    entry = {"test": {"default": {"main_score": 0.5}}}
    result = TaskResult.from_task_results(tasks[0].task, entry, evaluation_time=1)
    for writes in (False, True):
        cache = result_cache(tmp_path / "cache", writes=writes)
        cache.save_to_cache(result, encoder.mteb_model_meta)
        assert cache.get_task_result_path(tasks[0].name, encoder.mteb_model_meta).exists() == writes
