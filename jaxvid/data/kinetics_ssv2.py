"""The annotation files that Kinetics and Something-Something are published with."""

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jaxvid.data.records import (
    HAS_NO_LABEL,
    NO_LABEL,
    Listings,
    Record,
    RecordList,
    check_line,
    read_lines,
    read_text,
)
from jaxvid.errors import InputError

MAX_JSON_BYTES = 2**28  # of a list

_KINETICS = {"youtube_id", "time_start", "time_end"}  # its columns, with `label` but in test lists


def is_kinetics(path: Path) -> bool:
    """Whether a list has the columns of an official Kinetics list."""
    if not os.path.isfile(path):
        return False
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            header = file.readline(1000)
        return set(next(csv.reader([header], skipinitialspace=True), ())) >= _KINETICS
    except (OSError, csv.Error):  # who reads it says why
        return False


def read_kinetics(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of an official Kinetics list by their columns, each with its line's number.

    Raises:
        InputError: The file is unusable, or a line is no row of a table.
    """
    lines = read_lines(path, names=True)
    for number, line in enumerate(lines, 1):
        check_line(path, number, line)
    reader = csv.DictReader(lines, skipinitialspace=True, restval="")
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: is no line of a table: {error}") from None


def read_kinetics_list(
    path: Path,
    labels: list[str] | None,
    *,
    prefix: str = "",
    missing: str = "error",
    labelled: bool = True,
) -> list[Record]:
    """Reads an official Kinetics list: columns `label`, `youtube_id`, `time_start`, `time_end`.

    A video is `ID_START_END.mp4`, the times in six digits, in the folder, its folder of the split,
    or in either's folder of the class, whose name may have `_` in the place of spaces.

    Args:
        path: The list.
        labels: The names of the classes.
        prefix: The folder that holds the videos; empty: the list's own.
        missing: As `read_list`.
        labelled: As `read_list`.

    Raises:
        InputError: As `read_list`, and for a class that `labels` does not name.
    """
    base, records = Path(prefix) if prefix else path.parent, RecordList(path, missing)
    listings, places = Listings(), labels and {name: i for i, name in enumerate(labels)}
    for number, row in read_kinetics(path):
        try:
            times = f"{int(row['time_start']):06d}_{int(row['time_end']):06d}"
        except ValueError:
            raise InputError(f"{path}:{number}: its times are not whole seconds") from None
        name = f"{row['youtube_id']}_{times}.mp4"
        label = row.get("label")
        classes = ("", label, label.replace(" ", "_")) if label else ("",)
        found = [os.path.join(base, split, c, name) for split in (path.stem, "") for c in classes]
        video = Path(next((video for video in found if video in listings), found[0]))
        label = _find_label(path, number, label, places, labelled)
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
    """Reads an official Something-Something list: entries with `id` and `template`.

    A video is `ID.webm` or `ID.mp4`, in the folder or its `20bn-something-something-v2`. Arguments:
    `read_kinetics_list`.

    Raises:
        InputError: As `read_list`, and for a class that `labels` does not name.
    """
    base, records = Path(prefix) if prefix else path.parent, RecordList(path, missing)
    places = labels and {_without_brackets(name): i for i, name in enumerate(labels)}
    listings, text = Listings(), read_text(path, names=True, max_bytes=MAX_JSON_BYTES)
    try:
        entries = json.loads(text)
        rows = [(str(entry["id"]), entry.get("template")) for entry in entries]
        rows = [(name, label and _without_brackets(label)) for name, label in rows]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path}: is no list of entries with 'id' and 'template'") from None
    for number, (name, template) in enumerate(rows, start=1):
        try:
            name.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise InputError(f"{path}:{number}: {name!r} is not UTF-8; correct the id") from None
        folders = (base, base / "20bn-something-something-v2")
        ends = (".webm", ".mp4")
        found = [os.path.join(place, f"{name}{end}") for place in folders for end in ends]
        video = Path(next((video for video in found if video in listings), found[0]))
        label = _find_label(path, number, template, places, labelled)
        records.add(number, Record(video, label, name))
    return records.finish()


def _without_brackets(template: str) -> str:
    return re.sub(r"[\[\]]", "", template)


def _find_label(
    path: Path, number: int, name: str | None, places: dict[str, int] | None, labelled: bool
) -> int:
    """The place of a class; `NO_LABEL` where none is named and none is needed."""
    if not labelled and (not name or places is None):
        return NO_LABEL
    if not name:
        raise InputError(f"{path}:{number}: {HAS_NO_LABEL}")
    if name not in (places or ()):
        raise InputError(f"{path}:{number}: {name!r} is not a class in labels.txt or labels.json")
    return places[name]
