"""Which frames of a video make a clip: pure functions of the video's length and a generator."""

import numpy as np

NUM_CLIPS = (1, 2, 3)  # how many clips of a video evaluation may look at


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
