"""Check of the arrays that a network is called with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.errors import InputError

# Position of the channels in other orders of the axes → the order, and the transposition to
# `(b, t, h, w, c)`.
OTHER_ORDERS = {
    1: ("(b, c, t, h, w), as in PyTorch", (0, 2, 3, 4, 1)),
    2: ("(b, t, c, h, w)", (0, 1, 3, 4, 2)),
}


def check_clips(video: Any) -> None:
    """Refuse an array that is not a batch of normalised clips `(b, t, h, w, 3)`.

    Raises:
        InputError: The array has a wrong type, dtype or shape. The message says how to convert it.
    """
    is_array = isinstance(video, jax.Array | np.ndarray)
    array = "video" if is_array else "numpy.asarray(video)"
    shape = tuple(getattr(video, "shape", ()))
    if len(shape) == 4 and shape[-1] == 3:
        raise InputError(
            f"video: expected a batch of clips (b, t, h, w, 3), got shape {shape}; add the batch "
            f"axis with {array}[None]"
        )
    if len(shape) == 5 and shape[-1] != 3:
        for axis, (order, axes) in OTHER_ORDERS.items():
            if shape[axis] == 3:
                raise InputError(
                    f"video: expected clips (b, t, h, w, 3), got shape {shape}, which looks like "
                    f"{order}; use {array}.transpose{axes}"
                )
    if not is_array:
        raise InputError(
            f"video: expected an array of JAX or NumPy, got {type(video).__name__}; convert it "
            "with numpy.asarray"
        )
    if len(shape) != 5 or shape[-1] != 3:
        raise InputError(f"video: expected clips of shape (b, t, h, w, 3), got {shape}")
    if not jnp.issubdtype(video.dtype, jnp.floating):
        raise InputError(
            f"video: expected normalised float clips, got {video.dtype}; make them from frames "
            "with jaxvid.make_transform(model)"
        )
