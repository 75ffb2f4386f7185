"""Learning-rate schedules and optimisers from a config."""

from collections.abc import Iterable

import jax.numpy as jnp
import optax

from jaxvid.errors import InputError
from jaxvid.models.family import MATRIX_LEAVES, Family

OPTIONS = {"name": ("adamw", "sgd"), "decay": ("kernels", "released"), "freeze": ("", "backbone")}


def check_optimizer(optimizer) -> None:
    """Refuses a config's `optimizer` that has an impossible value.

    Raises:
        InputError: Names the field, its value and what is possible.
    """
    for name, valid in OPTIONS.items():
        if optimizer[name] not in valid:
            known = ", ".join(map(repr, valid))
            raise InputError(f"optimizer.{name}={optimizer[name]!r}: there are {known}")
    for name in ("learning_rate", "reference_batch_size", "layer_decay"):
        if optimizer[name] <= 0:
            raise InputError(f"optimizer.{name}={optimizer[name]}: must be above 0")
    for name in ("warmup_start_rate", "weight_decay", "clip_norm"):
        if optimizer[name] < 0:
            raise InputError(f"optimizer.{name}={optimizer[name]}: must not be below 0")


def make_schedule(
    optimizer, *, batch_size: int, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """A half cosine from the peak to 0 over all steps, whose beginning is a linear warm-up.

    The warm-up ends at the cosine's value there, as in the recipes of arXiv:2106.05968. Rates are
    the config's times `batch_size / reference_batch_size` (Goyal et al., arXiv:1706.02677).

    Args:
        optimizer: The config's `optimizer`: `learning_rate`, `warmup_start_rate`, `warmup_epochs`,
            `reference_batch_size`.
        batch_size: Clips of a step.
        total_steps: Length of the training.
        steps_per_epoch: Length of an epoch; need not be whole.

    Raises:
        InputError: The warm-up does not fit into the training.
    """
    warmup_steps = optimizer.warmup_epochs * steps_per_epoch
    if not 0 <= warmup_steps < total_steps:
        raise InputError(
            f"optimizer.warmup_epochs={optimizer.warmup_epochs} ({warmup_steps:.0f} steps) does "
            f"not fit into {total_steps} training steps; lower it or raise num_epochs"
        )
    scale = batch_size / optimizer.reference_batch_size
    peak, start = scale * optimizer.learning_rate, scale * optimizer.warmup_start_rate

    def cosine(step):
        return peak * 0.5 * (1 + jnp.cos(jnp.pi * step / total_steps))

    def schedule(step):
        if not warmup_steps:
            return cosine(step)
        warm = start + (cosine(warmup_steps) - start) * step / warmup_steps
        return jnp.where(step < warmup_steps, warm, cosine(step))

    return schedule


def describe_rate(optimizer, batch_size: int) -> str:
    """The peak learning rate in use, and why: for the log."""
    reference = optimizer.reference_batch_size
    rate = optimizer.learning_rate * batch_size / reference
    return (
        f"learning rate {rate:.4g}: {optimizer.learning_rate:.4g} at a batch of {reference}, "
        f"times {batch_size}/{reference}"
    )


def frozen_names(optimizer, names: Iterable[str], family: Family) -> frozenset[str]:
    """Return the weights that `optimizer.freeze` excludes from training."""
    if not optimizer.freeze:
        return frozenset()
    return frozenset(name for name in names if not name.startswith(family.head))


def make_optimizer(
    optimizer, schedule: optax.Schedule, family: Family
) -> optax.GradientTransformation:
    """AdamW, or SGD with Nesterov's momentum and coupled weight decay.

    Coupled: the decay is added to the gradient and passes through the momentum, as in PyTorch's
    SGD. Gradients are clipped before that; layers' learning rates are scaled after it.

    Args:
        optimizer: The config's `optimizer`.
        schedule: Learning rate by step.
        family: The network's family.
    """

    def decays(params):
        return {name: _decays(name, optimizer.decay, family) for name in params}

    def scale_layers(updates, params=None):
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
    """Return 0 for an embedding, i + 1 for a weight of block i, None for all above the blocks."""
    block = family.block_index(name)
    if block is not None:
        return block + 1
    return 0 if family.is_embedding(name) else None
