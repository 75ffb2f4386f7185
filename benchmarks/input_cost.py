"""Measure which part of the input pipeline's CPU time is not decoding, and its throughput.

python benchmarks/input_cost.py                  all tables
python benchmarks/input_cost.py --only costs     CPU time per clip
python benchmarks/input_cost.py --only workers   clips/s with several threads and processes

The whole pipeline runs, up to finished batches of uint8 pixels. "Decoding" is the time inside of
calls of libav (demultiplexing, decoding, and conversion to RGB at the size of the video) and of
libjpeg. "Resizing" is the time inside of the resizing functions of OpenCV and Pillow, and of the
conversion of arrays to Pillow's images and back. All other CPU time of the process counts as
"rest": reading and parsing records, frame sampling, cropping, mirroring, batching, Grain and
Python. The cost of the measurement itself is subtracted. The "bare loop" is a lower limit for
training from packs with array_record, protobuf and Grain.

The clips have 16 frames of 224 px. The kinds of clips and sources take turns, each in a process of
its own. The tables show the medians of all runs.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import io
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"

import cv2
import numpy as np
import simplejpeg
from absl import flags
from PIL import Image

from benchmarks import minimal_pipeline
from benchmarks.data import write_video
from benchmarks.resources import measure
from jaxvid.data.clips.clip import ClipSpec
from jaxvid.data.formats.pack_reader import PackRecords
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.formats.video_reader import VideoFile
from jaxvid.data.pipeline import make_eval_iter, make_train_iter
from jaxvid.data.prepare import prepare
from jaxvid.data.sources import read_list
from jaxvid.data.video_order import VideoOrder

NUM_FRAMES, BATCH = 16, 8
NUM_RECORDS = 50_000
_SPEC = ClipSpec(num_frames=NUM_FRAMES, crop=224, short_side=256, train_short_side=(256, 256))
# Kind of clips → whether they are for training, and their settings.
KINDS = {
    "training, random crop and flip": (True, dataclasses.replace(_SPEC, flip_prob=0.5)),
    "training, multi-scale crop and flip": (
        True,
        dataclasses.replace(_SPEC, flip_prob=0.5, train_crop="multiscale"),
    ),
    "training, the same with RandAugment": (
        True,
        dataclasses.replace(_SPEC, flip_prob=0.5, train_crop="multiscale", augment="randaugment"),
    ),
    "evaluation, one crop": (False, _SPEC),
    "evaluation, 3 crops of 224 px": (
        False,
        dataclasses.replace(_SPEC, short_side=224, resize="torch_bilinear", num_crops=3),
    ),
}
BARE = "training, bare loop, crop and flip"  # of packs only; see benchmarks/minimal_pipeline.py
SOURCES = {"mp4": 1, "pack": 4}  # source → factor of `--clips`


# ------------------------------------------------------------------ in a measuring process


@dataclasses.dataclass
class Clock:
    """Counts the CPU time inside of functions, and decoded frames.

    Attributes:
        seconds: CPU time of the calling threads.
        calls: Timed calls.
        frames: Decoded frames.
    """

    seconds: float = 0.0
    calls: int = 0
    frames: int = 0

    def timed(self, function: Callable, frames: int = 0) -> Callable:
        """Return a function that calls `function` and counts its CPU time."""

        def call(*args, **kwargs):
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - start
                self.calls += 1
                self.frames += frames

        return call


@functools.cache
def overhead() -> float:
    """Return the CPU time in seconds that timing adds to a call, outside of the timed part."""
    clock, count = Clock(), 20_000
    call = clock.timed(int)
    start = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - start - clock.seconds) / count


class _Timed:
    """An object of PyAV whose methods `methods` are timed. Attributes are passed through."""

    def __init__(self, target: object, clock: Clock, methods: dict[str, int]):
        for name, frames in methods.items():
            object.__setattr__(self, name, clock.timed(getattr(target, name), frames))
        object.__setattr__(self, "_target", target)

    def __getattr__(self, name: str) -> object:
        return getattr(self._target, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._target, name, value)


class _TimedContainer(_Timed):
    """A container of PyAV whose demultiplexing is timed."""

    def __init__(self, target: object, clock: Clock):
        super().__init__(target, clock, {})
        object.__setattr__(self, "_clock", clock)

    def demux(self, stream: _Timed) -> Iterator:
        """Yield packets, as the container does."""
        packets = self._target.demux(stream._target)
        following = self._clock.timed(functools.partial(next, packets, None))
        while (packet := following()) is not None:
            yield packet

    def seek(self, stamp: int, stream: _Timed, **options: object) -> None:
        """Seek, as the container does."""
        self._clock.timed(self._target.seek)(stamp, stream=stream._target, **options)


class _TimedStream(_Timed):
    """A stream of PyAV whose decoder is timed."""

    def __init__(self, target: object, clock: Clock):
        super().__init__(target, clock, {})
        context = _Timed(target.codec_context, clock, {"decode": 0, "flush_buffers": 0})
        object.__setattr__(self, "codec_context", context)


@functools.cache
def _clocks() -> tuple[Clock, Clock]:
    """Replace decoders and resizing functions of this process by timed ones; return the clocks."""
    decoding, resizing = Clock(), Clock()
    time_decoders(decoding)
    cv2.resize = resizing.timed(cv2.resize)
    Image.Image.resize = resizing.timed(Image.Image.resize)
    Image.fromarray = resizing.timed(Image.fromarray)
    Image.Image.tobytes = resizing.timed(Image.Image.tobytes)  # called by np.asarray(image)
    return decoding, resizing


def time_decoders(clock: Clock) -> None:
    """Replace the decoders of this process by timed ones."""
    for name, frames in (("decode_jpeg", 1), ("decode_jpeg_header", 0)):
        setattr(simplejpeg, name, clock.timed(getattr(simplejpeg, name), frames))
    open_file, make = VideoFile._open, VideoFile.__init__

    def timed_open(self: VideoFile) -> None:
        clock.timed(open_file)(self)  # av.open and little else
        self._container = _TimedContainer(self._container, clock)
        self._stream = _TimedStream(self._stream, clock)

    def timed_init(self: VideoFile, *args, **kwargs) -> None:
        make(self, *args, **kwargs)
        self._reformatter = _Timed(self._reformatter, clock, {"reformat": 1})

    VideoFile._open, VideoFile.__init__ = timed_open, timed_init


def open_records(folder: Path, source: str) -> list:
    """Return the records of the benchmark's videos or pack, repeated.

    Without repetitions, most of the time would be that of Grain's shuffling: it draws 16-bit
    numbers until one of them is less than the number of records.
    """
    if source == "mp4":
        records = read_list(folder / "train.csv", 1)
    else:
        records = list(PackRecords(str(folder / "pack"), "train"))
    return [records[i % len(records)] for i in range(NUM_RECORDS)]


def make_batches(
    folder: Path, source: str, kind: str, num_clips: int, threads: int, workers: int
) -> Iterator[dict]:
    """Return the iterator of a loader of `num_clips` clips; training batches are endless."""
    records = open_records(folder, source)
    if kind == BARE:
        return minimal_pipeline.make_batches(records, BATCH, NUM_FRAMES, _SPEC.crop)
    is_training, spec = KINDS[kind]
    options = {"spec": spec, "batch_size": BATCH, "num_threads": threads, "num_workers": workers}
    if is_training:
        return make_train_iter(records, order=VideoOrder(seed=0), **options)
    return make_eval_iter(records[:num_clips], **options)


def wait_for_threads() -> None:
    """Wait until the threads of a closed iterator have stopped."""
    while True:
        before = time.process_time()
        time.sleep(0.1)
        if time.process_time() - before < 0.005:
            return


def run_costs(folder: Path, source: str, kind: str, num_clips: int) -> tuple[float, ...]:
    """Load `num_clips` clips with one thread.

    Returns:
        Per clip: CPU time of decoding, of resizing and of the rest in seconds, and page faults.
    """
    decoding, resizing = _clocks()

    def read_counters() -> np.ndarray:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        times = time.process_time(), decoding.seconds, resizing.seconds
        calls = decoding.calls + resizing.calls
        return np.array([decoding.frames, *times, faults, calls])

    batches = make_batches(folder, source, kind, num_clips + BATCH, threads=1, workers=0)
    next(batches)  # a warm-up
    gc.collect()
    gc.freeze()  # a collection of the objects of all modules is rare, but takes 0.1 s
    before = read_counters()
    for _ in range(num_clips // BATCH):
        next(batches)
    frames, total, in_decoders, in_resizing, faults, calls = read_counters() - before
    batches.close()
    wait_for_threads()
    clips = frames / NUM_FRAMES  # includes those of a batch in progress
    rest = total - in_decoders - in_resizing - calls * overhead()
    return in_decoders / clips, in_resizing / clips, rest / clips, faults / clips


def run_workers(
    folder: Path, source: str, kind: str, num_clips: int, threads: int, workers: int
) -> tuple[float, float]:
    """Load `num_clips` clips; return clips per second, and the CPU time per clip in seconds."""
    flags.FLAGS.mark_as_parsed()  # worker processes need it
    batches = make_batches(folder, source, kind, 0, threads, workers)
    for _ in range(2 * max(threads, workers)):  # until all threads load at different positions
        next(batches)
    start, cpu = time.perf_counter(), measure(os.getpid()).cpu_seconds
    for _ in range(num_clips // BATCH):
        next(batches)
    elapsed, cpu = time.perf_counter() - start, measure(os.getpid()).cpu_seconds - cpu
    batches.close()
    wait_for_threads()
    return num_clips / elapsed, cpu / num_clips


# ------------------------------------------------------------------ in the main process


def write_data(folder: Path, num_videos: int) -> None:
    """Write videos of 340×256 px and a pack of them."""
    for i in range(num_videos):
        write_video(folder / f"{i}.mp4", 340, 256, seed=i)
    (folder / "labels.txt").write_text("only\n")
    (folder / "train.csv").write_text("".join(f"{i}.mp4 0\n" for i in range(num_videos)))
    with contextlib.redirect_stderr(io.StringIO()):
        prepare([folder / "train.csv"], folder / "pack", Settings(), workers=1)


def take_turns(cases: dict[tuple, Callable], rounds: int) -> dict[tuple, np.ndarray]:
    """Run cases in turns, each in a process of its own; return case → results `(rounds, n)`."""
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = {
            case: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for case in cases
        }
        results = {case: [] for case in cases}
        for _ in range(rounds):
            for case, call in cases.items():
                results[case].append(pools[case].submit(call).result())
    return {case: np.array(rows) for case, rows in results.items()}


def print_costs(folder: Path, rounds: int, num_clips: int) -> None:
    """Print the CPU time per clip, and the part of it that is not decoding."""
    cases = {
        (source, kind): functools.partial(run_costs, folder, source, kind, num_clips * factor)
        for source, factor in SOURCES.items()
        for kind in (*KINDS, *[BARE] * (source == "pack"))
    }
    results = take_turns(cases, 1 + rounds)
    print("\nCPU time per clip in ms: decoding, resizing, rest; share of all that is not decoding")
    print("(range); share of the rest without resizing; page faults per clip")
    for (source, kind), rows in results.items():
        rows = rows[1:]  # the first round is a warm-up
        decoding, resizing, rest, faults = np.median(rows, axis=0)
        shares = 100 * rows[:, 1:3].sum(1) / rows[:, :3].sum(1)
        rests = 100 * rows[:, 2] / (rows[:, 0] + rows[:, 2])
        print(
            f"{source:5} {kind:36} {1e3 * decoding:6.2f} {1e3 * resizing:6.2f} {1e3 * rest:6.2f} "
            f"{np.median(shares):5.1f} % ({shares.min():.1f} to {shares.max():.1f}) "
            f"{np.median(rests):5.1f} % {faults:5.0f}"
        )


def print_workers(folder: Path, rounds: int, num_clips: int) -> None:
    """Print clips/s and the CPU time per clip with several threads and worker processes."""
    kind = "training, multi-scale crop and flip"
    numbers = [(1, 0), (2, 0), (4, 0), (1, 1), (1, 2)]
    cases = {
        (source, *pair): functools.partial(
            run_workers, folder, source, kind, num_clips * factor, *pair
        )
        for source, factor in SOURCES.items()
        for pair in numbers
    }
    results = take_turns(cases, rounds)
    print(f"\n{kind}: clips/s (range), CPU time per clip in ms")
    for (source, threads, workers), rows in results.items():
        rate, cpu = np.median(rows, axis=0)
        print(
            f"{source:5} {threads} threads, {workers} workers {rate:6.1f} "
            f"({rows[:, 0].min():.1f} to {rows[:, 0].max():.1f}) {1e3 * cpu:6.1f}"
        )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", choices=("costs", "workers"), help="print one table")
    parser.add_argument("--videos", type=int, default=6, help="number of videos")
    parser.add_argument("--rounds", type=int, default=5, help="runs per row")
    parser.add_argument("--clips", type=int, default=48, help="clips per run, packs: times 4")
    parser.add_argument("--folder", type=Path, help="keep the videos in this folder and reuse them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "pack").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_data(folder, args.videos)
        if args.only != "workers":
            print_costs(folder, args.rounds, args.clips)
        if args.only != "costs":
            print_workers(folder, args.rounds, args.clips)


if __name__ == "__main__":
    main()
