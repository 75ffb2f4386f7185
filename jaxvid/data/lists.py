"""Lists of video files, class folders, and the names of classes."""

import collections
import concurrent.futures
import csv
import dataclasses
import io
import json
import os
import re
import stat
from pathlib import Path

from jaxvid.data.decode import Video
from jaxvid.errors import InputError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv")
_LABEL_HEADERS = ("label", "labels", "class", "class_id", "target")


@dataclasses.dataclass(frozen=True)
class Record:
    """A labelled video file.

    Attributes:
        path: The file.
        label: Its class.
        id: Its path as the list has it.
    """

    path: Path
    label: int
    id: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        if not self.id:
            object.__setattr__(self, "id", str(self.path))

    def open(self) -> Video:
        """Opens the video.

        Raises:
            DecodeError: The file is missing, is no video, or holds no frame.
        """
        return Video(self.path)


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
    path = folder / "labels.json"
    if path.is_file() and not (folder / "labels.txt").exists():
        return _read_labels_json(path), str(path)
    kinetics = [path for path in sorted(folder.glob("*.csv")) if is_kinetics(path)]
    if kinetics and not (folder / "labels.txt").exists():
        names = {row["label"] for path in kinetics for row in _read_kinetics(path)}
        return sorted(names), ", ".join(map(str, kinetics))
    path = folder / "labels.txt"
    labels = [line.strip() for line in read_lines(path)]
    while labels and not labels[-1]:
        labels.pop()
    twice = [name for name, count in collections.Counter(labels).items() if count > 1]
    if twice:
        raise InputError(f"{path}: {twice[0]!r} is named twice; a class needs a name of its own")
    return labels, str(path)


def _read_labels_json(path: Path) -> list[str]:
    try:
        found = json.loads("\n".join(read_lines(path)))
        if isinstance(found, dict):
            places = {int(index): str(name) for name, index in found.items()}
            found = [places[i] for i in range(len(found))]
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ValueError("neither is what it holds")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}: must be a list of names or map each name to its index from 0 ({error})"
        ) from None
    return found


def read_labels_or_numbers(folder: Path, count: int) -> tuple[list[str], str]:
    """The names of the classes, or their numbers where nothing names them."""
    if any((folder / name).is_file() for name in ("labels.txt", "labels.json")):
        return read_labels(folder)
    return [str(i) for i in range(count)], str(folder)


# ------------------------------------------------------------------ lists of files


def read_split(
    folder: Path, split: str, labels: list[str], prefix: str, missing: str
) -> list[Record]:
    """Reads a split's list, which is `SPLIT.csv` or an official one of Something-Something."""
    path = folder / f"{split}.csv"
    name = "validation" if split == "val" else split
    official = folder / f"something-something-v2-{name}.json"
    if official.is_file() and not path.exists():
        return read_something_list(official, labels, prefix=prefix, missing=missing)
    if not is_kinetics(path):
        return read_list(path, len(labels), prefix=prefix, missing=missing)
    return read_kinetics_list(path, labels, prefix=prefix, missing=missing)


def read_list(
    path: Path, num_classes: int | None, *, prefix: str = "", missing: str = "error"
) -> list[Record]:
    """Reads a list of videos: `path label` or `path,label` a line, with or without a header.

    Args:
        path: The list.
        num_classes: Every label must lie below it; None: any may be.
        prefix: The folder that the paths are relative to; empty: the list's own.
        missing: `error`, or `keep` to leave missing files to whoever opens them.

    Raises:
        InputError: The list is missing or empty, a line is malformed, its label out of range, its
            path listed before, its video missing or empty; the message names the line.
    """
    base, records, lines = Path(prefix) if prefix else path.parent, [], {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        name, label = split_line(line)
        if not records and number == 1 and label.lower() in _LABEL_HEADERS:
            continue
        if not name or not label.isascii() or not label.isdigit():
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


def split_line(line: str) -> tuple[str, str]:
    """A line's path, which may hold separators or be quoted, and its last field."""
    match = re.fullmatch(r"\s*(.*?)\s*[,\s]\s*([^,\s]+)\s*", line)
    if not match:
        return "", line.strip()
    name = match[1]
    if len(name) > 1 and name[0] == name[-1] == '"':
        name = next(csv.reader(io.StringIO(name)))[0]
    return name, match[2]


def read_kinetics_list(
    path: Path, labels: list[str], *, prefix: str = "", missing: str = "error"
) -> list[Record]:
    """Reads an official Kinetics list: columns `label`, `youtube_id`, `time_start`, `time_end`.

    A video is `ID_START_END.mp4`, the times in six digits, in the folder, its folder of the split,
    or in either's folder of the class, whose name may have `_` in the place of spaces.

    Raises:
        InputError: As `read_list`, and for a class that `labels` does not name.
    """
    base, records, lines = Path(prefix) if prefix else path.parent, [], {}
    places = {name: i for i, name in enumerate(labels)}
    for number, row in enumerate(_read_kinetics(path), start=2):
        try:
            times = f"{int(row['time_start']):06d}_{int(row['time_end']):06d}"
            label = places[row["label"]]
        except KeyError:
            raise InputError(
                f"{path}:{number}: {row['label']!r} is not a class in labels.txt"
            ) from None
        except (ValueError, TypeError):
            raise InputError(f"{path}:{number}: its times are not whole seconds") from None
        name = f"{row['youtube_id']}_{times}.mp4"
        note_line(path, lines, name, number)
        classes = ("", row["label"], row["label"].replace(" ", "_"))
        found = [base / split / c / name for split in (path.stem, "") for c in classes]
        video = next((video for video in found if os.path.exists(video)), found[0])
        records.append(Record(video, label, name))
    return check_records(path, records, list(lines.values()), missing)


def read_something_list(
    path: Path, labels: list[str], *, prefix: str = "", missing: str = "error"
) -> list[Record]:
    """Reads an official Something-Something list: entries with `id` and `template`.

    A video is `ID.webm` or `ID.mp4`, in the folder or its `20bn-something-something-v2`.

    Raises:
        InputError: As `read_list`, and for a class that `labels` does not name.
    """
    base, records, lines = Path(prefix) if prefix else path.parent, [], {}
    places = {name: i for i, name in enumerate(labels)}
    try:
        entries = json.loads("\n".join(read_lines(path)))
        rows = [(str(entry["id"]), re.sub(r"[\[\]]", "", entry["template"])) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: is no list of entries with 'id' and 'template'") from None
    for number, (name, template) in enumerate(rows, start=1):
        if template not in places:
            raise InputError(f"{path}:{number}: {template!r} is not a class in labels.json")
        note_line(path, lines, name, number)
        folders = (base, base / "20bn-something-something-v2")
        found = [place / f"{name}{end}" for place in folders for end in (".webm", ".mp4")]
        video = next((video for video in found if os.path.exists(video)), found[0])
        records.append(Record(video, places[template], name))
    return check_records(path, records, list(lines.values()), missing)


def is_kinetics(path: Path) -> bool:
    """Whether a list has the columns of an official Kinetics list."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = {field.strip() for field in file.readline().split(",")}
    return {"label", "youtube_id", "time_start", "time_end"} <= header


def _read_kinetics(path: Path) -> list[dict]:
    return list(csv.DictReader(read_lines(path)))


def note_line(path: Path, lines: dict[str, int], name: str, number: int) -> None:
    """Notes the line of a name that must not have one yet."""
    if name in lines:
        raise InputError(
            f"{path}:{number}: {name!r} is in line {lines[name]} already; delete one of the two"
        )
    lines[name] = number


def check_records(path: Path, records: list, numbers: list[int], missing: str) -> list:
    """Refuses a list without a line, and, unless they are kept, files that are not there."""
    if not records:
        raise InputError(f"{path} is empty; it needs one line for each video")
    if missing == "keep":
        return records
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # file systems over a network are slow
        states = list(pool.map(file_state, (record.path for record in records)))
    bad = [i for i, state in enumerate(states) if state]
    if bad:
        named = [f"{path}:{numbers[i]}: {records[i].path} {states[i]}" for i in bad[:5]]
        rest = f"; and {len(bad) - 5} more ({len(bad)} in all)" if len(bad) > 5 else ""
        them = "it or delete the line" if len(bad) == 1 else "them or delete the lines"
        raise InputError(f"{'; '.join(named)}{rest}; restore {them}")
    return records


def file_state(path: Path) -> str:
    """What is wrong with a file, without opening it; nothing: an empty string."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:  # a loop of links, no permission
        return f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return "is not a file"
    return "" if status.st_size else "is empty"


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, with or without a byte-order mark, ended in any system's way.

    Raises:
        InputError: It is missing, not readable, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist; a data folder holds train.csv, val.csv and labels.txt "
            "(--config.data.folder)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not text.strip():
        raise InputError(f"{path} is empty; it needs one line for each entry")
    return text.removesuffix("\n").split("\n")  # other characters that end lines may be in names


# ------------------------------------------------------------------ class folders


def read_class_folders(folder: Path, splits: tuple[str, ...]) -> tuple[list[str], dict]:
    """Reads `FOLDER/SPLIT/CLASS/*.mp4`, or `FOLDER/CLASS/*.mp4` where one split is asked for.

    Returns:
        The names of the classes (`labels.txt`'s, or those of the folders, sorted), and split →
        records.

    Raises:
        InputError: A folder is missing or not readable, or holds no video; a class has no name.
    """
    roots = {split: folder / split for split in splits}
    if len(splits) == 1 and not roots[splits[0]].is_dir():
        roots = {splits[0]: folder}
    others = [folder / name for name in ("train", "val", "test") if (folder / name).is_dir()]
    trees = {root: _list_classes(root) for root in {**dict.fromkeys(roots.values())}}
    if folder not in trees:  # all splits tell the classes, whichever is asked for
        trees |= {root: _list_classes(root) for root in others if root not in trees}
    names = sorted({name for tree in trees.values() for name in tree})
    labels = read_labels(folder)[0] if (folder / "labels.txt").exists() else names
    if unknown := sorted(set(names) - set(labels)):
        raise InputError(f"{folder}: the folder {unknown[0]!r} is not a class in labels.txt")
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
