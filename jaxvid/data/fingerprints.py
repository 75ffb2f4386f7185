"""Fingerprints of the videos, labels and files of a data set."""

import concurrent.futures
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxvid.data.formats.pack_reader import PackRecords, TfdsVideo


def describe_videos(records: Sequence) -> dict:
    """How many videos a split has, and the fingerprints of their ids and of their labels."""
    return {
        "videos": len(records),
        "sha256": fingerprint(records),
        "labels_sha256": fingerprint_labels(records),
    }


def fingerprint(records: Sequence) -> str:
    """SHA-256 over the ids of a split's videos, in order."""
    return digest(record.id for record in records)


def fingerprint_labels(records: Sequence) -> str:
    """SHA-256 over the labels of a split's videos, in order; of those that no list tells: none."""
    return digest("" if isinstance(record, TfdsVideo) else str(record.label) for record in records)


def fingerprint_files(records: Sequence) -> str:
    """SHA-256 over sizes and times of the files that videos lie in: another where one changed."""
    is_pack = isinstance(records, PackRecords)
    paths = records.paths if is_pack else [record.path for record in records]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # file systems over a network are slow
        return digest(pool.map(_describe_file, paths))


def _describe_file(path: str | Path) -> str:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # who opens it says why
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def digest(texts: Iterable[str]) -> str:
    """Return the SHA-256 of a sequence of texts, which may hold names of files."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode(errors="surrogateescape") + b"\0")  # as file names are
    return found.hexdigest()
