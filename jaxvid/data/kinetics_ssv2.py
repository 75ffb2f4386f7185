"""Official annotation files of Kinetics and Something-Something."""

import csv
import functools
import json
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxvid.data.file_checks import Listings, check_list
from jaxvid.data.records import (
    MAX_LINE,
    VideoFiles,
    check_line,
    find_label,
    read_lines,
    read_text,
)
from jaxvid.errors import InputError

MAX_JSON_BYTES = 2**28  # size limit of a JSON list

# Columns of all Kinetics lists. Lists other than test lists also have `label`.
_KINETICS = {"youtube_id", "time_start", "time_end"}


def is_kinetics(path: Path) -> bool:
    """Return whether a list has the columns of an official Kinetics list."""
    if not os.path.isfile(path):
        return False
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            header = file.readline(1000)
        return set(next(csv.reader([header], skipinitialspace=True), ())) >= _KINETICS
    except (OSError, csv.Error):  # read_lines reports the error later
        return False


def read_kinetics(path: Path, *columns: str) -> Iterator[tuple[int, Any]]:
    """Read columns of an official Kinetics list.

    Yields:
        For each row, the line number, from 1, and the values of the columns: a tuple, or the value
        itself if there is only one column. Values are texts. They are empty if the field is empty
        or missing, and None if there is no such column.

    Raises:
        InputError: The file cannot be read, or a line is too long or not CSV.
    """
    lines = read_lines(path, names=True)
    if max(map(len, lines)) > MAX_LINE:
        for number, line in enumerate(lines, 1):
            check_line(path, number, line)
    reader = csv.reader(lines, skipinitialspace=True)
    try:
        header = next(filter(None, reader), [])
        positions = {name: i for i, name in enumerate(header)}  # the last column of a name counts
        # The value of missing columns, None, is appended to the fields.
        select = operator.itemgetter(*(positions.get(name, -1) for name in columns))
        for fields in filter(None, reader):
            if len(fields) < len(header):
                fields += [""] * (len(header) - len(fields))
            fields.append(None)
            yield reader.line_num, select(fields)
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: is not valid CSV: {error}") from None


def read_kinetics_list(
    path: Path,
    labels: list[str] | None,
    *,
    prefix: str = "",
    missing: str = "error",
    labelled: bool = True,
) -> VideoFiles:
    """Read an official Kinetics list: columns `label`, `youtube_id`, `time_start`, `time_end`.

    The file of a video is `ID_START_END.mp4`, with times in seconds as six digits. It may be in the
    folder of the videos, or in its subfolder that is named after the list (`train` for
    `train.csv`). In both folders, it may also be in a subfolder that is named after the class, with
    spaces or `_`.

    Args:
        path: The list.
        labels: Names of the classes, or None if there are none.
        prefix: Folder of the videos; empty: the list's folder.
        missing: As in `read_list`.
        labelled: As in `read_list`.

    Raises:
        InputError: As in `read_list`, or a class is not in `labels`.
    """
    base = Path(prefix) if prefix else path.parent
    listings, label_of = Listings(), labels and {name: i for i, name in enumerate(labels)}
    numbers, names, video_labels, files, start = [], [], [], [], os.path.join(base, "")
    known: dict[str | None, int] = {}  # class name → label
    folders: dict[str | None, list[str]] = {}  # class name → folders that may contain the file
    default: dict[str | None, str] = {}  # class name → folder that errors name
    rows = read_kinetics(path, "label", "youtube_id", "time_start", "time_end")
    for number, (label, youtube_id, time_start, time_end) in rows:
        try:
            name = f"{youtube_id}_{_six_digits(time_start)}_{_six_digits(time_end)}.mp4"
        except ValueError:
            raise InputError(
                f"{path}:{number}: time_start and time_end are not whole seconds; correct the line"
            ) from None
        if label not in folders:
            classes = ("", label, label.replace(" ", "_")) if label else ("",)
            split_folders = (base / path.stem, base)
            candidates = [
                os.path.join(folder, name, "") for folder in split_folders for name in classes
            ]
            default[label] = candidates[0]
            folders[label] = [name for name in candidates if not listings.is_empty(name)]
        file = _find_file(listings, folders[label], name) or default[label] + name
        names.append(name)
        files.append(file.removeprefix(start))
        numbers.append(number)
        if label not in known:
            known[label] = find_label(path, number, label, label_of, labelled)
        video_labels.append(known[label])
    videos = VideoFiles(base, names, video_labels, files)
    check_list(path, videos, numbers, missing)
    return videos


@functools.lru_cache(10_000)
def _six_digits(seconds: str) -> str:
    """Return a whole number with at least six digits; raise a ValueError if it is not one."""
    return f"{int(seconds):06d}"


def _find_file(listings: Listings, folders: list[str], *names: str) -> str | None:
    """Return the path of the first file that exists, or None.

    Args:
        listings: Folders that were listed already.
        folders: Folders that may contain the file, each with a slash at the end.
        names: Possible names of the file.
    """
    for folder in folders:
        for name in names:
            if listings.contain(folder, name):
                return folder + name
    return None


def read_something_list(
    path: Path,
    labels: list[str] | None,
    *,
    prefix: str = "",
    missing: str = "error",
    labelled: bool = True,
) -> VideoFiles:
    """Read an official Something-Something list: entries with `id` and `template`.

    The file of a video is `ID.webm` or `ID.mp4`, in the folder of the videos or in its subfolder
    `20bn-something-something-v2`. Error messages give the number of the entry, from 1.
    Arguments: `read_kinetics_list`.

    Raises:
        InputError: As in `read_list`, or a class is not in `labels`.
    """
    base = Path(prefix) if prefix else path.parent
    label_of = labels and {_without_brackets(name): i for i, name in enumerate(labels)}
    listings, text = Listings(), read_text(path, names=True, max_bytes=MAX_JSON_BYTES)
    try:
        entries = json.loads(text)
        rows = [(str(entry["id"]), entry.get("template")) for entry in entries]
        rows = [(name, label and _without_brackets(label)) for name, label in rows]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path}: is not a list of entries with 'id' and 'template'") from None
    names, video_labels, files = [], [], []
    folders = [os.path.join(base, name, "") for name in ("", "20bn-something-something-v2")]
    for number, (name, template) in enumerate(rows, start=1):
        try:
            name.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise InputError(f"{path}:{number}: {name!r} is not UTF-8; correct the id") from None
        file_names = f"{name}.webm", f"{name}.mp4"
        file = _find_file(listings, folders, *file_names) or folders[0] + file_names[0]
        names.append(name)
        files.append(file.removeprefix(folders[0]))
        video_labels.append(find_label(path, number, template, label_of, labelled))
    videos = VideoFiles(base, names, video_labels, files)
    check_list(path, videos, range(1, len(videos) + 1), missing)
    return videos


def _without_brackets(template: str) -> str:
    return re.sub(r"[\[\]]", "", template)
