"""Space-time mixing attention (Bulat et al., NeurIPS 2021, arXiv:2106.05968, section 3.2).

Attention within each frame whose keys and values take channels from the neighbouring frames.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxvid.models.layers import SelfAttention


def shift_time(x: jax.Array, segment: int, fold: int, *, groups: int = 1) -> jax.Array:
    """Replace a part of the channels by those of the neighbouring frames.

    In each group of channels, `[0, fold)` come from frame t+1, `[fold, 2·fold)` from frame t-1,
    and the rest are unchanged.

    Args:
        x: Keys or values `(b, t, n, d)`, the heads side by side in `d`.
        segment: Frames within which channels are shifted; zeros enter at its ends. Divides `t`.
        fold: Number of channels of a group that are taken from either side.
        groups: Number of channel groups in `d`: 1 (the released models), or one per head.

    Returns:
        The shifted `x`, `(b, t, n, d)`.
    """
    b, t, n, d = x.shape
    parts = x.reshape(b, t // segment, segment, n, groups, d // groups)
    edge = jnp.zeros_like(parts[:, :, :1, ..., :fold])
    after = jnp.concatenate([parts[:, :, 1:, ..., :fold], edge], axis=2)
    before = jnp.concatenate([edge, parts[:, :, :-1, ..., fold : 2 * fold]], axis=2)
    return jnp.concatenate([after, before, parts[..., 2 * fold :]], axis=-1).reshape(x.shape)


def summarize(x: jax.Array, segment: int) -> jax.Array:
    """Return the summary tokens of each frame: the mean patch token of each frame of its segment.

    Args:
        x: Keys or values `(b, t, n, d)`. The means leave out the class token, token 0.
        segment: Frames per segment. Divides `t`.

    Returns:
        `(b, t, segment, d)`.
    """
    b, t, _, d = x.shape
    means = x[:, :, 1:].mean(axis=2).reshape(b, t // segment, 1, segment, d)
    means = jnp.broadcast_to(means, (b, t // segment, segment, segment, d))
    return means.reshape(b, t, segment, d)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixing:
    """How a block's keys and values mix neighbouring frames.

    Attributes:
        segment: Frames per segment.
        groups: Number of channel groups.
        fold: Number of channels of a group that are taken from either side.
        shift_keys: Whether keys are shifted.
        shift_values: Whether values are shifted.
        summary_tokens: Whether summary tokens are appended to keys and values.
    """

    segment: int
    groups: int
    fold: int
    shift_keys: bool
    shift_values: bool
    summary_tokens: bool


class MixingAttention(SelfAttention):
    """Attention within each frame over keys and values that mix neighbouring frames."""

    def __init__(self, heads: int, qkv: nnx.Linear, proj: nnx.Linear, mixing: Mixing):
        super().__init__(heads, qkv, proj)
        self.mixing = mixing

    def split(self, x: jax.Array) -> list[jax.Array]:
        """Return queries `(b t n d)`, and mixed keys and values `(b t m d)`."""
        q, k, v = super().split(x)
        mix = self.mixing
        shifted = [
            shift_time(a, mix.segment, mix.fold, groups=mix.groups) if shifts else a
            for a, shifts in ((k, mix.shift_keys), (v, mix.shift_values))
        ]
        if mix.summary_tokens:
            shifted = [
                jnp.concatenate([a, summarize(plain, mix.segment)], axis=2)
                for a, plain in zip(shifted, (k, v), strict=True)
            ]
        return [q, *shifted]
