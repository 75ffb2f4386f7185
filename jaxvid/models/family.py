"""The Family record: all that differs between model families.

Conversion, weight transfer, the optimiser, tensor parallelism, window classification, the cost
table and visualisation read a family from here and contain no family names.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from jaxvid.models.image_vit import ImageViTConfig

# Leaves that hold a matrix `(in, out)`. The second is `torch.nn.MultiheadAttention`'s name.
MATRIX_LEAVES = ("kernel", "in_proj_weight")
# Weights of an image ViT, below `Family.image_prefix`.
IMAGE_WEIGHTS = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")


@dataclasses.dataclass(frozen=True)
class FrameEmbedding:
    """An embedding `(1, leading_rows + t, ...)` with a row for each frame.

    Attributes:
        field: The config field that gives its `t`.
        leading_rows: Number of rows before the frames' rows, e.g. 1 for a class token.
    """

    field: str
    leading_rows: int


@dataclasses.dataclass(frozen=True)
class PublishedCost:
    """Multiply-adds of a preset as its paper states them.

    Attributes:
        giga: 10⁹ multiply-adds of all views of a video.
        counts_attention: Whether the paper counts the attention products.
        num_views: Clips times crops.
    """

    giga: float
    counts_attention: bool
    num_views: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchFormat:
    """The original program's checkpoint files.

    Attributes:
        marker: Prefix of state_dict keys that tells the family's files from image models.
        zeros: Patterns of keys that a file may lack and that are zeros then → the reason.
        ignored: Patterns of keys that are not read → the reason.
        unused_shapes: Config → key → shape of tensors that the original program requires in a file
            and never reads.
        wrap: State_dict → the contents of a file that the original program loads.
    """

    marker: str
    zeros: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused_shapes: Callable[[Any], dict[str, tuple[int, ...]]] = lambda config: {}
    wrap: Callable[[dict], dict] = lambda state: {"model": state}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: an image ViT that runs on each frame, and a head over the frames.

    Weights have the names that `jaxvid.models.split_params` gives them. Prefixes of several weights
    end with a dot.

    Attributes:
        name: Identifier in model folders and messages, e.g. `xvit`.
        title: The paper's spelling, e.g. `XViT`.
        config: The config class.
        module: The network class. `module(config, rngs=rngs)` has the attribute `config` and the
            methods `__call__`, `features` and `attention` of `jaxvid.models.stam.STAM`; with
            `shares_frames` also `frame_features` and `classify`.
        presets: Name → config. Names are unique over all families.
        image_prefix: Prefix of the image ViT's weights; empty: the network itself is the image ViT.
        head: Prefixes of all weights above the image ViT. They learn while the backbone is frozen.
        class_heads: Prefixes of the Linear layers with an output per class, the usual one first.
        layer_lists: Attribute names of lists of equal layers; messages abbreviate their indices.
        head_counts: Config field with a number of attention heads → prefix of the weights that it
            divides. No shape depends on it, but weights are useless with another value.
        tensor_axis: Last two parts of a weight's name → the axis that is sharded over the mesh axis
            `tensor`: the output axis of the first matrix of a pair, the input axis of the second.
        multiply_adds: `(config, attention)` → multiply-adds of the matrix products in the forward
            pass of one view; `attention`: count the attention products, q·kᵀ and weights·v, too.
        released_preprocessing: Config → the preprocessing of the released program, as in
            `model.json`.
        torch: The original program's checkpoint files.
        frame_embeddings: Weight → its layout, for embeddings with a row per frame.
        optional_parts: Patterns of parts that a network has or lacks as a whole, depending on its
            config, from the largest to the smallest.
        published_cost: Preset → its paper's cost.
        shares_frames: Whether a frame's features do not depend on the other frames of the clip, so
            that overlapping windows compute them once.
        mixes_frames: Config → whether attention within a frame also sees other frames, so that its
            rollout is approximate in time.
    """

    name: str
    title: str
    config: type[ImageViTConfig]
    module: type[nnx.Module]
    presets: Mapping[str, ImageViTConfig]
    image_prefix: str
    head: tuple[str, ...]
    class_heads: tuple[str, ...]
    layer_lists: tuple[str, ...]
    head_counts: Mapping[str, str]
    tensor_axis: Mapping[str, int]
    multiply_adds: Callable[[Any, bool], int]
    released_preprocessing: Callable[[Any], dict[str, Any]]
    torch: TorchFormat
    frame_embeddings: Mapping[str, FrameEmbedding] = dataclasses.field(default_factory=dict)
    optional_parts: tuple[str, ...] = ()
    published_cost: Mapping[str, PublishedCost] = dataclasses.field(default_factory=dict)
    shares_frames: bool = False
    mixes_frames: Callable[[Any], bool] = lambda config: False

    @property
    def pos_embed(self) -> str:
        """The image ViT's positional embedding: a class token's row, then a square patch grid."""
        return f"{self.image_prefix}pos_embed"

    def image_vit(self, model: nnx.Module) -> nnx.Module:
        """Return the part of a network that has `embed`, `blocks` and `norm`."""
        return getattr(model, self.image_prefix.removesuffix(".")) if self.image_prefix else model

    def is_image_weight(self, name: str) -> bool:
        """Return whether an image ViT has this weight too."""
        inside = name.removeprefix(self.image_prefix)
        return name.startswith(self.image_prefix) and inside.startswith(IMAGE_WEIGHTS)

    def block_index(self, name: str) -> int | None:
        """Return the index of the image ViT's block that a weight belongs to; None: of no block."""
        prefix = f"{self.image_prefix}blocks."
        if not name.startswith(prefix):
            return None
        return int(name.removeprefix(prefix).partition(".")[0])

    def is_embedding(self, name: str) -> bool:
        """Return whether a weight lies below the image ViT's first block."""
        above = (*self.head, f"{self.image_prefix}blocks.", f"{self.image_prefix}norm.")
        return not name.startswith(above)
