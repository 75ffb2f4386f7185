"""Colours and axis style shared by all plots."""

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxvid.atomic import write_file

INK, GRID = "#222222", "#dddddd"  # text; grid lines
TRAIN, VAL = "#9a9a9a", "#0b6fb8"  # curves of training and of validation


def save_figure(figure: Figure, path: Path) -> Path:
    """Save a figure as PNG, atomically.

    Raises:
        InputError: The file cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return write_file(path, picture.getvalue())


def style_axes(axes: Axes) -> None:
    """Start the y axis at 0, draw a light grid, and hide the top and right spines."""
    axes.set_ylim(bottom=0)
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
