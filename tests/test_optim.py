"""Schedules and optimisers do what the config says."""

import math

import jax.numpy as jnp
import pytest

from configs import motion
from jaxvid.errors import InputError
from jaxvid.optim import make_optimizer, make_schedule


def test_warm_up_is_linear_and_the_end_is_zero():
    settings = motion.get_config().optimizer
    schedule = make_schedule(settings, batch_size=32, total_steps=1000, steps_per_epoch=125)
    assert schedule(0) == 0
    top = 1e-3 * 0.5 * (1 + math.cos(0.1 * math.pi))  # the cosine's value where it takes over
    assert schedule(50) == pytest.approx(top / 2)
    assert schedule(100) == pytest.approx(top)
    assert schedule(500) == pytest.approx(5e-4)
    assert schedule(1000) == pytest.approx(0, abs=1e-9)


def test_a_warm_up_longer_than_the_training_is_refused():
    settings = motion.get_config().optimizer
    with pytest.raises(InputError, match=r"warmup_epochs=0.8 \(100 steps\) does not fit into 50"):
        make_schedule(settings, batch_size=32, total_steps=50, steps_per_epoch=125)


def test_only_kernels_decay_and_gradients_are_clipped():
    settings = motion.get_config().optimizer
    optimizer = make_optimizer(settings, lambda _: 0.1)
    params = {"a.kernel": jnp.ones(4), "a.bias": jnp.ones(4), "norm.scale": jnp.ones(4)}
    zeros = {name: jnp.zeros(4) for name in params}
    updates, state = optimizer.update(zeros, optimizer.init(params), params)
    assert updates["a.kernel"] == pytest.approx(-0.1 * settings.weight_decay)
    assert not updates["a.bias"].any()
    assert not updates["norm.scale"].any()
    huge = {name: jnp.full(4, 1e6) for name in params}
    _, state = optimizer.update(huge, optimizer.init(params), params)
    clipped = sum((moment**2).sum() for moment in state[1][0].mu.values()) ** 0.5
    assert clipped == pytest.approx((1 - settings.b1) * settings.clip_norm, rel=1e-5)
