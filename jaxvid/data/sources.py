"""What lists videos. A source is a sequence of records; opening them is left to the pipeline."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxvid.data.annotations import (
    Record,
    find_split,
    read_class_folders,
    read_labels,
    read_labels_or_numbers,
    read_list,
    read_split,
)
from jaxvid.data.folder_scan import Skipped
from jaxvid.data.formats.pack_reader import PackRecords, read_color_matrix
from jaxvid.data.formats.xvit_hdf5 import read_xvit_list
from jaxvid.data.records import Selection, find_missing
from jaxvid.data.synthetic_motion import make_motion
from jaxvid.errors import InputError, printable

__all__ = ["SOURCES", "Record", "VideoDataset", "open_dataset", "read_list"]

SOURCES = ("motion", "folder", "class_folders", "xvit_h5", "pack", "tfds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Where videos and their labels come from.

    Attributes:
        source: One of `SOURCES`.
        folder: The folder of the data, or the name of a TFDS data set.
        prefix: Directory of the paths in lists; empty: the list's directory.
        missing: Missing files in lists: `error`, or `keep`: they count as decode errors.
        skip_broken: Leave out training videos that are known to be missing or broken. In other
            splits they are kept and count as wrong.
        color_matrix: `tagged`, `bt601`, or `auto` for the model card's, else `tagged`.
        motion: For `source="motion"`: `num_train`, `num_val` and `seed` of the clips to generate.

    Raises:
        InputError: There is no such source.
    """

    source: str
    folder: str
    prefix: str = ""
    missing: str = "error"
    skip_broken: bool = False
    color_matrix: str = "auto"
    motion: Mapping[str, int] | None = None

    def __post_init__(self):
        if self.source not in SOURCES:
            names = ", ".join(repr(name) for name in SOURCES[:-1])
            raise InputError(f"data.source={self.source!r}: there are {names} and {SOURCES[-1]!r}")
        if self.source == "motion" and self.motion is None:
            raise InputError("data.source='motion': needs data.motion; use configs/motion.py")

    @property
    def used_color_matrix(self) -> str:
        """The color matrix that videos are decoded with."""
        return "tagged" if self.color_matrix == "auto" else self.color_matrix


@dataclasses.dataclass(frozen=True)
class VideoDataset:
    """Labelled videos and the names of their classes.

    Attributes:
        records: Split (`train`, `val`) → its records, each with `id`, `label` and `open()`.
        labels: The names of the classes, in order.
        left_out: Ids of training videos that are listed, are known to be broken or missing, and
            were left out because of `data.skip_broken`.
        notes: Lines for the log.
    """

    records: dict[str, Sequence]
    labels: list[str]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_dataset(data: DatasetConfig, num_classes: int, splits: tuple[str, ...]) -> VideoDataset:
    """Open a data set; generate the motion clips first if they are the source.

    Args:
        data: Where the videos and labels come from.
        num_classes: The model's number of classes; every label must be below it.
        splits: Names of the splits to read.

    Raises:
        InputError: A list or file is missing or empty, a line is malformed, a label out of range.
    """
    folder, skipped = Path(data.folder), Skipped()
    missing = "keep" if data.skip_broken else data.missing
    if data.source == "motion":
        make_motion(folder, **data.motion)
    if data.source in ("motion", "folder"):
        labels, where = read_labels(folder)
        _check_labels(labels, where, num_classes)
        records = {
            split: read_split(folder, split, labels, data.prefix, missing) for split in splits
        }
    elif data.source == "class_folders":
        labels, records = read_class_folders(folder, splits, skipped)
        _check_labels(labels, f"{folder}'s class folders", num_classes)
    elif data.source == "xvit_h5":
        labels, where = read_labels_or_numbers(folder, num_classes)
        _check_labels(labels, where, num_classes)
        records = {split: read_xvit_list(folder, split, num_classes, missing) for split in splits}
    else:
        is_folder = data.source == "pack"
        records = {split: PackRecords(data.folder, split, is_folder=is_folder) for split in splits}
        labels = records[splits[0]].labels
        _check_labels(labels, data.folder, num_classes)
    notes = [f"{folder}: skipped {skipped}"] if str(skipped) else []
    used = data.used_color_matrix
    packed = read_color_matrix(folder) if data.source in ("pack", "xvit_h5") else None
    if packed not in (None, used):
        notes.append(
            f"{folder} was packed with color_matrix={packed}, but data.color_matrix is {used}; set "
            f"--config.data.color_matrix={packed} or prepare it again with --color_matrix {used}"
        )
    left_out = ()
    if data.skip_broken and "train" in records:
        records["train"], left_out = _leave_out(records["train"], data.folder)
        if left_out:
            notes.append(
                f"data.skip_broken: {len(left_out)} of {len(left_out) + len(records['train'])} "
                f"training videos are missing or broken and left out, {left_out[0]} first"
            )
    return VideoDataset(records, labels, left_out, tuple(map(printable, notes)))


def _leave_out(records: Sequence, folder: str) -> tuple[Sequence, tuple[str, ...]]:
    """Leave out what is known to be missing or broken without opening any video.

    Returns:
        The other videos, in order, and the ids of those that are left out.

    Raises:
        InputError: None would be left.
    """
    if isinstance(records, PackRecords):
        bad = set(records.find_broken())
    else:
        bad = {i for i, _ in find_missing(records)}
    if not bad:
        return records, ()
    good = [i for i in range(len(records)) if i not in bad]
    if not good:
        raise InputError(f"{folder}: all {len(bad)} training videos are missing or broken")
    return Selection(records, good), tuple(records[i].id for i in sorted(bad))


def guess_source(folder: Path) -> tuple[str, int]:
    """Which of `SOURCES` a folder is, and the number of its classes.

    Raises:
        InputError: It is none of them.
    """
    if os.path.isfile(folder / "dataset_info.json"):
        return "pack", len(PackRecords(str(folder), "train", is_folder=True).labels)
    if os.path.isfile(find_split(folder, "train")):
        return "folder", len(read_labels(folder)[0])
    if os.path.isdir(folder / "train"):
        return "class_folders", len(read_class_folders(folder, ("train",))[0])
    raise InputError(
        f"{folder}: has no train.csv, no train/CLASS/*.mp4, and is no pack; give it one of these"
    )


def _check_labels(labels: list[str], where: object, num_classes: int) -> None:
    if len(labels) != num_classes:
        raise InputError(
            f"{where}: {len(labels)} names, but model.num_classes={num_classes}; "
            f"set --config.model.num_classes={len(labels)}"
        )
