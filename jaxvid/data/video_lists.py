"""Lists of videos: one video per line, with its class or classes."""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxvid.data.class_names import MAX_CLASSES, check_similar_names, name_problem
from jaxvid.data.file_checks import check_list
from jaxvid.data.folder_scan import VIDEO_SUFFIXES
from jaxvid.data.label_sets import SEPARATOR, Label
from jaxvid.data.records import (
    MAX_LINE,
    NO_LABEL,
    VideoFiles,
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
# A line of the most frequent form, a path and a label. It can be divided in only one way, because
# the label has no dot, comma or quotation mark.
_PLAIN_LINE = re.compile(r"([^\s,\"][^,\"]*\.\w+)[ ,]([^\s,\".](?:[^,\".]*[^\s,\".])?)")


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
) -> VideoFiles:
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
    base = Path(prefix) if prefix else path.parent
    label_of = labels and {name: i for i, name in enumerate(labels)}
    numbers, paths, listed_labels = _read_columns(path, labelled)
    known: dict[int | str | tuple, Label] = {}  # label as in the list → classes
    for number, label in zip(numbers, listed_labels, strict=True):
        if label not in known:
            row = Row(number, "", label)
            known[label] = _find_classes(path, row, num_classes, labels, label_of, labelled)
    videos = VideoFiles(base, paths, [known[label] for label in listed_labels])
    check_list(path, videos, numbers, missing)
    return videos


def _find_classes(
    path: Path,
    row: Row,
    num_classes: int | None,
    labels: Sequence[str] | None,
    label_of: dict[str, int] | None,
    labelled: bool,
) -> Label:
    """Return the index or, in a multi-label list, the indices of the classes of a line.

    `label_of` is the index of each name in `labels`. Other arguments and errors: `read_list`.
    """
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
    return tuple(sorted(classes)) if isinstance(row.label, tuple) else classes[0]


def read_names(paths: Iterable[Path]) -> list[str]:
    """Return the sorted class names in lists; empty if the lists have indices or no labels.

    Raises:
        InputError: As in `read_rows`, or two names differ only in case, spaces or underscores.
    """
    lines = {}  # name → list and line number of its first occurrence
    for path in paths:
        numbers, _, labels = _read_columns(path, labelled=False)
        for label, number in _first_numbers(labels, numbers).items():
            row = Row(number, "", label)
            for name in row.classes if row.has_names else ():
                lines.setdefault(name, f"{path}:{number}")
    check_similar_names(lines)
    return sorted(lines)


def _first_numbers(values: Sequence[Any], numbers: Sequence[int]) -> dict[Any, int]:
    """Return value → the first of its numbers, in ascending order of the numbers."""
    first = dict(zip(reversed(values), reversed(numbers), strict=True))
    return dict(sorted(first.items(), key=lambda item: item[1]))


def _read_columns(path: Path, labelled: bool) -> tuple[Sequence[int], list[str], list]:
    """Return the fields of `read_rows` as columns: line numbers, paths and labels.

    If all lines are plain, they are read several times as fast as by `read_rows`.

    Raises:
        InputError: As in `read_rows`.
    """
    lines = read_lines(path, names=True)
    paths, texts = [], []
    for match in map(_PLAIN_LINE.fullmatch, lines):
        if match:
            paths.append(match[1])
            texts.append(match[2])
    start = int(_PLAIN_LINE.fullmatch(lines[0]) is None)  # the first line may be a header
    suffixes = {name[name.rindex(".") :] for name in paths}
    is_plain = 0 < len(paths) == len(lines) - start
    is_plain &= {suffix.lower() for suffix in suffixes} <= {*VIDEO_SUFFIXES}
    if not is_plain or max(map(len, lines)) > MAX_LINE:
        rows = [*_parse_lines(path, lines, labelled)]
        return [row.number for row in rows], [row.path for row in rows], [r.label for r in rows]
    numbers = range(start + 1, len(lines) + 1)
    # The first line, and the first one with each label, are parsed completely.
    first = _first_numbers(texts, numbers)
    numbered = {number: lines[number - 1] for number in (1, *first.values())}
    rows = [*_parse_numbered(path, [item for item in numbered.items() if item[1].strip()])]
    label_of = {text: row.label for text, row in zip(first, rows[-len(first) :], strict=True)}
    before = rows[: -len(first)]  # the first line, if it is neither plain nor a header
    return (
        range(numbers.start - len(before), numbers.stop),
        [row.path for row in before] + paths,
        [row.label for row in before] + [label_of[text] for text in texts],
    )


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
    return [*_parse_lines(path, read_lines(path, names=True), labelled)]


def _parse_lines(path: Path, lines: Sequence[str], labelled: bool) -> Iterator[Row]:
    """Yield the rows of all lines. Arguments and errors: `read_rows`."""
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for number, line in numbered:
        check_line(path, number, line)
    if not labelled and all(line.strip().lower().endswith(VIDEO_SUFFIXES) for _, line in numbered):
        return (Row(number, line.strip(), NO_LABEL) for number, line in numbered)
    return _parse_numbered(path, numbered)


def _parse_numbered(path: Path, numbered: Sequence[tuple[int, str]]) -> Iterator[Row]:
    """Yield the rows of lines with labels, given with their numbers; the first may be a header."""
    first = None  # the first row with a class
    for number, line in numbered:
        name, text = _split(line)
        is_header = text.lower() in _LABEL_HEADERS and not name.lower().endswith(VIDEO_SUFFIXES)
        if number == numbered[0][0] and is_header:
            continue
        label = _parse_label(text)
        if not name or is_header or label is None:
            raise InputError(
                f"{path}:{number}: {line!r} is not 'path label' with a class name or an index of "
                f"0 to {MAX_CLASSES - 1}, as in 'clips/first.mp4,running' or 'clips/first.mp4 0'; "
                "correct the line, and quote fields that contain commas"
            )
        row = Row(number, name, label)
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
        yield row


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
