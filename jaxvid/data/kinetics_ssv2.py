"""Official annotation files of Kinetics and Something-Something."""

import csv
import json
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxvid.data.file_checks import Listings, check_list
from jaxvid.data.records import (
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


class KineticsRow(NamedTuple):
    """A row of an official Kinetics list.

    Attributes:
        number: Line number, from 1.
        label: Name of the class; empty if the field is empty, None if there is no such column.
        youtube_id: Id of the source video.
        time_start: Start of the clip in the source video, in seconds.
        time_end: End of the clip in the source video, in seconds.
    """

    number: int
    label: str | None
    youtube_id: str
    time_start: str
    time_end: str


def read_kinetics(path: Path) -> Iterator[KineticsRow]:
    """Yield the rows of an official Kinetics list. Missing fields are empty.

    Raises:
        InputError: The file cannot be read, or a line is too long or not CSV.
    """
    lines = read_lines(path, names=True)
    for number, line in enumerate(lines, 1):
        check_line(path, number, line)
    reader = csv.reader(lines, skipinitialspace=True)
    try:
        header = next(filter(None, reader), [])
        # The last column of a name counts.
        columns = {name: i for i, name in enumerate(header)}
        # The value of missing columns, None, is appended to the fields.
        select = operator.itemgetter(*(columns.get(name, -1) for name in KineticsRow._fields[1:]))
        for fields in filter(None, reader):
            fields += [""] * (len(header) - len(fields)) + [None]
            yield KineticsRow(reader.line_num, *select(fields))
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
    for row in read_kinetics(path):
        try:
            times = f"{int(row.time_start):06d}_{int(row.time_end):06d}"
        except ValueError:
            raise InputError(
                f"{path}:{row.number}: time_start and time_end are not whole seconds; correct the "
                "line"
            ) from None
        if row.label not in folders:
            classes = ("", row.label, row.label.replace(" ", "_")) if row.label else ("",)
            split_folders = (base / path.stem, base)
            first, *others = (
                os.path.join(folder, name, "") for folder in split_folders for name in classes
            )
            # Errors name the first folder, so it is kept if it does not exist.
            folders[row.label] = [first, *(name for name in others if not listings.is_empty(name))]
        name = f"{row.youtube_id}_{times}.mp4"
        file = _find_file(listings, folders[row.label], name)
        names.append(name)
        files.append(file.removeprefix(start))
        numbers.append(row.number)
        if row.label not in known:
            known[row.label] = find_label(path, row.number, row.label, label_of, labelled)
        video_labels.append(known[row.label])
    videos = VideoFiles(base, names, video_labels, files)
    check_list(path, videos, numbers, missing)
    return videos


def _find_file(listings: Listings, folders: list[str], *names: str) -> str:
    """Return the path of the first file that exists.

    Args:
        listings: Folders that were listed already.
        folders: Folders that may contain the file, each with a slash at the end.
        names: Possible names of the file. If none exists, the first one is returned, in the
            first folder.
    """
    for folder in folders:
        for name in names:
            if listings.contain(folder, name):
                return folder + name
    return folders[0] + names[0]


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
        file = _find_file(listings, folders, f"{name}.webm", f"{name}.mp4")
        names.append(name)
        files.append(file.removeprefix(folders[0]))
        video_labels.append(find_label(path, number, template, label_of, labelled))
    videos = VideoFiles(base, names, video_labels, files)
    check_list(path, videos, range(1, len(videos) + 1), missing)
    return videos


def _without_brackets(template: str) -> str:
    return re.sub(r"[\[\]]", "", template)
