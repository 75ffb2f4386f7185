"""Files and directories that appear whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from jaxvid.errors import InputError


def write_file(path: Path, data: bytes, *, writer: str = "") -> Path:
    """Write a file atomically, and create its parent folders.

    Args:
        path: The file.
        data: Its contents.
        writer: Name that distinguishes processes that may write the file at the same time.

    Raises:
        InputError: The file cannot be written.
    """
    partial = path.with_name(f".{path.name}{writer and f'.{writer}'}.partial")
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
            f"{path} cannot be written ({error.strerror}); name another file or free disk space"
        ) from None
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write indented JSON atomically. File names that are not UTF-8 survive the round trip.

    Raises:
        InputError: The file cannot be written.
        ValueError: A number is not finite.
    """
    return write_file(path, format_json(value))


def format_json(value: Any) -> bytes:
    """Format a value as indented JSON in UTF-8; file names that are not UTF-8 are escaped.

    Raises:
        ValueError: A number is not finite.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Python represents their bytes as lone surrogates, which JSON can escape.
    return text.encode("utf-8", "backslashreplace")


def check_output(option: str, path: Path) -> None:
    """Refuse an output file that cannot be written, before any work is done.

    Args:
        option: The command-line option that names the file.
        path: The file. An existing file is not changed.

    Raises:
        InputError: The parent folder cannot be created or written to, or the path exists and is
            not a regular file.
    """
    probe = path.with_name(f".{path.name}.probing")  # as long as the temporary name of `write_file`
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
            f"{option}: {path} cannot be written ({error.strerror}); name another file"
        ) from None


def staging_dir(folder: Path) -> Path:
    """Return the folder to write to before `commit`."""
    return folder.parent / f".{folder.name}.partial"


def commit(folder: Path, mark: str) -> None:
    """Replace a folder by its staging folder.

    Args:
        folder: The folder, which need not exist.
        mark: File without which a folder does not count as complete. It is deleted first.

    Raises:
        OSError: A folder cannot be moved; `recover` then restores the old one.
    """
    if folder.exists():
        folder.rename(_backup_dir(folder))
    staging_dir(folder).rename(folder)
    _remove(_backup_dir(folder), mark)


def recover(folder: Path, mark: str) -> None:
    """Restore the backup if a `commit` was interrupted; remove staging folder and backup."""
    backup = _backup_dir(folder)
    if resolve(folder, mark) == backup:
        with contextlib.suppress(OSError):
            backup.rename(folder)
    if folder.exists():
        _remove(backup, mark)
    _remove_staging(staging_dir(folder))


def resolve(folder: str | Path, mark: str) -> Path:
    """Return the backup of a folder if a `commit` was interrupted, otherwise the folder."""
    # Not Path.resolve, which raises an exception if links form a loop.
    backup = _backup_dir(Path(os.path.realpath(folder)))
    return backup if not Path(folder).exists() and (backup / mark).is_file() else Path(folder)


def _backup_dir(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.old"


def _remove(folder: Path, mark: str) -> None:
    with contextlib.suppress(OSError):
        (folder / mark).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _remove_staging(folder: Path) -> None:
    """Remove a staging directory; threads of a failed save may still create files in it."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)
