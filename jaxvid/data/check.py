"""Reads every frame of every video of a list and says what is broken or odd.

    python -m jaxvid.data.check LIST_OR_FOLDER [--json OUT]

Ends with status 0 where every video can be read, 3 where some cannot, 2 where the input is
unusable.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from jaxvid import entry_point

    entry_point.run("jaxvid.data.check")

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxvid import progress
from jaxvid.atomic import check_output, write_json
from jaxvid.data.annotations import (
    SPLITS,
    find_split,
    names_classes,
    read_class_folders,
    read_labels,
    read_records,
)
from jaxvid.data.folder_scan import Skipped
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.data.kinetics_ssv2 import is_kinetics
from jaxvid.data.records import MAX_LIST_BYTES, Record, file_state
from jaxvid.errors import InputError, printable
from jaxvid.files import check_regular

SOME_BROKEN = 3  # exit status
MAX_SECONDS = 3600.0  # for one video, however long
CLIP_FRAMES = 16  # a video with fewer is too short for a clip
CHUNK_BYTES = 128 * 2**20  # of decoded frames that are held at once


@dataclasses.dataclass
class Finding:
    """What is known of a video after reading it.

    Attributes:
        id: Its id.
        split: Its list.
        num_frames: Frames in it; 0: it cannot be opened.
        fps: Frames a second; None: unknown.
        odd: What is unusual, though it can be read.
        broken: Why it cannot be read; None: it can.
        readable: Frames that can be read.
        size: Of the file in bytes; -1: there is none.
    """

    id: str
    split: str
    num_frames: int = 0
    fps: float | None = None
    odd: tuple[str, ...] = ()
    broken: str | None = None
    readable: int = 0
    size: int = -1


def gather(
    paths: Sequence[str | Path],
    prefix: str = "",
    *,
    labelled: bool = True,
    skipped: Skipped | None = None,
) -> tuple[dict[str, list[Record]], list[str]]:
    """Finds the videos of lists and folders, whether the files are there or not.

    Args:
        paths: Lists, named after their splits, or folders: those with lists in them (`train.csv`,
            `val.csv`, `test.csv`, or the official ones), and those with a folder a class.
        prefix: What paths in lists are relative to; empty: the list's folder.
        labelled: Whether every video must have a label.
        skipped: Counts what is in class folders and is not listed.

    Returns:
        Split → records, and the names of the classes; their numbers where nothing names them.

    Raises:
        InputError: A list or folder is missing, malformed or empty; two are of the same split.
    """
    records, names, where = {}, None, None
    for path in map(Path, paths):
        found, labels = _gather_one(path, prefix, labelled, skipped)
        for split in found:
            if split in records:
                raise InputError(f"{path}: split {split!r} is given twice; rename one of the lists")
        records.update(found)
        if labels is not None and names is not None and labels != names:
            raise InputError(f"{path}: its classes are named otherwise than {where}'s")
        if labels is not None:
            names, where = labels, path
    highest = max(record.label for split in records.values() for record in split)
    if names is None:
        names = [str(i) for i in range(highest + 1)]
    elif highest >= len(names):
        raise InputError(f"{where}: label {highest} is out of range: there are {len(names)} names")
    return records, names


def _gather_one(
    path: Path, prefix: str, labelled: bool, skipped: Skipped | None
) -> tuple[dict[str, list[Record]], list[str] | None]:
    if not os.path.isdir(path):
        with contextlib.suppress(FileNotFoundError):  # reported by who reads it
            check_regular(path, MAX_LIST_BYTES)
        folder, lists = path.parent, {_split_of(path): path}
    else:
        folder, found = path, {split: find_split(path, split) for split in SPLITS}
        lists = {split: file for split, file in found.items() if os.path.lexists(file)}
    if not lists:
        splits = tuple(split for split in SPLITS if os.path.isdir(path / split))
        labels, records = read_class_folders(path, splits or ("train",), skipped)
        return records, labels
    named = names_classes(folder) or (labelled and any(map(is_kinetics, lists.values())))
    labels = read_labels(folder)[0] if named else None
    options = {"prefix": prefix, "missing": "keep", "labelled": labelled}
    return {split: read_records(file, labels, **options) for split, file in lists.items()}, labels


def note_skipped(skipped: Skipped) -> None:
    """Print one line about what a scan of class folders left out, if it left out anything."""
    if left_out := str(skipped):
        print(f"skipped in class folders: {left_out}", file=sys.stderr)


def _split_of(path: Path) -> str:
    split = path.stem.removeprefix("something-something-v2-")
    if not split.isidentifier():
        raise InputError(f"{path}: its name is its split's, in letters; rename it to train.csv")
    return "val" if split in ("validate", "validation") else split


def examine(
    record: Record,
    split: str,
    use: Callable[[np.ndarray], None],
    num: int = 0,
    color_matrix: str = "tagged",
) -> Finding:
    """Reads a video to the end.

    Args:
        record: The video.
        split: Its list.
        use: Is called with its frames `(t, h, w, c)` uint8, some at a time, in order.
        num: Frames to read, evenly spaced; 0: all.
        color_matrix: Of their conversion to RGB, as `decode.Video` has it.

    Returns:
        What was found. If it is broken, what `use` was given is not all of it.
    """
    finding = Finding(record.id, split)
    if state := file_state(record.path):
        finding.broken = f"{record.path} {state}"
        finding.size = 0 if state == "is empty" else -1
        return finding
    finding.size = record.path.stat().st_size
    try:
        reader = VideoFile(record.path, max_seconds=MAX_SECONDS)
    except DecodeError as error:
        finding.broken = str(error)
        return finding
    with reader:
        reader.color_matrix = color_matrix
        finding.num_frames = finding.readable = reader.num_frames
        finding.fps = reader.fps
        try:
            for frames in iter_frames(reader, spread(reader.num_frames, num)):
                use(frames)
        except DecodeError as error:
            finding.broken = str(error)
            with contextlib.suppress(DecodeError):  # no time left to count
                finding.readable = 0
                finding.readable = reader.count_readable()
        short = [f"shorter than a clip of {CLIP_FRAMES} frames"]
        finding.odd = (*reader.oddities, *(short if reader.num_frames < CLIP_FRAMES else []))
    return finding


def spread(length: int, num: int) -> np.ndarray:
    """The frames to read: all, or `num` of them, evenly spaced, where there are more."""
    if not num or num >= length:
        return np.arange(length)
    return np.rint(np.linspace(0, length - 1, num)).astype(int)


def iter_frames(reader: VideoFile, indices: np.ndarray) -> Iterator[np.ndarray]:
    """Reads frames as many at a time as `CHUNK_BYTES` hold: all at once, unless they are large."""
    if len(indices) < reader.num_frames and reader.times is not None:  # what lies between is left
        step = max(1, CHUNK_BYTES // reader.get_frames(indices[:1]).nbytes)
        for start in range(0, len(indices), step):
            yield reader.get_frames(indices[start : start + step])
        return
    chunk = []
    for frame in reader.iter_frames(indices):
        if chunk and (len(chunk) + 1) * frame.nbytes > CHUNK_BYTES:
            yield np.stack(chunk)
            chunk = []
        chunk.append(frame)
    yield np.stack(chunk)


def map_in_order(function: Callable, items: Iterable, workers: int) -> Iterator:
    """Calls a function in threads; yields results in order, a few calls ahead of what is taken."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        queue = collections.deque()
        try:
            for item in items:
                queue.append(pool.submit(function, item))
                if len(queue) > 2 * workers:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Progress:
    """Videos done, and the bytes that were read or written for them.

    Args:
        total: Number of videos.
        title: What is being done.
    """

    def __init__(self, total: int, title: str):
        self._progress, self._bytes = progress.Progress(total, title=title, unit="video"), 0

    def advance(self, num_bytes: int) -> None:
        """Counts a video."""
        self._bytes += max(num_bytes, 0)
        self._progress.advance(1, f"{self._bytes / 1e6:.1f} MB")

    def close(self) -> None:
        """Clears the bar."""
        self._progress.close()


def make_report(findings: Sequence[Finding], seconds: float) -> dict:
    """What the console and the JSON file say; `seconds` is the time that reading took."""
    broken = [
        {"id": f.id, "split": f.split, "reason": f.broken, "readable": f.readable,
         "num_frames": f.num_frames}
        for f in findings
        if f.broken
    ]  # fmt: skip
    odd = [
        {"id": f.id, "split": f.split, "what": list(f.odd)}
        for f in findings
        if f.odd and not f.broken
    ]
    return {
        "videos": len(findings),
        "readable": len(findings) - len(broken),
        "frames": sum(f.num_frames for f in findings if not f.broken),
        "bytes": sum(max(f.size, 0) for f in findings),
        "broken": broken,
        "odd": odd,
        "seconds": round(seconds, 3),
    }


def print_report(report: dict, done: str) -> None:
    """Prints a report of `make_report`; `done`: what was done with the readable videos.

    Every video is one line: what is odd in a name is escaped.
    """
    for row in report["broken"]:
        print(f"broken: {printable(row['reason'])}")
    for row in report["odd"]:
        print(f"odd: {printable(row['id'])}: {', '.join(row['what'])}")
    print(
        f"{report['readable']} of {report['videos']} videos {done}, {report['frames']} frames, "
        f"{report['bytes'] / 1e6:.1f} MB read; {len(report['broken'])} broken, "
        f"{len(report['odd'])} odd; {report['seconds']:.1f} s"
    )


def check(paths: Sequence[str | Path], workers: int, prefix: str = "") -> dict:
    """Reads every video of lists and folders.

    Args:
        paths: As `gather`.
        workers: Threads.
        prefix: As `gather`.

    Returns:
        The report.

    Raises:
        InputError: As `gather`.
    """
    skipped = Skipped()
    records, _ = gather(paths, prefix, labelled=False, skipped=skipped)
    note_skipped(skipped)
    items = [(record, split) for split, found in records.items() for record in found]
    start, findings = time.monotonic(), []
    with contextlib.closing(Progress(len(items), "reading")) as bar:
        for finding in map_in_order(lambda item: examine(*item, lambda _: None), items, workers):
            findings.append(finding)
            bar.advance(finding.size)
    return make_report(findings, time.monotonic() - start)


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", nargs="+", metavar="LIST_OR_FOLDER")
    parser.add_argument("--prefix", default="", help="what paths in lists are relative to")
    parser.add_argument("--json", type=Path, metavar="OUT", help="file to write the report to")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads")
    args = parser.parse_args()
    try:
        if args.json:
            check_output("--json", args.json)
        report = check(args.input, max(1, args.workers), args.prefix)
        if args.json:
            write_json(args.json, report)
    except InputError as error:
        parser.exit(InputError.EXIT_CODE, f"error: {printable(error)}\n")
    print_report(report, "can be read")
    parser.exit(SOME_BROKEN if report["broken"] else 0)
