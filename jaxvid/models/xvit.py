"""XViT: a ViT whose keys and values are shifted in time (space-time mixing attention).

Bulat et al., "Space-time Mixing Attention for Video Transformer", NeurIPS 2021, arXiv:2106.05968.
Attribute names equal the paths in the released checkpoints' state_dict. Axis letters: layers.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxvid.models.layers import (
    Mlp,
    PatchEmbed,
    attend,
    drop_path,
    dropout,
    layer_norm,
    torch_bias_init,
    torch_kernel_init,
)
from jaxvid.models.surgery import resize_pos_embed

BACKBONE_EPS = 1e-6
HEAD_EPS = 1e-5
INITS = {
    "normal": nnx.initializers.truncated_normal(0.02),
    "fan_in": nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class XViTConfig:
    """Sizes and switches of an XViT. Errors name the field, its value and what would be valid.

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
        shift_segment: Frames within which keys and values are shifted; zeros enter at its ends.
        shift_div: `width // shift_div` channels come from the next frame and as many from the
            previous one (paper, section 3.2).
        shift_blocks: Indices of the blocks that shift.
        head: `attention` (the temporal head) or `mean` (the paper's baseline, mean over frames).
        head_depth: Transformer blocks in the temporal head.
        dropout: Rate on the frame features and inside the head.
        drop_path: Stochastic depth at the last block; rises linearly from 0 at the first.
        init: Backbone's Linear weights: `normal` (truncated, std 0.02: the released recipe) or
            `fan_in` (std 1/sqrt(fan_in): learns faster where the width is small).
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
    shift_segment: int = 8
    shift_div: int = 8
    shift_blocks: tuple[int, ...] = tuple(range(12))
    head: str = "attention"
    head_depth: int = 1
    dropout: float = 0.5
    drop_path: float = 0.0
    init: str = "normal"
    dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "shift_blocks", tuple(self.shift_blocks))
        for value, name, divisor, divisor_name in (
            (self.width, "width", self.heads, "heads"),
            (self.image_size, "image_size", self.patch_size, "patch_size"),
            (self.num_frames, "num_frames", self.shift_segment, "shift_segment"),
        ):
            if value % divisor:
                raise ValueError(f"{name}={value} does not divide by {divisor_name}={divisor}")
        m = self.temporal_embedding_frames
        if m and self.num_frames % m:
            raise ValueError(
                f"num_frames={self.num_frames} does not divide by temporal_embedding_frames={m}"
            )
        if self.shift_div < 2:
            raise ValueError(f"shift_div={self.shift_div}: two shifted parts need at least 2")
        if outside := [i for i in self.shift_blocks if not 0 <= i < self.depth]:
            raise ValueError(f"shift_blocks={outside} lie outside 0..{self.depth - 1} (depth)")
        for name, value, valid in (
            ("head", self.head, ("attention", "mean")),
            ("init", self.init, tuple(INITS)),
            ("dtype", self.dtype, ("float32", "bfloat16")),
        ):
            if value not in valid:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(valid)}")


PRESETS = {
    "xvit_tiny": XViTConfig(
        name="xvit_tiny",
        num_classes=8,
        num_frames=8,
        image_size=64,
        width=64,
        depth=3,
        heads=2,
        shift_div=4,
        shift_blocks=(0, 1, 2),
        dropout=0.0,
        init="fan_in",
    ),
}


def shift_time(x: jax.Array, segment: int, fold: int) -> jax.Array:
    """Takes a part of the channels from the neighbouring frames (paper, section 3.2).

    Channels `[0, fold)` come from frame t+1, `[fold, 2·fold)` from frame t-1, the rest stay.

    Args:
        x: Keys or values `(b, t, n, d)`, the heads side by side in `d`.
        segment: Frames within which the shift stays; zeros enter at its ends. Divides `t`.
        fold: Number of channels taken from either side.

    Returns:
        The shifted `x`, `(b, t, n, d)`.
    """
    b, t, n, d = x.shape
    x = x.reshape(b, t // segment, segment, n, d)
    edge = jnp.zeros_like(x[:, :, :1, :, :fold])
    after = jnp.concatenate([x[:, :, 1:, :, :fold], edge], axis=2)
    before = jnp.concatenate([edge, x[:, :, :-1, :, fold : 2 * fold]], axis=2)
    return jnp.concatenate([after, before, x[..., 2 * fold :]], axis=-1).reshape(b, t, n, d)


class Attention(nnx.Module):
    """Attention within each frame, with keys and values shifted in time where `shift` is set."""

    def __init__(
        self, cfg: XViTConfig, *, shift: bool, bias: bool, head_init: bool, rngs: nnx.Rngs
    ):
        self.heads = cfg.heads
        self.segment = cfg.shift_segment
        self.fold = cfg.width // cfg.shift_div if shift else 0
        self.qkv = _linear(cfg, cfg.width, 3 * cfg.width, head_init, use_bias=bias, rngs=rngs)
        self.proj = _linear(cfg, cfg.width, cfg.width, head_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)  # 3 × (b t n d)
        if self.fold:
            k, v = (shift_time(a, self.segment, self.fold) for a in (k, v))
        return self.proj(attend(q, k, v, self.heads))


class Block(nnx.Module):
    """A pre-norm transformer block of the backbone."""

    def __init__(self, cfg: XViTConfig, index: int, *, rngs: nnx.Rngs):
        self.drop_path = cfg.drop_path * index / max(cfg.depth - 1, 1)
        self.norm1 = layer_norm(cfg.width, BACKBONE_EPS, cfg.dtype, rngs=rngs)
        self.attn = Attention(
            cfg, shift=index in cfg.shift_blocks, bias=True, head_init=False, rngs=rngs
        )
        self.norm2 = layer_norm(cfg.width, BACKBONE_EPS, cfg.dtype, rngs=rngs)
        self.mlp = Mlp(
            cfg.width,
            cfg.mlp_ratio * cfg.width,
            cfg.dtype,
            kernel_init=INITS[cfg.init],
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        keys = (None, None) if key is None else jax.random.split(key)
        x = x + drop_path(self.attn(self.norm1(x)), self.drop_path, keys[0])
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, keys[1])


class Backbone(nnx.Module):
    """The ViT: a clip `(b t h w c)` → the class token of each frame `(b t d)`."""

    def __init__(self, cfg: XViTConfig, *, rngs: nnx.Rngs):
        normal = INITS["normal"]
        n = (cfg.image_size // cfg.patch_size) ** 2 + 1
        self.patch_embed = PatchEmbed(cfg.patch_size, cfg.width, cfg.dtype, rngs=rngs)
        self.cls_token = nnx.Param(normal(rngs.params(), (1, 1, cfg.width)))
        self.pos_embed = nnx.Param(normal(rngs.params(), (1, n, cfg.width)))
        if cfg.temporal_embedding_frames:
            self.temp_embed = nnx.Param(jnp.zeros((1, cfg.temporal_embedding_frames, 1, cfg.width)))
        self.blocks = nnx.List([Block(cfg, i, rngs=rngs) for i in range(cfg.depth)])
        self.norm = layer_norm(cfg.width, BACKBONE_EPS, cfg.dtype, rngs=rngs)

    def embed(self, video: jax.Array) -> jax.Array:
        """Tokens before the first block: `(b t h w c)` → `(b t n d)`."""
        b, t, h, w, _ = video.shape
        p = self.patch_embed.patch_size
        x = self.patch_embed(video)
        cls_token = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (b, t, 1, x.shape[-1]))
        pos_embed = resize_pos_embed(self.pos_embed[...], (h // p, w // p))
        x = jnp.concatenate([cls_token, x], axis=2) + pos_embed[:, None].astype(x.dtype)
        if hasattr(self, "temp_embed"):
            m = self.temp_embed.shape[1]
            x = x + jnp.tile(self.temp_embed[...], (1, t // m, 1, 1)).astype(x.dtype)
        return x

    def __call__(self, video: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        x = self.embed(video)
        for i, block in enumerate(self.blocks):
            x = block(x, key=None if key is None else jax.random.fold_in(key, i))
        return self.norm(x)[:, :, 0]  # (b t d)


class HeadBlock(nnx.Module):
    """A pre-norm block of the temporal head: over frames, without a bias on q, k and v."""

    def __init__(self, cfg: XViTConfig, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(cfg.width, HEAD_EPS, cfg.dtype, rngs=rngs)
        self.attn = Attention(cfg, shift=False, bias=False, head_init=True, rngs=rngs)
        self.norm2 = layer_norm(cfg.width, HEAD_EPS, cfg.dtype, rngs=rngs)
        self.mlp = Mlp(
            cfg.width,
            cfg.mlp_ratio * cfg.width,
            cfg.dtype,
            kernel_init=torch_kernel_init,
            torch_bias=True,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TemporalHead(nnx.Module):
    """Attention over the frames' features, then an MLP: `(b t d)` → logits (paper, section 3.3).

    Frames carry no positional embedding here: their order is known from the backbone alone.
    """

    def __init__(self, cfg: XViTConfig, *, rngs: nnx.Rngs):
        self.dropout = cfg.dropout
        self.cls_token = nnx.Param(jnp.zeros((1, 1, cfg.width)))
        self.temporal_encoder = nnx.List([HeadBlock(cfg, rngs=rngs) for _ in range(cfg.head_depth)])
        self.mlp_head = nnx.List(
            [
                layer_norm(cfg.width, HEAD_EPS, cfg.dtype, rngs=rngs),
                _linear(cfg, cfg.width, cfg.width, True, rngs=rngs),
                None,  # GELU: keeps its place in the released numbering
                None,  # dropout: likewise
                _linear(cfg, cfg.width, cfg.num_classes, True, rngs=rngs),
            ]
        )

    def __call__(self, frames: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        b, _, d = frames.shape
        cls_token = jnp.broadcast_to(self.cls_token[...].astype(frames.dtype), (b, 1, d))
        x = jnp.concatenate([cls_token, frames], axis=1)[:, None]  # (b 1 n d), n = 1 + t
        for block in self.temporal_encoder:
            x = block(x)
        norm, fc1, _, _, fc2 = self.mlp_head
        x = jax.nn.gelu(fc1(norm(x[:, 0, 0])), approximate=False)  # (b d)
        return fc2(dropout(x, self.dropout, key))


class XViT(nnx.Module):
    """The whole classifier: a normalised float clip `(b t h w c)` → logits `(b, num_classes)`.

    Args:
        config: Sizes and switches.
        rngs: Where the initial weights come from.
    """

    def __init__(self, config: XViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.base_model = Backbone(config, rngs=rngs)
        if config.head == "attention":
            self.consensus = TemporalHead(config, rngs=rngs)
        else:
            self.new_fc = _linear(config, config.width, config.num_classes, True, rngs=rngs)

    def __call__(self, video: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Classifies clips.

        Args:
            video: `(b, t, h, w, c)` float, RGB, normalised; `t`, `h`, `w` may differ from the
                config's as long as segment, temporal embedding and patches divide them.
            key: PRNG key for dropout and drop-path in training; None in evaluation.

        Returns:
            Logits `(b, num_classes)`, float32.

        Raises:
            ValueError: The clip's length does not divide by the segment or the embedding.
        """
        for name in ("shift_segment", "temporal_embedding_frames"):
            divisor = getattr(self.config, name)
            if divisor and video.shape[1] % divisor:
                raise ValueError(f"{video.shape[1]} frames do not divide by {name}={divisor}")
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        frames = self.base_model(video, key=keys[0])  # (b t d)
        frames = dropout(frames, self.config.dropout, keys[1])
        if self.config.head == "mean":
            return self.new_fc(frames.mean(axis=1)).astype(jnp.float32)
        return self.consensus(frames, key=keys[2]).astype(jnp.float32)


def _linear(
    cfg: XViTConfig, fan_in: int, fan_out: int, head: bool, *, use_bias=True, rngs: nnx.Rngs
) -> nnx.Linear:
    """A Linear layer of the backbone, or of the head, which keeps torch's default init."""
    return nnx.Linear(
        fan_in,
        fan_out,
        use_bias=use_bias,
        kernel_init=torch_kernel_init if head else INITS[cfg.init],
        bias_init=torch_bias_init(fan_in) if head else nnx.initializers.zeros,
        dtype=cfg.dtype,
        rngs=rngs,
    )
