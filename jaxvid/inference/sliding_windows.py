"""Sliding windows of a long video: plan them, and decode their frames in one pass."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np

from jaxvid.data.clips.clip import (
    ClipSpec,
    cut_eval_crops,
    resize_eval_frames,
    sampling,
    set_color_matrix,
)
from jaxvid.data.formats.frame_array import FrameArray
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.errors import InputError

# Strides are aligned to multiples of step / n with n ≤ MAX_DENOMINATOR. `step` is the distance
# between consecutive frames of a clip. For strides below step / MAX_DENOMINATOR, see `_align_hop`.
MAX_DENOMINATOR = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """Times and sampled frames of the windows of a video.

    Attributes:
        indices: Frame numbers of each window `(windows, t)`, non-decreasing along both axes.
        starts: Start of each window in seconds `(windows,)`, relative to the video's first frame.
        ends: End of each window in seconds `(windows,)`, relative to the video's first frame.
        padded: Whether each window is too short for a clip, so that frames are repeated:
            booleans `(windows,)`.
        stride: Time between the starts of consecutive windows in seconds.
    """

    indices: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    padded: np.ndarray
    stride: float


def plan_windows(
    reader: VideoFile | FrameArray,
    spec: ClipSpec,
    window: float,
    stride: float,
    *,
    align: bool,
    name: str,
) -> WindowPlan:
    """Plan the windows of a video, each sampled like a separate video.

    Windows start every `stride` seconds, or once per frame if `stride` is shorter than a frame. The
    first window that reaches the end of the video is the last one, and is cut off there. If windows
    do not overlap, the end may lie between two of them. If the video has timestamps, frames are
    selected by timestamp, so that the frame rate may vary.

    Args:
        reader: Open video.
        spec: Defines the sampling and `num_frames`. A window has one clip.
        window: Length of a window in seconds.
        stride: Time between the starts of consecutive windows in seconds.
        align: Adjust the stride so that overlapping windows share frames (see `_align_hop`).
        name: Name of the video in error messages.

    Raises:
        DecodeError: Neither frame rate nor timestamps of a file are known.
        InputError: `window` or `stride` is not above 0, or the frame rate of an array is unknown.
    """
    for option, value in (("window", window), ("stride", stride)):
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"{option}={value:g}: must be a number of seconds above 0")
    if isinstance(reader, FrameArray) and reader.fps is None:
        raise InputError(f"{name}: windows in seconds need the frame rate of an array; pass fps")
    fps, length = _frame_rate_and_length(reader, name)
    # Length of a window and distance between the starts of consecutive windows, both in frames.
    size, hop = max(1, round(window * fps)), max(stride * fps, 1.0)
    step = _sampling_step(spec, size, fps)
    fraction = Fraction(0)  # hop / step if the stride is aligned, otherwise 0
    if align and step > 0 and hop < size:
        fraction = _align_hop(hop, step)
        hop = float(fraction) * step
    rates = {"sampling_rate": spec.sampling_rate, "fps": fps}
    rows, starts, ends, padded = [], [], [], []  # starts and ends in frames
    while not ends or ends[-1] < length - 0.5:
        start = len(rows) * hop
        first = round(start)
        if first >= length:  # the end of the video lies between two windows
            break
        count = min(size, length - first)
        if fraction and spec.sampling == "uniform_10s":
            last = min(int(start) + count, length) - 1
            row = _aligned_indices(len(rows), fraction, step, spec.num_frames).clip(0, last)
        else:
            row = first + sampling.make_indices(spec.sampling, count, spec.num_frames, **rates)
        rows.append(row)
        starts.append(start)
        ends.append(min(start + max(window * fps, 1.0), length))
        padded.append(sampling.is_padded(spec.sampling, count, spec.num_frames, **rates))
    indices = np.stack(rows)
    if reader.times is not None:
        indices = sampling.frames_at_times(indices, reader.times, fps)
    return WindowPlan(
        indices=indices,
        starts=np.array(starts) / fps,
        ends=np.array(ends) / fps,
        padded=np.array(padded),
        stride=hop / fps,
    )


def _frame_rate_and_length(reader: VideoFile | FrameArray, name: str) -> tuple[float, int]:
    """Return the frame rate, and the number of frames that the video has at this constant rate.

    If only timestamps are known, the average frame rate is returned.

    Raises:
        DecodeError: Neither frame rate nor timestamps are known.
    """
    fps, times, length = reader.fps, reader.times, reader.num_frames
    if times is not None and times[-1] > 0:
        fps = fps or (length - 1) / times[-1]
        length = max(1, round(times[-1] * fps) + 1)
    if not fps:
        raise DecodeError(
            f"{name}: has neither a frame rate nor timestamps, which windows in seconds need; "
            "convert it to a file with a frame rate"
        )
    return fps, length


def _sampling_step(spec: ClipSpec, size: int, fps: float) -> float:
    """Return the distance between consecutive frames of a clip, in frames of the video."""
    t = spec.num_frames
    if spec.sampling == "uniform_10s":
        return fps / (t / 10)
    rates = {"sampling_rate": spec.sampling_rate, "fps": fps}
    return float(np.ptp(sampling.make_indices(spec.sampling, size, t, **rates)) / max(t - 1, 1))


def _align_hop(hop: float, step: float) -> Fraction:
    """Align the distance between windows with the sampled frames; return it in units of `step`.

    The distance becomes the nearest multiple of step, step / 2, step / 3 or step / 4. A distance
    below step / 4 becomes step / n for an integer n.

    Args:
        hop: Distance between the starts of consecutive windows, in frames of the video.
        step: Distance between consecutive frames of a clip, in frames of the video.
    """
    if hop * MAX_DENOMINATOR >= step:
        return Fraction(hop / step).limit_denominator(MAX_DENOMINATOR)
    return Fraction(1, round(step / hop))


def _aligned_indices(window: int, fraction: Fraction, step: float, t: int) -> np.ndarray:
    """Return the frame numbers `(t,)` of an aligned window under `uniform_10s` sampling.

    An aligned window may start between two frames of the video. Each sampling time selects the last
    frame that starts at or before this time. If every window started at a frame instead, windows
    would rarely share frames when their distance is not a whole number of frames, e.g. 2.5 s at
    25 frames/s.

    Args:
        window: Index of the window.
        fraction: Distance between the starts of consecutive windows in units of `step`.
        step: Distance between consecutive frames of a clip, in frames of the video.
        t: Number of frames per clip.
    """
    # The sum is computed in integers, so that the same time has the same position in every window.
    # Then float32 is used, as in `sampling`.
    parts = window * fraction.numerator + np.arange(t) * fraction.denominator
    positions = (parts / fraction.denominator).astype(np.float32) * np.float32(step)
    return np.floor(positions).astype(int)


def read_frames(
    reader: VideoFile | FrameArray, indices: np.ndarray, spec: ClipSpec, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decode, resize and crop frames in one pass, in chunks.

    Args:
        reader: Open video.
        indices: Frame numbers, strictly increasing.
        spec: Defines the resize and the crops.
        size: Frames per chunk.

    Yields:
        Frame numbers `(i,)` and the crops of these frames `(size, m, h, w, c)`. In the last chunk,
        i may be below `size`; the crops are then padded with zeros.

    Raises:
        DecodeError: A frame is damaged. The error may be raised as late as after the last chunk.
    """
    set_color_matrix(reader, spec)
    frames = reader.iter_frames(indices)
    for start in range(0, len(indices), size):
        numbers = indices[start : start + size]
        crops = np.zeros((size, spec.num_crops, spec.crop, spec.crop, 3), spec.eval_dtype)
        # `range` is the first argument: when it is exhausted, `zip` stops without taking a frame.
        for i, frame in zip(range(len(numbers)), frames, strict=False):
            crops[i] = np.concatenate(cut_eval_crops(resize_eval_frames(frame[None], spec), spec))
        yield numbers, crops
    collections.deque(frames, maxlen=0)  # `iter_frames` may report damage only at its end


def prefetch(iterator: Iterator, ahead: int = 2) -> Iterator:
    """Yield the items of an iterator, which a thread computes ahead.

    Args:
        iterator: The iterator. No item may be None.
        ahead: Number of items that are computed ahead.
    """
    return prefetch_chain(iter([iterator]), num_threads=1, ahead=ahead)


def prefetch_chain(iterators: Iterator[Iterator], *, num_threads: int, ahead: int) -> Iterator:
    """Yield the items of several iterators, one iterator after the other.

    Args:
        iterators: The iterators. No item may be None.
        num_threads: Number of iterators that are computed at the same time, each in a thread.
        ahead: Number of items of each iterator that are computed ahead.
    """
    running = collections.deque()  # (iterator, its thread, futures of its next items)

    def start_next() -> None:
        for iterator in itertools.islice(iterators, 1):
            thread = ThreadPoolExecutor(1)
            futures = [thread.submit(next, iterator, None) for _ in range(ahead)]
            running.append((iterator, thread, collections.deque(futures)))

    try:
        for _ in range(num_threads):
            start_next()
        while running:
            iterator, thread, futures = running[0]
            while (item := futures.popleft().result()) is not None:  # None: the iterator has ended
                futures.append(thread.submit(next, iterator, None))
                yield item
            thread.shutdown()
            running.popleft()
            start_next()
    finally:
        for _, thread, _ in running:
            thread.shutdown(cancel_futures=True)


class ClipGatherer:
    """Assembles the clips of windows, which may share frames, as the frames arrive.

    A frame is held in memory only until the last window that needs it.

    Args:
        indices: Frame numbers of each window `(windows, t)`, non-decreasing along both axes.
    """

    def __init__(self, indices: np.ndarray):
        self._rows = collections.deque(indices.tolist())
        self._held = {}  # frame number → value

    def add(self, numbers: np.ndarray, values: np.ndarray) -> Iterator[np.ndarray]:
        """Add a chunk of frames; iterate over the result before the next call.

        Args:
            numbers: Frame numbers `(i,)`, increasing over all chunks.
            values: Crops or features `(j, m, ...)` of these frames. j ≥ i: values after the i-th
                are padding.

        Yields:
            The values `(m, t, ...)` of each window whose last frame has arrived.
        """
        self._held.update(zip(numbers.tolist(), values, strict=False))
        while self._rows and self._rows[0][-1] in self._held:
            row = self._rows.popleft()
            self._held = {n: value for n, value in self._held.items() if n >= row[0]}
            yield np.stack([self._held[n] for n in row], axis=1)


def max_held_frames(indices: np.ndarray) -> int:
    """Return the largest number of frames that a `ClipGatherer` holds if they arrive one by one.

    Args:
        indices: Frame numbers of each window `(windows, t)`, non-decreasing along both axes.
    """
    needed = np.unique(indices)
    starts, ends = np.searchsorted(needed, indices[:, 0]), np.searchsorted(needed, indices[:, -1])
    starts = np.append(
        starts[:1], starts[:-1]
    )  # frames are dropped when the next window is complete
    return int((ends + 1 - starts).max())


def gather_clips(
    indices: np.ndarray, items: Iterator[tuple[np.ndarray, np.ndarray]]
) -> Iterator[np.ndarray]:
    """Yield the values `(m, t, ...)` of each window; see `ClipGatherer`.

    Args:
        indices: Frame numbers of each window `(windows, t)`.
        items: Chunks of frames: the arguments of `ClipGatherer.add`.
    """
    gatherer = ClipGatherer(indices)
    for numbers, values in items:
        yield from gatherer.add(numbers, values)
