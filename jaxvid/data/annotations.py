"""Lists of video files, class folders, and the names of classes."""

import collections
import functools
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

from jaxvid.data.folder_scan import BESIDE, HIDDEN, SUBFOLDER, VIDEO_SUFFIXES, Skipped, pick_videos
from jaxvid.data.kinetics_ssv2 import (
    MAX_JSON_BYTES,
    is_kinetics,
    read_kinetics,
    read_kinetics_list,
    read_something_list,
)
from jaxvid.data.records import (
    HAS_NO_LABEL,
    NO_LABEL,
    Record,
    RecordList,
    check_line,
    read_lines,
    read_text,
    split_line,
)
from jaxvid.errors import InputError, printable

MAX_CLASSES = 1_000_000
SPLITS = ("train", "val", "test")
MAX_CLASS_NAME = 1000  # characters
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
    path = next((folder / name for name in _LABEL_FILES if os.path.lexists(folder / name)), None)
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
    if len(labels) > MAX_CLASSES:
        raise InputError(f"{path}: names {len(labels)} classes; at most {MAX_CLASSES} are possible")
    for i, name in enumerate(labels):
        if problem := name_problem(name):
            raise InputError(f"{path}: the name of class {i} {problem}; correct it")
    twice = [name for name, count in collections.Counter(labels).items() if count > 1]
    if twice:
        raise InputError(f"{path}: {twice[0]!r} is named twice; a class needs a name of its own")
    return labels, str(path)


def _read_labels_json(path: Path) -> list[str]:
    text = read_text(path, max_bytes=MAX_JSON_BYTES)
    try:
        found = json.loads(text)
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


def name_problem(name: str) -> str:
    """What makes a class's name unusable; empty: nothing does.

    Names are written to text files of a line each, to JSON and to pages in UTF-8.
    """
    if len(name) > MAX_CLASS_NAME:
        return f"has {len(name)} characters; at most {MAX_CLASS_NAME} are possible"
    if any("\ud800" <= c <= "\udfff" for c in name):
        return "is not UTF-8"
    return "" if printable(name) == name else "holds a line break or a control character"


def names_classes(folder: Path) -> bool:
    """Whether a folder has a file that names the classes, readable or not."""
    return any(os.path.lexists(folder / name) for name in _LABEL_FILES)


def read_labels_or_numbers(folder: Path, count: int) -> tuple[list[str], str]:
    """The names of the classes, or their numbers where nothing names them.

    Raises:
        InputError: The file of names is malformed, or was there and is missing.
    """
    if names_classes(folder):
        return read_labels(folder)
    if os.path.lexists(folder / "report.json"):  # of jaxvid.data.prepare, which names the classes
        raise InputError(
            f"{folder}/labels.txt does not exist; write one class name per line, or run prepare "
            "again"
        )
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
    return next((path for path in found if os.path.lexists(path)), found[0])


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
            continue
        if not name or not is_label(label):
            raise InputError(
                f"{path}:{number}: {line!r} is not 'path label', as in 'clips/first.mp4 0'"
            )
        if num_classes is not None and int(label) >= num_classes:
            raise InputError(
                f"{path}:{number}: label {label} is out of range: model.num_classes={num_classes} "
                f"allows 0 to {num_classes - 1}; correct the line or the config"
            )
        records.add(number, Record(base / name, int(label), name))
    return records.finish()


def is_label(text: str) -> bool:
    """Whether it is a number from 0 that a class can have."""
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_CLASSES))
    return digits and int(text) < MAX_CLASSES


# ------------------------------------------------------------------ class folders


def read_class_folders(
    folder: Path, splits: tuple[str, ...], skipped: Skipped | None = None
) -> tuple[list[str], dict]:
    """Reads `FOLDER/SPLIT/CLASS/*.mp4`, or `FOLDER/CLASS/*.mp4` where one split is asked for.

    Args:
        folder: The folder.
        splits: Which splits to read.
        skipped: Counts what is in the folders of these splits and is not listed.

    Returns:
        The names of the classes (those in `labels.txt` or `labels.json`, or those of the folders,
        sorted), and split → records.

    Raises:
        InputError: A folder is missing or not readable, or holds no video; a class has no name, or
            one that is not UTF-8 or holds a line break.
    """
    skipped = Skipped() if skipped is None else skipped
    roots = {split: folder / split for split in splits}
    if len(splits) == 1 and not os.path.isdir(roots[splits[0]]):
        roots = {splits[0]: folder}
    others = [folder / name for name in SPLITS if os.path.isdir(folder / name)]
    trees = {root: _list_classes(root, skipped) for root in {**dict.fromkeys(roots.values())}}
    if folder not in trees:  # all splits tell the classes, whichever is asked for
        rest = (root for root in others if root not in trees)
        trees |= {root: _list_classes(root, Skipped()) for root in rest}
    names = sorted({name for tree in trees.values() for name in tree})
    for name in names:
        if problem := name_problem(name):
            raise InputError(
                f"{folder}: the class folder {os.fsencode(name)!r} has a name that {problem}; "
                "rename it"
            )
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
            left_out = f" (skipped: {skipped})" if str(skipped) else ""
            raise InputError(f"{root}: no CLASS/*.mp4 in it{left_out}")
    return labels, records


def _list_classes(root: Path, skipped: Skipped) -> dict[str, list[str]]:
    """Class → its videos, sorted."""
    classes = {}
    try:
        for name in sorted(os.listdir(root)):
            if name.startswith("."):
                skipped.add(HIDDEN)
            elif stat.S_ISDIR(os.stat(root / name).st_mode):
                classes[name] = _list_class(root / name, skipped)
            elif name not in _LABEL_FILES:
                skipped.add(BESIDE)
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be read ({error.strerror}); there must be {root}/CLASS/*.mp4"
        ) from None
    return classes


def _list_class(folder: Path, skipped: Skipped) -> list[str]:
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and _holds(entry.is_dir):
                skipped.add(SUBFOLDER)
            else:
                files.append((entry.name, functools.partial(_holds, entry.is_file)))
        return pick_videos(files, skipped)


def _holds(is_kind: Callable[[], bool]) -> bool:
    try:
        return is_kind()
    except OSError:  # a loop of links
        return False
