"""Plots of learning curves and confusion matrices."""

import json

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from jaxvid.errors import InputError
from jaxvid.evaluation.plots import draw_confusion
from jaxvid.plot_style import INK, TRAIN
from jaxvid.training.plots import draw_curves


def ink_share(path) -> float:
    """Return the share of pixels that are not white."""
    with Image.open(path) as picture:
        return float((np.asarray(picture.convert("L")) < 250).mean())


@pytest.mark.parametrize("count", [2, 8, 30, 400])
def test_a_confusion_matrix_is_drawn(tmp_path, count):
    confusion = np.eye(count, dtype=int) * 9
    confusion[0, 1] = 1
    draw_confusion(confusion, [f"class {i}" for i in range(count)], tmp_path / "confusion.png")
    assert 0.01 < ink_share(tmp_path / "confusion.png") < 0.95


def test_the_confusion_title_counts_failed_videos_as_wrong(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, text, **_: titles.append(text))
    confusion = np.diag([3, 1])
    draw_confusion(confusion, ["a", "b"], tmp_path / "x.png")
    draw_confusion(confusion, ["a", "b"], tmp_path / "x.png", num_failed=1)
    expected = [
        "top-1 100.0 % on 4 videos",
        "top-1 80.0 % on 5 videos (1 not decoded)",
    ]
    assert titles == expected


def test_plots_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "x.png" / "subfolder").mkdir(parents=True)
    with pytest.raises(
        InputError, match=r"x.png cannot be written \(Is a directory\); choose another"
    ):
        draw_confusion(np.eye(2, dtype=int), ["a", "b"], tmp_path / "x.png")


def test_learning_curves_are_drawn(tmp_path):
    rows = [
        {"step": s, "train/loss": 2 / s, "train/top1": s, "learning_rate": 0.1}
        for s in range(1, 50)
    ]
    rows += [{"step": 20, "val/top1": 0.0, "val/top5": 0.0, "val/loss": None}]
    rows += [{"step": 40, "val/top1": 50.0, "val/top5": 90.0, "val/loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert 0.01 < ink_share(tmp_path / "curves.png") < 0.5


@pytest.mark.parametrize(("count", "marker"), [(1, "o"), (2, "None")])
def test_a_single_training_point_has_a_marker(tmp_path, monkeypatch, count, marker):
    drawn = {}  # colour → first line of this colour
    plot = Axes.plot

    def record(axes, *args, **options):
        [line] = plot(axes, *args, **options)
        drawn.setdefault(line.get_color(), line)
        return [line]

    monkeypatch.setattr(Axes, "plot", record)
    rows = [
        {"step": 10 * i, "train/loss": 1.0, "train/top1": 5.0, "learning_rate": 0.1}
        for i in range(1, count + 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    for colour in (TRAIN, INK):  # TRAIN: training curves; INK: learning rate
        assert len(drawn[colour].get_xdata()) == count
        assert drawn[colour].get_marker() == marker
