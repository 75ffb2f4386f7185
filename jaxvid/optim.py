"""Learning-rate schedules and optimisers from a config."""

import optax

from jaxvid.errors import InputError


def make_schedule(optimizer, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then a half cosine to 0 at `total_steps`.

    Args:
        optimizer: The config's `optimizer`: `learning_rate` (the peak) and `warmup_steps`.
        total_steps: Length of the training.

    Raises:
        InputError: The warm-up does not fit into the training.
    """
    if not 0 <= optimizer.warmup_steps < total_steps:
        raise InputError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} does not fit into {total_steps} "
            "training steps; lower it or raise num_epochs"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
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
