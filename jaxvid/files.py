"""Reading files that may be anything, writing files whole or not at all, and lock files."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from jaxvid.errors import InputError, one_line

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
        reason = one_line(getattr(error, "strerror", None) or error)
        raise InputError(f"{path}: cannot be read ({reason}); name a regular file") from None
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise InputError(f"{path}: is {kind}, not a regular file; name another file")
    if status.st_size > max_bytes:
        raise InputError(
            f"{path}: is larger than {max_bytes / 1e6:.0f} MB, the most that is read; name another "
            "file"
        )


def open_regular(path: Path, max_bytes: int = sys.maxsize) -> BinaryIO:
    """Open a file for reading after `check_regular`.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: As `check_regular`, or it cannot be opened.
    """
    check_regular(path, max_bytes)
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(
            f"{path}: cannot be opened ({error.strerror}); name another file"
        ) from None


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Read a regular file whole, after `check_regular`.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: As `open_regular`, or it cannot be read.
    """
    with open_regular(path, max_bytes) as file:
        try:
            return file.read(max_bytes)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); name another file"
            ) from None


def write_file(path: Path, data: bytes) -> Path:
    """Writes a file, whole or not at all, and the folders that it lies in.

    Raises:
        InputError: It cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        # Replacing /dev/null would remove the device.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError(errno.EINVAL, "not a regular file")
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


class LockedError(Exception):
    """Another process holds a lock.

    Attributes:
        holder: Its number and its machine, as far as they are known.
    """

    def __init__(self, holder: str):
        super().__init__(holder)
        self.holder = holder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock while the body runs. The system releases it if the process dies in any way.

    Args:
        path: A file that is made for the lock, names the holder, and is removed at the end.

    Yields:
        Whether the lock is held; False: the file system has no locks.

    Raises:
        LockedError: Another process holds the lock.
        OSError: The file cannot be made.
    """
    file = _lock_file(path)
    try:
        yield file is not None
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        if file is not None:
            file.close()


def _lock_file(path: Path) -> TextIO | None:
    """Open and lock a file; None: the file system has no locks."""
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed it since it was opened.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}")
                file.flush()
                return file
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise LockedError(holder) from None
        except FileNotFoundError:
            pass
        except OSError:
            file.close()
            return None
        file.close()
