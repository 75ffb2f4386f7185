"""Interpret the pickle in a PyTorch file without running or trusting anything in it.

`torch.load` is not used: it allocates as much memory as a pickle declares, and reads beyond the end
of a storage that is too short for its tensor.
"""

import dataclasses
import io
import pickletools
import re
from typing import Any

from jaxvid.errors import short_repr

MAX_OPCODES = 500_000  # per pickle; a tensor takes about 30

_STORAGES = {  # prefix of the name of a storage class → dtype
    **{"Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64"},
    **{"Bool": "bool", "Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32"},
    **{"Long": "int64", "ComplexFloat": "complex64", "ComplexDouble": "complex128"},
    **{"QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32", "Untyped": "uint8"},
}
# Functions and classes that a state_dict or an optimizer's state may name, in addition to the
# patterns in `_find_global`.
_HARMLESS = {
    *("collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.complex"),
    *("builtins.bytearray", "_codecs.encode", "torch.device", "torch.Size", "torch.Tensor"),
    *("torch.nn.parameter.Parameter", "torch.serialization._get_layout"),
    *("torch._tensor._rebuild_from_type_v2", "torch.storage.TypedStorage"),
}
# Operations that push their argument.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
# Operation → constant that it pushes.
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclasses.dataclass(frozen=True)
class _Global:
    """A function or class that a pickle names. It is never called."""

    name: str


@dataclasses.dataclass(frozen=True)
class Opaque:
    """An object that is not a dense tensor, with its kind for messages."""

    kind: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A storage as a pickle declares it: key in the file, dtype and number of elements."""

    key: str
    dtype: str
    numel: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as a pickle declares it: a view of a storage. Offset and strides are in elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def describe_kind(value: object) -> str:
    """Return the kind of a value in a pickle, for messages, e.g. `tensor` or `int`."""
    if isinstance(value, Tensor):
        return "tensor"
    return value.kind if isinstance(value, Opaque) else type(value).__name__


def interpret(stream: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """Return the value of a pickle, with tensors as `Tensor` and other objects as `Opaque`.

    Nothing is imported or called. Python's unpickler is not used: it would allocate a table as long
    as the largest memo index in the pickle, and hash nested keys of any size.

    Args:
        stream: The stream, at the start of a pickle. Afterwards, it is at the end of the pickle.

    Returns:
        The value, and the storages that the pickle declares, by key.

    Raises:
        ValueError: The pickle is damaged or too long, would run code, or has a dict with a repeated
            key or a key that is neither text nor an integer.
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
    """State of the pickle interpreter: stack, stacks saved at marks, memo and storages."""

    def __init__(self):
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

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
        """Run one operation, named as in `pickletools`."""
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
            items = self.pop_mark()  # before `self.stack` is evaluated, which this call replaces
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
            raise ValueError(f"its pickle is damaged: expected {expected.__name__}")
        return self.stack[-1]

    def _set_items(self, target: dict, items: list) -> None:
        if len(items) % 2:
            raise ValueError("its pickle is damaged: a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 2**63):
                raise ValueError(f"it has a key of the type {type(key).__name__}")
            if key in target:
                raise ValueError(f"it has the key {short_repr(key)} twice")
            target[key] = value

    def _find_storage(self, reference: Any) -> Storage:
        if not isinstance(reference, tuple) or len(reference) not in (5, 6):
            raise ValueError("its pickle is damaged: an invalid reference to a storage")
        tag, kind, key, _, numel = reference[:5]
        match = isinstance(kind, _Global) and re.fullmatch(r"torch\..*?(\w+)Storage", kind.name)
        is_view = any(part is not None for part in reference[5:])
        if tag != "storage" or not match or not isinstance(key, str) or is_view:
            raise ValueError("its pickle is damaged: an invalid reference to a storage")
        storage = Storage(key, _STORAGES.get(match[1], match[1]), numel)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"the storage {short_repr(key)} is declared in two ways")
        return storage


def _find_global(name: str) -> _Global:
    """Return the function or class of a name that may occur in a state_dict.

    Raises:
        ValueError: The name is unknown; a pickle could use it to run code.
    """
    known = (
        r"torch\._utils\._rebuild_\w+|torch\.(cuda\.|storage\.)?\w+Storage"
        r"|torch\.([a-z]+\d\w*|bool|per_\w+)"  # dtypes and quantisation schemes
    )
    if name in _HARMLESS or re.fullmatch(known, name):
        return _Global(name)
    raise ValueError(
        f"it names {short_repr(name)}, which is not part of weights and would be run as code on "
        "loading"
    )


def _apply(function: Any, arguments: Any) -> Any:
    """Return the result of a call in a pickle, without calling anything."""
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise ValueError("its pickle is damaged: a call of something that is not a function")
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
        if len(arguments) < 4 or not isinstance(arguments[0], Storage):
            raise ValueError("its pickle is damaged: a tensor without a storage")
        storage, offset, shape, strides = arguments[:4]
        if not (isinstance(shape, tuple) and isinstance(strides, tuple)):
            raise ValueError("its pickle is damaged: a tensor without a shape")
        dtype = storage.dtype
        if name == "_rebuild_tensor_v3":
            if len(arguments) < 7 or not isinstance(arguments[6], _Global):
                raise ValueError("its pickle is damaged: a tensor without a dtype")
            dtype = arguments[6].name.removeprefix("torch.")
        # The remaining arguments are set for tensors with lazy conjugation or negation.
        if any(arguments[7:] if name == "_rebuild_tensor_v3" else arguments[6:]):
            return Opaque("tensor with a conj or neg bit")
        return Tensor(storage, dtype, offset, shape, strides)
    kinds = {"_rebuild_qtensor": "quantised tensor", "_rebuild_from_type_v2": "tensor subclass"}
    return Opaque(kinds.get(name, name.removeprefix("_rebuild_").replace("_", " ")))
