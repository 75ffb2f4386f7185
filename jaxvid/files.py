"""Reading files that may be anything, and writing files that appear whole or not at all."""

import contextlib
import json
import stat
from pathlib import Path
from typing import BinaryIO

from jaxvid.errors import InputError, one_line


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. A FIFO or a device is refused: it could block or never end.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: It is not a regular file, or cannot be opened.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path} is a folder; name a file")
        if not stat.S_ISREG(mode):
            raise InputError(
                f"{path} is not a regular file (a FIFO, a socket or a device); name a file"
            )
        return path.open("rb")
    except (FileNotFoundError, InputError):
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = one_line(getattr(error, "strerror", None) or error)
        raise InputError(f"{path} cannot be opened ({reason}); name another file") from None


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Read a regular file whole.

    Args:
        path: The file.
        max_bytes: A larger file is refused before it is read.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: It is larger, is not a regular file, or cannot be read.
    """
    with open_regular(path) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({one_line(error.strerror)}); name another file"
            ) from None
    if len(data) > max_bytes:
        raise InputError(
            f"{path} is larger than {max_bytes / 1e6:.0f} MB, the most that is read; "
            "name another file"
        )
    return data


def write_file(path: Path, data: bytes) -> Path:
    """Writes a file, whole or not at all, and the folders that it lies in.

    Raises:
        InputError: It cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(
            f"{path} cannot be written ({error.strerror}); name another or make room"
        ) from None
    return path


def write_json(path: Path, value) -> Path:
    """Writes JSON that people can read. Names of files that are not UTF-8 come back as they were.

    Raises:
        InputError: It cannot be written.
        ValueError: A number in it is not finite.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Python has their bytes as lone surrogates, and JSON escapes for these.
    return write_file(path, text.encode("utf-8", "backslashreplace"))
