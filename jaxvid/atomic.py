"""Atomic writing of files and folders: they appear completely or not at all."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxvid.errors import InputError
from jaxvid.object_store import RemoteFile, is_remote, to_address

OutputPath = Path | RemoteFile


def output_path(path: str | Path) -> OutputPath:
    """Return the path of an output that a user names, which may be remote: `gs://`, `s3://`.

    Raises:
        InputError: It is an `http://` or `https://` address, or an address with an empty part.
    """
    if not is_remote(path):
        return Path(path)
    address = to_address(path)
    if address.startswith("http"):
        raise InputError(
            f"{path} cannot be written; choose a local path, or an address gs:// or s3://"
        )
    return RemoteFile(address)


def is_same_file(output: str | Path, source: str | Path) -> bool:
    """Return whether an output would replace the file that it is made from."""
    if is_remote(output) or is_remote(source):
        return is_remote(output) and is_remote(source) and to_address(output) == to_address(source)
    return os.path.exists(output) and os.path.exists(source) and os.path.samefile(output, source)


def write_file(path: OutputPath, data: bytes, *, writer: str = "") -> OutputPath:
    """Write a file atomically, and create its parent folders.

    Args:
        path: The file; remote if `output_path` made it from a URL.
        data: Its contents.
        writer: Name of this process, if several processes may write the file at the same time. It
            is added to the name of the temporary file.

    Returns:
        The file.

    Raises:
        InputError: The file cannot be written.
    """
    partial = path.with_name(f".{path.name}{writer and f'.{writer}'}.partial")
    if not isinstance(path, Path):
        path.write_bytes(data)  # object stores show a file only when it is complete
        return path
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
            f"{path} cannot be written ({error.strerror}); choose another file or free disk space"
        ) from None
    return path


@contextlib.contextmanager
def replacing(path: OutputPath) -> Iterator[Path]:
    """Yield a temporary file that replaces another file when the body has written it.

    It suits libraries that write to a path. If the body raises, an existing file is kept.

    Args:
        path: The file to replace; remote if `output_path` made it from a URL. Its parent exists.

    Raises:
        InputError: The file cannot be written.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / path.name
            yield local
            write_file(path, local.read_bytes())
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); choose another file or free disk space"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_json(path: OutputPath, value: Any) -> OutputPath:
    """Write a value as indented JSON, atomically; see `format_json`.

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
    # Python represents invalid UTF-8 in file names as lone surrogates, which JSON can escape.
    return text.encode("utf-8", "backslashreplace")


def check_output(option: str, path: OutputPath) -> None:
    """Refuse an output file that cannot be written, before any work is done.

    Args:
        option: The command-line option that names the file.
        path: The file. An existing file is not changed.

    Raises:
        InputError: The parent folder cannot be created or written to, or the path exists and is
            not a regular file.
    """
    # The probe's name is as long as that of `write_file`'s temporary file, so that names that are
    # too long are refused here.
    probe = path.with_name(f".{path.name}.probing")
    if not isinstance(path, Path):
        path.check_writable()
        return
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
            f"{option}: {path} cannot be written ({error.strerror}); choose another file"
        ) from None


def staging_dir(folder: Path) -> Path:
    """Return the staging folder, to which files are written before `commit`."""
    return folder.parent / f".{folder.name}.partial"


def commit(folder: Path, mark: str) -> None:
    """Replace a folder by its staging folder.

    Args:
        folder: The folder, which need not exist.
        mark: Name of the file that marks a folder as complete.

    Raises:
        OSError: A folder cannot be moved; `recover` then restores the old one.
    """
    if folder.exists():
        folder.rename(_backup_dir(folder))
    staging_dir(folder).rename(folder)
    _remove(_backup_dir(folder), mark)


def recover(folder: Path, mark: str) -> None:
    """Restore the backup if a `commit` was interrupted; remove staging and backup folders."""
    backup = _backup_dir(folder)
    if resolve(folder, mark) == backup:
        with contextlib.suppress(OSError):
            backup.rename(folder)
    if folder.exists():
        _remove(backup, mark)
    _remove_staging(staging_dir(folder))


def resolve(folder: str | Path, mark: str) -> Path:
    """Return the backup of a folder if a `commit` was interrupted, otherwise the folder itself."""
    # Path.resolve would raise an exception if links form a loop.
    backup = _backup_dir(Path(os.path.realpath(folder)))
    return backup if not Path(folder).exists() and (backup / mark).is_file() else Path(folder)


def _backup_dir(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.old"


def _remove(folder: Path, mark: str) -> None:
    """Remove a folder, its mark first: a partly removed folder must not count as complete."""
    with contextlib.suppress(OSError):
        (folder / mark).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _remove_staging(folder: Path) -> None:
    """Remove a staging folder, and wait until threads of a failed save no longer write to it."""
    existed = folder.exists()
    shutil.rmtree(folder, ignore_errors=True)
    absent_checks, deadline = 0, time.monotonic() + 3
    while existed and absent_checks < 10 and time.monotonic() < deadline:
        time.sleep(0.05)
        absent_checks += 1
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            absent_checks = 0
