"""Checks of the splits of a data set: kinds of labels, classes without videos, overlaps."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from jaxvid.data.label_sets import LabelSet, classes_of
from jaxvid.data.protocols import VideoRecord
from jaxvid.data.records import CHUNK_FILES, Record
from jaxvid.errors import InputError, printable

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
        if any(not isinstance(record, Record) for record in records):
            raise InputError(
                f"{prefix}the data source has one class per video; use data.source=folder for "
                "loss.name=sigmoid, or set loss.name=softmax"
            )
        sets = [LabelSet.make(record.label, num_classes) for record in records]
        if not any(label.classes for label in sets):
            raise InputError(f"{prefix}no video of a split has a class; add labels to the list")
        pairs = zip(records, sets, strict=True)
        return [dataclasses.replace(record, label=label) for record, label in pairs]
    for record in records if isinstance(records, list) else ():
        if isinstance(record.label, tuple):
            raise InputError(
                f"{prefix}{record.id} has a list of classes as label; for multi-label data, set "
                "--config.loss.name=sigmoid"
            )
    return records


def note_empty_classes(
    records: Mapping[str, Sequence[VideoRecord]], labels: Sequence[str]
) -> tuple[str, ...]:
    """Return one line for each split in which classes have no videos."""
    notes = []
    for split, videos in records.items():
        present = {index for video in videos for index in classes_of(video.label)}
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
    files = {
        split: [record for record in videos if isinstance(record, Record)]
        for split, videos in records.items()
    }
    same_file, same_content = [], []
    for first, second in itertools.combinations(files, 2):
        pairs = list(_find_pairs(files[first], files[second]))
        same = [pair for pair in pairs if _is_same_file(*pair)]
        copies = [pair for pair in pairs if not _is_same_file(*pair)]
        for found, phrase, lines in (
            (same, "the same file as", same_file),
            (copies, "a copy of", same_content),
        ):
            if found:
                names = [SPLIT_NAMES.get(split, split) for split in (first, second)]
                a, b = (printable(record.path) for record in found[0])
                lines.append(
                    f"{len(found)} of {len(files[second])} {names[1]} videos are also {names[0]} "
                    f"videos: {b} is {phrase} {a}; remove them from one of the splits"
                )
    return same_file, same_content


def _find_pairs(
    first: Sequence[Record], second: Sequence[Record]
) -> Iterator[tuple[Record, Record]]:
    """Yield each record of `second` whose content is in `first`, after a record of `first` with it.

    This is the same file, if `first` contains it.
    """
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        sizes = [_map_files(pool, _read_size, [r.path for r in part]) for part in (first, second)]
        common = set(sizes[0]) & set(sizes[1]) - {0}
        candidates = [
            [record for record, size in zip(part, part_sizes, strict=True) if size in common]
            for part, part_sizes in zip((first, second), sizes, strict=True)
        ]
        digests = [_map_files(pool, _digest, [r.path for r in part]) for part in candidates]
    by_digest = collections.defaultdict(list)
    for record, digest in zip(candidates[0], digests[0], strict=True):
        by_digest[digest].append(record)
    for record, digest in zip(candidates[1], digests[1], strict=True):
        if digest and (copies := by_digest.get(digest)):
            same = (copy for copy in copies if _is_same_file(copy, record))
            yield next(same, copies[0]), record


def _map_files(
    pool: concurrent.futures.Executor, function: Callable[[Path], object], paths: Sequence[Path]
) -> list:
    """Call a function on files in the threads of a pool; missing files give a false value."""

    def call(start: int) -> list:
        return [function(path) for path in paths[start : start + CHUNK_FILES]]

    return [value for chunk in pool.map(call, range(0, len(paths), CHUNK_FILES)) for value in chunk]


def _read_size(path: Path) -> int:
    """Return the size of a file; 0 if it is missing or inaccessible."""
    try:
        return os.path.getsize(path)
    except (OSError, ValueError):  # reported when the video is opened
        return 0


def _digest(path: Path) -> bytes:
    """Return a digest of the size and both ends of a file; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(SAMPLE_BYTES)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(len(head), size - SAMPLE_BYTES))
            return hashlib.blake2b(b"%d " % size + head + file.read(SAMPLE_BYTES)).digest()
    except (OSError, ValueError):
        return b""


def _is_same_file(first: Record, second: Record) -> bool:
    return os.path.realpath(first.path) == os.path.realpath(second.path)
