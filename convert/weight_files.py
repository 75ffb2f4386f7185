"""Reads weights from files of unknown origin without running or trusting anything in them.

A file's header gives the shape and dtype of each weight. Values are read one weight at a time, when
`Weight.read` is called, so that nothing which a file merely declares is ever allocated. The pickle
of a PyTorch file is interpreted here: `torch.load` allocates what a pickle declares, and reads
beyond the end of a storage that is shorter than its tensor.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors import safe_open

from jaxvid.errors import InputError, one_line, short_repr
from jaxvid.files import open_regular

MAX_HEADER = 4 * 2**20  # bytes of a pickle, a JSON header, a zip directory; real ones have < 1 MB
BLOCK = 16 * 2**20  # bytes that a checksum is computed of at a time
MAX_OPCODES = 500_000  # of a pickle; a tensor takes about 30
MAX_EXPANSION = 4  # bytes that a zip file declares over its size; weights hardly compress
MAX_SPREAD = 16  # bytes that a strided tensor spans over those that it has

ITEM_SIZES = {
    **{"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8},
    **{"bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8},
    **{"complex64": 8, "complex128": 16, "qint8": 1, "quint8": 1, "qint32": 4},
}
FLOATS = {
    **{name: np.dtype(name) for name in ("float16", "float32", "float64")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_STORAGES = {
    **{"Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64"},
    **{"Bool": "bool", "Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32"},
    **{"Long": "int64", "ComplexFloat": "complex64", "ComplexDouble": "complex128"},
    **{"QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32", "Untyped": "uint8"},
}
# What else a state_dict or an optimiser's state may name; none of it is needed.
_HARMLESS = {
    *("collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.complex"),
    *("builtins.bytearray", "_codecs.encode", "torch.device", "torch.Size", "torch.Tensor"),
    *("torch.nn.parameter.Parameter", "torch.serialization._get_layout"),
    *("torch._tensor._rebuild_from_type_v2", "torch.storage.TypedStorage"),
}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight in a file, known by its header.

    Attributes:
        shape: Its shape.
        dtype: Name of its dtype; `read` needs one of `FLOATS`.
        read: Reads its values.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Weight":
        """The weight in another layout, by a transposition or a reshape.

        Raises:
            ValueError: The shape does not allow it.
        """
        shape = change(np.broadcast_to(np.float32(0), self.shape)).shape
        return Weight(shape, self.dtype, lambda: change(self.read()))


def concatenate(weights: list[Weight]) -> Weight:
    """Weights side by side along the first axis.

    Raises:
        ValueError: Their other axes or their dtypes differ.
    """
    if len({(weight.shape[1:], weight.dtype) for weight in weights}) > 1:
        raise ValueError("parts of different shapes")
    shape = (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:])
    read = lambda: np.concatenate([weight.read() for weight in weights])  # noqa: E731
    return Weight(shape, weights[0].dtype, read)


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[tuple[str, dict[str, Weight]]]:
    """Opens a checkpoint; its weights can be read within the `with` block.

    Args:
        path: A `.safetensors` or `.npz` file, or one that `torch.save` wrote, of any name.

    Yields:
        The kind of source (a key of `rules.SOURCES`) and its weights. Those of `google_vit` have
        their own names and layouts (`rules.google_to_torch`).

    Raises:
        InputError: It is no such file, is damaged, would run code, or changes while it is read.
    """
    readers = {".npz": _open_npz, ".safetensors": _open_safetensors}
    try:
        opened = open_regular(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; name a checkpoint file") from None
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_File(opened.detach()))
        before = os.fstat(file.fileno())
        with _guard(path):
            _check_start(file)
            kind, weights = readers.get(path.suffix, _open_torch)(path, file, stack)
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
    """Reads a file as PyTorch does, for a comparison. Call `open_weights` first: it checks sizes.

    Raises:
        InputError: PyTorch cannot read it.
    """
    with _guard(path):
        return _unwrap(torch.load(path, map_location="cpu", weights_only=True))


@contextlib.contextmanager
def _guard(path: Path) -> Iterator[None]:
    """Turns every failure to read a file into an InputError that names the file and the cause."""
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


# ------------------------------------------------------------------ bytes


class _File(io.BufferedReader):
    """A file that refuses a large read by a library, which would trust a declared size."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_HEADER:
            raise ValueError(f"its header declares {size / 1e6:.0f} MB")
        return super().read(size)

    def read_at(self, offset: int, size: int) -> np.ndarray:
        """Bytes as an array that can be written to."""
        if offset + size > os.fstat(self.fileno()).st_size:
            raise ValueError("it declares more bytes than it has")
        data = np.empty(size, np.uint8)
        self.seek(offset)
        if self.readinto(data) != size:
            raise ValueError("it became shorter while it was read")
        return data

    def checksum(self, offset: int, size: int) -> int:
        """CRC-32 of a part of the file."""
        value = 0
        for start in range(0, size, BLOCK):
            value = zlib.crc32(self.read_at(offset + start, min(BLOCK, size - start)), value)
        return value


def _check_start(file: _File) -> None:
    """Names what a file is that is no checkpoint."""
    start = file.read_at(0, min(512, os.fstat(file.fileno()).st_size)).tobytes()
    if not start:
        raise ValueError("it is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("it is a Git LFS pointer, not the file itself")
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise ValueError("it is a web page, not the file itself")
    if start[257:262] == b"ustar":
        raise ValueError("it is a tar file, as PyTorch before 0.1.10 wrote")


def _check_key(key: str) -> None:
    if not isinstance(key, str):
        raise ValueError(f"the key {short_repr(key)} is not text")
    if not key.isprintable() or len(key) > 300:
        raise ValueError(f"the key {short_repr(key)} is no name of a weight")


def _open_zip(path: Path, file: _File, stack: contextlib.ExitStack) -> zipfile.ZipFile:
    """Opens an archive whose directory is plausible."""
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
            raise ValueError(f"the member {short_repr(name)} lies outside the archive")
        names.add(name)
        declared += info.file_size
    size = os.fstat(file.fileno()).st_size
    if declared > MAX_EXPANSION * size:
        raise InputError(
            f"{path} declares {declared / 1e6:.0f} MB in a file of {size / 1e6:.0f} MB; not read: "
            "download or save it again"
        )
    return archive


# ------------------------------------------------------------------ .npz and .safetensors


def _open_npz(path: Path, file: _File, stack: contextlib.ExitStack) -> tuple[str, dict]:
    archive, weights = _open_zip(path, file, stack), {}
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    for info in archive.infolist():
        name = short_repr(info.filename)
        with archive.open(info) as member:
            if member.peek(6)[:6] != b"\x93NUMPY":
                raise ValueError(f"the member {name} is no array")
            version = np.lib.format.read_magic(member)
            if version not in headers:
                raise ValueError(f"{name} has version {version} of the format")
            shape, _, dtype = headers[version](member)
            if dtype.hasobject or dtype.names:
                raise ValueError(f"{name} holds Python objects, which could run code")
            if min(shape, default=0) < 0 or len(shape) > 8:
                raise ValueError(f"{name} has the shape {short_repr(shape)}")
            if math.prod(shape) * dtype.itemsize != info.file_size - member.tell():
                raise ValueError(f"{name} has another size than its shape says")

        def read(info=info) -> np.ndarray:
            with archive.open(info) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
                member.read(1)  # the end, where the checksum is compared
            return array.astype(array.dtype.newbyteorder("="), copy=False)

        weights[info.filename.removesuffix(".npy")] = Weight(shape, dtype.name, read)
    return "google_vit", weights


def _open_safetensors(path: Path, file: _File, stack: contextlib.ExitStack) -> tuple[str, dict]:
    [length] = struct.unpack("<Q", file.read_at(0, 8).tobytes())
    if length > MAX_HEADER:
        raise ValueError(f"its header declares {length / 1e6:.0f} MB")

    def unique(pairs: list) -> dict:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("two of its weights have the same name")
        return dict(pairs)

    json.loads(file.read_at(8, length).tobytes(), object_pairs_hook=unique)
    archive = stack.enter_context(safe_open(path, "pt"))  # which checks all the rest
    weights = {}
    for key in archive.keys():  # noqa: SIM118 - it is no dict
        part = archive.get_slice(key)

        def read(key=key) -> np.ndarray:
            tensor = archive.get_tensor(key)
            return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

        dtype = re.sub("F(?=[0-9])", "float", part.get_dtype()).replace("B", "b", 1)
        weights[key] = Weight(tuple(part.get_shape()), dtype, read)
    return "timm_vit", weights


# ------------------------------------------------------------------ PyTorch


@dataclasses.dataclass(frozen=True)
class _Global:
    """A function or class that a pickle names; never called."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Opaque:
    """A value that is no weight."""

    kind: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    numel: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Span:
    """Where a storage lies in the file: bytes, CRC-32 (None: the file has none), byte order."""

    start: int
    size: int
    crc: int | None = None
    order: str = "<"


def _open_torch(path: Path, file: _File, stack: contextlib.ExitStack) -> tuple[str, dict]:
    file.seek(0)
    is_zip = file.read(4) == b"PK\x03\x04"
    tree, spans = _read_zip(path, file, stack) if is_zip else _read_legacy(file)
    if not isinstance(tree, dict):
        raise InputError(
            f"{path} holds a {_kind(tree)}, not a dict of weights; save a model's state_dict()"
        )
    state = _unwrap(tree)
    if "pos_embed" not in state and "base_model.pos_embed" not in state:
        names = ", ".join(map(short_repr, list(state)[:4])) or "nothing"
        raise InputError(
            f"{path} holds no weights of STAM, XViT or a timm ViT, but {names}, ...; "
            "name another file"
        )
    others = [
        f"{short_repr(key)} is a {_kind(value)}"
        for key, value in state.items()
        if not isinstance(value, _Tensor)
    ]
    if others:
        more = f", and {len(others) - 5} more" * (len(others) > 5)
        raise InputError(
            f"{path}: {', '.join(others[:5])}{more}, not a dense tensor; save a model's "
            "state_dict() in float32"
        )
    verified: set[str] = set()
    weights = {}
    for key, tensor in state.items():
        if tensor.storage.key not in spans:
            raise ValueError(f"{short_repr(key)}: its values are missing")
        span = spans[tensor.storage.key]
        _check_tensor(key, tensor, span)

        def read(tensor=tensor, span=span) -> np.ndarray:
            return _read_tensor(file, tensor, span, verified)

        weights[key] = Weight(tensor.shape, tensor.dtype, read)
    for prefix, kind in (("base_model.", "xvit"), ("aggregate.", "stam")):
        if any(str(key).startswith(prefix) for key in state):
            return kind, weights
    return "timm_vit", weights


def _kind(value: object) -> str:
    if isinstance(value, _Tensor):
        return "tensor"
    return value.kind if isinstance(value, _Opaque) else type(value).__name__


def _unwrap(tree: dict) -> dict:
    """The state_dict inside a checkpoint, without a DDP prefix.

    Raises:
        ValueError: There are several, or two keys differ in the prefix alone.
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
            raise ValueError(f"it has {short_repr(key)} both with and without 'module.' before it")
        state[key] = value
    return state


def _read_zip(path: Path, file: _File, stack: contextlib.ExitStack) -> tuple[Any, dict[str, _Span]]:
    """What the pickle of a zip archive describes, and where its storages are."""
    archive = _open_zip(path, file, stack)
    infos = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in infos if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} members data.pkl, expected one")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in infos:
        raise ValueError("it is a TorchScript program; save the model's state_dict()")
    order = "<"
    if f"{prefix}byteorder" in infos:
        orders = {b"little": "<", b"big": ">"}
        order = orders.get(_read_member(archive, infos[f"{prefix}byteorder"]))
        if order is None:
            raise ValueError("its byte order is neither little nor big")
    tree, _ = _interpret(io.BytesIO(_read_member(archive, infos[pickles[0]])))
    spans = {
        name.removeprefix(f"{prefix}data/"): _find_member(file, info, order)
        for name, info in infos.items()
        if name.startswith(f"{prefix}data/")
    }
    return tree, spans


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > MAX_HEADER:
        raise ValueError(f"{short_repr(info.filename)} declares {info.file_size / 1e6:.0f} MB")
    return archive.read(info)


def _find_member(file: _File, info: zipfile.ZipInfo, order: str) -> _Span:
    """Where the bytes of an uncompressed member are."""
    name = short_repr(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise ValueError(f"{name} is compressed, which torch.save never does")
    header = file.read_at(info.header_offset, 30).tobytes()
    if header[:4] != b"PK\x03\x04":
        raise ValueError(f"the directory names a wrong place for {name}")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if start + info.file_size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{name} ends after the file")
    return _Span(start, info.file_size, info.CRC, order)


def _read_legacy(file: _File) -> tuple[Any, dict[str, _Span]]:
    """Like `_read_zip`, for a file of PyTorch before 1.6: five pickles, then the storages."""
    size = os.fstat(file.fileno()).st_size
    head = io.BytesIO(file.read_at(0, min(size, MAX_HEADER)).tobytes())
    if head.getvalue()[:1] != b"\x80":
        raise ValueError("it is neither a zip archive nor a pickle")
    magic, _ = _interpret(head)
    if magic != 0x1950A86A20F9469CFC6C:
        raise ValueError("it is a pickle, but not one of torch.save")
    version, _ = _interpret(head)
    system, _ = _interpret(head)
    if version != 1001 or not isinstance(system, dict):
        raise ValueError(f"it has the protocol version {short_repr(version)}, expected 1001")
    tree, declared = _interpret(head)
    keys, _ = _interpret(head)
    if not isinstance(keys, list) or sorted(map(repr, keys)) != sorted(map(repr, declared)):
        raise ValueError("its list of storages is not that of its tensors")
    order, position, spans = "<" if system.get("little_endian") else ">", head.tell(), {}
    for key in keys:
        storage = declared[key]
        [numel] = struct.unpack(f"{order}q", file.read_at(position, 8).tobytes())
        if numel != storage.numel or storage.dtype not in ITEM_SIZES:
            raise ValueError(f"the storage {short_repr(key)} has another size than is declared")
        spans[key] = _Span(position + 8, numel * ITEM_SIZES[storage.dtype], None, order)
        position += 8 + spans[key].size
    return tree, spans


def _check_tensor(key: object, tensor: _Tensor, span: _Span) -> None:
    """Refuses a tensor that reaches beyond its storage, and a storage that is not in the file."""
    name, storage = short_repr(key), tensor.storage
    numbers = (storage.numel, tensor.offset, *tensor.shape, *tensor.strides)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"{name} has a negative or impossible size, stride or offset")
    if len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > 8:
        raise ValueError(f"{name} has {len(tensor.shape)} axes and {len(tensor.strides)} strides")
    if storage.dtype not in ITEM_SIZES or tensor.dtype not in FLOATS:
        return  # refused by its dtype, and never read
    if storage.numel * ITEM_SIZES[storage.dtype] != span.size:
        raise ValueError(f"{name}: its storage declares another size than the file has")
    if 0 not in tensor.shape and ((_last(tensor) + 1) * ITEM_SIZES[tensor.dtype] > span.size):
        raise ValueError(f"{name} reaches beyond the end of its storage")


def _last(tensor: _Tensor) -> int:
    """The highest index into its storage that a tensor uses."""
    steps = zip(tensor.shape, tensor.strides, strict=True)
    return tensor.offset + sum((n - 1) * stride for n, stride in steps)


def _read_tensor(file: _File, tensor: _Tensor, span: _Span, verified: set[str]) -> np.ndarray:
    """A tensor's values. The first use of a storage compares its checksum."""
    dtype = FLOATS[tensor.dtype]
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, dtype)
    start = tensor.offset * dtype.itemsize
    size = (_last(tensor) + 1) * dtype.itemsize - start
    if size > MAX_SPREAD * math.prod(tensor.shape) * dtype.itemsize + 2**20:
        raise ValueError("a tensor is spread over a much larger storage; save a copy of it")
    data = file.read_at(span.start + start, size)
    if span.crc is not None and tensor.storage.key not in verified:
        whole = size == span.size
        crc = zlib.crc32(data) if whole else file.checksum(span.start, span.size)
        if crc != span.crc:
            raise ValueError(f"the checksum of the storage {tensor.storage.key} is wrong")
        verified.add(tensor.storage.key)
    values = data.view(dtype)
    if span.order == ">":
        values = values.byteswap()
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)


# ------------------------------------------------------------------ pickles


def _interpret(stream: io.BytesIO) -> tuple[Any, dict[str, _Storage]]:
    """What a pickle describes, with tensors as `_Tensor` and other objects as `_Opaque`.

    Nothing is imported or called. Python's own unpickler would allocate a table as long as the
    largest index in the pickle, and hash whatever is nested in a key.

    Args:
        stream: Left behind the pickle's end.

    Returns:
        The value, and the storages by key.

    Raises:
        ValueError: It is damaged, too long, or would run code.
    """
    machine = _Machine()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_OPCODES:
            raise ValueError(f"its pickle has more than {MAX_OPCODES} operations")
        if opcode.name == "STOP":
            return machine.pop(), machine.storages
        machine.run(opcode.name, argument)
    raise ValueError("its pickle has no end")


class _Machine:
    """The stack, the marks and the memo of a pickle that is being interpreted."""

    def __init__(self):
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("its pickle is damaged: the stack is empty")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("its pickle is damaged: a mark is missing")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def run(self, name: str, argument: Any) -> None:
        """One operation of a pickle, by the name that `pickletools` gives it."""
        if name in ("PROTO", "FRAME"):
            return
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name == "MARK":
            self.marks.append(self.stack)
            self.stack = []
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            self.stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "TUPLE":
            items = self.pop_mark()  # which changes the stack
            self.stack.append(tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [self.pop() for _ in range(int(name[-1]))]
            self.stack.append(tuple(reversed(items)))
        elif name in ("APPEND", "APPENDS"):
            items = [self.pop()] if name == "APPEND" else self.pop_mark()
            self._top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.pop_mark()
            self._set_items(self._top(dict), items)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = self._top(object)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise ValueError("its pickle is damaged: a value is missing")
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(_find_global(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            self.stack.append(_find_global(f"{module}.{attribute}"))
        elif name == "BINPERSID":
            self.stack.append(self._find_storage(self.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = self.pop(), self.pop()
            self.stack.append(_apply(function, arguments))
        elif name == "BUILD":  # attributes, e.g. a state_dict's `_metadata`
            self.pop()
        else:
            raise ValueError(f"its pickle has the operation {name}, which torch.save never writes")

    def _top(self, expected: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], expected):
            raise ValueError(f"its pickle is damaged: expected a {expected.__name__}")
        return self.stack[-1]

    def _set_items(self, target: dict, items: list) -> None:
        if len(items) % 2:
            raise ValueError("its pickle is damaged: a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 2**63):
                raise ValueError(f"it has a {type(key).__name__} as a key")
            if key in target:
                raise ValueError(f"it has the key {short_repr(key)} twice")
            target[key] = value

    def _find_storage(self, reference: Any) -> _Storage:
        if not isinstance(reference, tuple) or len(reference) not in (5, 6):
            raise ValueError("its pickle is damaged: a reference to a storage is none")
        word, kind, key, _, numel = reference[:5]
        match = isinstance(kind, _Global) and re.fullmatch(r"torch\..*?(\w+)Storage", kind.name)
        is_view = any(part is not None for part in reference[5:])
        if word != "storage" or not match or not isinstance(key, str) or is_view:
            raise ValueError("its pickle is damaged: a reference to a storage is none")
        storage = _Storage(key, _STORAGES.get(match[1], match[1]), numel)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"the storage {short_repr(key)} is declared in two ways")
        return storage


def _find_global(name: str) -> _Global:
    """A name that a state_dict may use.

    Raises:
        ValueError: It is another, which a pickle could use to run code.
    """
    known = (
        r"torch\._utils\._rebuild_\w+|torch\.(cuda\.|storage\.)?\w+Storage"
        r"|torch\.([a-z]+\d\w*|bool|per_\w+)"  # dtypes and quantisation schemes
    )
    if name in _HARMLESS or re.fullmatch(known, name):
        return _Global(name)
    raise ValueError(
        f"it names {short_repr(name)}: it holds more than weights, which would be run as code on "
        "loading"
    )


def _apply(function: Any, arguments: Any) -> Any:
    """What a call in a pickle stands for."""
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise ValueError("its pickle is damaged: a call of what is no function")
    name = function.name.rpartition(".")[2]
    if name == "OrderedDict" and not arguments:
        return {}
    if name == "Size" and len(arguments) == 1:
        return arguments[0]
    if name == "_rebuild_from_type_v2" and len(arguments) == 4:
        inner, kind, inner_arguments, _ = arguments
        if kind in (_Global("torch.Tensor"), _Global("torch.nn.parameter.Parameter")):
            if inner == function:
                raise ValueError("its pickle is damaged: a call of itself")
            return _apply(inner, inner_arguments)
    if name in ("_rebuild_parameter", "_rebuild_parameter_with_state") and arguments:
        return arguments[0]
    if name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        if len(arguments) < 4 or not isinstance(arguments[0], _Storage):
            raise ValueError("its pickle is damaged: a tensor without a storage")
        storage, offset, shape, strides = arguments[:4]
        if not (isinstance(shape, tuple) and isinstance(strides, tuple)):
            raise ValueError("its pickle is damaged: a tensor without a shape")
        dtype = storage.dtype
        if name == "_rebuild_tensor_v3":
            if len(arguments) < 7 or not isinstance(arguments[6], _Global):
                raise ValueError("its pickle is damaged: a tensor without a dtype")
            dtype = arguments[6].name.removeprefix("torch.")
        # Flags of values that are to be conjugated or negated.
        if any(arguments[7:] if name == "_rebuild_tensor_v3" else arguments[6:]):
            return _Opaque("tensor with a conj or neg bit")
        return _Tensor(storage, dtype, offset, shape, strides)
    kinds = {"_rebuild_qtensor": "quantised tensor", "_rebuild_from_type_v2": "tensor subclass"}
    return _Opaque(kinds.get(name, name.removeprefix("_rebuild_").replace("_", " ")))
