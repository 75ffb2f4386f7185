"""Conversion rules: PyTorch's names and layouts of weights, and the plan of a conversion.

Weights are named by PyTorch's paths (see jaxvid/models/__init__.py). Only the last part differs: a
Linear or convolution `weight` is a `kernel` with its output axis last, and a LayerNorm's `weight`
is its `scale`. The output axis `3·d` of queries, keys and values is two axes, `(3, d)`.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from jaxvid.models import FAMILIES, Params
from jaxvid.models.family import MATRIX_LEAVES, QKV_WEIGHTS, Family
from jaxvid.models.limits import MAX_TOKENS


def torch_key(name: str) -> str:
    """Return the state_dict key of a weight."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.weight" if leaf in ("kernel", "scale") else name


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Return a weight in PyTorch's layout: `(out, in)` or `(out, in, h, w)`."""
    if name.endswith(QKV_WEIGHTS):
        array = array.reshape(*array.shape[:-2], -1)  # (... 3 d) → (... 3·d)
    if name.rpartition(".")[2] not in MATRIX_LEAVES:
        return array
    return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)


def from_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Return a weight in jaxvid's layout; inverse of `to_torch`.

    A matrix becomes `(in, out)`, a convolution `(h, w, in, out)`. The `out` of queries, keys and
    values becomes `(3, d)`.
    """
    if name.rpartition(".")[2] in MATRIX_LEAVES:
        array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
    if name.endswith(QKV_WEIGHTS):
        array = array.reshape(*array.shape[:-1], 3, -1)  # (... 3·d) → (... 3 d)
    return array


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a weight in PyTorch's layout."""
    return to_torch(name, np.broadcast_to(np.float32(0), shape)).shape


@dataclasses.dataclass(frozen=True)
class Source:
    """Conversion rules of one kind of file.

    Attributes:
        ignored: Patterns of keys in the file that are not read → the reason.
        zeros: Patterns of keys that may be missing from the file and are then filled with zeros →
            the reason.
        is_image_model: Whether the file contains an image model, whose weights initialise the image
            ViT of a video model.
    """

    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    zeros: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_image_model: bool = False


_IMAGE_CLASSIFIER = "the image model's classifier; the video model has its own"
# Also for Google ViTs: `google_vit.to_torch` gives them the keys of a timm ViT.
_IMAGE_MODEL = Source(
    ignored={
        r"head(_dist)?\..*": _IMAGE_CLASSIFIER,
        r"(pre_logits|fc_norm)\..*": "belongs to the image model's classifier",
    },
    is_image_model=True,
)


def get_source(kind: str) -> Source:
    """Return the rules of a kind of file: `timm_vit`, `google_vit`, or the name of a family."""
    if kind in ("timm_vit", "google_vit"):
        return _IMAGE_MODEL
    torch = FAMILIES[kind].torch
    return Source(ignored=torch.ignored, zeros=torch.zeros)


@dataclasses.dataclass
class Plan:
    """What happens to every key of a file and to every weight of a model.

    Attributes:
        used: Name of a weight → key in the file from which it is read.
        zeros: Name of a weight that is filled with zeros → the reason.
        resized: Name of a weight that is resized → its old and new shape.
        initialised: Names of weights that keep their initial values.
        rounded: Names of weights that are float64 in the file and float32 in the model.
        ignored: Key in the file that is not read → the reason.
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
        source: The rules of this kind of file.
        shapes: Key in the file, without DDP's prefix `module.` → shape.
        abstract_params: Name of a weight of the model → its shape and dtype.
        family: The model's family.
    """
    plan, remaining = Plan(), dict(shapes)  # `remaining`: keys without a weight so far
    prefix = family.image_prefix if source.is_image_model else ""
    for name, leaf in abstract_params.items():
        if source.is_image_model and not family.is_image_weight(name):
            plan.initialised.append(name)
            continue
        key = torch_key(name).removeprefix(prefix)
        expected = torch_shape(name, leaf.shape)
        if key not in remaining:
            reason = _find_reason(source.zeros, key)
            if reason:
                plan.zeros[name] = reason
            else:
                plan.problems.append(f"{key}: missing in the file; the model has {expected}")
            continue
        shape = tuple(remaining.pop(key))
        if shape == expected:
            plan.used[name] = key
        elif source.is_image_model and key == "pos_embed" and _is_grid(shape, expected):
            plan.used[name] = key
            plan.resized[name] = f"{shape} → {expected}, bicubic"
        else:
            plan.problems.append(f"{key}: {shape} in the file, {expected} in the model")
    for key in remaining:
        reason = _find_reason(source.ignored, key)
        if reason:
            plan.ignored[key] = reason
        else:
            plan.problems.append(f"{key}: {tuple(remaining[key])} in the file, not in the model")
    return plan


def _is_grid(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether an embedding has a class token, a square grid and the expected width."""
    if len(shape) != 3 or shape[0] != 1 or shape[2] != expected[2]:
        return False
    if not 2 <= shape[1] <= MAX_TOKENS + 1:
        return False
    return round((shape[1] - 1) ** 0.5) ** 2 == shape[1] - 1


def _find_reason(patterns: Mapping[str, str], key: str) -> str | None:
    """Return the reason of the first pattern that matches a key, or None if none matches."""
    for pattern, reason in patterns.items():
        if re.fullmatch(pattern, key):
            return reason
    return None
