"""SHA-256 fingerprints of the ids, labels and files of a data set."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxvid.data.file_checks import map_files
from jaxvid.data.formats.pack_reader import PackRecords
from jaxvid.data.formats.packed_videos import TfdsVideo
from jaxvid.data.protocols import VideoRecord
from jaxvid.data.records import VideoFiles, files_of, ids_of


def describe_videos(records: Sequence[VideoRecord]) -> dict[str, int | str]:
    """Return the number of videos of a split, and the fingerprints of their ids and labels."""
    return {
        "videos": len(records),
        "sha256": fingerprint(records),
        "labels_sha256": fingerprint_labels(records),
    }


def fingerprint(records: Sequence[VideoRecord]) -> str:
    """Return the SHA-256 of the ids of a split's videos, in order."""
    return digest(ids_of(records))


def fingerprint_labels(records: Sequence[VideoRecord]) -> str:
    """Return the SHA-256 of the labels of a split's videos, in order.

    Labels that are known only after reading the video (`TfdsVideo`) are replaced by empty texts.
    """
    if isinstance(records, VideoFiles):
        return digest(map(str, records.labels))
    return digest("" if isinstance(record, TfdsVideo) else str(record.label) for record in records)


def fingerprint_files(records: Sequence[VideoRecord]) -> str:
    """Return the SHA-256 of the sizes and modification times of the files of a split's videos.

    The files of a pack are its ArrayRecord files. Videos whose file is missing or inaccessible, or
    which have no file, are replaced by empty texts.
    """
    files = records.paths if isinstance(records, PackRecords) else files_of(records)
    return digest(map_files(_describe_file, files))


def _describe_file(path: str | Path | None) -> str:
    if path is None:
        return ""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # reported when the video is opened
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def digest(texts: Iterable[str]) -> str:
    """Return the SHA-256 of texts, which may contain file names that are not UTF-8."""
    sha256 = hashlib.sha256()
    for text in texts:
        sha256.update(text.encode(errors="surrogateescape") + b"\0")
    return sha256.hexdigest()
