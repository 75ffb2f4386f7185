"""Read weights from files of unknown origin without running or trusting anything in them.

A file's header gives the shape and dtype of each weight. The values of a weight are read when
`Weight.read` is called. Memory is allocated only for values that the file really contains.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors import safe_open

from jaxvid.errors import InputError, one_line, short_repr
from jaxvid.files import open_regular
from jaxvid.weights import torch_files
from jaxvid.weights.checked_file import MAX_HEADER, CheckedFile, check_start, open_zip
from jaxvid.weights.weight import Weight


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[tuple[str, dict[str, Weight]]]:
    """Open a checkpoint. Its weights can be read within the `with` block.

    Args:
        path: A `.safetensors` or `.npz` file. A file with any other suffix is read as one that
            `torch.save` wrote.

    Yields:
        The kind of file (see `rules.get_source`), and its weights by key. If the kind is
        `google_vit`, keys and layouts are Google's; `google_vit.to_torch` converts them.

    Raises:
        InputError: The file is not a checkpoint, is damaged, would run code, or changes while it is
            read.
    """
    readers = {".npz": _open_npz, ".safetensors": _open_safetensors}
    try:
        opened = open_regular(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; choose a checkpoint file") from None
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(CheckedFile(opened.detach()))
        before = os.fstat(file.fileno())
        with converted_errors(path):
            check_start(file)
            kind, weights = readers.get(path.suffix, torch_files.open_torch)(path, file, stack)
            for key in weights:
                _check_key(key)
        weights = {
            key: dataclasses.replace(weight, read=_with_converted_errors(path, weight.read))
            for key, weight in weights.items()
        }
        yield kind, weights
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise InputError(f"{path} changed while it was read; wait until it is complete")


@contextlib.contextmanager
def converted_errors(path: Path) -> Iterator[None]:
    """Convert any exception that is raised by reading a file to an InputError."""
    is_named = path.suffix in (".npz", ".safetensors")
    format_name = path.suffix if is_named else "a PyTorch checkpoint"
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = one_line(error, 200)
        if isinstance(error, MemoryError | RecursionError):
            reason = "it is nested too deeply or needs too much memory"
        raise InputError(
            f"{path} cannot be read as {format_name} ({reason}); download or save it again"
        ) from error


def _with_converted_errors(path: Path, read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    """Return `read` with exceptions converted by `converted_errors`."""

    def read_and_convert_errors() -> np.ndarray:
        with converted_errors(path):
            return read()

    return read_and_convert_errors


def _check_key(key: str) -> None:
    if not isinstance(key, str):
        raise ValueError(f"the key {short_repr(key)} is not text")
    if not key.isprintable() or len(key) > 300:
        raise ValueError(f"the key {short_repr(key)} is not the name of a weight")


def _open_npz(path: Path, file: CheckedFile, stack: contextlib.ExitStack) -> tuple[str, dict]:
    """Open a `.npz` file; see `open_weights`."""
    archive, weights = open_zip(path, file, stack), {}
    header_readers = {  # version of the .npy format → function that reads the header
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    for info in archive.infolist():
        name = short_repr(info.filename)
        with archive.open(info) as member:
            if member.peek(6)[:6] != b"\x93NUMPY":
                raise ValueError(f"the member {name} is not an array")
            version = np.lib.format.read_magic(member)
            if version not in header_readers:
                raise ValueError(f"{name} has version {version} of the .npy format")
            shape, _, dtype = header_readers[version](member)
            if dtype.hasobject or dtype.names:
                raise ValueError(f"{name} holds Python objects or records, expected numbers")
            if min(shape, default=0) < 0 or len(shape) > 8:
                raise ValueError(f"{name} has the invalid shape {short_repr(shape)}")
            if math.prod(shape) * dtype.itemsize != info.file_size - member.tell():
                raise ValueError(f"the size of {name} contradicts its shape")

        def read(info: zipfile.ZipInfo = info) -> np.ndarray:
            with archive.open(info) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
                member.read(1)  # at the end of a member, zipfile compares the checksum
            return array.astype(array.dtype.newbyteorder("="), copy=False)

        weights[info.filename.removesuffix(".npy")] = Weight(shape, dtype.name, read)
    return "google_vit", weights


def _open_safetensors(
    path: Path, file: CheckedFile, stack: contextlib.ExitStack
) -> tuple[str, dict]:
    """Open a `.safetensors` file; see `open_weights`."""
    [length] = struct.unpack("<Q", file.read_at(0, 8).tobytes())
    if length > MAX_HEADER:
        raise ValueError(
            f"its header declares {length / 1e6:.0f} MB, more than the limit of "
            f"{MAX_HEADER / 1e6:.0f} MB"
        )

    def refuse_duplicates(pairs: list) -> dict:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("two of its weights have the same name")
        return dict(pairs)

    json.loads(file.read_at(8, length).tobytes(), object_pairs_hook=refuse_duplicates)
    archive = stack.enter_context(safe_open(path, "np"))  # checks the rest of the header
    weights = {}
    for key in archive.keys():  # noqa: SIM118 - not a dict
        part = archive.get_slice(key)

        def read(key: str = key) -> np.ndarray:
            return archive.get_tensor(key)

        # F32 → float32, BF16 → bfloat16. `convert` refuses other dtypes, e.g. I64 or float8_E4M3.
        dtype = re.sub("F(?=[0-9])", "float", part.get_dtype()).replace("B", "b", 1)
        weights[key] = Weight(tuple(part.get_shape()), dtype, read)
    return "timm_vit", weights
