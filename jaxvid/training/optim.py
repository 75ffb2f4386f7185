"""Learning-rate schedules and optimizers."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax

from jaxvid.errors import InputError, check_option
from jaxvid.models import Params
from jaxvid.models.family import MATRIX_LEAVES, Family

OPTIONS = {"name": ("adamw", "sgd"), "decay": ("kernels", "released"), "freeze": ("", "backbone")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule.

    Attributes:
        name: `adamw`, or `sgd` with Nesterov momentum and weight decay added to the gradient.
        learning_rate: Peak of the cosine at `reference_batch_size`.
        reference_batch_size: Batch size that learning rates are given for. They are multiplied by
            `batch_size / reference_batch_size`.
        warmup_start_rate: First learning rate of the warm-up at `reference_batch_size`; not used
            without warm-up.
        warmup_epochs: Length of the linear warm-up; 0: no warm-up.
        weight_decay: Strength of the weight decay.
        decay: Weights with weight decay: `kernels` (matrices), or `released` (all but the heads'
            biases, as in the released code).
        b1: Decay rate of AdamW's first moment.
        b2: Decay rate of AdamW's second moment.
        momentum: Momentum of SGD.
        clip_norm: Maximum of the global gradient norm; 0: no clipping.
        layer_decay: Learning rate of a block divided by that of the next block; 1: off.
        freeze: `backbone` to train only the temporal and classification heads; empty: train all.

    Raises:
        InputError: A field has an impossible value.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    reference_batch_size: int = 64
    warmup_start_rate: float = 0.0
    warmup_epochs: float = 0.0
    weight_decay: float = 0.0
    decay: str = "kernels"
    b1: float = 0.9
    b2: float = 0.999
    momentum: float = 0.9
    clip_norm: float = 0.0
    layer_decay: float = 1.0
    freeze: str = ""

    def __post_init__(self):
        for name, valid in OPTIONS.items():
            check_option(f"optimizer.{name}", getattr(self, name), valid)
        for name in ("learning_rate", "reference_batch_size", "layer_decay"):
            if getattr(self, name) <= 0:
                raise InputError(f"optimizer.{name}={getattr(self, name)}: must be above 0")
        for name in ("warmup_start_rate", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise InputError(f"optimizer.{name}={getattr(self, name)}: must not be below 0")


def make_schedule(
    optimizer: OptimizerConfig, *, batch_size: int, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """Make a cosine decay from the peak to 0 over all steps, with linear warm-up.

    The warm-up rises linearly to the value that the cosine has at the end of the warm-up, as in the
    recipes of arXiv:2106.05968. Learning rates are scaled by `batch_size / reference_batch_size`
    (Goyal et al., arXiv:1706.02677).

    Args:
        optimizer: The learning rates and the length of the warm-up.
        batch_size: Clips per step.
        total_steps: Number of training steps.
        steps_per_epoch: Number of steps per epoch; may be fractional.

    Returns:
        A function from the step to the learning rate.

    Raises:
        InputError: The warm-up is negative, or not shorter than the training.
    """
    warmup_steps = optimizer.warmup_epochs * steps_per_epoch
    if not 0 <= warmup_steps < total_steps:
        raise InputError(
            f"optimizer.warmup_epochs={optimizer.warmup_epochs} ({warmup_steps:.0f} steps): must "
            f"be 0 or more, and less than the {total_steps} training steps; change it or num_epochs"
        )
    scale = batch_size / optimizer.reference_batch_size
    peak, start = scale * optimizer.learning_rate, scale * optimizer.warmup_start_rate

    def cosine(step: jax.typing.ArrayLike) -> jax.Array:
        return peak * 0.5 * (1 + jnp.cos(jnp.pi * step / total_steps))

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        if not warmup_steps:
            return cosine(step)
        warm = start + (cosine(warmup_steps) - start) * step / warmup_steps
        return jnp.where(step < warmup_steps, warm, cosine(step))

    return schedule


def describe_rate(optimizer: OptimizerConfig, batch_size: int) -> str:
    """Describe the peak learning rate and how it was scaled, for the log."""
    reference = optimizer.reference_batch_size
    rate = optimizer.learning_rate * batch_size / reference
    return (
        f"learning rate {rate:.4g} ({optimizer.learning_rate:.4g} at batch size {reference}, "
        f"scaled by {batch_size}/{reference})"
    )


def frozen_names(
    optimizer: OptimizerConfig, names: Iterable[str], family: Family
) -> frozenset[str]:
    """Return the names of the weights that `optimizer.freeze` excludes from training."""
    if not optimizer.freeze:
        return frozenset()
    return frozenset(name for name in names if not name.startswith(family.head))


def make_optimizer(
    optimizer: OptimizerConfig, schedule: optax.Schedule, family: Family
) -> optax.GradientTransformation:
    """Make AdamW, or SGD with Nesterov momentum and coupled weight decay.

    Coupled means that the decay is added to the gradient and passes through the momentum, as in
    PyTorch's SGD. Gradients are clipped first. The layer-wise learning rates are applied last.

    Args:
        optimizer: The name of the optimizer and its hyperparameters.
        schedule: Function from the step to the learning rate.
        family: The network's family.
    """

    def decays(params: Params) -> dict[str, bool]:
        return {name: _decays(name, optimizer.decay, family) for name in params}

    def scale_layers(updates: Params, params: Params | None = None) -> Params:
        del params
        layers = {name: _layer(name, family) for name in updates}
        top = 1 + max((layer for layer in layers.values() if layer is not None), default=0)
        return {
            name: update * optimizer.layer_decay ** (top - layer) if layer is not None else update
            for (name, update), layer in zip(updates.items(), layers.values(), strict=True)
        }

    chain = []
    if optimizer.clip_norm:
        chain.append(optax.clip_by_global_norm(optimizer.clip_norm))
    if optimizer.name == "sgd":
        chain.append(optax.add_decayed_weights(optimizer.weight_decay, decays))
        chain.append(optax.sgd(schedule, momentum=optimizer.momentum, nesterov=True))
    else:
        betas = {"b1": optimizer.b1, "b2": optimizer.b2}
        chain.append(
            optax.adamw(schedule, **betas, weight_decay=optimizer.weight_decay, mask=decays)
        )
    if optimizer.layer_decay != 1:
        chain.append(optax.stateless(scale_layers))
    return optax.chain(*chain)


def _decays(name: str, grouping: str, family: Family) -> bool:
    if grouping == "released":
        return not (name.startswith(family.head) and name.endswith("bias"))
    return name.rpartition(".")[2] in MATRIX_LEAVES


def _layer(name: str, family: Family) -> int | None:
    """Return 0 for an embedding, i + 1 for a weight of block i, None for later weights."""
    block = family.block_index(name)
    if block is not None:
        return block + 1
    return 0 if family.is_embedding(name) else None
