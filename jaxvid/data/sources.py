"""What lists videos. A source is a sequence of records; opening them is left to the pipeline."""

import dataclasses
from pathlib import Path

from jaxvid.data.motion import make_motion
from jaxvid.errors import InputError


@dataclasses.dataclass(frozen=True)
class Record:
    """A labelled video.

    Attributes:
        path: The file.
        label: Its class.
    """

    path: Path
    label: int


@dataclasses.dataclass(frozen=True)
class VideoFolder:
    """Lists of videos and the names of their classes.

    Attributes:
        records: Split (`train`, `val`) → the records of its `.csv`.
        labels: Lines of `labels.txt`: the names of the classes, in order.
    """

    records: dict[str, list[Record]]
    labels: list[str]


def open_folder(data, num_classes: int, splits: tuple[str, ...]) -> VideoFolder:
    """Opens the data of a config, making the motion clips first where those are asked for.

    Args:
        data: The config's `data`: `source` (`motion` or `folder`) and `folder`.
        num_classes: The model's; every label must lie below it.
        splits: Which lists to read.

    Raises:
        InputError: A list or file is missing or empty, a line is malformed, a label out of range.
    """
    folder = Path(data.folder)
    if data.source == "motion":
        make_motion(folder, **data.motion)
    elif data.source != "folder":
        raise InputError(f"data.source={data.source!r}: there are 'motion' and 'folder'")
    labels = _read_lines(folder / "labels.txt")
    if len(labels) != num_classes:
        raise InputError(
            f"{folder / 'labels.txt'}: {len(labels)} names, but model.num_classes={num_classes}; "
            f"set --config.model.num_classes={len(labels)}"
        )
    records = {split: read_list(folder / f"{split}.csv", num_classes) for split in splits}
    return VideoFolder(records, labels)


def read_list(path: Path, num_classes: int) -> list[Record]:
    """Reads a list of videos: `path label` a line, paths relative to the list's folder.

    Raises:
        InputError: The list is missing or empty, a line is malformed, its label out of range, its
            video missing or empty; the message names the line.
    """
    records = []
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        name, _, label = line.rpartition(" ")
        if not name or not label.isascii() or not label.isdigit():
            raise InputError(
                f"{path}:{number}: {line!r} is not 'path label', as in 'clips/first.mp4 0'"
            )
        if int(label) >= num_classes:
            raise InputError(
                f"{path}:{number}: label {label} is out of range: model.num_classes={num_classes} "
                f"allows 0 to {num_classes - 1}; correct the line or the config"
            )
        video = path.parent / name
        if not video.is_file() or not video.stat().st_size:
            state = "is empty" if video.is_file() else "does not exist"
            raise InputError(f"{path}:{number}: {video} {state}; restore it or delete the line")
        records.append(Record(video, int(label)))
    return records


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist; a data folder holds train.csv, val.csv and labels.txt "
            "(--config.data.folder)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not any(line.strip() for line in lines):
        raise InputError(f"{path} is empty; it needs one line for each entry")
    return lines
