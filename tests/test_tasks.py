"""evaluation/tasks.py: choosing tasks, local folders, tasks of one's own, prefetching."""

import json
from pathlib import Path

import pytest
from eval_packs import labelled_rows, retrieval_configs, sentences, sts_rows, write_all_types, write_pack, write_sts

from evaluation.report import load_paper


mteb = pytest.importorskip("mteb")

from mteb.abstasks import AbsTaskClustering  # noqa: E402
from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy  # noqa: E402

from evaluation.tasks import BENCHMARK, folder_revision, prefetch, select_tasks  # noqa: E402


PARTS = [part.metadata.name for part in mteb.get_task("CQADupstackRetrieval").metadata.tasks]


pytestmark = pytest.mark.usefixtures("offline")


def names(tasks) -> list[str]:
    return [task.name for task in tasks]


def spec(**changes) -> dict:
    return {"name": "X-Mine", "type": "STS", "main_score": "spearman", "instruction": "Compare", **changes}


# ------------------------------------------------------------------------------------------------------------ choosing


def test_groups_are_mtebs_and_the_papers():
    benchmark = {task.metadata.name: task for task in mteb.get_benchmark(BENCHMARK).tasks}
    chosen = select_tasks(["mteb56"])
    assert len(chosen) == 56 and set(names(chosen)) == set(benchmark)
    assert all(task.in_benchmark for task in chosen)
    assert {task.name: task.type for task in chosen} == load_paper()["tasks"]
    for task in chosen:
        assert task.task.eval_splits == benchmark[task.name].eval_splits
        assert task.task.hf_subsets == benchmark[task.name].hf_subsets
    assert len(select_tasks(["mini"])) == 30
    assert names(select_tasks(["Summarization", "SummEval", "STS17"])) == ["SummEval", "STS17"]
    assert len(select_tasks(["STS"])) == 10


def test_other_tasks_of_mteb_are_not_of_the_benchmark():
    (task,) = select_tasks(["NanoArguAnaRetrieval"])
    assert task.name == "NanoArguAnaRetrieval" and not task.in_benchmark


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(ValueError, match="'STSBenchmrak'.*STSBenchmark"):
        select_tasks(["STSBenchmrak"])
    with pytest.raises(ValueError, match="every folder of --data_dir"):
        select_tasks(["all"])


# ------------------------------------------------------------------------------------------------------- local folders


def test_every_missing_folder_is_named(tmp_path):
    write_sts(tmp_path / "STS12")
    (tmp_path / PARTS[0]).mkdir()
    with pytest.raises(FileNotFoundError) as error:
        select_tasks(["STS12", "SciFact", "CQADupstackRetrieval", "BIOSSES"], tmp_path)
    message = str(error.value)
    assert "lacks the folders of 13 tasks: SciFact, " in message and "BIOSSES" in message
    assert all(part in message for part in PARTS[1:]) and PARTS[0] not in message and "STS12," not in message
    assert "--prefetch" in message
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        select_tasks(["STS12"], tmp_path / "nowhere")


def test_reading_a_folder_leaves_mtebs_task_as_it_was(tmp_path):
    write_sts(tmp_path / "STS12")
    for part in PARTS:
        write_pack(tmp_path / part, retrieval_configs(1))
    before = {name: dict(mteb.get_task(name).metadata.dataset) for name in ("STS12", PARTS[3])}
    sts, aggregate = select_tasks(["STS12", "CQADupstackRetrieval"], tmp_path)
    assert sts.task.metadata.dataset["path"] == str(tmp_path / "STS12")
    assert sts.task.metadata.dataset["revision"].startswith("local-")
    assert [part.metadata.dataset["path"] for part in aggregate.leaves()] == [str(tmp_path / part) for part in PARTS]
    assert aggregate.task.taskname_to_task[PARTS[3]] is aggregate.leaves()[3]
    for name, dataset in before.items():
        assert mteb.get_task(name).metadata.dataset == dataset and not dataset["path"].startswith("/")
    (untouched,) = [task for task in mteb.get_benchmark(BENCHMARK).tasks if task.metadata.name == "STS12"]
    assert untouched.metadata.dataset == before["STS12"]

    for _ in range(2):  # mteb forgets what an instance has when it unloads the data
        sts.task.load_data()
        assert len(sts.task.dataset["test"]) == 12
        sts.task.unload_data()
        assert sts.task.metadata.dataset["path"] == str(tmp_path / "STS12")
    aggregate.leaves()[3].load_data()
    assert len(aggregate.leaves()[3].dataset["default"]["test"]["corpus"]) == 20


def test_all_is_what_is_there(tmp_path):
    mine = write_all_types(tmp_path)
    write_sts(tmp_path / "STS12")
    assert set(names(select_tasks(["all"], tmp_path))) == {"STS12", *mine}
    for part in PARTS[:-1]:
        (tmp_path / part).mkdir()
    with pytest.raises(ValueError, match="neither tasks of .*" + PARTS[0]):
        select_tasks(["all"], tmp_path)  # an incomplete aggregate is not left out in silence
    (tmp_path / PARTS[-1]).mkdir()
    (tmp_path / ".hidden").mkdir()
    assert "CQADupstackRetrieval" in names(select_tasks(["all"], tmp_path))
    (tmp_path / "stranger").mkdir()
    with pytest.raises(ValueError, match=r"task.json.*\['stranger'\]"):
        select_tasks(["all"], tmp_path)
    assert names(select_tasks(["STS12"], tmp_path)) == ["STS12"]


def test_a_folders_revision_is_that_of_its_content(tmp_path):
    first, second = write_sts(tmp_path / "a", 1), write_sts(tmp_path / "b", 1)
    assert folder_revision(first) == folder_revision(second) != folder_revision(write_sts(tmp_path / "c", 2))
    (first / ".cache").mkdir()
    (first / ".cache" / "x").write_text("left by a download")
    assert folder_revision(first) == folder_revision(second)
    (first / "default" / "test.jsonl").write_text("{}")
    assert folder_revision(first) != folder_revision(second)


def test_folders_of_one_name_and_changed_folders_are_told_apart(tmp_path):
    """`datasets` caches by the folder's name."""
    for data_dir, seed in (("a", 1), ("b", 2), ("a", 3)):
        write_sts(tmp_path / data_dir / "STS12", seed)
        write_pack(tmp_path / data_dir / "SciFact", retrieval_configs(seed))
        sts, retrieval = select_tasks(["STS12", "SciFact"], tmp_path / data_dir)
        sts.task.load_data()
        assert sts.task.dataset["test"][0]["sentence1"] == sts_rows(seed)[0]["sentence1"]
        retrieval.task.load_data()
        corpus = retrieval.task.dataset["default"]["test"]["corpus"]
        assert corpus[0]["text"] == retrieval_configs(seed)["corpus"]["test"][0]["text"]


# ------------------------------------------------------------------------------------------------------ one's own tasks


def test_tasks_of_ones_own_are_what_their_file_says(tmp_path):
    main_scores = write_all_types(tmp_path)
    tasks = select_tasks(["all"], tmp_path)
    assert {task.type for task in tasks} == set(load_paper()["categories"])
    for task in tasks:
        assert not task.in_benchmark and task.instruction == f"Instruction of {task.name}"
        assert task.task.metadata.main_score == main_scores[task.name]
        assert task.task.eval_splits == ["test"]
    assert names(select_tasks(["X-STS"], tmp_path)) == ["X-STS"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"type": "Sorting"}, "type must be one of .*'Retrieval'.*got 'Sorting'"),
        ({"main_score": "ndcg_at_10"}, "main_score 'ndcg_at_10' is none that mteb computes for STS"),
        ({"name": "STS12"}, r"STS12 is a task of MTEB\(eng, v1\)"),
        ({"name": None}, r"lacks \['name'\]"),
    ],
)
def test_a_task_json_that_cannot_work_is_an_error(tmp_path, changes, message):
    write_sts(tmp_path / "mine", 0, spec(**changes))
    with pytest.raises(ValueError, match=message):
        select_tasks(["all"], tmp_path)


def test_two_tasks_of_one_name_are_an_error(tmp_path):
    write_sts(tmp_path / "one", 0, spec())
    write_sts(tmp_path / "two", 1, spec())
    with pytest.raises(ValueError, match=r"X-Mine.*\['one', 'two'\]"):
        select_tasks(["X-Mine"], tmp_path)


def test_a_task_json_that_is_no_json_is_an_error(tmp_path):
    write_sts(tmp_path / "mine", 0, spec())
    (tmp_path / "mine" / "task.json").write_text("{name")
    with pytest.raises(ValueError, match=r"mine.task.json.*not JSON"):
        select_tasks(["all"], tmp_path)


def test_clustering_folders_may_hold_sets_of_texts_or_single_texts(tmp_path):
    sets = [{"sentences": sentences(12, 1), "labels": ["a", "b", "c"] * 4}]
    single = [{"sentences": row["text"], "labels": row["label"]} for row in labelled_rows(30, 2)]
    for name, rows in {"X-Sets": sets, "X-Single": single}.items():
        write_pack(
            tmp_path / name,
            {"default": {"test": rows}},
            spec(name=name, type="Clustering", main_score="v_measure"),
        )
    of_sets, of_single = select_tasks(["X-Sets", "X-Single"], tmp_path)
    assert isinstance(of_sets.task, AbsTaskClusteringLegacy)
    assert isinstance(of_single.task, AbsTaskClustering)
    assert of_single.task.max_fraction_of_documents_to_embed is None

    import numpy as np

    class Random:
        mteb_model_meta = None

        def encode(self, inputs, **kwargs):
            return np.random.default_rng(0).normal(size=(len(inputs.dataset), 4))

        def similarity(self, a, b):
            raise NotImplementedError

        similarity_pairwise = similarity

    twice = []
    for _ in range(2):
        of_single.reseed()
        twice.append(of_single.task.evaluate(Random(), "test", encode_kwargs={})["default"]["v_measure"])
    assert twice[0] == twice[1]
    assert of_single.task.evaluate(Random(), "test", encode_kwargs={})["default"]["v_measure"] != twice[0]


# ------------------------------------------------------------------------------------------------------------- prefetch


def test_prefetch_fetches_each_dataset_at_its_revision(tmp_path, capsys):
    calls = []

    def download(repo, *, repo_type, revision, local_dir):
        calls.append((repo, repo_type, revision))
        write_sts(Path(local_dir))

    tasks = select_tasks(["STS12", "CQADupstackRetrieval"])
    folders = prefetch(tasks, tmp_path, download)
    assert [folder.name for folder in folders] == ["STS12", *PARTS]
    datasets = [mteb.get_task(name).metadata.dataset for name in ("STS12", *PARTS)]
    assert calls == [(dataset["path"], "dataset", dataset["revision"]) for dataset in datasets]
    assert names(select_tasks(["STS12", "CQADupstackRetrieval"], tmp_path)) == ["STS12", "CQADupstackRetrieval"]

    calls.clear()
    prefetch(tasks, tmp_path, download)
    assert calls == [] and "STS12: there already" in capsys.readouterr().out


def test_a_broken_download_leaves_no_folder_that_looks_whole(tmp_path):
    def half(repo, *, local_dir, **kwargs):
        write_sts(Path(local_dir))
        raise ConnectionError("cable pulled")

    with pytest.raises(ConnectionError):
        prefetch(select_tasks(["STS12"]), tmp_path, half)
    with pytest.raises(FileNotFoundError, match="STS12"):
        select_tasks(["STS12"], tmp_path)


def test_prefetch_uses_the_hubs_own_download(tmp_path, monkeypatch):
    import huggingface_hub

    import eval_mteb

    calls = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, **kwargs: (calls.append({"repo": repo, **kwargs}), Path(kwargs["local_dir"]).mkdir()),
    )
    eval_mteb.main(["--prefetch", str(tmp_path), "--tasks", "BIOSSES"])
    assert [call["repo"] for call in calls] == ["mteb/biosses-sts"] and (tmp_path / "BIOSSES").is_dir()
    assert json.loads(json.dumps(calls))[0]["repo_type"] == "dataset"
