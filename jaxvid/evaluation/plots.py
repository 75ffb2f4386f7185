"""Plot of the confusion matrix."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jaxvid.evaluation.metrics import order_by_confusion
from jaxvid.plot_style import INK, save_figure

MAX_NAMED_CLASSES = 40


def draw_confusion(
    confusion: np.ndarray, labels: list[str], output: Path, *, num_failed: int = 0
) -> None:
    """Draw the confusion matrix, in percent of the videos of each label.

    Args:
        confusion: `(num_classes, num_classes)` counts: rows are labels, columns predictions.
        labels: Class names.
        output: PNG file.
        num_failed: Number of videos that could not be decoded. They are not in the matrix, but
            count as wrong in the accuracy in the title.

    Raises:
        InputError: The file cannot be written.
    """
    share = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    count = len(labels)
    ordering = ""
    if count > MAX_NAMED_CLASSES:
        order = order_by_confusion(confusion)
        share, ordering = share[order][:, order], " (often confused classes are adjacent)"
    side = min(3.2 + 0.55 * count, 14)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained", dpi=130)
    axes = figure.subplots()
    image = axes.imshow(share, vmin=0, vmax=100, cmap="Blues")
    unit = f"% of the label's {'decoded ' if num_failed else ''}videos"
    figure.colorbar(image, label=unit, shrink=0.8)
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
    failed = f" ({num_failed} not decoded)" if num_failed else ""
    axes.set_title(f"top-1 {top1:.1f} % on {num_videos} videos{failed}", color=INK)
    save_figure(figure, output)
