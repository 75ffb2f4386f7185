"""Checks of the files and ids of lists: missing files, repeated ids."""

import concurrent.futures
import functools
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxvid import remote
from jaxvid.data.protocols import VideoRecord
from jaxvid.data.records import files_of, ids_of
from jaxvid.errors import InputError, printable

CHECK_FILES = 16_000  # number of files of a list that are checked together
CHUNK_FILES = 50  # number of files that are checked in one go
MAX_MISSING = 1000  # number of missing files after which no more are checked
NAMED_MISSING = 5  # maximum number of missing files that the error message names
# Time per file above which threads are used. A look-up in the cache of the operating system takes a
# few microseconds, and threads, which share Python's lock, make it slower.
SLOW_SECONDS = 50e-6

T = TypeVar("T")


def check_list(
    path: Path, records: Sequence[VideoRecord], numbers: Sequence[int], missing: str
) -> None:
    """Check that the ids of a list are unique and that its files exist.

    Args:
        path: The list.
        records: Its videos.
        numbers: The line number of each video.
        missing: `error` to raise an error if files are missing, or `keep` to skip this check.

    Raises:
        InputError: The list is empty, an id is repeated, or files are missing. The message names
            the first missing files.
    """
    ids = ids_of(records)
    if not ids:
        raise InputError(f"{path} is empty; it needs one entry per video")
    if len({*ids}) < len(ids):
        _refuse_repeated(path, ids, numbers)
    if missing == "keep":
        return
    descriptions, count = [], 0
    for start in range(0, len(ids), CHECK_FILES):
        files = files_of(records[start : start + CHECK_FILES])
        for i, state in find_missing(files):
            count += 1
            if count <= NAMED_MISSING:
                hint = " (separate folders with /)" if "\\" in ids[start + i] else ""
                file = Path(files[i])
                descriptions.append(f"{path}:{numbers[start + i]}: {file} {state}{hint}")
        if count >= MAX_MISSING:
            break
    if count:
        is_complete = start + CHECK_FILES >= len(ids)
        note = f"{count} in total" if is_complete else "the rest of the list was not checked"
        more = f"; and {count - NAMED_MISSING} more ({note})" if count > NAMED_MISSING else ""
        remedy = (
            "restore it or delete the line" if count == 1 else "restore them or delete the lines"
        )
        raise InputError(f"{printable('; '.join(descriptions))}{more}; {remedy}")


def _refuse_repeated(path: Path, ids: Sequence[str], numbers: Sequence[int]) -> None:
    """Raise an InputError about the first repeated id."""
    lines: dict[str, int] = {}
    for id_, number in zip(ids, numbers, strict=True):
        if id_ in lines:
            unit = "entry" if path.suffix == ".json" else "line"
            raise InputError(
                f"{path}:{number}: {id_!r} is already in {unit} {lines[id_]}; delete one of the two"
            )
        lines[id_] = number


def find_missing(files: Sequence[str | Path | None]) -> Iterator[tuple[int, str]]:
    """Return the indices and the `file_state`s of files that are not usable.

    No file is opened. None is skipped.
    """
    states = map_files(lambda file: "" if file is None else file_state(file), files)
    return ((i, state) for i, state in enumerate(states) if state)


def map_files(function: Callable[[Any], T], files: Sequence[Any]) -> Iterator[T]:
    """Call a function that looks at a file on each of many files; yield the results in order."""

    def call(start: int) -> list[T]:
        return [function(file) for file in files[start : start + CHUNK_FILES]]

    starts = iter(range(0, len(files), CHUNK_FILES))
    for start in starts:
        begin = time.perf_counter()
        results = call(start)
        is_slow = time.perf_counter() - begin > SLOW_SECONDS * CHUNK_FILES
        yield from results
        if is_slow:
            break
    # Threads hide the latency of network file systems. Chunks save memory: with one task per file,
    # a million files would take gigabytes.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for results in pool.map(call, starts):
            yield from results


class Listings:
    """Test whether files exist.

    Each folder is listed once, which is faster than one look-up per file.
    """

    def __init__(self):
        self._list = functools.cache(self._list_folder)

    @staticmethod
    def _list_folder(folder: str) -> frozenset[str] | None:
        try:
            return frozenset(os.listdir(folder))
        except PermissionError:  # files in the folder may still be readable
            return None
        except (OSError, ValueError):
            return frozenset()

    def is_empty(self, folder: str) -> bool:
        """Return whether a folder is missing or has no files."""
        return self._list(folder) == frozenset()

    def contain(self, folder: str, name: str) -> bool:
        """Return whether a folder contains a file. A broken link may count as existing.

        Args:
            folder: The folder.
            name: Path of the file in it.
        """
        if os.sep in name:
            folder, name = os.path.split(os.path.join(folder, name))
        names = self._list(folder)
        return os.path.exists(os.path.join(folder, name)) if names is None else name in names


def file_state(path: str | Path) -> str:
    """Return why a file is unusable, e.g. `is empty`, or an empty string if it is usable.

    Only its metadata is read, so a file without read permission counts as usable.

    Raises:
        InputError: The store of a remote file cannot be reached or refuses access.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return file_state(path) if remote.look_up(path) else "does not exist"
    except OSError as error:  # a loop of links, no permission
        return f"cannot be read ({error.strerror})"
    except ValueError as error:  # a null character
        return f"cannot be read ({error})"
    if not stat.S_ISREG(status.st_mode):
        return "is not a file"
    return "" if status.st_size else "is empty"
