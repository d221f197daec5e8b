"""Summaries of one run, and comparisons of several.

Reads the files that `eval_mteb.py` leaves in its output folder; needs neither mteb nor a model. Invariants: a mean over
an incomplete list of tasks says so and over how many, differences are taken over tasks that both have, and custom tasks
never enter an MTEB mean.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from evaluation.plots import plot_categories, plot_tasks
from saving_utils import new_files, read_json, write_json, write_text


PAPER = Path(__file__).resolve().parent / "paper.json"
TABLE_START, TABLE_END = "<!-- results: start -->", "<!-- results: end -->"


def load_paper() -> dict:
    """The paper's scores, the 56 tasks by category (`categories`, `tasks`), and MTEB-MINI (`mini`)."""
    paper = read_json(PAPER)
    paper["tasks"] = {task: category for category, tasks in paper["categories"].items() for task in tasks}
    return paper


@dataclass(frozen=True)
class Run:
    """One model's main scores, times 100, on MTEB's tasks and others, and with noisy inputs."""

    name: str
    types: dict[str, str]  # task -> type, of all tasks below
    scores: dict[str, float]  # MTEB's tasks
    other: dict[str, float]  # other tasks
    noisy: dict[str, float]  # tasks of either kind, with noise in their inputs
    records: dict[str, dict]  # task -> what was recorded with it


def read_run(source: str | Path) -> Run:
    """
    Reads the results of an output folder, or published ones.

    Args:
        source: An output folder, an exported one, or `paper:` and the name of a model in the paper.

    Raises:
        FileNotFoundError: there are no finished results.
        ValueError: the paper has no such model.
    """
    if str(source).startswith("paper:"):
        name = str(source).removeprefix("paper:")
        paper = load_paper()
        if name not in paper["scores"]:
            raise ValueError(f"The paper has no model {name!r}; it has {list(paper['scores'])}.")
        return Run(f"{name} (paper)", paper["tasks"], paper["scores"][name], {}, {}, {})

    folder = Path(source)
    settings, records = read_records(folder)
    run = Run(settings["label"], {}, {}, {}, {}, {})
    for record in sorted(records, key=lambda record: task_order(record["task"], record["type"])):
        task = record["task"]
        run.types[task] = record["type"]
        score = main_score(folder / record["result"], record["splits"])
        if record["noise"]:
            run.noisy[task] = score
        else:
            (run.scores if record["in_benchmark"] else run.other)[task] = score
            run.records[task] = record
    return run


def read_records(folder: Path) -> tuple[dict, list[dict]]:
    """The settings of an evaluation and the records of its finished tasks, before or after `export`."""
    files, summary = sorted(folder.glob("records/*.json")), folder / "summary.json"
    if files:
        settings = read_json(folder / "settings.json")
        records = [read_json(file) for file in files]
    else:
        exported = read_json(summary) if summary.is_file() else {}
        settings, records = exported.get("settings", {}), exported.get("records", [])
    records = [record for record in records if record["finished"]]
    if not records:
        raise FileNotFoundError(f"{folder} has no finished results; is it the --output or --export of an evaluation?")
    return settings, records


def task_order(task: str, category: str) -> tuple:
    """Sorts as the paper's tables do: by category, then by name."""
    categories = list(load_paper()["categories"])
    return (categories.index(category) if category in categories else len(categories), task.lower())


def main_score(path: Path, splits: Iterable[str]) -> float:
    """The main score in one of mteb's result files, times 100."""
    scores = read_json(path)["scores"]
    return 100 * fmean(entry["main_score"] for split in splits for entry in scores[split])


@dataclass(frozen=True)
class Mean:
    """A mean over some of a list of tasks."""

    value: float | None
    count: int
    total: int

    @property
    def complete(self) -> bool:
        return self.count == self.total

    @property
    def label(self) -> str:
        return f"{self.total} tasks" if self.complete else f"{self.count} of {self.total} tasks, partial"


def mean_over(scores: Mapping[str, float], tasks: Iterable[str]) -> Mean:
    """The mean over those of the tasks that have a score."""
    tasks = list(tasks)
    found = [scores[task] for task in tasks if task in scores]
    return Mean(fmean(found) if found else None, len(found), len(tasks))


def benchmark_means(scores: Mapping[str, float]) -> dict[str, Mean]:
    """Means over each category of MTEB, over all of it, and over MTEB-MINI."""
    paper = load_paper()
    lists = {**paper["categories"], "MTEB(eng, v1)": paper["tasks"], "MTEB-MINI": paper["mini"]}
    return {name: mean_over(scores, tasks) for name, tasks in lists.items()}


def write_summary(output: str | Path) -> dict:
    """Writes `summary.json` and `summary.md` for the finished tasks of an output folder; returns the former."""
    output = Path(output)
    summary, text = summarize(output)
    write_json(output / "summary.json", summary)
    write_text(output / "summary.md", text)
    return summary


def export(output: str | Path, target: str | Path) -> None:
    """
    Exports the finished tasks of an output folder in a form worth keeping: `summary.md`, `summary.json` including the
    records, and mteb's own results in `tasks/`.

    Raises:
        ValueError: `target` holds results of tasks that `output` lacks.
    """
    output, target = Path(output), Path(target)
    settings, records = read_records(output)
    sources = {f"tasks/{r['task']}{'.noise' if r['noise'] else ''}.json": output / r["result"] for r in records}
    if strangers := sorted({f"tasks/{path.name}" for path in target.glob("tasks/*")} - set(sources)):
        raise ValueError(f"{target} holds {', '.join(strangers)}, of which {output} has no result. Use another folder.")
    summary, text = summarize(output)
    own = [{key: value for key, value in record.items() if key not in settings} for record in records]
    summary["records"] = [record | {"result": result} for record, result in zip(own, sources)]
    with new_files(target) as folder:
        (folder / "tasks").mkdir()
        for name, source in sources.items():
            shutil.copyfile(source, folder / name)
        write_json(folder / "summary.json", summary)
        write_text(folder / "summary.md", text)


def summarize(output: Path) -> tuple[dict, str]:
    """The content of `summary.json` and `summary.md`."""
    run, (settings, _) = read_run(output), read_records(output)
    means = benchmark_means(run.scores)
    summary = {
        "settings": settings,
        "means": {
            name: {"mean": mean.value, "tasks": mean.count, "of": mean.total, "complete": mean.complete}
            for name, mean in means.items()
            if mean.count
        },
        "tasks": run.scores,
        "other_tasks": run.other,
        "other_mean": fmean(run.other.values()) if run.other else None,
        "noise": noise_table(run),
    }
    return summary, _summary_markdown(run, settings, means)


def noise_table(run: Run) -> list[dict]:
    """Clean score, noisy score and drop per task that has both, and their means."""
    clean = {**run.scores, **run.other}
    rows = [
        {"task": task, "clean": clean[task], "noisy": noisy, "drop": clean[task] - noisy}
        for task, noisy in run.noisy.items()
        if task in clean
    ]
    if rows:
        means = {key: fmean(row[key] for row in rows) for key in ("clean", "noisy", "drop")}
        rows.append({"task": f"Mean over {len(rows)} tasks", **means})
    return rows


def _summary_markdown(run: Run, settings: Mapping, means: Mapping[str, Mean]) -> str:
    described = ", ".join(
        f"{key} {value}" for key, value in settings.items() if key not in ("label", "name") and value is not None
    )
    parts = [f"# {run.name}", described + "."]
    if run.scores:
        rows = [
            [f"**{name}**" if name.startswith("MTEB") else name, mean.label, number(mean.value)]
            for name, mean in means.items()
            if mean.count
        ]
        parts += ["## MTEB(eng, v1)", markdown_table(["Mean of", "over", "score"], rows)]
        parts.append(_task_table(run, run.scores))
    if run.other:
        parts += ["## Other tasks (not MTEB)", _task_table(run, run.other)]
        parts.append(f"Mean over these {len(run.other)} tasks: {number(fmean(run.other.values()))}.")
    if noisy := noise_table(run):
        rows = [[row["task"], number(row["clean"]), number(row["noisy"]), number(-row["drop"], True)] for row in noisy]
        parts += ["## With noise in every input", markdown_table(["Task", "clean", "noisy", "change"], rows)]
    if cut := [told for task, record in run.records.items() if (told := _truncated(task, record))]:
        parts.append("Texts longer than the model reads: " + "; ".join(cut) + ".")
    if any(record["data"].startswith("local-") for record in run.records.values()):
        parts.append("Data marked local come from a folder and may differ from the Hub's.")
    return "\n\n".join(parts) + "\n"


def _truncated(task: str, record: Mapping) -> str | None:
    counts = record.get("truncated") or {}  # older records have none
    if not counts.get("texts"):
        return None
    towers = ", ".join(f"{counts[tower]} by the {tower}" for tower in ("decoder", "encoder") if counts.get(tower))
    return f"{task} {counts['texts']} of {counts['of']} (cut {towers})"


def _task_table(run: Run, scores: Mapping[str, float]) -> str:
    rows = [
        [task, run.types[task], run.records[task]["main_score"], run.records[task]["data"][:13], number(score)]
        for task, score in scores.items()
    ]
    return markdown_table(["Task", "type", "main score", "data", "score"], rows)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with right-aligned number columns."""
    is_number = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("--:" if right else "---" for right in is_number) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _is_number(cell: str) -> bool:
    digits = cell.strip("*+-–. ").replace(".", "").replace(" ± ", "")
    return digits.isdigit() or cell in ("", "–", "not run")


def number(value: float | None, signed: bool = False) -> str:
    """Formats a score with two decimals, as in the paper; a dash for None."""
    return "–" if value is None else f"{value:+.2f}" if signed else f"{value:.2f}"


def compare(runs: Sequence[Run]) -> dict[str, list[dict]]:
    """
    Rows of the comparison: `means` and `tasks` of MTEB, `other` for tasks that are not, `drops` under noise.

    Every mean is over the tasks that all runs have, so that a difference is never one between lists of tasks. A row has
    `name`, `label` (over what), `scores`, one per run or None, and `differences` from the first run.

    Raises:
        ValueError: fewer than two runs, or no task that all have.
    """
    if len(runs) < 2:
        raise ValueError(f"A comparison needs at least two results, got {len(runs)}.")
    paper = load_paper()
    common = [task for task in paper["tasks"] if all(task in run.scores for run in runs)]
    lists = {**paper["categories"], "MTEB(eng, v1)": list(paper["tasks"]), "MTEB-MINI": paper["mini"]}
    means = []
    for name, tasks in lists.items():
        shared = [task for task in tasks if task in common]
        if shared:
            label = Mean(None, len(shared), len(tasks)).label
            means.append(_row(name, label, [fmean(run.scores[task] for task in shared) for run in runs]))

    other = sorted(
        {task for run in runs for task in run.other},
        key=lambda task: task_order(task, next(run.types[task] for run in runs if task in run.other)),
    )
    shared = [task for task in other if all(task in run.other for run in runs)]
    if not common and not shared:
        raise ValueError("No task has been scored for all of " + ", ".join(run.name for run in runs) + ".")
    rows = [_row(task, _type(runs, task), [run.other.get(task) for run in runs]) for task in other]
    if shared:
        label = f"{len(shared)} tasks" if len(shared) == len(other) else f"{len(shared)} of {len(other)} tasks, partial"
        rows.append(_row("Mean", label, [fmean(run.other[task] for task in shared) for run in runs]))
    return {
        "means": means,
        "tasks": [
            _row(task, category, [run.scores.get(task) for run in runs])
            for task, category in paper["tasks"].items()
            if sum(task in run.scores for run in runs) >= 2
        ],
        "other": rows,
        "drops": _drop_rows(runs),
    }


def _drop_rows(runs: Sequence[Run]) -> list[dict]:
    """
    How much each run loses under noise, per task and on average, over the tasks that all runs have in both conditions.
    """
    drops = [{row["task"]: row["drop"] for row in noise_table(run) if row["task"] in run.noisy} for run in runs]
    shared = [task for task in drops[0] if all(task in other for other in drops)]
    rows = [_row(task, _type(runs, task), [drop[task] for drop in drops]) for task in shared]
    if shared:
        rows.append(_row("Mean", f"{len(shared)} tasks", [fmean(drop[task] for task in shared) for drop in drops]))
    return rows


def _row(name: str, label: str, scores: list[float | None]) -> dict:
    differences = [None if None in (score, scores[0]) else score - scores[0] for score in scores[1:]]
    return {"name": name, "label": label, "scores": scores, "differences": differences}


def _type(runs: Sequence[Run], task: str) -> str:
    return next(run.types[task] for run in runs if task in run.types)


def comparison_markdown(runs: Sequence[Run], rows: Mapping[str, list[dict]]) -> str:
    """The comparison as tables; `difference` is from the first column of scores."""
    names = [run.name for run in runs]
    header = [names[0]]
    for name in names[1:]:
        header += [name, "difference"]

    def cells(row: dict) -> list[str]:
        cells = [number(row["scores"][0])]
        for score, difference in zip(row["scores"][1:], row["differences"]):
            cells += [number(score), number(difference, signed=True)]
        return cells

    first_columns = {
        "means": ["MTEB, mean of", "over"],
        "tasks": ["MTEB task", "type"],
        "other": ["Task outside MTEB", "type"],
        "drops": ["Drop under noise", "type"],
    }
    parts = [
        markdown_table([*first, *header], [[row["name"], row["label"], *cells(row)] for row in rows[key]])
        for key, first in first_columns.items()
        if rows[key]
    ]
    return "\n\n".join(parts) + "\n"


def replace_table(text: str, table: str, markers: tuple[str, str] = (TABLE_START, TABLE_END)) -> str:
    """
    Replaces the part of `text` between two marker lines by `table`.

    Raises:
        ValueError: a marker is missing.
    """
    before, start, rest = text.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not (start and end):
        raise ValueError(f"Expected the lines {markers[0]} and {markers[1]} around the table's place.")
    return f"{before}{start}\n{table.strip()}\n{end}{after}"


def write_comparison(sources: Sequence[str], output: str | Path, readme: str | Path | None = None) -> str:
    """
    Writes `compare.md`, `compare.json`, `compare_categories.png` and `compare_tasks.png`.

    Args:
        sources: What `read_run` takes.
        readme: A Markdown file whose marked table is updated too.

    Returns:
        The Markdown.
    """
    runs = [read_run(source) for source in sources]
    rows = compare(runs)
    text, output = comparison_markdown(runs, rows), Path(output)
    write_text(output / "compare.md", text)
    write_json(output / "compare.json", {"names": [run.name for run in runs], **rows})
    plot_categories(runs, rows, output / "compare_categories.png")
    plot_tasks(runs, rows, output / "compare_tasks.png")
    if readme is not None:
        readme = Path(readme)
        write_text(readme, replace_table(readme.read_text(encoding="utf-8"), text))
    return text
