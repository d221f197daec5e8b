"""evaluation/plots.py: the bars and dots are the numbers."""

import pytest

from evaluation import plots
from evaluation.report import compare, read_run


pytest.importorskip("matplotlib")


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be saved."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def test_bars_are_as_high_as_the_numbers(tmp_path, figures):
    plots.plot_bars(["x", "y"], {"one": [1.0, 2.0], "two": [3.0, 4.5]}, "score", "title", tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert sorted(bar.get_height() for bar in axes.patches) == [1.0, 2.0, 3.0, 4.5]
    assert {text.get_text() for text in axes.texts} >= {"1.0", "4.5"}


def test_every_task_has_a_dot_per_run(two_runs, tmp_path, figures):
    runs = [read_run(folder) for folder in two_runs]
    plots.plot_tasks(runs, compare(runs), tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert [len(dots.get_offsets()) for dots in axes.collections] == [4, 3]  # b has no X-Two
    assert [label.get_text() for label in axes.get_yticklabels()] == ["SciFact", "STS12", "X-One", "X-Two"]


def test_matplotlibs_own_state_is_left_alone(tmp_path):
    from matplotlib import get_backend, pyplot

    before = get_backend(auto_select=False), pyplot.get_fignums()
    figure, axes = plots.new_figure(4, 3, nrows=2, sharex=True)
    plots.save_figure(figure, tmp_path / "deep" / "a.png")
    assert len(axes) == 2 and (tmp_path / "deep" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (get_backend(auto_select=False), pyplot.get_fignums()) == before
