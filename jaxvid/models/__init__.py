"""The networks, independent of data, training and files.

A network's weights are a flat dict, `{"blocks.0.attn.qkv.kernel": array}`. The keys resemble those
of PyTorch's state_dict. Sharding rules, decay masks, checkpoints and converters all use these keys.
"""

import dataclasses
import difflib
from typing import Any

import jax
from flax import nnx

from jaxvid.errors import InputError, short_repr
from jaxvid.models import stam, xvit
from jaxvid.models.family import Family
from jaxvid.models.image_vit import ImageViTConfig

FAMILIES = {family.name: family for family in (stam.FAMILY, xvit.FAMILY)}
PRESETS = {name: config for f in FAMILIES.values() for name, config in f.presets.items()}
Params = dict[str, jax.Array]
ModelConfig = ImageViTConfig  # or a subclass


def family_of(config: ModelConfig) -> Family:
    """Return the family of a config.

    Raises:
        ValueError: No family in `FAMILIES` has this config class.
    """
    for family in FAMILIES.values():
        if type(config) is family.config:
            return family
    raise ValueError(f"no family in FAMILIES has the config class {type(config).__name__}")


def make_model_config(name: str, **overrides: Any) -> ModelConfig:
    """Return the config of a preset with some fields replaced.

    Args:
        name: Name of a preset in `PRESETS`.
        **overrides: Fields of the preset's config.

    Raises:
        InputError: There is no such preset or field, or a value is invalid.
    """
    if not isinstance(name, str) or name not in PRESETS:
        known = ", ".join(PRESETS)
        raise InputError(f"model {short_repr(name)} does not exist; expected one of {known}")
    fields = [field.name for field in dataclasses.fields(PRESETS[name])]
    for key in overrides:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(fields)}"
            raise InputError(f"model {name} has no option {short_repr(key)}; {hint}")
    try:
        return dataclasses.replace(PRESETS[name], **overrides)
    except ValueError as error:
        raise InputError(f"model {name}: {error}") from None


def build_model(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """Return the network of a config, with initial weights drawn from `rngs`."""
    return family_of(config).module(config, rngs=rngs)


def create_model(name: str, *, seed: int = 0, **overrides: Any) -> nnx.Module:
    """Return a network with fresh initial weights.

    Args:
        name: Name of a preset in `PRESETS`.
        seed: Seed of the initial weights.
        **overrides: Fields of the preset's config, e.g. `num_classes=10`.

    Returns:
        A module: `model(video)` maps normalised float clips `(b t h w c)` to logits
        `(b, num_classes)`.

    Raises:
        InputError: There is no such preset or field, or a value is invalid.
    """
    config = make_model_config(name, **overrides)
    # Not compiled as one program: JAX compiles one small program per shape, which takes less time.
    return build_model(config, nnx.Rngs(seed))


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    """Return the structure of a network and the shapes of its weights, without allocating them."""
    return split_params(nnx.eval_shape(lambda: build_model(config, _OneKey())))


class _OneKey:
    """Replacement for `nnx.Rngs` where only shapes matter.

    The counters of `nnx.Rngs` make tracing quadratic in the depth: 13 s for 48 blocks instead of
    1 s.
    """

    def __init__(self) -> None:
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def split_params(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Split a network into its structure and a flat dict of its weights."""
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    return graphdef, {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def merge_params(graphdef: nnx.GraphDef, params: Params) -> nnx.Module:
    """Merge a structure and its weights into a network: the inverse of `split_params`."""
    paths = (
        tuple(int(part) if part.isdigit() else part for part in name.split(".")) for name in params
    )
    flat = zip(paths, map(nnx.Param, params.values()), strict=True)
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
