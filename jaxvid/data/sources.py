"""Data sources: the values of `data.source` in a config, and the function that opens each."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxvid.data.annotations import (
    find_lists,
    find_split,
    has_class_folders,
    read_class_folders,
    read_list_labels,
    read_records,
    read_split,
)
from jaxvid.data.class_names import names_classes, read_labels_or_numbers
from jaxvid.data.folder_scan import Skipped
from jaxvid.data.formats.pack_reader import PackRecords, read_color_matrix
from jaxvid.data.formats.record_offsets import note_memory
from jaxvid.data.formats.tfds_api import find_folder
from jaxvid.data.formats.xvit_hdf5 import read_xvit_list
from jaxvid.data.local_copies import DEFAULT_GB, use_local_copies
from jaxvid.data.protocols import VideoRecord
from jaxvid.data.records import Record
from jaxvid.data.skip_broken import leave_out_broken
from jaxvid.data.split_checks import check_labels, note_empty_classes
from jaxvid.data.synthetic_motion import make_motion
from jaxvid.data.tfds_splits import find_splits
from jaxvid.data.validation_split import ValidationSplit
from jaxvid.data.video_lists import read_list
from jaxvid.errors import InputError, check_option, printable, with_addresses

__all__ = ["SOURCES", "Record", "VideoDataset", "open_dataset", "read_list"]

# Sources whose `data.folder` must exist.
FOLDER_SOURCES = ("folder", "class_folders", "xvit_h5", "pack")
# Sources whose videos `data.val_share` can divide into training and validation.
DIVISIBLE = ("folder", "class_folders")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Location and format of videos and their labels.

    Attributes:
        source: A key of `SOURCES`.
        folder: The folder of the data.
        list: A list of all videos, for `source="folder"`; empty: the folder has a list per split.
            Its paths are relative to `folder`.
        prefix: Folder that paths in lists are relative to; empty: the list's folder.
        val_share: Share of the videos that is used for validation, if the videos are not divided
            into splits; 0: off. See `ValidationSplit`.
        group: Regular expression; videos with the same match are in the same split.
        missing: Missing files in lists: `error` refuses them, `keep` counts them as decode errors.
        skip_broken: Whether to leave out missing and broken training videos, and to continue if
            more cannot be decoded. In the other splits, they remain listed and count as wrong.
        color_matrix: Conversion to RGB: `tagged`, `bt601`, or `auto`: that of the model card, or
            `tagged` without a card.
        multi_label: Whether videos have any number of classes.
        name: For `source="tfds"`: `NAME`, `NAME/CONFIG` or `NAME/CONFIG:VERSION`; empty: `folder`
            is the name.
        tfds_dir: Folder of TFDS data sets; empty: TFDS's default.
        splits: For `source="tfds"`: split (`train`, `val`) → TFDS split or slice, as in
            `train[:90%]`. See `find_splits`.
        cache_dir: Cache folder of remote files; empty: the default. `cache_gb` is its limit.
        motion: For `source="motion"`: `num_train`, `num_val` and `seed` of the clips to generate.

    Raises:
        InputError: There is no such source, `motion` is missing for `source="motion"`, or a field
            has an impossible value or does not apply to the source.
    """

    source: str
    folder: str
    list: str = ""
    prefix: str = ""
    val_share: float = 0.0
    group: str = ""
    missing: str = "error"
    skip_broken: bool = False
    color_matrix: str = "auto"
    multi_label: bool = False
    name: str = ""
    tfds_dir: str = ""
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cache_dir: str = ""
    cache_gb: float = DEFAULT_GB
    motion: Mapping[str, int] | None = None

    def __post_init__(self):
        check_option("data.source", self.source, SOURCES)
        if self.source == "motion" and self.motion is None:
            raise InputError("data.source='motion': data.motion is missing; use configs/motion.py")
        if self.list and self.source != "folder":
            raise InputError(f"data.list={self.list}: needs data.source='folder'")
        for field in ("name", "tfds_dir"):
            if getattr(self, field) and self.source != "tfds":
                raise InputError(f"data.{field}={getattr(self, field)}: needs data.source='tfds'")
        if self.source != "tfds" and any(self.splits.values()):
            raise InputError("data.splits: needs data.source='tfds'")
        if not self.cache_gb > 0:
            raise InputError(f"data.cache_gb={self.cache_gb}: must be above 0")
        if self.split.share and self.source not in DIVISIBLE:
            raise InputError(
                f"data.val_share={self.val_share:g}: needs data.source='folder' or "
                "'class_folders'; for a pack, use the option --val_share of jaxvid prepare, for a "
                "TFDS data set --config.data.splits.val='train[80%:]'"
            )

    @property
    def location(self) -> str:
        """The folder or name of the data, for messages."""
        return self.name or self.folder

    @property
    def split(self) -> ValidationSplit:
        """The division of the videos into training and validation."""
        return ValidationSplit(self.val_share, self.group)

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
        InputError: The source is unknown, the folder, a list or a file is missing or empty, a line
            is malformed, a label is out of range, the number of classes differs, or all training
            videos are missing or broken with `skip_broken`.
    """
    data = use_local_copies(data)
    if data.source in FOLDER_SOURCES:
        check_folder(data.folder)
    dataset = SOURCES[data.source](data, num_classes, splits)
    check_num_classes(dataset.labels, data.location, num_classes)
    for split in splits:
        dataset.records[split] = check_labels(
            dataset.records[split], num_classes, f"{data.location}: ", multi_label=data.multi_label
        )
    notes, left_out = list(dataset.notes), ()
    if data.skip_broken and "train" in splits:
        training, left_out = leave_out_broken(dataset.records["train"], data.location)
        dataset.records["train"] = training
        if left_out:
            notes.append(
                f"data.skip_broken: {len(left_out)} of {len(left_out) + len(training)} training "
                f"videos are missing or broken and are left out; the first is {left_out[0]}"
            )
    notes = tuple(map(printable, map(with_addresses, notes)))
    return dataclasses.replace(dataset, left_out=left_out, notes=notes)


# ------------------------------------------------------------------ the sources


def _open_lists(data: DatasetConfig, num_classes: int, splits: tuple[str, ...]) -> VideoDataset:
    """Read `SPLIT.csv` or `data.list`, or official lists of Kinetics or Something-Something."""
    folder, missing = Path(data.folder), missing_policy(data)
    unsplit = _find_unsplit_list(data)
    if data.list and not names_classes(folder):
        labels, labels_file = read_list_labels(unsplit.parent, [unsplit])
    else:
        lists = [unsplit] if data.list else [*find_lists(folder).values()]
        labels, labels_file = read_list_labels(folder, lists)
    # Check the number before reading the lists, which may be long.
    check_num_classes(labels, labels_file, num_classes)
    if unsplit is None:
        records = {s: read_split(folder, s, labels, data.prefix, missing) for s in splits}
        return VideoDataset(records, labels, notes=note_empty_classes(records, labels))
    prefix = data.prefix or (data.folder if data.list else "")
    videos = read_records(unsplit, labels, prefix=prefix, missing=missing)
    return _divide(videos, labels, data, splits, unsplit)


def _open_motion(data: DatasetConfig, num_classes: int, splits: tuple[str, ...]) -> VideoDataset:
    """Write the synthetic motion clips into the data folder if they do not exist yet."""
    make_motion(Path(data.folder), **data.motion)
    return _open_lists(data, num_classes, splits)


def _open_class_folders(
    data: DatasetConfig, num_classes: int, splits: tuple[str, ...]
) -> VideoDataset:
    """Read `SPLIT/CLASS/*.mp4`, or `CLASS/*.mp4` with `data.val_share`."""
    folder, skipped = Path(data.folder), Skipped()
    if data.val_share:
        _check_no_validation(folder / "val", data.val_share)
    labels, records = read_class_folders(folder, ("train",) if data.val_share else splits, skipped)
    check_num_classes(labels, f"{folder}, class folders", num_classes)
    if data.val_share:
        dataset = _divide(records["train"], labels, data, splits, folder)
    else:
        dataset = VideoDataset(records, labels, notes=note_empty_classes(records, labels))
    notes = (f"{folder}: skipped {skipped}",) if str(skipped) else ()
    return dataclasses.replace(dataset, notes=(*notes, *dataset.notes))


def _open_xvit_h5(data: DatasetConfig, num_classes: int, splits: tuple[str, ...]) -> VideoDataset:
    """Read the HDF5 files of the original XViT implementation."""
    folder = Path(data.folder)
    labels, labels_file = read_labels_or_numbers(folder, num_classes)
    check_num_classes(labels, labels_file, num_classes)
    missing = missing_policy(data)
    records = {split: read_xvit_list(folder, split, num_classes, missing) for split in splits}
    return VideoDataset(records, labels, notes=_compare_color_matrix(data))


def _open_pack(data: DatasetConfig, num_classes: int, splits: tuple[str, ...]) -> VideoDataset:
    """Read a folder that `jaxvid.data.prepare` wrote."""
    records = {split: PackRecords(data.folder, split) for split in splits}
    notes = note_memory(data.folder, sum(r.num_without_offset for r in records.values()))
    notes += _compare_color_matrix(data)
    return VideoDataset(records, records[splits[0]].labels, notes=notes)


def _open_tfds(data: DatasetConfig, num_classes: int, splits: tuple[str, ...]) -> VideoDataset:
    """Open a TFDS data set of ArrayRecord files by its name."""
    if not data.location:
        raise InputError("data.name is empty; set it to a TFDS data set, as in ucf101:2.0.0")
    folder = find_folder(data.location, data.tfds_dir)
    names, notes = find_splits(folder, data.splits, splits)
    records = {split: PackRecords(folder, names[split], data.location) for split in splits}
    return VideoDataset(records, records[splits[0]].labels, notes=notes)


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


def check_folder(folder: str | Path) -> None:
    """Check that the folder of a data set exists.

    Raises:
        InputError: `folder` is empty, or is not an existing folder.
    """
    if not str(folder):
        raise InputError("data.folder is empty; set --config.data.folder=FOLDER")
    if not os.path.lexists(folder):
        raise InputError(f"{folder} does not exist; choose an existing --config.data.folder")
    if not os.path.isdir(folder):
        raise InputError(
            f"{folder} is not a folder; choose the folder of the data (--config.data.folder); a "
            "list is set with --config.data.list"
        )


def _find_unsplit_list(data: DatasetConfig) -> Path | None:
    """Return the list that contains the videos of all splits, or None if each split has a list.

    Raises:
        InputError: `data.list` does not exist, or there is a validation list besides
            `data.val_share`.
    """
    folder = Path(data.folder)
    if data.list:
        if not os.path.lexists(data.list):
            in_folder = folder / data.list
            hint = (
                f"did you mean {in_folder}?" if in_folder.exists() else "correct --config.data.list"
            )
            raise InputError(f"{data.list} does not exist; {hint}")
        return Path(data.list)
    if data.val_share:
        _check_no_validation(find_split(folder, "val"), data.val_share)
        return find_split(folder, "train")
    return None


def _check_no_validation(path: Path, val_share: float) -> None:
    """Refuse `data.val_share` if a validation split, at `path`, exists."""
    if os.path.lexists(path):
        raise InputError(
            f"data.val_share={val_share:g}: {path} has the validation videos already; set "
            "--config.data.val_share=0 to use them, or move them to the training videos"
        )


def _divide(
    videos: Sequence[VideoRecord],
    labels: list[str],
    data: DatasetConfig,
    splits: tuple[str, ...],
    source: Path,
) -> VideoDataset:
    """Divide the videos of a list or folder into the requested splits, by `data.val_share`.

    Without `data.val_share`, a single requested split has all videos.

    Raises:
        InputError: A split would be empty, or several splits are requested without
            `data.val_share`.
    """
    notes = ()
    if data.val_share:
        divided, note = data.split.divide(videos, source)
        records, notes = {split: divided[split] for split in splits}, (note,)
    elif len(splits) == 1:
        records = {splits[0]: videos}
    else:
        raise InputError(
            f"{source}: the videos are not divided into training and validation; set "
            "--config.data.val_share=0.2, or write train.csv and val.csv"
        )
    return VideoDataset(records, labels, notes=(*notes, *note_empty_classes(records, labels)))


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
    used, packed = data.used_color_matrix, read_color_matrix(data.folder)
    if packed in (None, used):
        return ()
    return (
        f"{data.folder} was packed with color_matrix={packed}, but data.color_matrix is {used}; "
        f"set --config.data.color_matrix={packed} or prepare it again with --color_matrix {used}",
    )


def guess_source(path: Path) -> tuple[str, int]:
    """Return the value of `data.source` for a data folder or a list, and the number of classes.

    The source is `pack`, `folder` or `class_folders`.

    Raises:
        InputError: The folder has none of these layouts, or the class names cannot be read.
    """
    if os.path.isfile(path):
        return "folder", len(read_list_labels(path.parent, [path])[0])
    check_folder(path)
    if os.path.isfile(path / "dataset_info.json"):
        return "pack", len(PackRecords(str(path), "train").labels)
    if os.path.isfile(find_split(path, "train")):
        return "folder", len(read_list_labels(path, [*find_lists(path).values()])[0])
    if os.path.isdir(path / "train") or has_class_folders(path):
        return "class_folders", len(read_class_folders(path, ("train",))[0])
    raise InputError(
        f"{path}: unknown layout; expected train.csv, train/CLASS/*.mp4, CLASS/*.mp4 or a pack "
        "(dataset_info.json)"
    )


def has_validation(path: Path, source: str) -> bool:
    """Return whether a data folder or list has validation videos of its own.

    If not, `data.val_share` must be set for training. `source` is the one of `guess_source`.
    """
    if source == "folder":
        return not os.path.isfile(path) and os.path.lexists(find_split(path, "val"))
    return source == "pack" or os.path.isdir(path / "val")
