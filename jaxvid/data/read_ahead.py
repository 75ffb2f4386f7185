"""Reads remote video files into the cache before they are decoded."""

import concurrent.futures
import contextlib
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxvid.block_cache import Pinned, address_of
from jaxvid.data.protocols import VideoRecord
from jaxvid.data.records import Record
from jaxvid.errors import InputError

THREADS = 8  # per process


def is_read_ahead(records: Sequence[VideoRecord]) -> bool:
    """Return whether the videos are remote files, judged by the first one.

    Packs are not read ahead: which of their records are needed is known only when a clip is
    sampled. All records of a clip are then read at the same time.
    """
    return len(records) > 0 and _remote_path(records[0]) is not None


def _remote_path(record: VideoRecord | None) -> Path | None:
    is_file = isinstance(record, Record) and address_of(record.path) is not None
    return record.path if is_file else None


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(THREADS)


def read_ahead(records: Iterable[VideoRecord | None]) -> None:
    """Start to read the files of videos into the cache; skip records of other kinds and None."""
    for record in records:
        if (path := _remote_path(record)) is not None:
            _pool().submit(_read, path)


def _read(path: Path) -> None:
    with contextlib.suppress(InputError, OSError):  # raised again when the video is opened
        Pinned.whole_file(path).close()
