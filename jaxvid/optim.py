"""Learning-rate schedules and optimisers from a config."""

import optax

from jaxvid.errors import InputError


def make_schedule(optimizer, *, total_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Linear warm-up from 0, then a half cosine to 0 at `total_steps`.

    Args:
        optimizer: The config's `optimizer`: `learning_rate` (the peak) and `warmup_epochs`.
        total_steps: Length of the training.
        steps_per_epoch: Length of an epoch; need not be whole.

    Raises:
        InputError: The warm-up does not fit into the training.
    """
    warmup_steps = round(optimizer.warmup_epochs * steps_per_epoch)
    if not 0 <= warmup_steps < total_steps:
        raise InputError(
            f"optimizer.warmup_epochs={optimizer.warmup_epochs} ({warmup_steps} steps) does not "
            f"fit into {total_steps} training steps; lower it or raise num_epochs"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=optimizer.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=total_steps,
    )


def make_optimizer(optimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with clipping by global norm; matrices decay, biases, norms and embeddings do not.

    Args:
        optimizer: The config's `optimizer`: `b1`, `b2`, `weight_decay`, `clip_norm`.
        schedule: Learning rate by step.
    """

    def decays(params):
        return {name: name.endswith(".kernel") for name in params}

    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(
            schedule,
            b1=optimizer.b1,
            b2=optimizer.b2,
            weight_decay=optimizer.weight_decay,
            mask=decays,
        ),
    )
