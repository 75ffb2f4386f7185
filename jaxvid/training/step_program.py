"""The jitted training step of a network on a mesh, and the shapes of its state."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import optax
from jax.sharding import Mesh

from jaxvid.distributed import sharding
from jaxvid.models import ModelConfig, Params, abstract_model, family_of
from jaxvid.training import optim, steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepProgram:
    """A training step and its state.

    Attributes:
        init: Function that makes a training state from initial weights.
        abstract_state: Shapes, dtypes and shardings of the training state.
        train_step: The jitted training step, from `steps.jit_train_step`.
    """

    init: Callable[[Params], dict]
    abstract_state: dict
    train_step: Callable[[dict, dict[str, jax.Array]], tuple[dict, dict[str, jax.Array]]]


def make_step_program(
    model: ModelConfig,
    optimizer_config: optim.OptimizerConfig,
    recipe: steps.Recipe,
    *,
    schedule: optax.Schedule,
    mesh: Mesh,
    batch_size: int,
    teacher: tuple[steps.Teacher | None, Params | None] = (None, None),
) -> StepProgram:
    """Make the training step of a network. Nothing is compiled or allocated yet.

    Args:
        model: The network's config.
        optimizer_config: The optimizer.
        recipe: Options of the step, before `Recipe.for_run`.
        schedule: Learning rate by step.
        mesh: The device mesh.
        batch_size: Clips per step, over all devices.
        teacher: The result of `distillation.load_teacher`.
    """
    family = family_of(model)
    graphdef, abstract_params = abstract_model(model)
    optimizer = optim.make_optimizer(optimizer_config, schedule, family)
    frozen = optim.frozen_names(optimizer_config, abstract_params, family)
    splits = family.tensor_splits(model)
    gather = functools.partial(sharding.gather_fsdp, mesh=mesh, tensor_splits=splits)
    recipe = dataclasses.replace(recipe.for_run(mesh, batch_size, frozen), gather=gather)
    init = functools.partial(steps.init_state, optimizer=optimizer, recipe=recipe)
    abstract_state = jax.eval_shape(init, abstract_params)
    abstract_state = sharding.with_sharding(abstract_state, mesh, splits)
    train_step = steps.jit_train_step(
        abstract_state,
        mesh,
        teacher[1],
        graphdef=graphdef,
        optimizer=optimizer,
        recipe=recipe,
        teacher=teacher[0],
    )
    return StepProgram(init=init, abstract_state=abstract_state, train_step=train_step)
