"""Frame sampling: functions that compute the frame numbers of a clip from the video's length."""

import math

import numpy as np

SAMPLINGS = ("segments", "dense_stride", "uniform_10s")


def make_indices(
    sampling: str,
    length: int,
    num_frames: int,
    *,
    sampling_rate: int,
    fps: float | None,
    rng: np.random.Generator | None = None,
    view: tuple[int, int] = (0, 1),
) -> np.ndarray:
    """Return the frame numbers of a clip; see the functions below.

    Args:
        sampling: `segments` (XViT on Something-Something), `dense_stride` (XViT on Kinetics) or
            `uniform_10s` (STAM).
        length: Number of frames in the video.
        num_frames: Number of frames in the clip.
        sampling_rate: For `dense_stride`: distance between two sampled frames at 30 frames/s.
        fps: Frame rate of the video, or None if unknown; 30 frames/s are then assumed.
        rng: For training: generator that draws the position of the clip. None: evaluation.
        view: For evaluation: index of the clip and number of clips.

    Returns:
        `(num_frames,)` indices in [0, length - 1], non-decreasing.
    """
    if sampling == "segments":
        return segment_indices(length, num_frames, rng=rng, view=view[0])
    options = {"fps": fps, "rng": rng, "view": view[0], "num_views": view[1]}
    if sampling == "dense_stride":
        return dense_stride_indices(length, num_frames, sampling_rate=sampling_rate, **options)
    if sampling == "uniform_10s":
        return uniform_10s_indices(length, num_frames, **options)
    raise ValueError(f"sampling={sampling!r}: must be one of {', '.join(map(repr, SAMPLINGS))}")


def max_views(sampling: str) -> int | None:
    """Return the largest number of evaluation clips per video, or None if it is unlimited."""
    return 3 if sampling == "segments" else None


def segment_indices(
    length: int, num_frames: int, *, rng: np.random.Generator | None = None, view: int = 0
) -> np.ndarray:
    """Sample one frame of each of `num_frames` equal segments (XViT on Something-Something).

    Args:
        length: Number of frames in the video. If it is below `num_frames`, frames are repeated.
        num_frames: Number of frames in the clip.
        rng: For training: generator that draws a frame of each segment, both ends included.
        view: For evaluation: 0 selects the middle of each segment, 1 its start, 2 its end.

    Returns:
        `(num_frames,)` indices in [0, length - 1], non-decreasing.
    """
    bounds = np.round((length - 1) / num_frames * np.arange(num_frames + 1)).astype(int)
    starts, ends = bounds[:-1], bounds[1:]
    if rng is not None:
        return rng.integers(starts, ends, endpoint=True)
    return ((starts + ends) // 2, starts, ends)[view]


def dense_stride_indices(
    length: int,
    num_frames: int,
    *,
    sampling_rate: int,
    fps: float | None,
    rng: np.random.Generator | None = None,
    view: int = 0,
    num_views: int = 1,
) -> np.ndarray:
    """Sample frames evenly from a window of fixed duration (XViT on Kinetics).

    The window has `num_frames · sampling_rate` frames at 30 frames/s. In a shorter video, the last
    frame is repeated. Training draws the start of the window. In evaluation, view `v` of `V` starts
    at `v / V` of the latest start at which the window fits into the video. Arguments and result:
    `make_indices`.
    """
    window = _window(num_frames, sampling_rate, fps)
    spare = np.float32(max(length - window, 0))
    start = spare * np.float32(view) / np.float32(num_views)
    if rng is not None:
        start = np.float32(rng.uniform(0, spare))
    last = start + np.float32(window) - np.float32(1)
    step = (last - start) / np.float32(max(num_frames - 1, 1))
    # Equal to torch.linspace in float32, which computes the first half from the start and the
    # second half from the end, with fused multiply-adds. Products and sums are exact in float64,
    # so each frame number is rounded to float32 only once, as in torch.
    steps = np.arange(num_frames)
    from_start = np.float64(start) + np.float64(step) * steps
    from_end = np.float64(last) - np.float64(step) * (num_frames - 1 - steps)
    indices = np.where(steps < max(num_frames // 2, 1), from_start, from_end).astype(np.float32)
    return np.clip(indices, 0, length - 1).astype(int)


def uniform_10s_indices(
    length: int,
    num_frames: int,
    *,
    fps: float | None,
    rng: np.random.Generator | None = None,
    view: int = 0,
    num_views: int = 1,
) -> np.ndarray:
    """Sample 10 s of video at `num_frames / 10` frames per second (STAM).

    In a shorter video, the last frame is repeated. Training draws the start of the clip. In
    evaluation, view `v` of `V` starts at `v / V` of the latest start at which the clip fits into
    the video. Arguments and result: `make_indices`.
    """
    indices = _offsets(num_frames, fps)
    spare = max(length - 1 - indices[-1], 0)
    start = int(rng.uniform(0, spare) if rng is not None else spare * view / num_views)
    return np.minimum(start + indices, length - 1)


def is_padded(
    sampling: str, length: int, num_frames: int, *, sampling_rate: int, fps: float | None
) -> bool:
    """Return whether a video is shorter than a clip, so that frames are repeated."""
    if sampling == "segments":
        return length < num_frames
    if sampling == "dense_stride":
        return length < int(_window(num_frames, sampling_rate, fps))
    return length <= _offsets(num_frames, fps)[-1]


def in_released_subset(length: int, num_frames: int, *, fps: float | None) -> bool:
    """Return whether STAM's released evaluation counts a video.

    It drops videos shorter than 10 s: they have fewer than `num_frames` frames at `num_frames / 10`
    frames per second. The published accuracies are computed on the remaining videos.

    Args:
        length: Number of frames in the video.
        num_frames: Number of frames in the clip.
        fps: Frame rate of the video, or None if unknown; 30 frames/s are then assumed.
    """
    return math.floor(length * (num_frames / 10) / (fps or 30.0)) >= num_frames


def frames_at_times(indices: np.ndarray, times: np.ndarray, fps: float) -> np.ndarray:
    """Convert frame numbers at a constant frame rate to frame numbers at a variable frame rate.

    Args:
        indices: `(t,)` frame numbers at a constant `fps`.
        times: Time of each frame in seconds, relative to the first frame; non-decreasing.
        fps: The constant frame rate in frames per second.

    Returns:
        `(t,)` numbers of the frames that are shown at the same times.
    """
    # The frame in the middle of the interval in which a frame at the constant rate is shown.
    shown = np.searchsorted(times, indices / fps + 0.5 / fps, side="right") - 1
    return np.maximum(shown, 0)


def _window(num_frames: int, sampling_rate: int, fps: float | None) -> float:
    """Return the number of frames that a `dense_stride` clip spans."""
    return num_frames * sampling_rate * (fps / 30 if fps else 1)


def _offsets(num_frames: int, fps: float | None) -> np.ndarray:
    """Return the offset of each frame of a `uniform_10s` clip from its first frame, in frames."""
    step = (fps or 30.0) / (num_frames / 10)
    return np.floor(np.arange(num_frames, dtype=np.float32) * np.float32(step)).astype(int)
