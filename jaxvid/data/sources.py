"""Data sources: the values of `data.source` in a config, and the function that opens each."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxvid.data.annotations import (
    find_split,
    read_class_folders,
    read_list,
    read_split,
)
from jaxvid.data.class_names import read_labels, read_labels_or_numbers
from jaxvid.data.folder_scan import Skipped
from jaxvid.data.formats.pack_reader import PackRecords, read_color_matrix
from jaxvid.data.formats.xvit_hdf5 import read_xvit_list
from jaxvid.data.label_sets import LabelSet
from jaxvid.data.protocols import VideoRecord
from jaxvid.data.records import Record, Selection, find_missing
from jaxvid.data.synthetic_motion import make_motion
from jaxvid.errors import InputError, check_option, printable

__all__ = ["SOURCES", "Record", "VideoDataset", "open_dataset", "read_list"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Location and format of videos and their labels.

    Attributes:
        source: A key of `SOURCES`.
        folder: The folder of the data, or the name of a TFDS data set.
        prefix: Folder that paths in lists are relative to; empty: the list's folder.
        missing: Missing files in lists: `error` refuses them, `keep` counts them as decode errors.
        skip_broken: Whether to leave out training videos that are known to be missing or broken.
            Training then also continues if more videos cannot be decoded. In the other splits,
            missing and broken videos remain listed and count as wrong.
        color_matrix: Conversion to RGB: `tagged`, `bt601`, or `auto`: that of the model card, or
            `tagged` without a card.
        multi_label: Whether videos have any number of classes.
        motion: For `source="motion"`: `num_train`, `num_val` and `seed` of the clips to generate.

    Raises:
        InputError: There is no such source, or `motion` is missing for `source="motion"`.
    """

    source: str
    folder: str
    prefix: str = ""
    missing: str = "error"
    skip_broken: bool = False
    color_matrix: str = "auto"
    multi_label: bool = False
    motion: Mapping[str, int] | None = None

    def __post_init__(self):
        check_option("data.source", self.source, SOURCES)
        if self.source == "motion" and self.motion is None:
            raise InputError("data.source='motion': data.motion is missing; use configs/motion.py")

    @property
    def used_color_matrix(self) -> str:
        """The conversion to RGB that videos are decoded with: `tagged` or `bt601`."""
        return "tagged" if self.color_matrix == "auto" else self.color_matrix


@dataclasses.dataclass(frozen=True)
class VideoDataset:
    """Labelled videos and the names of their classes.

    Attributes:
        records: Split (`train`, `val`) → its videos.
        labels: Names of the classes, in the order of their indices.
        left_out: Ids of the missing or broken training videos that `data.skip_broken` left out.
        notes: Lines for the log.
    """

    records: dict[str, Sequence[VideoRecord]]
    labels: list[str]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_dataset(data: DatasetConfig, num_classes: int, splits: tuple[str, ...]) -> VideoDataset:
    """Open a data set; generate the motion clips first if they are the source.

    Args:
        data: Location and format of the videos and labels.
        num_classes: The model's number of classes; every label must be below it.
        splits: Names of the splits to read.

    Raises:
        InputError: The source is unknown, a list or file is missing or empty, a line is malformed,
            a label is out of range, the number of classes differs, or all training videos are
            missing or broken with `skip_broken`.
    """
    dataset = SOURCES[data.source](data, num_classes, splits)
    check_num_classes(dataset.labels, data.folder, num_classes)
    for split in splits:
        dataset.records[split] = _check_labels(dataset.records[split], data, num_classes)
    notes, left_out = list(dataset.notes), ()
    if data.skip_broken and "train" in splits:
        training, left_out = _leave_out(dataset.records["train"], data.folder)
        dataset.records["train"] = training
        if left_out:
            notes.append(
                f"data.skip_broken: {len(left_out)} of {len(left_out) + len(training)} training "
                f"videos are missing or broken and are left out; the first is {left_out[0]}"
            )
    return dataclasses.replace(dataset, left_out=left_out, notes=tuple(map(printable, notes)))


# ------------------------------------------------------------------ the sources


def _open_lists(data: DatasetConfig, num_classes: int, splits: tuple[str, ...]) -> VideoDataset:
    """Read `SPLIT.csv` and `labels.txt`, or official lists of Kinetics or Something-Something."""
    folder = Path(data.folder)
    labels, labels_file = read_labels(folder)
    # Check the number before reading the lists, which may be long.
    check_num_classes(labels, labels_file, num_classes)
    missing = missing_policy(data)
    records = {split: read_split(folder, split, labels, data.prefix, missing) for split in splits}
    return VideoDataset(records, labels)


def _open_motion(data: DatasetConfig, num_classes: int, splits: tuple[str, ...]) -> VideoDataset:
    """Write the synthetic motion clips into the data folder if they do not exist yet."""
    make_motion(Path(data.folder), **data.motion)
    return _open_lists(data, num_classes, splits)


def _open_class_folders(
    data: DatasetConfig, num_classes: int, splits: tuple[str, ...]
) -> VideoDataset:
    """Read `SPLIT/CLASS/*.mp4`."""
    folder, skipped = Path(data.folder), Skipped()
    labels, records = read_class_folders(folder, splits, skipped)
    check_num_classes(labels, f"{folder}, class folders", num_classes)
    notes = (f"{folder}: skipped {skipped}",) if str(skipped) else ()
    return VideoDataset(records, labels, notes=notes)


def _open_xvit_h5(data: DatasetConfig, num_classes: int, splits: tuple[str, ...]) -> VideoDataset:
    """Read the HDF5 files of the original XViT program."""
    folder = Path(data.folder)
    labels, labels_file = read_labels_or_numbers(folder, num_classes)
    check_num_classes(labels, labels_file, num_classes)
    missing = missing_policy(data)
    records = {split: read_xvit_list(folder, split, num_classes, missing) for split in splits}
    return VideoDataset(records, labels, notes=_compare_color_matrix(data))


def _open_pack(data: DatasetConfig, num_classes: int, splits: tuple[str, ...]) -> VideoDataset:
    """Read a folder that `jaxvid.data.prepare` wrote."""
    records = {split: PackRecords(data.folder, split, is_folder=True) for split in splits}
    return VideoDataset(records, records[splits[0]].labels, notes=_compare_color_matrix(data))


def _open_tfds(data: DatasetConfig, num_classes: int, splits: tuple[str, ...]) -> VideoDataset:
    """Open a TFDS data set of ArrayRecord files by its name."""
    records = {split: PackRecords(data.folder, split, is_folder=False) for split in splits}
    return VideoDataset(records, records[splits[0]].labels)


# A source is a function of the data config, the number of classes and the splits. To add one,
# write such a function and add it here. See CONTRIBUTING.md.
SOURCES: dict[str, Callable[[DatasetConfig, int, tuple[str, ...]], VideoDataset]] = {
    "motion": _open_motion,
    "folder": _open_lists,
    "class_folders": _open_class_folders,
    "xvit_h5": _open_xvit_h5,
    "pack": _open_pack,
    "tfds": _open_tfds,
}


def _check_labels(
    records: Sequence[VideoRecord], data: DatasetConfig, num_classes: int
) -> Sequence[VideoRecord]:
    """Return the videos of a split; in multi-label data, with a `LabelSet` as label.

    Raises:
        InputError: A video has several classes, but the data is not multi-label; or it is, but the
            source does not support it or no video has a class.
    """
    if data.multi_label:
        if any(not isinstance(record, Record) for record in records):
            raise InputError(
                f"data.source={data.source!r} has one class per video; use data.source=folder for "
                "loss.name=sigmoid, or set loss.name=softmax"
            )
        sets = [LabelSet.make(record.label, num_classes) for record in records]
        if not any(label.classes for label in sets):
            raise InputError(
                f"{data.folder}: no video of a split has a class; add labels to the list"
            )
        pairs = zip(records, sets, strict=True)
        return [dataclasses.replace(record, label=label) for record, label in pairs]
    if isinstance(records, list):
        for record in records:
            if isinstance(record.label, tuple):
                raise InputError(
                    f"{data.folder}: {record.id} has a list of classes as label; for multi-label "
                    "data, set --config.loss.name=sigmoid"
                )
    return records


def missing_policy(data: DatasetConfig) -> str:
    """Return the argument `missing` for reading lists: `error` or `keep`, as in `read_list`."""
    return "keep" if data.skip_broken else data.missing


def check_num_classes(labels: Sequence[str], labels_file: str, num_classes: int) -> None:
    """Check that the number of class names is the model's number of classes.

    Raises:
        InputError: The numbers differ.
    """
    if len(labels) != num_classes:
        raise InputError(
            f"{labels_file}: the data has {len(labels)} classes, but model.num_classes="
            f"{num_classes}; set --config.model.num_classes={len(labels)}"
        )


def _compare_color_matrix(data: DatasetConfig) -> tuple[str, ...]:
    """Return a note if a pack's `color_matrix` differs from the config's, otherwise no note."""
    used = data.used_color_matrix
    packed = read_color_matrix(data.folder)
    if packed in (None, used):
        return ()
    return (
        f"{data.folder} was packed with color_matrix={packed}, but data.color_matrix is {used}; "
        f"set --config.data.color_matrix={packed} or prepare it again with --color_matrix {used}",
    )


def _leave_out(
    records: Sequence[VideoRecord], folder: str
) -> tuple[Sequence[VideoRecord], tuple[str, ...]]:
    """Leave out videos that are known to be missing or broken, without opening any video.

    Returns:
        The remaining videos, in order, and the ids of those that are left out.

    Raises:
        InputError: No video is left.
    """
    if isinstance(records, PackRecords):
        broken = set(records.find_broken())
    else:
        broken = {i for i, _ in find_missing(records)}
    if not broken:
        return records, ()
    remaining = [i for i in range(len(records)) if i not in broken]
    if not remaining:
        raise InputError(
            f"{folder}: all {len(broken)} training videos are missing or broken; check the paths "
            "and the files"
        )
    return Selection(records, remaining), tuple(records[i].id for i in sorted(broken))


def guess_source(folder: Path) -> tuple[str, int]:
    """Return the value of `data.source` for a data folder, and the folder's number of classes.

    The source is `pack`, `folder` or `class_folders`.

    Raises:
        InputError: The folder has none of these layouts, or its class names cannot be read.
    """
    if os.path.isfile(folder / "dataset_info.json"):
        return "pack", len(PackRecords(str(folder), "train", is_folder=True).labels)
    if os.path.isfile(find_split(folder, "train")):
        return "folder", len(read_labels(folder)[0])
    if os.path.isdir(folder / "train"):
        return "class_folders", len(read_class_folders(folder, ("train",))[0])
    raise InputError(
        f"{folder}: unknown layout; expected train.csv, train/CLASS/*.mp4 or a pack "
        "(dataset_info.json)"
    )
