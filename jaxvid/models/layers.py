"""What both models share unchanged: patch embedding, attention, MLP, drop-path, initialisers.

Axis letters: `b` clips, `t` frames, `h w` pixels, `n` tokens, `k` heads, `d` width, `e` head width,
`c` channels. Modules hold no random state: whatever is random takes its key at the call.
"""

import jax
import jax.numpy as jnp
from flax import nnx

# torch.nn.Linear's default: uniform within ±1/sqrt(fan_in), for the kernel and for the bias.
torch_kernel_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> nnx.Initializer:
    """The bias initialiser of a default `torch.nn.Linear` with `fan_in` inputs."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def layer_norm(width: int, eps: float, dtype: str, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the last axis: statistics in float32, the variance in its two-pass form."""
    return nnx.LayerNorm(width, epsilon=eps, dtype=dtype, use_fast_variance=False, rngs=rngs)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Scaled dot-product attention within each frame; the softmax runs in float32.

    Args:
        q: Queries `(b, t, n, d)`, the heads side by side in `d`.
        k: Keys, of the same shape.
        v: Values, of the same shape.
        heads: Number of heads; divides `d`.

    Returns:
        `(b, t, n, d)`, in the dtype of `v`.
    """
    b, t, n, d = q.shape
    q, k, v = (x.reshape(b, t, n, heads, -1).swapaxes(2, 3) for x in (q, k, v))  # (b t k n e)
    scores = jnp.matmul(
        q * q.shape[-1] ** -0.5, k.swapaxes(-1, -2), preferred_element_type=jnp.float32
    )  # (b t k n n)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.matmul(weights, v).swapaxes(2, 3).reshape(b, t, n, d)


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
    """Two Linear layers with the exact (erf) GELU between them."""

    def __init__(
        self,
        width: int,
        hidden: int,
        dtype: str,
        *,
        kernel_init: nnx.Initializer,
        torch_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        def linear(fan_in: int, fan_out: int) -> nnx.Linear:
            bias_init = torch_bias_init(fan_in) if torch_bias else nnx.initializers.zeros
            return nnx.Linear(
                fan_in,
                fan_out,
                kernel_init=kernel_init,
                bias_init=bias_init,
                dtype=dtype,
                rngs=rngs,
            )

        self.fc1 = linear(width, hidden)
        self.fc2 = linear(hidden, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))
