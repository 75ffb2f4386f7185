"""A labelled video file, and what every kind of list of them needs."""

import concurrent.futures
import csv
import dataclasses
import functools
import io
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.errors import InputError, printable
from jaxvid.files import check_regular

NO_LABEL = -1  # of a video in a list without labels
MAX_LIST_BYTES, MAX_LINES, MAX_LINE = 2**30, 20_000_000, 10_000  # of a text file
HEAD_BYTES = 2**20  # by which it is known whether a file is text
FILES_TOGETHER, CHUNK_FILES = 16_000, 1000  # that are looked for, in all threads and in one
MAX_MISSING, NAMED_MISSING = 1000, 5  # after which a list is not read on; that a message names
HAS_NO_LABEL = (
    "has no label, as in a test list; training, evaluation and packs need one, only "
    "jaxvid.data.check does not: leave the list out"
)


@dataclasses.dataclass(frozen=True)
class Record:
    """A labelled video file.

    Attributes:
        path: The file.
        label: Its class, or `NO_LABEL`.
        id: Its path as the list has it.
    """

    path: Path
    label: int
    id: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        if not self.id:
            object.__setattr__(self, "id", str(self.path))

    def open(self) -> VideoFile:
        """Opens the video.

        Raises:
            DecodeError: The file is missing, is no video, or holds no frame.
        """
        return VideoFile(self.path)


@dataclasses.dataclass(frozen=True)
class LostVideo:
    """A training video of an earlier start of a run that the list no longer has.

    It keeps its place in the order, and fails when it is opened.

    Attributes:
        id: As the list had it.
        label: Its class.
    """

    id: str
    label: int

    def open(self) -> VideoFile:
        """Fail.

        Raises:
            DecodeError: Always.
        """
        raise DecodeError(f"{self.id}: no longer in the training list; its place stays empty")


class Selection(Sequence):
    """Some videos of a sequence, in another order, and perhaps videos that it does not have.

    Args:
        records: The videos.
        places: Of each video of the selection its index in `records`, or a video.
    """

    def __init__(self, records: Sequence, places: Sequence[int | LostVideo]):
        self.records, self._places = records, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Selection(self.records, self._places[index])
        place = self._places[index]
        return place if isinstance(place, LostVideo) else self.records[place]


def split_line(line: str) -> tuple[str, str]:
    """A line's path, which may hold separators or be quoted, and its last field."""
    text = line.strip()
    # No regular expression: they take cubic time on a long line of separators.
    label = text.split(None)[-1].rpartition(",")[2] if text else ""
    before = text.removesuffix(label) if label else ""
    if not before:
        return "", text
    name = before.rstrip()
    name = name.removesuffix(",").rstrip()
    if len(name) > 1 and name[0] == name[-1] == '"':
        name = next(csv.reader(io.StringIO(name)))[0]
    return name, label.strip('"')


def check_line(path: Path, number: int, line: str) -> None:
    """Refuse a line that is longer than any path and label."""
    if len(line) > MAX_LINE:
        raise InputError(
            f"{path}:{number}: the line has {len(line)} characters, at most {MAX_LINE} are "
            "possible; is a quotation mark or a line break missing?"
        )


class RecordList:
    """Collects the videos of a list; refuses it once too many of its files are missing.

    Args:
        path: The list.
        missing: `error`, or `keep` to leave missing files to whoever opens them.
    """

    def __init__(self, path: Path, missing: str):
        self._path, self._checks = path, missing != "keep"
        self._records, self._lines = [], {}  # id → line
        self._num_checked, self._bad = 0, []  # index and state of those that are missing

    def add(self, number: int, record) -> None:
        """Add the video of line `number`.

        Raises:
            InputError: Its id is that of an earlier line, or a thousand files are missing.
        """
        if (line := self._lines.get(record.id)) is not None:
            raise InputError(
                f"{self._path}:{number}: {record.id!r} is in line {line} already; delete one of "
                "the two"
            )
        self._lines[record.id] = number
        self._records.append(record)
        if len(self._records) - self._num_checked == FILES_TOGETHER:
            self._check()

    def finish(self) -> list:
        """Return the videos.

        Raises:
            InputError: The list has no line, or names the first files that are missing.
        """
        if not self._records:
            raise InputError(f"{self._path} is empty; it needs one line for each video")
        self._check()
        if self._bad:
            self._refuse(f"{len(self._bad)} in all")
        return self._records

    def _check(self) -> None:
        """Look for the files that were not looked for yet."""
        if self._checks:
            start, self._num_checked = self._num_checked, len(self._records)
            self._bad += [(start + i, state) for i, state in find_missing(self._records[start:])]
            if len(self._bad) >= MAX_MISSING:
                self._refuse("the rest of the list was not read")

    def _refuse(self, total: str) -> None:
        numbers = list(self._lines.values())
        named = [
            f"{self._path}:{numbers[i]}: {self._records[i].path} {state}{_hint(self._records[i])}"
            for i, state in self._bad[:NAMED_MISSING]
        ]
        more = len(self._bad) - NAMED_MISSING
        rest = f"; and {more} more ({total})" if more > 0 else ""
        them = "it or delete the line" if len(self._bad) == 1 else "them or delete the lines"
        raise InputError(f"{printable('; '.join(named))}{rest}; restore {them}")


def _hint(record: Record) -> str:
    return " (write / between folders)" if "\\" in record.id else ""


def find_missing(records: Sequence) -> Iterator[tuple[int, str]]:
    """Find the files of a list that cannot be opened, without opening any.

    Yields:
        The index of each, and what is wrong with it.
    """

    def look(start: int) -> list[tuple[int, str]]:
        chunk = records[start : start + CHUNK_FILES]
        states = ((start + i, file_state(record.path)) for i, record in enumerate(chunk))
        return [(i, state) for i, state in states if state]

    # In threads: file systems over a network are slow. Some at a time: a call of its own for each
    # of a million files takes gigabytes.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for found in pool.map(look, range(0, len(records), CHUNK_FILES)):
            yield from found


class Listings:
    """Which files exist, by one listing of each folder instead of a look-up of each file."""

    def __init__(self):
        self._names = functools.cache(self._list)

    @staticmethod
    def _list(folder: str) -> frozenset[str] | None:
        try:
            return frozenset(os.listdir(folder))
        except PermissionError:  # its files may still be opened
            return None
        except (OSError, ValueError):
            return frozenset()

    def __contains__(self, path: str) -> bool:
        """Return whether a path exists; a broken link does, as far as a listing tells."""
        folder, name = os.path.split(path)
        names = self._names(folder)
        return os.path.exists(path) if names is None else name in names


def file_state(path: Path) -> str:
    """What is wrong with a file, without opening it; nothing: an empty string."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:  # a loop of links, no permission
        return f"cannot be read ({error.strerror})"
    except ValueError as error:  # a null character
        return f"cannot be read ({error})"
    if not stat.S_ISREG(status.st_mode):
        return "is not a file"
    return "" if status.st_size else "is empty"


def read_lines(path: Path, *, names: bool = False) -> list[str]:
    """The lines of a text file; arguments and errors as in `read_text`."""
    text = read_text(path, names=names)
    if text.count("\n") > MAX_LINES:
        raise InputError(f"{path}: has more than {MAX_LINES} lines; split the list")
    return text.removesuffix("\n").split("\n")  # other characters that end lines may be in names


def read_text(path: Path, *, names: bool = False, max_bytes: int = MAX_LIST_BYTES) -> str:
    """A text file, with or without a byte-order mark; lines may be ended in any system's way.

    Args:
        path: A regular file; anything else could block for ever.
        names: Whether it holds names of files, which need not be UTF-8: their bytes become
            surrogates, as everywhere in Python.
        max_bytes: The largest size that is read.

    Raises:
        InputError: It is missing, not readable, no UTF-8 text, too large, or empty.
    """
    errors = "surrogateescape" if names else "strict"
    try:
        check_regular(path, max_bytes)
        with open(path, "rb") as file:
            _check_head(path, file.read(HEAD_BYTES))
        text = Path(path).read_text(encoding="utf-8-sig", errors=errors)
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist; a data folder holds train.csv, val.csv and labels.txt "
            "(--config.data.folder)"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: cannot be read: not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise InputError(f"{path} is empty; it needs one line for each entry")
    return text


def _check_head(path: Path, head: bytes) -> None:
    """Refuse what is not UTF-8 text by its beginning."""
    utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    # A null character in one of many paths is refused with its line.
    if utf16 or head.count(0) > len(head) / 4:
        what = "UTF-16 text" if utf16 else "not text: it holds null bytes"
        raise InputError(f"{path}: cannot be read: {what}; save it as UTF-8")
    is_json = Path(path).suffix == ".json"
    if len(head) == HEAD_BYTES and not is_json and not {*b"\r\n"} & {*head}:
        raise InputError(
            f"{path}: its first line has over {HEAD_BYTES} bytes; expected one entry per line"
        )
