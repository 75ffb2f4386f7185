"""Resizing and cropping of clips `(t, h, w, c)` uint8: one draw a clip, used for all its frames."""

import numpy as np
from PIL import Image

NUM_CROPS = (1, 3)  # how many crops of a clip evaluation may look at


def resize_short_side(frames: np.ndarray, short_side: int) -> np.ndarray:
    """Resizes so that the shorter side has `short_side` pixels; Pillow's antialiased bilinear."""
    _, h, w, _ = frames.shape
    if min(h, w) == short_side:
        return frames
    if h <= w:
        size = (max(short_side, short_side * w // h), short_side)
    else:
        size = (short_side, max(short_side, short_side * h // w))
    return np.stack(
        [
            np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))
            for frame in frames
        ]
    )


def random_crop(frames: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A `size` × `size` crop at a uniformly random place; the frames are at least that large."""
    _, h, w, _ = frames.shape
    top, left = rng.integers(0, h - size + 1), rng.integers(0, w - size + 1)
    return frames[:, top : top + size, left : left + size]


def eval_crops(frames: np.ndarray, size: int, num_crops: int) -> list[np.ndarray]:
    """The crops that evaluation looks at.

    Args:
        frames: `(t, h, w, c)`, at least `size` high and wide.
        size: Height and width of a crop in pixels.
        num_crops: 1: the centre. 3: along the longer side the two ends and the centre.

    Returns:
        `num_crops` arrays `(t, size, size, c)`; with 3: left, centre, right or top, centre, bottom.
    """
    _, h, w, _ = frames.shape
    middle = (-(-(h - size) // 2), -(-(w - size) // 2))  # rounded up, as the original programs do
    if num_crops == 1:
        places = [middle]
    elif w >= h:
        places = [(middle[0], 0), middle, (middle[0], w - size)]
    else:
        places = [(0, middle[1]), middle, (h - size, middle[1])]
    return [frames[:, top : top + size, left : left + size] for top, left in places]
