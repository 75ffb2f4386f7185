"""Augmentation operations on clips `(t, h, w, c)` uint8 RGB, as Pillow applies them to each frame.

Operations with look-up tables give the same pixels as Pillow. Blends and shifts of rows or columns
are within one grey level of Pillow, and nearly always equal. Rotations round where Pillow
truncates, and their bicubic kernel is OpenCV's (a = -0.75, where Pillow's `transform` has a = -1).
"""

import itertools
import math

import cv2
import numpy as np

_FILL = 128  # grey level of pixels from outside of the frame
# Added to results, which OpenCV rounds, so that they are truncated as in Pillow.
_TRUNCATE = -0.5 + 2**-10

# --- Look-up tables of pixel values ---------------------------------------------------------------


def invert(frames: np.ndarray) -> np.ndarray:
    """Invert all values."""
    return 255 - frames


def solarize(frames: np.ndarray, threshold: int) -> np.ndarray:
    """Invert the values that are at least `threshold`."""
    negative = (frames >= threshold).view(np.uint8)
    np.negative(negative, out=negative)  # 1 → 255
    negative ^= frames
    return negative


def solarize_add(frames: np.ndarray, addition: int) -> np.ndarray:
    """Add `addition` to the values below 128, with a maximum of 255."""
    values = np.arange(256)
    return _look_up(frames, np.where(values < 128, np.minimum(values + addition, 255), values))


def posterize(frames: np.ndarray, bits: int) -> np.ndarray:
    """Keep the `bits` highest of the 8 bits; 0 gives black."""
    return frames & np.uint8(0xFF00 >> bits & 0xFF)


def brightness(frames: np.ndarray, factor: float) -> np.ndarray:
    """Scale the brightness: 0 gives black, 1 leaves the clip unchanged."""
    return _look_up(frames, _blend_table(0, factor))


def contrast(frames: np.ndarray, factor: float) -> np.ndarray:
    """Scale the contrast: 0 gives the mean grey of each frame, 1 leaves the clip unchanged."""
    means = [int(_luma(frame).mean(dtype=np.float64) + 0.5) for frame in frames]
    tables = np.stack([_blend_table(mean, factor) for mean in means])
    return _look_up(frames, tables[:, None].repeat(3, axis=1))


def autocontrast(frames: np.ndarray) -> np.ndarray:
    """Stretch each channel of each frame to the range from 0 to 255."""
    low = frames.min(axis=1).min(axis=1)[..., None].astype(int)  # (t c 1)
    high = frames.max(axis=1).max(axis=1)[..., None].astype(int)
    scale = 255.0 / np.maximum(high - low, 1)
    values = np.arange(256)[None, None]
    tables = (values * scale - low * scale).astype(int).clip(0, 255)  # truncated, as Pillow does
    return _look_up(frames, np.where(high > low, tables, values))


def equalize(frames: np.ndarray) -> np.ndarray:
    """Equalize the histogram of each channel of each frame."""
    counts = [
        [cv2.calcHist([frame], [c], None, [256], [0, 256]) for c in range(3)] for frame in frames
    ]
    counts = np.array(counts, np.int64)  # (t c 256)
    highest = 255 - (counts[..., ::-1] > 0).argmax(-1)[..., None]  # (t c 1)
    below_highest = counts.sum(-1, keepdims=True) - np.take_along_axis(counts, highest, -1)
    step = below_highest // 255
    below = counts.cumsum(-1) - counts
    tables = np.minimum((below + step // 2) // np.maximum(step, 1), 255)
    return _look_up(frames, np.where(step > 0, tables, np.arange(256)))


# --- Blends with another image --------------------------------------------------------------------


def color(frames: np.ndarray, factor: float) -> np.ndarray:
    """Scale the saturation: 0 gives grey, 1 leaves the clip unchanged."""
    result = np.empty_like(frames, order="C")
    for frame, colored in zip(frames, result, strict=True):
        grey = cv2.cvtColor(_luma(frame), cv2.COLOR_GRAY2RGB)
        cv2.addWeighted(frame, factor, grey, 1 - factor, _TRUNCATE, colored)
    return result


def sharpness(frames: np.ndarray, factor: float) -> np.ndarray:
    """Scale the sharpness: 0 smooths over 3 × 3 pixels, 1 leaves the clip unchanged.

    The outermost rows and columns of pixels are not changed.
    """
    kernel = np.float32([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    result = frames.copy()
    for frame, sharp in zip(frames, result, strict=True):
        smooth = cv2.filter2D(frame, -1, kernel)
        blended = cv2.addWeighted(frame, factor, smooth, 1 - factor, _TRUNCATE)
        sharp[1:-1, 1:-1] = blended[1:-1, 1:-1]
    return result


# --- Shears, rotations, shifts --------------------------------------------------------------------


def shear_x(frames: np.ndarray, factor: float, interpolation: int) -> np.ndarray:
    """Move each row to the left by `factor` times its distance from the top.

    Args:
        frames: `(t, h, w, c)` uint8.
        factor: Shift in pixels per row; a negative shift moves the row to the right.
        interpolation: OpenCV's `INTER_LINEAR` or `INTER_CUBIC`.

    Returns:
        An array like `frames`; pixels from outside of the frame are grey.
    """
    return _shift(frames, factor * (np.arange(frames.shape[1]) + 0.5), interpolation)


def shear_y(frames: np.ndarray, factor: float, interpolation: int) -> np.ndarray:
    """Move each column up by `factor` times its distance from the left; see `shear_x`."""
    shifts = factor * (np.arange(frames.shape[2]) + 0.5)
    return _shift(frames, shifts, interpolation, columns=True)


def translate_x(frames: np.ndarray, share: float, interpolation: int) -> np.ndarray:
    """Move the frame to the left by a fraction of its width; see `shear_x`."""
    _, h, w, _ = frames.shape
    return _shift(frames, np.full(h, share * w), interpolation)


def translate_y(frames: np.ndarray, share: float, interpolation: int) -> np.ndarray:
    """Move the frame up by a fraction of its height; see `shear_x`."""
    _, h, w, _ = frames.shape
    return _shift(frames, np.full(w, share * h), interpolation, columns=True)


def rotate(frames: np.ndarray, degrees: float, interpolation: int) -> np.ndarray:
    """Rotate the frame counter-clockwise around its centre; see `shear_x`."""
    _, h, w, _ = frames.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    right = (w - cos * w + sin * h) / 2
    down = (h - sin * w - cos * h) / 2
    if not degrees:
        return frames
    # The pixel at (x, y) comes from (from_x, from_y); the first pixel's centre is (½, ½).
    x, y = np.arange(w)[None] + 0.5, np.arange(h)[:, None] + 0.5
    from_x, from_y = cos * x - sin * y + right, sin * x + cos * y + down  # (h w)
    outside = (from_x < 0) | (from_x >= w) | (from_y < 0) | (from_y >= h)
    fill, mask = np.full((h, w, 3), _FILL, np.uint8), outside.astype(np.uint8)
    # Repeat the edge as far as the kernels reach, and fill the outside afterwards: OpenCV's own
    # fill would bleed inwards. In OpenCV, the centre of the first pixel is (0, 0).
    pad = 3
    right, down = right + (cos - sin - 1) / 2 + pad, down + (sin + cos - 1) / 2 + pad
    matrix = np.array([[cos, -sin, right], [sin, cos, down]])
    flags = interpolation | cv2.WARP_INVERSE_MAP
    result = np.empty_like(frames, order="C")
    for frame, turned in zip(frames, result, strict=True):
        padded = cv2.copyMakeBorder(frame, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
        if interpolation == cv2.INTER_LINEAR:  # twice as fast with a fourth channel
            padded = cv2.cvtColor(padded, cv2.COLOR_RGB2RGBA)
            four = cv2.warpAffine(padded, matrix, (w, h), flags=flags)
            cv2.cvtColor(four, cv2.COLOR_RGBA2RGB, turned)
        else:
            cv2.warpAffine(padded, matrix, (w, h), turned, flags)
        cv2.copyTo(fill, mask, turned)
    return result


# --- Helpers --------------------------------------------------------------------------------------


def _shift(
    frames: np.ndarray, shifts: np.ndarray, interpolation: int, *, columns: bool = False
) -> np.ndarray:
    """Move row `i` to the left by `shifts[i]` pixels; with `columns`, move column `i` up.

    All pixels of a row have the same fractional offset, so one small filter computes them.
    """
    if not shifts.any():
        return frames
    t, h, w, _ = frames.shape
    h, w = (w, h) if columns else (h, w)  # below, columns are rows of the transposed frame
    # One more pixel on the left: the first pixel of a row may come from half a pixel outside.
    rows = np.empty((h, t, w + 1, 3), np.uint8)
    for i, frame in enumerate(frames):
        rows[:, i, 1:] = cv2.transpose(frame) if columns else frame
    rows[:, :, 0] = rows[:, :, 1]
    # All rows between two bounds have the same shift.
    bounds = [0, *np.flatnonzero(np.diff(shifts)) + 1, h]
    for top, bottom in itertools.pairwise(bounds):
        run, shift = rows[top:bottom], shifts[top]
        whole = math.floor(shift)
        # The source of pixel x, x + ½ + shift, is inside the frame if it is at least 0 and below w.
        first, end = (min(max(math.ceil(x - 0.5 - shift), 0), w) for x in (0, w))
        moved = cv2.filter2D(
            run.reshape(-1, w + 1, 3),
            -1,
            _kernel(shift - whole, interpolation),
            anchor=(1, 0),
            delta=_TRUNCATE,
            borderType=cv2.BORDER_REPLICATE,
        ).reshape(run.shape)
        run[:, :, first + 1 : end + 1] = moved[:, :, first + whole + 1 : end + whole + 1]
        run[:, :, 1 : first + 1] = run[:, :, end + 1 :] = _FILL
    result = np.empty_like(frames, order="C")
    for i, frame in enumerate(result):
        frame[:] = cv2.transpose(rows[:, i, 1:]) if columns else rows[:, i, 1:]
    return result


def _kernel(d: float, interpolation: int) -> np.ndarray:
    """Return Pillow's weights `(1, 4)` of the pixels -1 to 2 for position `d` in [0, 1)."""
    if interpolation == cv2.INTER_LINEAR:
        return np.float32([[0, 1 - d, d, 0]])
    e = 1 - d
    return np.float32([[-d * e * e, (1 + d - d * d) * e, (1 + e - e * e) * d, -e * d * d]])


def _look_up(frames: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Replace each pixel value by its entry in a look-up table.

    Args:
        frames: `(t, h, w, c)` uint8.
        tables: `(256,)` for all channels of all frames, or `(t, c, 256)`; entries 0 to 255.

    Returns:
        An array like `frames`.
    """
    result = np.empty_like(frames, order="C")
    tables = np.broadcast_to(tables.astype(np.uint8), (len(frames), *tables.shape[-2:]))
    for frame, table, replaced in zip(frames, tables, result, strict=True):
        cv2.LUT(frame, np.ascontiguousarray(table.T).reshape(1, 256, -1), replaced)
    return result


def _luma(frame: np.ndarray) -> np.ndarray:
    """Convert a frame `(h, w, c)` uint8 to grey `(h, w)` uint8 with Pillow's weights."""
    # Exact: Pillow's weights are multiples of 2⁻¹⁶, so every sum fits into the 24-bit mantissa of a
    # float32.
    weights = np.float32([19595, 38470, 7471]) / 2**16
    grey = cv2.transform(frame.astype(np.float32), weights[None])
    grey += np.float32(0.5)
    return grey.astype(np.uint8)


def _blend_table(start: int, factor: float) -> np.ndarray:
    """Return the table `(256,)` uint8 of `start + factor · (value - start)`.

    As in Pillow's blend, entries are computed in float32, clipped and truncated.
    """
    blended = np.arange(256, dtype=np.float32) - np.float32(start)
    blended = blended * np.float32(factor) + np.float32(start)
    return blended.clip(0, 255).astype(np.uint8)
