"""Read weights from files of unknown origin without running or trusting anything in them.

A file's header gives the shape and dtype of each weight. Values are read one weight at a time, when
`Weight.read` is called, so that a size that a file merely declares is never allocated.
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
import torch
from safetensors import safe_open

from convert import torch_files
from convert.checked_file import MAX_HEADER, CheckedFile, check_start, open_zip
from convert.weight import Weight
from jaxvid.errors import InputError, one_line, short_repr
from jaxvid.files import open_regular


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[tuple[str, dict[str, Weight]]]:
    """Open a checkpoint. Its weights can be read within the `with` block.

    Args:
        path: A `.safetensors` or `.npz` file; any other file is one that `torch.save` wrote.

    Yields:
        The kind of source (see `rules.get_source`) and its weights. The weights of `google_vit`
        have their own names and layouts (`google_vit.to_torch`).

    Raises:
        InputError: The file is not a checkpoint, is damaged, would run code, or changes while it is
            read.
    """
    readers = {".npz": _open_npz, ".safetensors": _open_safetensors}
    try:
        opened = open_regular(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; name a checkpoint file") from None
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(CheckedFile(opened.detach()))
        before = os.fstat(file.fileno())
        with _guard(path):
            check_start(file)
            kind, weights = readers.get(path.suffix, torch_files.open_torch)(path, file, stack)
            for key in weights:
                _check_key(key)
        guarded = {
            key: dataclasses.replace(weight, read=_guarded(path, weight.read))
            for key, weight in weights.items()
        }
        yield kind, guarded
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise InputError(f"{path} changed while it was read; wait until it is complete")


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a state_dict with PyTorch, for a comparison. Call `open_weights` first: it checks sizes.

    Raises:
        InputError: PyTorch cannot read it.
    """
    with _guard(path):
        tree = torch.load(path, map_location="cpu", weights_only=True)
        return torch_files.unwrap_state_dict(tree)


@contextlib.contextmanager
def _guard(path: Path) -> Iterator[None]:
    """Convert every error while reading a file into an InputError with the file and the cause."""
    formats = {".npz": ".npz", ".safetensors": ".safetensors"}
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = one_line(error, 200)
        if isinstance(error, MemoryError | RecursionError):
            reason = "it is nested too deeply or needs too much memory"
        raise InputError(
            f"{path} cannot be read as {formats.get(path.suffix, 'a PyTorch checkpoint')} "
            f"({reason}); download or save it again"
        ) from error


def _guarded(path: Path, read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    def read_guarded() -> np.ndarray:
        with _guard(path):
            return read()

    return read_guarded


def _check_key(key: str) -> None:
    if not isinstance(key, str):
        raise ValueError(f"the key {short_repr(key)} is not text")
    if not key.isprintable() or len(key) > 300:
        raise ValueError(f"the key {short_repr(key)} is not the name of a weight")


def _open_npz(path: Path, file: CheckedFile, stack: contextlib.ExitStack) -> tuple[str, dict]:
    archive, weights = open_zip(path, file, stack), {}
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    for info in archive.infolist():
        name = short_repr(info.filename)
        with archive.open(info) as member:
            if member.peek(6)[:6] != b"\x93NUMPY":
                raise ValueError(f"the member {name} is not an array")
            version = np.lib.format.read_magic(member)
            if version not in headers:
                raise ValueError(f"{name} has version {version} of the format")
            shape, _, dtype = headers[version](member)
            if dtype.hasobject or dtype.names:
                raise ValueError(f"{name} holds Python objects, which could run code")
            if min(shape, default=0) < 0 or len(shape) > 8:
                raise ValueError(f"{name} has the shape {short_repr(shape)}")
            if math.prod(shape) * dtype.itemsize != info.file_size - member.tell():
                raise ValueError(f"the size of {name} contradicts its shape")

        def read(info: zipfile.ZipInfo = info) -> np.ndarray:
            with archive.open(info) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
                member.read(1)  # zipfile compares the checksum at the end
            return array.astype(array.dtype.newbyteorder("="), copy=False)

        weights[info.filename.removesuffix(".npy")] = Weight(shape, dtype.name, read)
    return "google_vit", weights


def _open_safetensors(
    path: Path, file: CheckedFile, stack: contextlib.ExitStack
) -> tuple[str, dict]:
    [length] = struct.unpack("<Q", file.read_at(0, 8).tobytes())
    if length > MAX_HEADER:
        raise ValueError(f"its header declares {length / 1e6:.0f} MB")

    def unique(pairs: list) -> dict:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("two of its weights have the same name")
        return dict(pairs)

    json.loads(file.read_at(8, length).tobytes(), object_pairs_hook=unique)
    archive = stack.enter_context(safe_open(path, "pt"))  # checks the rest of the header
    weights = {}
    for key in archive.keys():  # noqa: SIM118 - not a dict
        part = archive.get_slice(key)

        def read(key: str = key) -> np.ndarray:
            tensor = archive.get_tensor(key)
            return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

        dtype = re.sub("F(?=[0-9])", "float", part.get_dtype()).replace("B", "b", 1)
        weights[key] = Weight(tuple(part.get_shape()), dtype, read)
    return "timm_vit", weights
