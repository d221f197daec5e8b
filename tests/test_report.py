"""evaluation/report.py: means and comparisons, from numbers that can be checked by hand."""

import json

import pytest
from eval_packs import write_result

from evaluation.report import (
    TABLE_END,
    TABLE_START,
    benchmark_means,
    compare,
    comparison_markdown,
    export,
    load_paper,
    mean_over,
    read_run,
    replace_table,
    write_comparison,
    write_summary,
)
from saving_utils import write_json


pytest.importorskip("matplotlib")


def test_the_papers_averages_follow_from_its_scores():
    published = {
        "S-LLaMA-1.3B": 62.63,
        "Qwen2.5-1.5B": 63.97,
        "LLaMA-2-7B": 64.94,
        "Mistral-7B": 66.10,
        "Mistral-7B w/ ICL": 66.85,
    }
    paper = load_paper()
    assert set(paper["scores"]) == set(published)
    for name, average in published.items():
        mean = benchmark_means(paper["scores"][name])["MTEB(eng, v1)"]
        assert mean.complete and mean.value == pytest.approx(average, abs=0.005)
    # the ablations' scores on MTEB-MINI
    for name, average in {"S-LLaMA-1.3B": 62.83, "Mistral-7B": 65.85}.items():
        mean = benchmark_means(paper["scores"][name])["MTEB-MINI"]
        assert mean.complete and mean.total == 30 and mean.value == pytest.approx(average, abs=0.005)


def test_the_paper_has_every_task_in_one_category():
    paper = load_paper()
    sizes = {category: len(tasks) for category, tasks in paper["categories"].items()}
    assert sizes == {
        "Retrieval": 15,
        "Reranking": 4,
        "Clustering": 11,
        "PairClassification": 3,
        "Classification": 12,
        "STS": 10,
        "Summarization": 1,
    }
    assert len(paper["tasks"]) == 56 and len(set(paper["mini"])) == 30 and set(paper["mini"]) <= set(paper["tasks"])
    assert all(set(scores) == set(paper["tasks"]) for scores in paper["scores"].values())


def test_a_model_that_the_paper_does_not_have_is_an_error():
    with pytest.raises(ValueError, match="'GPT'.*Mistral-7B"):
        read_run("paper:GPT")


def test_a_mean_over_some_of_its_tasks_says_so():
    mean = mean_over({"a": 1.0, "b": 2.0, "z": 9.0}, ["a", "b", "c"])
    assert mean.value == 1.5 and not mean.complete and mean.label == "2 of 3 tasks, partial"
    mean = mean_over({"a": 1.0, "b": 2.0}, ["a", "b"])
    assert mean.complete and mean.label == "2 tasks"
    assert mean_over({}, ["a"]).value is None


def test_summary_adds_up_and_keeps_other_tasks_apart(two_runs):
    a, _ = two_runs
    summary = write_summary(a)
    assert summary == json.loads((a / "summary.json").read_text())
    assert summary["tasks"] == {"SciFact": 30.0, "STS12": 50.0, "STS13": 70.0}
    assert summary["other_tasks"] == {"X-One": 10.0, "X-Two": 20.0} and summary["other_mean"] == 15.0
    assert summary["means"] == {
        "Retrieval": {"mean": 30.0, "tasks": 1, "of": 15, "complete": False},
        "STS": {"mean": 60.0, "tasks": 2, "of": 10, "complete": False},
        "MTEB(eng, v1)": {"mean": 50.0, "tasks": 3, "of": 56, "complete": False},
        "MTEB-MINI": {"mean": pytest.approx((30 + 50 + 70) / 3), "tasks": 3, "of": 30, "complete": False},
    }
    benchmark, other = (a / "summary.md").read_text().split("## Other tasks")
    assert "partial" in benchmark and "X-One" not in benchmark and "X-One" in other and "15.00" in other


def test_summary_tells_of_texts_that_were_cut(two_runs):
    a, _ = two_runs
    counts = {"STS12": {"texts": 3, "decoder": 3, "encoder": 1, "of": 20}, "X-One": {"texts": 0, "decoder": 0, "of": 9}}
    for task, truncated in counts.items():
        file = a / "records" / f"{task}.json"
        write_json(file, {**json.loads(file.read_text()), "truncated": truncated})
    write_summary(a)
    (line,) = [line for line in (a / "summary.md").read_text().splitlines() if "STS12 3 of 20" in line]
    assert "3 by the decoder" in line and "1 by the encoder" in line and "X-" not in line


def test_a_complete_benchmark_is_not_called_partial(tmp_path):
    folder = tmp_path / "whole"
    for task, category in load_paper()["tasks"].items():
        write_result(folder, task, category, 0.5)
    summary = write_summary(folder)
    assert all(mean["complete"] and mean["mean"] == 50 for mean in summary["means"].values())
    assert "partial" not in (folder / "summary.md").read_text()


def test_unfinished_results_do_not_count(two_runs):
    a, _ = two_runs
    write_result(a, "STS13", "STS", 0.7, finished=False)
    assert set(read_run(a).scores) == {"STS12", "SciFact"}


def test_a_score_is_the_mean_over_splits(tmp_path):
    write_result(tmp_path / "a", "X-One", "STS", 0.4, in_benchmark=False, splits=("dev", "test"))
    result = tmp_path / "a" / "results" / "m" / "r" / "X-One.json"
    content = json.loads(result.read_text())
    content["scores"]["dev"][0]["main_score"] = 0.6
    write_json(result, content)
    assert read_run(tmp_path / "a").other == {"X-One": pytest.approx(50.0)}


def test_a_folder_without_results_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished results"):
        read_run(tmp_path)


def test_drops_under_noise(two_runs):
    a, _ = two_runs
    write_result(a, "STS12", "STS", 0.4, noise="abc")
    write_result(a, "X-Two", "STS", 0.15, noise="abc", in_benchmark=False)
    rows = write_summary(a)["noise"]
    assert [(row["task"], round(row["drop"], 6)) for row in rows] == [
        ("STS12", 10.0),
        ("X-Two", 5.0),
        ("Mean over 2 tasks", 7.5),
    ]


def test_differences_are_over_the_tasks_that_both_have(two_runs):
    rows = compare([read_run(folder) for folder in two_runs])
    means = {row["name"]: row for row in rows["means"]}
    assert means["STS"]["scores"] == [50.0, 60.0] and means["STS"]["label"] == "1 of 10 tasks, partial"
    assert means["MTEB(eng, v1)"]["scores"] == [40.0, 40.0] and means["MTEB(eng, v1)"]["differences"] == [0.0]
    assert means["MTEB(eng, v1)"]["label"] == "2 of 56 tasks, partial"
    assert "Clustering" not in means
    tasks = {row["name"]: row for row in rows["tasks"]}
    assert set(tasks) == {"STS12", "SciFact"}
    assert tasks["STS12"]["differences"] == [pytest.approx(10.0)]
    other = {row["name"]: row for row in rows["other"]}
    assert other["X-Two"]["scores"] == [20.0, None] and other["X-Two"]["differences"] == [None]
    assert other["Mean"]["scores"] == [10.0, 15.0] and other["Mean"]["label"] == "1 of 2 tasks, partial"


def test_comparison_with_the_paper_is_over_what_has_been_scored(two_runs):
    a, _ = two_runs
    rows = compare([read_run("paper:Mistral-7B"), read_run("paper:LLaMA-2-7B"), read_run(a)])
    (benchmark,) = [row for row in rows["means"] if row["name"] == "MTEB(eng, v1)"]
    paper = load_paper()["scores"]["Mistral-7B"]
    assert benchmark["label"] == "3 of 56 tasks, partial"
    assert benchmark["scores"][0] == pytest.approx((paper["STS12"] + paper["STS13"] + paper["SciFact"]) / 3)
    full = compare([read_run("paper:Mistral-7B"), read_run("paper:LLaMA-2-7B")])
    (benchmark,) = [row for row in full["means"] if row["name"] == "MTEB(eng, v1)"]
    assert benchmark["label"] == "56 tasks" and benchmark["differences"] == [pytest.approx(64.94 - 66.10, abs=0.01)]


def test_drops_under_noise_are_compared(two_runs):
    a, b = two_runs
    write_result(a, "STS12", "STS", 0.4, noise="abc")
    write_result(a, "SciFact", "Retrieval", 0.25, noise="abc")
    write_result(b, "STS12", "STS", 0.3, noise="abc")
    write_result(b, "BIOSSES", "STS", 0.3, noise="abc")
    runs = [read_run(folder) for folder in two_runs]
    rows = compare(runs)
    assert [(row["name"], [round(score, 6) for score in row["scores"]]) for row in rows["drops"]] == [
        ("STS12", [10.0, 30.0]),
        ("Mean", [10.0, 30.0]),
    ]
    assert "+20.00" in comparison_markdown(runs, rows)


def test_results_without_a_common_task_cannot_be_compared(two_runs, tmp_path):
    write_result(tmp_path / "c", "NQ", "Retrieval", 0.5)
    with pytest.raises(ValueError, match="all of a, c"):
        compare([read_run(two_runs[0]), read_run(tmp_path / "c")])
    with pytest.raises(ValueError, match="at least two"):
        compare([read_run(two_runs[0])])


def test_comparison_files(two_runs, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{TABLE_START}\nold\n{TABLE_END}\nend\n")
    text = write_comparison([*map(str, two_runs), "paper:Mistral-7B"], tmp_path / "out", readme)
    assert (tmp_path / "out" / "compare.md").read_text() == text
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["names"] == ["a", "b", "Mistral-7B (paper)"]
    for name in ("compare_categories.png", "compare_tasks.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert text.strip() in readme.read_text() and "old" not in readme.read_text()
    assert readme.read_text().startswith("# Title\n") and readme.read_text().endswith("\nend\n")


def test_what_is_exported_is_read_as_the_folder_that_it_came_from(two_runs, tmp_path):
    a, b = two_runs
    write_result(a, "STS12", "STS", 0.4, noise="abc")
    write_result(a, "STS14", "STS", 0.9, finished=False)
    kept = tmp_path / "kept"
    export(a, kept)
    tasks = {f"tasks/{name}.json" for name in ("STS12", "STS12.noise", "STS13", "SciFact", "X-One", "X-Two")}
    files = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
    assert files == {"summary.json", "summary.md", *tasks}
    export(kept, tmp_path / "again")
    for folder in (kept, tmp_path / "again"):
        before, after = read_run(a), read_run(folder)
        for name in ("name", "types", "scores", "other", "noisy"):
            assert getattr(after, name) == getattr(before, name), name
        assert {record["data"] for record in after.records.values()} == {"local-0123456789abcdef"}
    assert write_summary(a).items() <= json.loads((kept / "summary.json").read_text()).items()
    write_result(a, "STS16", "STS", 0.1)
    export(a, kept)
    assert read_run(kept).scores["STS16"] == 10
    with pytest.raises(ValueError, match="tasks/STS13.json"):
        export(b, kept)


def test_a_readme_without_a_place_for_the_table_is_an_error():
    with pytest.raises(ValueError, match="Expected the lines"):
        replace_table("# Title\n", "table")
