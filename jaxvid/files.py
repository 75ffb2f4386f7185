"""Files that appear whole or not at all."""

import contextlib
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
        raise InputError(f"{path} cannot be written ({error.strerror}); name another") from None
    return path
