"""Files that appear whole or not at all, and checks of files before they are read or written."""

import contextlib
import errno
import json
import os
import stat
from pathlib import Path

from jaxvid.errors import InputError


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
    return write_file(path, format_json(value))


def format_json(value) -> bytes:
    """Format a value as indented JSON in UTF-8; file names that are not UTF-8 are escaped.

    Raises:
        ValueError: A number in it is not finite.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Python has their bytes as lone surrogates, and JSON escapes for these.
    return text.encode("utf-8", "backslashreplace")


def check_output(option: str, path: Path) -> None:
    """Refuse an output file that cannot be written, before any work is done.

    Args:
        option: The command-line option that names the file.
        path: The file. An existing one is left as it is.

    Raises:
        InputError: Its folder cannot be made or written to, or it exists and is not a regular file.
    """
    probe = path.with_name(f".{path.name}.probing")  # as long a name as that of `write_file`
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # replacing /dev/null would remove the device
            raise OSError(errno.EINVAL, "not a regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{option}: {path} cannot be written ({error.strerror}); name another"
        ) from None


KINDS = {  # of what is not a regular file
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_regular(path: str | Path, max_bytes: int) -> None:
    """Refuse to read what could block for ever or fill the memory, without opening it.

    Args:
        path: The file.
        max_bytes: The largest size that is read.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: It is not a regular file, is too large, or its status cannot be read.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # a loop of links, too long a name, a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); name a regular file") from None
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")
        raise InputError(f"{path}: is {kind}; a regular file is needed")
    if status.st_size > max_bytes:
        raise InputError(
            f"{path}: has {status.st_size / 1e6:.0f} MB, at most {max_bytes / 1e6:.0f} MB are "
            "read; is it the right file?"
        )
