"""Sliding windows of a long video: plan them, and decode their frames in one pass."""

import collections
import dataclasses
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np

from jaxvid.data.clips.clip import ClipSpec, cut_eval_crops, resize_eval_frames, sampling
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.errors import InputError

MAX_DENOMINATOR = 4  # of an aligned stride, as a fraction of the step between a clip's frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """The frames that each window samples.

    Attributes:
        indices: `(windows, t)` frame numbers, non-decreasing along both axes.
        starts: `(windows,)` seconds from the video's first frame.
        ends: `(windows,)` seconds from the video's first frame.
        padded: `(windows,)` booleans: the window is shorter than its clip, which repeats frames.
        stride: Seconds between the starts of windows.
    """

    indices: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    padded: np.ndarray
    stride: float


def plan_windows(
    reader: VideoFile, spec: ClipSpec, window: float, stride: float, *, align: bool, name: str
) -> WindowPlan:
    """Cut a video into windows, each sampled like a video of its own.

    The last window is the first one that reaches the end of the video, and ends there. Timestamps,
    if any, define time, also in videos with a variable frame rate.

    Args:
        reader: Open video.
        spec: Defines the sampling and `num_frames`. A window has one clip.
        window: Length of a window in seconds.
        stride: Seconds between the starts of windows.
        align: Adjust the stride so that overlapping windows share frames (`_align_hop`).
        name: Name of the video, for errors.

    Raises:
        DecodeError: Neither frame rate nor timestamps are known.
        InputError: `window` or `stride` is not above 0.
    """
    for option, value in (("window", window), ("stride", stride)):
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"{option}={value:g}: must be a number of seconds above 0")
    fps, length = _frame_rate_and_length(reader, name)
    # All in frames: the length of a window, and from one window to the next.
    size, hop, fraction = max(1, round(window * fps)), max(stride * fps, 1.0), Fraction(0)
    step = _sampling_step(spec, size, fps)
    if align and step > 0 and hop < size:
        fraction = _align_hop(hop, step)
        hop = float(fraction) * step
    rates = {"sampling_rate": spec.sampling_rate, "fps": fps}
    rows, starts, ends, padded = [], [], [], []
    while not ends or ends[-1] < length - 0.5:
        start = len(rows) * hop
        first = round(start)
        if first >= length:  # the end lies between two windows that do not overlap
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


def _frame_rate_and_length(reader: VideoFile, name: str) -> tuple[float, int]:
    """Return frames per second and the number of frames that a constant rate would have.

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
    """Return the number of frames between two consecutive frames of a clip."""
    t = spec.num_frames
    if spec.sampling == "uniform_10s":
        return fps / (t / 10)
    rates = {"sampling_rate": spec.sampling_rate, "fps": fps}
    return float(np.ptp(sampling.make_indices(spec.sampling, size, t, **rates)) / max(t - 1, 1))


def _align_hop(hop: float, step: float) -> Fraction:
    """Return the aligned distance between windows as a fraction of the step between clip frames.

    The distance becomes the nearest multiple of the step, or of a half, a third or a quarter of it.
    If it is below a quarter, it becomes the nearest step / n.

    Args:
        hop: Frames from one window's start to the next.
        step: Frames between two consecutive frames of a clip.
    """
    if hop * MAX_DENOMINATOR >= step:
        return Fraction(hop / step).limit_denominator(MAX_DENOMINATOR)
    return Fraction(1, round(step / hop))


def _aligned_indices(number: int, fraction: Fraction, step: float, t: int) -> np.ndarray:
    """Return the frames `(t,)` of an aligned window under `uniform_10s` sampling.

    Aligned windows may start between two frames, and a moment is shown by the last frame before it.
    Otherwise, windows would rarely share frames where the rates are not divisible, as at 25 fps.

    Args:
        number: Index of the window.
        fraction: Distance between windows, as a fraction of `step`.
        step: Frames between two consecutive frames of a clip.
        t: Frames per clip.
    """
    # Integers first: a moment must have the same position in every window. float32 as in
    # `sampling`.
    parts = number * fraction.numerator + np.arange(t) * fraction.denominator
    positions = (parts / fraction.denominator).astype(np.float32) * np.float32(step)
    return np.floor(positions).astype(int)


def read_frames(
    reader: VideoFile, indices: np.ndarray, spec: ClipSpec, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decode, resize and crop frames in one pass, in chunks.

    Args:
        reader: Open video.
        indices: Frame numbers, strictly increasing.
        spec: Defines the resize and the crops.
        size: Frames per chunk.

    Yields:
        Frame numbers `(i,)` and their crops `(size, m, h, w, c)`. The last chunk is padded with
        zeros.

    Raises:
        DecodeError: A frame is damaged. This may be raised after the last chunk.
    """
    reader.color_matrix = spec.color_matrix
    frames = reader.iter_frames(indices)
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        crops = np.zeros((size, spec.num_crops, spec.crop, spec.crop, 3), spec.eval_dtype)
        for i, frame in zip(range(len(part)), frames, strict=False):
            crops[i] = np.concatenate(cut_eval_crops(resize_eval_frames(frame[None], spec), spec))
        yield part, crops
    collections.deque(frames, maxlen=0)  # decode to the end, to detect damage there


def prefetch(iterator: Iterator, ahead: int = 2) -> Iterator:
    """Compute the items of an iterator in a thread, up to `ahead` items ahead."""
    with ThreadPoolExecutor(1) as pool:
        queue = collections.deque(pool.submit(next, iterator, None) for _ in range(ahead))
        try:
            while (item := queue.popleft().result()) is not None:
                queue.append(pool.submit(next, iterator, None))
                yield item
        finally:
            pool.shutdown(cancel_futures=True)


def gather_clips(
    indices: np.ndarray, items: Iterator[tuple[np.ndarray, np.ndarray]]
) -> Iterator[np.ndarray]:
    """Assemble the clips of windows from frames that windows share.

    A frame is held in memory only until the last window that needs it.

    Args:
        indices: `(windows, t)` frame numbers, non-decreasing along both axes.
        items: Chunks of increasing frame numbers `(i,)` and a value for each, `(j, m, ...)`, j ≥ i.

    Yields:
        The values `(m, t, ...)` of each window.
    """
    held = {}
    for row in indices:
        held = {index: item for index, item in held.items() if index >= row[0]}
        while row[-1] not in held:
            part, values = next(items)
            held.update(zip(part.tolist(), values, strict=False))
        yield np.stack([held[index] for index in row.tolist()], axis=1)
