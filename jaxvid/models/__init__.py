"""The networks. They know nothing of data, training or files.

A model's weights live outside it as a flat dict, `{"base_model.blocks.0.attn.qkv.kernel": array}`:
one key a weight, in PyTorch's spelling of the path, so that sharding rules, decay masks,
checkpoints and converters all name a weight the same way.
"""

import dataclasses
import difflib

import jax
from flax import nnx

from jaxvid.errors import InputError, short_repr
from jaxvid.models import stam, xvit

PRESETS = {**stam.PRESETS, **xvit.PRESETS}
Params = dict[str, jax.Array]
ModelConfig = stam.STAMConfig | xvit.XViTConfig


def make_model_config(name: str, **overrides) -> ModelConfig:
    """The config of a preset with some fields replaced.

    Args:
        name: A preset's name, e.g. `xvit_tiny`.
        **overrides: Fields of that preset's config.

    Raises:
        InputError: No such preset or field, or sizes that do not fit each other.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"model {short_repr(name)} does not exist; there are {', '.join(PRESETS)}")
    fields = [field.name for field in dataclasses.fields(PRESETS[name])]
    for key in overrides:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(fields)}"
            raise InputError(f"model {name} has no option {short_repr(key)}; {hint}")
    try:
        return dataclasses.replace(PRESETS[name], **overrides)
    except ValueError as error:
        raise InputError(f"model {name}: {error}") from None


def build_model(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The network of a config, with fresh weights drawn from `rngs`."""
    network = stam.STAM if isinstance(config, stam.STAMConfig) else xvit.XViT
    return network(config, rngs=rngs)


def create_model(name: str, *, seed: int = 0, **overrides) -> nnx.Module:
    """A network with fresh weights.

    Args:
        name: A preset's name; `jaxvid.models.PRESETS` holds them all.
        seed: Seed of the weights.
        **overrides: Fields of the preset's config, e.g. `num_classes=10`.

    Returns:
        A module: `model(video)` takes a normalised float clip `(b t h w c)` to logits.

    Raises:
        InputError: No such preset or field, or sizes that do not fit each other.
    """
    config = make_model_config(name, **overrides)
    graphdef, _ = abstract_model(config)
    # Compiled as one program: op by op, the initialisers of a large model take much longer.
    init = jax.jit(lambda: split_params(build_model(config, nnx.Rngs(seed)))[1])
    return merge_params(graphdef, init())


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    """The structure of a network and the shapes of its weights, without allocating any."""
    return split_params(nnx.eval_shape(lambda: build_model(config, _OneKey())))


class _OneKey:
    """Stands for `nnx.Rngs` where only shapes matter.

    The counters of `nnx.Rngs` make tracing quadratic in the depth: 13 s for 48 blocks, against 1 s.
    """

    def __init__(self):
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def split_params(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Splits a network into its structure and its weights (a flat dict)."""
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    return graphdef, {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def merge_params(graphdef: nnx.GraphDef, params: Params) -> nnx.Module:
    """Puts a structure and its weights together again: the inverse of `split_params`."""
    paths = (
        tuple(int(part) if part.isdigit() else part for part in name.split(".")) for name in params
    )
    flat = zip(paths, map(nnx.Param, params.values()), strict=True)
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
