"""Lists of video files, class folders, and the names of classes."""

import collections
import json
import os
import stat
from pathlib import Path

from jaxvid.data.official import is_kinetics, read_kinetics, read_kinetics_list, read_something_list
from jaxvid.data.records import (
    HAS_NO_LABEL,
    NO_LABEL,
    Record,
    check_records,
    note_line,
    read_lines,
    split_line,
)
from jaxvid.errors import InputError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv")
MAX_CLASSES = 1_000_000
_LABEL_HEADERS = ("label", "labels", "class", "class_id", "target")
_LABEL_FILES = ("labels.txt", "labels.json")


# ------------------------------------------------------------------ names of classes


def read_labels(folder: Path) -> tuple[list[str], str]:
    """Reads the names of a data folder's classes, in order.

    They are in `labels.txt` (a name a line), in `labels.json` (a list, or name → index as
    Something-Something has it), or else the sorted names in the columns of Kinetics' lists.

    Returns:
        The names, and the file that they come from.

    Raises:
        InputError: There is none of these, or one is malformed.
    """
    path = next((folder / name for name in _LABEL_FILES if (folder / name).is_file()), None)
    kinetics = [path for path in sorted(folder.glob("*.csv")) if is_kinetics(path)]
    if path is None and kinetics:
        names = {row.get("label") for path in kinetics for _, row in read_kinetics(path)}
        if not any(names):
            raise InputError(f"{kinetics[0]}: {HAS_NO_LABEL}")
        return sorted(filter(None, names)), ", ".join(map(str, kinetics))
    path = path or folder / _LABEL_FILES[0]
    if path.suffix == ".json":
        labels = _read_labels_json(path)
    else:
        labels = [line.strip() for line in read_lines(path)]
        while not labels[-1]:
            labels.pop()
    if "" in labels:
        raise InputError(f"{path}: class {labels.index('')} has no name; a line is empty")
    twice = [name for name, count in collections.Counter(labels).items() if count > 1]
    if twice:
        raise InputError(f"{path}: {twice[0]!r} is named twice; a class needs a name of its own")
    return labels, str(path)


def _read_labels_json(path: Path) -> list[str]:
    try:
        found = json.loads("\n".join(read_lines(path)))
        if isinstance(found, dict):
            places = {int(str(index)): str(name) for name, index in found.items()}
            found = [places[i] for i in range(len(found))]
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ValueError("neither is what it holds")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{path}: must be a list of names or map each name to its index from 0 ({error})"
        ) from None
    return found


def names_classes(folder: Path) -> bool:
    """Whether a folder has a file that names the classes."""
    return any((folder / name).is_file() for name in _LABEL_FILES)


def read_labels_or_numbers(folder: Path, count: int) -> tuple[list[str], str]:
    """The names of the classes, or their numbers where nothing names them."""
    if names_classes(folder):
        return read_labels(folder)
    return [str(i) for i in range(count)], str(folder)


# ------------------------------------------------------------------ lists of files


def find_split(folder: Path, split: str) -> Path:
    """A split's list, whether it is there or not.

    It is `SPLIT.csv`, or as Kinetics (`validate.csv`) and Something-Something (`SPLIT.json`,
    `something-something-v2-SPLIT.json`) name theirs.
    """
    names = ("val", "validate", "validation") if split == "val" else (split,)
    forms = ("{}.csv", "something-something-v2-{}.json", "{}.json")
    found = [folder / form.format(name) for form in forms for name in names]
    return next((path for path in found if path.is_file()), found[0])


def read_split(
    folder: Path, split: str, labels: list[str], prefix: str, missing: str
) -> list[Record]:
    """Reads a split's list of any kind."""
    return read_records(find_split(folder, split), labels, prefix=prefix, missing=missing)


def read_records(
    path: Path, labels: list[str] | None, *, prefix: str, missing: str, labelled: bool = True
) -> list[Record]:
    """Reads a list of any kind; `labels` None: nothing names the classes. Else as `read_list`."""
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
    """Reads a list of videos: `path label` or `path,label` a line, with or without a header.

    Args:
        path: The list.
        num_classes: Every label must lie below it; None: any may be.
        prefix: The folder that the paths are relative to; empty: the list's own.
        missing: `error`, or `keep` to leave missing files to whoever opens them.
        labelled: Whether every video must have a label; else all lines may be paths alone.

    Raises:
        InputError: The list is missing or empty, a line is malformed, its label out of range, its
            path listed before, its video missing or empty; the message names the line.
    """
    base, records, lines = Path(prefix) if prefix else path.parent, [], {}
    rows = [(number, line) for number, line in enumerate(read_lines(path), 1) if line.strip()]
    if not labelled and all(line.strip().lower().endswith(VIDEO_SUFFIXES) for _, line in rows):
        for number, line in rows:
            note_line(path, lines, line.strip(), number)
            records.append(Record(base / line.strip(), NO_LABEL, line.strip()))
        return check_records(path, records, list(lines.values()), missing)
    for number, line in rows:
        name, label = split_line(line)
        if not records and number == rows[0][0] and label.lower() in _LABEL_HEADERS:
            continue
        if not name or not _is_label(label):
            raise InputError(
                f"{path}:{number}: {line!r} is not 'path label', as in 'clips/first.mp4 0'"
            )
        if num_classes is not None and int(label) >= num_classes:
            raise InputError(
                f"{path}:{number}: label {label} is out of range: model.num_classes={num_classes} "
                f"allows 0 to {num_classes - 1}; correct the line or the config"
            )
        note_line(path, lines, name, number)
        records.append(Record(base / name, int(label), name))
    return check_records(path, records, list(lines.values()), missing)


def _is_label(text: str) -> bool:
    """Whether it is a number from 0 that a class can have."""
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_CLASSES))
    return digits and int(text) < MAX_CLASSES


# ------------------------------------------------------------------ class folders


def read_class_folders(folder: Path, splits: tuple[str, ...]) -> tuple[list[str], dict]:
    """Reads `FOLDER/SPLIT/CLASS/*.mp4`, or `FOLDER/CLASS/*.mp4` where one split is asked for.

    Returns:
        The names of the classes (those in `labels.txt` or `labels.json`, or those of the folders,
        sorted), and split → records.

    Raises:
        InputError: A folder is missing or not readable, or holds no video; a class has no name, or
            one that is not UTF-8.
    """
    roots = {split: folder / split for split in splits}
    if len(splits) == 1 and not roots[splits[0]].is_dir():
        roots = {splits[0]: folder}
    others = [folder / name for name in ("train", "val", "test") if (folder / name).is_dir()]
    trees = {root: _list_classes(root) for root in {**dict.fromkeys(roots.values())}}
    if folder not in trees:  # all splits tell the classes, whichever is asked for
        trees |= {root: _list_classes(root) for root in others if root not in trees}
    names = sorted({name for tree in trees.values() for name in tree})
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{folder}: the class folder {os.fsencode(name)!r} has a name that is not UTF-8; "
                "rename it"
            ) from None
    labels, where = read_labels(folder) if names_classes(folder) else (names, folder)
    if unknown := sorted(set(names) - set(labels)):
        raise InputError(f"{folder}: the folder {unknown[0]!r} is not a class in {where}")
    records, places = {}, {name: i for i, name in enumerate(labels)}
    for split, root in roots.items():
        records[split] = [
            Record(root / name / video, places[name], f"{name}/{video}")
            for name in sorted(trees[root])
            for video in trees[root][name]
        ]
        if not records[split]:
            raise InputError(f"{root}: no CLASS/*.mp4 in it")
    return labels, records


def _list_classes(root: Path) -> dict[str, list[str]]:
    """Class → its videos, sorted."""
    try:
        folders = sorted(path for path in os.listdir(root) if not path.startswith("."))
        return {
            name: sorted(
                file
                for file in os.listdir(root / name)
                if file.lower().endswith(VIDEO_SUFFIXES) and not file.startswith(".")
            )
            for name in folders
            if not stat.S_ISREG(os.stat(root / name).st_mode)
        }
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be read ({error.strerror}); there must be {root}/CLASS/*.mp4"
        ) from None
