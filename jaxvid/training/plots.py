"""Plots of the learning curves and of the learning-rate schedule."""

import json
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from jaxvid.plot_style import INK, TRAIN, VAL, save_figure, style_axes
from jaxvid.training import optim


def draw_curves(metrics: Path, output: Path) -> None:
    """Plot loss, top-1 accuracy (in multi-label data: mAP) and learning rate over steps.

    Args:
        metrics: A run's `metrics.jsonl`.
        output: The PNG file to write.

    Raises:
        InputError: The file cannot be written.
    """
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]

    def series(name: str) -> tuple[list, list]:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(11, 3.4), layout="constrained", dpi=130)
    score = ("top-1 (%)", (("train/top1", "training", TRAIN), ("val/top1", "validation", VAL)))
    if any("val/mAP" in row for row in rows):
        score = ("mAP (%)", (("val/mAP", "validation", VAL),))
    panels = (
        ("loss", (("train/loss", "training", TRAIN), ("val/loss", "validation", VAL))),
        score,
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
        style_axes(axes)
        if "%" in title:
            axes.set_ylim(0, 100)
    save_figure(figure, output)


def draw_schedule(
    optimizer: optim.OptimizerConfig, workdir: str | Path, *, batch_size: int, num_epochs: float
) -> Path:
    """Plot the learning rate over epochs, without training.

    Args:
        optimizer: The optimizer and its schedule.
        workdir: Output directory; the plot is `schedule.png`.
        batch_size: Clips per step; learning rates are scaled by it.
        num_epochs: Length of the training.

    Returns:
        The path of the plot.

    Raises:
        InputError: The warm-up is negative or not shorter than the training, or the plot cannot be
            written.
    """
    steps_per_epoch = 100  # only the resolution of the plot: rates depend on the epoch alone
    total_steps = max(1, round(num_epochs * steps_per_epoch))
    schedule = optim.make_schedule(
        optimizer,
        batch_size=batch_size,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
    )
    steps = np.arange(total_steps + 1)
    rates = np.asarray(jax.vmap(schedule)(steps))
    figure = Figure(figsize=(6.5, 3.4), layout="constrained", dpi=130)
    axes = figure.subplots()
    axes.plot(steps / steps_per_epoch, rates, color=VAL, lw=1.8)
    axes.set_title(optim.describe_rate(optimizer, batch_size), color=INK, fontsize=10)
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate")
    style_axes(axes)
    return save_figure(figure, Path(workdir) / "schedule.png")
