"""The `Family` record: everything that differs between model families.

Conversion, weight transfer, the optimizer, tensor parallelism, window classification, the cost
table and visualisation read these differences from the record, and contain no family names.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from jaxvid.models.image_vit import ImageViTConfig

# Last parts of the names of weights that multiply their input. They have the shape `(in, out)`,
# `(in, 3, d)` if they are in `QKV_WEIGHTS`, or `(h, w, in, out)` in a convolution. `in_proj_weight`
# is the name in `torch.nn.MultiheadAttention`.
MATRIX_LEAVES = ("kernel", "in_proj_weight")
# Ends of the names of weights that compute queries, keys and values together. Their last two axes
# are `(3, d)`, and `d` holds the heads one after the other. PyTorch's weights, and files of older
# versions of jaxvid, have one axis of `3·d` instead.
QKV_WEIGHTS = ("qkv.kernel", "qkv.bias", "in_proj_weight", "in_proj_bias")
# Names and name prefixes of the weights of an image ViT, without `Family.image_prefix`.
IMAGE_WEIGHTS = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")


@dataclasses.dataclass(frozen=True)
class FrameEmbedding:
    """Layout of an embedding `(1, leading_rows + t, ...)` with one row per frame.

    Attributes:
        field: Config field that sets `t`, the number of rows for frames.
        leading_rows: Number of rows before the frames' rows, e.g. 1 for a class token.
    """

    field: str
    leading_rows: int


@dataclasses.dataclass(frozen=True)
class TensorAxis:
    """The axis of a weight that tensor parallelism splits.

    Attributes:
        axis: The output axis of the first matrix of a pair and of its bias, or the input axis of
            the second matrix.
        heads: Config field that sets the number of attention heads that the axis consists of. Each
            device then holds whole heads. None: the axis has no heads.
    """

    axis: int
    heads: str | None = None


# Ends of the names of the weights of `jaxvid.models.layers.Block`.
BLOCK_TENSOR_AXES = {
    "attn.qkv.kernel": TensorAxis(-1, "heads"),
    "attn.qkv.bias": TensorAxis(-1, "heads"),
    "attn.proj.kernel": TensorAxis(0, "heads"),
    "mlp.fc1.kernel": TensorAxis(-1),
    "mlp.fc1.bias": TensorAxis(-1),
    "mlp.fc2.kernel": TensorAxis(0),
}


@dataclasses.dataclass(frozen=True)
class PublishedCost:
    """Multiply-adds of a preset as its paper states them.

    Attributes:
        giga: Multiply-adds of all views of a video, in units of 10⁹.
        counts_attention: Whether the paper counts the attention products.
        num_views: Number of views per video: clips times crops.
    """

    giga: float
    counts_attention: bool
    num_views: int


@dataclasses.dataclass(frozen=True)
class ReleasedClasses:
    """Classes of the original implementation's checkpoint of a preset.

    Attributes:
        dataset: The data set, a key of `jaxvid.data.class_names.PUBLIC_DATASETS`.
        top1: Published top-1 accuracy in percent.
        assumption: Why the order of the classes is assumed to be that of `class_names`; empty if it
            is known.
        top5: Published top-5 accuracy in percent; None if it was not published.
    """

    dataset: str
    top1: float
    assumption: str = ""
    top5: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchFormat:
    """Format of the original implementation's checkpoint files.

    Attributes:
        marker: Prefix of state_dict keys that occurs only in this family's files.
        zeros: Regular expression for keys that may be missing from a file, and whose weights are
            then filled with zeros → the reason.
        ignored: Regular expression for keys that are not read → the reason.
        unused_shapes: Function from a config to `{key: shape}` of the tensors that the original
            program requires in a file but never uses.
        wrap: Function from a state_dict to the contents of a file that the original code loads.
    """

    marker: str
    zeros: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused_shapes: Callable[[Any], dict[str, tuple[int, ...]]] = lambda config: {}
    wrap: Callable[[dict], dict] = lambda state: {"model": state}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: an image ViT that runs on each frame, and a head over the frames.

    Weight names are those of `jaxvid.models.split_params`. A prefix that stands for several weights
    ends with a dot.

    Attributes:
        name: Identifier in model folders and messages, e.g. `xvit`.
        title: Name in the paper's spelling, e.g. `XViT`.
        config: The config class.
        module: The network class. `module(config, rngs=rngs)` has the attribute `config` and the
            methods `__call__`, `features` and `attention` of `jaxvid.models.stam.STAM`; with
            `shares_frames` also `frame_features` and `classify`.
        presets: Name → config. Names are unique across all families.
        image_prefix: Prefix of the image ViT's weights; empty if the network itself is the image
            ViT.
        head: Prefixes of all weights after the image ViT. Only they are trained while the backbone
            is frozen.
        class_heads: Prefixes of the Linear layers that may output the logits; that of the presets
            comes first.
        layer_lists: Attribute names of lists of identical layers; messages abbreviate their
            indices.
        head_counts: Config field that sets a number of attention heads → prefix of the weights that
            are split into these heads. No shape depends on the number, but the weights are useless
            with a different one.
        tensor_axes: End of the names of weights → the axis that tensor parallelism splits.
        multiply_adds: Function `(config, attention)` → multiply-adds of the matrix products in the
            forward pass of one view. `attention` also counts the attention products, q·kᵀ and
            weights·v.
        released_preprocessing: Config → the preprocessing of the released code, in the format of
            `model.json`.
        torch: Format of the original implementation's checkpoint files.
        frame_embeddings: Name of an embedding with one row per frame → its layout.
        optional_parts: Regular expressions for prefixes of weights, the largest part first.
            Depending on its config, a network has either all weights of such a part or none.
        published_cost: Name of a preset → its cost as stated in the paper.
        released_classes: Name of a preset → the classes of its checkpoints, and their accuracy with
            the views of `released_preprocessing`.
        released_weights: Name of a preset → the address of the authors' checkpoint.
        license_url: Address of the page that states the licence of these checkpoints.
        shares_frames: Whether a frame's features do not depend on the other frames of the clip.
            Windows that overlap then share the features.
        mixes_frames: Config → whether attention within a frame also reads keys or values of other
            frames. The attention rollout is then approximate in time.
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
    tensor_axes: Mapping[str, TensorAxis]
    multiply_adds: Callable[[Any, bool], int]
    released_preprocessing: Callable[[Any], dict[str, Any]]
    torch: TorchFormat
    frame_embeddings: Mapping[str, FrameEmbedding] = dataclasses.field(default_factory=dict)
    optional_parts: tuple[str, ...] = ()
    published_cost: Mapping[str, PublishedCost] = dataclasses.field(default_factory=dict)
    released_classes: Mapping[str, ReleasedClasses] = dataclasses.field(default_factory=dict)
    released_weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    license_url: str = ""
    shares_frames: bool = False
    mixes_frames: Callable[[Any], bool] = lambda config: False

    @property
    def pos_embed(self) -> str:
        """Name of the image ViT's positional embedding.

        Its first row is for the class token, and the others for a square grid of patches.
        """
        return f"{self.image_prefix}pos_embed"

    def tensor_splits(self, config: ImageViTConfig) -> dict[str, tuple[int, int | None]]:
        """Return the weights of a network that tensor parallelism splits.

        Returns:
            End of a weight's name → the axis, and the number of heads on it or None; see
            `jaxvid.distributed.sharding.state_sharding`.
        """
        return {
            end: (split.axis, split.heads and getattr(config, split.heads))
            for end, split in self.tensor_axes.items()
        }

    def image_vit(self, model: nnx.Module) -> nnx.Module:
        """Return the image ViT of a network: the module with `embed`, `blocks` and `norm`."""
        return getattr(model, self.image_prefix.removesuffix(".")) if self.image_prefix else model

    def is_image_weight(self, name: str) -> bool:
        """Return whether a weight of the network also exists in a plain image ViT."""
        image_name = name.removeprefix(self.image_prefix)
        return name.startswith(self.image_prefix) and image_name.startswith(IMAGE_WEIGHTS)

    def block_index(self, name: str) -> int | None:
        """Return the index of the image ViT's block with this weight, or None for other weights."""
        prefix = f"{self.image_prefix}blocks."
        if not name.startswith(prefix):
            return None
        return int(name.removeprefix(prefix).partition(".")[0])

    def is_embedding(self, name: str) -> bool:
        """Return whether a weight is used before the image ViT's first block."""
        later = (*self.head, f"{self.image_prefix}blocks.", f"{self.image_prefix}norm.")
        return not name.startswith(later)
