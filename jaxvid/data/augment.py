"""AutoAugment and RandAugment for clips `(t, h, w, c)` uint8 RGB, and their operations.

One draw a clip, from the generator handed in, used for all its frames. The operations give what
Pillow gives for each frame by itself, but for two things: interpolated values are rounded, where
Pillow truncates, and the bicubic kernel is OpenCV's (a = -0.75, in Pillow's `transform` -1).
"""

import math
from collections.abc import Callable

import cv2
import numpy as np

_FILL = 128  # the grey of what comes in from outside the frame

# The ImageNet policy "v0" of the TPU EfficientNet program, after Cubuk et al., "AutoAugment",
# arXiv:1805.09501: two operations each, as (name, probability, level from 0 to 10).
AUTOAUGMENT_V0 = (
    (("equalize", 0.8, 1), ("shear_y", 0.8, 4)),
    (("color", 0.4, 9), ("equalize", 0.6, 3)),
    (("color", 0.4, 1), ("rotate", 0.6, 8)),
    (("solarize", 0.8, 3), ("equalize", 0.4, 7)),
    (("solarize", 0.4, 2), ("solarize", 0.6, 2)),
    (("color", 0.2, 0), ("equalize", 0.8, 8)),
    (("equalize", 0.4, 8), ("solarize_add", 0.8, 3)),
    (("shear_x", 0.2, 9), ("rotate", 0.6, 8)),
    (("color", 0.6, 1), ("equalize", 1.0, 2)),
    (("invert", 0.4, 9), ("rotate", 0.6, 0)),
    (("equalize", 1.0, 9), ("shear_y", 0.6, 3)),
    (("color", 0.4, 7), ("equalize", 0.6, 0)),
    (("posterize", 0.4, 6), ("autocontrast", 0.4, 7)),
    (("solarize", 0.6, 8), ("color", 0.6, 9)),
    (("solarize", 0.2, 4), ("rotate", 0.8, 9)),
    (("rotate", 1.0, 7), ("translate_y", 0.8, 9)),
    (("shear_x", 0.0, 0), ("solarize", 0.8, 4)),
    (("shear_y", 0.8, 0), ("color", 0.6, 4)),
    (("color", 1.0, 0), ("rotate", 0.6, 2)),
    (("equalize", 0.8, 4), ("equalize", 0.0, 8)),
    (("equalize", 1.0, 4), ("autocontrast", 0.6, 2)),
    (("shear_y", 0.4, 7), ("solarize_add", 0.6, 7)),
    (("posterize", 0.8, 2), ("solarize", 0.6, 10)),
    (("solarize", 0.6, 8), ("equalize", 0.6, 1)),
    (("color", 0.8, 6), ("rotate", 0.4, 5)),
)


def autoaugment(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Applies one random sub-policy of `AUTOAUGMENT_V0` to a clip.

    Args:
        frames: `(t, h, w, c)` uint8 RGB.
        rng: Draws the sub-policy, and for each of its operations whether it happens, its sign and
            its interpolation.

    Returns:
        An array like `frames`.
    """
    for name, probability, level in AUTOAUGMENT_V0[rng.integers(len(AUTOAUGMENT_V0))]:
        if rng.random() < probability:
            frames = apply_operation(frames, name, level, rng)
    return frames


def randaugment(
    frames: np.ndarray, rng: np.random.Generator, *, num_layers: int, magnitude: float
) -> np.ndarray:
    """Applies random operations of equal strength to a clip (Cubuk et al., arXiv:1909.13719).

    Args:
        frames: `(t, h, w, c)` uint8 RGB.
        rng: Draws the operations, their signs and their interpolations.
        num_layers: How many operations, one after the other; one may be drawn again.
        magnitude: Their level, from 0 to 10.

    Returns:
        An array like `frames`.

    Raises:
        ValueError: The magnitude is out of range.
    """
    if not 0 <= magnitude <= 10:
        raise ValueError(f"RandAugment's magnitude goes from 0 to 10, not {magnitude}")
    names = tuple(OPERATIONS)
    for _ in range(num_layers):
        frames = apply_operation(frames, names[rng.integers(len(names))], magnitude, rng)
    return frames


def apply_operation(
    frames: np.ndarray, name: str, level: float, rng: np.random.Generator
) -> np.ndarray:
    """Applies the operation `name` of the tables at a level from 0 to 10.

    The levels mean what they mean in the TPU EfficientNet program: a higher level shears, rotates,
    shifts and brightens more, but solarizes and posterizes less.
    """
    operation, arguments = OPERATIONS[name]
    return operation(frames, *arguments(level, rng))


# --- Tables of pixel values -----------------------------------------------------------------------


def invert(frames: np.ndarray) -> np.ndarray:
    """The negative."""
    return 255 - frames


def solarize(frames: np.ndarray, threshold: int) -> np.ndarray:
    """The negative of the values from `threshold` on."""
    values = np.arange(256)
    return _look_up(frames, np.where(values < threshold, values, 255 - values))


def solarize_add(frames: np.ndarray, addition: int) -> np.ndarray:
    """Adds to the values below 128, up to 255."""
    values = np.arange(256)
    return _look_up(frames, np.where(values < 128, np.minimum(values + addition, 255), values))


def posterize(frames: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the `bits` highest of the 8 bits; with 0 all is black."""
    return _look_up(frames, np.arange(256) & (0xFF00 >> bits))


def brightness(frames: np.ndarray, factor: float) -> np.ndarray:
    """From black (0) over the same (1) to brighter."""
    return _look_up(frames, _blend(np.float32(0), np.arange(256, dtype=np.float32), factor))


def contrast(frames: np.ndarray, factor: float) -> np.ndarray:
    """From the grey that is the frame's mean (0) over the same (1) to more contrast."""
    values = np.arange(256, dtype=np.float32)
    means = [int(_luma(frame.astype(np.float32)).mean(dtype=np.float64) + 0.5) for frame in frames]
    tables = [_blend(np.float32(mean), values, factor) for mean in means]
    return np.stack([cv2.LUT(frame, table) for frame, table in zip(frames, tables, strict=True)])


def autocontrast(frames: np.ndarray) -> np.ndarray:
    """Stretches each channel of each frame to all values from 0 to 255."""
    low = frames.min(axis=1).min(axis=1)[..., None].astype(int)  # (t c 1)
    high = frames.max(axis=1).max(axis=1)[..., None].astype(int)
    scale = 255.0 / np.maximum(high - low, 1)
    values = np.arange(256)[None, None]
    tables = (values * scale - low * scale).astype(int).clip(0, 255)  # truncated, as Pillow does
    return _look_up_channels(frames, np.where(high > low, tables, values))


def equalize(frames: np.ndarray) -> np.ndarray:
    """Makes the values of each channel of each frame about equally frequent."""
    counts = _histograms(frames)  # (t c 256)
    highest = 255 - (counts[..., ::-1] > 0).argmax(-1)[..., None]  # (t c 1)
    below_highest = counts.sum(-1, keepdims=True) - np.take_along_axis(counts, highest, -1)
    step = below_highest // 255
    below = counts.cumsum(-1) - counts
    tables = np.minimum((below + step // 2) // np.maximum(step, 1), 255)
    return _look_up_channels(frames, np.where(step > 0, tables, np.arange(256)[None, None]))


# --- Blends with another picture ------------------------------------------------------------------


def color(frames: np.ndarray, factor: float) -> np.ndarray:
    """From grey (0) over the same (1) to more colourful."""
    result = np.empty_like(frames, order="C")
    for frame, coloured in zip(frames, result, strict=True):
        pixels = frame.astype(np.float32)
        coloured[:] = _blend(cv2.cvtColor(_luma(pixels), cv2.COLOR_GRAY2RGB), pixels, factor)
    return result


def sharpness(frames: np.ndarray, factor: float) -> np.ndarray:
    """From smoothed over 3 × 3 pixels (0) over the same (1) to sharper; the outer pixels stay."""
    kernel = np.float32([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    result = frames.copy()
    for frame, sharp in zip(frames, result, strict=True):
        smooth = cv2.filter2D(frame, -1, kernel)[1:-1, 1:-1]
        sharp[1:-1, 1:-1] = _blend(smooth.astype(np.float32), frame[1:-1, 1:-1], factor)
    return result


# --- Shears, turns, shifts ------------------------------------------------------------------------


def shear_x(frames: np.ndarray, factor: float, interpolation: int) -> np.ndarray:
    """Moves each row to the left by `factor` times its distance from the top.

    Args:
        frames: `(t, h, w, c)` uint8.
        factor: Pixels a pixel; negative: to the right.
        interpolation: OpenCV's `INTER_LINEAR` or `INTER_CUBIC`.

    Returns:
        An array like `frames`; what comes in from outside is grey.
    """
    return _warp(frames, [[1, factor, 0], [0, 1, 0]], interpolation)


def shear_y(frames: np.ndarray, factor: float, interpolation: int) -> np.ndarray:
    """Moves each column up by `factor` times its distance from the left; see `shear_x`."""
    return _warp(frames, [[1, 0, 0], [factor, 1, 0]], interpolation)


def translate_x(frames: np.ndarray, share: float, interpolation: int) -> np.ndarray:
    """Moves everything to the left by a share of the width; see `shear_x`."""
    return _warp(frames, [[1, 0, share * frames.shape[2]], [0, 1, 0]], interpolation)


def translate_y(frames: np.ndarray, share: float, interpolation: int) -> np.ndarray:
    """Moves everything up by a share of the height; see `shear_x`."""
    return _warp(frames, [[1, 0, 0], [0, 1, share * frames.shape[1]]], interpolation)


def rotate(frames: np.ndarray, degrees: float, interpolation: int) -> np.ndarray:
    """Turns counter-clockwise around the centre; see `shear_x`."""
    _, h, w, _ = frames.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    right = (w - cos * w + sin * h) / 2
    down = (h - sin * w - cos * h) / 2
    return _warp(frames, [[cos, -sin, right], [sin, cos, down]], interpolation)


# --- Helpers --------------------------------------------------------------------------------------


def _warp(frames: np.ndarray, matrix: list[list[float]], interpolation: int) -> np.ndarray:
    """Takes the pixel at (x, y) from `matrix` · (x, y, 1); the first pixel's centre is (½, ½)."""
    _, h, w, _ = frames.shape
    (a, b, c), (d, e, f) = matrix
    if (a, b, c, d, e, f) == (1, 0, 0, 0, 1, 0):
        return frames
    x, y = np.arange(w)[None] + 0.5, np.arange(h)[:, None] + 0.5
    from_x, from_y = a * x + b * y + c, d * x + e * y + f  # (h w)
    outside = (from_x < 0) | (from_x >= w) | (from_y < 0) | (from_y >= h)
    fill, mask = np.full((h, w, 3), _FILL, np.uint8), outside.astype(np.uint8)
    # The edge is repeated, as far as the kernels reach, and what lies outside is filled thereafter:
    # OpenCV's own fill would bleed inwards. For OpenCV the first pixel's centre is (0, 0).
    pad = 3
    padded_matrix = np.array([[a, b, c + (a + b - 1) / 2 + pad], [d, e, f + (d + e - 1) / 2 + pad]])
    flags = interpolation | cv2.WARP_INVERSE_MAP
    result = np.empty_like(frames, order="C")
    for frame, warped in zip(frames, result, strict=True):
        padded = cv2.copyMakeBorder(frame, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
        if interpolation == cv2.INTER_LINEAR:  # twice as fast with a fourth channel
            padded = cv2.cvtColor(padded, cv2.COLOR_RGB2RGBA)
            four = cv2.warpAffine(padded, padded_matrix, (w, h), flags=flags)
            cv2.cvtColor(four, cv2.COLOR_RGBA2RGB, warped)
        else:
            cv2.warpAffine(padded, padded_matrix, (w, h), warped, flags)
        cv2.copyTo(fill, mask, warped)
    return result


def _look_up(frames: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Replaces each value by the one in `table` `(256,)`."""
    t, h, w, c = frames.shape
    return cv2.LUT(frames.reshape(t * h, w * c), table.astype(np.uint8)).reshape(frames.shape)


def _look_up_channels(frames: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Replaces each value by the one in `tables` `(t, c, 256)` of its frame and channel."""
    tables = tables.astype(np.uint8)
    result = np.empty_like(frames, order="C")
    for frame, frame_tables, replaced in zip(frames, tables, result, strict=True):
        planes = [cv2.LUT(*pair) for pair in zip(cv2.split(frame), frame_tables, strict=True)]
        cv2.merge(planes, replaced)
    return result


def _histograms(frames: np.ndarray) -> np.ndarray:
    """How often each value occurs in each channel of each frame, `(t, c, 256)` int64."""
    counts = [
        cv2.calcHist([frame], [channel], None, [256], [0, 256])
        for frame in frames
        for channel in range(3)
    ]
    return np.array(counts, np.int64).reshape(len(frames), 3, 256)


def _luma(pixels: np.ndarray) -> np.ndarray:
    """Pillow's grey of a frame `(h, w, c)`, all float32 with values from 0 to 255."""
    # Pillow's weights in units of 2⁻¹⁶: every sum fits into the 24 bits of a float32.
    weights = np.float32([19595, 38470, 7471]) / 2**16
    return np.floor(cv2.transform(pixels, weights[None]) + np.float32(0.5))


def _blend(start: np.ndarray, end: np.ndarray, factor: float) -> np.ndarray:
    """`start + factor · (end - start)`, truncated to uint8: Pillow's blend, in float32 as there."""
    blended = end - start
    blended *= np.float32(factor)
    blended += start
    return blended.clip(0, 255, out=blended).astype(np.uint8)


def _none(level: float, rng: np.random.Generator) -> tuple:
    return ()


def _enhancement(level: float, rng: np.random.Generator) -> tuple[float]:
    return (level / 10 * 1.8 + 0.1,)


def _geometry(full: float) -> Callable:
    """Level → (up to `full`, of either sign; bilinear or bicubic)."""

    def arguments(level: float, rng: np.random.Generator) -> tuple[float, int]:
        value = level / 10 * full * rng.choice((-1, 1))
        return value, int(rng.choice((cv2.INTER_LINEAR, cv2.INTER_CUBIC)))

    return arguments


# What is drawn from: the operation, and the arguments that a level from 0 to 10 stands for.
OPERATIONS: dict[str, tuple[Callable, Callable]] = {
    "autocontrast": (autocontrast, _none),
    "equalize": (equalize, _none),
    "invert": (invert, _none),
    "posterize": (posterize, lambda level, rng: (int(level / 10 * 4),)),
    "solarize": (solarize, lambda level, rng: (int(level / 10 * 256),)),
    "solarize_add": (solarize_add, lambda level, rng: (int(level / 10 * 110),)),
    "brightness": (brightness, _enhancement),
    "color": (color, _enhancement),
    "contrast": (contrast, _enhancement),
    "sharpness": (sharpness, _enhancement),
    "rotate": (rotate, _geometry(30)),  # degrees
    "shear_x": (shear_x, _geometry(0.3)),  # pixels a pixel
    "shear_y": (shear_y, _geometry(0.3)),
    "translate_x": (translate_x, _geometry(0.45)),  # of the width
    "translate_y": (translate_y, _geometry(0.45)),  # of the height
}
