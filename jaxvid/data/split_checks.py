"""Checks of the splits of a data set: kinds of labels, classes without videos, overlaps."""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from jaxvid.data.file_checks import map_files
from jaxvid.data.label_sets import LabelSet, classes_of
from jaxvid.data.protocols import VideoRecord
from jaxvid.data.records import Record, VideoFiles, files_of, labels_of
from jaxvid.errors import InputError, printable
from jaxvid.progress import Progress

T = TypeVar("T")

SAMPLE_BYTES = 2**16  # number of bytes at each end of a file that are compared
NAMED_CLASSES = 3  # maximum number of classes without videos that the log names
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}


def check_labels(
    records: Sequence[VideoRecord], num_classes: int, prefix: str, *, multi_label: bool
) -> Sequence[VideoRecord]:
    """Return the videos of a split; in multi-label data, with a `LabelSet` as label.

    Args:
        records: The videos.
        num_classes: Number of classes.
        prefix: Start of the error message.
        multi_label: Whether videos have any number of classes.

    Raises:
        InputError: A video has several classes, but the data is not multi-label; or it is, but the
            source does not support it or no video has a class.
    """
    if multi_label:
        is_table = isinstance(records, VideoFiles)
        if not is_table and any(not isinstance(record, Record) for record in records):
            raise InputError(
                f"{prefix}the data source has one class per video; use data.source=folder for "
                "loss.name=sigmoid, or set loss.name=softmax"
            )
        labels = labels_of(records)
        set_of = {label: LabelSet.make(label, num_classes) for label in {*labels}}
        if not any(label.classes for label in set_of.values()):
            raise InputError(f"{prefix}no video of a split has a class; add labels to the list")
        if is_table:
            return records.with_labels([set_of[label] for label in labels])
        pairs = zip(records, labels, strict=True)
        return [dataclasses.replace(record, label=set_of[label]) for record, label in pairs]
    # Reading the labels of other kinds of records may read the videos.
    is_listed = isinstance(records, list | VideoFiles)
    for i, label in enumerate(labels_of(records) if is_listed else ()):
        if isinstance(label, tuple):
            raise InputError(
                f"{prefix}{records[i].id} has a list of classes as label; for multi-label data, "
                "set --config.loss.name=sigmoid"
            )
    return records


def note_empty_classes(
    records: Mapping[str, Sequence[VideoRecord]], labels: Sequence[str]
) -> tuple[str, ...]:
    """Return one line for each split in which classes have no videos."""
    notes = []
    for split, videos in records.items():
        present = {index for label in {*labels_of(videos)} for index in classes_of(label)}
        empty = [name for label, name in enumerate(labels) if label not in present]
        if empty:
            name, more = SPLIT_NAMES.get(split, split), ", …" if len(empty) > NAMED_CLASSES else ""
            notes.append(
                f"{len(empty)} of {len(labels)} classes have no {name} videos: "
                f"{', '.join(empty[:NAMED_CLASSES])}{more}"
            )
    return tuple(notes)


def find_overlaps(records: Mapping[str, Sequence[VideoRecord]]) -> tuple[list[str], list[str]]:
    """Find video files that are in two splits.

    Files have the same content if they have the same size and the same first and last
    `SAMPLE_BYTES`. Only files whose size occurs in both splits are opened. Videos in packs and HDF5
    files are not compared.

    Args:
        records: Split → its videos.

    Returns:
        For each pair of splits, one line about videos that are the same file, and one line about
        other videos with the same content. Both lists are empty if there is no overlap.
    """
    files = {split: _video_files(videos) for split, videos in records.items()}
    same_files, same_content = [], []
    for first, second in itertools.combinations(files, 2):
        names = [SPLIT_NAMES.get(split, split) for split in (first, second)]
        pairs = list(_find_pairs(files[first], files[second]))
        same = [pair for pair in pairs if _is_same_file(*pair)]
        copies = [pair for pair in pairs if not _is_same_file(*pair)]
        for lines, shared, phrase in (
            (same_files, same, "the same file as"),
            (same_content, copies, "a copy of"),
        ):
            if shared:
                a, b = map(printable, shared[0])
                lines.append(
                    f"{len(shared)} of {len(files[second])} {names[1]} videos are also {names[0]} "
                    f"videos: {b} is {phrase} {a}; remove them from one of the splits"
                )
    return same_files, same_content


def _video_files(videos: Sequence[VideoRecord]) -> Sequence[str | Path]:
    if isinstance(videos, VideoFiles):
        return files_of(videos)
    return [record.path for record in videos if isinstance(record, Record)]


def _find_pairs(
    first: Sequence[str | Path], second: Sequence[str | Path]
) -> Iterator[tuple[str | Path, str | Path]]:
    """Yield pairs of a file of `first` and a file of `second` with the same content.

    There is one pair for each such file of `second`. If it is in `first` too, the pair consists of
    its two paths.
    """
    files, count = [*first, *second], len(first)
    sizes = _map_with_progress(_read_size, files, "comparing file sizes")
    sizes = np.fromiter(sizes, np.int64, len(files))
    common = np.setdiff1d(np.intersect1d(sizes[:count], sizes[count:]), [0])
    candidates = np.flatnonzero(np.isin(sizes, common))
    same_size = [files[i] for i in candidates]
    digests = _map_with_progress(_digest, same_size, "comparing files of the same size")
    by_digest = collections.defaultdict(list)
    for i, file, digest in zip(candidates, same_size, digests, strict=True):
        if i < count:
            by_digest[digest].append(file)
        elif digest and (copies := by_digest.get(digest)):
            same = (copy for copy in copies if _is_same_file(copy, file))
            yield next(same, copies[0]), file


def _map_with_progress(
    function: Callable[[str | Path], T], files: Sequence[str | Path], title: str
) -> Iterator[T]:
    """Call `map_files`, and show the progress."""
    with contextlib.closing(Progress(len(files), title=title, unit="file")) as progress:
        for result in map_files(function, files):
            progress.advance(1)
            yield result


def _read_size(path: str | Path) -> int:
    """Return the size of a file; 0 if it is missing or inaccessible."""
    try:
        return os.path.getsize(path)
    except (OSError, ValueError):  # reported when the video is opened
        return 0


def _digest(path: str | Path) -> bytes:
    """Return a digest of the size and both ends of a file; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(SAMPLE_BYTES)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(len(head), size - SAMPLE_BYTES))
            return hashlib.blake2b(b"%d " % size + head + file.read(SAMPLE_BYTES)).digest()
    except (OSError, ValueError):
        return b""


def _is_same_file(first: str | Path, second: str | Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)
