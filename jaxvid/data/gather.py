"""Input videos of `jaxvid check` and `jaxvid prepare`: lists and folders."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxvid import remote
from jaxvid.data.annotations import (
    SPLITS,
    find_lists,
    read_class_folders,
    read_names_in_lists,
    read_records,
)
from jaxvid.data.class_names import names_classes, read_labels
from jaxvid.data.folder_scan import Skipped
from jaxvid.data.kinetics_ssv2 import is_kinetics
from jaxvid.data.label_sets import classes_of
from jaxvid.data.records import MAX_LIST_BYTES, VideoFiles
from jaxvid.data.split_checks import find_overlaps
from jaxvid.errors import InputError
from jaxvid.files import check_regular


def gather(
    paths: Sequence[str | Path],
    prefix: str = "",
    *,
    labelled: bool = True,
    skipped: Skipped | None = None,
) -> tuple[dict[str, VideoFiles], list[str]]:
    """List the videos of lists and folders. The video files need not exist.

    Args:
        paths: Lists, named after their splits, or folders with lists (`train.csv`, `val.csv`,
            `test.csv`, or official lists) or with class folders.
        prefix: Folder that paths in lists are relative to; empty: the list's folder.
        labelled: Whether labels are required.
        skipped: Counter of the entries of class folders that are skipped, or None.

    Returns:
        Split → records; and the class names, or the label numbers if there are no names.

    Raises:
        InputError: A list or folder is missing, malformed or empty; a split occurs twice; the class
            names of two inputs differ; or a label is out of range.
    """
    records, names, names_path = {}, None, None
    prefix = prefix and str(remote.local_path(prefix))
    for path in map(remote.local_path, paths):
        new_records, labels = _gather_one(path, prefix, labelled, skipped)
        for split in new_records:
            if split in records:
                raise InputError(f"{path}: split {split!r} is given twice; merge the two inputs")
        records.update(new_records)
        if labels is not None and names is not None and labels != names:
            raise InputError(
                f"{path}: the class names differ from those of {names_path}; use the same "
                "labels.txt"
            )
        if labels is not None:
            names, names_path = labels, path
    labels = {label for split in records.values() for label in split.labels}
    highest = max((index for label in labels for index in classes_of(label)), default=0)
    if names is None:
        names = [str(i) for i in range(highest + 1)]
    elif highest >= len(names):
        raise InputError(
            f"{names_path}: label {highest} is out of range: there are {len(names)} class names; "
            "correct the label or add the missing names"
        )
    return records, names


def _gather_one(
    path: Path, prefix: str, labelled: bool, skipped: Skipped | None
) -> tuple[dict[str, VideoFiles], list[str] | None]:
    """Return split → records of one list or folder; and the class names, or None without names."""
    if not os.path.isdir(path):
        if not os.path.lexists(path):
            raise InputError(f"{path} does not exist; choose a list or a data folder")
        with contextlib.suppress(FileNotFoundError):  # reported when the list is read
            check_regular(path, MAX_LIST_BYTES)
        folder, lists = path.parent, {_split_of(path): path}
    else:
        folder, lists = path, find_lists(path)
    if os.path.isfile(path / "dataset_info.json"):
        raise InputError(
            f"{path} is a pack, whose videos were checked when it was written; choose a list or a "
            "folder of videos"
        )
    if not lists:
        splits = tuple(split for split in SPLITS if os.path.isdir(path / split))
        labels, records = read_class_folders(path, splits or ("train",), skipped)
        return records, labels
    files, all_files = [*lists.values()], [*find_lists(folder).values()]
    if names_classes(folder) or (labelled and any(map(is_kinetics, files))):
        labels = read_labels(folder)[0]
    else:  # labels must not depend on the requested splits
        labels = read_names_in_lists(all_files if {*files} <= {*all_files} else files) or None
    options = {"prefix": prefix, "missing": "keep", "labelled": labelled}
    return {split: read_records(file, labels, **options) for split, file in lists.items()}, labels


def note_skipped(skipped: Skipped) -> None:
    """Print one line about the entries that a scan of class folders skipped, if any."""
    if counts := str(skipped):
        print(f"skipped in class folders: {counts}", file=sys.stderr)


def note_overlaps(records: dict[str, VideoFiles]) -> list[str]:
    """Print and return one line for each pair of splits that have videos in common."""
    same_files, copies = find_overlaps(records)
    for line in (*same_files, *copies):
        print(f"overlap: {line}", file=sys.stderr)
    return same_files + copies


def _split_of(path: Path) -> str:
    """Return the split that a list is named after."""
    split = path.stem.removeprefix("something-something-v2-")
    if not split.isidentifier():
        raise InputError(
            f"{path}: the file is not named after a split; rename it, e.g. to train.csv"
        )
    return "val" if split in ("validate", "validation") else split
