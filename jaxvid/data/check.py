"""Find videos that cannot be decoded: the command `jaxvid check`."""

if __name__ == "__main__":  # before the imports below, which take seconds
    from jaxvid import entry_point

    entry_point.run("jaxvid.data.check", "; run the same command to continue")

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxvid import parsers, progress
from jaxvid.atomic import check_output, output_path, write_json
from jaxvid.data import part_results
from jaxvid.data.beam import BeamRunner, make_runner
from jaxvid.data.file_checks import file_state
from jaxvid.data.folder_scan import Skipped
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.data.gather import gather, note_overlaps, note_skipped
from jaxvid.data.part_results import Item, SplitVideos
from jaxvid.data.records import Record
from jaxvid.errors import InputError, printable, with_addresses

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
        done: Number of videos that an earlier run finished.
    """

    def __init__(self, total: int, title: str, done: int = 0):
        self._progress = progress.Progress(total, title=title, unit="video", done=done)
        self._bytes = 0

    def advance(self, num_bytes: int) -> None:
        """Count a video of `num_bytes` bytes; a negative number counts as 0."""
        self._bytes += max(num_bytes, 0)
        self._progress.advance(1, f"{self._bytes / 1e6:.1f} MB")

    def close(self) -> None:
        """Clear the bar."""
        self._progress.close()


def make_report(findings: Iterable[Finding], seconds: float) -> dict:
    """Return the report of a check as a JSON object; `seconds` is the time that reading took.

    It has an entry for each broken or unusual video, so its size does not depend on the number of
    the others.
    """
    report = {"videos": 0, "readable": 0, "frames": 0, "bytes": 0, "broken": [], "odd": []}
    for f in findings:
        report["videos"] += 1
        report["bytes"] += max(f.size, 0)
        if f.broken:
            report["broken"].append(
                {"id": f.id, "split": f.split, "reason": f.broken, "readable": f.readable,
                 "num_frames": f.num_frames}
            )  # fmt: skip
            continue
        report["readable"] += 1
        report["frames"] += f.num_frames
        if f.odd:
            report["odd"].append({"id": f.id, "split": f.split, "what": list(f.odd)})
    return {**report, "seconds": round(seconds, 3)}


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
        workers: As in `read_videos`.
        prefix: As in `gather`.
        state: As in `read_videos`. If it has the results of other videos, it is refused.

    Returns:
        The report of `make_report`, with one more key: `overlaps` (lines about videos that are in
        two splits).

    Raises:
        InputError: As in `gather` and `read_videos`.
    """
    videos, overlaps = list_videos(paths, prefix)
    if state is not None:
        part_results.claim(state, videos)
    return {**read_videos(videos, workers, state), "overlaps": overlaps}


def list_videos(paths: Sequence[str | Path], prefix: str) -> tuple[SplitVideos, list[str]]:
    """List the videos of lists and folders, and find those that are in two splits.

    Arguments and errors: `gather`.

    Returns:
        The videos, and one line for each overlap of two splits.
    """
    skipped = Skipped()
    records, _ = gather(paths, prefix, labelled=False, skipped=skipped)
    note_skipped(skipped)
    return SplitVideos(records), note_overlaps(records)


def read_videos(videos: SplitVideos, workers: int | BeamRunner, state: Path | None) -> dict:
    """Read every video completely.

    Args:
        videos: The videos.
        workers: Number of threads of this process; or a runner of Apache Beam, whose workers read
            the videos and write `state` under the same paths.
        state: Folder with the results of finished parts, which are not read again; None: no
            results are stored. A runner needs it.

    Returns:
        The report of `make_report`.

    Raises:
        InputError: The folder cannot be written, or the pipeline failed.
    """
    start = time.monotonic()
    read = functools.partial(_read, workers=workers, total=len(videos))
    if state is None:
        findings = read(videos)
    else:
        runner = workers if isinstance(workers, BeamRunner) else None
        rows = part_results.run(videos, state, read, read_part, runner)
        findings = (Finding(**row) for row in rows)
    report = make_report(findings, 0.0)
    return {**report, "seconds": round(time.monotonic() - start, 3)}


def _read(items: Iterable[Item], done: int = 0, *, workers: int, total: int) -> Iterator[Finding]:
    """Read videos in threads; yield the results in order, and show the progress.

    `done` is the number of videos that an earlier run read, of `total`.
    """
    with contextlib.closing(Progress(total, "reading", done)) as bar:
        for finding in map_in_order(lambda item: examine(*item, lambda _: None), items, workers):
            bar.advance(finding.size)
            yield finding


def read_part(items: Sequence[Item]) -> list[Finding]:
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
        videos, overlaps = list_videos(args.input, args.prefix)
        with part_results.open_folder(args.state, videos) as state:
            report = read_videos(videos, beam or max(1, args.workers), state)
            report["overlaps"] = overlaps
            if output:
                write_json(output, report)
    except InputError as error:
        parser.exit(InputError.EXIT_CODE, f"error: {printable(error)}\n")
    print_report(report, "can be read")
    parser.exit(SOME_BROKEN if report["broken"] else 0)
