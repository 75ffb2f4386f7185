"""Layers that families share unchanged: patch embedding, attention, MLP, dropout, initialisers.

Axis letters: `b` clips, `t` frames, `h w` pixels, `n` tokens, `k` heads, `d` width, `e` head width,
`c` channels. Modules store no random state: PRNG keys are arguments of the call.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxvid.models.clip_check import check_clips
from jaxvid.models.implementation import choose

# Default of torch.nn.Linear and torch.nn.Conv2d for the kernel: uniform within ±1/sqrt(fan_in).
torch_kernel_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_linear(fan_in: int, fan_out: int, dtype: str, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Return a Linear layer with PyTorch's default initialisation of kernel and bias."""
    bound = fan_in**-0.5

    def bias_init(
        key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
    ) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(
        fan_in, fan_out, kernel_init=torch_kernel_init, bias_init=bias_init, dtype=dtype, rngs=rngs
    )


def qkv_linear(
    width: int,
    kernel_init: nnx.initializers.Initializer,
    dtype: str,
    *,
    use_bias: bool = True,
    rngs: nnx.Rngs,
) -> nnx.LinearGeneral:
    """Return a Linear layer from `d` to queries, keys and values, `(3, d)`.

    Its initial weights are those of a Linear layer from `d` to `3·d`. The kernel `(d, 3, d)` keeps
    the heads on an axis of their own, so that tensor parallelism gives each device whole heads of
    queries, keys and values.
    """
    return nnx.LinearGeneral(
        width,
        (3, width),
        kernel_init=kernel_init,
        use_bias=use_bias,
        dtype=dtype,
        rngs=rngs,
    )


def layer_norm(width: int, eps: float, dtype: str, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Return a LayerNorm over the last axis, with float32 statistics and two-pass variance."""
    return nnx.LayerNorm(width, epsilon=eps, dtype=dtype, use_fast_variance=False, rngs=rngs)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """Split the last axis into heads: `(b, t, n, d)` → `(b, t, k, n, e)`."""
    return x.reshape(*x.shape[:3], heads, -1).swapaxes(2, 3)


def attention_scores(q: jax.Array, k: jax.Array, heads: int) -> jax.Array:
    """Return the scaled products of queries and keys.

    Args:
        q: Queries `(b, t, n, d)`, the heads side by side in `d`.
        k: Keys `(b, t, m, d)`.
        heads: Number of heads; divides `d`.

    Returns:
        `(b, t, k, n, m)`, float32.
    """
    q, k = split_heads(q, heads), split_heads(k, heads)
    return jnp.matmul(
        q * q.shape[-1] ** -0.5, k.swapaxes(-1, -2), preferred_element_type=jnp.float32
    )


def attention_weights(q: jax.Array, k: jax.Array, heads: int) -> jax.Array:
    """Return the attention weights within each frame: the softmax of `attention_scores`.

    Returns:
        `(b, t, k, n, m)`, float32; rows sum to 1.
    """
    return jax.nn.softmax(attention_scores(q, k, heads), axis=-1)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    heads: int,
    *,
    implementation: str = "matmul",
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Apply scaled dot-product attention within each frame, with a float32 softmax.

    In the explicit implementation, the softmax's denominator divides the result and not the
    attention weights, because these have `m / e` times as many elements. On a CPU, this takes half
    the time of `softmax @ v` and a quarter of the time of `jax.nn.dot_product_attention`.

    Args:
        q: Queries `(b, t, n, d)`, the heads side by side in `d`.
        k: Keys `(b, t, m, d)`.
        v: Values `(b, t, m, d)`.
        heads: Number of heads; divides `d`.
        implementation: A value of the config field `attention`. A single query always uses explicit
            matrix products.
        rate: Dropout rate of the attention weights; above 0 only with `matmul`.
        key: PRNG key of the dropout; None in evaluation: no dropout.

    Returns:
        `(b, t, n, d)`, in the dtype of `v`.
    """
    implementation = choose("attention", implementation)
    if implementation != "matmul" and q.shape[2] > 1:
        return _fused_attention(q, k, v, heads, implementation)
    scores = attention_scores(q, k, heads)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)  # (b t k n 1)
    weights = dropout(weights, rate, key).astype(v.dtype)
    mixed = jnp.matmul(weights, split_heads(v, heads), preferred_element_type=jnp.float32) / total
    return mixed.astype(v.dtype).swapaxes(2, 3).reshape(q.shape)


def _fused_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, heads: int, implementation: str
) -> jax.Array:
    """Apply attention by `jax.nn.dot_product_attention`; the arguments are those of `attend`."""
    b, t, _, d = q.shape
    q_heads, k_heads, v_heads = (x.reshape(b * t, x.shape[2], heads, d // heads) for x in (q, k, v))
    mixed = jax.nn.dot_product_attention(q_heads, k_heads, v_heads, implementation=implementation)
    return mixed.reshape(q.shape)


def record_attention(
    blocks: Iterable[nnx.Module], x: jax.Array, heads: int
) -> tuple[jax.Array, jax.Array]:
    """Run pre-norm blocks and record their attention weights.

    Args:
        blocks: The blocks; their `attn` has the method `split` of `SelfAttention`.
        x: Tokens `(b, t, n, d)`.
        heads: Number of attention heads.

    Returns:
        The tokens after the last block `(b, t, n, d)`, and the attention weights
        `(b, blocks, t, k, n, m)`.
    """
    weights = []
    for block in blocks:
        q, k, _ = block.attn.split(block.norm1(x))
        weights.append(attention_weights(q, k, heads))
        x = block(x)
    return x, jnp.stack(weights, axis=1)


def drop_path(x: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
    """Apply stochastic depth: zero the residual branch of some frames and rescale the others.

    Args:
        x: A residual branch `(b, t, n, d)`.
        rate: Probability that a frame's branch is dropped.
        key: PRNG key; None (evaluation): return `x`.
    """
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (*x.shape[:2], 1, 1))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero elements of `x` with probability `rate` and rescale the rest, unless `key` is None."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


class PatchEmbed(nnx.Module):
    """Linear projection of each frame's patches: `(b t h w c)` → `(b t n d)`."""

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
        check_clips(video)
        b, t, h, w, c = video.shape
        p = self.patch_size
        if h % p or w % p:
            raise ValueError(f"frames of {h}x{w} px are not divisible into patches of {p} px")
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
        width: Input and output width `d`.
        hidden: Hidden width.
        make_linear: Function `(fan_in, fan_out) → nnx.Linear` that sets initial weights and dtype.
    """

    def __init__(self, width: int, hidden: int, make_linear: Callable[[int, int], nnx.Linear]):
        self.fc1 = make_linear(width, hidden)
        self.fc2 = make_linear(hidden, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class SelfAttention(nnx.Module):
    """Multi-head self-attention within each frame.

    Args:
        heads: Number of heads.
        qkv: Layer from `d` to queries, keys and values; see `qkv_linear`.
        proj: Linear layer of the output.
        implementation: A value of the config field `attention`.
    """

    def __init__(
        self, heads: int, qkv: nnx.LinearGeneral, proj: nnx.Linear, implementation: str = "matmul"
    ):
        self.heads = heads
        self.qkv = qkv
        self.proj = proj
        self.implementation = implementation

    def split(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Return queries, keys and values, each `(b t n d)`."""
        return jnp.unstack(self.qkv(x), axis=-2)

    def __call__(self, x: jax.Array, *, num_queries: int | None = None) -> jax.Array:
        q, k, v = self.split(x)
        q = q[:, :, :num_queries]
        return self.proj(attend(q, k, v, self.heads, implementation=self.implementation))


class Block(nnx.Module):
    """A pre-norm transformer block: attention, then an MLP, each with a residual connection.

    Args:
        width: Token width `d`.
        hidden: Hidden width of the MLP.
        eps: ε of both norms.
        make_attention: Function that returns the attention module, which is called as
            `attn(x, num_queries=...)`.
        make_linear: As in `Mlp`.
        dtype: Compute dtype of the norms.
        rngs: Source of the initial weights.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        eps: float,
        make_attention: Callable[[], nnx.Module],
        make_linear: Callable[[int, int], nnx.Linear],
        dtype: str,
        *,
        rngs: nnx.Rngs,
    ):
        self.norm1 = layer_norm(width, eps, dtype, rngs=rngs)
        self.attn = make_attention()
        self.norm2 = layer_norm(width, eps, dtype, rngs=rngs)
        self.mlp = Mlp(width, hidden, make_linear)

    def __call__(
        self,
        x: jax.Array,
        *,
        rate: float | jax.Array = 0.0,
        key: jax.Array | None = None,
        num_queries: int | None = None,
    ) -> jax.Array:
        """Apply the block to tokens.

        Args:
            x: `(b, t, n, d)`.
            rate: Stochastic depth rate of both branches.
            key: PRNG key of the stochastic depth; None in evaluation.
            num_queries: Compute only this number of tokens, from the first on; None: all.

        Returns:
            `(b, t, num_queries, d)`.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        attended = self.attn(self.norm1(x), num_queries=num_queries)
        x = x[:, :, :num_queries] + drop_path(attended, rate, keys[0])
        return x + drop_path(self.mlp(self.norm2(x)), rate, keys[1])


def run_blocks(
    blocks: Sequence[Block],
    x: jax.Array,
    *,
    rate: float = 0.0,
    key: jax.Array | None = None,
    scan: str = "auto",
    remat: str = "dots",
) -> jax.Array:
    """Run an image ViT's blocks and return the class token of each frame.

    With `scan`, consecutive blocks of equal structure, except the last block, run as one
    `lax.scan`, which halves the time to compile a training step. On a CPU, XLA fuses the backward
    pass of each unrolled block with those of all later blocks and computes the gradients of their
    residual branches again: a step takes 22 s instead of 13 s.

    The outputs of the Linear layers (`remat="dots"`) need less than half the memory of all results,
    and the step is as fast. The last block computes only the class tokens, because no other token
    is used after it.

    Args:
        blocks: The ViT's blocks.
        x: Tokens `(b, t, n, d)`, the class token first.
        rate: Stochastic depth rate of the last block. The rates rise linearly from 0 in the first
            block.
        key: PRNG key of the stochastic depth; None in evaluation.
        scan: A value of the config field `scan`.
        remat: A value of the config field `remat`.

    Returns:
        Class tokens `(b, t, d)`.
    """
    last_index = max(len(blocks) - 1, 1)  # at least 1, as a divisor
    scans = choose("scan", scan) == "on"

    def run(
        graphdef: nnx.GraphDef, num_queries: int | None, x: jax.Array, block: tuple
    ) -> tuple[jax.Array, None]:
        state, index = block
        x = nnx.merge(graphdef, state)(
            x,
            rate=rate * index / last_index,
            key=jax.random.fold_in(key, index) if key is not None and rate else None,
            num_queries=num_queries,
        )
        return x, None

    *inner, last = map(nnx.split, blocks)
    start = 0
    for graphdef, group in itertools.groupby(inner, key=operator.itemgetter(0)):
        states = [state for _, state in group]
        step = _rematerialise(functools.partial(run, graphdef, None), remat, in_scan=scans)
        if scans:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            x, _ = jax.lax.scan(step, x, (stacked, jnp.arange(start, start + len(states))))
        else:
            for index, state in enumerate(states, start):
                x, _ = step(x, (state, index))
        start += len(states)
    # The last block has one query per frame. It needs so little memory that it stores everything.
    x, _ = run(last[0], 1, x, (last[1], start))
    return x[:, :, 0]


def _rematerialise(step: Callable, remat: str, *, in_scan: bool) -> Callable:
    """Wrap a block so that its backward pass computes some results again; see `run_blocks`."""
    if remat == "none":
        return step
    policies = jax.checkpoint_policies
    policy = {"dots": policies.dots_with_no_batch_dims_saveable, "full": policies.nothing_saveable}
    # In a scan, XLA cannot merge the repeated computation with the original one anyway.
    return jax.checkpoint(step, policy=policy[remat], prevent_cse=not in_scan)
