"""Resizing, cropping and flipping of clips `(t, h, w, c)` uint8.

Random choices are made once per clip and apply to all its frames.
"""

import math

import cv2
import numpy as np
from PIL import Image

NUM_CROPS = (1, 3)  # numbers of crops that evaluation supports
FRACTIONS = 256  # units per grey level in uint16 frames of `resize_bilinear`

# Sides of the multi-scale crop, relative to the shorter side of the frame.
_SCALES = (1.0, 0.875, 0.75, 0.66)
# The 13 positions of the multi-scale crop, (down, right) in quarters of the free space: corners,
# centres of the edges, the centre, and the four points between the corners and the centre.
_POSITIONS = tuple((i, j) for i in (0, 2, 4) for j in (0, 2, 4)) + ((1, 1), (1, 3), (3, 1), (3, 3))


def resize(frames: np.ndarray, height: int, width: int, *, exact: bool = False) -> np.ndarray:
    """Resize by bilinear interpolation, with antialiasing along a side that becomes shorter.

    Args:
        frames: `(t, h, w, c)` uint8.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        exact: Whether to use Pillow for enlarging too. By default, frames are enlarged with OpenCV,
            which is five times as fast and within one grey level of Pillow.

    Returns:
        `(t, height, width, c)` uint8.
    """
    _, h, w, _ = frames.shape
    if height >= h and width >= w and not exact:
        return _resize_opencv(frames, height, width)
    return np.stack(
        [
            np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
            for frame in frames
        ]
    )


def resize_short_side(frames: np.ndarray, short_side: int, *, exact: bool = False) -> np.ndarray:
    """Resize with `resize`, so that the shorter side has `short_side` pixels.

    With `exact`, the result equals torchvision's `Resize(short_side)` on PIL images.
    """
    _, h, w, _ = frames.shape
    if min(h, w) == short_side:
        return frames
    if h <= w:
        size = short_side, max(short_side, short_side * w // h)
    else:
        size = max(short_side, short_side * h // w), short_side
    return resize(frames, *size, exact=exact)


def resize_bilinear(frames: np.ndarray, short_side: int, *, exact: bool = False) -> np.ndarray:
    """Resize as `torch.nn.functional.interpolate` does: bilinear, without antialiasing.

    Args:
        frames: `(t, h, w, c)` uint8.
        short_side: Shorter side of the result in pixels. The longer side keeps the aspect ratio,
            rounded down.
        exact: Whether to keep fractions of a grey level. XViT's original program keeps them,
            because it resizes float frames.

    Returns:
        `(t, height, width, c)`. Without `exact`: uint8, within one grey level of what PyTorch
        returns for float frames. With `exact`: uint16, in which `FRACTIONS` stands for one grey
        level, within 0.003 grey levels of PyTorch.
    """
    _, h, w, _ = frames.shape
    if exact:
        frames = frames * np.uint16(FRACTIONS)
    if min(h, w) == short_side:
        return frames
    height, width = int(max(h / w, 1) * short_side), int(max(w / h, 1) * short_side)
    return _resize_opencv(frames, height, width)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Round frames of `resize_bilinear(..., exact=True)` to whole grey levels, as uint8.

    Frames that are uint8 already are returned unchanged.
    """
    if frames.dtype != np.uint16:
        return frames
    return np.rint(frames / FRACTIONS).astype(np.uint8)


def _resize_opencv(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    size = (width, height)
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR) for frame in frames])


def random_crop(frames: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a `size` × `size` crop at a random position; frames must be at least that large."""
    _, h, w, _ = frames.shape
    top, left = rng.integers(0, h - size + 1), rng.integers(0, w - size + 1)
    return frames[:, top : top + size, left : left + size]


def random_flip(
    frames: np.ndarray, rng: np.random.Generator, probability: float = 0.5
) -> np.ndarray:
    """Mirror all frames of the clip left to right with the given probability."""
    if rng.random() >= probability:
        return frames
    return np.stack([cv2.flip(frame, 1) for frame in frames])


def multi_scale_crop(frames: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a crop of random size and shape at one of 13 positions and resize it.

    Wang et al., "Towards good practices for very deep two-stream ConvNets", 2015.

    Args:
        frames: `(t, h, w, c)` uint8 of any size.
        size: Height and width of the result in pixels.
        rng: Generator that draws the size of the crop, then its position.

    Returns:
        `(t, size, size, c)` uint8, resized by `resize`.
    """
    _, h, w, _ = frames.shape
    sizes = multi_scale_sizes(min(h, w), size)
    crop_h, crop_w = sizes[rng.integers(len(sizes))]
    down, right = _POSITIONS[rng.integers(len(_POSITIONS))]
    top, left = (h - crop_h) // 4 * down, (w - crop_w) // 4 * right
    return resize(frames[:, top : top + crop_h, left : left + crop_w], size, size)


def multi_scale_sizes(short_side: int, size: int) -> list[tuple[int, int]]:
    """Return the sizes that `multi_scale_crop` draws from.

    The sides are 1, ⅞, ¾ and 0.66 times the shorter side of the frame. A side within 2 pixels of
    `size` becomes `size` if the frame is large enough. The scales of height and width are equal or
    adjacent in this sequence.

    Args:
        short_side: Shorter side of the frame in pixels.
        size: Height and width of the result in pixels.

    Returns:
        10 pairs (height, width) in pixels.
    """
    sides = [int(short_side * scale) for scale in _SCALES]
    sides = [size if abs(side - size) <= 2 and size <= short_side else side for side in sides]
    steps = range(len(sides))
    return [(sides[i], sides[j]) for i in steps for j in steps if abs(i - j) <= 1]


def eval_crops(
    frames: np.ndarray, size: int, num_crops: int, *, rounding: str = "up"
) -> list[np.ndarray]:
    """Cut the crops that evaluation classifies.

    Args:
        frames: `(t, h, w, c)`, at least `size` high and wide.
        size: Height and width of a crop in pixels.
        num_crops: 1: the centre. 3: both ends and the centre of the longer side. In the original
            protocol with 3 crops, the shorter side of the frames is `size`.
        rounding: How an offset of the centre crop that ends in half a pixel is rounded: `up`, as in
            XViT's program, or to the nearest `even` number, as in torchvision's `CenterCrop`, which
            STAM's program uses.

    Returns:
        `num_crops` arrays `(t, size, size, c)`; with 3: left, centre, right or top, centre, bottom.

    Raises:
        ValueError: The frames are smaller than the crop.
    """
    _, h, w, _ = frames.shape
    if min(h, w) < size:
        raise ValueError(f"frames of {w} × {h} pixels are smaller than the crop {size} × {size}")
    to_int = math.ceil if rounding == "up" else round
    middle = to_int((h - size) / 2), to_int((w - size) / 2)
    if num_crops == 1:
        corners = [middle]
    elif w >= h:
        corners = [(middle[0], 0), middle, (middle[0], w - size)]
    else:
        corners = [(0, middle[1]), middle, (h - size, middle[1])]
    return [frames[:, top : top + size, left : left + size] for top, left in corners]
