"""Bounded reads from files of unknown origin, and checks before a file is parsed."""

import contextlib
import io
import os
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np

from jaxvid.errors import InputError, short_repr

# Maximum size in bytes of a pickle, a JSON header or a zip directory. Those of real files are below
# 1 MB.
MAX_HEADER = 4 * 2**20
BLOCK = 16 * 2**20  # bytes per step of a checksum
MAX_EXPANSION = 4  # maximum uncompressed bytes per byte of a zip file; weights hardly compress


class CheckedFile(io.BufferedReader):
    """A file that refuses to read more than `MAX_HEADER` bytes at once.

    Libraries trust the sizes that a file declares. A `read` without a size is not limited.
    """

    def read(self, size: int | None = -1) -> bytes:
        """Read like `BufferedReader`, but refuse a `size` above `MAX_HEADER`.

        Raises:
            ValueError: `size` is above `MAX_HEADER`.
        """
        if size is not None and size > MAX_HEADER:
            raise ValueError(
                f"its header declares {size / 1e6:.0f} MB, more than the limit of "
                f"{MAX_HEADER / 1e6:.0f} MB"
            )
        return super().read(size)

    def read_at(self, offset: int, size: int) -> np.ndarray:
        """Return `size` bytes of the file from `offset` on, as a writable uint8 array.

        Raises:
            ValueError: The file is too short, or became shorter.
        """
        if offset + size > os.fstat(self.fileno()).st_size:
            raise ValueError("it declares more bytes than it has")
        data = np.empty(size, np.uint8)
        self.seek(offset)
        if self.readinto(data) != size:
            raise ValueError("it became shorter while it was read")
        return data

    def checksum(self, offset: int, size: int) -> int:
        """Return the CRC-32 of a part of the file, computed in blocks."""
        value = 0
        for start in range(0, size, BLOCK):
            value = zlib.crc32(self.read_at(offset + start, min(BLOCK, size - start)), value)
        return value


def check_start(file: CheckedFile) -> None:
    """Refuse a file whose first bytes show that it is not a checkpoint, e.g. a web page.

    Raises:
        ValueError: It is not a checkpoint; the message says what it is.
    """
    start = file.read_at(0, min(512, os.fstat(file.fileno()).st_size)).tobytes()
    if not start:
        raise ValueError("it is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("it is a Git LFS pointer, not the file itself")
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise ValueError("it is a web page, not the file itself")
    if start[257:262] == b"ustar":
        raise ValueError("it is a tar file, as PyTorch before 0.1.10 wrote")


def open_zip(path: Path, file: CheckedFile, stack: contextlib.ExitStack) -> zipfile.ZipFile:
    """Open a zip archive and check its directory.

    Args:
        path: The file, for messages.
        file: The opened file.
        stack: Closes the archive.

    Raises:
        ValueError: Two members have the same name, or a member is encrypted or has a path outside
            the archive, or the directory is larger than `MAX_HEADER`.
        zipfile.BadZipFile: The archive is damaged.
        InputError: The archive declares far more bytes than the file has.
    """
    file.seek(0)
    archive = stack.enter_context(zipfile.ZipFile(file))
    names, declared = set(), 0
    for info in archive.infolist():
        name = info.filename
        if name in names:
            raise ValueError(f"two members are named {short_repr(name)}")
        if info.flag_bits & 1:
            raise ValueError(f"{short_repr(name)} is encrypted")
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise ValueError(f"the member {short_repr(name)} is outside the archive")
        names.add(name)
        declared += info.file_size
    size = os.fstat(file.fileno()).st_size
    if declared > MAX_EXPANSION * size:
        raise InputError(
            f"{path} declares {declared / 1e6:.0f} MB in a file of {size / 1e6:.0f} MB; "
            "download or save it again"
        )
    return archive
