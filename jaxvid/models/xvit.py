"""XViT: a ViT whose keys and values are shifted in time (space-time mixing attention).

Bulat et al., "Space-time Mixing Attention for Video Transformer", NeurIPS 2021, arXiv:2106.05968.
Attribute names equal the paths in the released checkpoints' state_dict. Axis letters: layers.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxvid.errors import short_repr
from jaxvid.models.layers import (
    Block,
    PatchEmbed,
    attend,
    block_params,
    check_divides,
    check_fields,
    check_options,
    check_size,
    dropout,
    image_vit_params,
    layer_norm,
    linear_params,
    record_attention,
    run_blocks,
    torch_kernel_init,
    torch_linear,
)
from jaxvid.models.transfer import resize_pos_embed

BACKBONE_EPS = 1e-6
HEAD_EPS = 1e-5
normal_init = nnx.initializers.truncated_normal(0.02)
# Of the backbone: Linear weights, `pos_embed`, `temp_embed`.
INITS = {
    "released": (normal_init, normal_init, nnx.initializers.zeros),
    "small": (
        nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
        nnx.initializers.normal(0.3),
        nnx.initializers.normal(0.3),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class XViTConfig:
    """Sizes and switches of an XViT; impossible values are refused by name.

    Attributes:
        name: The preset that this started from.
        num_classes: Number of logits.
        num_frames: Frames a clip, `t`.
        image_size: Height and width in pixels of the frames that `pos_embed` is made for; other
            multiples of `patch_size` run too, with `pos_embed` resized.
        patch_size: Height and width of a patch in pixels.
        width: Token width `d`.
        depth: Transformer blocks in the backbone.
        heads: Attention heads, in the backbone and in the temporal head.
        mlp_ratio: Hidden width of an MLP over `width`.
        temporal_embedding_frames: Rows of the temporal embedding; a clip is runs of that many
            frames that share them. 0: no temporal embedding.
        shift: What is shifted in time: `both` keys and values, `keys`, `values`, or `none`.
        shift_segment: Frames within which keys and values are shifted; zeros enter at its ends.
        shift_div: `width // shift_div` channels come from the next frame and as many from the
            previous one (paper, section 3.2).
        shift_blocks: Indices of the blocks that shift; empty: all.
        shift_per_head: Shift that part of each head's channels, not of all channels together.
        summary_tokens: Let every frame attend, too, to the mean patch token of each frame of its
            segment (paper, section 3.2, "summary token").
        head: `attention` (the temporal head) or `mean` (the paper's baseline, mean over frames).
        head_depth: Transformer blocks in the temporal head.
        dropout: Rate on the frame features and inside the head.
        drop_path: Stochastic depth at the last block; rises linearly from 0 at the first.
        init: The backbone's initial weights: `released` (truncated normal, std 0.02; temporal
            embedding zero) or `small` (Linear weights 1/sqrt(fan_in), positional and temporal
            embeddings 0.3: learns far faster where the width is small).
        remat: Recompute the backbone's blocks in the backward pass instead of keeping them.
        dtype: `float32` or `bfloat16` for the computation; weights are float32 always.
    """

    name: str
    num_classes: int
    num_frames: int = 16
    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: int = 4
    temporal_embedding_frames: int = 8
    shift: str = "both"
    shift_segment: int = 8
    shift_div: int = 8
    shift_blocks: tuple[int, ...] = ()
    shift_per_head: bool = False
    summary_tokens: bool = False
    head: str = "attention"
    head_depth: int = 1
    dropout: float = 0.5
    drop_path: float = 0.0
    init: str = "released"
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        check_fields(self)
        object.__setattr__(self, "shift_blocks", tuple(self.shift_blocks))
        check_divides(self, width="heads", image_size="patch_size", num_frames="shift_segment")
        if self.temporal_embedding_frames:
            check_divides(self, num_frames="temporal_embedding_frames")
        if outside := [i for i in self.shift_blocks if not 0 <= i < self.depth]:
            raise ValueError(
                f"shift_blocks={short_repr(outside)} lie outside 0..{self.depth - 1} (depth)"
            )
        check_options(
            self,
            shift=("both", "keys", "values", "none"),
            head=("attention", "mean"),
            init=tuple(INITS),
            dtype=("float32", "bfloat16"),
        )
        check_size(self)

    def num_params(self) -> int:
        """Number of weights, computed without building the network."""
        width = self.width
        count = image_vit_params(self) + self.temporal_embedding_frames * width
        count += linear_params(width, self.num_classes)
        if self.head == "attention":
            block = block_params(width, self.mlp_ratio * width, qkv_bias=False)
            count += 3 * width + self.head_depth * block + linear_params(width, width)
        return count


_KINETICS = XViTConfig(name="xvit_k400", num_classes=400)
PRESETS = {
    "xvit_k400": _KINETICS,
    "xvit_k600": dataclasses.replace(_KINETICS, name="xvit_k600", num_classes=600),
    "xvit_ssv2": dataclasses.replace(
        _KINETICS, name="xvit_ssv2", num_classes=174, shift_segment=16, shift_div=4
    ),
    "xvit_tiny": XViTConfig(
        name="xvit_tiny",
        num_classes=8,
        num_frames=8,
        image_size=64,
        width=64,
        depth=3,
        heads=2,
        shift_div=4,
        dropout=0.0,
        init="small",
    ),
}


def shift_time(x: jax.Array, segment: int, fold: int, *, groups: int = 1) -> jax.Array:
    """Takes a part of the channels from the neighbouring frames (paper, section 3.2).

    Of each group's channels, `[0, fold)` come from frame t+1, `[fold, 2·fold)` from frame t-1, and
    the rest stay.

    Args:
        x: Keys or values `(b, t, n, d)`, the heads side by side in `d`.
        segment: Frames within which the shift stays; zeros enter at its ends. Divides `t`.
        fold: Number of channels of a group taken from either side.
        groups: Into how many groups `d` is cut: 1 (the released models), or one a head.

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
    """The summary tokens that each frame sees: the mean patch token of every frame of its segment.

    Keys or values `(b, t, n, d)`, whose class token the means leave out → `(b, t, segment, d)`.
    """
    b, t, _, d = x.shape
    means = x[:, :, 1:].mean(axis=2).reshape(b, t // segment, 1, segment, d)
    means = jnp.broadcast_to(means, (b, t // segment, segment, segment, d))
    return means.reshape(b, t, segment, d)


class Attention(nnx.Module):
    """Attention within each frame over keys and values that mix neighbouring frames."""

    def __init__(self, cfg: XViTConfig, index: int, *, rngs: nnx.Rngs):
        shifts = index in cfg.shift_blocks or not cfg.shift_blocks
        self.heads = cfg.heads
        self.segment = cfg.shift_segment
        self.groups = cfg.heads if cfg.shift_per_head else 1
        self.fold = cfg.width // self.groups // cfg.shift_div
        self.shift_keys = shifts and cfg.shift in ("both", "keys")
        self.shift_values = shifts and cfg.shift in ("both", "values")
        self.summary_tokens = cfg.summary_tokens
        self.qkv = _linear(cfg, cfg.width, 3 * cfg.width, rngs=rngs)
        self.proj = _linear(cfg, cfg.width, cfg.width, rngs=rngs)

    def split(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `(b t n d)`, and mixed keys and values `(b t m d)`."""
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        shifted = [
            shift_time(a, self.segment, self.fold, groups=self.groups) if shifts else a
            for a, shifts in ((k, self.shift_keys), (v, self.shift_values))
        ]
        if self.summary_tokens:
            shifted = [
                jnp.concatenate([a, summarize(plain, self.segment)], axis=2)
                for a, plain in zip(shifted, (k, v), strict=True)
            ]
        return q, *shifted

    def __call__(self, x: jax.Array, *, num_queries: int | None = None) -> jax.Array:
        q, k, v = self.split(x)
        return self.proj(attend(q[:, :, :num_queries], k, v, self.heads))


class Backbone(nnx.Module):
    """The ViT: a clip `(b t h w c)` → the class token of each frame `(b t d)`."""

    def __init__(self, cfg: XViTConfig, *, rngs: nnx.Rngs):
        self.config = cfg
        _, pos_init, temp_init = INITS[cfg.init]
        n = (cfg.image_size // cfg.patch_size) ** 2 + 1
        self.patch_embed = PatchEmbed(cfg.patch_size, cfg.width, cfg.dtype, rngs=rngs)
        self.cls_token = nnx.Param(normal_init(rngs.params(), (1, 1, cfg.width)))
        self.pos_embed = nnx.Param(pos_init(rngs.params(), (1, n, cfg.width)))
        if cfg.temporal_embedding_frames:
            shape = (1, cfg.temporal_embedding_frames, 1, cfg.width)
            self.temp_embed = nnx.Param(temp_init(rngs.params(), shape))
        hidden, linear = cfg.mlp_ratio * cfg.width, functools.partial(_linear, cfg, rngs=rngs)
        attentions = [functools.partial(Attention, cfg, i, rngs=rngs) for i in range(cfg.depth)]
        self.blocks = nnx.List(
            [
                Block(cfg.width, hidden, BACKBONE_EPS, attention, linear, cfg.dtype, rngs=rngs)
                for attention in attentions
            ]
        )
        self.norm = layer_norm(cfg.width, BACKBONE_EPS, cfg.dtype, rngs=rngs)

    def embed(self, video: jax.Array) -> jax.Array:
        """Tokens before the first block: `(b t h w c)` → `(b t n d)`."""
        x = self.patch_embed(video)
        b, t, h, w, _ = video.shape
        p = self.patch_embed.patch_size
        cls_token = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (b, t, 1, x.shape[-1]))
        pos_embed = resize_pos_embed(self.pos_embed[...], (h // p, w // p))
        x = jnp.concatenate([cls_token, x], axis=2) + pos_embed[:, None].astype(x.dtype)
        if hasattr(self, "temp_embed"):
            m = self.temp_embed.shape[1]
            x = x + jnp.tile(self.temp_embed[...], (1, t // m, 1, 1)).astype(x.dtype)
        return x

    def __call__(self, video: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        x, cfg = self.embed(video), self.config
        x = run_blocks(self.blocks, x, rate=cfg.drop_path, key=key, remat=cfg.remat)
        return self.norm(x)  # (b t d)


class HeadAttention(nnx.Module):
    """The temporal head's attention over frames; no bias on queries, keys and values."""

    def __init__(self, cfg: XViTConfig, *, rngs: nnx.Rngs):
        self.heads = cfg.heads
        self.qkv = nnx.Linear(
            cfg.width,
            3 * cfg.width,
            use_bias=False,
            kernel_init=torch_kernel_init,
            dtype=cfg.dtype,
            rngs=rngs,
        )
        self.proj = torch_linear(cfg.width, cfg.width, cfg.dtype, rngs=rngs)

    def split(self, x: jax.Array) -> list[jax.Array]:
        """Queries, keys and values, each `(b 1 n d)`."""
        return jnp.split(self.qkv(x), 3, axis=-1)

    def __call__(self, x: jax.Array, *, num_queries: int | None = None) -> jax.Array:
        q, k, v = self.split(x)
        return self.proj(attend(q[:, :, :num_queries], k, v, self.heads))


class TemporalHead(nnx.Module):
    """Attention over the frames' features, then an MLP: `(b t d)` → logits (paper, section 3.3).

    Frames carry no positional embedding here: their order is known from the backbone alone.
    """

    def __init__(self, cfg: XViTConfig, *, rngs: nnx.Rngs):
        self.dropout = cfg.dropout
        self.cls_token = nnx.Param(jnp.zeros((1, 1, cfg.width)))
        hidden = cfg.mlp_ratio * cfg.width
        linear = functools.partial(torch_linear, dtype=cfg.dtype, rngs=rngs)
        attention = functools.partial(HeadAttention, cfg, rngs=rngs)
        self.temporal_encoder = nnx.List(
            [
                Block(cfg.width, hidden, HEAD_EPS, attention, linear, cfg.dtype, rngs=rngs)
                for _ in range(cfg.head_depth)
            ]
        )
        self.mlp_head = nnx.List(
            [
                layer_norm(cfg.width, HEAD_EPS, cfg.dtype, rngs=rngs),
                torch_linear(cfg.width, cfg.width, cfg.dtype, rngs=rngs),
                None,  # GELU: keeps its place in the released numbering
                None,  # dropout: likewise
                torch_linear(cfg.width, cfg.num_classes, "float32", rngs=rngs),
            ]
        )

    def embed(self, frames: jax.Array) -> jax.Array:
        """Tokens before the first block: `(b t d)` → `(b 1 n d)`, n = 1 + t."""
        b, _, d = frames.shape
        cls_token = jnp.broadcast_to(self.cls_token[...].astype(frames.dtype), (b, 1, d))
        return jnp.concatenate([cls_token, frames], axis=1)[:, None]

    def video_features(self, frames: jax.Array) -> jax.Array:
        """The class token after the blocks and the norm: `(b t d)` → `(b d)`."""
        x = self.embed(frames)
        x = run_blocks(self.temporal_encoder, x, rate=0.0, key=None, remat=False)
        return self.mlp_head[0](x[:, 0])

    def __call__(self, frames: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        _, fc1, _, _, fc2 = self.mlp_head
        x = jax.nn.gelu(fc1(self.video_features(frames)), approximate=False)  # (b d)
        return fc2(dropout(x, self.dropout, key))


class XViT(nnx.Module):
    """The whole classifier, of a config's sizes, with initial weights drawn from `rngs`."""

    def __init__(self, config: XViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.base_model = Backbone(config, rngs=rngs)
        if config.head == "attention":
            self.consensus = TemporalHead(config, rngs=rngs)
        else:
            self.new_fc = torch_linear(config.width, config.num_classes, "float32", rngs=rngs)

    def features(self, video: jax.Array) -> dict[str, jax.Array]:
        """`frames` `(b t d)` and `video` `(b d)`, for a clip `(b t h w c)`."""
        self._check_length(video)
        frames = self.base_model(video)
        if self.config.head == "mean":
            return {"frames": frames, "video": frames.mean(axis=1)}
        return {"frames": frames, "video": self.consensus.video_features(frames)}

    def attention(self, video: jax.Array) -> dict[str, jax.Array]:
        """Attention weights of a clip `(b t h w c)`, computed beside the forward pass.

        `spatial` `(b, blocks, t, k, n, m)`, m = n without summary tokens, and, with the attention
        head, `temporal` `(b, blocks, k, 1 + t, 1 + t)`. Rows are queries and sum to 1; token 0 is
        the class token.
        """
        self._check_length(video)
        heads = self.config.heads
        x, spatial = record_attention(self.base_model.blocks, self.base_model.embed(video), heads)
        if self.config.head == "mean":
            return {"spatial": spatial}
        x = self.consensus.embed(self.base_model.norm(x)[:, :, 0])
        _, temporal = record_attention(self.consensus.temporal_encoder, x, heads)
        return {"spatial": spatial, "temporal": temporal[:, :, 0]}

    def __call__(self, video: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Classifies clips: normalised `(b t h w c)` → logits `(b, num_classes)`, both float32.

        `t`, `h`, `w` may differ from the config's where segment, temporal embedding and patches
        divide them; otherwise a ValueError says which does not. `key` is the PRNG key of dropout
        and drop-path in training, None in evaluation.
        """
        self._check_length(video)
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        frames = self.base_model(video, key=keys[0])  # (b t d)
        frames = dropout(frames, self.config.dropout, keys[1])
        if self.config.head == "mean":
            return self.new_fc(frames.mean(axis=1))
        return self.consensus(frames, key=keys[2])

    def _check_length(self, video: jax.Array) -> None:
        for name in ("shift_segment", "temporal_embedding_frames"):
            divisor = getattr(self.config, name)
            if divisor and video.ndim == 5 and video.shape[1] % divisor:
                raise ValueError(f"{video.shape[1]} frames do not divide by {name}={divisor}")


def _linear(cfg: XViTConfig, fan_in: int, fan_out: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """A Linear layer of the backbone."""
    return nnx.Linear(fan_in, fan_out, kernel_init=INITS[cfg.init][0], dtype=cfg.dtype, rngs=rngs)
