"""Annotations: lists of video files and class folders."""

import csv
import functools
import os
import stat
from collections.abc import Callable
from pathlib import Path

from jaxvid.data.class_names import (
    LABEL_FILES,
    MAX_CLASSES,
    name_problem,
    names_classes,
    read_labels,
)
from jaxvid.data.folder_scan import (
    HIDDEN,
    NOT_IN_CLASS_FOLDER,
    SUBFOLDER,
    VIDEO_SUFFIXES,
    Skipped,
    pick_videos,
)
from jaxvid.data.kinetics_ssv2 import is_kinetics, read_kinetics_list, read_something_list
from jaxvid.data.label_sets import SEPARATOR, classes_of
from jaxvid.data.records import (
    NO_LABEL,
    Record,
    RecordList,
    check_line,
    read_lines,
    split_line,
)
from jaxvid.errors import InputError

SPLITS = ("train", "val", "test")
# Names of the label column in the header of a list.
_LABEL_HEADERS = ("label", "labels", "class", "class_id", "target")


# ------------------------------------------------------------------ lists of videos


def find_split(folder: Path, split: str) -> Path:
    """Return the path of a split's list, or the path of `SPLIT.csv` if there is no list.

    The list is the first of these that exists: `SPLIT.csv`, `something-something-v2-SPLIT.json`
    and `SPLIT.json`. The lists of `val` may also be named `validate` or `validation`.
    """
    names = ("val", "validate", "validation") if split == "val" else (split,)
    forms = ("{}.csv", "something-something-v2-{}.json", "{}.json")
    candidates = [folder / form.format(name) for form in forms for name in names]
    return next((path for path in candidates if os.path.lexists(path)), candidates[0])


def read_split(
    folder: Path, split: str, labels: list[str], prefix: str, missing: str
) -> list[Record]:
    """Find and read the list of a split. Other arguments and errors: `read_records`."""
    return read_records(find_split(folder, split), labels, prefix=prefix, missing=missing)


def read_records(
    path: Path, labels: list[str] | None, *, prefix: str, missing: str, labelled: bool = True
) -> list[Record]:
    """Read a list of Kinetics or Something-Something, or one that `read_list` reads.

    `labels` are the class names, or None if the classes have no names. For the other arguments, see
    `read_list`.

    Raises:
        InputError: As in `read_list`, or a class of an official list is not in `labels`.
    """
    options = {"prefix": prefix, "missing": missing, "labelled": labelled}
    if path.suffix == ".json":
        return read_something_list(path, labels, **options)
    if is_kinetics(path):
        return read_kinetics_list(path, labels, **options)
    return read_list(path, labels and len(labels), **options)


def read_list(
    path: Path,
    num_classes: int | None,
    *,
    prefix: str = "",
    missing: str = "error",
    labelled: bool = True,
) -> list[Record]:
    """Read a list of videos with lines `path label` or `path,label`, and optionally a header.

    In a multi-label list, a label is a list of classes, as in `3;17`; a video without classes has
    the label `;`.

    Args:
        path: The list.
        num_classes: Number of classes; labels are 0 to `num_classes` - 1. None: up to
            `MAX_CLASSES` - 1.
        prefix: Folder that the paths are relative to; empty: the list's folder.
        missing: `error` to raise an error if a file is missing or empty, or `keep` to return its
            record, which cannot be opened.
        labelled: Whether labels are required. If not, all lines may be paths without labels.

    Raises:
        InputError: The list is missing or empty, a line is malformed or repeats an earlier path, a
            label is out of range, or a video is missing or empty and `missing` is `error`. The
            message names the list and, if a line is wrong, its number.
    """
    base, records = Path(prefix) if prefix else path.parent, RecordList(path, missing)
    lines_read = enumerate(read_lines(path, names=True), 1)
    rows = [(number, line) for number, line in lines_read if line.strip()]
    if not labelled and all(line.strip().lower().endswith(VIDEO_SUFFIXES) for _, line in rows):
        for number, line in rows:
            check_line(path, number, line)
            records.add(number, Record(base / line.strip(), NO_LABEL, line.strip()))
        return records.finish()
    for number, line in rows:
        check_line(path, number, line)
        name, label = split_line(line)
        if number == rows[0][0] and label.lower() in _LABEL_HEADERS:
            continue  # the header
        classes = parse_label(label)
        if not name or classes is None:
            raise InputError(
                f"{path}:{number}: {line!r} is not 'path label' with a label of 0 to "
                f"{MAX_CLASSES - 1}, as in 'clips/first.mp4 0'; correct the line"
            )
        if num_classes is not None and max(classes_of(classes), default=0) >= num_classes:
            raise InputError(
                f"{path}:{number}: label {label} is out of range: with {num_classes} classes, "
                f"labels are 0 to {num_classes - 1}; correct the line or the class names"
            )
        records.add(number, Record(base / name, classes, name))
    return records.finish()


def read_named_list(path: Path) -> tuple[list[str], list[Record]]:
    """Read a list of videos with lines `path,class name`, and optionally a header.

    Names that contain commas are quoted as in CSV. The video files need not exist.

    Returns:
        The sorted class names, and the records, whose labels are indices of these names.

    Raises:
        InputError: The list is missing or empty, or a line is malformed or repeats a path.
    """
    rows = []
    for number, line in enumerate(read_lines(path, names=True), 1):
        check_line(path, number, line)
        fields = next(csv.reader([line], skipinitialspace=True), [])
        if not fields or (not rows and fields[-1].lower() in _LABEL_HEADERS):
            continue
        name = fields[-1].strip()
        if len(fields) != 2 or not all(fields) or not name or name_problem(name):
            raise InputError(
                f"{path}:{number}: {line!r} is not 'path,class name'; correct the line, and quote "
                "names that contain commas"
            )
        rows.append((number, fields[0], name))
    names = sorted({name for _, _, name in rows})
    records, label_of = RecordList(path, "keep"), {name: i for i, name in enumerate(names)}
    for number, file, name in rows:
        records.add(number, Record(path.parent / file, label_of[name], file))
    return names, records.finish()


def parse_label(text: str) -> int | tuple[int, ...] | None:
    """Return the class index, or the sorted indices of a list like `3;17`; None if it is invalid.

    The label `;` is an empty list.
    """
    parts = [part.strip() for part in text.split(SEPARATOR) if part.strip()]
    if not all(map(is_label, parts)) or not text:
        return None
    return tuple(sorted({*map(int, parts)})) if SEPARATOR in text else int(text)


def is_label(text: str) -> bool:
    """Return whether a text is a valid label: an integer from 0 to `MAX_CLASSES` - 1."""
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_CLASSES))
    return digits and int(text) < MAX_CLASSES


# ------------------------------------------------------------------ class folders


def read_class_folders(
    folder: Path, splits: tuple[str, ...], skipped: Skipped | None = None
) -> tuple[list[str], dict]:
    """Read the videos in `FOLDER/SPLIT/CLASS`.

    If only one split is requested and it has no folder, the videos in `FOLDER/CLASS` are read.

    Args:
        folder: The data folder.
        splits: Splits to read.
        skipped: Counter of the entries of these splits that are skipped, or None.

    Returns:
        The class names (from `labels.txt` or `labels.json`; without these files, the sorted names
        of the class folders of all splits); and split → records.

    Raises:
        InputError: The folder of a split is missing, unreadable or without videos; a class name is
            invalid or not in the file of class names; or this file is malformed.
    """
    skipped = Skipped() if skipped is None else skipped
    roots = {split: folder / split for split in splits}
    if len(splits) == 1 and not os.path.isdir(roots[splits[0]]):
        roots = {splits[0]: folder}
    split_folders = [folder / name for name in SPLITS if os.path.isdir(folder / name)]
    trees = {root: _list_classes(root, skipped) for root in roots.values()}
    if folder not in trees:  # labels must not depend on the requested splits
        not_requested = (root for root in split_folders if root not in trees)
        trees |= {root: _list_classes(root, Skipped()) for root in not_requested}
    names = sorted({name for tree in trees.values() for name in tree})
    for name in names:
        if problem := name_problem(name):
            raise InputError(
                f"{folder}: the class folder {os.fsencode(name)!r} has a name that {problem}; "
                "rename it"
            )
    labels, labels_file = read_labels(folder) if names_classes(folder) else (names, folder)
    if unknown := sorted(set(names) - set(labels)):
        raise InputError(
            f"{folder}: the folder {unknown[0]!r} is not a class in {labels_file}; add the class "
            "or rename the folder"
        )
    records, label_of = {}, {name: i for i, name in enumerate(labels)}
    for split, root in roots.items():
        records[split] = [
            Record(root / name / video, label_of[name], f"{name}/{video}")
            for name in sorted(trees[root])
            for video in trees[root][name]
        ]
        if not records[split]:
            note = f" (skipped: {skipped})" if str(skipped) else ""
            raise InputError(f"{root}: contains no CLASS/*.mp4{note}")
    return labels, records


def _list_classes(root: Path, skipped: Skipped) -> dict[str, list[str]]:
    """Return class → sorted file names of its videos. Classes are sorted too."""
    classes = {}
    try:
        for name in sorted(os.listdir(root)):
            if name.startswith("."):
                skipped.add(HIDDEN)
            elif stat.S_ISDIR(os.stat(root / name).st_mode):
                classes[name] = _list_videos(root / name, skipped)
            elif name not in LABEL_FILES:
                skipped.add(NOT_IN_CLASS_FOLDER)
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be read ({error.strerror}); expected {root}/CLASS/*.mp4"
        ) from None
    return classes


def _list_videos(folder: Path, skipped: Skipped) -> list[str]:
    """Return the sorted file names of the videos in a class folder."""
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and _false_on_error(entry.is_dir):
                skipped.add(SUBFOLDER)
            else:
                files.append((entry.name, functools.partial(_false_on_error, entry.is_file)))
        return pick_videos(files, skipped)


def _false_on_error(test: Callable[[], bool]) -> bool:
    """Call `is_dir` or `is_file` of a directory entry; return False if it raises an OSError."""
    try:
        return test()
    except OSError:  # e.g. links that form a loop
        return False
