"""Read checkpoints that `torch.save` wrote: zip archives, and the format before PyTorch 1.6."""

import contextlib
import dataclasses
import io
import math
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxvid.errors import InputError, short_repr
from jaxvid.models import FAMILIES
from jaxvid.weights.checked_file import MAX_HEADER, CheckedFile, open_zip
from jaxvid.weights.torch_pickle import Tensor, describe_kind, interpret
from jaxvid.weights.weight import FLOATS, Weight

MAX_SPREAD = 16  # bytes of storage that a strided tensor may span per byte of its values, + 1 MiB
ITEM_SIZES = {  # dtype → bytes per element
    **{"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8},
    **{"bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8},
    **{"complex64": 8, "complex128": 16, "qint8": 1, "quint8": 1, "qint32": 4},
}


@dataclasses.dataclass(frozen=True)
class _Span:
    """Location of a storage in the file.

    Attributes:
        start: Offset of its first byte.
        size: Number of bytes.
        crc: CRC-32 of the bytes, or None if the file has none.
        order: Byte order, `<` (little) or `>` (big).
    """

    start: int
    size: int
    crc: int | None = None
    order: str = "<"


def open_torch(path: Path, file: CheckedFile, stack: contextlib.ExitStack) -> tuple[str, dict]:
    """Open a checkpoint that `torch.save` wrote; see `jaxvid.weights.weight_files.open_weights`.

    Args:
        path: The file, for messages.
        file: The opened file.
        stack: Closes the archive, if the file is one.

    Returns:
        The kind of file, which is `timm_vit` or the name of a family; and the weights by key.

    Raises:
        InputError: The file contains no weights of a known model, or values other than dense
            tensors.
        ValueError: The file is damaged or would run code.
    """
    file.seek(0)
    is_zip = file.read(4) == b"PK\x03\x04"
    tree, spans = _read_zip(path, file, stack) if is_zip else _read_legacy(file)
    if not isinstance(tree, dict):
        raise InputError(
            f"{path}: expected a dict of weights, got {describe_kind(tree)}; save a model's "
            "state_dict()"
        )
    state = unwrap_state_dict(tree)
    if not {"pos_embed", *(family.pos_embed for family in FAMILIES.values())} & state.keys():
        keys = ", ".join(map(short_repr, list(state)[:4])) or "none"
        titles = ", ".join(family.title for family in FAMILIES.values())
        raise InputError(
            f"{path} contains no weights of {titles} or a timm ViT (first keys: {keys}); choose "
            "another file"
        )
    others = [
        f"{describe_kind(value)} for {short_repr(key)}"
        for key, value in state.items()
        if not isinstance(value, Tensor)
    ]
    if others:
        more = f", and {len(others) - 5} more" * (len(others) > 5)
        raise InputError(
            f"{path}: expected dense tensors, got {', '.join(others[:5])}{more}; save a model's "
            "state_dict() in float32"
        )
    verified: set[str] = set()
    weights = {}
    for key, tensor in state.items():
        if tensor.storage.key not in spans:
            raise ValueError(f"{short_repr(key)}: its values are missing")
        span = spans[tensor.storage.key]
        _check_tensor(key, tensor, span)

        def read(tensor: Tensor = tensor, span: _Span = span) -> np.ndarray:
            return _read_tensor(file, tensor, span, verified)

        weights[key] = Weight(tensor.shape, tensor.dtype, read)
    for family in FAMILIES.values():
        if any(str(key).startswith(family.torch.marker) for key in state):
            return family.name, weights
    return "timm_vit", weights


def unwrap_state_dict(tree: dict) -> dict:
    """Return the state_dict in a checkpoint, with DDP's prefix `module.` removed from its keys.

    Raises:
        ValueError: There are several state_dicts, or two keys differ only in the prefix.
    """
    inner = [
        key for key in ("model", "model_state", "state_dict") if isinstance(tree.get(key), dict)
    ]
    if len(inner) > 1:
        raise ValueError(f"it has weights under {' and '.join(map(repr, inner))}; keep one of them")
    state = {}
    for key, value in (tree[inner[0]] if inner else tree).items():
        if isinstance(key, str):
            key = key.removeprefix("module.")
        if key in state:
            raise ValueError(f"it has {short_repr(key)} both with and without the prefix 'module.'")
        state[key] = value
    return state


def _read_zip(
    path: Path, file: CheckedFile, stack: contextlib.ExitStack
) -> tuple[Any, dict[str, _Span]]:
    """Return the value of a zip archive's pickle, and the location of each storage by its key."""
    archive = open_zip(path, file, stack)
    infos = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in infos if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} members named data.pkl, expected one")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in infos:
        raise ValueError("it is a TorchScript program; save the model's state_dict()")
    order = "<"
    if f"{prefix}byteorder" in infos:
        orders = {b"little": "<", b"big": ">"}
        order = orders.get(_read_member(archive, infos[f"{prefix}byteorder"]))
        if order is None:
            raise ValueError("its byte order is neither little nor big")
    tree, _ = interpret(io.BytesIO(_read_member(archive, infos[pickles[0]])))
    spans = {
        name.removeprefix(f"{prefix}data/"): _find_member(file, info, order)
        for name, info in infos.items()
        if name.startswith(f"{prefix}data/")
    }
    return tree, spans


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > MAX_HEADER:
        raise ValueError(
            f"{short_repr(info.filename)} declares {info.file_size / 1e6:.0f} MB, more than the "
            f"limit of {MAX_HEADER / 1e6:.0f} MB"
        )
    return archive.read(info)


def _find_member(file: CheckedFile, info: zipfile.ZipInfo, order: str) -> _Span:
    """Return the location of an uncompressed member of a zip archive."""
    name = short_repr(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise ValueError(f"{name} is compressed, which torch.save never does")
    header = file.read_at(info.header_offset, 30).tobytes()
    if header[:4] != b"PK\x03\x04":
        raise ValueError(f"the zip directory has a wrong offset for {name}")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if start + info.file_size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{name} ends beyond the end of the file")
    return _Span(start, info.file_size, info.CRC, order)


def _read_legacy(file: CheckedFile) -> tuple[Any, dict[str, _Span]]:
    """Read a file that PyTorch before 1.6 wrote.

    It consists of five pickles (magic number, protocol version, description of the system, value,
    keys of the storages) and the storages.

    Returns:
        As `_read_zip`.
    """
    size = os.fstat(file.fileno()).st_size
    head = io.BytesIO(file.read_at(0, min(size, MAX_HEADER)).tobytes())
    if head.getvalue()[:1] != b"\x80":
        raise ValueError("it is neither a zip archive nor a pickle")
    magic, _ = interpret(head)
    if magic != 0x1950A86A20F9469CFC6C:
        raise ValueError("it is a pickle that torch.save did not write")
    version, _ = interpret(head)
    system, _ = interpret(head)
    if version != 1001:
        raise ValueError(f"it has the protocol version {short_repr(version)}, expected 1001")
    if not isinstance(system, dict):
        raise ValueError("its description of the system is damaged")
    tree, declared = interpret(head)
    keys, _ = interpret(head)
    if not isinstance(keys, list) or sorted(map(repr, keys)) != sorted(map(repr, declared)):
        raise ValueError("its list of storages does not match its tensors")
    order = "<" if system.get("little_endian") else ">"
    position, spans = head.tell(), {}
    for key in keys:
        storage = declared[key]
        [numel] = struct.unpack(f"{order}q", file.read_at(position, 8).tobytes())
        if numel != storage.numel:
            raise ValueError(f"the storage {short_repr(key)} has a different size than declared")
        if storage.dtype not in ITEM_SIZES:
            raise ValueError(
                f"the storage {short_repr(key)} has the unsupported dtype {storage.dtype}"
            )
        spans[key] = _Span(position + 8, numel * ITEM_SIZES[storage.dtype], None, order)
        position += 8 + spans[key].size
    return tree, spans


def _check_tensor(key: object, tensor: Tensor, span: _Span) -> None:
    """Check that the storage of a tensor has the declared size and contains the tensor.

    Raises:
        ValueError: The storage has a different size or does not contain the tensor, or a size, a
            stride or the offset is impossible.
    """
    name, storage = short_repr(key), tensor.storage
    numbers = (storage.numel, tensor.offset, *tensor.shape, *tensor.strides)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"{name} has a negative or impossible size, stride or offset")
    if len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > 8:
        raise ValueError(f"{name} has {len(tensor.shape)} axes and {len(tensor.strides)} strides")
    if storage.dtype not in ITEM_SIZES or tensor.dtype not in FLOATS:
        return  # the tensor is refused later because of its dtype, without being read
    if storage.numel * ITEM_SIZES[storage.dtype] != span.size:
        raise ValueError(f"{name}: the declared size of its storage differs from that in the file")
    if 0 not in tensor.shape and ((_last_index(tensor) + 1) * ITEM_SIZES[tensor.dtype] > span.size):
        raise ValueError(f"{name} reaches beyond the end of its storage")


def _last_index(tensor: Tensor) -> int:
    """Return the highest index of a storage element that a tensor uses."""
    steps = zip(tensor.shape, tensor.strides, strict=True)
    return tensor.offset + sum((n - 1) * stride for n, stride in steps)


def _read_tensor(file: CheckedFile, tensor: Tensor, span: _Span, verified: set[str]) -> np.ndarray:
    """Read a tensor. When a storage is read for the first time, its checksum, if any, is compared.

    Args:
        file: The checkpoint.
        tensor: The tensor.
        span: Location of the tensor's storage.
        verified: Keys of the storages whose checksums have been compared. The key of this tensor's
            storage is added.

    Raises:
        ValueError: The checksum differs, the tensor is spread over too many bytes, or the file
            became shorter.
    """
    dtype = FLOATS[tensor.dtype]
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, dtype)
    start = tensor.offset * dtype.itemsize
    size = (_last_index(tensor) + 1) * dtype.itemsize - start
    if size > MAX_SPREAD * math.prod(tensor.shape) * dtype.itemsize + 2**20:
        raise ValueError("a tensor is spread over a much larger storage; save a copy of it")
    data = file.read_at(span.start + start, size)
    if span.crc is not None and tensor.storage.key not in verified:
        is_complete = size == span.size
        crc = zlib.crc32(data) if is_complete else file.checksum(span.start, span.size)
        if crc != span.crc:
            raise ValueError(f"the checksum of the storage {tensor.storage.key} is wrong")
        verified.add(tensor.storage.key)
    values = data.view(dtype)
    if span.order == ">":
        values = values.byteswap()
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)
