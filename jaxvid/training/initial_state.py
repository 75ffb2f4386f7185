"""The initial training state."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxvid.distributed import collectives
from jaxvid.models import ModelConfig
from jaxvid.storage import model_folder
from jaxvid.weights.resolve import resolve_model


def make_initial_state(
    init: Callable[[], dict],
    abstract_state: dict,
    model_config: ModelConfig,
    init_from: str,
    labels: Sequence[str],
) -> tuple[dict, list[str]]:
    """Make a fresh training state, with the weights of a model folder if one is named.

    Args:
        init: Function that makes the state, see `steps.init_state`.
        abstract_state: Shapes, dtypes and shardings of the state.
        model_config: The network's config.
        init_from: The model folder, or another name of a model; empty: random weights.
        labels: Class names of the data.

    Returns:
        The state; and log lines that say which weights were loaded.

    Raises:
        InputError: The folder is damaged or its weights do not fit the network.
    """
    folder = init_from and collectives.raise_on_all_processes(resolve_model, init_from)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    state = jax.jit(init, out_shardings=shardings)()
    if not folder:
        return state, []
    state["params"], notes = model_folder.load_init(folder, model_config, state["params"], labels)
    if "ema" in state:
        state["ema"] = jax.tree.map(jnp.copy, state["params"])
    return state, notes
