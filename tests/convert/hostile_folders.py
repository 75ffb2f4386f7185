"""Hostile model folders, and the messages with which they must be refused."""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxvid
from tests.convert.hostile_checkpoints import SPECIAL, bind_socket, sparse_file

SIZES = {"width": 16, "depth": 1, "heads": 2, "image_size": 32, "num_classes": 5}
PREPROCESSING = {"num_frames": 8, "short_side": 36, "crop": 32, "mean": 0.5, "std": 0.5}
PREPROCESSING |= {"sampling": "segments"}
Build = Callable[[Path], None]
# name → builder, and a part of the message ("a|b": any of these).
CASES: dict[str, tuple[Build, str]] = {}


@functools.cache
def _valid_folder() -> tempfile.TemporaryDirectory:
    """Return a temporary folder with a valid model folder, `model`; write it once per process."""
    folder = tempfile.TemporaryDirectory()
    model = jaxvid.create_model("xvit_tiny", **SIZES)
    labels = [f"class {i}" for i in range(5)]
    path = Path(folder.name) / "model"
    jaxvid.save_model(model, path, preprocessing=PREPROCESSING, labels=labels)
    return folder


def build_valid(path: Path) -> None:
    shutil.copytree(Path(_valid_folder().name) / "model", path)


def case(name: str, message: str, change: Callable[[Path], None]) -> None:
    """Add a case: a valid folder with a change."""
    assert name not in CASES

    def build(path: Path) -> None:
        build_valid(path)
        change(path)

    CASES[name] = (build, message)


def text_case(name: str, message: str, data: bytes) -> None:
    """Add a case: different contents of `model.json`."""
    case(f"model.json: {name}", message, lambda p: (p / "model.json").write_bytes(data))


def card_case(name: str, message: str, /, **changes: Any) -> None:
    """Add a case: changed fields of `model.json`; `{"+": dict}` is merged into the old value."""

    def change(path: Path) -> None:
        card = json.loads((path / "model.json").read_text())
        for key, value in changes.items():
            merge = isinstance(value, dict) and "+" in value
            card[key] = card[key] | value["+"] if merge else value
        (path / "model.json").write_text(json.dumps(card))

    case(f"card: {name}", message, change)


# ---- sizes in the config: each with every kind of invalid value
for _field in (
    *("num_classes", "num_frames", "image_size", "patch_size", "width", "depth", "heads"),
    *("mlp_ratio", "shift_segment", "shift_div", "head_depth"),
):
    for _value in (10**9, 10**30, 0, -1, True, 1.5, "8", None, [8], {}, float("nan")):
        _message = "must be" if type(_value) is int else "expected type int"
        card_case(f"{_field}={_value!r}", f"{_field}=|{_message}", config={"+": {_field: _value}})
for _name, _message, _config in (
    ("dropout is NaN", "dropout=nan: must be", {"dropout": float("nan")}),
    ("dropout of 1e308", "must be 0 to 1", {"dropout": 1e308}),
    ("drop_path as text", "expected type float", {"drop_path": "0"}),
    ("remat as a number", "remat=1: expected type str", {"remat": 1}),
    ("temporal embedding of 1e9", "must be 0 to 4096", {"temporal_embedding_frames": 10**9}),
    ("shift_blocks as a number", "shift_blocks=5", {"shift_blocks": 5}),
    ("shift_blocks as text", "shift_blocks='abc'", {"shift_blocks": "abc"}),
    ("shift_blocks nested", "shift_blocks=", {"shift_blocks": [[0]]}),
    ("shift_blocks beyond the last block", "must be 0 to 0", {"shift_blocks": [10**9]}),
    ("1e12 parameters", "G parameters, at most 10 G", {"width": 32768, "depth": 128}),
    ("1e7 patches", "patches per frame, at most", {"image_size": 8192, "patch_size": 1}),
    ("huge patches", "G parameters", {"image_size": 8192, "patch_size": 8192, "width": 32768}),
    ("unknown name", "does not exist", {"name": "nothing"}),
    ("name as a list", "does not exist", {"name": ["xvit_tiny"]}),
    ("name is null", "does not exist", {"name": None}),
    ("name of 1 MB", "does not exist", {"name": "x" * 10**6}),
    ("unknown field", "has no option 'gears'", {"gears": 5}),
    ("field of 1 MB", "has no option", {"g" * 10**6: 5}),
    ("field of two lines", "has no option", {"a\nb": 5}),
    ("head as a list", "expected type str", {"head": ["mean"]}),
    ("unknown dtype", "must be one of", {"dtype": "float8"}),
    ("init of 1 MB", "must be one of", {"init": "x" * 10**6}),
    ("width that differs from params", "does not fit the model", {"width": 32}),
    ("more blocks than in params", "does not fit the model", {"depth": 2}),
):
    card_case(f"config: {_name}", _message, config={"+": _config})

# ---- other fields of model.json
for _name, _message, _changes in (
    ("config is null", "config is None, expected a dict", {"config": None}),
    ("config is a list", "config is [1], expected a dict", {"config": [1]}),
    ("config is empty", "export the model again", {"config": {}}),
    ("name is a number", "name is 5", {"name": 5}),
    ("provenance is a list", "provenance is [1]", {"provenance": [1]}),
    ("version as text", "has format version '1'", {"format_version": "1"}),
    ("newer version", "update jaxvid", {"format_version": 2}),
    ("version is a list", "has format version [[[...]]]", {"format_version": [[[[1]]]]}),
    ("version is huge", "has format version", {"format_version": 10**900}),
    ("files is a list", "files is [", {"files": ["a"]}),
    ("files is null", "files is None", {"files": None}),
    ("files is empty", "files is empty", {"files": {}}),
    ("size as text", "files has '5' for 'a'", {"files": {"a": "5"}}),
    ("size is negative", "files has -5 for 'a'", {"files": {"a": -5}}),
    ("size is a bool", "files has True for 'a'", {"files": {"a": True}}),
    ("size in floating point", "files has 5.0", {"files": {"a": 5.0}}),
    ("size is nested", "files has {", {"files": {"a": {"b": 1}}}),
    ("file outside params", "outside params", {"files": {"../model.json": 5}}),
    ("file outside params, below a folder", "outside params", {"files": {"a/../../x": 5}}),
    ("file with an absolute path", "outside params", {"files": {"/etc/passwd": 5}}),
    ("file with a null byte", "outside params", {"files": {"a\0b": 5}}),
    ("file without a name", "outside params", {"files": {"": 5}}),
    ("file name of two lines", "is damaged", {"files": {"a\nb": 5}}),
    ("file that is missing", "is damaged", {"files": {"nothing": 5}}),
    ("100,000 files", "100000 of 100000 files", {"files": {f"a{i}": 5 for i in range(10**5)}}),
    ("checksums is a list", "checksums is [1]", {"checksums": [1]}),
    ("checksum as text", "checksums has '5'", {"checksums": {"a": "5"}}),
    ("checksum of a file outside params", "outside params", {"checksums": {"../a": 5}}),
    ("checksum of a missing file", "have changed", {"checksums": {"nothing": 5}}),
    ("labels as text", "labels is 'one'", {"labels": "one"}),
    ("labels as a number", "labels is 5", {"labels": 5}),
    ("labels as a dict", "labels is {", {"labels": {"0": "a"}}),
    ("too few labels", "labels has 1 entries", {"labels": ["one"]}),
    ("labels that are lists", "expected a string", {"labels": [[1]] * 5}),
    ("labels that are null", "expected a string", {"labels": [None] * 5}),
    ("unknown activation", "activation is 'relu', expected softmax", {"activation": "relu"}),
    ("activation that is a list", "activation is ['x']", {"activation": ["x"]}),
    ("labels_source that is a number", "labels_source is 5", {"labels_source": 5}),
    ("labels_source that is a list", "labels_source is ['a']", {"labels_source": ["a"]}),
    ("labels_source of two lines", "expected one line", {"labels_source": "assumed: a\nb"}),
    ("labels_source of 1 MB", "at most 300 characters", {"labels_source": "a" * 10**6}),
    ("a million labels", "labels has 1000000 entries", {"labels": ["a"] * 10**6}),
    ("preprocessing is a list", "expected a dict or null", {"preprocessing": [8]}),
    ("preprocessing is text", "expected a dict or null", {"preprocessing": "mean"}),
    ("preprocessing is null", "preprocessing is missing", {"preprocessing": None}),
    ("preprocessing is empty", "preprocessing is missing", {"preprocessing": {}}),
):
    card_case(_name, _message, **_changes)
for _name, _value in (
    *(("num_frames", 10**9), ("num_frames", 0), ("num_frames", "8"), ("num_frames", True)),
    *(("crop", 10**9), ("crop", -1), ("crop", 1.5), ("crop", [32])),
    *(("short_side", 10**9), ("short_side", None), ("sampling_rate", 10**9)),
    *(("num_clips", 10**9), ("num_crops", 10**9), ("num_crops", 2)),
    *(("mean", float("nan")), ("mean", 1e300), ("mean", "0"), ("mean", [0.5] * 2)),
    *(("mean", [0.5, 0.5, "0"]), ("std", [1, 1, 0]), ("std", [[1], 1, 1]), ("mean", [None] * 3)),
    *(("std", 0), ("std", -1), ("std", 1e-300), ("std", float("inf")), ("std", {})),
    *(("sampling", 5), ("sampling", "x" * 10**6), ("resize", None), ("by_time", 1)),
    *(("gears", 5), ("x" * 10**6, 5), ("a\nb", 5), ("mean", 10**400)),
):
    card_case(
        f"preprocessing: {_name[:20]!r}={str(_value)[:20]}",
        "preprocessing|must be 1 to|must be one of|num_clips",
        preprocessing={"+": {_name: _value}},
    )

# ---- the file model.json
for _name, (_build, _message) in SPECIAL.items():

    def _replace(path: Path, build: Build = _build) -> None:
        (path / "model.json").unlink()
        build(path / "model.json")

    _message = "is not a model folder" if "does not exist" in _message else _message
    case(f"model.json: {_name}", _message, _replace)
case(
    "model.json: 1 TB",
    "is larger than the limit of 32 MB",
    lambda p: sparse_file(2**40)(p / "model.json"),
)
for _name, _message, _data in (
    ("empty", "cannot be read", b""),
    ("text", "cannot be read", b"hello"),
    ("truncated", "cannot be read", b'{"format_version": 1, "na'),
    ("number", "cannot be read", b"5"),
    ("null", "cannot be read", b"null"),
    ("list", "cannot be read", b"[1]"),
    ("text in JSON", "cannot be read", b'"format_version"'),
    ("no version", "cannot be read (KeyError('format_version'))", b"{}"),
    ("only a version", "cannot be read (no 'name')", b'{"format_version": 1}'),
    ("lists 1,000,000 deep", "cannot be read", b"[" * 10**6),
    ("objects 1,000,000 deep", "cannot be read", b'{"a":' * 10**6),
    (
        "duplicate key",
        "duplicate name 'format_version'",
        b'{"format_version":1,"format_version":1}',
    ),
    ("not UTF-8", "cannot be read", bytes(range(128, 255))),
    ("null bytes", "cannot be read", bytes(1000)),
    ("31 MB of spaces", "cannot be read", b" " * 31_000_000),
    ("number of 10,000 digits", "cannot be read", b'{"format_version": ' + b"9" * 10_000 + b"}"),
    ("text after the end", "cannot be read", b'{"format_version": 1} {}'),
):
    text_case(_name, _message, _data)


# ---- params
def params_case(name: str, message: str, change: Callable[[Path], None]) -> None:
    """Add a case: a valid folder with a change in `params`."""
    case(f"params: {name}", message, lambda p: change(p / "params"))


def _replace_folder(build: Build) -> Callable[[Path], None]:
    """Return a function that replaces the whole folder."""

    def change(path: Path) -> None:
        shutil.rmtree(path)
        build(path)

    return change


def _largest(path: Path) -> Path:
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _replace_largest(build: Build) -> Callable[[Path], None]:
    """Return a function that replaces the largest file of a folder."""

    def change(path: Path) -> None:
        largest = _largest(path)
        largest.unlink()
        build(largest)

    return change


def _add_huge_file(path: Path) -> None:
    """Add a file of a terabyte to `params`, and list it in `model.json`."""
    sparse_file(2**40)(path / "params" / "huge")
    card = json.loads((path / "model.json").read_text())
    card["files"]["huge"], card["checksums"]["huge"] = 2**40, 0
    (path / "model.json").write_text(json.dumps(card))


def _add_many_files(path: Path) -> None:
    for i in range(10_001):
        os.mknod(path / str(i))


for _name, (_build, _message) in SPECIAL.items():
    if _name != "folder":
        params_case(_name, "is damaged", _replace_folder(_build))
params_case("file", "is damaged", _replace_folder(lambda p: p.write_bytes(b"hello")))
params_case("empty", "is damaged", _replace_folder(lambda p: p.mkdir()))
params_case(
    "link to itself", "is damaged|cannot be read", _replace_folder(lambda p: p.symlink_to(p))
)
params_case(
    "link to its parent",
    "is damaged|not a regular file",
    _replace_folder(lambda p: p.symlink_to("..")),
)
params_case("fifo inside", "not a regular file", lambda p: os.mkfifo(p / "fifo"))
params_case("socket inside", "not a regular file", lambda p: bind_socket(p / "socket"))
params_case("link to a device", "not a regular file", lambda p: (p / "x").symlink_to("/dev/zero"))
params_case("link to a folder", "not a regular file", lambda p: (p / "x").symlink_to("/"))
params_case("link to itself inside", "Too many levels", lambda p: (p / "x").symlink_to("x"))
params_case("broken link inside", "No such file", lambda p: (p / "x").symlink_to("nothing"))
params_case("10,001 files", "has more than 10000 files", _add_many_files)
params_case("fifo in place of weights", "not a regular file", _replace_largest(os.mkfifo))
params_case("folder in place of weights", "is damaged", _replace_largest(lambda p: p.mkdir()))
params_case(
    "device in place of weights",
    "not a regular file",
    _replace_largest(lambda p: p.symlink_to("/dev/zero")),
)
params_case("weights of a terabyte", "is damaged", _replace_largest(sparse_file(2**40)))
params_case("truncated weights", "is damaged", lambda p: os.truncate(_largest(p), 10))
case("params: additional file of a terabyte", "MB of files for weights", _add_huge_file)

# ---- the folder itself
for _name, _build, _message in (
    ("missing", lambda p: None, "does not exist"),
    ("empty", lambda p: p.mkdir(), "is not a model folder"),
    ("file", lambda p: p.write_bytes(b"hello"), "model.json|Not a directory"),
    ("fifo", os.mkfifo, "Not a directory"),
    ("device", lambda p: p.symlink_to("/dev/zero"), "Not a directory"),
    ("symlink loop", lambda p: p.symlink_to(p.name), "Too many levels|is not a model folder"),
    ("broken link", lambda p: p.symlink_to("nothing"), "is not a model folder"),
):
    CASES[f"folder: {_name}"] = (_build, _message)
