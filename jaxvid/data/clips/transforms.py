"""Resizing, cropping and mirroring of clips `(t, h, w, c)` uint8.

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


def resize(
    frames: np.ndarray,
    height: int,
    width: int,
    *,
    exact: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Resize by bilinear interpolation, with antialiasing along a side that becomes shorter.

    Args:
        frames: `(t, h, w, c)` uint8.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        exact: Whether to use Pillow for enlarging too. By default, frames are enlarged with OpenCV,
            which is five times as fast and within one grey level of Pillow.
        out: C-contiguous array that receives the result; by default, a new array.

    Returns:
        `(t, height, width, c)` uint8.
    """
    t, h, w, c = frames.shape
    if out is None:
        out = np.empty((t, height, width, c), np.uint8)
    if height >= h and width >= w and not exact:
        return _resize_opencv(frames, out)
    for frame, resized in zip(frames, out, strict=True):
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
        resized[:] = np.asarray(image)
    return out


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
    t, h, w, c = frames.shape
    if exact:
        frames = frames * np.uint16(FRACTIONS)
    if min(h, w) == short_side:
        return frames
    height, width = int(max(h / w, 1) * short_side), int(max(w / h, 1) * short_side)
    return _resize_opencv(frames, np.empty((t, height, width, c), frames.dtype))


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Round frames of `resize_bilinear(..., exact=True)` to whole grey levels, as uint8.

    Frames that are uint8 already are returned unchanged.
    """
    if frames.dtype != np.uint16:
        return frames
    return np.rint(frames / FRACTIONS).astype(np.uint8)


def _resize_opencv(frames: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Resize frames `(t, h, w, c)` to the size of `out`, which receives the result."""
    size = out.shape[2], out.shape[1]
    for frame, resized in zip(frames, out, strict=True):
        cv2.resize(frame, size, dst=resized, interpolation=cv2.INTER_LINEAR)
    return out


def mirror(frame: np.ndarray) -> None:
    """Mirror a frame `(h, w, c)` left to right, in place.

    OpenCV writes the last pixel first, which takes twice as long if the memory is not in a cache.
    Frames are therefore copied first and then mirrored in place.
    """
    cv2.flip(frame, 1, dst=frame)


def draw_random_crop(
    height: int, width: int, size: int, rng: np.random.Generator
) -> tuple[slice, slice]:
    """Return the rows and columns of a `size` × `size` crop at a random position of a frame.

    The frame must be at least that large.
    """
    top, left = rng.integers(0, height - size + 1), rng.integers(0, width - size + 1)
    return slice(top, top + size), slice(left, left + size)


def draw_multi_scale_crop(
    height: int, width: int, size: int, rng: np.random.Generator
) -> tuple[slice, slice]:
    """Draw a crop of random size and shape at one of 13 positions.

    Wang et al., "Towards good practices for very deep two-stream ConvNets", 2015.

    Args:
        height: Height of the frame in pixels.
        width: Width of the frame in pixels.
        size: Height and width of the clip in pixels, to which the crop is resized afterwards.
        rng: Generator that draws the size of the crop, then its position.

    Returns:
        The rows and columns of the crop.
    """
    sizes = multi_scale_sizes(min(height, width), size)
    crop_h, crop_w = sizes[rng.integers(len(sizes))]
    down, right = _POSITIONS[rng.integers(len(_POSITIONS))]
    top, left = (height - crop_h) // 4 * down, (width - crop_w) // 4 * right
    return slice(top, top + crop_h), slice(left, left + crop_w)


def multi_scale_sizes(short_side: int, size: int) -> list[tuple[int, int]]:
    """Return the sizes that `draw_multi_scale_crop` draws from.

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
