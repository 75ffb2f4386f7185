"""Find videos that cannot be decoded: the command `jaxvid check`."""

if __name__ == "__main__":  # before the imports below, which take seconds
    from jaxvid import entry_point

    entry_point.run("jaxvid.data.check")

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxvid import parsers, progress, remote
from jaxvid.atomic import check_output, output_path, write_json
from jaxvid.data import part_results
from jaxvid.data.annotations import (
    SPLITS,
    find_lists,
    read_class_folders,
    read_names_in_lists,
    read_records,
)
from jaxvid.data.beam import BeamRunner, make_runner
from jaxvid.data.class_names import names_classes, read_labels
from jaxvid.data.folder_scan import Skipped
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.data.kinetics_ssv2 import is_kinetics
from jaxvid.data.label_sets import classes_of
from jaxvid.data.records import MAX_LIST_BYTES, Record, file_state
from jaxvid.data.split_checks import find_overlaps
from jaxvid.errors import InputError, printable, with_addresses
from jaxvid.files import check_regular

SOME_BROKEN = 3  # exit code if some videos are broken
MAX_SECONDS = 3600.0  # time limit for opening and decoding a video
CLIP_FRAMES = 16  # a video with fewer frames is reported as short
CHUNK_BYTES = 128 * 2**20  # maximum size of a chunk of decoded frames, if it has several


@dataclasses.dataclass
class Finding:
    """Result of reading a video.

    Attributes:
        id: Id of the video.
        split: Split of the video.
        num_frames: Number of frames; 0 if the video cannot be opened.
        fps: Frames per second, or None if unknown.
        odd: Unusual properties of a video that can be opened, one phrase each.
        broken: Reason why the video or a requested frame cannot be read, or None.
        readable: Number of frames that can be decoded; 0 if counting them takes too long.
        size: Size of the file in bytes; -1 if it is missing, inaccessible or not a regular file.
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
    """List the videos of lists and folders. The video files need not exist.

    Args:
        paths: Lists, named after their splits, or folders with lists (`train.csv`, `val.csv`,
            `test.csv`, or official lists) or with class folders.
        prefix: Folder that paths in lists are relative to; empty: the list's folder.
        labelled: Whether labels are required.
        skipped: Counter of the entries of class folders that are skipped, or None.

    Returns:
        Split → records; and the class names, or the label numbers if there are no names.

    Raises:
        InputError: A list or folder is missing, malformed or empty; a split occurs twice; the class
            names of two inputs differ; or a label is out of range.
    """
    records, names, names_path = {}, None, None
    prefix = prefix and str(remote.local_path(prefix))
    for path in map(remote.local_path, paths):
        new_records, labels = _gather_one(path, prefix, labelled, skipped)
        for split in new_records:
            if split in records:
                raise InputError(f"{path}: split {split!r} is given twice; merge the two inputs")
        records.update(new_records)
        if labels is not None and names is not None and labels != names:
            raise InputError(
                f"{path}: the class names differ from those of {names_path}; use the same "
                "labels.txt"
            )
        if labels is not None:
            names, names_path = labels, path
    labels = (record.label for split in records.values() for record in split)
    highest = max((index for label in labels for index in classes_of(label)), default=0)
    if names is None:
        names = [str(i) for i in range(highest + 1)]
    elif highest >= len(names):
        raise InputError(
            f"{names_path}: label {highest} is out of range: there are {len(names)} class names; "
            "correct the label or add the missing names"
        )
    return records, names


def _gather_one(
    path: Path, prefix: str, labelled: bool, skipped: Skipped | None
) -> tuple[dict[str, list[Record]], list[str] | None]:
    """Return split → records of one list or folder; and the class names, or None without names."""
    if not os.path.isdir(path):
        if not os.path.lexists(path):
            raise InputError(f"{path} does not exist; choose a list or a data folder")
        with contextlib.suppress(FileNotFoundError):  # reported when the list is read
            check_regular(path, MAX_LIST_BYTES)
        folder, lists = path.parent, {_split_of(path): path}
    else:
        folder, lists = path, find_lists(path)
    if os.path.isfile(path / "dataset_info.json"):
        raise InputError(
            f"{path} is a pack, whose videos were checked when it was written; choose a list or a "
            "folder of videos"
        )
    if not lists:
        splits = tuple(split for split in SPLITS if os.path.isdir(path / split))
        labels, records = read_class_folders(path, splits or ("train",), skipped)
        return records, labels
    files, all_files = [*lists.values()], [*find_lists(folder).values()]
    if names_classes(folder) or (labelled and any(map(is_kinetics, files))):
        labels = read_labels(folder)[0]
    else:  # labels must not depend on the requested splits
        labels = read_names_in_lists(all_files if {*files} <= {*all_files} else files) or None
    options = {"prefix": prefix, "missing": "keep", "labelled": labelled}
    return {split: read_records(file, labels, **options) for split, file in lists.items()}, labels


def note_skipped(skipped: Skipped) -> None:
    """Print one line about the entries that a scan of class folders skipped, if any."""
    if counts := str(skipped):
        print(f"skipped in class folders: {counts}", file=sys.stderr)


def note_overlaps(records: dict[str, list[Record]]) -> list[str]:
    """Print and return one line for each pair of splits that have videos in common."""
    same_files, copies = find_overlaps(records)
    for line in (*same_files, *copies):
        print(f"overlap: {line}", file=sys.stderr)
    return same_files + copies


def _split_of(path: Path) -> str:
    """Return the split that a list is named after."""
    split = path.stem.removeprefix("something-something-v2-")
    if not split.isidentifier():
        raise InputError(
            f"{path}: the file is not named after a split; rename it, e.g. to train.csv"
        )
    return "val" if split in ("validate", "validation") else split


def examine(
    record: Record,
    split: str,
    use: Callable[[np.ndarray], None],
    num: int = 0,
    color_matrix: str = "tagged",
) -> Finding:
    """Read a video, and report whether it is broken or unusual.

    Args:
        record: The video.
        split: Its split.
        use: Function that is called with the frames in order, in chunks `(t, h, w, c)` uint8.
        num: Number of evenly spaced frames to read; 0: all frames.
        color_matrix: Conversion to RGB, as in `VideoFile`.

    Returns:
        The result. If the video is broken, `use` may not have received all frames.
    """
    finding = Finding(record.id, split)
    if state := file_state(record.path):
        finding.broken = with_addresses(f"{record.path} {state}")
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
            with contextlib.suppress(DecodeError):  # counting takes too long
                finding.readable = 0
                finding.readable = reader.count_readable()
        finding.odd = tuple(reader.oddities)
        if reader.num_frames < CLIP_FRAMES:
            finding.odd += (f"shorter than a clip of {CLIP_FRAMES} frames",)
    return finding


def spread(length: int, num: int) -> np.ndarray:
    """Return `num` evenly spaced frame numbers; all if `num` is 0 or at least `length`."""
    if not num or num >= length:
        return np.arange(length)
    return np.rint(np.linspace(0, length - 1, num)).astype(int)


def iter_frames(reader: VideoFile, indices: np.ndarray) -> Iterator[np.ndarray]:
    """Yield frames in chunks `(t, h, w, c)` of at most `CHUNK_BYTES`, but at least one frame."""
    if len(indices) < reader.num_frames and reader.times is not None:  # seek to the frames
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
    """Call a function on items in threads; yield the results in order, with bounded look-ahead."""
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
    """Progress bar and log lines with the number of videos and bytes.

    Args:
        total: Number of videos.
        title: Name of the activity.
    """

    def __init__(self, total: int, title: str):
        self._progress, self._bytes = progress.Progress(total, title=title, unit="video"), 0

    def advance(self, num_bytes: int) -> None:
        """Count a video of `num_bytes` bytes; a negative number counts as 0."""
        self._bytes += max(num_bytes, 0)
        self._progress.advance(1, f"{self._bytes / 1e6:.1f} MB")

    def close(self) -> None:
        """Clear the bar."""
        self._progress.close()


def make_report(findings: Sequence[Finding], seconds: float) -> dict:
    """Return the report of a check as a JSON object; `seconds` is the time that reading took."""
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
    """Print a report of `make_report`.

    Args:
        report: The report. Each broken or unusual video is printed as one line, with special
            characters escaped.
        done: Predicate of the readable videos in the last line, e.g. `can be read` or `packed`.
    """
    for row in report["broken"]:
        print(f"broken: {printable(row['reason'])}")
    for row in report["odd"]:
        print(f"unusual: {printable(row['id'])}: {', '.join(row['what'])}")
    print(
        f"{report['readable']} of {report['videos']} videos {done}, {report['frames']} frames, "
        f"{report['bytes'] / 1e6:.1f} MB read; {len(report['broken'])} broken, "
        f"{len(report['odd'])} unusual; {report['seconds']:.1f} s"
    )


def check(
    paths: Sequence[str | Path],
    workers: int | BeamRunner,
    prefix: str = "",
    state: Path | None = None,
) -> dict:
    """Read every video of lists and folders completely.

    Args:
        paths: As in `gather`.
        workers: Number of threads of this process; or a runner of Apache Beam, whose workers read
            the videos and write `state` under the same paths.
        prefix: As in `gather`.
        state: Folder with the results of finished parts, which are not read again; None: no
            results are stored. A runner needs it.

    Returns:
        The report of `make_report`, with one more key: `overlaps` (lines about videos that are in
        two splits).

    Raises:
        InputError: As in `gather`.
    """
    skipped = Skipped()
    records, _ = gather(paths, prefix, labelled=False, skipped=skipped)
    note_skipped(skipped)
    overlaps = note_overlaps(records)
    items = [(record, split) for split, videos in records.items() for record in videos]
    start = time.monotonic()
    if state is None:
        findings = list(_read(items, workers))
    else:
        runner = workers if isinstance(workers, BeamRunner) else None
        read = functools.partial(_read, workers=workers)
        rows = part_results.run(items, state, read, read_part, runner)
        findings = [Finding(**row) for row in rows]
    return make_report(findings, time.monotonic() - start) | {"overlaps": overlaps}


def _read(items: Sequence[tuple[Record, str]], workers: int) -> Iterator[Finding]:
    """Read videos in threads; yield the results in order, and show the progress."""
    with contextlib.closing(Progress(len(items), "reading")) as bar:
        for finding in map_in_order(lambda item: examine(*item, lambda _: None), items, workers):
            bar.advance(finding.size)
            yield finding


def read_part(items: Sequence[tuple[Record, str]]) -> list[Finding]:
    """Read videos one after the other, on a worker of Beam."""
    return [examine(*item, lambda _: None) for item in items]


def main() -> None:
    """Run the command line of this module."""
    parser = parsers.check()
    args = parser.parse_args()
    try:
        output = output_path(args.json) if args.json else None
        beam = make_runner(args.runner, args.beam_args)
        if beam and not args.state:
            raise InputError("--runner needs --state DIR, a folder that all workers can write")
        if output:
            check_output("--json", output)
        report = check(args.input, beam or max(1, args.workers), args.prefix, args.state)
        if output:
            write_json(output, report)
    except InputError as error:
        parser.exit(InputError.EXIT_CODE, f"error: {printable(error)}\n")
    print_report(report, "can be read")
    parser.exit(SOME_BROKEN if report["broken"] else 0)
