"""Videos that a command line names: a file, a list, a pack, a data folder or any folder."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from jaxvid import remote
from jaxvid.data.annotations import (
    SPLITS,
    find_split,
    read_class_folders,
    read_list_labels,
    read_names_in_lists,
    read_records,
)
from jaxvid.data.class_names import names_classes
from jaxvid.data.folder_scan import VIDEO_SUFFIXES, Skipped, list_videos
from jaxvid.data.formats.pack_reader import PackRecords
from jaxvid.data.formats.tfds_api import read_metadata
from jaxvid.data.kinetics_ssv2 import is_kinetics
from jaxvid.data.protocols import VideoRecord
from jaxvid.data.records import NO_LABEL, Record, VideoFiles, read_lines
from jaxvid.errors import InputError


@dataclasses.dataclass(frozen=True)
class InputVideos:
    """Videos, with labels if the input has them.

    Attributes:
        records: The videos. Without labels, `label` of each is `NO_LABEL`.
        labels: Names of the classes, or label numbers if they have no names; empty without labels.
        kind: Description of the input, e.g. `class folders`.
    """

    records: Sequence[VideoRecord]
    labels: list[str]
    kind: str


def open_input(
    path: Path, split: str | None = None, *, prefix: str = "", skipped: Skipped | None = None
) -> InputVideos:
    """List the videos of a file or folder, which may have labels or not.

    Args:
        path: A video file; a list of videos with or without labels; a pack; a data folder with
            lists or `SPLIT/CLASS/*.mp4`; class folders `CLASS/*.mp4`; or any other folder, whose
            videos, at any depth, have no labels.
        split: The split to list. None: the only one of the input.
        prefix: Folder that paths in lists are relative to; empty: the list's folder.
        skipped: Counter of the files and folders that are skipped in folders, or None.

    Raises:
        InputError: The input is missing, malformed or has no videos; or `split` is not one of its
            splits, or is needed.
    """
    path = remote.local_path(path)
    prefix = prefix and str(remote.local_path(prefix))
    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist; choose a folder, a list or a video file")
    if not os.path.isdir(path):
        _choose_split(path, (), split)
        if str(path).lower().endswith(VIDEO_SUFFIXES):
            return InputVideos([Record(path, NO_LABEL, path.name)], [], "video file")
        return InputVideos(*_read_list(path, prefix), "list")
    if os.path.isfile(path / "dataset_info.json"):
        info = read_metadata(str(path), "train")
        split = _choose_split(path, tuple(info.splits), split)
        records = PackRecords(str(path), split)
        return InputVideos(records, records.labels, "pack")
    lists = {name: find_split(path, name) for name in SPLITS}
    lists = {name: file for name, file in lists.items() if os.path.lexists(file)}
    if lists:
        split = _choose_split(path, tuple(lists), split)
        return InputVideos(*_read_list(lists[split], prefix), "list")
    splits = tuple(name for name in SPLITS if os.path.isdir(path / name))
    split = _choose_split(path, splits, split)
    return _read_folder(path, split, Skipped() if skipped is None else skipped)


def _choose_split(path: Path, splits: tuple[str, ...], split: str | None) -> str | None:
    """Return the split to list: `split`, or the only one of `splits`; None if there are none.

    Raises:
        InputError: `split` is not one of them, or is None and there are several.
    """
    if split is not None and split not in splits:
        known = f"only {', '.join(splits)}" if splits else "no splits; leave out --split"
        raise InputError(f"{path}: --split {split} was not found; the input has {known}")
    if split is None and len(splits) > 1:
        raise InputError(
            f"{path} has the splits {', '.join(splits)}; choose one, e.g. --split {splits[0]}"
        )
    return split or next(iter(splits), None)


def _read_list(path: Path, prefix: str) -> tuple[VideoFiles, list[str]]:
    """Return the records of a list and the names of their classes. The files need not exist."""
    options = {"prefix": prefix, "missing": "keep", "labelled": False}
    has_column = is_kinetics(path) and "label" in read_lines(path, names=True)[0]
    labels = None
    if names_classes(path.parent) or has_column or read_names_in_lists([path]):
        labels, _ = read_list_labels(path.parent, [path])
    records = read_records(path, labels, **options)
    for id_, label in zip(records.ids, records.labels, strict=True):
        if isinstance(label, tuple):
            raise InputError(
                f"{path}: {id_} has several classes; choose a list with one class per video"
            )
    highest = max(records.labels)
    if labels is None:
        labels = [str(i) for i in range(highest + 1)]
    return records, labels if highest != NO_LABEL else []


def _read_folder(path: Path, split: str | None, skipped: Skipped) -> InputVideos:
    """List the videos of `path/split`, or of `path` without splits.

    The folders of the videos are their classes if every video is in a folder directly below that.
    """
    root = path / split if split else path
    files, errors = list_videos(str(root), skipped)
    if errors:
        raise InputError("; ".join(errors))
    names = [os.path.relpath(file, root) for file in files]
    if {name.count(os.sep) for name in names} == {1}:
        labels, records = read_class_folders(path, (split or "train",))
        return InputVideos(records[split or "train"], labels, "class folders")
    return InputVideos(VideoFiles(root, names, [NO_LABEL] * len(names)), [], "folder")
