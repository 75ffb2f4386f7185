"""The initial training state."""

from collections.abc import Sequence

import jax
from flax import nnx

from jaxvid.distributed import sharding
from jaxvid.models import ModelConfig, build_model, split_params
from jaxvid.storage import model_folder
from jaxvid.training.step_program import StepProgram


def make_initial_state(
    program: StepProgram,
    model_config: ModelConfig,
    *,
    seed: int,
    init_from: str = "",
    labels: Sequence[str] = (),
) -> tuple[dict, list[str]]:
    """Make a fresh training state, with the weights of a model folder if one is named.

    Every process draws all random weights, on its first device.

    Args:
        program: The training step and the shapes, dtypes and shardings of its state.
        model_config: The network's config.
        seed: Seed of the random weights.
        init_from: The model folder; empty: random weights.
        labels: Class names of the data; used with `init_from`.

    Returns:
        The state; and log lines that say which weights were loaded.

    Raises:
        InputError: The folder is damaged or its weights do not fit the network.
    """
    # Not compiled as one program: JAX compiles one small program per shape, which takes less time.
    _, drawn = split_params(build_model(model_config, nnx.Rngs(seed)))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    params = jax.tree.map(sharding.shard, drawn, shardings["params"])
    notes = []
    if init_from:
        params, notes = model_folder.load_init(init_from, model_config, params, labels)
    return jax.jit(program.init, out_shardings=shardings)(params), notes
