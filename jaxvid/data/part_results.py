"""Results of videos in parts, stored in a folder, so that an interrupted program continues."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxvid.atomic import write_file
from jaxvid.data.beam import BeamRunner, run_on_workers
from jaxvid.data.records import Record
from jaxvid.errors import InputError

PART_VIDEOS = 64  # an interrupted run repeats at most one part per worker

Item = tuple[Record, str]  # a video and its split


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
    read: Callable[[Sequence[Item]], Iterator[Any]],
    read_part: Callable[[Sequence[Item]], Iterable[Any]],
    beam: BeamRunner | None,
) -> list[dict[str, Any]]:
    """Read videos part by part; do not read those of finished parts again.

    A broken video whose file has changed since is read again, with its part.

    Args:
        items: The videos.
        folder: Folder of the results. The same list of videos must be used each time.
        read: Function that yields the results of videos in order: dataclasses with the fields
            `broken` and `size`, as in `check.Finding`.
        read_part: The same, for a worker of Beam.
        beam: Runner of Beam; None: `read` is called in this process.

    Returns:
        The fields of each result, in the order of the videos.

    Raises:
        InputError: The folder cannot be written or contains the results of other videos, or the
            pipeline failed.
    """
    _claim(folder, items)
    parts = [
        ResultPart(folder / f"part-{number:06d}.json", list(items[start : start + PART_VIDEOS]))
        for number, start in enumerate(range(0, len(items), PART_VIDEOS))
    ]
    remaining = [part for part in parts if _load(part) is None]
    if len(remaining) < len(parts):
        print(f"{len(parts) - len(remaining)} of {len(parts)} parts are complete", file=sys.stderr)
    if beam is not None:
        run_on_workers(functools.partial(_read_and_store, read_part=read_part), remaining, beam)
    elif remaining:
        results = read([item for part in remaining for item in part.items])
        for part in remaining:
            _store(part, itertools.islice(results, len(part.items)))
        next(results, None)  # ends the progress bar
    rows = [_load(part) for part in parts]
    if None in rows:
        raise InputError(
            f"{folder}: not all parts were written; use a folder that all workers share and run "
            "the same command again"
        )
    return list(itertools.chain.from_iterable(rows))


def _read_and_store(part: ResultPart, read_part: Callable[[Sequence[Item]], Iterable[Any]]) -> None:
    """Read the videos of a part and write its file, on a worker of Beam."""
    _store(part, read_part(part.items))


def _store(part: ResultPart, results: Iterable[Any]) -> None:
    rows = [dataclasses.asdict(result) for result in results]
    write_file(part.path, json.dumps(rows).encode(), writer=uuid.uuid4().hex)


def _load(part: ResultPart) -> list[dict[str, Any]] | None:
    """Return the results of a part; None if there are none, or a broken file has changed."""
    try:
        rows = json.loads(part.path.read_bytes())
        for (record, _), row in zip(part.items, rows, strict=True):
            size = os.path.getsize(record.path) if os.path.isfile(record.path) else -1
            if row["id"] != record.id or (row["broken"] and size != row["size"]):
                return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return rows


def _claim(folder: Path, items: Sequence[Item]) -> None:
    """Create the folder of the results, or check that it has the results of the same videos.

    Raises:
        InputError: It has those of other videos, contains something else or cannot be written.
    """
    lines = [[split, record.id, str(record.path)] for record, split in items]
    digest = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
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
