"""Files and directories that appear whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

from jaxvid.errors import InputError


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


def staging_dir(folder: Path) -> Path:
    """Where a folder is written before it appears."""
    return folder.parent / f".{folder.name}.partial"


def commit(folder: Path, mark: str) -> None:
    """Puts what was written in the place of the folder, if there is one.

    Raises:
        OSError: It cannot be moved; `tidy` then brings the old one back.
    """
    if folder.exists():
        folder.rename(_backup_dir(folder))
    staging_dir(folder).rename(folder)
    _remove(_backup_dir(folder), mark)


def recover(folder: Path, mark: str) -> None:
    """Puts back a folder that was moved aside for a new one that never came; removes the rest."""
    aside = _backup_dir(folder)
    if resolve(folder, mark) == aside:
        with contextlib.suppress(OSError):
            aside.rename(folder)
    if folder.exists():
        _remove(aside, mark)
    shutil.rmtree(staging_dir(folder), ignore_errors=True)


def resolve(folder: str | Path, mark: str) -> Path:
    """Where a folder is to be read: as it is named, or aside if it was left there."""
    aside = _backup_dir(
        Path(os.path.realpath(folder))
    )  # Path.resolve raises where links form a loop
    return aside if not Path(folder).exists() and (aside / mark).is_file() else Path(folder)


def _backup_dir(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.old"


def _remove(folder: Path, mark: str) -> None:
    with contextlib.suppress(OSError):
        (folder / mark).unlink()
    shutil.rmtree(folder, ignore_errors=True)
