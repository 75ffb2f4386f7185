"""Files that appear whole or not at all."""

import contextlib
import json
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
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Python has their bytes as lone surrogates, and JSON escapes for these.
    return write_file(path, text.encode("utf-8", "backslashreplace"))
