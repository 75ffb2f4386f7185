"""STAM: an image ViT for each frame, then a transformer over the frames' class tokens.

Sharir et al., "An Image is Worth 16x16 Words, What is a Video Worth?", 2021, arXiv:2103.13915.
Modules are named as in the state_dicts of the original code. For axis letters see layers.py.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxvid.errors import check_option
from jaxvid.models.counts import block_multiply_adds, block_params, linear_params
from jaxvid.models.family import (
    BLOCK_TENSOR_AXES,
    Family,
    FrameEmbedding,
    PublishedCost,
    ReleasedClasses,
    TensorAxis,
    TorchFormat,
)
from jaxvid.models.image_vit import (
    TINY,
    ImageViT,
    ImageViTConfig,
    image_vit_multiply_adds,
    image_vit_params,
    normal_init,
)
from jaxvid.models.layers import (
    SelfAttention,
    attend,
    attention_weights,
    dropout,
    layer_norm,
    qkv_linear,
    record_attention,
)
from jaxvid.models.limits import check_divisible
from jaxvid.models.precision import in_model_precision

EPS = 1e-5
# Initialisers of the Linear kernels, the image ViT's `pos_embed` and the aggregator's `pos_embed`.
INITS = {
    "released": (normal_init, normal_init, normal_init),
    "small": (
        nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
        nnx.initializers.normal(0.3),
        nnx.initializers.normal(1.0),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class STAMConfig(ImageViTConfig):
    """Config of a STAM; see `ImageViTConfig` for the fields of the image ViT.

    Attributes:
        aggregator: `transformer`, or `mean` (the paper's baseline, without weights).
        temporal_depth: Number of layers in the aggregator.
        temporal_heads: Number of attention heads in the aggregator.
        temporal_mlp: Hidden width of the aggregator's feed-forward layers.
        dropout: Dropout rate inside the aggregator.
        init: Initial weights: `released` or `small`, with which networks of a small width learn far
            faster. `released`: truncated normal with std 0.02 for Linear kernels and positional
            embeddings. `small`: std 1/sqrt(fan_in) for Linear kernels, 0.3 for the image ViT's
            positional embedding, and 1 for the aggregator's, because the aggregator's input is
            layer-normalised.
    """

    num_classes: int = 400
    aggregator: str = "transformer"
    temporal_depth: int = 6
    temporal_heads: int = 8
    temporal_mlp: int = 2048
    dropout: float = 0.1
    init: str = "released"

    def __post_init__(self):
        super().__post_init__()
        check_option("aggregator", self.aggregator, ("transformer", "mean"))
        check_option("init", self.init, INITS)
        if self.aggregator == "transformer":
            check_divisible(self, width="temporal_heads")

    def num_params(self) -> int:
        """Return the number of parameters, computed without building the network."""
        count = image_vit_params(self) + linear_params(self.width, self.num_classes)
        if self.aggregator == "transformer":
            layer = block_params(self.width, self.temporal_mlp)
            # Class token 1, positional embedding num_frames + 1, final norm 2, in units of width.
            count += (self.num_frames + 4) * self.width + self.temporal_depth * layer
        return count


PRESETS = {f"stam_{t}": STAMConfig(name=f"stam_{t}", num_frames=t) for t in (8, 16, 32, 64)}
PRESETS["stam_tiny"] = STAMConfig(
    name="stam_tiny",
    temporal_depth=2,
    temporal_heads=4,
    temporal_mlp=256,
    dropout=0.0,
    init="small",
    **TINY,
)


class FrameAttention(nnx.Module):
    """Self-attention over frames, with the fused weights of `torch.nn.MultiheadAttention`."""

    def __init__(self, cfg: STAMConfig, *, rngs: nnx.Rngs):
        self.heads = cfg.temporal_heads
        xavier = nnx.initializers.xavier_uniform()
        # (in, 3, out), like the kernels of other attention layers; torch stores the matrix
        # (3 * out, in) under this name.
        weight = xavier(rngs.params(), (cfg.width, 3 * cfg.width))
        self.in_proj_weight = nnx.Param(weight.reshape(cfg.width, 3, cfg.width))
        self.in_proj_bias = nnx.Param(jnp.zeros((3, cfg.width)))
        self.out_proj = _linear(cfg, cfg.width, cfg.width, rngs=rngs)

    def split(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Return queries, keys and values, each `(b 1 n d)`."""
        weight, bias = (p[...].astype(x.dtype) for p in (self.in_proj_weight, self.in_proj_bias))
        qkv = jnp.tensordot(x, weight, 1) + bias[None, None, None]  # (b 1 n 3 d)
        return jnp.unstack(qkv, axis=-2)

    def __call__(self, x: jax.Array, *, rate: float, key: jax.Array | None) -> jax.Array:
        return self.out_proj(attend(*self.split(x), self.heads, rate=rate, key=key))


class EncoderLayer(nnx.Module):
    """`torch.nn.TransformerEncoderLayer` in its default form: post-norm, ReLU."""

    def __init__(self, cfg: STAMConfig, *, rngs: nnx.Rngs):
        self.rate = cfg.dropout
        self.self_attn = FrameAttention(cfg, rngs=rngs)
        self.linear1 = _linear(cfg, cfg.width, cfg.temporal_mlp, rngs=rngs)
        self.linear2 = _linear(cfg, cfg.temporal_mlp, cfg.width, rngs=rngs)
        self.norm1 = layer_norm(cfg.width, EPS, cfg.compute_dtype, rngs=rngs)
        self.norm2 = layer_norm(cfg.width, EPS, cfg.compute_dtype, rngs=rngs)

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
        self.norm = layer_norm(cfg.width, EPS, cfg.compute_dtype, rngs=rngs)

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
        """Return the tokens before the first layer: `(b t d)` → `(b 1 n d)`, n = 1 + t."""
        b, t, d = frames.shape
        if t + 1 != self.pos_embed.shape[1]:
            raise ValueError(f"expected {self.pos_embed.shape[1] - 1} frames, got {t}")
        cls_token = jnp.broadcast_to(self.cls_token[...].astype(frames.dtype), (b, 1, d))
        x = jnp.concatenate([cls_token, frames], axis=1) + self.pos_embed[...].astype(frames.dtype)
        return x[:, None]

    def __call__(self, frames: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return self.transformer_enc(self.embed(frames), key=key)[:, 0, 0]


class STAM(ImageViT):
    """The STAM classifier: normalised clips `(b t h w c)` → logits `(b, num_classes)`.

    Args:
        config: The network's config.
        rngs: Source of the initial weights.
    """

    def __init__(self, config: STAMConfig, *, rngs: nnx.Rngs):
        linear_init, pos_init, _ = INITS[config.init]
        linear = functools.partial(_linear, config, rngs=rngs)
        self.init_embeddings(config, pos_init, rngs=rngs)
        self.init_blocks(EPS, linear, lambda _: _spatial_attention(config, rngs), rngs=rngs)
        if config.aggregator == "transformer":
            self.aggregate = Aggregator(config, rngs=rngs)
        self.head = nnx.Linear(config.width, config.num_classes, kernel_init=linear_init, rngs=rngs)

    @in_model_precision
    def video_features(self, frames: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Aggregate the frames' features: `(b t d)` → `(b d)`."""
        if self.config.aggregator == "mean":
            return frames.mean(axis=1)
        return self.aggregate(frames, key=key)

    @in_model_precision
    def classify(self, frames: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Classify clips from their frames' features: `(b t d)` → logits `(b, num_classes)`."""
        return self.head(self.video_features(frames, key=key))

    @in_model_precision
    def features(self, video: jax.Array) -> dict[str, jax.Array]:
        """Return the features `frames` `(b t d)` and `video` `(b d)` of clips `(b t h w c)`."""
        frames = self.frame_features(video)
        return {"frames": frames, "video": self.video_features(frames)}

    @in_model_precision
    def attention(self, video: jax.Array) -> dict[str, jax.Array]:
        """Return the attention weights of a forward pass.

        Args:
            video: `(b t h w c)`.

        Returns:
            `spatial` `(b, blocks, t, k, n, n)` and, with the transformer aggregator, `temporal`
            `(b, layers, k, 1 + t, 1 + t)`. Rows are queries and sum to 1. Token 0 is the class
            token.
        """
        x, spatial = record_attention(self.blocks, self.embed(video), self.config.heads)
        if self.config.aggregator == "mean":
            return {"spatial": spatial}
        x, temporal = self.aggregate.embed(self.norm(x)[:, :, 0]), []
        # `record_attention` cannot be used: it expects pre-norm blocks, and these are post-norm.
        for layer in self.aggregate.transformer_enc.layers:
            q, k, _ = layer.self_attn.split(x)
            temporal.append(attention_weights(q, k, self.config.temporal_heads)[:, 0])
            x = layer(x)
        return {"spatial": spatial, "temporal": jnp.stack(temporal, axis=1)}

    @in_model_precision
    def __call__(self, video: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Classify clips.

        Args:
            video: Normalised float RGB `(b, t, h, w, c)`. `h` and `w` may differ from the config's
                if they are divisible by the patch size.
            key: PRNG key of dropout and stochastic depth in training; None in evaluation.

        Returns:
            Logits `(b, num_classes)`, float32.

        Raises:
            ValueError: The aggregator expects a different number of frames, or the shape of `video`
                is invalid.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        frames = self.frame_features(video, key=keys[0])
        return self.classify(frames, key=keys[1])


def _linear(cfg: STAMConfig, fan_in: int, fan_out: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        fan_in, fan_out, kernel_init=INITS[cfg.init][0], dtype=cfg.compute_dtype, rngs=rngs
    )


def _spatial_attention(cfg: STAMConfig, rngs: nnx.Rngs) -> SelfAttention:
    qkv = qkv_linear(cfg.width, INITS[cfg.init][0], cfg.compute_dtype, rngs=rngs)
    proj = _linear(cfg, cfg.width, cfg.width, rngs=rngs)
    return SelfAttention(cfg.heads, qkv, proj, cfg.attention)


def multiply_adds(config: STAMConfig, attention: bool) -> int:
    """Return the multiply-adds of one view; see `Family`."""
    count = image_vit_multiply_adds(config, attention=attention)
    if config.aggregator == "transformer":
        tokens, hidden = config.num_frames + 1, config.temporal_mlp
        layer = block_multiply_adds(tokens, config.width, hidden, attention=attention)
        count += config.temporal_depth * layer
    return count + config.width * config.num_classes


def released_preprocessing(config: STAMConfig) -> dict[str, Any]:
    """Return the preprocessing of the released code: one centre crop of 7/8 of the short side.

    Args:
        config: The network's config; its number of frames and image size are used.
    """
    return {
        "num_frames": config.num_frames,
        "crop": config.image_size,
        "sampling_rate": 16,
        "by_time": False,
        "sampling": "uniform_10s",
        "short_side": round(config.image_size * 8 / 7),
        "resize": "pil_bilinear",
        # The program's version of PyAV ignored the colour matrix that a video file declares.
        "color_matrix": "bt601",
        "num_clips": 1,
        "num_crops": 1,
        "mean": 0.0,
        "std": 1.0,
    }


FAMILY = Family(
    name="stam",
    title="STAM",
    config=STAMConfig,
    module=STAM,
    presets=PRESETS,
    image_prefix="",
    head=("aggregate.", "head."),
    class_heads=("head.",),
    frame_embeddings={"aggregate.pos_embed": FrameEmbedding("num_frames", 1)},
    optional_parts=(r"aggregate\.", r"aggregate\.transformer_enc\.layers\.\d+\."),
    layer_lists=("blocks", "layers"),
    head_counts={"heads": "blocks.", "temporal_heads": "aggregate."},
    tensor_axes={
        **BLOCK_TENSOR_AXES,
        "self_attn.in_proj_weight": TensorAxis(-1, "temporal_heads"),
        "self_attn.in_proj_bias": TensorAxis(-1, "temporal_heads"),
        "self_attn.out_proj.kernel": TensorAxis(0, "temporal_heads"),
        "linear1.kernel": TensorAxis(-1),
        "linear1.bias": TensorAxis(-1),
        "linear2.kernel": TensorAxis(0),
    },
    multiply_adds=multiply_adds,
    released_preprocessing=released_preprocessing,
    torch=TorchFormat(
        marker="aggregate.",
        zeros={r"blocks\.\d+\.attn\.qkv\.bias": "missing from files of the first released version"},
    ),
    # The original implementation sorts the names of the class folders.
    released_classes={
        "stam_8": ReleasedClasses("kinetics400", 77.5),
        "stam_16": ReleasedClasses("kinetics400", 79.3),
        "stam_32": ReleasedClasses("kinetics400", 79.95),
        "stam_64": ReleasedClasses("kinetics400", 80.5),
    },
    released_weights={
        f"stam_{t}": "https://miil-public-eu.oss-eu-central-1.aliyuncs.com/model-zoo/STAM/v2/"
        f"stam_{t}.pth"
        for t in (8, 16, 32, 64)
    },
    license_url="https://github.com/Alibaba-MIIL/STAM",
    published_cost={
        f"stam_{t}": PublishedCost(giga, counts_attention=False, num_views=1)
        for t, giga in ((8, 135), (16, 270), (32, 540), (64, 1080))
    },
    shares_frames=True,
)
