"""Conversion rules: PyTorch's names and layouts of weights, and a plan for every key of a file.

Weights are named by PyTorch's paths (see jaxvid/models/__init__.py). Only the last part differs: a
Linear or convolution `weight` is a `kernel` with its output axis last, and a LayerNorm's `weight`
is its `scale`.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from jaxvid.models import FAMILIES, Params
from jaxvid.models.family import MATRIX_LEAVES, Family
from jaxvid.models.limits import MAX_TOKENS


def torch_key(name: str) -> str:
    """Return the state_dict key of a weight."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.weight" if leaf in ("kernel", "scale") else name


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Return a weight in PyTorch's layout: `(out, in)` or `(out, in, h, w)`."""
    if name.rpartition(".")[2] not in MATRIX_LEAVES:
        return array
    return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)


def from_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Return a weight in Flax's layout, `(in, out)` or `(h, w, in, out)`: inverse of `to_torch`."""
    if name.rpartition(".")[2] not in MATRIX_LEAVES:
        return array
    return array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a weight in PyTorch's layout."""
    return to_torch(name, np.broadcast_to(np.float32(0), shape)).shape


@dataclasses.dataclass(frozen=True)
class Source:
    """A kind of file.

    Attributes:
        ignored: Patterns of keys that are not read → the reason.
        zeros: Patterns of keys that may be missing and are zeros then → the reason.
        is_image_model: Whether the file has only the image ViT of a video model.
    """

    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    zeros: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_image_model: bool = False


_IMAGE_CLASSIFIER = "the image model's classifier; the video model has its own"
# A Google ViT has a timm ViT's keys after `google_vit.to_torch`.
_IMAGE_MODEL = Source(
    ignored={
        r"head(_dist)?\..*": _IMAGE_CLASSIFIER,
        r"(pre_logits|fc_norm)\..*": "belongs to the image model's classifier",
    },
    is_image_model=True,
)


def get_source(kind: str) -> Source:
    """Return a kind of file: `timm_vit`, `google_vit`, or the name of a family."""
    if kind in ("timm_vit", "google_vit"):
        return _IMAGE_MODEL
    torch = FAMILIES[kind].torch
    return Source(ignored=torch.ignored, zeros=torch.zeros)


@dataclasses.dataclass
class Plan:
    """What happens to every key of a file and to every weight of a model.

    Attributes:
        used: Weight → key.
        zeros: Weight → the reason why it is zeros.
        resized: Weight → description of its resize.
        initialised: Weights that keep their initial values.
        rounded: Weights that are float64 in the file and float32 in the model.
        ignored: Key → the reason why it is not read.
        problems: Reasons why the conversion is impossible, one line each.
    """

    used: dict[str, str] = dataclasses.field(default_factory=dict)
    zeros: dict[str, str] = dataclasses.field(default_factory=dict)
    resized: dict[str, str] = dataclasses.field(default_factory=dict)
    initialised: list[str] = dataclasses.field(default_factory=list)
    rounded: list[str] = dataclasses.field(default_factory=list)
    ignored: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)


def make_plan(
    source: Source,
    shapes: Mapping[str, tuple[int, ...]],
    abstract_params: Params,
    family: Family,
) -> Plan:
    """Decide what happens to every key of the file and every weight of the model, exactly once.

    Args:
        source: The kind of file.
        shapes: Key → shape in the file, without DDP's prefix.
        abstract_params: The model's weights.
        family: The model's family.
    """
    result, left = Plan(), dict(shapes)
    prefix = family.image_prefix if source.is_image_model else ""
    for name, leaf in abstract_params.items():
        if source.is_image_model and not family.is_image_weight(name):
            result.initialised.append(name)
            continue
        key = torch_key(name).removeprefix(prefix)
        expected = torch_shape(name, leaf.shape)
        if key not in left:
            reason = _match(source.zeros, key)
            if reason:
                result.zeros[name] = reason
            else:
                result.problems.append(f"{key}: missing in the file; the model has {expected}")
            continue
        shape = tuple(left.pop(key))
        if shape == expected:
            result.used[name] = key
        elif source.is_image_model and key == "pos_embed" and _is_grid(shape, expected):
            result.used[name] = key
            result.resized[name] = f"{shape} → {expected}, bicubic"
        else:
            result.problems.append(f"{key}: {shape} in the file, {expected} in the model")
    for key in left:
        reason = _match(source.ignored, key)
        if reason:
            result.ignored[key] = reason
        else:
            result.problems.append(f"{key}: {tuple(left[key])} in the file, not in the model")
    return result


def _is_grid(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether an embedding is a class token and a square grid of the expected width."""
    if len(shape) != 3 or shape[0] != 1 or shape[2] != expected[2]:
        return False
    if not 2 <= shape[1] <= MAX_TOKENS + 1:
        return False
    return round((shape[1] - 1) ** 0.5) ** 2 == shape[1] - 1


def _match(patterns: Mapping[str, str], key: str) -> str | None:
    """Return the reason of the first pattern that matches a key."""
    return next((why for pattern, why in patterns.items() if re.fullmatch(pattern, key)), None)
