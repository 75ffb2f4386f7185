"""Hostile checkpoint and label files, and the messages with which they must be refused."""

import io
import json
import os
import socket
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from jaxvid.models import PRESETS, abstract_model, make_model_config
from jaxvid.weights import rules

MODEL = "stam_8"
NOT_TORCH = "cannot be read as a PyTorch checkpoint"
SIZES = {"width": 16, "depth": 1, "heads": 2, "image_size": 32, "num_classes": 5}
SIZES |= {"temporal_depth": 1, "temporal_heads": 2, "temporal_mlp": 32}


def shrink_preset() -> None:
    """Replace the preset `stam_8` by a tiny one in this process."""
    PRESETS[MODEL] = make_model_config(MODEL, **SIZES)


def make_state() -> dict[str, np.ndarray]:
    """Return weights of the tiny `stam_8` under PyTorch's names."""
    _, params = abstract_model(make_model_config(MODEL))
    rng = np.random.default_rng(0)
    return {
        rules.torch_key(name): rng.normal(size=rules.torch_shape(name, leaf.shape)).astype("f4")
        for name, leaf in params.items()
    }


# ------------------------------------------------------------------ pickles


class Global(NamedTuple):
    """A function or class that a pickle imports: opcode GLOBAL."""

    module: str
    name: str


class Call(NamedTuple):
    """A call of a function: opcode REDUCE."""

    function: Any
    arguments: tuple


class Persistent(NamedTuple):
    """A reference to a storage: opcode BINPERSID."""

    value: Any


class Raw(NamedTuple):
    """Opcodes that are copied into the pickle unchanged."""

    data: bytes


def encode(value: Any) -> bytes:
    """Encode a value as opcodes of pickle protocol 2."""
    if isinstance(value, Raw):
        return value.data
    if isinstance(value, Global):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        return encode(value.function) + encode(tuple(value.arguments)) + b"R"
    if isinstance(value, Persistent):
        return encode(value.value) + b"Q"
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, dict):
        return b"}(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u"
    items = b"".join(map(encode, value))
    return b"(" + items + b"t" if isinstance(value, tuple) else b"](" + items + b"e"


def tensor(
    shape,
    strides=None,
    *,
    offset=0,
    numel=None,
    key="pos_embed",
    kind="Float",
    dtype=None,
    flags=(),
) -> Call:
    """Return a tensor as `torch.save` pickles it, by default contiguous.

    Args:
        shape: Shape.
        strides: Strides; None: contiguous.
        offset: Index of the first value in the storage.
        numel: Number of values of the storage; None: that of the tensor.
        key: Name of the storage in the archive.
        kind: Type of the storage, e.g. "Half".
        dtype: Dtype of an untyped storage.
        flags: Further arguments of the function that rebuilds the tensor, such as `{"neg": True}`.
    """
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    numel = int(np.prod(shape)) if numel is None else numel
    storage = Persistent(("storage", Global("torch", f"{kind}Storage"), key, "cpu", numel))
    function = "_rebuild_tensor_v3" if dtype else "_rebuild_tensor_v2"
    hooks = Call(Global("collections", "OrderedDict"), ())
    arguments = [storage, offset, shape, strides, False, hooks]  # False: requires_grad
    if dtype:
        arguments.append(Global("torch", dtype))
    arguments = (*arguments, *flags)
    return Call(Global("torch._utils", function), arguments)


def rebuild(function: str, *arguments) -> Call:
    return Call(Global("torch._utils", function), arguments)


def members(changes: dict | None = None, tree: Any = None) -> dict[str, bytes]:
    """Return the members of a PyTorch archive.

    Args:
        changes: Key → new value, for values of the state_dict that are replaced.
        tree: The pickled object; None: a dict with the state_dict under "model".
    """
    state = make_state()
    values = {k: tensor(v.shape, key=k) for k, v in state.items()} | (changes or {})
    tree = {"model": values} if tree is None else tree
    parts = {"data.pkl": b"\x80\x02" + encode(tree) + b".", "byteorder": b"little"}
    return parts | {f"data/{key}": value.tobytes() for key, value in state.items()}


def write_zip(path: Path, parts: dict[str, bytes], compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name if name.startswith(("/", "..")) else f"archive/{name}", data)


# ------------------------------------------------------------------ cases

Build = Callable[[Path], None]
# name → suffix of the file, its builder, and a part of the message ("a|b": any of these).
CASES: dict[str, tuple[str, Build, str]] = {}


def case(name: str, message: str, build: Build, suffix: str = "pth") -> None:
    assert name not in CASES
    CASES[name] = (suffix, build, message)


def tree_case(name: str, message: str, tree: Any = None, **changes) -> None:
    """Add a case: a valid archive with another pickle, or with changed values."""
    case(name, message, lambda p: write_zip(p, members(changes, tree)))


def part_case(name: str, message: str, **parts) -> None:
    """Add a case: a valid archive with replaced or added members."""
    case(name, message, lambda p: write_zip(p, members() | parts))


def byte_case(name: str, message: str, data: bytes, suffix: str = "pth") -> None:
    """Add a case: a file with this content."""
    case(name, message, lambda p: p.write_bytes(data), suffix)


def edit_case(name: str, message: str, edit: Callable[[bytearray], None]) -> None:
    """Add a case: a valid archive with changed bytes."""

    def build(path: Path) -> None:
        write_zip(path, members())
        data = bytearray(path.read_bytes())
        edit(data)
        path.write_bytes(data)

    case(name, message, build)


def save_case(name: str, message: str, make: Callable[[dict], Any], **options) -> None:
    """Add a case: a changed state_dict, written by `torch.save`."""

    def build(path: Path) -> None:
        state = {key: torch.from_numpy(value) for key, value in make_state().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about sparse and quantised tensors
            torch.save(make(state), path, **options)

    case(name, message, build)


def sparse_file(size: int, start: bytes = b"") -> Build:
    """Return the builder of a sparse file: `start`, then zeros up to `size` bytes."""

    def build(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return build


def bind_socket(path: Path) -> None:
    working_dir = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has at most 107 characters
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)  # the file remains after the socket is closed
    finally:
        os.chdir(working_dir)


# name → builder, part of the message; for files of every kind.
SPECIAL = {
    "missing": (lambda p: None, "does not exist"),
    "folder": (lambda p: p.mkdir(), "is a folder"),
    "fifo": (os.mkfifo, "not a regular file"),
    "socket": (bind_socket, "not a regular file"),
    "endless device": (lambda p: p.symlink_to("/dev/zero"), "not a regular file"),
    "symlink loop": (lambda p: p.symlink_to(p.name), "Too many levels of symbolic links"),
    "broken link": (lambda p: p.symlink_to("nothing"), "does not exist"),
}
for _suffix in ("pth", "npz", "safetensors"):
    for _name, (_build, _message) in SPECIAL.items():
        case(f"{_suffix}: {_name}", _message, _build, _suffix)

# ---- files that are not checkpoints
for _name, _message, _data in (
    ("empty", "it is empty", b""),
    ("one byte", "neither a zip archive nor a pickle", b"\x00"),
    ("text", "neither a zip archive nor a pickle", b"hello"),
    ("start of a zip", "cannot be read", b"PK\x03\x04"),
    ("web page", "it is a web page", b"<!DOCTYPE html><html></html>"),
    ("git lfs", "Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    ("zeros", "neither a zip archive nor a pickle", bytes(10**6)),
    ("gzip", "neither a zip archive nor a pickle", b"\x1f\x8b\x08" + bytes(100)),
    ("tar", "it is a tar file", bytes(257) + b"ustar\x0000" + bytes(1000)),
):
    byte_case(f"file: {_name}", _message, _data)
for _seed in range(3):
    byte_case(f"file: noise {_seed}", NOT_TORCH, np.random.default_rng(_seed).bytes(5000))
    byte_case(
        f"file: noise {_seed} after a pickle's start",
        NOT_TORCH,
        b"\x80\x02" + np.random.default_rng(_seed).bytes(5000),
    )
case("file: terabyte of zeros", "neither a zip", sparse_file(2**40))
case("file: terabyte after a zip's start", "cannot be read", sparse_file(2**40, b"PK\x03\x04"))
case("file: terabyte after a pickle's start", NOT_TORCH, sparse_file(2**40, b"\x80\x02X"))

# ---- zip archives
for _tenth in range(1, 10):

    def _truncate(data: bytearray, tenth: int = _tenth) -> None:
        del data[len(data) * tenth // 10 :]

    edit_case(f"zip: truncated at {_tenth}/10", NOT_TORCH, _truncate)


def _edit_end(data: bytearray, offset: int, value: bytes) -> None:
    """Replace bytes of the end-of-central-directory record."""
    end = data.rfind(b"PK\x05\x06")
    data[end + offset : end + offset + len(value)] = value


def _edit_entry(data: bytearray, offset: int, value: bytes, entry: int = -1) -> None:
    """Replace bytes of an entry of the central directory, by default of the last one."""
    starts = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    data[starts[entry] + offset : starts[entry] + offset + len(value)] = value


def _flip_bit(data: bytearray) -> None:
    """Flip a bit of `pos_embed`."""
    data[data.find(make_state()["pos_embed"].tobytes()) + 5] ^= 1


# Values of 4-byte fields: 4 GB and 2 GB.
UINT32_MAX, UINT32_2GB = struct.pack("<I", 2**32 - 1), struct.pack("<I", 2**31)
for _name, _message, _edit in (
    ("flipped bit in a storage", "checksum of the storage pos_embed is wrong", _flip_bit),
    ("directory offset of 2 GB", "cannot be read", lambda d: _edit_end(d, 16, UINT32_2GB)),
    (
        "directory offset off by one",
        "cannot be read",
        lambda d: _edit_end(d, 16, bytes([d[-6] ^ 1])),
    ),
    ("directory size of 2 GB", "cannot be read", lambda d: _edit_end(d, 12, UINT32_2GB)),
    (
        "zip64 markers without a zip64 record",
        "cannot be read",
        lambda d: _edit_end(d, 8, b"\xff" * 12),
    ),
    ("member offset of 2 GB", "cannot be read", lambda d: _edit_entry(d, 42, UINT32_2GB)),
    ("member offset of another member", "cannot be read", lambda d: _edit_entry(d, 42, bytes(4))),
    ("member size of 4 GB", "in a file of 0 MB", lambda d: _edit_entry(d, 24, UINT32_MAX)),
    (
        "compressed and full size of 4 GB",
        "in a file of 0 MB",
        lambda d: _edit_entry(d, 20, 2 * UINT32_MAX),
    ),
    ("member size of one byte", "compressed", lambda d: _edit_entry(d, 24, b"\x01\0\0\0")),
    ("encrypted member", "is encrypted", lambda d: _edit_entry(d, 8, b"\x01\0")),
    ("unknown compression", "compressed", lambda d: _edit_entry(d, 10, b"\x63\0")),
    ("pickle with a wrong checksum", "Bad CRC", lambda d: _edit_entry(d, 16, UINT32_MAX, 0)),
    ("name with control characters", "cannot be read", lambda d: _edit_entry(d, 46, b"\n\n")),
):
    edit_case(f"zip: {_name}", _message, _edit)


def _duplicate_member(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns about the duplicate name
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in [*members().items(), ("data/pos_embed", b"1234")]:
                archive.writestr(f"archive/{name}", data)


def _many_members(path: Path) -> None:
    write_zip(path, members() | {f"x/{i}": b"" for i in range(100_000)})


case("zip: two members of the same name", "two members are named", _duplicate_member)
case("zip: 100,000 members", "its header declares", _many_members)
case("zip: deflated", "is compressed", lambda p: write_zip(p, members(), zipfile.ZIP_DEFLATED))
case("zip: bzip2", "compressed", lambda p: write_zip(p, members(), zipfile.ZIP_BZIP2))
part_case("zip: member outside the archive", "is outside the archive", **{"../../x": b""})
part_case("zip: member with an absolute path", "is outside the archive", **{"/etc/x": b""})
part_case("zip: TorchScript", "it is a TorchScript program", **{"constants.pkl": b""})
part_case("zip: unknown byte order", "byte order is neither", byteorder=b"middle")
part_case("zip: empty pickle", "cannot be read", **{"data.pkl": b""})
part_case("zip: pickle of 5 MB", "data.pkl' declares 5 MB", **{"data.pkl": bytes(5_000_000)})
part_case(
    "zip: too short storage", "declared size of its storage differs", **{"data/pos_embed": b"1234"}
)
part_case(
    "zip: too long storage",
    "declared size of its storage differs",
    **{"data/pos_embed": bytes(10**6)},
)
case("zip: no pickle", "0 members named data.pkl", lambda p: write_zip(p, {"data/0": b"1"}))
case(
    "zip: no storage",
    "its values are missing",
    lambda p: write_zip(p, {k: v for k, v in members().items() if k != "data/pos_embed"}),
)
case(
    "zip: bomb",
    "declares 50 MB in a file of 0 MB",
    lambda p: write_zip(p, {"data.pkl": bytes(50_000_000)}, zipfile.ZIP_DEFLATED),
)

# ---- pickles that are damaged or use operations that no state_dict needs
for _module, _function in (
    *(("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec")),
    *(("builtins", "getattr"), ("subprocess", "Popen"), ("torch", "load"), ("torch.hub", "load")),
    *(("numpy.core.multiarray", "_reconstruct"), ("operator", "attrgetter"), ("runpy", "run_path")),
    ("torch.jit._script", "unpackage_script_module"),
):
    _call = Call(Global(_module, _function), ("true",))
    tree_case(f"pickle: {_module}.{_function}", "run as code on loading", {"model": {"x": _call}})
for _name, _message, _data in (
    ("INST", "operation INST", b"(ios\nsystem\n"),
    ("OBJ", "operation OBJ", b"(Nob"),
    ("EXT1", "operation EXT1", b"\x82\x01"),
    ("NEWOBJ_EX", "operation NEWOBJ_EX", b"N)}\x92"),
    ("BYTEARRAY8", "cannot be read", b"\x96" + struct.pack("<Q", 2**62)),
    ("PERSID", "operation PERSID", b"P0\n"),
    ("DUP", "operation DUP", b"N2"),
    ("text of 2**62 bytes", "cannot be read", b"\x8d" + struct.pack("<Q", 2**62) + b"abc"),
    ("text of 4 GB", "cannot be read", b"X" + UINT32_MAX + b"abc"),
    ("memo index of 2**31", "got NoneType", b"Nr" + UINT32_2GB),
    ("memo entry that was never stored", "a value is missing", b"h\x63"),
    ("no mark", "its pickle is damaged", b"tttt"),
    ("empty stack", "its pickle is damaged", b"RRRR"),
    ("call of a number", "a call of something that is not a function", b"K\x01)R"),
    ("list as a dict", "expected dict", b"]K\x01K\x02s"),
    ("key without a value", "a key without a value", b"}(K\x01u"),
    ("tuples 200,000 deep", "operations|does not fit|tuple", b"N" + b"\x85" * 200_000),
    (
        "deeply nested key",
        "it has a key of the type tuple",
        b"}" + b"N" + b"\x85" * 200_000 + b"Ns",
    ),
    ("lists 200,000 deep", "list", b"]" * 200_000 + b"a" * 199_999),
    ("a million lists", "more than 500000 operations", b"(" + b"]" * 10**6 + b"t"),
):
    tree_case(f"pickle: {_name}", _message, {"pos_embed": Raw(_data)})
part_case("pickle: no end", "cannot be read", **{"data.pkl": b"\x80\x02N"})

# ---- tensors with invalid sizes, storages or types
S = (1, 5, 16)  # shape of `pos_embed`
_rebuild = Global("torch._tensor", "_rebuild_from_type_v2")
_self_call = Call(_rebuild, (_rebuild, Global("torch", "Tensor"), (), {}))
for _name, _message, _value in (
    ("negative size", "negative or impossible", tensor((1, -5, 16), (80, 16, 1), numel=80)),
    ("negative stride", "negative or impossible", tensor(S, (80, -16, 1))),
    ("negative offset", "negative or impossible", tensor(S, offset=-1)),
    ("negative storage", "negative or impossible", tensor(S, numel=-80)),
    ("huge size", "reaches beyond", tensor((1, 10**12, 16), (80, 16, 1), numel=80)),
    ("size beyond 64 bits", "negative or impossible", tensor((1, 2**70, 16), S, numel=80)),
    ("huge stride", "reaches beyond", tensor(S, (80, 10**12, 1))),
    ("huge offset", "reaches beyond", tensor(S, offset=10**15)),
    ("offset of one", "reaches beyond", tensor(S, offset=1)),
    ("huge storage", "declared size of its storage differs", tensor(S, numel=10**13)),
    ("small storage", "declared size of its storage differs", tensor(S, numel=1)),
    ("fewer strides than axes", "3 axes and 2 strides", tensor(S, (16, 1))),
    ("70 axes", "70 axes", tensor((1,) * 70, (1,) * 70, numel=80)),
    ("sizes in a list", "without a shape", tensor([1, 5, 16], (80, 16, 1))),
    ("size in floating point", "negative or impossible", tensor((1, 5.0, 16), (80, 16, 1))),
    ("size that is a bool", "negative or impossible", tensor((True, 5, 16), (80, 16, 1))),
    ("size that is text", "negative or impossible", tensor(("1", 5, 16), (80, 16, 1), numel=80)),
    ("expansion to a huge size", "in the file", tensor((10**9, 10**9, 10**9), (0, 0, 0), numel=80)),
    ("size of zero", "in the file", tensor((1, 0, 16), (0, 16, 1), numel=80)),
    ("no axes", "in the file", tensor((), (), numel=80)),
    ("missing storage", "its values are missing", tensor(S, key="nothing")),
    ("storage outside the archive", "its values are missing", tensor(S, key="../../etc/passwd")),
    ("storage named by a number", "an invalid reference to a storage", tensor(S, key=0)),
    ("storage of another dtype", "declared in two ways", tensor(S, key="head.bias", kind="Half")),
    ("negated values", "conj or neg bit", tensor(S, flags=({"neg": True},))),
    ("sparse", "got sparse tensor", rebuild("_rebuild_sparse_tensor", 0, ())),
    ("meta", "got meta tensor", rebuild("_rebuild_meta_tensor_no_storage", 0, S, S, False)),
    ("nested", "got nested tensor", rebuild("_rebuild_nested_tensor", 0, 0)),
    ("wrapper", "got wrapper subclass", rebuild("_rebuild_wrapper_subclass", 0)),
    ("quantised", "got quantised tensor", rebuild("_rebuild_qtensor", 0)),
    ("no storage", "a tensor without a storage", rebuild("_rebuild_tensor_v2", 0, 0, S, S)),
    ("no arguments", "a tensor without a storage", rebuild("_rebuild_tensor_v2")),
    ("call of itself", "a call of itself", _self_call),
    ("None", "got NoneType", None),
    ("text", "got str", "weights"),
    ("dict", "got dict", {"a": 1}),
):
    tree_case(f"tensor: {_name}", _message, pos_embed=_value)
for _kind, _dtype in (
    *(("Bool", "bool"), ("Byte", "uint8"), ("Char", "int8"), ("Short", "int16"), ("Int", "int32")),
    *(("Long", "int64"), ("ComplexFloat", "complex64"), ("ComplexDouble", "complex128")),
    *(("QInt8", "qint8"), ("QUInt8", "quint8"), ("QInt32", "qint32"), ("QUInt4x2", "QUInt4x2")),
):
    _message = f"{_dtype}, not floating point|declared size"
    tree_case(f"dtype: {_dtype}", _message, pos_embed=tensor(S, kind=_kind))
for _dtype in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "uint16"):
    _value = tensor(S, kind="Untyped", numel=320, dtype=_dtype)
    tree_case(f"dtype: {_dtype}", f"pos_embed: {_dtype}", pos_embed=_value)


def _change_weight(key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict], Any]:
    return lambda state: {"model": state | {key: change(state[key])}}


for _name, _message, _change in (
    ("nan", "holds NaN or infinite", lambda t: torch.full_like(t, float("nan"))),
    ("inf", "holds NaN or infinite", lambda t: torch.full_like(t, float("inf"))),
    ("float64 beyond float32", "outside float32's range", lambda t: t.double() * 1e300),
    ("float64 nan", "holds NaN or infinite", lambda t: t.double() * float("nan")),
    ("sparse coo", "got sparse tensor", lambda t: t.to_sparse()),
    ("sparse csr", "got sparse tensor", lambda t: t[0].to_sparse_csr()),
    ("on meta", "got meta tensor", lambda t: t.to("meta")),
    ("complex", "complex64, not floating point", lambda t: t.to(torch.complex64)),
    ("conjugated", "conj or neg bit", lambda t: t.to(torch.complex64).conj()),
    ("float8", "float8_e4m3fn; expected", lambda t: t.to(torch.float8_e4m3fn)),
    ("bool", "bool, not floating point", lambda t: t.bool()),
    (
        "quantised",
        "got quantised tensor",
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    ),
    ("additional axis", "in the file", lambda t: t[None]),
):
    save_case(f"saved: {_name}", _message, _change_weight("pos_embed", _change))

# ---- objects that are not a state_dict, and wrong keys
_NO_NAME = "is not the name of a weight"
for _name, _message, _make in (
    ("list", "got list", lambda s: [s]),
    ("tuple", "got tuple", lambda s: (s,)),
    ("nothing", "got NoneType", lambda s: None),
    ("number", "got int", lambda s: 5),
    ("tensor", "got tensor", lambda s: s["pos_embed"]),
    ("empty", "contains no weights", lambda s: {}),
    ("unknown keys", "contains no weights", lambda s: {"a": s["pos_embed"]}),
    (
        "prefix collision",
        "both with and without the prefix 'module.'",
        lambda s: s | {"module.norm.bias": s["norm.bias"]},
    ),
    (
        "model and state_dict",
        "under 'model' and 'state_dict'",
        lambda s: {"model": s, "state_dict": s},
    ),
    ("numbers as keys", "the key 5 is not text", lambda s: s | {5: s["norm.bias"]}),
    ("key of two lines", _NO_NAME, lambda s: s | {"a\nb": s["norm.bias"]}),
    ("key with an escape", _NO_NAME, lambda s: s | {"\x1b[2J": s["norm.bias"]}),
    ("key of 10,000 characters", _NO_NAME, lambda s: s | {"a" * 10**4: s["norm.bias"]}),
    (
        "3,000 unknown keys",
        "and 2970 more",
        lambda s: s | {f"x{i}": s["norm.bias"] for i in range(3000)},
    ),
    ("a single weight", "missing in the file", lambda s: {"pos_embed": s["pos_embed"]}),
    ("model in a model", "got dict", lambda s: {"model": s | {"inner": s}}),
):
    save_case(f"dict: {_name}", _message, _make)
tree_case(
    "dict: duplicate key",
    "has the key 'a' twice",
    Raw(b"}(" + (encode("a") + encode(1)) * 2 + b"u"),
)


# ---- the format of PyTorch before 1.6
def _legacy(edit: Callable[[bytearray], None]) -> Build:
    """Return the builder of a valid file with changed bytes."""

    def build(path: Path) -> None:
        state = {key: torch.from_numpy(value) for key, value in make_state().items()}
        buffer = io.BytesIO()
        torch.save({"model": state}, buffer, _use_new_zipfile_serialization=False)
        data = bytearray(buffer.getvalue())
        edit(data)
        path.write_bytes(data)

    return build


def _set_huge_count(data: bytearray) -> None:
    """Declare 2**60 instead of 80 values for the storage of `pos_embed`."""
    start = data.find(struct.pack("<q", 80) + make_state()["pos_embed"].tobytes()[:8])
    data[start : start + 8] = struct.pack("<q", 2**60)


def _change_magic_number(data: bytearray) -> None:
    data[8] = 0


for _tenth in (1, 5, 9):

    def _truncate_legacy(data: bytearray, tenth: int = _tenth) -> None:
        del data[len(data) * tenth // 10 :]

    case(f"legacy: truncated at {_tenth}/10", NOT_TORCH, _legacy(_truncate_legacy))
case("legacy: storage of 2**60", "has a different size than declared", _legacy(_set_huge_count))
case("legacy: wrong magic number", "torch.save did not write", _legacy(_change_magic_number))

# ---- .npz


def write_npz(path: Path, parts: dict[str, Any]) -> None:
    """Write an archive of arrays and of members given as bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in parts.items():
            buffer = io.BytesIO()
            if isinstance(value, np.ndarray):
                np.lib.format.write_array(buffer, value, allow_pickle=True)
            archive.writestr(name, value if isinstance(value, bytes) else buffer.getvalue())


def npy(header: str | bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """Return the bytes of an .npy file with this header."""
    text = header.encode() if isinstance(header, str) else header
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


HEADER = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }\n"
_inner_archive = io.BytesIO()
np.savez(_inner_archive, a=np.zeros(2))
for _name, _message, _data in (
    ("terabytes", "contradicts its shape", npy(HEADER % ("<f4", "(1000000000000,)"))),
    ("size beyond 64 bits", "contradicts its shape", npy(HEADER % ("<f4", f"({2**80},)"))),
    ("negative size", "has the invalid shape", npy(HEADER % ("<f4", "(-5,)"), bytes(20))),
    ("50 axes", "has the invalid shape", npy(HEADER % ("<f4", f"({'1,' * 50})"), bytes(4))),
    ("archive in an archive", "is not an array", _inner_archive.getvalue()),
    ("text", "is not an array", b"hello"),
    ("nothing", "is not an array", b""),
    ("wrong magic number", "is not an array", b"\x93NUMPX" + bytes(100)),
    ("version 9", "has version (9, 0)", npy(HEADER % ("<f4", "(1,)"), bytes(4), b"\x09\x00")),
    ("code as header", "cannot be read as .npz", npy("__import__('os').system('true')")),
    ("deeply nested header", "cannot be read as .npz", npy("(" * 9000)),
    ("header of 60 kB", "cannot be read as .npz", npy(" " * 60_000)),
    ("binary header", "cannot be read as .npz", npy(bytes(range(200)))),
    ("truncated header", "cannot be read as .npz", b"\x93NUMPY\x01\x00\xff\xff{"),
    ("unknown dtype", "cannot be read as .npz", npy(HEADER % ("<q9", "(1,)"))),
    ("Python objects", "holds Python objects", np.array([print], dtype=object)),
    ("structured dtype", "holds Python objects", np.zeros(2, [("a", "f4")])),
    ("text array", "str128|str|holds no|in the file", np.array(["abcd"])),
    ("integers", "in the file", np.zeros((1, 5, 16), int)),
):
    case(f"npz: {_name}", _message, lambda p, d=_data: write_npz(p, {"cls.npy": d}), "npz")
for _name, _message, _key, _array in (
    ("kernel without axes", "in the file", "embedding/kernel", np.float32(1)),
    ("query alone", "in the file", "query/kernel", np.zeros((16, 2, 8), "f4")),
    ("query without axes", "in the file", "query/kernel", np.zeros((), "f4")),
):
    _key = _key.replace("query", "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query")
    case(
        f"npz: {_name}",
        _message,
        lambda p, k=_key, a=_array: write_npz(p, {f"{k}.npy": np.asarray(a)}),
        "npz",
    )
case(
    "npz: two names for the same weight",
    "two keys are converted to cls_token",
    lambda p: write_npz(p, {f"{k}.npy": np.zeros((1, 1, 16), "f4") for k in ("cls", "cls_token")}),
    "npz",
)


def _huge_grid(path: Path) -> None:
    """Write a positional embedding of 4 GB, whose grid would have to be resized."""
    data = safetensors(entry(shape=(1, 2**26 + 1, 16), offsets=(0, 64 * (2**26 + 1))), b"")
    sparse_file(len(data) + 64 * (2**26 + 1), data)(path)


case("safetensors: grid of 4 GB", "in the file, (1, 5, 16) in the model", _huge_grid, "safetensors")
byte_case("npz: text file", "cannot be read as .npz", b"hello", "npz")
byte_case("npz: empty file", "it is empty", b"", "npz")
case(
    "npz: member outside the archive",
    "is outside the archive",
    lambda p: write_npz(p, {"../a.npy": np.zeros(1)}),
    "npz",
)


def _encrypted(path: Path) -> None:
    write_npz(path, {"cls.npy": np.zeros(1)})
    data = bytearray(path.read_bytes())
    _edit_entry(data, 8, b"\x01\0")
    path.write_bytes(data)


case("npz: encrypted", "is encrypted", _encrypted, "npz")
for _tenth in (3, 6, 9):

    def _truncate_npz(path: Path, tenth: int = _tenth) -> None:
        write_npz(path, {"cls.npy": np.zeros((1, 1, 16), "f4")})
        path.write_bytes(path.read_bytes()[: path.stat().st_size * tenth // 10])

    case(f"npz: truncated at {_tenth}/10", "cannot be read as .npz", _truncate_npz, "npz")

# ---- .safetensors


def safetensors(header: Any, data: bytes = bytes(320)) -> bytes:
    """Return the bytes of a file; the header is raw bytes or an object to write as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(1, 5, 16), offsets=(0, 320)) -> dict:
    """Return a header with `pos_embed` only."""
    return {"pos_embed": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


NOT_SAFE = "cannot be read as .safetensors"
_entry_text = json.dumps(entry())[1:-1]
for _name, _message, _data in (
    ("empty", "it is empty", b""),
    ("text", NOT_SAFE, b"hello"),
    ("header of 2**63 bytes", "its header declares", struct.pack("<Q", 2**63) + b"{}"),
    ("header of 1 GB", "its header declares", struct.pack("<Q", 10**9) + b"{}"),
    ("header longer than the file", NOT_SAFE, struct.pack("<Q", 1000) + b"{}"),
    ("header that is not JSON", NOT_SAFE, safetensors(b"{hello")),
    ("header that is a list", NOT_SAFE, safetensors([1, 2])),
    ("deeply nested header", NOT_SAFE, safetensors(b"[" * 100_000)),
    ("header that is not UTF-8", NOT_SAFE, safetensors(bytes(range(128, 255)))),
    ("header of length zero", NOT_SAFE, safetensors(b"")),
    ("same name twice", "the same name", safetensors(f"{{{_entry_text}, {_entry_text}}}".encode())),
    ("offsets beyond the end", NOT_SAFE, safetensors(entry(offsets=(0, 10**12)))),
    ("offsets reversed", NOT_SAFE, safetensors(entry(offsets=(320, 0)))),
    ("offsets with a hole", NOT_SAFE, safetensors(entry(offsets=(4, 324)), bytes(324))),
    ("offsets that overlap", NOT_SAFE, safetensors(entry() | {"a": entry()["pos_embed"]})),
    ("negative offset", NOT_SAFE, safetensors(entry(offsets=(-320, 0)))),
    ("size that contradicts the shape", NOT_SAFE, safetensors(entry(shape=(1, 5, 17)))),
    ("shape of terabytes", NOT_SAFE, safetensors(entry(shape=(10**9, 10**9)))),
    ("shape beyond 64 bits", NOT_SAFE, safetensors(entry(shape=(2**70,)))),
    ("negative shape", NOT_SAFE, safetensors(entry(shape=(-1, 5, 16)))),
    ("shape of text", NOT_SAFE, safetensors(entry(shape="abc"))),
    ("unknown dtype", NOT_SAFE, safetensors(entry("F33"))),
    ("dtype that is a number", NOT_SAFE, safetensors(entry(5))),
    ("no offsets", NOT_SAFE, safetensors({"pos_embed": {"dtype": "F32", "shape": [1]}})),
    ("float8", "float8_E4M3; expected", safetensors(entry("F8_E4M3", S, (0, 80)), bytes(80))),
    ("integers", "I32, not floating|in the file", safetensors(entry("I32"))),
    ("metadata that is not text", NOT_SAFE, safetensors(entry() | {"__metadata__": {"a": 5}})),
    ("bytes after the data", NOT_SAFE, safetensors(entry(), bytes(1000))),
):
    byte_case(f"safetensors: {_name}", _message, _data, "safetensors")

# ---- label files, for a valid checkpoint: the suffix is "labels.txt" or "labels.json"
for _name, (_build, _message) in SPECIAL.items():
    case(f"labels: {_name}", _message, _build, "labels.txt")
case("labels: 1 TB", "is larger than the limit of 32 MB", sparse_file(2**40), "labels.txt")
for _name, _message, _data in (
    ("binary", "save it as UTF-8", bytes(range(128, 255))),
    ("empty", "is empty", b""),
    ("too many", "6 names for 5 classes", b"a\nb\nc\nd\ne\nf\n"),
    ("number", "(got 5)", b"5"),
    ("object", "no class has 0", b'{"a": 1}'),
    ("null", "got None", b"null"),
    ("lists", "[1] is not a name", b"[[1], [2], [3], [4], [5]]"),
    ("deeply nested", "must be a list of names", b"[" * 100_000),
    ("truncated", "must be a list of names", b'["a", '),
):
    _suffix = "labels.txt" if _name in ("binary", "empty", "too many") else "labels.json"
    byte_case(f"labels: {_name}", _message, _data, _suffix)
