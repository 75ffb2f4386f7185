"""Plots of the results: speed by batch size, kernels, and relative times of options."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.gpu.goals import Results, rows_of
from jaxvid.plot_style import INK, TRAIN, VAL, save_figure, style_axes

COLOURS = {"jaxvid": VAL, "pytorch": TRAIN}
GROUP_COLOURS = ("#0b6fb8", "#e07b00", "#4a9a4a", "#9a9a9a", "#7a4fa3")
OPTIONS = {  # step → its table
    "attention": "attention",
    "scan": "scan",
    "remat": "remat",
    "shift": "temporal shift",
    "pytorch": "options of PyTorch",
    "flags": "flags of XLA",
}


def draw(results: Results, folder: Path) -> None:
    """Draw the plots whose steps have results."""
    speed = {
        f"{row['model']}, {row['step']}": rows
        for name in ("forward-xvit", "train-xvit", "forward-stam", "train-stam")
        for rows in [[r for r in rows_of(results, name, "speed") if r.get("clips/s")]]
        for row in rows[:1]
    }
    if speed:
        save_figure(draw_speed(speed), folder / "speed.png")
    groups = [row for row in rows_of(results, "kernels", "kernel groups") if "group" in row]
    if groups:
        save_figure(draw_kernels(groups), folder / "kernels.png")
    options = [
        row
        for step, table in OPTIONS.items()
        for row in rows_of(results, step, table)
        if row.get("time / first side") and not is_first(row)
    ]
    if options:
        save_figure(draw_options(options), folder / "options.png")


def is_first(row: dict[str, Any]) -> bool:
    """Return whether a row is the first side of its comparison, whose ratios are all 1."""
    return row["lowest ratio"] == row["highest ratio"] == 1


def draw_speed(speed: dict[str, list[dict[str, Any]]]) -> Figure:
    """Plot clips per second over batch size, one panel per model and kind of step."""
    figure = Figure(figsize=(3.6 * len(speed), 3.4), layout="constrained", dpi=130)
    panels = figure.subplots(1, len(speed), squeeze=False)[0]
    for axes, (title, rows) in zip(panels, speed.items(), strict=True):
        for side in dict.fromkeys(row["side"] for row in rows):
            points = sorted((r["batch"], r["clips/s"]) for r in rows if r["side"] == side)
            axes.plot(*zip(*points, strict=True), "o-", label=side, color=COLOURS.get(side, INK))
        axes.set_xscale("log", base=2)
        batches = sorted({row["batch"] for row in rows})
        axes.set_xticks(batches, [str(batch) for batch in batches])
        finish(axes, title, "clips per step", "clips/s")
        axes.set_ylim(0, 1.1 * max(row["clips/s"] for row in rows))
        axes.legend(frameon=False, loc="lower right")
    return figure


def draw_kernels(rows: list[dict[str, Any]]) -> Figure:
    """Plot the time per step of each group of kernels as stacked bars."""
    steps = list(dict.fromkeys(row["step"] for row in rows))
    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure = Figure(figsize=(9, 1.2 + 0.7 * len(steps)), layout="constrained", dpi=130)
    axes = figure.subplots()
    for y, step in enumerate(steps):
        left = 0.0
        for row in (row for row in rows if row["step"] == step):
            colour = GROUP_COLOURS[groups.index(row["group"]) % len(GROUP_COLOURS)]
            label = row["group"] if y == 0 else None
            axes.barh(y, row["ms per step"], left=left, color=colour, label=label)
            left += row["ms per step"]
    axes.set_yticks(range(len(steps)), [step.replace(", ", "\n", 1) for step in steps])
    finish(axes, "time of kernels", "ms per step", "")
    axes.set_ylim(-0.6, len(steps) - 0.4)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_options(rows: list[dict[str, Any]]) -> Figure:
    """Plot the time of each option, divided by that of the first side of its comparison."""
    figure = Figure(figsize=(9, 1 + 0.25 * len(rows)), layout="constrained", dpi=130)
    axes = figure.subplots()
    names = [f"{row['model']}, {row['step']}: {row['side']}" for row in rows]
    ratios = [row["time / first side"] for row in rows]
    axes.barh(range(len(rows)), ratios, color=VAL)
    axes.axvline(1, color=INK, lw=0.8)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    finish(axes, "time / time of the first side of the comparison", "", "")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    return figure


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    """Set the texts and the style of a plot."""
    axes.set_title(title, color=INK, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    style_axes(axes)
