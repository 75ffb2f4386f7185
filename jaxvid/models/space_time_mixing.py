"""Space-time mixing attention (Bulat et al., NeurIPS 2021, arXiv:2106.05968, section 3.2).

Each frame attends to its own tokens. Some channels of their keys and values are replaced by those
of the previous and the next frame.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxvid.models.layers import SelfAttention


def shift_time(x: jax.Array, segment: int, fold: int, *, groups: int = 1) -> jax.Array:
    """Replace some channels of each frame by those of the next and the previous frame.

    In each group of channels, frame t takes channels `[0, fold)` from frame t+1 and channels
    `[fold, 2·fold)` from frame t-1. The other channels are unchanged.

    Args:
        x: Keys or values `(b, t, n, d)`. The axis `d` holds the heads one after the other.
        segment: Number of frames per segment; divides `t`. Channels do not move between segments:
            where a frame has no neighbour in its segment, it takes zeros.
        fold: Number of channels per group that are taken from the next frame. As many are taken
            from the previous frame.
        groups: Number of groups that `d` is split into: 1 (the released models) or the number of
            heads.

    Returns:
        The shifted `x`, `(b, t, n, d)`.
    """
    b, t, n, d = x.shape
    frames = x.reshape(b, t // segment, segment, n, d)
    zeros = jnp.zeros_like(frames[:, :, :1])
    following = jnp.concatenate([frames[:, :, 1:], zeros], axis=2)
    previous = jnp.concatenate([zeros, frames[:, :, :-1]], axis=2)
    channel = (jnp.arange(d) % (d // groups)).reshape(1, 1, 1, 1, d)
    # Select elementwise: with tensor parallelism, slices of `d` would be exchanged between devices.
    shifted = jnp.where(channel < fold, following, jnp.where(channel < 2 * fold, previous, frames))
    return shifted.reshape(x.shape)


def summarize(x: jax.Array, segment: int) -> jax.Array:
    """Return the summary tokens that each frame attends to.

    The mean of the patch tokens of a frame is one summary token. Each frame attends to the summary
    tokens of all frames of its segment.

    Args:
        x: Keys or values `(b, t, n, d)`. Token 0 is the class token, which the means leave out.
        segment: Number of frames per segment; divides `t`.

    Returns:
        `(b, t, segment, d)`: `segment` summary tokens per frame.
    """
    b, t, _, d = x.shape
    means = x[:, :, 1:].mean(axis=2).reshape(b, t // segment, 1, segment, d)
    means = jnp.broadcast_to(means, (b, t // segment, segment, segment, d))
    return means.reshape(b, t, segment, d)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixing:
    """Settings of a block's space-time mixing; see `shift_time` and `summarize`.

    Attributes:
        segment: Number of frames per segment.
        groups: Number of channel groups.
        fold: Number of channels per group that are taken from the next frame. As many are taken
            from the previous frame.
        shift_keys: Whether `shift_time` is applied to the keys.
        shift_values: Whether `shift_time` is applied to the values.
        summary_tokens: Whether summary tokens are appended to keys and values.
    """

    segment: int
    groups: int
    fold: int
    shift_keys: bool
    shift_values: bool
    summary_tokens: bool


class MixingAttention(SelfAttention):
    """Self-attention within each frame, with space-time mixing of keys and values."""

    def __init__(
        self,
        heads: int,
        qkv: nnx.LinearGeneral,
        proj: nnx.Linear,
        mixing: Mixing,
        implementation: str = "matmul",
    ):
        super().__init__(heads, qkv, proj, implementation)
        self.mixing = mixing

    def split(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Return the queries `(b t n d)`, and the keys and values after mixing `(b t m d)`.

        m is n, plus `segment` if there are summary tokens.
        """
        q, k, v = super().split(x)
        mixing = self.mixing
        mixed = [
            shift_time(a, mixing.segment, mixing.fold, groups=mixing.groups) if shifts else a
            for a, shifts in ((k, mixing.shift_keys), (v, mixing.shift_values))
        ]
        if mixing.summary_tokens:
            mixed = [
                jnp.concatenate([shifted, summarize(unshifted, mixing.segment)], axis=2)
                for shifted, unshifted in zip(mixed, (k, v), strict=True)
            ]
        return q, *mixed
