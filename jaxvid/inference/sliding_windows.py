"""Windows of a long video: which frames they look at, and these frames in one pass."""

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

MAX_PARTS = 4  # of the time between a clip's frames that an aligned stride may be several of


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """Which frames each window looks at.

    Attributes:
        indices: `(windows, t)` frames of the video, never falling in either direction.
        starts: `(windows,)` seconds from the video's first frame.
        ends: `(windows,)` likewise.
        padded: `(windows,)` whether the window is too short for its clip and repeats frames.
        stride: Seconds from start to start.
    """

    indices: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    padded: np.ndarray
    stride: float


def plan_windows(
    reader: VideoFile, spec: ClipSpec, window: float, stride: float, *, align: bool, name: str
) -> WindowPlan:
    """Cuts a video into windows, each sampled as a video of its own.

    Windows follow each other until one reaches the video's end, where it is cut. Time is that of
    the timestamps where there are any, also in videos with a variable frame rate.

    With `align`, the stride of overlapping windows becomes the nearest multiple of the time between
    a clip's frames, or of a half, a third or a quarter of it, or else the nearest whole part of it,
    so that windows look at the same frames. Of `rate` sampling, windows may then start between two
    frames, and each moment shows the last frame before it: otherwise windows would rarely share any
    where the rates do not divide, as at 25 or 29.97 frames a second.

    Args:
        reader: The open video.
        spec: Its sampling and `num_frames` count; a window has one clip.
        window: Seconds.
        stride: Seconds.
        align: Whether the stride may be moved.
        name: The video's, for errors.

    Raises:
        DecodeError: Neither frame rate nor timestamps are known.
        InputError: `window` or `stride` is not above 0.
    """
    for option, value in (("window", window), ("stride", stride)):
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"{option}={value:g}: must be a number of seconds above 0")
    fps, times, length = reader.fps, reader.times, reader.num_frames
    if times is not None and times[-1] > 0:
        fps = fps or (length - 1) / times[-1]
        length = max(1, round(times[-1] * fps) + 1)  # as many as a constant rate would have
    if not fps:
        raise DecodeError(
            f"{name}: neither its frame rate nor timestamps are known, so it has no windows of "
            "seconds; write it anew with a frame rate"
        )
    t, size = spec.num_frames, max(1, round(window * fps))
    rates = {"sampling_rate": spec.sampling_rate, "fps": fps}
    # All in frames of the video: from one frame of a clip to the next,
    step = fps / (t / 10)
    if spec.sampling != "uniform_10s":
        step = np.ptp(sampling.make_indices(spec.sampling, size, t, **rates)) / max(t - 1, 1)
    steps, hop = Fraction(0), max(stride * fps, 1.0)  # from start to start
    if align and step > 0 and hop < size:
        if hop * MAX_PARTS >= step:
            steps = Fraction(hop / step).limit_denominator(MAX_PARTS)
        else:
            steps = Fraction(1, round(step / hop))
        hop = float(steps) * step
    rows, starts, ends, padded = [], [], [], []
    while not ends or ends[-1] < length - 0.5:
        number = len(rows)
        start = number * hop
        first = round(start)
        if first >= length:  # between two windows that do not touch
            break
        count = min(size, length - first)
        if steps and spec.sampling == "uniform_10s":
            # The same fraction for the same moment, whichever window it is in; float32 as in
            # `sampling`.
            parts = number * steps.numerator + np.arange(t) * steps.denominator
            places = (parts / steps.denominator).astype(np.float32) * np.float32(step)
            row = np.clip(np.floor(places).astype(int), 0, min(int(start) + count, length) - 1)
        else:
            row = first + sampling.make_indices(spec.sampling, count, t, **rates)
        rows.append(row)
        starts.append(start)
        ends.append(min(start + max(window * fps, 1.0), length))
        padded.append(sampling.is_padded(spec.sampling, count, t, **rates))
    indices = np.stack(rows)
    if times is not None:
        indices = sampling.frames_at_times(indices, times, fps)
    return WindowPlan(
        indices=indices,
        starts=np.array(starts) / fps,
        ends=np.array(ends) / fps,
        padded=np.array(padded),
        stride=hop / fps,
    )


def read_frames(
    reader: VideoFile, indices: np.ndarray, spec: ClipSpec, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decodes and crops frames in one pass, some at a time.

    Args:
        reader: The open video.
        indices: Frames, rising, each once.
        spec: How they are resized and cropped.
        size: How many at a time.

    Yields:
        Some of them, `(i,)`, and their crops `(size, m, h, w, c)`, zeros after the last.

    Raises:
        DecodeError: A frame is damaged; perhaps only in the end.
    """
    reader.color_matrix = spec.color_matrix
    frames = reader.iter_frames(indices)
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        crops = np.zeros((size, spec.num_crops, spec.crop, spec.crop, 3), spec.eval_dtype)
        for place, frame in zip(range(len(part)), frames, strict=False):
            crops[place] = np.concatenate(
                cut_eval_crops(resize_eval_frames(frame[None], spec), spec)
            )
        yield part, crops
    collections.deque(frames, maxlen=0)  # to the end of the file, for the damage there


def prefetch(iterator: Iterator, ahead: int = 2) -> Iterator:
    """What an iterator gives, computed up to `ahead` items ahead in a thread."""
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
    """Puts together what windows share, holding it no longer than a window needs it.

    Args:
        indices: `(windows, t)` frames, rising within each window and from window to window.
        items: Rising frames `(i,)` and what there is of each, `(j, m, ...)`, j ≥ i.

    Yields:
        For each window `(m, t, ...)`.
    """
    held = {}
    for row in indices:
        held = {index: item for index, item in held.items() if index >= row[0]}
        while row[-1] not in held:
            part, values = next(items)
            held.update(zip(part.tolist(), values, strict=False))
        yield np.stack([held[index] for index in row.tolist()], axis=1)
