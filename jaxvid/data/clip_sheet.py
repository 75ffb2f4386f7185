"""Draws training clips and evaluation views as the network gets them."""

import io
import sys
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from jaxvid.atomic import OutputPath, write_file
from jaxvid.data.clips import transforms
from jaxvid.data.clips.clip import ClipSpec, load_eval_views, load_train_clip
from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.data.label_sets import classes_of
from jaxvid.data.protocols import VideoRecord
from jaxvid.data.sources import open_dataset
from jaxvid.errors import InputError
from jaxvid.experiment import Config, resolve

SHOWN_FRAMES = 8  # frames drawn per clip, evenly spaced


def draw_sheet(rows: Sequence[tuple[str, np.ndarray, np.ndarray]], output: OutputPath) -> None:
    """Draw clips as rows of frames.

    Args:
        rows: For each row the title, the clip `(t, h, w, c)` uint8 and its frame numbers `(t,)`.
        output: The image file; its suffix selects the format.
    """
    columns = min(SHOWN_FRAMES, min(len(clip) for _, clip, _ in rows))
    figure = Figure(figsize=(1.5 * columns, 1.85 * len(rows)), layout="constrained", dpi=110)
    for row_axes, (title, clip, indices) in zip(
        figure.subplots(len(rows), columns, squeeze=False), rows, strict=True
    ):
        for axes, t in zip(
            row_axes, np.linspace(0, len(clip) - 1, columns).round().astype(int), strict=True
        ):
            axes.imshow(clip[t])
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(f"frame {indices[t]}", fontsize=7)
        row_axes[0].set_title(title, loc="left", fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format=output.suffix.lstrip(".") or "png")
    write_file(output, image.getvalue())


def make_rows(config: Config, count: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Load clips of up to `count` evenly spaced videos of each split.

    Clips are loaded as in training and evaluation. Videos that cannot be decoded are left out.

    Returns:
        The rows of `draw_sheet`.

    Raises:
        InputError: The config is invalid, the data cannot be opened, or none of the chosen videos
            can be decoded.
    """
    experiment = resolve(config)
    data = open_dataset(experiment.dataset, experiment.model.num_classes, ("train", "val"))
    specs = {"train": experiment.train_clips, "val": experiment.preprocessing.spec}
    rows = []
    for split in ("train", "val"):
        records = data.records[split]
        for i in np.linspace(0, len(records) - 1, min(count, len(records))).astype(int):
            names = ", ".join(data.labels[index] for index in classes_of(records[i].label))
            title = f"{split}: {records[i].id}, {names}"
            try:
                rng = np.random.default_rng([experiment.recipe.seed, i])
                rows += _rows_of(records[i], split, specs[split], rng, title)
            except DecodeError as error:
                print(f"left out: {error}", file=sys.stderr)
    if not rows:
        raise InputError(
            f"{experiment.dataset.location}: none of the chosen videos can be decoded; "
            "check them with jaxvid.data.check"
        )
    return rows


def _rows_of(
    record: VideoRecord, split: str, spec: ClipSpec, rng: np.random.Generator, title: str
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return the row of a training clip, or the rows of all views of a validation video."""
    if split == "train":
        clip = load_train_clip(record, rng, spec)
        return [(title, clip["video"], clip["indices"])]
    views = load_eval_views(record, spec)
    indices = np.repeat(views["indices"], spec.num_crops, axis=0)
    return [
        (f"{title}, view {v}", transforms.to_uint8(view), frame_numbers)
        for v, (view, frame_numbers) in enumerate(zip(views["video"], indices, strict=True))
    ]
