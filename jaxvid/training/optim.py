"""Learning-rate schedules and optimisers from a config."""

import re
from collections.abc import Iterable

import jax.numpy as jnp
import optax

from jaxvid.errors import InputError
from jaxvid.models.transfer import HEADS

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

    The warm-up ends at the cosine's value there, as in the released XViT recipes. Rates are the
    config's times `batch_size / reference_batch_size` (Goyal et al., arXiv:1706.02677).

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


def frozen_names(optimizer, names: Iterable[str]) -> frozenset[str]:
    """The weights that a config's `optimizer.freeze` keeps as they are."""
    if not optimizer.freeze:
        return frozenset()
    return frozenset(name for name in names if not name.startswith(HEADS))


def make_optimizer(optimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW, or SGD with Nesterov's momentum and coupled weight decay.

    Coupled: the decay is added to the gradient and passes through the momentum, as in PyTorch's
    SGD. Gradients are clipped before that; layers' learning rates are scaled after it.

    Args:
        optimizer: The config's `optimizer`.
        schedule: Learning rate by step.
    """

    def decays(params):
        return {name: _decays(name, optimizer.decay) for name in params}

    def scale_layers(updates, params=None):
        del params
        top = 2 + max(map(_block, updates), default=-1)
        return {
            name: update * optimizer.layer_decay ** (top - _layer(name, top))
            for name, update in updates.items()
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


def _decays(name: str, grouping: str) -> bool:
    if grouping == "released":
        return not (name.startswith(HEADS) and name.endswith("bias"))
    return name.endswith((".kernel", ".in_proj_weight"))


def _block(name: str) -> int:
    """The image ViT's block that a weight belongs to; -1: none."""
    found = re.match(r"(?:base_model\.)?blocks\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _layer(name: str, top: int) -> int:
    """0: the embeddings below the first block; i + 1: block i; `top`: all above the last."""
    if (block := _block(name)) >= 0:
        return block + 1
    stem = name.removeprefix("base_model.")
    embeds = ("patch_embed.", "cls_token", "pos_embed", "temp_embed")
    return 0 if stem.startswith(embeds) else top
