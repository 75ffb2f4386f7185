"""Colours and axes that all plots share."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from jaxvid.atomic import write_file

INK, GRID = "#222222", "#dddddd"
TRAIN, VAL = "#9a9a9a", "#0b6fb8"


def save_figure(figure: Figure, path: Path) -> Path:
    """Save a figure as PNG; the file appears whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return write_file(path, picture.getvalue())


def style_axes(axes) -> None:
    """Start the y axis at 0, draw a light grid and hide the upper and right spines."""
    axes.set_ylim(bottom=0)
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
