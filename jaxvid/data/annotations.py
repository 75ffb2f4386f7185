"""Annotations: lists of video files and class folders."""

import functools
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxvid.data.class_names import LABEL_FILES, name_problem, names_classes, read_labels
from jaxvid.data.folder_scan import (
    HIDDEN,
    NOT_IN_CLASS_FOLDER,
    SUBFOLDER,
    Skipped,
    is_video,
    pick_videos,
)
from jaxvid.data.kinetics_ssv2 import is_kinetics, read_kinetics_list, read_something_list
from jaxvid.data.records import VideoFiles
from jaxvid.data.video_lists import read_list, read_names
from jaxvid.errors import InputError

SPLITS = ("train", "val", "test")


# ------------------------------------------------------------------ lists of videos


def find_lists(folder: Path) -> dict[str, Path]:
    """Return the lists of a data folder: split → list. Splits without a list are left out."""
    lists = {split: find_split(folder, split) for split in SPLITS}
    return {split: path for split, path in lists.items() if os.path.lexists(path)}


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
) -> VideoFiles:
    """Find and read the list of a split. Other arguments and errors: `read_records`."""
    return read_records(find_split(folder, split), labels, prefix=prefix, missing=missing)


def read_records(
    path: Path, labels: list[str] | None, *, prefix: str, missing: str, labelled: bool = True
) -> VideoFiles:
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
    return read_list(path, labels and len(labels), labels=labels, **options)


def read_list_labels(folder: Path, lists: Sequence[Path]) -> tuple[list[str], str]:
    """Read the class names of lists, in the order of the labels.

    They come from `labels.txt` or `labels.json` of the data folder, or from official Kinetics lists
    in it. Without these files, they are the sorted names in the lists.

    Args:
        folder: The data folder.
        lists: All lists of the data folder: the labels must not depend on the splits that are used.

    Returns:
        The names, and the files that they come from.

    Raises:
        InputError: There are no class names, or a file is malformed.
    """
    if not names_classes(folder) and (names := read_names_in_lists(lists)):
        return names, ", ".join(map(str, lists))
    return read_labels(folder)


def read_names_in_lists(lists: Sequence[Path]) -> list[str]:
    """Return the sorted class names in lists; empty if they are official lists or have indices.

    Raises:
        InputError: As in `video_lists.read_names`.
    """
    if any(path.suffix == ".json" or is_kinetics(path) for path in lists):
        return []
    return read_names(lists)


# ------------------------------------------------------------------ class folders


def read_class_folders(
    folder: Path, splits: tuple[str, ...], skipped: Skipped | None = None
) -> tuple[list[str], dict[str, VideoFiles]]:
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
    elif missing := [root for root in roots.values() if not os.path.lexists(root)]:
        raise InputError(
            f"{missing[0]} does not exist; add it, or set --config.data.val_share=0.2, which "
            "divides the videos into training and validation"
        )
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
        classes = sorted(trees[root].items())
        ids = [f"{name}/{video}" for name, videos in classes for video in videos]
        video_labels = [label_of[name] for name, videos in classes for _ in videos]
        records[split] = VideoFiles(root, ids, video_labels)
        if not records[split]:
            note = f" (skipped: {skipped})" if str(skipped) else ""
            raise InputError(f"{root}: contains no CLASS/*.mp4{note}")
    return labels, records


def has_class_folders(folder: Path) -> bool:
    """Return whether a folder contains `CLASS/*.mp4`.

    Raises:
        InputError: The folder is missing or unreadable.
    """
    return any(_list_classes(folder, Skipped()).values())


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
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} does not exist; expected {root}/CLASS/*.mp4") from None
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be read ({error.strerror}); expected {root}/CLASS/*.mp4"
        ) from None
    return classes


def _list_videos(folder: Path, skipped: Skipped) -> list[str]:
    """Return the sorted file names of the videos in a class folder."""
    files, videos = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_video(entry.name) and entry.is_file(follow_symlinks=False):  # most entries
                videos.append(entry.name)
            elif not entry.name.startswith(".") and _false_on_error(entry.is_dir):
                skipped.add(SUBFOLDER)
            else:
                files.append((entry.name, functools.partial(_false_on_error, entry.is_file)))
        return sorted(videos + pick_videos(files, skipped))


def _false_on_error(test: Callable[[], bool]) -> bool:
    """Call `is_dir` or `is_file` of a directory entry; return False if it raises an OSError."""
    try:
        return test()
    except OSError:  # e.g. links that form a loop
        return False
