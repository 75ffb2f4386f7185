"""Hostile data folders, packs and HDF5 files give one-line errors in bounded time and memory."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from jaxvid.data import check
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.prepare import prepare
from jaxvid.data.sources import open_dataset
from jaxvid.data.synthetic_motion import write_clip
from jaxvid.errors import InputError
from tests.data.test_sources import FRAMES, section
from tests.data.test_video_fuzz import mutate

ROOT = Path(__file__).parents[2]
MAX_CPU_SECONDS = 2.0  # per case; wall time would depend on the load of the machine
MAX_EXTRA_BYTES = 500e6  # peak memory of a case above the memory in use before it
MAX_WALL_SECONDS = 120  # after this time, a case counts as hanging

# Name → contents that replace those of each file in TARGETS.
CONTENTS = {
    "nothing": b"",
    "line ends": b"\n\r\n\r\n",
    "spaces": b" \t \n" * 1000,
    "a null byte": b"\0",
    "null bytes": bytes(2**20),
    "utf-16": "a.mp4 0\nb.mp4 1\n".encode("utf-16"),
    "utf-16-be": "a.mp4 0\nb.mp4 1\n".encode("utf-16-be"),
    "utf-32": "a.mp4 0\nb.mp4 1\n".encode("utf-32"),
    "byte-order mark": b"\xef\xbb\xbf",
    "latin-1": "é.mp4 0\nü.mp4 1\n".encode("latin-1"),
    "noise": np.random.default_rng(0).bytes(10_000),
    "noise without null bytes": np.random.default_rng(0).bytes(10**6).replace(b"\0", b"x"),
    "one long line": b"x" * 20_000_000,
    "long words": b"x" * 5000 + b" 0\n" + b"y" * 5000 + b",1\n",
    "separators": b" , " * 300_000 + b"0\n",
    "spaces before a word": b"x" + b" " * 9000 + b"y\n",
    "a large quoted field": b'"' + b"x" * 200_000 + b'",1\n',
    "an open quotation mark": b'a.mp4,"0\n' + b"b.mp4,1\n" * 50_000,
    "many lines": b"a\n" * 300_000,
    "header alone": b"path,label\n",
    "kinetics header alone": b"label,youtube_id,time_start,time_end,split\n",
    "brackets": b"[" * 200_000,
    "braces": b'{"a":' * 200_000,
    "null": b"null",
    "not a number": b"NaN",
    "infinity": b"1e999",
    "large number": b"9" * 10_000,
    "list": b"[]",
    "object": b"{}",
    "string": b'"x"',
    "lone surrogates": b'["\\ud800", "\\udfff"]',
    "wrong types": b'[null, 1, {"id": {}}, [[]]]',
    "numbers of the wrong size": b"a.mp4 99999999999999999999\nb.mp4 -1\n",
    "mp4": b"\x00\x00\x00 ftypisom\x00\x00\x02\x00isomiso2avc1mp41" + bytes(100),
    "zip": b"PK\x03\x04" + bytes(100),
    "escapes": b"\x1b[2J\x07 0\n",
}
# Name → function that creates something other than a readable file of normal size at a path. It
# replaces each file in TARGETS.
NODES = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "full device": lambda path: path.symlink_to("/dev/full"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)),
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "broken link": lambda path: path.symlink_to("nowhere"),
    "link to a long name": lambda path: path.symlink_to("x" * 4000),
    "memory": lambda path: path.symlink_to("/proc/self/mem"),
    "sparse gigabytes": lambda path: (path.write_bytes(b"a.mp4 0\n"), os.truncate(path, 2**31)),
    "locked": lambda path: (path.write_bytes(b"x"), path.chmod(0)),
}
# File in a data folder → kind of the folder.
TARGETS = {
    "train.csv": "list",
    "labels.txt": "list",
    "labels.json": "list",
    "train.json": "something",
    "annotations/train.txt": "h5",
    "annotations/train_fps.txt": "h5",
    "seq_h5/train/a.h5": "h5",
    "dataset_info.json": "pack",
    "features.json": "pack",
    "label.labels.txt": "pack",
    "train_index.csv": "pack",
    "train_offsets.bin": "pack",
    "jaxvid-train.array_record-00000-of-00001": "pack",
}
SOURCES = {  # kind of folder → `data.source`
    "list": "folder",
    "something": "folder",
    "h5": "xvit_h5",
    "pack": "pack",
    "classes": "class_folders",
}
KINETICS = b"label,youtube_id,time_start,time_end,split\n"
LISTS = {  # name → contents that replace those of train.csv only
    "twice": b"a.mp4 0\na.mp4 1\n",
    "no label": b"a.mp4\n",
    "windows": b"clips\\a.mp4,0\r\nclips\\b.mp4,1\r\n",
    "drive": b"C:\\clips\\a.mp4,0\n",
    "mixed separators": b"a.mp4 0\nb.mp4;1\nc.mp4\t1\n",
    "semicolons": b"a.mp4;0\n",
    "labels first": b"0 a.mp4\n1 b.mp4\n",
    "fractions": b"a.mp4 0.0\nb.mp4 1.0\n",
    "other digits": "a.mp4 ١\n".encode(),
    "out of range": b"a.mp4 2\n",
    "folder": b". 0\n",
    "parent": b"../../../../etc/passwd 0\n",
    "device": b"/dev/zero 0\n",
    "address": b"http://localhost/a.mp4 0\n",
    "null byte": b"a\0.mp4 0\n",
    "long name": b"a" * 300 + b".mp4 0\n",
    "deep path": b"a/" * 3000 + b".mp4 0\n",
    "quotes": b'"""a"".mp4" 0\n',
    "many missing": b"".join(b"%d.mp4 0\n" % i for i in range(40_000)),
    "kinetics times": KINETICS + b"x,a,one,two,train\n",
    "kinetics huge times": KINETICS + b"x,a," + b"9" * 5000 + b",1,train\n",
    "kinetics class": KINETICS + b"z,a,1,2,train\n",
    "kinetics short row": KINETICS + b"x,a\n",
    "kinetics null byte": KINETICS + b"x,a\0,1,2,train\n",
    "kinetics path": KINETICS + b"x,../../a,1,2,train\n",
    "kinetics long field": KINETICS + b"x," + b"a" * 140_000 + b",1,2,train\n",
    "kinetics open quotation mark": KINETICS + b'x,"' + b"a\n" * 100_000,
    "kinetics twice": KINETICS + b"x,a,1,2,train\n" * 2,
    "kinetics many missing": KINETICS + b"".join(b"x,%d,1,2,train\n" % i for i in range(20_000)),
}
NUM_MUTATIONS = 8  # per file of a pack or of an HDF5 folder


def change_json(name, *changes):
    """Return a function that changes a JSON file of a folder; a change is `(*keys, value)`."""

    def build(folder):
        tree = json.loads((folder / name).read_text())
        for *keys, last, value in changes:
            part = tree
            for key in keys:
                part = part[key]
            part[last] = value
        (folder / name).write_text(json.dumps(tree))

    return build


def make_h5(**options):
    """Return a function that replaces the HDF5 file of a video; `options` define its data set."""

    def build(folder):
        with h5py.File(folder / "seq_h5" / "train" / "a.h5", "w") as file:
            file.create_dataset("x", **options)

    return build


def make_class(name: bytes, video: bytes = b"1.mp4"):
    """Return a function that adds a class folder with a video to a data folder."""

    def build(folder):
        path = os.fsencode(folder) + b"/train/" + name
        os.makedirs(path, exist_ok=True)
        with open(path + b"/" + video, "wb") as file:
            file.write(b"x")

    return build


def make_cases() -> dict[str, tuple]:
    """Return name → kind of folder, and function that damages an intact folder of this kind."""
    cases = {}
    for target, kind in TARGETS.items():
        for name, data in CONTENTS.items():
            cases[f"{target}: {name}"] = kind, lambda f, t=target, d=data: replace(f / t, d)
        for name, make in NODES.items():
            cases[f"{target}: {name}"] = kind, lambda f, t=target, m=make: replace(f / t, m)
        cases[f"{target}: missing"] = kind, lambda f, t=target: replace(f / t, lambda _: None)
        if kind in ("pack", "h5"):
            for seed in range(NUM_MUTATIONS):
                change = lambda f, t=target, s=seed: mutate_file(f / t, s)  # noqa: E731
                cases[f"{target}: damage {seed}"] = kind, change
    for name, data in LISTS.items():
        cases[f"list: {name}"] = "list", lambda f, d=data: replace(f / "train.csv", d)
    info = "dataset_info.json"
    for value in ("{", "{X}", "/etc/passwd", "../{SPLIT}", "", 7, None, "x" * 10**5):
        build = change_json(info, ("splits", 0, "filepathTemplate", value))
        cases[f"template {str(value)[:20]!r}"] = "pack", build
    for value in ("many", [], ["-1"], ["9" * 19], ["1", "1"], [None], 7):
        cases[f"lengths {value!r}"] = (
            "pack",
            change_json(info, ("splits", 0, "shardLengths", value)),
        )
    for field, value in (("splits", []), ("splits", {}), ("fileFormat", "tfrecord"), ("name", 7)):
        cases[f"{field} {value!r}"] = "pack", change_json(info, (field, value))
    for options in (
        {"shape": (2**40,), "dtype": "u1", "chunks": (9,)},
        {"shape": (2, 2**40), "dtype": "u1", "chunks": (1, 9)},
        {"shape": (2,), "dtype": "V2000000000", "chunks": (1,)},
        {"shape": (), "dtype": "f8"},
        {"shape": (3, 3, 3, 3), "dtype": "f8"},
        {"shape": (0,), "dtype": "u1"},
        {"data": h5py.Empty("u1")},
        {"shape": (3,), "dtype": h5py.string_dtype()},
        {"shape": (3,), "dtype": h5py.ref_dtype},
        {"shape": (3,), "dtype": [("a", "f8"), ("b", "S3")]},
    ):
        cases[f"h5 {options}"] = "h5", make_h5(**options)
    for name in (
        b"a\nb",
        b"a\xe9",
        b"\x1b[2J",
        b" a ",
        b"a" * 255,
        b".hidden",
        b"labels.txt",
        b"a,b",
    ):
        cases[f"class {name[:20]!r}"] = "classes", make_class(name)
    for name in (b"a\nb.mp4", b"\xff.mp4", b"a\x1b.mp4", b" .mp4", b".mp4", b"x" * 251 + b".mp4"):
        cases[f"video {name[:20]!r}"] = "classes", make_class(b"x", name)
    for name, make in NODES.items():
        cases[f"class folder: {name}"] = "classes", lambda f, m=make: m(f / "train" / "new")
        cases[f"class's video: {name}"] = "classes", lambda f, m=make: m(f / "train/x/new.mp4")
        cases[f"class folders: {name}"] = "classes", lambda f, m=make: replace(f / "train", m)
    return cases


def replace(path: Path, content) -> None:
    """Replace a file or folder.

    Args:
        path: The file or folder; it may be missing.
        content: Bytes of the new file, or a function that creates something at `path`.
    """
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


def mutate_file(path: Path, seed: int) -> None:
    path.write_bytes(mutate(path.read_bytes(), np.random.default_rng([7, seed])))


def make_intact(folder: Path) -> None:
    """Make an intact data folder of each kind."""
    for kind in ("list", "something", "classes"):
        (folder / kind).mkdir(parents=True)
    for name in ("list/a.mp4", "list/b.mp4", "something/1.mp4", "something/2.mp4"):
        write_clip(folder / name, FRAMES)
    (folder / "list" / "train.csv").write_text("a.mp4 0\nb.mp4 1\n")
    (folder / "list" / "labels.txt").write_text("x\ny\n")
    entries = [{"id": "1", "template": "x"}, {"id": "2", "template": "[y]"}]
    (folder / "something" / "train.json").write_text(json.dumps(entries))
    (folder / "something" / "labels.json").write_text('["x", "y"]')
    for name in "xy":
        (folder / "classes" / "train" / name).mkdir(parents=True)
        shutil.copy(folder / "list" / "a.mp4", folder / "classes" / "train" / name / "1.mp4")
    for kind, layout in (("pack", "arrayrecord"), ("h5", "h5")):
        prepare([folder / "list"], folder / kind, Settings(layout), workers=1)
        shutil.rmtree(folder / kind / ".parts")
        (folder / kind / "report.json").unlink()


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024


def open_everything(kind: str, folder: Path) -> list[str]:
    """Open a folder as training and `jaxvid.data.check` do; return the error messages."""
    errors, data = [], section(SOURCES[kind], folder)
    for missing in ("error", "keep"):
        try:
            records = open_dataset(
                dataclasses.replace(data, missing=missing), 2, ("train",)
            ).records["train"]
        except InputError as error:
            errors.append(str(error))
            continue
        for record in [records[i] for i in range(min(3, len(records)))]:
            try:
                with record.open() as reader:
                    reader.get_frames(np.array([0, reader.num_frames - 1]))
            except InputError as error:  # a DecodeError, or an address that needs a package
                errors.append(str(error))
    if kind in ("list", "something", "classes"):
        try:
            check.gather([folder], labelled=False)
        except InputError as error:
            errors.append(str(error))
    return errors


def run_case(intact: Path, folder: Path, name: str) -> tuple[list[str], float, float]:
    """Run a case in a worker process; return errors, CPU seconds and additional peak bytes."""
    kind, change = make_cases()[name]
    folder = Path(shutil.copytree(intact / kind, folder))
    os.chdir(folder)  # the path of a socket must be short
    change(folder)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak memory
    before, start = peak_bytes(), time.process_time()
    errors = open_everything(kind, folder)
    result = errors, time.process_time() - start, peak_bytes() - before
    os.chdir(intact)
    shutil.rmtree(folder)
    return result


def names_file(message: str, folder: Path) -> bool:
    """Return whether a message names a file of the folder, or a device or address in LISTS."""
    return str(folder) in message or message.startswith(("/dev/zero: ", "http://localhost/a.mp4: "))


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_hostile_files_are_refused_in_one_line_within_time_and_memory(tmp_path):
    make_intact(tmp_path / "intact")
    names, problems, num_refused = list(make_cases()), [], 0
    assert len(names) >= 250
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        for kind in SOURCES:  # workers import TFDS and h5py before cases are timed
            for _ in range(4):
                pool.submit(open_everything, kind, tmp_path / "intact" / kind).result()
        jobs = {
            name: pool.submit(run_case, tmp_path / "intact", tmp_path / str(i), name)
            for i, name in enumerate(names)
        }
        for name, job in jobs.items():
            try:
                errors, seconds, extra = job.result(timeout=MAX_WALL_SECONDS)
            except Exception as error:
                problems.append(f"{name}: {error!r}")
                continue
            num_refused += bool(errors)
            problems += [f"{name}: {line!r}" for line in errors if "\n" in line]
            problems += [
                f"{name}: names no file: {x}" for x in errors if not names_file(x, tmp_path)
            ]
            if seconds > MAX_CPU_SECONDS or extra > MAX_EXTRA_BYTES:
                problems.append(f"{name}: {seconds:.1f} s, {extra / 1e6:.0f} MB")
    print(f"{len(names)} cases, {num_refused} refused")
    assert not problems, "\n".join(problems)
    assert num_refused > len(names) / 2


def read_missing_files(folder: Path, kind: str) -> tuple[str, float, float]:
    """Read a list of a million missing files in a worker process.

    Returns:
        The error message, CPU seconds and additional peak memory in bytes.
    """
    make_line = {
        "list": lambda i: f"class_{i % 400}/video_{i}.mp4 {i % 2}\n",
        "kinetics": lambda i: f"{'xy'[i % 2]},id{i},1,11,train\n",
    }[kind]
    with open(folder / "train.csv", "w") as file:
        file.write(KINETICS.decode() if kind == "kinetics" else "")
        file.writelines(map(make_line, range(10**6)))
    (folder / "labels.txt").write_text("x\ny\n")
    Path("/proc/self/clear_refs").write_text("5")
    before, start = peak_bytes(), time.process_time()
    with pytest.raises(InputError) as error:
        open_dataset(section("folder", folder), 2, ("train",))
    return str(error.value), time.process_time() - start, peak_bytes() - before


@pytest.mark.full
@pytest.mark.parametrize("kind", ["list", "kinetics"])
def test_a_million_missing_files_are_reported_in_seconds(tmp_path, kind):
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        message, seconds, extra = pool.submit(read_missing_files, tmp_path, kind).result(
            timeout=250
        )
    assert "train.csv:" in message
    assert "and 15995 more (the rest of the list was not checked)" in message
    assert seconds < 20
    assert extra < MAX_EXTRA_BYTES


# Cases that also run with the command-line programs.
COMMAND_CASES = ("train.csv: pipe", "train.csv: utf-16", "train.csv: latin-1", "list: windows")
COMMAND_CASES += (
    "labels.txt: noise",
    "train.json: brackets",
    "class b'a\\nb'",
    "video b'\\xff.mp4'",
)


def run_command(intact: Path, folder: Path, name: str, program: str) -> None:
    """Check that a program prints no traceback, and one error line if its exit code is 2."""
    kind, change = make_cases()[name]
    folder = Path(shutil.copytree(intact / kind, folder))
    change(folder)
    command = [sys.executable, "-m", f"jaxvid.data.{program}"]
    outputs = ["--input", folder, "--output", folder.parent / f"{folder.name}-out"]
    command += [folder] if program == "check" else outputs
    result = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=MAX_WALL_SECONDS
    )
    assert result.returncode in (0, 2, 3), (name, result.stderr)
    assert "Traceback" not in result.stderr, (name, result.stderr)
    if result.returncode == 2:
        assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1, name


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("program", ["check", "prepare"])
def test_programs_refuse_hostile_files_in_one_line(tmp_path, program):
    make_intact(tmp_path / "intact")
    for i, name in enumerate(COMMAND_CASES):
        run_command(tmp_path / "intact", tmp_path / str(i), name, program)
