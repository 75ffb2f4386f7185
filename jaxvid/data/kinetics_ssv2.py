"""Official annotation files of Kinetics and Something-Something."""

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jaxvid.data.records import (
    Listings,
    Record,
    RecordList,
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


def read_kinetics(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line number and the columns of each row of an official Kinetics list.

    Raises:
        InputError: The file cannot be read, or a line is too long or not CSV.
    """
    lines = read_lines(path, names=True)
    for number, line in enumerate(lines, 1):
        check_line(path, number, line)
    reader = csv.DictReader(lines, skipinitialspace=True, restval="")
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: is not valid CSV: {error}") from None


def read_kinetics_list(
    path: Path,
    labels: list[str] | None,
    *,
    prefix: str = "",
    missing: str = "error",
    labelled: bool = True,
) -> list[Record]:
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
    base, records = Path(prefix) if prefix else path.parent, RecordList(path, missing)
    listings, label_of = Listings(), labels and {name: i for i, name in enumerate(labels)}
    for number, row in read_kinetics(path):
        try:
            times = f"{int(row['time_start']):06d}_{int(row['time_end']):06d}"
        except ValueError:
            raise InputError(
                f"{path}:{number}: time_start and time_end are not whole seconds; correct the line"
            ) from None
        name = f"{row['youtube_id']}_{times}.mp4"
        label = row.get("label")
        classes = ("", label, label.replace(" ", "_")) if label else ("",)
        files = [os.path.join(base, split, c, name) for split in (path.stem, "") for c in classes]
        video = Path(next((file for file in files if file in listings), files[0]))
        label = find_label(path, number, label, label_of, labelled)
        records.add(number, Record(video, label, name))
    return records.finish()


def read_something_list(
    path: Path,
    labels: list[str] | None,
    *,
    prefix: str = "",
    missing: str = "error",
    labelled: bool = True,
) -> list[Record]:
    """Read an official Something-Something list: entries with `id` and `template`.

    The file of a video is `ID.webm` or `ID.mp4`, in the folder of the videos or in its subfolder
    `20bn-something-something-v2`. Error messages give the number of the entry, from 1.
    Arguments: `read_kinetics_list`.

    Raises:
        InputError: As in `read_list`, or a class is not in `labels`.
    """
    base, records = Path(prefix) if prefix else path.parent, RecordList(path, missing)
    label_of = labels and {_without_brackets(name): i for i, name in enumerate(labels)}
    listings, text = Listings(), read_text(path, names=True, max_bytes=MAX_JSON_BYTES)
    try:
        entries = json.loads(text)
        rows = [(str(entry["id"]), entry.get("template")) for entry in entries]
        rows = [(name, label and _without_brackets(label)) for name, label in rows]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path}: is not a list of entries with 'id' and 'template'") from None
    for number, (name, template) in enumerate(rows, start=1):
        try:
            name.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise InputError(f"{path}:{number}: {name!r} is not UTF-8; correct the id") from None
        folders = (base, base / "20bn-something-something-v2")
        suffixes = (".webm", ".mp4")
        files = [os.path.join(folder, name + suffix) for folder in folders for suffix in suffixes]
        video = Path(next((file for file in files if file in listings), files[0]))
        label = find_label(path, number, template, label_of, labelled)
        records.add(number, Record(video, label, name))
    return records.finish()


def _without_brackets(template: str) -> str:
    return re.sub(r"[\[\]]", "", template)
