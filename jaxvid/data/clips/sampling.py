"""Which frames of a video make a clip: pure functions of the video's length and a generator."""

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
    view: int = 0,
    num_views: int = 1,
) -> np.ndarray:
    """The frames of a clip, sampled the named way; see the functions below.

    Args:
        sampling: `segments` (XViT on Something-Something), `dense` (XViT on Kinetics) or `rate`
            (STAM).
        length: Frames in the video.
        num_frames: Frames in the clip.
        sampling_rate: Of `dense`: frames from one to the next, at 30 frames a second.
        fps: The video's frames a second; None: unknown.
        rng: Training: draws where the clip lies. None: evaluation.
        view: Evaluation: which of the clips.
        num_views: Evaluation: of how many.

    Returns:
        `(num_frames,)` indices in [0, length - 1], never falling.
    """
    if sampling == "segments":
        return segment_indices(length, num_frames, rng=rng, view=view)
    views = {"fps": fps, "rng": rng, "view": view, "num_views": num_views}
    if sampling == "dense_stride":
        return dense_indices(length, num_frames, sampling_rate=sampling_rate, **views)
    if sampling == "uniform_10s":
        return rate_indices(length, num_frames, **views)
    raise ValueError(f"sampling={sampling!r} is not one of {', '.join(SAMPLINGS)}")


def max_views(sampling: str) -> int | None:
    """How many clips of a video evaluation may look at; None: any number."""
    return 3 if sampling == "segments" else None


def segment_indices(
    length: int, num_frames: int, *, rng: np.random.Generator | None = None, view: int = 0
) -> np.ndarray:
    """One frame from each of `num_frames` equal segments of a video (XViT's Something-Something).

    Args:
        length: Frames in the video; a video shorter than the clip repeats frames.
        num_frames: Frames in the clip.
        rng: Training: draws a frame of each segment, its two ends included.
        view: Evaluation: 0 takes each segment's middle, 1 its start, 2 its end.

    Returns:
        `(num_frames,)` indices in [0, length - 1], never falling.
    """
    bounds = np.round((length - 1) / num_frames * np.arange(num_frames + 1)).astype(int)
    starts, ends = bounds[:-1], bounds[1:]
    if rng is not None:
        return rng.integers(starts, ends, endpoint=True)
    return ((starts + ends) // 2, starts, ends)[view]


def dense_indices(
    length: int,
    num_frames: int,
    *,
    sampling_rate: int,
    fps: float | None,
    rng: np.random.Generator | None = None,
    view: int = 0,
    num_views: int = 1,
) -> np.ndarray:
    """Frames evenly over a window of fixed duration (XViT's Kinetics).

    The window is `num_frames · sampling_rate` frames at 30 frames per second; a video shorter than
    it repeats its last frame. Training draws the start of the window; view `v` of `V` starts at
    `v / V` of the frames left beside it. Arguments and result: `make_indices`.
    """
    window = _window(num_frames, sampling_rate, fps)
    spare = np.float32(max(length - window, 0))
    start = spare * np.float32(view) / np.float32(num_views)
    if rng is not None:
        start = np.float32(rng.uniform(0, spare))
    last = start + np.float32(window) - np.float32(1)
    step = (last - start) / np.float32(max(num_frames - 1, 1))
    # torch.linspace in float32, from both ends, with fused multiply-adds: the float64 product and
    # sum are exact, so that each frame number is rounded to float32 only once.
    places = np.arange(num_frames)
    rising = np.float64(start) + np.float64(step) * places
    falling = np.float64(last) - np.float64(step) * (num_frames - 1 - places)
    indices = np.where(places < max(num_frames // 2, 1), rising, falling).astype(np.float32)
    return np.clip(indices, 0, length - 1).astype(int)


def rate_indices(
    length: int,
    num_frames: int,
    *,
    fps: float | None,
    rng: np.random.Generator | None = None,
    view: int = 0,
    num_views: int = 1,
) -> np.ndarray:
    """The first `num_frames` frames at a tenth of `num_frames` frames a second (STAM): 10 s.

    A video shorter than that repeats its last frame. Training draws where the clip starts; view `v`
    of `V` starts at `v / V` of what is left. Arguments and result: `make_indices`; where `fps` is
    unknown, 30 is assumed.
    """
    indices = _offsets(num_frames, fps)
    spare = max(length - 1 - indices[-1], 0)
    start = int(rng.uniform(0, spare) if rng is not None else spare * view / num_views)
    return np.minimum(start + indices, length - 1)


def is_padded(
    sampling: str, length: int, num_frames: int, *, sampling_rate: int, fps: float | None
) -> bool:
    """Whether a video is too short for its clip and repeats frames to fill it."""
    if sampling == "segments":
        return length < num_frames
    if sampling == "dense_stride":
        return length < int(_window(num_frames, sampling_rate, fps))
    return length <= _offsets(num_frames, fps)[-1]


def in_released_subset(length: int, num_frames: int, *, fps: float | None) -> bool:
    """Whether STAM's released evaluation counts a video.

    It drops every video with fewer than `num_frames` frames at `num_frames / 10` frames per second,
    and its published accuracies are over the others.

    Args:
        length: Frames in the video.
        num_frames: Frames in the clip.
        fps: The video's frame rate; None: unknown, 30 is assumed.
    """
    return math.floor(length * (num_frames / 10) / (fps or 30.0)) >= num_frames


def frames_at_times(indices: np.ndarray, times: np.ndarray, fps: float) -> np.ndarray:
    """Frames of a video with a variable frame rate, by time instead of by number.

    Args:
        indices: Frame numbers `(t,)` that were meant for a constant `fps`.
        times: Seconds at which each frame of the video is shown, rising.
        fps: Frames a second.

    Returns:
        `(t,)` numbers of the frames that are shown at those moments.
    """
    shown = np.searchsorted(times, indices / fps + 0.5 / fps, side="right") - 1
    return np.maximum(shown, 0)


def _window(num_frames: int, sampling_rate: int, fps: float | None) -> float:
    """Frames that a dense clip spans."""
    return num_frames * sampling_rate * (fps / 30 if fps else 1)


def _offsets(num_frames: int, fps: float | None) -> np.ndarray:
    """Frames from the first of a rate-sampled clip to each."""
    step = (fps or 30.0) / (num_frames / 10)
    return np.floor(np.arange(num_frames, dtype=np.float32) * np.float32(step)).astype(int)
