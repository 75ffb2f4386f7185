"""Pictures of what a run produced."""

import io
import json
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from jaxvid import optim
from jaxvid.files import write_file
from jaxvid.scoring import order_by_confusion

INK, GRID = "#222222", "#dddddd"
TRAIN, VAL = "#9a9a9a", "#0b6fb8"
MAX_NAMED_CLASSES = 40


def draw_curves(metrics: Path, output: Path) -> None:
    """Draws loss, top-1 accuracy and learning rate over steps.

    Args:
        metrics: A run's `metrics.jsonl`.
        output: The PNG file.

    Raises:
        InputError: It cannot be written.
    """
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]

    def series(name: str) -> tuple[list, list]:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(11, 3.4), layout="constrained", dpi=130)
    panels = (
        ("loss", (("train/loss", "training", TRAIN), ("val/loss", "validation", VAL))),
        ("top-1 (%)", (("train/top1", "training", TRAIN), ("val/top1", "validation", VAL))),
        ("learning rate", (("learning_rate", "", INK),)),
    )
    for axes, (title, lines) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, label, colour in lines:
            steps, values = series(name)
            marker = "o" if name.startswith("val") or len(steps) == 1 else None
            axes.plot(steps, values, color=colour, label=label, marker=marker, ms=4, lw=1.6)
        if len(lines) > 1:
            axes.legend(frameon=False)
        axes.set_title(title, color=INK)
        axes.set_xlabel("step")
        _tidy(axes)
        if "%" in title:
            axes.set_ylim(0, 100)
    _save(figure, output)


def _save(figure: Figure, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return write_file(path, picture.getvalue())


def _tidy(axes) -> None:
    axes.set_ylim(bottom=0)
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_schedule(config, workdir: str | Path) -> Path:
    """Draws a config's learning rate over epochs, without training.

    Args:
        config: A locked config.
        workdir: Gets `schedule.png`.

    Returns:
        The picture's path.

    Raises:
        InputError: The schedule is impossible, or the folder cannot be written.
    """
    optim.check_optimizer(config.optimizer)
    per_epoch = 100  # steps; the curve over epochs is the same for any number
    total = max(1, round(config.num_epochs * per_epoch))
    schedule = optim.make_schedule(
        config.optimizer,
        batch_size=config.batch_size,
        total_steps=total,
        steps_per_epoch=per_epoch,
    )
    rates = np.asarray(jax.vmap(schedule)(np.arange(total + 1)))
    figure = Figure(figsize=(6.5, 3.4), layout="constrained", dpi=130)
    axes = figure.subplots()
    axes.plot(np.arange(total + 1) / per_epoch, rates, color=VAL, lw=1.8)
    axes.set_title(optim.describe_rate(config.optimizer, config.batch_size), color=INK, fontsize=10)
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate")
    _tidy(axes)
    return _save(figure, Path(workdir) / "schedule.png")


def draw_confusion(
    confusion: np.ndarray, labels: list[str], output: Path, *, num_failed: int = 0
) -> None:
    """Draws which classes are taken for which, each row in percent of its label's videos.

    Args:
        confusion: `(num_classes, num_classes)` counts: rows are labels, columns predictions.
        labels: Names of the classes.
        output: The PNG file.
        num_failed: Videos that are not in the matrix as they could not be decoded; they count as
            wrong.

    Raises:
        InputError: It cannot be written.
    """
    share = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    count = len(labels)
    ordering = ""
    if count > MAX_NAMED_CLASSES:
        order = order_by_confusion(confusion)
        share, ordering = share[order][:, order], " (classes that are confused side by side)"
    side = min(3.2 + 0.55 * count, 14)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained", dpi=130)
    axes = figure.subplots()
    image = axes.imshow(share, vmin=0, vmax=100, cmap="Blues")
    of = "% of the label's videos" + (" that did not fail" if num_failed else "")
    figure.colorbar(image, label=of, shrink=0.8)
    if count <= MAX_NAMED_CLASSES:
        axes.set_xticks(range(count), labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), labels)
    if count <= MAX_NAMED_CLASSES // 2:
        for row, column in np.argwhere(confusion):
            colour = "white" if share[row, column] > 55 else INK
            value = f"{share[row, column]:.0f}"
            axes.text(column, row, value, ha="center", va="center", color=colour, fontsize=9)
    axes.set_xlabel(f"prediction{ordering}")
    axes.set_ylabel("label")
    num_videos = confusion.sum() + num_failed
    top1 = 100 * np.trace(confusion) / max(num_videos, 1)
    failed = f", of which {num_failed} failed" if num_failed else ""
    axes.set_title(f"top-1 {top1:.1f} % on {num_videos} videos{failed}", color=INK)
    _save(figure, output)
