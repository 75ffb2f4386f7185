"""What both models share unchanged: patch embedding, attention, MLP, drop-path, initialisers.

Axis letters: `b` clips, `t` frames, `h w` pixels, `n` tokens, `k` heads, `d` width, `e` head width,
`c` channels. Modules hold no random state: whatever is random takes its key at the call.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx

# torch.nn.Linear's default: uniform within ±1/sqrt(fan_in), for the kernel and for the bias.
torch_kernel_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_linear(fan_in: int, fan_out: int, dtype: str, *, rngs: nnx.Rngs) -> nnx.Linear:
    """A Linear layer with torch's default initial weights and bias."""
    bound = fan_in**-0.5

    def bias_init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(
        fan_in, fan_out, kernel_init=torch_kernel_init, bias_init=bias_init, dtype=dtype, rngs=rngs
    )


def layer_norm(width: int, eps: float, dtype: str, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the last axis: statistics in float32, the variance in its two-pass form."""
    return nnx.LayerNorm(width, epsilon=eps, dtype=dtype, use_fast_variance=False, rngs=rngs)


def check_divides(config, **divisors: str) -> None:
    """Raises a ValueError for a config field that another one (named) does not divide."""
    for name, divisor in divisors.items():
        value, by = getattr(config, name), getattr(config, divisor)
        if by < 1 or value < 1 or value % by:
            raise ValueError(f"{name}={value} does not divide by {divisor}={by}")


def check_options(config, **options: tuple[str, ...]) -> None:
    """Raises a ValueError for a config field whose value is none of its options."""
    for name, valid in options.items():
        if getattr(config, name) not in valid:
            raise ValueError(f"{name}={getattr(config, name)!r} is not one of {', '.join(valid)}")


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """`(b, t, n, d)` → `(b, t, k, n, e)`."""
    return x.reshape(*x.shape[:3], heads, -1).swapaxes(2, 3)


def attention_weights(q: jax.Array, k: jax.Array, heads: int) -> jax.Array:
    """How much each query attends to each key, within each frame.

    Args:
        q: Queries `(b, t, n, d)`, the heads side by side in `d`.
        k: Keys `(b, t, m, d)`.
        heads: Number of heads; divides `d`.

    Returns:
        `(b, t, k, n, m)`, float32; rows sum to 1.
    """
    q, k = split_heads(q, heads), split_heads(k, heads)
    scores = jnp.matmul(
        q * q.shape[-1] ** -0.5, k.swapaxes(-1, -2), preferred_element_type=jnp.float32
    )
    return jax.nn.softmax(scores, axis=-1)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    heads: int,
    *,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention within each frame; the softmax runs in float32.

    Args:
        q: Queries `(b, t, n, d)`, the heads side by side in `d`.
        k: Keys `(b, t, m, d)`.
        v: Values, of the keys' shape.
        heads: Number of heads; divides `d`.
        rate: Dropout rate on the weights.
        key: PRNG key of that dropout; None: no dropout.

    Returns:
        `(b, t, n, d)`, in the dtype of `v`.
    """
    weights = dropout(attention_weights(q, k, heads), rate, key).astype(v.dtype)
    return jnp.matmul(weights, split_heads(v, heads)).swapaxes(2, 3).reshape(q.shape)


def record_attention(
    blocks: Iterable[nnx.Module], x: jax.Array, heads: int
) -> tuple[jax.Array, jax.Array]:
    """Runs pre-norm blocks on tokens `(b, t, n, d)` and computes their attention weights beside it.

    Returns:
        The tokens after the last block, and the weights `(b, blocks, t, k, n, m)`.
    """
    weights = []
    for block in blocks:
        q, k, _ = block.attn.split(block.norm1(x))
        weights.append(attention_weights(q, k, heads))
        x = block(x)
    return x, jnp.stack(weights, axis=1)


def drop_path(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Stochastic depth: zeroes a residual branch, frame by frame, and rescales those that stay.

    Args:
        x: A residual branch `(b, t, n, d)`.
        rate: Probability that a frame's branch is dropped.
        key: PRNG key; None (evaluation) returns `x`.
    """
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (*x.shape[:2], 1, 1))
    return jnp.where(keep, x / (1 - rate), 0)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes elements of `x` with probability `rate` and rescales the rest; None: returns `x`."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


class PatchEmbed(nnx.Module):
    """Cuts each frame into patches and projects them: `(b t h w c)` → `(b t n d)`."""

    def __init__(self, patch_size: int, width: int, dtype: str, *, rngs: nnx.Rngs):
        self.patch_size = patch_size
        self.proj = nnx.Conv(
            3,
            width,
            (patch_size, patch_size),
            strides=patch_size,
            padding="VALID",
            kernel_init=torch_kernel_init,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, video: jax.Array) -> jax.Array:
        # Patches do not overlap, so the convolution is one matmul over flattened patches.
        if video.ndim != 5 or video.shape[-1] != 3:
            raise ValueError(f"a clip of shape {video.shape} is not (b, t, h, w, 3)")
        b, t, h, w, c = video.shape
        p = self.patch_size
        if h % p or w % p:
            raise ValueError(f"frames of {h}x{w} px do not divide into patches of {p} px")
        x = video.reshape(b, t, h // p, p, w // p, p, c).swapaxes(3, 4)  # (b t h/p w/p p p c)
        x = x.reshape(b, t, (h // p) * (w // p), p * p * c)  # (b t n p·p·c)
        kernel = self.proj.kernel[...].reshape(p * p * c, -1)
        dtype = self.proj.dtype
        return x.astype(dtype) @ kernel.astype(dtype) + self.proj.bias[...].astype(dtype).reshape(
            1, 1, 1, -1
        )


class Mlp(nnx.Module):
    """Two Linear layers with the exact (erf) GELU between them.

    Args:
        make_linear: `(fan_in, fan_out) → nnx.Linear`: decides initial weights and dtype.
    """

    def __init__(self, width: int, hidden: int, make_linear: Callable[[int, int], nnx.Linear]):
        self.fc1 = make_linear(width, hidden)
        self.fc2 = make_linear(hidden, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))
