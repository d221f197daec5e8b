"""Figures: how they are made and saved, and the plots of results."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean

from saving_utils import new_files


COLORS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
)  # Okabe and Ito, safe for colour-blind readers


def new_figure(width: float, height: float, **grid):
    """
    A figure with one plain pair of axes, or a grid as for `Figure.subplots`. Opens no window and leaves matplotlib's
    global state alone.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.subplots(**grid)
    for pair in figure.axes:
        pair.spines[["top", "right"]].set_visible(False)
        pair.set_axisbelow(True)
    return figure, axes


def save_figure(figure, path: Path) -> None:
    """Saves a figure atomically."""
    with new_files(path.parent) as folder:
        figure.savefig(folder / path.name)


def plot_bars(groups: Sequence[str], series: Mapping[str, Sequence[float]], label: str, title: str, path: Path) -> None:
    """Grouped bars: one group per entry of `groups`, one labelled bar per series."""
    width = 0.8 / len(series)
    figure, axes = new_figure(max(6.0, 1.0 + len(groups) * (0.45 + 0.42 * len(series))), 4.2)
    for i, (name, values) in enumerate(series.items()):
        places = [group + (i - (len(series) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(places, values, width * 0.94, label=name, color=COLORS[i % len(COLORS)])
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylabel(label, fontsize=9)
    axes.margins(x=0.01, y=0.1)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_title(title, loc="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=min(4, len(series)), frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_task_bars(
    tasks: Sequence[str], series: Mapping[str, Sequence[float]], label: str, title: str, path: Path
) -> None:
    """Horizontal bars, with room for many tasks with long names."""
    width = 0.8 / len(series)
    figure, axes = new_figure(7.5, 1.3 + len(tasks) * (0.12 + 0.15 * len(series)))
    for i, (name, values) in enumerate(series.items()):
        places = [task + (i - (len(series) - 1) / 2) * width for task in range(len(tasks))]
        bars = axes.barh(places, values, width * 0.94, label=name, color=COLORS[i % len(COLORS)])
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
    axes.set_ylim(len(tasks) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(label, fontsize=9)
    axes.margins(x=0.08)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_title(title, loc="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=min(4, len(series)), frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_categories(runs: Sequence, rows: Mapping[str, list[dict]], path: Path) -> None:
    """Bars of the means over each category, over MTEB, and over the tasks outside it."""
    chosen = [row for row in rows["means"] if row["name"] != "MTEB-MINI" or not row["label"].endswith("partial")]
    chosen = chosen + [
        {**row, "name": "Tasks\noutside MTEB"} for row in rows["other"] if row["name"] == "Mean" and row["label"]
    ]
    groups = [_wrap(row["name"]) + "\n" + _short(row["label"]) for row in chosen]
    series = {run.name: [row["scores"][i] for row in chosen] for i, run in enumerate(runs)}
    plot_bars(groups, series, "mean of main scores", "Means over the tasks that all have", path)


def _short(label: str) -> str:
    return label.replace(" tasks, partial", " (partial)")


def _wrap(name: str) -> str:
    return {"PairClassification": "Pair\nClassification", "MTEB(eng, v1)": "MTEB\n(eng, v1)"}.get(name, name)


def plot_tasks(runs: Sequence, rows: Mapping[str, list[dict]], path: Path) -> None:
    """A line per task with a dot per run; categories are named at the right."""
    other = [{**row, "label": f"{row['label']}, not MTEB"} for row in rows["other"] if row["name"] != "Mean"]
    chosen = [*rows["tasks"], *other]
    figure, axes = new_figure(8.0, 1.3 + 0.22 * len(chosen))
    for y, row in enumerate(chosen):
        found = [score for score in row["scores"] if score is not None]
        axes.plot([min(found), max(found)], [y, y], color="#cccccc", linewidth=2, zorder=1, solid_capstyle="round")
    for i, run in enumerate(runs):
        points = [(row["scores"][i], y) for y, row in enumerate(chosen) if row["scores"][i] is not None]
        axes.scatter(*zip(*points), s=26, color=COLORS[i % len(COLORS)], label=run.name, zorder=2)
    for category, group in groupby(enumerate(chosen), key=lambda item: item[1]["label"]):
        places = [y for y, _ in group]
        axes.axhline(places[0] - 0.5, color="#bbbbbb", linewidth=0.7, zorder=0)
        axes.annotate(
            category,
            (1.01, fmean(places)),
            xycoords=("axes fraction", "data"),
            annotation_clip=False,
            va="center",
            fontsize=7,
            color="#666666",
        )
    axes.set_yticks(range(len(chosen)), [row["name"] for row in chosen], fontsize=7)
    axes.set_ylim(len(chosen) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_xlabel("main score", fontsize=9)
    figure.legend(loc="outside upper center", ncols=min(4, len(runs)), frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_norms(norms: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Figure 5 of the paper: mean L2 norms of the two states that an embedding joins."""
    series = {
        label: [values[key] for values in norms.values()]
        for label, key in (("Contextual token", "contextual"), ("EOS token", "eos"))
    }
    plot_task_bars(list(norms), series, "mean L2 norm", "L2 norms of the two states", path)


def plot_lengths(lengths: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Figure 6 of the paper: mean lengths of the decoder's sequences, without and with in-context examples."""
    labels = {"without_examples": "without examples", "with_examples": "with examples"}
    series = {
        label: [values[key] for values in lengths.values()]
        for key, label in labels.items()
        if all(key in values for values in lengths.values())
    }
    plot_task_bars(list(lengths), series, "mean length (tokens)", "Length of the decoder's sequence", path)
