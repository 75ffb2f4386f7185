"""XViT: a ViT whose keys and values are shifted in time (space-time mixing attention).

Bulat et al., "Space-time Mixing Attention for Video Transformer", NeurIPS 2021, arXiv:2106.05968.
Attributes have the names of the modules in the original implementation, as in the state_dict of its
checkpoints. The axis letters of shapes are listed in layers.py.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxvid.errors import check_option, short_repr
from jaxvid.models.clip_check import check_clips
from jaxvid.models.counts import block_multiply_adds, block_params, linear_params
from jaxvid.models.family import (
    BLOCK_TENSOR_AXES,
    Family,
    FrameEmbedding,
    PublishedCost,
    ReleasedClasses,
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
    Block,
    SelfAttention,
    dropout,
    layer_norm,
    qkv_linear,
    record_attention,
    run_blocks,
    torch_kernel_init,
    torch_linear,
)
from jaxvid.models.limits import check_divisible
from jaxvid.models.precision import in_model_precision
from jaxvid.models.space_time_mixing import Mixing, MixingAttention

BACKBONE_EPS = 1e-6
HEAD_EPS = 1e-5
DOWNLOADS = "https://www.adrianbulat.com/downloads/NeurIPS2021/models"
UNPUBLISHED = "the authors' lists are unpublished"  # why the order of the classes is assumed
# Initialisers of the backbone's Linear kernels, `pos_embed` and `temp_embed`.
INITS = {
    "released": (normal_init, normal_init, nnx.initializers.zeros),
    "small": (
        nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
        nnx.initializers.normal(0.3),
        nnx.initializers.normal(0.3),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class XViTConfig(ImageViTConfig):
    """Config of an XViT; see `ImageViTConfig` for the fields of the backbone.

    Attributes:
        temporal_embedding_frames: Number of rows of the temporal embedding, which is repeated for
            longer clips; 0: no temporal embedding.
        shift: Tensors that are shifted in time: `both` (keys and values), `keys`, `values` or
            `none`.
        shift_segment: Number of frames per segment. Keys and values are shifted within a segment;
            zeros replace the missing neighbours of its first and last frame.
        shift_div: `width // shift_div` channels come from the next frame and as many from the
            previous one (paper, section 3.2).
        shift_blocks: Indices of the blocks in which keys and values are shifted; empty: all.
        shift_per_head: Whether the first channels of each head are shifted, instead of the first
            channels of the token.
        summary_tokens: Whether each frame also attends to the mean patch token of each frame of its
            segment (paper, section 3.2, "summary token").
        head: `attention` (the temporal head) or `mean` (the paper's baseline, mean over frames).
        head_depth: Number of transformer blocks in the temporal head. They have the same `heads`
            and `mlp_ratio` as the backbone.
        dropout: Dropout rate on the frame features and inside the head.
        init: Initial weights of the backbone: `released` or `small`, with which networks of a small
            width learn far faster. `released`: truncated normal with std 0.02 for Linear kernels
            and the positional embedding, and zeros for the temporal embedding. `small`: std
            1/sqrt(fan_in) for Linear kernels, and 0.3 for both embeddings.
    """

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
    init: str = "released"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "shift_blocks", tuple(self.shift_blocks))
        check_divisible(self, num_frames="shift_segment")
        if self.temporal_embedding_frames:
            check_divisible(self, num_frames="temporal_embedding_frames")
        if outside := [i for i in self.shift_blocks if not 0 <= i < self.depth]:
            raise ValueError(
                f"shift_blocks={short_repr(outside)}: must be 0 to {self.depth - 1} "
                f"(depth={self.depth})"
            )
        check_option("shift", self.shift, ("both", "keys", "values", "none"))
        check_option("head", self.head, ("attention", "mean"))
        check_option("init", self.init, INITS)

    def num_params(self) -> int:
        """Return the number of parameters, computed without building the network."""
        width = self.width
        count = image_vit_params(self) + self.temporal_embedding_frames * width
        count += linear_params(width, self.num_classes)
        if self.head == "attention":
            block = block_params(width, self.mlp_ratio * width, qkv_bias=False)
            # Class token and norm have 3 * width parameters.
            count += 3 * width + self.head_depth * block + linear_params(width, width)
        return count


_KINETICS = XViTConfig(name="xvit_k400", num_classes=400)
PRESETS = {
    "xvit_k400": _KINETICS,
    "xvit_k600": dataclasses.replace(_KINETICS, name="xvit_k600", num_classes=600),
    "xvit_ssv2": dataclasses.replace(
        _KINETICS, name="xvit_ssv2", num_classes=174, shift_segment=16, shift_div=4
    ),
    "xvit_tiny": XViTConfig(name="xvit_tiny", shift_div=4, dropout=0.0, init="small", **TINY),
}


class Backbone(ImageViT):
    """The image ViT with space-time mixing attention and a temporal embedding."""

    def __init__(self, cfg: XViTConfig, *, rngs: nnx.Rngs):
        _, pos_init, temp_init = INITS[cfg.init]
        self.init_embeddings(cfg, pos_init, rngs=rngs)
        if cfg.temporal_embedding_frames:
            shape = (1, cfg.temporal_embedding_frames, 1, cfg.width)
            self.temp_embed = nnx.Param(temp_init(rngs.params(), shape))
        linear = functools.partial(_linear, cfg, rngs=rngs)
        self.init_blocks(BACKBONE_EPS, linear, lambda i: _mixing(cfg, i, rngs), rngs=rngs)

    def embed(self, video: jax.Array) -> jax.Array:
        """Return the tokens before the first block: `(b t h w c)` → `(b t n d)`."""
        x = super().embed(video)
        if hasattr(self, "temp_embed"):
            repeats = video.shape[1] // self.temp_embed.shape[1]
            x = x + jnp.tile(self.temp_embed[...], (1, repeats, 1, 1)).astype(x.dtype)
        return x


class TemporalHead(nnx.Module):
    """Attention over the frames' features, then an MLP: `(b t d)` → logits (paper, section 3.3).

    The head has no positional embedding. Only the backbone sees the order of the frames.
    """

    def __init__(self, cfg: XViTConfig, *, rngs: nnx.Rngs):
        self.dropout = cfg.dropout
        self.cls_token = nnx.Param(jnp.zeros((1, 1, cfg.width)))
        hidden = cfg.mlp_ratio * cfg.width
        linear = functools.partial(torch_linear, dtype=cfg.compute_dtype, rngs=rngs)
        attention = functools.partial(_head_attention, cfg, rngs)
        self.temporal_encoder = nnx.List(
            [
                Block(cfg.width, hidden, HEAD_EPS, attention, linear, cfg.compute_dtype, rngs=rngs)
                for _ in range(cfg.head_depth)
            ]
        )
        self.mlp_head = nnx.List(
            [
                layer_norm(cfg.width, HEAD_EPS, cfg.compute_dtype, rngs=rngs),
                torch_linear(cfg.width, cfg.width, cfg.compute_dtype, rngs=rngs),
                None,  # GELU; the released checkpoints count it and the dropout in their indices
                None,  # dropout
                torch_linear(cfg.width, cfg.num_classes, "float32", rngs=rngs),
            ]
        )

    def embed(self, frames: jax.Array) -> jax.Array:
        """Return the tokens before the first block: `(b t d)` → `(b 1 n d)`, n = 1 + t."""
        b, _, d = frames.shape
        cls_token = jnp.broadcast_to(self.cls_token[...].astype(frames.dtype), (b, 1, d))
        return jnp.concatenate([cls_token, frames], axis=1)[:, None]

    def video_features(self, frames: jax.Array) -> jax.Array:
        """Return the class token after the blocks and the norm: `(b t d)` → `(b d)`."""
        return self.mlp_head[0](run_blocks(self.temporal_encoder, self.embed(frames))[:, 0])

    def __call__(self, frames: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        _, fc1, _, _, fc2 = self.mlp_head
        x = jax.nn.gelu(fc1(self.video_features(frames)), approximate=False)  # (b d)
        return fc2(dropout(x, self.dropout, key))


class XViT(nnx.Module):
    """The XViT classifier: normalised clips `(b t h w c)` → logits `(b, num_classes)`.

    Args:
        config: The network's config.
        rngs: Source of the initial weights.
    """

    def __init__(self, config: XViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.base_model = Backbone(config, rngs=rngs)
        if config.head == "attention":
            self.consensus = TemporalHead(config, rngs=rngs)
        else:
            self.new_fc = torch_linear(config.width, config.num_classes, "float32", rngs=rngs)

    @in_model_precision
    def features(self, video: jax.Array) -> dict[str, jax.Array]:
        """Return the features `frames` `(b t d)` and `video` `(b d)` of clips `(b t h w c)`."""
        self._check_length(video)
        frames = self.base_model.frame_features(video)
        if self.config.head == "mean":
            return {"frames": frames, "video": frames.mean(axis=1)}
        return {"frames": frames, "video": self.consensus.video_features(frames)}

    @in_model_precision
    def attention(self, video: jax.Array) -> dict[str, jax.Array]:
        """Return the attention weights of a forward pass.

        Args:
            video: `(b t h w c)`.

        Returns:
            `spatial` `(b, blocks, t, k, n, m)` and, with the attention head, `temporal`
            `(b, blocks, k, 1 + t, 1 + t)`. m is n, plus `shift_segment` if there are summary
            tokens. Rows are queries and sum to 1. Token 0 is the class token.
        """
        self._check_length(video)
        heads = self.config.heads
        x, spatial = record_attention(self.base_model.blocks, self.base_model.embed(video), heads)
        if self.config.head == "mean":
            return {"spatial": spatial}
        x = self.consensus.embed(self.base_model.norm(x)[:, :, 0])
        _, temporal = record_attention(self.consensus.temporal_encoder, x, heads)
        return {"spatial": spatial, "temporal": temporal[:, :, 0]}

    @in_model_precision
    def __call__(self, video: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Classify clips.

        Args:
            video: Normalised float RGB `(b, t, h, w, c)`. The sizes may differ from the config's if
                `t` is divisible by `shift_segment` and by `temporal_embedding_frames`, and `h` and
                `w` are divisible by `patch_size`.
            key: PRNG key of dropout and stochastic depth in training; None in evaluation.

        Returns:
            Logits `(b, num_classes)`, float32.

        Raises:
            ValueError: The shape of `video` is invalid.
        """
        self._check_length(video)
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        frames = self.base_model.frame_features(video, key=keys[0])  # (b t d)
        frames = dropout(frames, self.config.dropout, keys[1])
        if self.config.head == "mean":
            return self.new_fc(frames.mean(axis=1))
        return self.consensus(frames, key=keys[2])

    def _check_length(self, video: jax.Array) -> None:
        check_clips(video)
        for name in ("shift_segment", "temporal_embedding_frames"):
            if (divisor := getattr(self.config, name)) and video.shape[1] % divisor:
                raise ValueError(f"{video.shape[1]} frames are not divisible by {name}={divisor}")


def _linear(cfg: XViTConfig, fan_in: int, fan_out: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        fan_in, fan_out, kernel_init=INITS[cfg.init][0], dtype=cfg.compute_dtype, rngs=rngs
    )


def _mixing(cfg: XViTConfig, index: int, rngs: nnx.Rngs) -> MixingAttention:
    """Return the attention of a block of the backbone."""
    shifts = index in cfg.shift_blocks or not cfg.shift_blocks
    groups = cfg.heads if cfg.shift_per_head else 1
    mixing = Mixing(
        segment=cfg.shift_segment,
        groups=groups,
        fold=cfg.width // groups // cfg.shift_div,
        shift_keys=shifts and cfg.shift in ("both", "keys"),
        shift_values=shifts and cfg.shift in ("both", "values"),
        summary_tokens=cfg.summary_tokens,
    )
    qkv = qkv_linear(cfg.width, INITS[cfg.init][0], cfg.compute_dtype, rngs=rngs)
    proj = _linear(cfg, cfg.width, cfg.width, rngs=rngs)
    return MixingAttention(cfg.heads, qkv, proj, mixing, cfg.attention)


def _head_attention(cfg: XViTConfig, rngs: nnx.Rngs) -> SelfAttention:
    """Return the temporal head's attention over frames; its qkv layer has no bias."""
    dtype = cfg.compute_dtype
    qkv = qkv_linear(cfg.width, torch_kernel_init, dtype, use_bias=False, rngs=rngs)
    return SelfAttention(cfg.heads, qkv, torch_linear(cfg.width, cfg.width, dtype, rngs=rngs))


def multiply_adds(config: XViTConfig, attention: bool) -> int:
    """Return the multiply-adds of one view; see `Family`."""
    d, extra_keys = config.width, config.summary_tokens * config.shift_segment
    count = image_vit_multiply_adds(config, attention=attention, extra_keys=extra_keys)
    if config.head == "attention":
        tokens, hidden = config.num_frames + 1, config.mlp_ratio * d
        block = block_multiply_adds(tokens, d, hidden, attention=attention)
        count += config.head_depth * block + d * d
    return count + d * config.num_classes


def released_preprocessing(config: XViTConfig) -> dict[str, Any]:
    """Return the released preprocessing: three square crops along the longer side."""
    by_segments = config.name == "xvit_ssv2"
    return {
        "num_frames": config.num_frames,
        "crop": config.image_size,
        "sampling_rate": 16,
        "by_time": False,
        "sampling": "segments" if by_segments else "dense_stride",
        "short_side": config.image_size,
        "resize": "torch_bilinear",
        "color_matrix": "tagged",
        "num_clips": 2 if by_segments else 1,
        "num_crops": 3,
        "mean": 0.5,
        "std": 0.5,
    }


def unused_torch_shapes(config: XViTConfig) -> dict[str, tuple[int, ...]]:
    """Return `{key: shape}` of the tensors that the original code requires but never uses."""
    return {
        "new_fc.weight": (config.num_classes, config.width),
        "new_fc.bias": (config.num_classes,),
    }


def wrap_checkpoint(state: dict) -> dict:
    """Return the contents of an original checkpoint file with this state_dict."""
    return {"epoch": 0, "model_state": state, "optimizer_state": {}, "cfg": ""}


FAMILY = Family(
    name="xvit",
    title="XViT",
    config=XViTConfig,
    module=XViT,
    presets=PRESETS,
    image_prefix="base_model.",
    head=("consensus.", "new_fc."),
    class_heads=("consensus.mlp_head.4.", "new_fc."),
    frame_embeddings={"base_model.temp_embed": FrameEmbedding("temporal_embedding_frames", 0)},
    optional_parts=(
        r"consensus\.",
        r"consensus\.temporal_encoder\.\d+\.",
        r"new_fc\.",
        r"base_model\.temp_embed",
    ),
    layer_lists=("blocks", "temporal_encoder"),
    head_counts={"heads": "base_model.blocks."},
    tensor_axes=BLOCK_TENSOR_AXES,
    multiply_adds=multiply_adds,
    released_preprocessing=released_preprocessing,
    torch=TorchFormat(
        marker="base_model.",
        ignored={r"new_fc\..*": "the original implementation has this layer, but never uses it"},
        unused_shapes=unused_torch_shapes,
        wrap=wrap_checkpoint,
    ),
    released_classes={
        "xvit_k400": ReleasedClasses("kinetics400", 80.2, UNPUBLISHED, top5=94.7),
        "xvit_k600": ReleasedClasses("kinetics600", 84.51, UNPUBLISHED, top5=96.26),
        "xvit_ssv2": ReleasedClasses("something_something_v2", 67.19, top5=91.0),
    },
    released_weights={
        "xvit_k600": f"{DOWNLOADS}/xvit_b16_16_k600.pth",
        "xvit_ssv2": f"{DOWNLOADS}/xvit_b16_16_ss2.pth",
    },
    license_url="https://github.com/1adrianb/video-transformers#license",
    published_cost={
        name: PublishedCost(850, counts_attention=True, num_views=3)
        for name in ("xvit_k400", "xvit_k600", "xvit_ssv2")
    },
    mixes_frames=lambda config: config.shift != "none" or config.summary_tokens,
)
