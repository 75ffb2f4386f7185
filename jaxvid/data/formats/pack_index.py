"""The table of a pack: what is known of its videos without reading any of its records."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxvid.errors import InputError
from jaxvid.files import check_regular

MAX_TABLE_BYTES = 2**30
# Far above what `prepare` writes. Sums of the columns stay far below 2^63.
BOUNDS = {  # column → lowest and highest value, and what another one is
    "num_frames": (0, 10**6, "a number of frames that is none"),
    "frames_per_record": (1, 10**6, "a number of frames that is none"),
    "fps": (0, 1000, "a frame rate that is none"),
    "has_times": (0, 1, "has_times is neither 0 nor 1"),
}


class PackedVideoInfo(NamedTuple):
    """A video's line in the table; the columns are called as these fields.

    Attributes:
        id: Its id.
        label: Its class.
        num_frames: Number of frames; 0: it could not be decoded when the pack was made.
        fps: Frames a second; 0: unknown.
        record: Its first record.
        frames_per_record: Frames of each of its records; the last one may have fewer.
        has_times: 1: the first record tells when each frame is shown; 0: the rate is constant.
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
        """How many records it has."""
        return -(-self.num_frames // self.frames_per_record)


class PackIndex(Sequence):
    """The videos of a split, in order: a sequence of `Listed`, packed tightly.

    Args:
        path: The file.
        num_records: How many records the split has.
        num_classes: How many classes.

    Raises:
        InputError: The file is missing, damaged, of an older layout, or not that of the split.
    """

    _NUMBERS = np.dtype([(name, np.float64 if name == "fps" else np.int64)
                         for name in PackedVideoInfo._fields[1:]])  # fmt: skip

    def __init__(self, path: Path, num_records: int, num_classes: int):
        try:
            check_regular(path, MAX_TABLE_BYTES)
            # Ids are names of files, which need not be UTF-8.
            with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                rows = csv.reader(file)
                header = next(rows, [])
                if header[:2] == ["id", "label"] and header != list(PackedVideoInfo._fields):
                    raise InputError(f"{path}: is of an older layout; run prepare again")
                self._ids, numbers = [], []
                for id_, label, num_frames, fps, *rest in rows:
                    self._ids.append(id_)
                    numbers.append((int(label), int(num_frames), float(fps), *map(int, rest)))
            self._numbers = np.array(numbers, self._NUMBERS)
            if not self._numbers["num_frames"].any():
                raise InputError(f"{path}: no video in it: none of the split could be read")
            self._check(num_records, num_classes)
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(f"{path} does not exist; run prepare again") from None
        except (OSError, ValueError, TypeError, OverflowError, csv.Error) as error:
            raise InputError(f"{path}: is damaged ({error}); run prepare again") from None

    def _check(self, num_records: int, num_classes: int) -> None:
        numbers = self._numbers
        lengths, sizes = numbers["num_frames"], numbers["frames_per_record"]
        label = (0, num_classes - 1, f"a label outside 0 to {num_classes - 1}")
        for name, (low, high, problem) in {**BOUNDS, "label": label}.items():
            if not ((low <= numbers[name]) & (numbers[name] <= high)).all():  # nan: not either
                raise ValueError(problem)
        ends = np.cumsum(-(-lengths // sizes))
        if not np.array_equal(numbers["record"][1:], ends[:-1]) or numbers["record"][0]:
            raise ValueError("records that do not follow each other")
        if ends[-1] != num_records:
            raise ValueError(f"it lists {ends[-1]} records, the pack holds {num_records}")

    def find_empty(self) -> list[int]:
        """Return the indices of the videos without frames."""
        return np.flatnonzero(self._numbers["num_frames"] == 0).tolist()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> PackedVideoInfo:
        return PackedVideoInfo(self._ids[index], *self._numbers[index].item())


def table_path(folder: Path, split: str) -> Path:
    """Where a split's table lies."""
    return folder / f"{split}_index.csv"


def list_videos(videos: Iterable[tuple], frames_per_record: int) -> list[PackedVideoInfo]:
    """The lines of consecutive videos, of each `(id, label, num_frames, fps, has_times)`."""
    listed, record = [], 0
    for *known, has_times in videos:
        listed.append(PackedVideoInfo(*known, record, frames_per_record, has_times))
        record += listed[-1].num_records
    return listed


def format_table(videos: Iterable[PackedVideoInfo]) -> str:
    """The text of a table."""
    text = io.StringIO()
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    plain.writerow(PackedVideoInfo._fields)
    for video in videos:  # csv.writer does not quote a carriage return by itself
        (quoted if "\r" in video.id else plain).writerow(video)
    return text.getvalue()
