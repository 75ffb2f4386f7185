"""STAM: an image ViT for each frame, then a transformer over the frames' class tokens.

Sharir et al., "An Image is Worth 16x16 Words, What is a Video Worth?", 2021, arXiv:2103.13915.
Attribute names equal the paths in the released checkpoints' state_dict. Axis letters: layers.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxvid.models.layers import (
    Block,
    PatchEmbed,
    attend,
    attention_weights,
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
)
from jaxvid.models.transfer import resize_pos_embed

EPS = 1e-5
# normal(0.02) folded into ±2σ: what lies outside is drawn again, as jax's truncated normal does.
normal_init = nnx.initializers.truncated_normal(0.02)
# Of Linear weights, the image ViT's `pos_embed`, the aggregator's `pos_embed`.
INITS = {
    "released": (normal_init, normal_init, normal_init),
    "small": (
        nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
        nnx.initializers.normal(0.3),
        nnx.initializers.normal(1.0),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class STAMConfig:
    """Sizes and switches of a STAM. Errors name the field, its value and what would be valid.

    Attributes:
        name: The preset that this started from.
        num_classes: Number of logits.
        num_frames: Frames a clip, `t`; the aggregator's positional embedding has `t + 1` rows.
        image_size: Height and width in pixels of the frames that `pos_embed` is made for; other
            multiples of `patch_size` run too, with `pos_embed` resized.
        patch_size: Height and width of a patch in pixels.
        width: Token width `d`.
        depth: Transformer blocks in the image ViT.
        heads: Attention heads of the image ViT.
        mlp_ratio: Hidden width of an MLP of the image ViT over `width`.
        aggregator: `transformer` or `mean` (the paper's baseline, without weights).
        temporal_depth: Layers of the aggregator.
        temporal_heads: Attention heads of the aggregator.
        temporal_mlp: Hidden width of the aggregator's feed-forward layers.
        dropout: Rate inside the aggregator.
        drop_path: Stochastic depth at the last block; rises linearly from 0 at the first.
        init: Initial weights: `released` (truncated normal, std 0.02) or `small` (Linear weights
            1/sqrt(fan_in), positional embeddings 0.3 in the image ViT and 1 in the aggregator,
            whose frames are normalised to 1: learns far faster where the width is small).
        remat: Recompute the image ViT's blocks in the backward pass instead of keeping them.
        dtype: `float32` or `bfloat16` for the computation; weights are float32 always.
    """

    name: str
    num_classes: int = 400
    num_frames: int = 16
    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: int = 4
    aggregator: str = "transformer"
    temporal_depth: int = 6
    temporal_heads: int = 8
    temporal_mlp: int = 2048
    dropout: float = 0.1
    drop_path: float = 0.0
    init: str = "released"
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        check_fields(self)
        check_divides(self, width="heads", image_size="patch_size")
        check_options(
            self,
            aggregator=("transformer", "mean"),
            init=tuple(INITS),
            dtype=("float32", "bfloat16"),
        )
        if self.aggregator == "transformer":
            check_divides(self, width="temporal_heads")
        check_size(self)

    def num_params(self) -> int:
        """Number of weights, computed without building the network."""
        count = image_vit_params(self) + linear_params(self.width, self.num_classes)
        if self.aggregator == "transformer":
            layer = block_params(self.width, self.temporal_mlp)
            count += (self.num_frames + 4) * self.width + self.temporal_depth * layer
        return count


PRESETS = {f"stam_{t}": STAMConfig(name=f"stam_{t}", num_frames=t) for t in (8, 16, 32, 64)}
PRESETS["stam_tiny"] = STAMConfig(
    name="stam_tiny",
    num_classes=8,
    num_frames=8,
    image_size=64,
    width=64,
    depth=3,
    heads=2,
    temporal_depth=2,
    temporal_heads=4,
    temporal_mlp=256,
    dropout=0.0,
    init="small",
)


class Attention(nnx.Module):
    """Self-attention within each frame."""

    def __init__(self, cfg: STAMConfig, *, rngs: nnx.Rngs):
        self.heads = cfg.heads
        self.qkv = _linear(cfg, cfg.width, 3 * cfg.width, rngs=rngs)
        self.proj = _linear(cfg, cfg.width, cfg.width, rngs=rngs)

    def split(self, x: jax.Array) -> list[jax.Array]:
        """Queries, keys and values, each `(b t n d)`."""
        return jnp.split(self.qkv(x), 3, axis=-1)

    def __call__(self, x: jax.Array, *, num_queries: int | None = None) -> jax.Array:
        q, k, v = self.split(x)
        return self.proj(attend(q[:, :, :num_queries], k, v, self.heads))


class FrameAttention(nnx.Module):
    """Self-attention over frames, with the fused weights of `torch.nn.MultiheadAttention`."""

    def __init__(self, cfg: STAMConfig, *, rngs: nnx.Rngs):
        self.heads = cfg.temporal_heads
        xavier = nnx.initializers.xavier_uniform()
        # (in, out), as all kernels here; torch keeps its transpose under this name.
        self.in_proj_weight = nnx.Param(xavier(rngs.params(), (cfg.width, 3 * cfg.width)))
        self.in_proj_bias = nnx.Param(jnp.zeros(3 * cfg.width))
        self.out_proj = _linear(cfg, cfg.width, cfg.width, rngs=rngs)

    def split(self, x: jax.Array) -> list[jax.Array]:
        """Queries, keys and values, each `(b 1 n d)`."""
        weight, bias = (p[...].astype(x.dtype) for p in (self.in_proj_weight, self.in_proj_bias))
        return jnp.split(x @ weight + bias.reshape(1, 1, 1, -1), 3, axis=-1)

    def __call__(self, x: jax.Array, *, rate: float, key: jax.Array | None) -> jax.Array:
        return self.out_proj(attend(*self.split(x), self.heads, rate=rate, key=key))


class EncoderLayer(nnx.Module):
    """`torch.nn.TransformerEncoderLayer` in its default form: post-norm, ReLU."""

    def __init__(self, cfg: STAMConfig, *, rngs: nnx.Rngs):
        self.rate = cfg.dropout
        self.self_attn = FrameAttention(cfg, rngs=rngs)
        self.linear1 = _linear(cfg, cfg.width, cfg.temporal_mlp, rngs=rngs)
        self.linear2 = _linear(cfg, cfg.temporal_mlp, cfg.width, rngs=rngs)
        self.norm1 = layer_norm(cfg.width, EPS, cfg.dtype, rngs=rngs)
        self.norm2 = layer_norm(cfg.width, EPS, cfg.dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        attended = self.self_attn(x, rate=self.rate, key=keys[0])
        x = self.norm1(x + dropout(attended, self.rate, keys[1]))
        hidden = dropout(jax.nn.relu(self.linear1(x)), self.rate, keys[2])
        return self.norm2(x + dropout(self.linear2(hidden), self.rate, keys[3]))


class Encoder(nnx.Module):
    """The aggregator's layers and its final norm."""

    def __init__(self, cfg: STAMConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List([EncoderLayer(cfg, rngs=rngs) for _ in range(cfg.temporal_depth)])
        self.norm = layer_norm(cfg.width, EPS, cfg.dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        for i, layer in enumerate(self.layers):
            x = layer(x, key=None if key is None else jax.random.fold_in(key, i))
        return self.norm(x)


class Aggregator(nnx.Module):
    """The transformer over frames: `(b t d)` → the video's feature `(b d)` (paper, section 3.2)."""

    def __init__(self, cfg: STAMConfig, *, rngs: nnx.Rngs):
        self.cls_token = nnx.Param(normal_init(rngs.params(), (1, 1, cfg.width)))
        _, _, pos_init = INITS[cfg.init]
        self.pos_embed = nnx.Param(pos_init(rngs.params(), (1, cfg.num_frames + 1, cfg.width)))
        self.transformer_enc = Encoder(cfg, rngs=rngs)

    def embed(self, frames: jax.Array) -> jax.Array:
        """Tokens before the first layer: `(b t d)` → `(b 1 n d)`, n = 1 + t."""
        b, t, d = frames.shape
        if t + 1 != self.pos_embed.shape[1]:
            raise ValueError(f"{t} frames; the model is made for {self.pos_embed.shape[1] - 1}")
        cls_token = jnp.broadcast_to(self.cls_token[...].astype(frames.dtype), (b, 1, d))
        x = jnp.concatenate([cls_token, frames], axis=1) + self.pos_embed[...].astype(frames.dtype)
        return x[:, None]

    def __call__(self, frames: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return self.transformer_enc(self.embed(frames), key=key)[:, 0, 0]


class STAM(nnx.Module):
    """The whole classifier: a float clip `(b t h w c)` in [0, 1] → logits `(b, num_classes)`.

    Args:
        config: Sizes and switches.
        rngs: Where the initial weights come from.
    """

    def __init__(self, config: STAMConfig, *, rngs: nnx.Rngs):
        self.config = config
        n = (config.image_size // config.patch_size) ** 2 + 1
        self.patch_embed = PatchEmbed(config.patch_size, config.width, config.dtype, rngs=rngs)
        self.cls_token = nnx.Param(normal_init(rngs.params(), (1, 1, config.width)))
        linear_init, pos_init, _ = INITS[config.init]
        self.pos_embed = nnx.Param(pos_init(rngs.params(), (1, n, config.width)))
        hidden = config.mlp_ratio * config.width
        linear = functools.partial(_linear, config, rngs=rngs)
        attention = functools.partial(Attention, config, rngs=rngs)
        self.blocks = nnx.List(
            [
                Block(config.width, hidden, EPS, attention, linear, config.dtype, rngs=rngs)
                for _ in range(config.depth)
            ]
        )
        self.norm = layer_norm(config.width, EPS, config.dtype, rngs=rngs)
        if config.aggregator == "transformer":
            self.aggregate = Aggregator(config, rngs=rngs)
        self.head = nnx.Linear(config.width, config.num_classes, kernel_init=linear_init, rngs=rngs)

    def embed(self, video: jax.Array) -> jax.Array:
        """Tokens before the first block: `(b t h w c)` → `(b t n d)`."""
        x = self.patch_embed(video)
        b, t, h, w, _ = video.shape
        p = self.config.patch_size
        cls_token = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (b, t, 1, x.shape[-1]))
        pos_embed = resize_pos_embed(self.pos_embed[...], (h // p, w // p))
        return jnp.concatenate([cls_token, x], axis=2) + pos_embed[:, None].astype(x.dtype)

    def frame_features(self, video: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Each frame's class token: `(b t h w c)` → `(b t d)`. Frames do not see each other."""
        cfg = self.config
        x = self.embed(video)
        x = run_blocks(self.blocks, x, rate=cfg.drop_path, key=key, remat=cfg.remat)
        return self.norm(x)

    def video_features(self, frames: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """The video's feature out of its frames': `(b t d)` → `(b d)`."""
        if self.config.aggregator == "mean":
            return frames.mean(axis=1)
        return self.aggregate(frames, key=key)

    def features(self, video: jax.Array) -> dict[str, jax.Array]:
        """`frames` `(b t d)` and `video` `(b d)`, for a clip `(b t h w c)`."""
        frames = self.frame_features(video)
        return {"frames": frames, "video": self.video_features(frames)}

    def attention(self, video: jax.Array) -> dict[str, jax.Array]:
        """Attention weights, computed beside the forward pass.

        Args:
            video: `(b t h w c)`.

        Returns:
            `spatial` `(b, blocks, t, k, n, n)` and, with the transformer aggregator, `temporal`
            `(b, layers, k, 1 + t, 1 + t)`; rows are queries and sum to 1, token 0 is the class
            token.
        """
        x, spatial = record_attention(self.blocks, self.embed(video), self.config.heads)
        if self.config.aggregator == "mean":
            return {"spatial": spatial}
        x, temporal = self.aggregate.embed(self.norm(x)[:, :, 0]), []
        for layer in self.aggregate.transformer_enc.layers:  # post-norm: not record_attention's
            q, k, _ = layer.self_attn.split(x)
            temporal.append(attention_weights(q, k, self.config.temporal_heads)[:, 0])
            x = layer(x)
        return {"spatial": spatial, "temporal": jnp.stack(temporal, axis=1)}

    def __call__(self, video: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Classifies clips.

        Args:
            video: `(b, t, h, w, c)` float, RGB in [0, 1]; `h` and `w` may differ from the config's
                as long as patches divide them.
            key: PRNG key for dropout and drop-path in training; None in evaluation.

        Returns:
            Logits `(b, num_classes)`, float32.

        Raises:
            ValueError: Another number of frames than the aggregator is made for.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        frames = self.frame_features(video, key=keys[0])
        return self.head(self.video_features(frames, key=keys[1]))


def _linear(cfg: STAMConfig, fan_in: int, fan_out: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(fan_in, fan_out, kernel_init=INITS[cfg.init][0], dtype=cfg.dtype, rngs=rngs)
