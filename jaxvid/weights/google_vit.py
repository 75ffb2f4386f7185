"""Conversion of the weights of Google's image ViTs (`.npz`) to those of a timm ViT."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxvid.errors import InputError
from jaxvid.weights.weight import Weight, concatenate

Change = Callable[[np.ndarray], np.ndarray]  # a change of layout: a transposition or a reshape
BLOCK = r"Transformer/encoderblock_(\d+)/"
ATTENTION = f"{BLOCK}MultiHeadDotProductAttention_1/"


def _make_rules() -> list[tuple[str, str, Change]]:
    """Return the rules: pattern of a key, template of its new name, change of layout."""
    rules: list[tuple[str, str, Change]] = [
        (r"cls", "cls_token", np.asarray),
        (r"Transformer/posembed_input/pos_embedding", "pos_embed", np.asarray),
        (r"embedding/kernel", "patch_embed.proj.weight", lambda a: a.transpose(3, 2, 0, 1)),
        (r"embedding/bias", "patch_embed.proj.bias", np.asarray),
        (r"Transformer/encoder_norm/scale", "norm.weight", np.asarray),
        (r"Transformer/encoder_norm/bias", "norm.bias", np.asarray),
        (r"(head|pre_logits)/kernel", r"\1.weight", np.transpose),
        (r"(head|pre_logits)/bias", r"\1.bias", np.asarray),
    ]
    for google, timm in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
        rules.append((f"{BLOCK}{google}/scale", rf"blocks.\1.{timm}.weight", np.asarray))
        rules.append((f"{BLOCK}{google}/bias", rf"blocks.\1.{timm}.bias", np.asarray))
    for google, timm in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        mlp = f"{BLOCK}MlpBlock_3/{google}"
        rules.append((f"{mlp}/kernel", rf"blocks.\1.mlp.{timm}.weight", np.transpose))
        rules.append((f"{mlp}/bias", rf"blocks.\1.mlp.{timm}.bias", np.asarray))
    rules.append((f"{ATTENTION}out/kernel", r"blocks.\1.attn.proj.weight", _join_input_heads))
    rules.append((f"{ATTENTION}out/bias", r"blocks.\1.attn.proj.bias", np.asarray))
    return rules


def _join_input_heads(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1]).T  # (k e d) → (d, k·e)


def _join_output_heads(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0], -1).T  # (d k e) → (k·e, d)


def _flatten(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1)  # (k e) → (k·e)


def to_torch(weights: dict[str, Weight], source: Path) -> dict[str, Weight]:
    """Convert Google's names and layouts to those of a timm ViT state_dict.

    A weight whose key or number of axes matches no rule keeps its name and layout, so that
    `rules.make_plan` reports it as unknown.

    Args:
        weights: The file's weights.
        source: The file, for messages.

    Raises:
        InputError: Two keys are converted to the same weight.
    """
    rules = _make_rules()
    out: dict[str, Weight] = {}
    qkv: dict[tuple[str, str], dict[str, Weight]] = {}  # (block, leaf) → query, key and value
    for key, weight in weights.items():
        name, change, target = key, None, out
        if match := re.fullmatch(f"{ATTENTION}(query|key|value)/(kernel|bias)", key):
            index, name, leaf = match.groups()
            target = qkv.setdefault((index, leaf), {})
            change = _join_output_heads if leaf == "kernel" else _flatten
        else:
            for pattern, template, rule_change in rules:
                if match := re.fullmatch(pattern, key):
                    name, change = match.expand(template), rule_change
                    break
        try:
            changed = weight.map(change) if change else weight
        except (ValueError, IndexError):  # the rule is for another number of axes
            name, target, changed = key, out, weight
        if name in target:
            raise _duplicate(source, name)
        target[name] = changed
    for (index, leaf), parts in qkv.items():
        name = f"blocks.{index}.attn.qkv.{'weight' if leaf == 'kernel' else 'bias'}"
        if name in out:
            raise _duplicate(source, name)
        try:
            out[name] = concatenate(
                [parts[part] for part in ("query", "key", "value") if part in parts]
            )
        except (ValueError, IndexError):  # shapes do not match: keep the keys, to be reported
            prefix = ATTENTION.replace(r"(\d+)", index)
            out |= {f"{prefix}{part}/{leaf}": parts[part] for part in parts}
    return out


def _duplicate(source: Path, name: str) -> InputError:
    return InputError(f"{source}: two keys are converted to {name}; remove one of them")
