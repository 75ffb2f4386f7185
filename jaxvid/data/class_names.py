"""Class names: files that users pass, files of data folders, and the names of public data sets."""

import collections
import functools
import importlib.resources
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxvid.data.kinetics_ssv2 import is_kinetics, read_kinetics
from jaxvid.data.records import HAS_NO_LABEL, read_lines, read_text
from jaxvid.errors import InputError, check_option, printable, short_repr

MAX_CLASSES = 1_000_000
MAX_CLASS_NAME = 1000  # characters in a class name
MAX_NAMES_BYTES = 32 * 10**6  # size limit of a file of class names
LABEL_FILES = ("labels.txt", "labels.json")  # files of class names in a data folder
# Public data sets whose class names are in `labels/NAME.txt`, in index order → title.
PUBLIC_DATASETS = {
    "kinetics400": "Kinetics-400",
    "kinetics600": "Kinetics-600",
    "something_something_v2": "Something-Something v2",
}


@functools.cache
def class_names(dataset: str) -> tuple[str, ...]:
    """Return the class names of a public data set, in index order.

    Args:
        dataset: A key of `PUBLIC_DATASETS`.

    Raises:
        InputError: There is no such data set.
    """
    check_option("dataset", dataset, PUBLIC_DATASETS)
    file = importlib.resources.files("jaxvid.data") / "labels" / f"{dataset}.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines())


# ------------------------------------------------------------------ files of class names


def read_class_names(path: Path, num_classes: int | None = None) -> list[str]:
    """Read a file of class names, in the order of the class indices.

    The format is that of one of these files:

    - a text file with one name per line;
    - `.json`: a list of names, or an object that maps each name to its index (as the official
      labels of Something-Something) or each index to its name;
    - `.csv`: an official Kinetics list. Its distinct class names are sorted by their bytes.

    Args:
        path: The file.
        num_classes: Expected number of names, or None if it is not known.

    Raises:
        InputError: The file is missing, malformed, not UTF-8 or too large; or names are missing,
            invalid, not unique, or not `num_classes`.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist; choose a file of class names")
    if path.suffix == ".csv":
        names = _read_kinetics_names([path])
    elif path.suffix == ".json":
        names = _read_json_names(path)
    else:
        names = [line.strip() for line in read_lines(path, max_bytes=MAX_NAMES_BYTES)]
        while not names[-1]:
            names.pop()
    _check_names(names, path)
    if num_classes is not None and len(names) != num_classes:
        raise InputError(
            f"{path}: {len(names)} names for {num_classes} classes; write one per class"
        )
    return names


def _check_names(names: list[str], path: Path) -> None:
    """Refuse names that are empty, too long, unprintable or not unique, and too many names."""
    if "" in names:
        raise InputError(
            f"{path}: class {names.index('')} has no name; add the name or remove the empty entry"
        )
    if len(names) > MAX_CLASSES:
        raise InputError(f"{path}: names {len(names)} classes; the maximum is {MAX_CLASSES}")
    for i, name in enumerate(names):
        if problem := name_problem(name):
            raise InputError(f"{path}: the name of class {i} {problem}; correct it")
    duplicates = [name for name, count in collections.Counter(names).items() if count > 1]
    if duplicates:
        raise InputError(
            f"{path}: {duplicates[0]!r} occurs more than once; class names must be unique"
        )


def name_problem(name: str) -> str:
    """Return why a class name is invalid, or an empty string if it is valid.

    Names are written to text files with one name per line, to JSON and to HTML, in UTF-8.
    """
    if len(name) > MAX_CLASS_NAME:
        return f"has {len(name)} characters (the maximum is {MAX_CLASS_NAME})"
    if any("\ud800" <= c <= "\udfff" for c in name):
        return "is not UTF-8"
    return "" if printable(name) == name else "contains a line break or a control character"


def plain_name(name: str) -> str:
    """Return a class name in lower case, with underscores replaced by spaces."""
    return name.replace("_", " ").strip().casefold()


def check_similar_names(locations: Mapping[str, str]) -> None:
    """Refuse class names of which two differ only in case, underscores or outer spaces.

    Args:
        locations: Name → where it first occurs, for the message.

    Raises:
        InputError: Names both names and their locations.
    """
    names = {}
    for name in locations:
        first = names.setdefault(plain_name(name), name)
        if first != name:
            raise InputError(
                f"{locations[name]}: the class {name!r} and the class {first!r} "
                f"({locations[first]}) differ only in case or underscores; use one spelling"
            )


def _read_kinetics_names(paths: Sequence[Path]) -> list[str]:
    """Return the sorted class names of official Kinetics lists.

    Raises:
        InputError: A file is not such a list, or there are no labels.
    """
    for path in paths:
        if os.path.isfile(path) and not is_kinetics(path):
            raise InputError(
                f"{path}: expected the columns label, youtube_id, time_start and time_end of an "
                "official Kinetics list; write one name per line to a .txt file"
            )
    names = {name for path in paths for _, name in read_kinetics(path, "label")}
    if not any(names):
        raise InputError(f"{paths[0]}: {HAS_NO_LABEL}")
    return sorted(filter(None, names))


def _read_json_names(path: Path) -> list[str]:
    """Return the names of a JSON list or object, in the order of their indices."""
    text = read_text(path, max_bytes=MAX_NAMES_BYTES)
    try:
        names = json.loads(text, object_pairs_hook=_unique)
        if isinstance(names, dict):
            names = _order_by_index(names)
        if not isinstance(names, list):
            raise ValueError(f"got {short_repr(names)}")
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise ValueError(f"{short_repr(wrong[0])} is not a name")
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: must be a list of names or map each name to its index from 0, or each index "
            f"to its name ({printable(error)})"
        ) from None
    return names


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; refuse a key that occurs twice, which `json` accepts."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = collections.Counter(key for key, _ in pairs)
        raise ValueError(f"{short_repr(keys.most_common(1)[0][0])} occurs more than once")
    return values


def _order_by_index(mapping: dict[str, Any]) -> list[str]:
    """Return the names of `{name: index}` or `{index: name}`, in the order of the indices.

    Raises:
        ValueError: Neither or both of keys and values are indices; or the indices have gaps.
    """
    keys, values = list(mapping), list(mapping.values())
    key_numbers, value_numbers = _as_indices(keys), _as_indices(values)
    if key_numbers is not None and value_numbers is not None and key_numbers != value_numbers:
        raise ValueError("keys and values are both numbers; write a list of names")
    if value_numbers is None and key_numbers is None:
        raise ValueError("neither the keys nor the values are indices")
    indices, names = (value_numbers, keys) if value_numbers is not None else (key_numbers, values)
    by_index = dict(zip(indices, names, strict=True))
    if missing := [i for i in range(len(names)) if i not in by_index]:
        raise ValueError(f"the indices are not 0 to {len(names) - 1}: no class has {missing[0]}")
    return [by_index[i] for i in range(len(names))]


def _as_indices(values: Sequence[Any]) -> list[int] | None:
    """Return integers, or integers as decimal text, as a list; None if a value is neither."""
    texts = [str(value) for value in values if isinstance(value, str | int)]
    if len(texts) < len(values) or not all(re.fullmatch(r"[0-9]{1,9}", text) for text in texts):
        return None
    return [int(text) for text in texts]


# ------------------------------------------------------------------ data folders


def read_labels(folder: Path) -> tuple[list[str], str]:
    """Read the class names of a data folder, in the order of the labels.

    They come from the first of these that exists: `labels.txt`, `labels.json` (both as in
    `read_class_names`), and the label columns of the official Kinetics lists.

    Returns:
        The names, and the file or files that they come from.

    Raises:
        InputError: None of these files exists, the file is malformed, or the Kinetics lists have no
            labels.
    """
    path = next((folder / name for name in LABEL_FILES if os.path.lexists(folder / name)), None)
    if path is not None:
        return read_class_names(path), str(path)
    kinetics = [file for file in sorted(folder.glob("*.csv")) if is_kinetics(file)]
    if not kinetics:
        raise InputError(
            f"{folder / LABEL_FILES[0]} does not exist; write one class name per line, or write "
            "class names instead of indices in the lists"
        )
    names = _read_kinetics_names(kinetics)
    _check_names(names, kinetics[0])
    return names, ", ".join(map(str, kinetics))


def names_classes(folder: Path) -> bool:
    """Return whether a folder contains `labels.txt` or `labels.json`, readable or not."""
    return any(os.path.lexists(folder / name) for name in LABEL_FILES)


def read_labels_or_numbers(folder: Path, count: int) -> tuple[list[str], str]:
    """Return the class names of a data folder, or the label numbers if it has no file of names.

    Args:
        folder: The data folder.
        count: Number of classes.

    Returns:
        The names or numbers; and the file of class names, or the folder if it has no such file.

    Raises:
        InputError: The file of class names is malformed, or is missing from a folder that
            `prepare` wrote.
    """
    if names_classes(folder):
        return read_labels(folder)
    if os.path.lexists(folder / "report.json"):  # prepare wrote labels.txt too
        raise InputError(
            f"{folder}/labels.txt does not exist; write one class name per line, or run prepare "
            "again"
        )
    return [str(i) for i in range(count)], str(folder)
