"""Checked reading of untrusted files, sizes and checksums of folders, free space, the cache."""

import os
import shutil
import stat
import sys
import zlib
from pathlib import Path
from typing import BinaryIO

from jaxvid.errors import InputError, one_line

KINDS = {  # names of the file types other than regular files, for messages
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def cache_dir() -> Path:
    """Return the cache folder: `$JAXVID_CACHE`, or `jaxvid` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        RuntimeError: There is no home directory.
    """
    if folder := os.environ.get("JAXVID_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxvid"


def check_regular(path: str | Path, max_bytes: int) -> None:
    """Refuse a file that could block forever or exhaust the memory, without opening it.

    Args:
        path: The file.
        max_bytes: Maximum size.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: The file is not regular or is too large, or its status cannot be read.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # e.g. a loop of links, a long name, a null character
        reason = one_line(getattr(error, "strerror", None) or error)
        raise InputError(f"{path}: cannot be read ({reason}); choose a regular file") from None
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise InputError(f"{path}: is {kind}, not a regular file; choose another file")
    if status.st_size > max_bytes:
        raise InputError(
            f"{path}: is larger than the limit of {max_bytes / 1e6:.0f} MB; choose another file"
        )


def open_regular(path: Path, max_bytes: int = sys.maxsize) -> BinaryIO:
    """Open a file for reading after `check_regular`.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: As in `check_regular`, or the file cannot be opened.
    """
    check_regular(path, max_bytes)
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(
            f"{path}: cannot be opened ({error.strerror}); choose another file"
        ) from None


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Read a regular file after `check_regular`.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: As in `open_regular`, or the file cannot be read.
    """
    with open_regular(path, max_bytes) as file:
        try:
            return file.read(max_bytes)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); choose another file"
            ) from None


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def scan_sizes(folder: Path, *, max_files: int) -> dict[str, int]:
    """Return the size in bytes of every file below an untrusted folder.

    Links to files are followed, because download caches use them. Links to folders are not.

    Raises:
        InputError: There are more than `max_files` files and folders; or one of them is neither a
            regular file nor a folder, or cannot be read.
    """
    sizes, count = {}, 0
    remaining = [folder] if folder.is_dir() else []
    try:
        while remaining:
            with os.scandir(remaining.pop()) as entries:
                for entry in entries:
                    count += 1
                    path = Path(entry)
                    if count > max_files:
                        raise InputError(f"{folder} has more than {max_files} files; copy it again")
                    if entry.is_dir(follow_symlinks=False):
                        remaining.append(path)
                        continue
                    status = entry.stat()
                    if not stat.S_ISREG(status.st_mode):
                        raise InputError(f"{path} is not a regular file; copy the folder again")
                    sizes[str(path.relative_to(folder))] = status.st_size
    except OSError as error:
        name = error.filename if error.filename is not None else folder
        raise InputError(
            f"{name} cannot be read ({one_line(error.strerror)}); copy the folder again"
        ) from None
    return sizes


def checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of every file below a folder."""
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        checksum = 0
        with path.open("rb") as file:
            while block := file.read(2**24):
                checksum = zlib.crc32(block, checksum)
        sums[str(path.relative_to(folder))] = checksum
    return sums


def check_files(
    folder: Path, expected: dict[str, int], actual: dict[str, int], problem: str
) -> None:
    """Refuse a folder with files that have changed since they were written.

    Args:
        folder: The folder, for the message.
        expected: File → its size or checksum when it was written.
        actual: File → its size or checksum now.
        problem: Words for the message that describe the difference, e.g. `are missing`.

    Raises:
        InputError: Files differ; the message names the first one.
    """
    if wrong := [name for name, value in expected.items() if actual.get(name) != value]:
        raise InputError(
            f"{folder} is damaged: {len(wrong)} of {len(expected)} files {problem} "
            f"({one_line(wrong[0])}); copy or export the model again"
        )


def check_room(folder: Path, need_bytes: int) -> None:
    """Refuse to write a folder if the disk does not have enough free space.

    Raises:
        InputError: The message contains the free and the required space.
    """
    parent = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < need_bytes:
        raise InputError(
            f"{folder} cannot be written ({free / 1e6:.0f} MB free, {need_bytes / 1e6:.0f} MB "
            "needed); make room or choose another folder"
        )
