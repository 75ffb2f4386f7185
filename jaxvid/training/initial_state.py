"""The initial training state."""

from collections.abc import Sequence

import jax
from flax import nnx

from jaxvid.distributed import collectives, sharding
from jaxvid.models import ModelConfig, build_model, split_params
from jaxvid.storage import model_folder
from jaxvid.training.step_program import StepProgram
from jaxvid.weights.resolve import resolve_model


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
        init_from: The model folder, or another name of a model; empty: random weights.
        labels: Class names of the data; used with `init_from`.

    Returns:
        The state; and log lines that say which weights were loaded.

    Raises:
        InputError: The folder is damaged or its weights do not fit the network.
    """
    folder = init_from and collectives.raise_on_all_processes(resolve_model, init_from)
    # Not compiled as one program: JAX compiles one small program per shape, which takes less time.
    _, drawn = split_params(build_model(model_config, nnx.Rngs(seed)))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    params = jax.tree.map(sharding.shard, drawn, shardings["params"])
    notes = []
    if folder:
        params, notes = model_folder.load_init(folder, model_config, params, labels)
    return jax.jit(program.init, out_shardings=shardings)(params), notes
