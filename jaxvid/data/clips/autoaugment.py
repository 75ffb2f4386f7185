"""AutoAugment and RandAugment for clips `(t, h, w, c)` uint8 RGB.

Random choices are made once per clip and apply to all its frames.
"""

from collections.abc import Callable

import cv2
import numpy as np

from jaxvid.data.clips import image_ops

# The ImageNet policy "v0" of the TPU EfficientNet program, after Cubuk et al., "AutoAugment",
# arXiv:1805.09501. A sub-policy is two operations: (name, probability, level from 0 to 10).
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
    """Apply one random sub-policy of `AUTOAUGMENT_V0` to a clip.

    Args:
        frames: `(t, h, w, c)` uint8 RGB.
        rng: Generator that draws the sub-policy, whether each operation of it is applied, and the
            sign and interpolation of shears, rotations and shifts.

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
    """Apply random operations of equal magnitude to a clip (Cubuk et al., arXiv:1909.13719).

    Args:
        frames: `(t, h, w, c)` uint8 RGB.
        rng: Generator that draws the operations, and the sign and interpolation of shears,
            rotations and shifts.
        num_layers: Number of operations, drawn with replacement.
        magnitude: Level of the operations, from 0 to 10.

    Returns:
        An array like `frames`.

    Raises:
        ValueError: The magnitude is out of range.
    """
    if not 0 <= magnitude <= 10:
        raise ValueError(f"randaugment_magnitude={magnitude}: must be 0 to 10")
    names = tuple(OPERATIONS)
    for _ in range(num_layers):
        frames = apply_operation(frames, names[rng.integers(len(names))], magnitude, rng)
    return frames


def apply_operation(
    frames: np.ndarray, name: str, level: float, rng: np.random.Generator
) -> np.ndarray:
    """Apply the operation `name` of `OPERATIONS` at a level from 0 to 10.

    Levels are those of the TPU EfficientNet program. A higher level shears, rotates and shifts
    more. It increases brightness, contrast, saturation, sharpness and the addition of
    `solarize_add`, but solarizes and posterizes less. It has no effect on the other operations.
    """
    operation, arguments = OPERATIONS[name]
    return operation(frames, *arguments(level, rng))


def _none(level: float, rng: np.random.Generator) -> tuple:
    return ()


def _enhancement(level: float, rng: np.random.Generator) -> tuple[float]:
    return (level / 10 * 1.8 + 0.1,)


def _geometry(full: float) -> Callable:
    """Return a function from a level to ±level / 10 · `full` and an interpolation.

    The sign and the interpolation are random.
    """

    def arguments(level: float, rng: np.random.Generator) -> tuple[float, int]:
        value = level / 10 * full * rng.choice((-1, 1))
        return value, int(rng.choice((cv2.INTER_LINEAR, cv2.INTER_CUBIC)))

    return arguments


# Name → operation, and function that returns the operation's arguments for a level from 0 to 10.
OPERATIONS: dict[str, tuple[Callable, Callable]] = {
    "autocontrast": (image_ops.autocontrast, _none),
    "equalize": (image_ops.equalize, _none),
    "invert": (image_ops.invert, _none),
    "posterize": (image_ops.posterize, lambda level, rng: (int(level / 10 * 4),)),
    "solarize": (image_ops.solarize, lambda level, rng: (int(level / 10 * 256),)),
    "solarize_add": (image_ops.solarize_add, lambda level, rng: (int(level / 10 * 110),)),
    "brightness": (image_ops.brightness, _enhancement),
    "color": (image_ops.color, _enhancement),
    "contrast": (image_ops.contrast, _enhancement),
    "sharpness": (image_ops.sharpness, _enhancement),
    "rotate": (image_ops.rotate, _geometry(30)),  # degrees
    "shear_x": (image_ops.shear_x, _geometry(0.3)),  # pixels per pixel
    "shear_y": (image_ops.shear_y, _geometry(0.3)),
    "translate_x": (image_ops.translate_x, _geometry(0.45)),  # fraction of the width
    "translate_y": (image_ops.translate_y, _geometry(0.45)),  # fraction of the height
}
