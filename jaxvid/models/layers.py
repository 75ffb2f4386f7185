"""What both models share unchanged: patch embedding, attention, MLP, drop-path, initialisers.

Axis letters: `b` clips, `t` frames, `h w` pixels, `n` tokens, `k` heads, `d` width, `e` head width,
`c` channels. Modules hold no random state: whatever is random takes its key at the call.
"""

import dataclasses
import functools
import itertools
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxvid.errors import short_repr

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


MAX_PARAMS = 10**10  # 40 GB in float32
MAX_TOKENS = 2**16  # patches a frame
# Fields of both models' configs → lowest and highest value. They leave room for networks larger
# than any that was published, and stop a mistyped or hostile value before anything is built.
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


def check_fields(config) -> None:
    """Raises a ValueError for a config field of the wrong type or outside `LIMITS`.

    Args:
        config: A config dataclass. Its fields are annotated `int`, `float`, `bool`, `str` or
            `tuple[int, ...]`.
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


def _has_type(value, expected: type) -> bool:
    if expected in (bool, str):
        return isinstance(value, expected)
    if expected in (int, float):
        number = numbers.Integral if expected is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, list | tuple) and all(_has_type(item, int) for item in value)


def check_size(config) -> None:
    """Raises a ValueError for a config whose network could not be held by any machine."""
    tokens = (config.image_size // config.patch_size) ** 2
    if tokens > MAX_TOKENS:
        raise ValueError(
            f"image_size={config.image_size}, patch_size={config.patch_size}: {tokens} patches a "
            f"frame, at most {MAX_TOKENS}"
        )
    if (count := config.num_params()) > MAX_PARAMS:
        raise ValueError(f"{count / 1e9:.0f} G parameters, at most {MAX_PARAMS / 1e9:.0f} G")


def linear_params(fan_in: int, fan_out: int, *, bias: bool = True) -> int:
    """Number of weights of a Linear layer."""
    return fan_in * fan_out + bias * fan_out


def block_params(width: int, hidden: int, *, qkv_bias: bool = True) -> int:
    """Number of weights of a transformer block, its two norms included."""
    attention = linear_params(width, 3 * width, bias=qkv_bias) + linear_params(width, width)
    return attention + linear_params(width, hidden) + linear_params(hidden, width) + 4 * width


def image_vit_params(config) -> int:
    """Number of weights of the image ViT inside a model: patches, embeddings, blocks, norm."""
    width, tokens = config.width, (config.image_size // config.patch_size) ** 2 + 1
    embeddings = linear_params(3 * config.patch_size**2, width) + width + tokens * width
    return embeddings + config.depth * block_params(width, config.mlp_ratio * width) + 2 * width


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
            value = short_repr(getattr(config, name))
            raise ValueError(f"{name}={value} is not one of {', '.join(valid)}")


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """`(b, t, n, d)` → `(b, t, k, n, e)`."""
    return x.reshape(*x.shape[:3], heads, -1).swapaxes(2, 3)


def attention_scores(q: jax.Array, k: jax.Array, heads: int) -> jax.Array:
    """Scaled products of queries `(b, t, n, d)` and keys `(b, t, m, d)`: float32 `(b t k n m)`."""
    q, k = split_heads(q, heads), split_heads(k, heads)
    return jnp.matmul(
        q * q.shape[-1] ** -0.5, k.swapaxes(-1, -2), preferred_element_type=jnp.float32
    )


def attention_weights(q: jax.Array, k: jax.Array, heads: int) -> jax.Array:
    """How much each query attends to each key, within each frame.

    Args:
        q: Queries `(b, t, n, d)`, the heads side by side in `d`.
        k: Keys `(b, t, m, d)`.
        heads: Number of heads; divides `d`.

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
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention within each frame; the softmax runs in float32.

    The softmax's sum divides the result instead of the weights, which are `m / e` times as many:
    half the time of `softmax @ v` on a CPU, and a quarter of `jax.nn.dot_product_attention`'s.

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
    scores = attention_scores(q, k, heads)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)  # (b t k n 1)
    weights = dropout(weights, rate, key).astype(v.dtype)
    mixed = jnp.matmul(weights, split_heads(v, heads), preferred_element_type=jnp.float32) / total
    return mixed.astype(v.dtype).swapaxes(2, 3).reshape(q.shape)


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


def drop_path(x: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
    """Stochastic depth: zeroes a residual branch, frame by frame, and rescales those that stay.

    Args:
        x: A residual branch `(b, t, n, d)`.
        rate: Probability that a frame's branch is dropped.
        key: PRNG key; None (evaluation) returns `x`.
    """
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (*x.shape[:2], 1, 1))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


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


class Block(nnx.Module):
    """A pre-norm transformer block: attention, then an MLP, each beside a residual connection.

    Args:
        width: Token width `d`.
        hidden: Hidden width of the MLP.
        eps: Of both norms.
        make_attention: `() → module`, called as `attn(x, num_queries=)`.
        make_linear: As in `Mlp`.
        dtype: Of the computation.
        rngs: Where the initial weights come from.
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
        """Runs the block on tokens.

        Args:
            x: `(b, t, n, d)`.
            rate: Stochastic depth of both branches.
            key: PRNG key of the stochastic depth; None in evaluation.
            num_queries: How many tokens to compute, from the first on; None: all.

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
    rate: float,
    key: jax.Array | None,
    remat: bool,
) -> jax.Array:
    """Runs an image ViT's blocks and returns the only tokens that are used after the last.

    Neighbouring blocks of one structure run as one `lax.scan`. Unrolled, XLA takes twice as long to
    compile a training step, and on a CPU it fuses the backward pass of every block with that of all
    later ones, whose residual gradient it computes again each time: 22 s a step instead of 13. The
    backward pass keeps the Linear layers' outputs and recomputes what lies between them: as fast as
    keeping all, in less than half the memory. The last block computes the class tokens alone.

    Args:
        blocks: The ViT's blocks.
        x: Tokens `(b, t, n, d)`, the class token first.
        rate: Stochastic depth at the last block; rises linearly from 0 at the first.
        key: PRNG key of the stochastic depth; None in evaluation.
        remat: Keep nothing of a block but its input; its backward pass runs it again.

    Returns:
        The frames' class tokens `(b, t, d)`.
    """
    top = max(len(blocks) - 1, 1)

    def run(graphdef, num_queries, x, block):
        state, index = block
        x = nnx.merge(graphdef, state)(
            x,
            rate=rate * index / top,
            key=jax.random.fold_in(key, index) if key is not None and rate else None,
            num_queries=num_queries,
        )
        return x, None

    policies = jax.checkpoint_policies
    keep = policies.nothing_saveable if remat else policies.dots_with_no_batch_dims_saveable
    *inner, last = map(nnx.split, blocks)
    start = 0
    for graphdef, group in itertools.groupby(inner, key=operator.itemgetter(0)):
        states = [state for _, state in group]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        indices = jnp.arange(start, start + len(states))
        step = jax.checkpoint(
            functools.partial(run, graphdef, None), policy=keep, prevent_cse=False
        )
        x, _ = jax.lax.scan(step, x, (stacked, indices))
        start += len(states)
    x, _ = run(last[0], 1, x, (last[1], start))  # so small that remat has nothing to save
    return x[:, :, 0]
