"""The image ViT that every family runs on each frame, and the config fields that it needs.

The axis letters of shapes are listed in layers.py.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxvid.errors import check_option
from jaxvid.models.counts import block_multiply_adds, block_params, linear_params
from jaxvid.models.implementation import check_choices
from jaxvid.models.layers import Block, PatchEmbed, layer_norm, run_blocks
from jaxvid.models.limits import check_divisible, check_fields, check_size
from jaxvid.models.precision import ACTIVATIONS, DTYPES, in_model_precision
from jaxvid.models.resize import resize_pos_embed

Initializer = Callable[..., jax.Array]
# Sizes of the presets for tests and demos.
TINY = {
    "num_classes": 8,
    "num_frames": 8,
    "image_size": 64,
    "width": 64,
    "depth": 3,
    "heads": 2,
}
normal_init = nnx.initializers.truncated_normal(0.02)  # truncated at ±2σ


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageViTConfig:
    """Config fields that all families share.

    Attributes:
        name: The preset that the config is derived from.
        num_classes: Number of logits.
        num_frames: Frames per clip, `t`.
        image_size: Height and width in pixels of the frames that `pos_embed` is made for. Frames
            may have any height and width that are multiples of `patch_size`; `pos_embed` is then
            resized in the forward pass.
        patch_size: Height and width of a patch in pixels.
        width: Token width `d`.
        depth: Number of transformer blocks in the image ViT.
        heads: Number of attention heads in the image ViT.
        mlp_ratio: Hidden width of the image ViT's MLPs, divided by `width`.
        drop_path: Stochastic depth rate of the last block. The rates rise linearly from 0 in the
            first block.
        attention: Implementation of the attention within frames: explicit matrix products
            (`matmul`), `jax.nn.dot_product_attention` compiled by XLA (`xla`) or by cuDNN (`cudnn`,
            on NVIDIA GPUs in bfloat16), or the fastest one of this backend (`auto`).
        scan: Whether blocks of equal structure run as one `lax.scan` (`on`) or one after the other
            (`off`, which compiles for longer); `auto`: the fastest one of this backend.
        remat: Which results of the image ViT's blocks are stored for the backward pass, which
            computes the others again: all (`none`), the outputs of the Linear layers (`dots`), or
            only the input of each block (`full`).
        dtype: Compute dtype: `float32` (IEEE), `tfloat32` (float32 activations, matrix products
            in TensorFloat-32 on NVIDIA GPUs) or `bfloat16`. Weights are always float32.

    Raises:
        ValueError: A value is invalid, or the network is too large.
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
    drop_path: float = 0.0
    attention: str = "auto"
    scan: str = "auto"
    remat: str = "dots"
    dtype: str = "float32"

    def __post_init__(self):
        check_fields(self)
        check_divisible(self, width="heads", image_size="patch_size")
        check_option("dtype", self.dtype, DTYPES)
        check_choices(self)
        check_size(self)

    @property
    def compute_dtype(self) -> str:
        """Dtype of the activations: `float32` or `bfloat16`."""
        return ACTIVATIONS[self.dtype]

    @property
    def num_tokens(self) -> int:
        """Number of tokens per frame: one per patch, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def num_params(self) -> int:
        """Return the number of parameters, computed without building the network."""
        raise NotImplementedError(f"{type(self).__name__}.num_params")


def image_vit_params(config: ImageViTConfig) -> int:
    """Return the number of parameters of the image ViT: embeddings, blocks and final norm."""
    width = config.width
    embeddings = linear_params(3 * config.patch_size**2, width) + (1 + config.num_tokens) * width
    return embeddings + config.depth * block_params(width, config.mlp_ratio * width) + 2 * width


def image_vit_multiply_adds(config: ImageViTConfig, *, attention: bool, extra_keys: int = 0) -> int:
    """Return the multiply-adds of the image ViT's matrix products on all frames of a clip.

    All tokens of all blocks are counted, although `run_blocks` computes only the class tokens in
    the last block.

    Args:
        config: The network's config.
        attention: Whether to count the attention products, q·kᵀ and weights·v, too.
        extra_keys: Number of keys that each token attends to besides the keys of its own frame.
    """
    n, d = config.num_tokens, config.width
    patches = (n - 1) * 3 * config.patch_size**2 * d
    block = block_multiply_adds(
        n, d, config.mlp_ratio * d, attention=attention, num_keys=n + extra_keys
    )
    return config.num_frames * (patches + config.depth * block)


class ImageViT(nnx.Module):
    """A ViT that runs on each frame of a clip.

    A subclass calls `init_embeddings` and then `init_blocks`. If it has embeddings of its own, it
    allocates them in between. Initial weights are drawn in the order of these calls.
    """

    def init_embeddings(
        self, config: ImageViTConfig, pos_init: Initializer, *, rngs: nnx.Rngs
    ) -> None:
        """Allocate the patch embedding, the class token and the positional embedding."""
        self.config = config
        self.patch_embed = PatchEmbed(
            config.patch_size, config.width, config.compute_dtype, rngs=rngs
        )
        self.cls_token = nnx.Param(normal_init(rngs.params(), (1, 1, config.width)))
        self.pos_embed = nnx.Param(pos_init(rngs.params(), (1, config.num_tokens, config.width)))

    def init_blocks(
        self,
        eps: float,
        make_linear: Callable[[int, int], nnx.Linear],
        make_attention: Callable[[int], nnx.Module],
        *,
        rngs: nnx.Rngs,
    ) -> None:
        """Allocate the transformer blocks and the final norm.

        Args:
            eps: ε of all norms.
            make_linear: Function `(fan_in, fan_out) → nnx.Linear` for the layers of the MLPs.
            make_attention: Function from the index of a block to its attention module, which is
                called as `attn(x, num_queries=...)`.
            rngs: Source of the initial weights.
        """
        cfg = self.config
        self.blocks = nnx.List(
            [
                Block(
                    cfg.width,
                    cfg.mlp_ratio * cfg.width,
                    eps,
                    lambda i=i: make_attention(i),
                    make_linear,
                    cfg.compute_dtype,
                    rngs=rngs,
                )
                for i in range(cfg.depth)
            ]
        )
        self.norm = layer_norm(cfg.width, eps, cfg.compute_dtype, rngs=rngs)

    @in_model_precision
    def embed(self, video: jax.Array) -> jax.Array:
        """Return the tokens before the first block: `(b t h w c)` → `(b t n d)`."""
        x = self.patch_embed(video)
        b, t, h, w, _ = video.shape
        p = self.config.patch_size
        cls_token = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (b, t, 1, x.shape[-1]))
        pos_embed = resize_pos_embed(self.pos_embed[...], (h // p, w // p))
        return jnp.concatenate([cls_token, x], axis=2) + pos_embed[:, None].astype(x.dtype)

    @in_model_precision
    def frame_features(self, video: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Return the class token of each frame after the final norm: `(b t h w c)` → `(b t d)`.

        Args:
            video: Normalised clips.
            key: PRNG key of the stochastic depth; None in evaluation.
        """
        cfg = self.config
        x = run_blocks(
            self.blocks,
            self.embed(video),
            rate=cfg.drop_path,
            key=key,
            scan=cfg.scan,
            remat=cfg.remat,
        )
        return self.norm(x)
