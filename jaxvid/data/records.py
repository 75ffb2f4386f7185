"""A labelled video file, and what every kind of list of them needs."""

import concurrent.futures
import csv
import dataclasses
import io
import os
import re
import stat
from pathlib import Path

from jaxvid.data.decode import Video
from jaxvid.errors import InputError

NO_LABEL = -1  # of a video in a list without labels
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

    def open(self) -> Video:
        """Opens the video.

        Raises:
            DecodeError: The file is missing, is no video, or holds no frame.
        """
        return Video(self.path)


def split_line(line: str) -> tuple[str, str]:
    """A line's path, which may hold separators or be quoted, and its last field."""
    match = re.fullmatch(r"\s*(.*?)\s*[,\s]\s*([^,\s]+)\s*", line)
    if not match:
        return "", line.strip()
    name = match[1]
    if len(name) > 1 and name[0] == name[-1] == '"':
        name = next(csv.reader(io.StringIO(name)))[0]
    return name, match[2].strip('"')


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
    except ValueError as error:  # a null character
        return f"cannot be read ({error})"
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
