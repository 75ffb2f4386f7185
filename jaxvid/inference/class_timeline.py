"""Class probabilities of a long video over time, as CSV, JSON and plot."""

import csv
import dataclasses
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxvid.atomic import OutputPath, output_path, write_file, write_json
from jaxvid.errors import printable
from jaxvid.inference.results import Result
from jaxvid.parsers import TIMELINE_KINDS
from jaxvid.plot_style import GRID, INK

COLOURS = ("#0b6fb8", "#d1495b", "#3f8f4f", "#e0912f", "#7a52a8", "#2aa5a0")  # one per drawn class
OTHERS = "#c9c9c9"  # colour of all classes that are not drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassTimeline(Result):
    """Class probabilities of the windows of a video.

    Attributes:
        video: Name of the video, as in `Prediction`.
        labels: Class names.
        starts: Start of each window in seconds `(windows,)`, relative to the video's first frame.
        ends: End of each window in seconds `(windows,)`, relative to the video's first frame.
        padded: Whether each window is too short for a clip, so that frames are repeated:
            booleans `(windows,)`.
        stride: Time between the starts of consecutive windows in seconds.
        probabilities: Class probabilities of each window `(windows, num_classes)`.
    """

    video: str
    labels: list[str]
    starts: np.ndarray
    ends: np.ndarray
    padded: np.ndarray
    stride: float
    probabilities: np.ndarray

    def rows(self, top_k: int) -> list[dict]:
        """Return `{"start", "end", "padded", "top": [{"label", "probability"}]}` for each window.

        Args:
            top_k: Number of classes per window.
        """
        order = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :top_k]
        return [
            {
                "start": round(float(self.starts[i]), 3),
                "end": round(float(self.ends[i]), 3),
                "padded": bool(self.padded[i]),
                "top": [
                    {"label": self.labels[c], "probability": float(self.probabilities[i, c])}
                    for c in top
                ],
            }
            for i, top in enumerate(order)
        ]

    def __str__(self) -> str:
        """Return the name of the video, and one line per window with its 3 most likely classes."""
        return "\n".join([printable(self.video), *self.lines(top_k=3)])

    def lines(self, top_k: int) -> list[str]:
        """Return one line per window with its time and its most likely classes."""
        return [
            f"{row['start']:9.2f} to {row['end']:9.2f} s  "
            + ", ".join(f"{e['label']} {100 * e['probability']:.1f} %" for e in row["top"])
            for row in self.rows(top_k)
        ]

    def to_json(self, top_k: int = 5) -> dict[str, Any]:
        """Return `{"video", "stride", "windows"}`; the windows are those of `rows`."""
        stride = round(self.stride, 6)
        return {"video": self.video, "stride": stride, "windows": self.rows(top_k)}

    def table_rows(self) -> list[dict[str, Any]]:
        """Return one row per window: `video`, `start`, `end`, `padded` and one column per class."""
        columns = zip(self.starts.tolist(), self.ends.tolist(), self.padded.tolist(), strict=True)
        return [
            {"video": self.video, "start": start, "end": end, "padded": padded}
            | dict(zip(self.labels, probabilities, strict=True))
            for (start, end, padded), probabilities in zip(
                columns, self.probabilities.tolist(), strict=True
            )
        ]

    def to_csv(self, top_k: int) -> str:
        """Return the rows of all windows as CSV.

        Args:
            top_k: Number of classes per window.
        """
        rows, table = self.rows(top_k), io.StringIO()
        ranks = range(1, len(rows[0]["top"]) + 1)
        names = [name for rank in ranks for name in (f"label_{rank}", f"probability_{rank}")]
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["start", "end", "padded", *names])
        for row in rows:
            pairs = [(entry["label"], f"{entry['probability']:.6f}") for entry in row["top"]]
            span = row["start"], row["end"], int(row["padded"])
            writer.writerow([*span, *(x for pair in pairs for x in pair)])
        return table.getvalue()

    def save(self, prefix: str | Path, top_k: int = 5) -> list[OutputPath]:
        """Write `PREFIX.csv`, `PREFIX.json` and `PREFIX.png`, each atomically.

        Args:
            prefix: Path without suffix.
            top_k: Number of classes per window.

        Returns:
            The paths of the three files.

        Raises:
            InputError: A file cannot be written.
        """
        plot = io.BytesIO()
        self.draw().savefig(plot, format="png")
        paths = [output_path(f"{prefix}.{kind}") for kind in TIMELINE_KINDS]
        write_file(paths[0], self.to_csv(top_k).encode())
        write_json(paths[1], self.to_json(top_k))
        write_file(paths[2], plot.getvalue())
        return paths

    def draw(self) -> Figure:
        """Plot the probabilities of the main classes over time, and below them the top-1 class."""
        colour_of = self.class_colours()
        middles = (self.starts + self.ends) / 2
        figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=130)
        axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(9, 1))
        marker = "o" if len(middles) <= 60 else None
        for c, colour in colour_of.items():
            values = 100 * self.probabilities[:, c]
            axes.plot(middles, values, color=colour, label=self.labels[c], marker=marker, ms=4)
        axes.set_ylim(0, 102)
        axes.set_ylabel("probability (%)")
        name = os.fsencode(Path(self.video).name).decode(errors="replace")
        axes.set_title(f"{name}: classes over time", color=INK)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.grid(color=GRID, lw=0.6)
        axes.set_axisbelow(True)
        edges, colours = self.edges(), self.top1_colours()
        strip.bar(edges[:-1], 1, np.diff(edges), align="edge", color=colours)
        strip.set_yticks([])
        strip.set_ylabel("top-1", rotation=0, ha="right", va="center")
        strip.set_xlabel("time (s)")
        strip.set_xlim(edges[0], edges[-1])
        for panel in (axes, strip):
            panel.spines[["top", "right"]].set_visible(False)
        return figure

    def edges(self) -> np.ndarray:
        """Return times `(windows + 1,)` in seconds, between which one window's class is shown.

        The shown class changes halfway between the middles of consecutive windows.
        """
        middles = (self.starts + self.ends) / 2
        return np.concatenate([self.starts[:1], (middles[1:] + middles[:-1]) / 2, self.ends[-1:]])

    def top1_colours(self) -> list[str]:
        """Return the colour of the top-1 class of each window."""
        colour_of = self.class_colours()
        return [colour_of.get(c, OTHERS) for c in self.probabilities.argmax(axis=1).tolist()]

    def class_colours(self) -> dict[int, str]:
        """Choose the classes to draw; return class index → colour.

        The classes are sorted by the number of windows in which they are top-1, and then by their
        highest probability. The first ones are drawn, one per colour in `COLOURS`.
        """
        counts = np.bincount(self.probabilities.argmax(axis=1), minlength=len(self.labels))
        order = np.lexsort((-self.probabilities.max(axis=0), -counts))
        return dict(zip(order.tolist(), COLOURS, strict=False))
