"""Which tasks to score, and where their data is: on the Hub, or in local folders.

A local folder holds one task in mteb's dataset layout: data files, and a README.md whose front matter lists them under
`configs`. A folder named like an MTEB task is that task; one with a `task.json` (name, type, main_score, instruction,
optionally eval_splits) is a custom task, with these columns:

    Retrieval            configs corpus (_id, title, text), queries (_id, text), default (query-id, corpus-id, score)
    Reranking            the same, and top_ranked (query-id, corpus-ids)
    Clustering           sentences, labels: a row is a text, or a set of texts as in MTEB v1
    PairClassification   sentence1, sentence2, labels (0 or 1)
    Classification       text, label (a number), in splits train and test
    STS                  sentence1, sentence2, score
    Summarization        text, human_summaries, machine_summaries, relevance (one number per machine summary)

Invariants: mteb's task metadata is shared by the whole process and never changed here; all missing folders are reported
before anything runs.
"""

import copy
import difflib
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import mteb
import numpy as np
from mteb.abstasks import AbsTask, AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy
from mteb.abstasks.pair_classification import AbsTaskPairClassification
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.text.summarization import AbsTaskSummarization

from evaluation.local_data import folder_revision, own_cache
from evaluation.report import load_paper
from saving_utils import read_json


BENCHMARK = "MTEB(eng, v1)"

RANKED = r"(ndcg|map|recall|precision|mrr)_at_(1|3|5|10|20|100|1000)"
CORRELATED = r"((cosine|manhattan|euclidean)_)?(pearson|spearman)"
# Type of a custom task -> mteb's class, and the scores that it computes.
OWN_TYPES = {
    "Retrieval": (AbsTaskRetrieval, RANKED),
    "Reranking": (AbsTaskRetrieval, RANKED),
    "Clustering": (AbsTaskClusteringLegacy, "v_measure"),
    "PairClassification": (
        AbsTaskPairClassification,
        r"(max|similarity|cosine|manhattan|euclidean|dot)_(ap|f1|accuracy|precision|recall)",
    ),
    "Classification": (AbsTaskClassification, r"accuracy|ap|(f1|precision|recall)(_weighted)?"),
    "STS": (AbsTaskSTS, CORRELATED),
    "Summarization": (AbsTaskSummarization, r"((cosine|dot)_)?(pearson|spearman)"),
}


@dataclass(frozen=True)
class EvalTask:
    """One task to score."""

    task: AbsTask
    in_benchmark: bool  # one of the 56, not a custom task
    instruction: str | dict | None = None  # from a `task.json`

    @property
    def name(self) -> str:
        return self.task.metadata.name

    @property
    def type(self) -> str:
        return self.task.metadata.type

    def leaves(self) -> list[AbsTask]:
        """The tasks that have data: the parts of an aggregate such as CQADupstackRetrieval, or the task itself."""
        return list(self.task.metadata.tasks) if self.task.is_aggregate else [self.task]

    def reseed(self) -> None:
        """Reseeds the task's random numbers, so that a second evaluation draws the same samples."""
        for task in self.leaves():
            task.rng_state, task.np_rng = random.Random(task.seed), np.random.default_rng(task.seed)


def select_tasks(names: Sequence[str], data_dir: str | Path | None = None) -> list[EvalTask]:
    """
    The tasks with these names, in their order, each once.

    Args:
        names: Task names, categories such as `STS`, `mteb56`, `mini` (the paper's MTEB-MINI), or `all` for every folder
            in `data_dir`.
        data_dir: A folder of folders, one per task. Without it the data come from the Hub.

    Raises:
        FileNotFoundError: folders are missing; names all of them.
        ValueError: a name is neither a task nor a group of tasks, or a `task.json` cannot work.
    """
    benchmark = {task.metadata.name: task for task in mteb.get_benchmark(BENCHMARK).tasks}
    paper = load_paper()
    groups = {
        "mteb56": [name for tasks in paper["categories"].values() for name in tasks],
        "mini": paper["mini"],
        **paper["categories"],
    }
    own = {}
    if data_dir is not None:
        data_dir = Path(data_dir)
        if not data_dir.is_dir():
            raise FileNotFoundError(f"--data_dir {data_dir} is not a folder.")
        for spec in map(_read_task_json, sorted(data_dir.glob("*/task.json"))):
            if spec["name"] in own:
                folders = [own[spec["name"]]["folder"].name, spec["folder"].name]
                raise ValueError(f"Two folders in {data_dir} are called {spec['name']} in their task.json: {folders}.")
            own[spec["name"]] = spec
    if "all" in names:
        groups["all"] = _everything_in(data_dir, benchmark, own)

    wanted = list(dict.fromkeys(name for group in names for name in groups.get(group, [group])))
    tasks = []
    for name in wanted:
        if name in own:
            tasks.append(own_task(own[name]))
        elif name in benchmark:
            tasks.append(EvalTask(copy.copy(benchmark[name]), in_benchmark=True))
        else:
            tasks.append(EvalTask(copy.copy(_other_task(name, [*groups, *benchmark, *own])), in_benchmark=False))
    if data_dir is None:
        return tasks

    missing = [
        part.metadata.name
        for task in tasks
        if task.name not in own
        for part in task.leaves()
        if not (data_dir / part.metadata.name).is_dir()
    ]
    if missing:
        raise FileNotFoundError(
            f"{data_dir} lacks the folders of {len(missing)} tasks: {', '.join(missing)}. Fetch them with "
            f"`--prefetch {data_dir} --tasks {' '.join(names)}` where there is a network, or leave these tasks out."
        )
    return [task if task.name in own else EvalTask(redirect(task.task, data_dir), task.in_benchmark) for task in tasks]


def _everything_in(data_dir: Path | None, benchmark: dict[str, AbsTask], own: dict[str, dict]) -> list[str]:
    """The names of all tasks in a folder; an aggregate counts if all of its parts are there."""
    if data_dir is None:
        raise ValueError("`--tasks all` means every folder of --data_dir; give one, or say `mteb56`.")
    folders = {folder.name for folder in data_dir.iterdir() if folder.is_dir() and not folder.name.startswith(".")}
    parts = {name: {part.metadata.name for part in EvalTask(task, True).leaves()} for name, task in benchmark.items()}
    whole = [name for name in benchmark if parts[name] <= folders]
    strangers = folders - set().union(*(parts[name] for name in whole)) - {spec["folder"].name for spec in own.values()}
    if strangers:
        raise ValueError(
            f"Folders in {data_dir} that are neither tasks of {BENCHMARK} nor hold a task.json: {sorted(strangers)}. Give "
            "them a task.json, move them away, or name the tasks you want."
        )
    return [*whole, *own]


def _other_task(name: str, known: Sequence[str]) -> AbsTask:
    """An mteb task outside the benchmark."""
    try:
        return mteb.get_task(name)
    except KeyError:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise ValueError(
            f"{name!r} is neither a task nor a group of tasks."
            + (f" Did you mean {' or '.join(close)}?" if close else "")
            + f" Groups are mteb56, mini, all, {', '.join(load_paper()['categories'])}."
        ) from None


class _LocalData:
    """Reads data from a local folder, cached by content."""

    def load_data(self, *args, **kwargs) -> None:
        with own_cache(self.metadata.dataset["revision"]):
            super().load_data(*args, **kwargs)


def redirect(task: AbsTask, data_dir: Path) -> AbsTask:
    """A copy of an mteb task that reads its data from `data_dir/<name>`."""
    attributes, state = {}, dict(vars(task))
    if task.is_aggregate:
        parts = [redirect(part, data_dir) for part in task.metadata.tasks]
        state |= {"tasks": parts, "taskname_to_task": {part.metadata.name: part for part in parts}}
        attributes["metadata"] = task.metadata.model_copy(update={"tasks": parts})
    else:
        folder = data_dir / task.metadata.name
        dataset = {**task.metadata.dataset, "path": str(folder), "revision": folder_revision(folder)}
        attributes["metadata"] = task.metadata.model_copy(update={"dataset": dataset})
    # Set on the class, since mteb drops an instance's attributes when it unloads the data.
    cls = type(type(task).__name__, (_LocalData, type(task)), attributes)
    redirected = cls.__new__(cls)
    vars(redirected).update(state)
    return redirected


def own_task(spec: dict) -> EvalTask:
    """A custom task, built from its `task.json`."""
    cls, _ = OWN_TYPES[spec["type"]]
    attributes = {}
    if cls is AbsTaskClusteringLegacy and not _holds_sets(spec["folder"], spec["eval_splits"][0]):
        cls = AbsTaskClustering
        attributes["max_fraction_of_documents_to_embed"] = None  # all of them
    if cls is AbsTaskSummarization:
        attributes.update(min_score=0, max_score=5)  # any range will do: the scores are correlations
    attributes["metadata"] = TaskMetadata(
        name=spec["name"],
        type=spec["type"],
        main_score=spec["main_score"],
        description=f"A task of one's own: {spec['name']}.",
        dataset={"path": str(spec["folder"]), "revision": folder_revision(spec["folder"])},
        category="t2t",
        modalities=["text"],
        eval_splits=spec["eval_splits"],
        eval_langs=["eng-Latn"],
    )
    task = type(re.sub(r"\W", "_", spec["name"]), (_LocalData, cls), attributes)()
    return EvalTask(task, in_benchmark=False, instruction=spec.get("instruction"))


def _read_task_json(file: Path) -> dict:
    spec = read_json(file)
    missing = [key for key in ("name", "type", "main_score") if not isinstance(spec.get(key), str)]
    if missing:
        raise ValueError(f'{file} lacks {missing}; it needs "name", "type", "main_score" and "instruction".')
    if spec["type"] not in OWN_TYPES:
        raise ValueError(f"{file}: type must be one of {list(OWN_TYPES)}, got {spec['type']!r}.")
    if not re.fullmatch(OWN_TYPES[spec["type"]][1], spec["main_score"]):
        raise ValueError(
            f"{file}: main_score {spec['main_score']!r} is none that mteb computes for {spec['type']}, whose scores match "
            f"the pattern {OWN_TYPES[spec['type']][1]}."
        )
    if spec["name"] in load_paper()["tasks"]:
        raise ValueError(
            f"{file}: {spec['name']} is a task of {BENCHMARK}. Delete the task.json if these are its data, else choose "
            "another name."
        )
    return {"eval_splits": ["test"], **spec, "folder": file.parent}


def _holds_sets(folder: Path, split: str) -> bool:
    """Whether a row of a clustering folder is a whole set of texts (as in MTEB v1) or a single text."""
    row = next(iter(datasets.load_dataset(str(folder), split=split, streaming=True)))
    return isinstance(row["sentences"], list)


def prefetch(tasks: Sequence[EvalTask], data_dir: str | Path, download: Callable | None = None) -> list[Path]:
    """
    Downloads data for `--data_dir` from the Hub, at the revisions that mteb names. Existing folders are kept; a new one
    appears only once it is complete.

    Args:
        download: Called like `huggingface_hub.snapshot_download`, which is the default.
    """
    if download is None:
        from huggingface_hub import snapshot_download as download
    folders = []
    for task in tasks:
        for part in task.leaves():
            name, dataset = part.metadata.name, part.metadata.dataset
            folder = Path(data_dir) / name
            folders.append(folder)
            if folder.exists():
                print(f"{name}: there already")
                continue
            print(f"{name}: {dataset['path']} at {dataset['revision']}")
            incomplete = folder.with_name(f".{name}.incomplete")
            download(dataset["path"], repo_type="dataset", revision=dataset["revision"], local_dir=str(incomplete))
            os.replace(incomplete, folder)
    return folders
