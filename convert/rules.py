"""The rules of conversion: one for each kind of leaf, and one table for each kind of file.

Names of weights here are PyTorch's paths (see jaxvid/models/__init__.py); only leaves differ:
a Linear or convolution `weight` is a `kernel` with its output axis last, and a LayerNorm's `weight`
is its `scale`.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert.weight_files import Weight, concatenate
from jaxvid.errors import InputError
from jaxvid.models import ModelConfig, Params
from jaxvid.models.layers import MAX_TOKENS
from jaxvid.models.stam import STAMConfig

TRANSPOSED = ("kernel", "in_proj_weight")


def torch_key(name: str) -> str:
    """The state_dict key that a weight of ours goes by."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.weight" if leaf in ("kernel", "scale") else name


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """A weight of ours in torch's layout: `(out, in)`, `(out, in, h, w)`."""
    if name.rpartition(".")[2] not in TRANSPOSED:
        return array
    return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)


def from_torch(name: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`: `(in, out)`, `(h, w, in, out)`."""
    if name.rpartition(".")[2] not in TRANSPOSED:
        return array
    return array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that torch gives to a weight of ours."""
    return to_torch(name, np.broadcast_to(np.float32(0), shape)).shape


@dataclasses.dataclass(frozen=True)
class Source:
    """What a kind of file calls its weights, and which it may lack or have too many of.

    Attributes:
        ignored: Patterns of keys that are not read, each with the reason.
        zeros: Patterns of keys that may be missing and then are zeros, each with the reason.
        is_image_model: Whether it fills the image part of a video model alone.
    """

    ignored: dict[str, str] = dataclasses.field(default_factory=dict)
    zeros: dict[str, str] = dataclasses.field(default_factory=dict)
    is_image_model: bool = False


_IMAGE_HEAD = "the image model's classifier; the video model has its own"
SOURCES = {
    "stam": Source(
        zeros={r"blocks\.\d+\.attn\.qkv\.bias": "a first-version file, which has none"},
    ),
    "xvit": Source(ignored={r"new_fc\..*": "the program never reads it"}),
    "timm_vit": Source(
        ignored={
            r"head(_dist)?\..*": _IMAGE_HEAD,
            r"(pre_logits|fc_norm)\..*": "belongs to the image model's classifier",
        },
        is_image_model=True,
    ),
}
SOURCES["google_vit"] = SOURCES["timm_vit"]  # after `google_to_torch`


def image_prefix(config: ModelConfig) -> str:
    """Where the image ViT lives in a video model."""
    return "" if isinstance(config, STAMConfig) else "base_model."


def is_image_part(name: str, config: ModelConfig) -> bool:
    """Whether an image ViT has this weight of a video model."""
    inside = name.removeprefix(image_prefix(config))
    parts = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
    return name.startswith(image_prefix(config)) and inside.startswith(parts)


def google_to_torch(weights: dict[str, Weight], source: Path) -> dict[str, Weight]:
    """Google's ViT `.npz` names and layouts → those of a timm ViT state_dict.

    Keys that fit no rule, by name or by number of axes, are kept under their own name, so that they
    are reported.

    Args:
        weights: The file's weights.
        source: The file, for messages.

    Raises:
        InputError: Two keys stand for the same weight.
    """
    out, qkv = {}, {}
    table: list[tuple[str, str, Callable[[np.ndarray], np.ndarray]]] = [
        (r"cls", "cls_token", np.asarray),
        (r"Transformer/posembed_input/pos_embedding", "pos_embed", np.asarray),
        (r"embedding/kernel", "patch_embed.proj.weight", lambda a: a.transpose(3, 2, 0, 1)),
        (r"embedding/bias", "patch_embed.proj.bias", np.asarray),
        (r"Transformer/encoder_norm/scale", "norm.weight", np.asarray),
        (r"Transformer/encoder_norm/bias", "norm.bias", np.asarray),
        (r"(head|pre_logits)/kernel", r"\1.weight", np.transpose),
        (r"(head|pre_logits)/bias", r"\1.bias", np.asarray),
    ]
    block = r"Transformer/encoderblock_(\d+)/"
    for theirs, ours in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
        table.append((f"{block}{theirs}/scale", rf"blocks.\1.{ours}.weight", np.asarray))
        table.append((f"{block}{theirs}/bias", rf"blocks.\1.{ours}.bias", np.asarray))
    for theirs, ours in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        mlp = f"{block}MlpBlock_3/{theirs}"
        table.append((f"{mlp}/kernel", rf"blocks.\1.mlp.{ours}.weight", np.transpose))
        table.append((f"{mlp}/bias", rf"blocks.\1.mlp.{ours}.bias", np.asarray))
    attention = f"{block}MultiHeadDotProductAttention_1/"
    flat = lambda a: a.reshape(-1, a.shape[-1]).T  # (k e d) → (d, k·e)  # noqa: E731
    join_heads = lambda a: a.reshape(a.shape[0], -1).T  # (d k e) → (k·e, d)  # noqa: E731
    flatten = lambda a: a.reshape(-1)  # (k e) → (k·e)  # noqa: E731
    table.append((f"{attention}out/kernel", r"blocks.\1.attn.proj.weight", flat))
    table.append((f"{attention}out/bias", r"blocks.\1.attn.proj.bias", np.asarray))
    for key, weight in weights.items():
        name, change, parts = key, None, out
        if match := re.fullmatch(f"{attention}(query|key|value)/(kernel|bias)", key):
            index, name, leaf = match.groups()
            parts = qkv.setdefault((index, leaf), {})
            change = join_heads if leaf == "kernel" else flatten
        for theirs, ours, change_by_rule in () if change else table:
            if match := re.fullmatch(theirs, key):
                name, change = match.expand(ours), change_by_rule
                break
        try:
            changed = weight.map(change) if change else weight
        except (ValueError, IndexError):  # not the number of axes that the rule is for
            name, parts, changed = key, out, weight
        if name in parts:
            raise InputError(f"{source}: two keys stand for {name}; remove one of them")
        parts[name] = changed
    for (index, leaf), parts in qkv.items():
        name = f"blocks.{index}.attn.qkv.{'weight' if leaf == 'kernel' else 'bias'}"
        found = [parts[part] for part in ("query", "key", "value") if part in parts]
        if name in out:
            raise InputError(f"{source}: two keys stand for {name}; remove one of them")
        try:
            out[name] = concatenate(found)
        except (ValueError, IndexError):
            start = attention.replace(r"(\d+)", index)
            out |= {f"{start}{part}/{leaf}": parts[part] for part in parts}
    return out


@dataclasses.dataclass
class Plan:
    """What becomes of every key of a file and of every weight of a model.

    Attributes:
        used: Weight → key.
        zeros: Weight → why it is zeros.
        resized: Weight → how it was resized.
        initialised: Weights that keep fresh values.
        rounded: Weights that are float64 in the file, and float32 in the model.
        ignored: Key → why it is not read.
        problems: What makes the conversion impossible, one line each.
    """

    used: dict[str, str] = dataclasses.field(default_factory=dict)
    zeros: dict[str, str] = dataclasses.field(default_factory=dict)
    resized: dict[str, str] = dataclasses.field(default_factory=dict)
    initialised: list[str] = dataclasses.field(default_factory=list)
    rounded: list[str] = dataclasses.field(default_factory=list)
    ignored: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)


def plan(
    source: Source,
    shapes: dict[str, tuple[int, ...]],
    abstract_params: Params,
    config: ModelConfig,
) -> Plan:
    """Decides about every key of the file and every weight of the model, exactly once.

    Args:
        source: The kind of file.
        shapes: Key → shape, as the file has them, without a DDP prefix.
        abstract_params: The model's weights.
        config: The model's config.
    """
    result, left = Plan(), dict(shapes)
    prefix = image_prefix(config) if source.is_image_model else ""
    for name, leaf in abstract_params.items():
        if source.is_image_model and not is_image_part(name, config):
            result.initialised.append(name)
            continue
        key = torch_key(name).removeprefix(prefix)
        wanted = torch_shape(name, leaf.shape)
        if key not in left:
            reason = _match(source.zeros, key)
            if reason:
                result.zeros[name] = reason
            else:
                result.problems.append(f"{key}: missing in the file; the model has {wanted}")
            continue
        found = tuple(left.pop(key))
        if found == wanted:
            result.used[name] = key
        elif source.is_image_model and key == "pos_embed" and _is_grid(found, wanted):
            result.used[name] = key
            result.resized[name] = f"{found} → {wanted}, bicubic"
        else:
            result.problems.append(f"{key}: {found} in the file, {wanted} in the model")
    for key in left:
        reason = _match(source.ignored, key)
        if reason:
            result.ignored[key] = reason
        else:
            result.problems.append(f"{key}: {tuple(left[key])} in the file, absent in the model")
    return result


def _is_grid(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a positional embedding is a class token and a square grid of the wanted width."""
    if len(found) != 3 or found[0] != 1 or found[2] != wanted[2]:
        return False
    if not 2 <= found[1] <= MAX_TOKENS + 1:
        return False
    return round((found[1] - 1) ** 0.5) ** 2 == found[1] - 1


def _match(patterns: dict[str, str], key: str) -> str | None:
    return next((why for pattern, why in patterns.items() if re.fullmatch(pattern, key)), None)
