"""Folders that appear whole or not at all, and replace each other so, kills included.

A folder is written to `partial(folder)`, its mark last: a file without which it is not whole. Then
the old one is moved aside, the new one in, and the old one is deleted, its mark first.
"""

import contextlib
import os
import shutil
import stat
import zlib
from pathlib import Path

from jaxvid.errors import InputError, one_line


def partial(folder: Path) -> Path:
    """Where a folder is written before it appears."""
    return folder.parent / f".{folder.name}.partial"


def swap_in(folder: Path, mark: str) -> None:
    """Puts what was written in the place of the folder, if there is one.

    Raises:
        OSError: It cannot be moved; `tidy` then brings the old one back.
    """
    if folder.exists():
        folder.rename(_aside(folder))
    partial(folder).rename(folder)
    _remove(_aside(folder), mark)


def tidy(folder: Path, mark: str) -> None:
    """Puts back a folder that was moved aside for a new one that never came; removes the rest."""
    aside = _aside(folder)
    if whole(folder, mark) == aside:
        with contextlib.suppress(OSError):
            aside.rename(folder)
    if folder.exists():
        _remove(aside, mark)
    shutil.rmtree(partial(folder), ignore_errors=True)


def whole(folder: str | Path, mark: str) -> Path:
    """Where a folder is to be read: as it is named, or aside if it was left there."""
    aside = _aside(Path(os.path.realpath(folder)))  # Path.resolve raises where links form a loop
    return aside if not Path(folder).exists() and (aside / mark).is_file() else Path(folder)


def file_sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def scan_sizes(folder: Path, *, max_files: int) -> dict[str, int]:
    """Size in bytes of every file below an untrusted folder.

    Links to files are followed, since download caches consist of them; links to folders are not.

    Raises:
        InputError: There are more than `max_files` files and folders; or one of them is a FIFO, a
            socket, a device or a broken link, or cannot be read.
    """
    found, left, count = {}, [folder] if folder.is_dir() else [], 0
    try:
        while left:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    count += 1
                    path = Path(entry)
                    if count > max_files:
                        raise InputError(f"{folder} has more than {max_files} files; copy it again")
                    if entry.is_dir(follow_symlinks=False):
                        left.append(path)
                        continue
                    status = entry.stat()
                    if not stat.S_ISREG(status.st_mode):
                        raise InputError(f"{path} is not a regular file; copy the folder again")
                    found[str(path.relative_to(folder))] = status.st_size
    except OSError as error:
        name = error.filename if error.filename is not None else folder
        raise InputError(
            f"{name} cannot be read ({one_line(error.strerror)}); copy the folder again"
        ) from None
    return found


def checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of every file below a folder."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        checksum = 0
        with path.open("rb") as file:
            while block := file.read(2**24):
                checksum = zlib.crc32(block, checksum)
        found[str(path.relative_to(folder))] = checksum
    return found


def check_files(folder: Path, expected: dict, found: dict, what: str) -> None:
    """Refuses a folder whose files are not as they were written.

    Args:
        folder: For the message.
        expected: File → its size, or its checksum, when it was written.
        found: Likewise, now.
        what: What is wrong with a file where they differ.

    Raises:
        InputError: Names the first such file.
    """
    if wrong := [name for name, value in expected.items() if found.get(name) != value]:
        raise InputError(
            f"{folder} is damaged: {len(wrong)} of {len(expected)} files {what} "
            f"({one_line(wrong[0])}); copy or export the model again"
        )


def check_room(folder: Path, need_bytes: int) -> None:
    """Refuses to write a folder where the disk has no room for it.

    Raises:
        InputError: Says how much there is.
    """
    place = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < need_bytes:
        raise InputError(
            f"{folder} cannot be written ({free / 1e6:.0f} MB free, {need_bytes / 1e6:.0f} MB "
            "needed); make room or name another"
        )


def _aside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.old"


def _remove(folder: Path, mark: str) -> None:
    with contextlib.suppress(OSError):
        (folder / mark).unlink()
    shutil.rmtree(folder, ignore_errors=True)
