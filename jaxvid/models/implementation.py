"""Implementation choices, which change the speed and the memory of a network but not its results.

All choices give the same numbers up to rounding in the compute dtype.
"""

from typing import Any

import jax

from jaxvid.errors import InputError, check_option

# Config field → its values.
CHOICES = {
    "attention": ("auto", "matmul", "xla", "cudnn"),
    "scan": ("auto", "on", "off"),
    "remat": ("none", "dots", "full"),
}
# Backend → its fastest choices, measured by `benchmarks/forward.py --against FIELD=VALUE`. Backends
# that were not measured use the choices of the CPU.
FASTEST = {"cpu": {"attention": "matmul", "scan": "on"}}


def check_choices(config: Any) -> None:
    """Refuse invalid values of the fields in `CHOICES`.

    Raises:
        ValueError: A value does not exist, or the attention does not support the dtype.
    """
    for field, choices in CHOICES.items():
        check_option(field, getattr(config, field), choices)
    if config.attention == "cudnn" and config.compute_dtype != "bfloat16":
        raise ValueError(
            f"attention='cudnn' needs dtype='bfloat16', not {config.dtype!r}: "
            "cuDNN's attention does not support float32"
        )


def choose(field: str, choice: str) -> str:
    """Return a choice, or the fastest one for this backend if it is `auto`.

    Raises:
        InputError: The choice does not exist on this backend.
    """
    backend = jax.default_backend()
    if choice == "auto":
        return FASTEST.get(backend, FASTEST["cpu"])[field]
    if choice == "cudnn" and backend != "gpu":
        raise InputError(
            f"model.{field}=cudnn: needs an NVIDIA GPU, but the backend is {backend}; "
            f"use model.{field}=auto"
        )
    return choice
