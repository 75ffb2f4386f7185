"""Lists of videos: one video per line, with its class or classes."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxvid import remote
from jaxvid.data.class_names import MAX_CLASSES, check_similar_names, name_problem
from jaxvid.data.folder_scan import VIDEO_SUFFIXES
from jaxvid.data.label_sets import SEPARATOR
from jaxvid.data.records import (
    NO_LABEL,
    Record,
    RecordList,
    check_line,
    find_label,
    read_lines,
    split_line,
)
from jaxvid.errors import InputError

# Names of the label column in the header of a list.
_LABEL_HEADERS = ("label", "labels", "class", "class_id", "class_name", "target")
# End of a path in an unquoted line. The separator follows it.
_PATH_END = re.compile(rf"(?:{'|'.join(map(re.escape, VIDEO_SUFFIXES))})(?=[\s,])", re.IGNORECASE)


class Row(NamedTuple):
    """A line of a list.

    Attributes:
        number: Line number, from 1.
        path: The video, as written in the list.
        label: Index of its class, or its class name; in a multi-label list, a tuple of them;
            `NO_LABEL` in a list without labels.
    """

    number: int
    path: str
    label: int | str | tuple[int, ...] | tuple[str, ...]

    @property
    def classes(self) -> tuple[int, ...] | tuple[str, ...]:
        """The classes of the video."""
        return self.label if isinstance(self.label, tuple) else (self.label,)

    @property
    def has_names(self) -> bool | None:
        """Whether the label has class names, not indices; None if it has no classes."""
        return isinstance(self.classes[0], str) if self.classes else None


def read_list(
    path: Path,
    num_classes: int | None,
    *,
    labels: Sequence[str] | None = None,
    prefix: str | Path = "",
    missing: str = "error",
    labelled: bool = True,
) -> list[Record]:
    """Read a list of videos, as described in `read_rows`.

    Args:
        path: The list.
        num_classes: Number of classes; indices are 0 to `num_classes` - 1. None: up to
            `MAX_CLASSES` - 1.
        labels: Names of the classes; None: the list has indices.
        prefix: Folder that the paths are relative to; empty: the list's folder.
        missing: `error` to raise an error if a file is missing or empty, or `keep` to return its
            record, which cannot be opened.
        labelled: Whether labels are required. If not, all lines may be paths without labels.

    Raises:
        InputError: As in `read_rows`; the list repeats a path; an index is out of range; a class
            name is not in `labels`; or a video is missing or empty and `missing` is `error`. The
            message names the list and, if a line is wrong, its number.
    """
    base, records = Path(prefix) if prefix else path.parent, RecordList(path, missing)
    label_of = labels and {name: i for i, name in enumerate(labels)}
    for row in read_rows(path, labelled=labelled):
        classes = row.classes
        if row.has_names:
            classes = [find_label(path, row.number, c, label_of, labelled) for c in classes]
        elif num_classes is not None and max(classes, default=0) >= num_classes:
            label, note = max(classes), ""
            if str(label) in (labels or ()):
                note = f" (a list with class names cannot contain {label}, which is an index)"
            raise InputError(
                f"{path}:{row.number}: label {label} is out of range: with {num_classes} classes, "
                f"labels are 0 to {num_classes - 1}{note}; correct the line or the class names"
            )
        label = tuple(sorted(classes)) if isinstance(row.label, tuple) else classes[0]
        records.add(row.number, Record(remote.join(base, row.path), label, row.path))
    return records.finish()


def read_names(paths: Iterable[Path]) -> list[str]:
    """Return the sorted class names in lists; empty if the lists have indices or no labels.

    Raises:
        InputError: As in `read_rows`, or two names differ only in case, spaces or underscores.
    """
    lines = {}  # name → list and line number of its first occurrence
    for path in paths:
        for row in read_rows(path, labelled=False):
            for name in row.classes if row.has_names else ():
                lines.setdefault(name, f"{path}:{row.number}")
    check_similar_names(lines)
    return sorted(lines)


def read_rows(path: Path, *, labelled: bool = True) -> list[Row]:
    """Read the lines of a list, without looking at the video files.

    A line is `path label` or `path,label`. Fields that contain commas may be quoted as in CSV. The
    label is the index of a class if it is a whole number, otherwise the name of a class, which has
    at least one letter. In a multi-label list, it is a list of them, as in `3;17`; a video without
    classes has the label `;`. All lines have either names or indices. The first line may be a
    header, whose last column is one of `_LABEL_HEADERS`.

    Args:
        path: The list.
        labelled: Whether labels are required. If not, all lines may be paths without labels.

    Raises:
        InputError: The list is missing or empty, or a line is malformed or too long or has another
            kind of label than the first.
    """
    lines_read = enumerate(read_lines(path, names=True), 1)
    lines = [(number, line) for number, line in lines_read if line.strip()]
    for number, line in lines:
        check_line(path, number, line)
    if not labelled and all(line.strip().lower().endswith(VIDEO_SUFFIXES) for _, line in lines):
        return [Row(number, line.strip(), NO_LABEL) for number, line in lines]
    rows, first = [], None  # `first`: the first row with a class
    for number, line in lines:
        name, text = _split(line)
        is_header = text.lower() in _LABEL_HEADERS and not name.lower().endswith(VIDEO_SUFFIXES)
        if number == lines[0][0] and is_header:
            continue
        label = _parse_label(text)
        if not name or is_header or label is None:
            raise InputError(
                f"{path}:{number}: {line!r} is not 'path label' with a class name or an index of "
                f"0 to {MAX_CLASSES - 1}, as in 'clips/first.mp4,running' or 'clips/first.mp4 0'; "
                "correct the line, and quote fields that contain commas"
            )
        row = Row(number, name, label)
        rows.append(row)
        first = row if first is None and row.classes else first
        if row.classes and row.has_names != first.has_names:
            kinds = [
                f"{'the class name' if row.has_names else 'the index'} {row.classes[0]!r}"
                for row in (row, first)
            ]
            raise InputError(
                f"{path}:{number}: has {kinds[0]}, but line {first.number} has {kinds[1]}; use "
                "class names in all lines, or indices in all lines"
            )
    return rows


def _split(line: str) -> tuple[str, str]:
    """Split a line into its path and its label; the path is empty if there are not two fields.

    An unquoted path ends at the last video suffix that a separator follows. If there is none, the
    label is an index after the last separator, or a class name after the only comma.
    """
    text = line.strip()
    ends = [] if '"' in text else [match.end() for match in _PATH_END.finditer(text)]
    if ends:
        label = text[ends[-1] :].strip().removeprefix(",").strip()
        return ("", text) if "," in label else (text[: ends[-1]], label)
    fields = next(csv.reader([text], skipinitialspace=True), [])
    if '"' in text and len(fields) == 2:
        return fields[0].strip(), fields[1].strip()
    name, label = split_line(line)
    if label and all(map(is_label, _split_classes(label))) or label.lower() in _LABEL_HEADERS:
        return name, label
    return (fields[0].strip(), fields[1].strip()) if len(fields) == 2 else ("", text)


def _parse_label(text: str) -> int | str | tuple[int, ...] | tuple[str, ...] | None:
    """Return the class or classes of a label; None if it is invalid."""
    classes = _split_classes(text)
    if not text or not (all(map(is_label, classes)) or all(map(_is_name, classes))):
        return None
    if all(map(is_label, classes)):
        classes = map(int, classes)
    unique = tuple(sorted({*classes}))
    return unique if SEPARATOR in text else unique[0]


def _split_classes(text: str) -> list[str]:
    return [part.strip() for part in text.split(SEPARATOR) if part.strip()]


def is_label(text: str) -> bool:
    """Return whether a text is a valid label: an integer from 0 to `MAX_CLASSES` - 1."""
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_CLASSES))
    return digits and int(text) < MAX_CLASSES


def _is_name(text: str) -> bool:
    """Return whether a text is a class name; without a letter, it is more likely a mistake."""
    is_path = text.lower().endswith(VIDEO_SUFFIXES)
    return any(map(str.isalpha, text)) and not is_path and not name_problem(text)
