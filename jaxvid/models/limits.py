"""Limits of config fields, and the checks that every family's config shares."""

import dataclasses
import numbers
from typing import Any

from jaxvid.errors import short_repr

MAX_PARAMS = 10**10  # 40 GB in float32
MAX_TOKENS = 2**16  # patches per frame
# Field → lowest and highest value. Networks larger than all published ones are within the limits.
# Mistyped or hostile values are rejected before anything is built.
LIMITS = {
    "num_classes": (1, 10**6),
    "num_frames": (1, 4096),
    "image_size": (1, 8192),
    "patch_size": (1, 8192),
    "width": (1, 2**15),
    "depth": (1, 128),
    "heads": (1, 2**10),
    "mlp_ratio": (1, 64),
    "temporal_depth": (1, 128),
    "temporal_heads": (1, 2**10),
    "temporal_mlp": (1, 2**18),
    "temporal_embedding_frames": (0, 4096),
    "shift_segment": (1, 4096),
    "shift_div": (2, 2**15),
    "head_depth": (1, 128),
    "dropout": (0, 1),
    "drop_path": (0, 1),
}


def check_fields(config: Any) -> None:
    """Check the type of every field, and its range where `LIMITS` has one.

    Args:
        config: A config dataclass. Its fields are annotated `int`, `float`, `bool`, `str` or
            `tuple[int, ...]`.

    Raises:
        ValueError: A field has the wrong type or is out of range.
    """
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if not _has_type(value, field.type):
            expected = getattr(field.type, "__name__", str(field.type))
            raise ValueError(f"{name}={short_repr(value)}: expected type {expected}")
        if name in LIMITS:
            low, high = LIMITS[name]
            if not low <= value <= high:  # NaN fails too
                raise ValueError(f"{name}={short_repr(value)}: must be {low} to {high}")


def _has_type(value: object, expected: type) -> bool:
    if expected in (bool, str):
        return isinstance(value, expected)
    if expected in (int, float):
        number = numbers.Integral if expected is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    # `expected` is `tuple[int, ...]`; a config from JSON has a list.
    return isinstance(value, list | tuple) and all(_has_type(item, int) for item in value)


def check_divisible(config: Any, **divisors: str) -> None:
    """Check that config fields are divisible by other fields.

    Args:
        config: A config dataclass.
        **divisors: Field → the field that must divide it.

    Raises:
        ValueError: A field is not divisible, or a value is below 1.
    """
    for name, divisor_name in divisors.items():
        value, divisor = getattr(config, name), getattr(config, divisor_name)
        if divisor < 1 or value < 1 or value % divisor:
            raise ValueError(f"{name}={value} is not divisible by {divisor_name}={divisor}")


def check_size(config: Any) -> None:
    """Check that a network is not larger than `MAX_TOKENS` and `MAX_PARAMS` allow.

    Raises:
        ValueError: The network has too many patches per frame or too many parameters.
    """
    tokens = (config.image_size // config.patch_size) ** 2
    if tokens > MAX_TOKENS:
        raise ValueError(
            f"image_size={config.image_size}, patch_size={config.patch_size}: {tokens} patches per "
            f"frame, at most {MAX_TOKENS}"
        )
    if (count := config.num_params()) > MAX_PARAMS:
        raise ValueError(f"{count / 1e9:.0f} G parameters, at most {MAX_PARAMS / 1e9:.0f} G")
