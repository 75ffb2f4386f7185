"""Results of videos in parts, stored in a folder, so that an interrupted program continues."""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxvid.atomic import write_file
from jaxvid.data.beam import BeamRunner, run_on_workers
from jaxvid.data.records import Record, VideoFiles
from jaxvid.errors import InputError
from jaxvid.files import cache_dir
from jaxvid.locks import LockedError, locked

PART_VIDEOS = 64  # an interrupted run repeats at most one part per worker
MAX_AGE_DAYS = 30  # interrupted runs are forgotten after this time

Item = tuple[Record, str]  # a video and its split


class SplitVideos(Sequence[Item]):
    """The videos of several splits, with the name of their split.

    Args:
        records: Split → its videos.
    """

    def __init__(self, records: Mapping[str, VideoFiles]):
        self._splits, self._records = [*records], [*records.values()]
        self._ends = [*itertools.accumulate(map(len, self._records))]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        i = bisect.bisect_right(self._ends, index)
        start = self._ends[i] - len(self._records[i])
        return self._records[i][index - start], self._splits[i]


class ResultPart(NamedTuple):
    """Consecutive videos, whose results are stored in one file.

    Attributes:
        path: The file.
        items: The videos.
    """

    path: Path
    items: list[Item]


def run(
    items: Sequence[Item],
    folder: Path,
    read: Callable[[Iterable[Item], int], Iterator[Any]],
    read_part: Callable[[Sequence[Item]], Iterable[Any]],
    beam: BeamRunner | None,
) -> Iterator[dict[str, Any]]:
    """Read videos part by part; do not read those of finished parts again.

    A part is read again if one of its files has changed since.

    Args:
        items: The videos.
        folder: Folder of the results. The same videos must be used each time.
        read: Function of videos and the number of finished videos, which yields the results in
            order: dataclasses with the fields `broken` and `size`, as in `check.Finding`.
        read_part: Function that returns the results of videos, for a worker of Beam.
        beam: Runner of Beam; None: `read` is called in this process.

    Yields:
        The fields of each result, in the order of the videos.

    Raises:
        InputError: The folder cannot be written, or the pipeline failed.
    """
    count = -(-len(items) // PART_VIDEOS)

    def path_of(number: int) -> Path:
        return folder / f"part-{number:06d}.json"

    def make_part(number: int) -> ResultPart:
        start = number * PART_VIDEOS
        return ResultPart(path_of(number), items[start : start + PART_VIDEOS])

    remaining = [
        i for i in range(count) if not (path_of(i).exists() and _is_complete(make_part(i)))
    ]
    if len(remaining) < count:
        print(f"{count - len(remaining)} of {count} parts are complete", file=sys.stderr)
    if beam is not None:
        store = functools.partial(_read_and_store, read_part=read_part)
        run_on_workers(store, [*map(make_part, remaining)], beam)
    elif remaining:
        todo = itertools.chain.from_iterable(make_part(i).items for i in remaining)
        num_left = sum(min(PART_VIDEOS, len(items) - i * PART_VIDEOS) for i in remaining)
        results = read(todo, len(items) - num_left)
        for part in map(make_part, remaining):
            _store(part, itertools.islice(results, len(part.items)))
        next(results, None)  # ends the progress bar
    for part in map(make_part, range(count)):
        if (rows := _load(part)) is None:
            raise InputError(
                f"{folder}: not all parts were written; use a folder that all workers share and "
                "run the same command again"
            )
        yield from rows


def _read_and_store(part: ResultPart, read_part: Callable[[Sequence[Item]], Iterable[Any]]) -> None:
    """Read the videos of a part and write its file, on a worker of Beam."""
    _store(part, read_part(part.items))


def _store(part: ResultPart, results: Iterable[Any]) -> None:
    rows = [dataclasses.asdict(result) for result in results]
    write_file(part.path, json.dumps(rows).encode(), writer=uuid.uuid4().hex)


def _load(part: ResultPart) -> list[dict[str, Any]] | None:
    """Return the results of a part, or None if there are none."""
    try:
        rows = json.loads(part.path.read_bytes())
        ids = [row["id"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return rows if ids == [record.id for record, _ in part.items] else None


def _is_complete(part: ResultPart) -> bool:
    """Return whether a part has results, and its files have not changed since."""
    if (rows := _load(part)) is None:
        return False
    written = part.path.stat().st_mtime
    for (record, _), row in zip(part.items, rows, strict=True):
        size, modified = -1, 0.0
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(record.path)
            if stat.S_ISREG(status.st_mode):
                size, modified = status.st_size, status.st_mtime
        if size != row.get("size") or modified > written:
            return False
    return True


# ------------------------------------------------------------------ the folder


@contextlib.contextmanager
def open_folder(folder: Path | None, items: Sequence[Item]) -> Iterator[Path | None]:
    """Yield the folder of the results of videos.

    Args:
        folder: The folder that the user has chosen; None: a folder in the cache, which is removed
            when the body has finished. It remains if the body raises or the process is killed.
        items: The videos.

    Yields:
        The folder; None if the cache cannot be written, or if another process reads the same
        videos.

    Raises:
        InputError: As in `claim`.
    """
    if folder is not None:
        claim(folder, items)
        yield folder
        return
    with contextlib.ExitStack() as stack:
        problem = ""
        try:
            folder = cache_dir() / "check" / _fingerprint(items)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / "lock"))
        except LockedError as error:
            problem = f"{error.holder} checks the same videos"
        except OSError as error:
            problem = f"{error.filename} cannot be written: {error.strerror}"
        except RuntimeError:
            problem = "there is no home directory; set JAXVID_CACHE"
        if problem:
            print(
                f"results are not stored, so an interrupted check starts over ({problem})",
                file=sys.stderr,
            )
            yield None
            return
        if any(folder.glob("part-*.json")):
            print(f"continuing the interrupted check in {folder}", file=sys.stderr)
        _remove_old(folder.parent)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


def _remove_old(parent: Path) -> None:
    """Remove the results of runs that were interrupted long ago."""
    for folder in parent.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > MAX_AGE_DAYS * 86_400:
                shutil.rmtree(folder, ignore_errors=True)


def claim(folder: Path, items: Sequence[Item]) -> None:
    """Create the folder of the results, or check that it has the results of the same videos.

    Raises:
        InputError: It has those of other videos, contains something else or cannot be written.
    """
    digest = _fingerprint(items)
    path = folder / "videos.sha256"
    try:
        if path.exists():
            if path.read_text() != digest:
                raise InputError(
                    f"--state {folder}: has the results of other videos; choose another folder"
                )
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"--state {folder}: is not an empty folder; choose another")
        write_file(path, digest.encode())
    except OSError as error:
        raise InputError(
            f"--state {folder}: cannot be used ({error.strerror}); choose another folder"
        ) from None


def _fingerprint(items: Sequence[Item]) -> str:
    """Return the SHA-256 of the JSON list of the splits, ids and files of videos."""
    sha256, separator = hashlib.sha256(), "["
    for record, split in items:
        sha256.update(separator.encode())
        sha256.update(json.dumps([split, record.id, str(record.path)]).encode())
        separator = ", "
    sha256.update(b"]")
    return sha256.hexdigest()
