"""Records of labelled videos, and helpers to read lists of them."""

import csv
import dataclasses
import difflib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxvid import remote
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.data.label_sets import Label
from jaxvid.data.protocols import VideoRecord
from jaxvid.errors import InputError
from jaxvid.files import check_regular

NO_LABEL = -1  # label of videos in lists without labels

# Limits for lists and other text files.
MAX_LIST_BYTES = 2**30
MAX_LINES = 20_000_000
MAX_LINE = 10_000  # maximum number of characters in a line
HEAD_BYTES = 2**20  # number of bytes at the start of a file that are checked for binary data

# End of an error message about a list or a line of it.
HAS_NO_LABEL = (
    "has no label, as in a test list; remove the list from the data folder or the command line, "
    "because training, evaluation and packs need labels (jaxvid.data.check does not)"
)
# End of an error message about a missing list.
NO_LIST = (
    "does not exist; a data folder has train.csv and val.csv, or only train.csv and "
    "--config.data.val_share=0.2"
)


@dataclasses.dataclass(frozen=True)
class Record:
    """A labelled video file.

    Attributes:
        path: The file.
        label: Index of its class, or `NO_LABEL`. In multi-label data, its classes.
        id: Name of the video, e.g. its path as written in the list; by default, `path`.
    """

    path: Path
    label: Label
    id: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        if not self.id:
            object.__setattr__(self, "id", str(self.path))

    def open(self) -> VideoFile:
        """Open the video.

        Raises:
            DecodeError: The file is missing, is not a video, has no frames, or exceeds a limit of
                `VideoFile`.
        """
        return VideoFile(self.path)


@dataclasses.dataclass(frozen=True)
class LostVideo:
    """A training video that was listed when the run started but is no longer listed.

    It keeps its position in the order of the videos. Opening it fails.

    Attributes:
        id: Its id in the earlier list.
        label: Index of its class; in multi-label data, its classes.
    """

    id: str
    label: Label

    @property
    def path(self) -> None:
        """None: the record has no file."""
        return None

    def open(self) -> VideoFile:
        """Raise an error, because the video is no longer listed.

        Raises:
            DecodeError: Always.
        """
        raise DecodeError(f"{self.id}: no longer in the training list; skipped")


class VideoFiles(Sequence[Record]):
    """The labelled video files of a list or folder, stored as columns.

    A `Record` is made when it is requested. For 400,000 videos, a list of `Record`s would need
    hundreds of megabytes in each process.

    Attributes:
        folder: Folder that the paths are relative to.
        ids: Names of the videos.
        labels: Their labels.
        paths: Their paths, as in lists: relative, absolute, or addresses.

    Args:
        folder: As above.
        ids: As above.
        labels: As above.
        paths: As above; None: the ids.
    """

    def __init__(
        self,
        folder: Path,
        ids: list[str],
        labels: list[Label],
        paths: list[str] | None = None,
    ):
        self.folder, self.ids, self.labels = folder, ids, labels
        self.paths = ids if paths is None else paths

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | slice) -> "Record | VideoFiles":
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        path = Path(remote.join(str(self.folder), self.paths[index]))
        return Record(path, self.labels[index], self.ids[index])

    def select(self, indices: Iterable[int]) -> "VideoFiles":
        """Return the videos with the given indices."""
        indices = [*indices]
        ids, labels = [self.ids[i] for i in indices], [self.labels[i] for i in indices]
        paths = None if self.paths is self.ids else [self.paths[i] for i in indices]
        return VideoFiles(self.folder, ids, labels, paths)

    def with_labels(self, labels: list[Label]) -> "VideoFiles":
        """Return the same videos with other labels."""
        return VideoFiles(self.folder, self.ids, labels, self.paths)


def ids_of(records: Sequence[VideoRecord]) -> Sequence[str]:
    """Return the ids of videos."""
    return records.ids if isinstance(records, VideoFiles) else [record.id for record in records]


def labels_of(records: Sequence[VideoRecord]) -> Sequence[Label]:
    """Return the labels of videos. For some kinds of records, this reads the videos."""
    if isinstance(records, VideoFiles):
        return records.labels
    return [record.label for record in records]


def files_of(records: Sequence[VideoRecord]) -> Sequence[str | Path | None]:
    """Return the files of videos, as in `VideoRecord.path`."""
    if isinstance(records, VideoFiles):
        folder = str(records.folder)
        return [remote.join(folder, path) for path in records.paths]
    return [record.path for record in records]


class Selection(Sequence[VideoRecord]):
    """Selected videos of a sequence, in any order; some items may be `LostVideo`s.

    Args:
        records: The videos.
        items: For each video of the selection, its index in `records`, or a `LostVideo`.
    """

    def __init__(self, records: Sequence[VideoRecord], items: Sequence[int | LostVideo]):
        self.records, self._items = records, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int | slice) -> "VideoRecord | Selection":
        if isinstance(index, slice):
            return Selection(self.records, self._items[index])
        item = self._items[index]
        return item if isinstance(item, LostVideo) else self.records[item]


def split_line(line: str) -> tuple[str, str]:
    """Split a line into its path, which may be quoted or contain separators, and its last field.

    The path is empty if the line has only one field.
    """
    text = line.strip()
    # Regular expressions would take cubic time on a long line of separators.
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
    """Raise an InputError if a line is longer than any plausible path and label."""
    if len(line) > MAX_LINE:
        raise InputError(
            f"{path}:{number}: the line has {len(line)} characters, the maximum is {MAX_LINE}; "
            "check for a missing quotation mark or line break"
        )


def find_label(
    path: Path, number: int, name: str | None, label_of: dict[str, int] | None, labelled: bool
) -> int:
    """Return the label of a class.

    If labels are not required, return `NO_LABEL` if the entry has no class name or there is no list
    of classes.

    Args:
        path: The list, for messages.
        number: Number of its line or entry, for messages.
        name: The class name in this line.
        label_of: Class name → label, or None if the classes have no names.
        labelled: Whether labels are required.

    Raises:
        InputError: The entry has no class name, or the class is unknown.
    """
    if not labelled and (not name or label_of is None):
        return NO_LABEL
    if not name:
        raise InputError(f"{path}:{number}: {HAS_NO_LABEL}")
    if name not in (label_of or ()):
        near = difflib.get_close_matches(name, label_of or (), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "add it or correct the line"
        raise InputError(
            f"{path}:{number}: {name!r} is not a class in labels.txt or labels.json; {hint}"
        )
    return label_of[name]


def read_lines(path: Path, *, names: bool = False, max_bytes: int = MAX_LIST_BYTES) -> list[str]:
    """Return the lines of a text file. Arguments: `read_text`.

    Raises:
        InputError: As in `read_text`, or the file has more than `MAX_LINES` lines.
    """
    text = read_text(path, names=names, max_bytes=max_bytes).removesuffix("\n")
    if text.count("\n") >= MAX_LINES:
        raise InputError(f"{path}: has more than {MAX_LINES} lines; split the list")
    # `splitlines` would also split at the line separators of Unicode, which file names may contain.
    return text.split("\n")


def read_text(path: Path, *, names: bool = False, max_bytes: int = MAX_LIST_BYTES) -> str:
    """Read a text file with any line endings, with or without a byte-order mark.

    Args:
        path: A regular file. Other kinds are refused, because reading them could block forever.
        names: Whether the file contains file names, which need not be UTF-8. Bytes that are not
            UTF-8 are then decoded as surrogates, as in Python's own file names.
        max_bytes: Largest accepted size of the file.

    Raises:
        InputError: The file is missing, not regular, unreadable, not UTF-8 text, too large or
            empty, or its first line is too long.
    """
    errors = "surrogateescape" if names else "strict"
    try:
        check_regular(path, max_bytes)
        with open(path, "rb") as file:
            _check_head(path, file.read(HEAD_BYTES))
        text = Path(path).read_text(encoding="utf-8-sig", errors=errors)
    except FileNotFoundError:
        raise InputError(f"{path} {NO_LIST}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: cannot be read: not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise InputError(f"{path} is empty; it needs at least one entry")
    return text


def _check_head(path: Path, head: bytes) -> None:
    """Raise an InputError if a file starts with binary data, UTF-16 text or an over-long line.

    JSON files may have long lines.
    """
    is_utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    # Files with only a few null characters are refused later, with a line number.
    if is_utf16 or head.count(0) > len(head) / 4:
        kind = "UTF-16 text" if is_utf16 else "not text: it contains null bytes"
        raise InputError(f"{path}: cannot be read: {kind}; save it as UTF-8")
    is_json = Path(path).suffix == ".json"
    has_line_break = b"\n" in head or b"\r" in head
    if len(head) == HEAD_BYTES and not is_json and not has_line_break:
        raise InputError(
            f"{path}: the first line has over {HEAD_BYTES} bytes; expected one entry per line"
        )
