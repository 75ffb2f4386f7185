"""Files of a pack besides its records: class names, and the index of the videos of a split."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxvid.errors import InputError
from jaxvid.files import check_regular

LABEL_FILE = "label.labels.txt"  # class names, as TFDS stores them
MAX_TABLE_BYTES = 2**30  # size limit of an index file
# Column → lowest and highest valid value. The upper bounds are far above what `prepare` writes, and
# low enough that sums of a column stay below 2^63.
BOUNDS = {
    "num_frames": (0, 10**6),
    "frames_per_record": (1, 10**6),
    "fps": (0, 1000),
    "has_times": (0, 1),
}


def check_label_file(path: Path, num_classes: int) -> None:
    """Check the class names of a pack. Without the file, TFDS would return label numbers as names.

    Raises:
        InputError: The file is missing or unreadable, or does not contain `num_classes` names.
    """
    try:
        names = {line.strip() for line in path.read_text(encoding="utf-8").split("\n")} - {""}
    except FileNotFoundError:
        names = None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); restore it") from None
    if names is None or len(names) != num_classes:
        problem = "does not exist"
        if names is not None:
            problem = f"contains {len(names)} class names, not {num_classes}"
        raise InputError(
            f"{path}: {problem}; write {num_classes} class names, one per line, in the order of "
            "the labels, or run prepare again"
        )


class PackedVideoInfo(NamedTuple):
    """A row of the index. The fields are the columns.

    Attributes:
        id: Id of the video.
        label: Index of its class.
        num_frames: Number of frames; 0 if the video could not be decoded when the pack was made.
        fps: Frames per second; 0: unknown.
        record: Index of its first record in the split.
        frames_per_record: Frames per record; the last record may have fewer.
        has_times: 1 if the first record contains the times of all frames; 0 if the frame rate is
            constant or unknown.
    """

    id: str
    label: int
    num_frames: int
    fps: float
    record: int
    frames_per_record: int
    has_times: int

    @property
    def num_records(self) -> int:
        """Number of records of the video; 0 if it has no frames."""
        return -(-self.num_frames // self.frames_per_record)


class PackIndex(Sequence):
    """The videos of a split: a memory-efficient sequence of `PackedVideoInfo`.

    Args:
        path: The index file.
        num_records: Number of records of the split.
        num_classes: Number of classes.

    Raises:
        InputError: The file is missing or damaged, has an older layout, lists no readable video, or
            does not match the pack.
    """

    _NUMBERS = np.dtype([(name, np.float64 if name == "fps" else np.int64)
                         for name in PackedVideoInfo._fields[1:]])  # fmt: skip

    def __init__(self, path: Path, num_records: int, num_classes: int):
        try:
            check_regular(path, MAX_TABLE_BYTES)
            # Ids are file names, which need not be UTF-8.
            with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                rows = csv.reader(file)
                header = next(rows, [])
                if header[:2] == ["id", "label"] and header != list(PackedVideoInfo._fields):
                    raise InputError(f"{path}: has an older layout; run prepare again")
                self._ids: list[str] = []
                self._numbers = np.fromiter(self._parse(rows), self._NUMBERS)
            if not self._numbers["num_frames"].any():
                raise InputError(f"{path}: lists no readable video; run prepare again")
            self._check(num_records, num_classes)
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(f"{path} does not exist; run prepare again") from None
        except (OSError, ValueError, TypeError, OverflowError, csv.Error) as error:
            raise InputError(f"{path}: is damaged ({error}); run prepare again") from None

    def _parse(self, rows: Iterable[list[str]]) -> Iterator[tuple]:
        """Yield the numbers of each row, and collect the ids."""
        for id_, label, num_frames, fps, *rest in rows:
            self._ids.append(id_)
            yield int(label), int(num_frames), float(fps), *map(int, rest)

    def _check(self, num_records: int, num_classes: int) -> None:
        """Raise a ValueError if values are out of range or do not match the records of the pack."""
        numbers = self._numbers
        lengths, sizes = numbers["num_frames"], numbers["frames_per_record"]
        for name, (low, high) in {**BOUNDS, "label": (0, num_classes - 1)}.items():
            if not ((low <= numbers[name]) & (numbers[name] <= high)).all():  # also refuses NaN
                raise ValueError(f"{name} is out of range: {low} to {high}")
        ends = np.cumsum(-(-lengths // sizes))
        if not np.array_equal(numbers["record"][1:], ends[:-1]) or numbers["record"][0]:
            raise ValueError("records are not contiguous")
        if ends[-1] != num_records:
            raise ValueError(f"it lists {ends[-1]} records, but the pack has {num_records}")

    def find_empty(self) -> list[int]:
        """Return the indices of the videos without frames."""
        return np.flatnonzero(self._numbers["num_frames"] == 0).tolist()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> PackedVideoInfo:
        return PackedVideoInfo(self._ids[index], *self._numbers[index].item())


def table_path(folder: Path, split: str) -> Path:
    """Return the path of a split's index."""
    return folder / f"{split}_index.csv"


def list_videos(videos: Iterable[tuple], frames_per_record: int) -> list[PackedVideoInfo]:
    """Return the index rows of videos `(id, label, num_frames, fps, has_times)` in this order."""
    listed, record = [], 0
    for *fields, has_times in videos:
        listed.append(PackedVideoInfo(*fields, record, frames_per_record, has_times))
        record += listed[-1].num_records
    return listed


def format_table(videos: Iterable[PackedVideoInfo]) -> str:
    """Return the text of an index file."""
    text = io.StringIO()
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    plain.writerow(PackedVideoInfo._fields)
    for video in videos:  # csv.writer does not quote a carriage return by itself
        (quoted if "\r" in video.id else plain).writerow(video)
    return text.getvalue()
