"""Learning-rate schedules and optimizers."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, motion, xvit_k600, xvit_ssv2
from jaxvid.errors import InputError
from jaxvid.models import FAMILIES, abstract_model, make_model_config
from jaxvid.training.optim import (
    OptimizerConfig,
    describe_rate,
    frozen_names,
    make_optimizer,
    make_schedule,
)
from tests import goldens

MOTION = OptimizerConfig(**motion.get_config().optimizer)


def test_default_options_equal_those_of_the_configs():
    defaults = {field.name: field.default for field in dataclasses.fields(OptimizerConfig)}
    config = common.default_config("xvit_tiny").optimizer
    assert defaults == config.to_dict()
    assert {name: type(value) for name, value in defaults.items()} == {
        field.name: field.type for field in dataclasses.fields(OptimizerConfig)
    }


def test_warm_up_is_linear_and_the_final_rate_is_zero():
    settings = MOTION
    schedule = make_schedule(settings, batch_size=32, total_steps=1000, steps_per_epoch=125)
    assert schedule(0) == 0
    top = 1e-3 * 0.5 * (1 + math.cos(0.1 * math.pi))  # the cosine at the end of the warm-up
    assert schedule(50) == pytest.approx(top / 2)
    assert schedule(100) == pytest.approx(top)
    assert schedule(500) == pytest.approx(5e-4)
    assert schedule(1000) == pytest.approx(0, abs=1e-9)


def test_a_warm_up_longer_than_training_is_refused():
    settings = MOTION
    with pytest.raises(
        InputError, match=r"0.8 \(100 steps\): must be 0 or more, and less than the 50"
    ):
        make_schedule(settings, batch_size=32, total_steps=50, steps_per_epoch=125)
    with pytest.raises(InputError, match="less than the 100 training steps"):
        make_schedule(settings, batch_size=32, total_steps=100, steps_per_epoch=125)


def test_without_a_warm_up_the_rate_starts_at_the_peak():
    settings = dataclasses.replace(MOTION, warmup_epochs=0.0)
    schedule = make_schedule(settings, batch_size=32, total_steps=100, steps_per_epoch=10)
    rates = [float(schedule(step)) for step in (0, 50, 100)]
    assert rates == pytest.approx([1e-3, 5e-4, 0], abs=1e-9)


def test_only_kernels_decay_and_gradients_are_clipped():
    settings = MOTION
    optimizer = make_optimizer(settings, lambda _: 0.1, FAMILIES["xvit"])
    names = ("blocks.0.a.kernel", "a.in_proj_weight", "a.bias", "norm.scale")
    params = {name: jnp.ones(4) for name in names}
    zeros = {name: jnp.zeros(4) for name in params}
    updates, state = optimizer.update(zeros, optimizer.init(params), params)
    assert updates["blocks.0.a.kernel"] == pytest.approx(-0.1 * settings.weight_decay)
    assert updates["a.in_proj_weight"] == pytest.approx(-0.1 * settings.weight_decay)
    assert not updates["a.bias"].any()
    assert not updates["norm.scale"].any()
    huge = {name: jnp.full(4, 1e6) for name in params}
    _, state = optimizer.update(huge, optimizer.init(params), params)
    clipped = sum((moment**2).sum() for moment in state[1][0].mu.values()) ** 0.5
    assert clipped == pytest.approx((1 - settings.b1) * settings.clip_norm, rel=1e-5)


def test_adamw_follows_the_formula():
    changed = {"b1": 0.5, "b2": 0.75, "clip_norm": 0.0, "weight_decay": 0.2}
    settings = dataclasses.replace(MOTION, **changed)
    optimizer = make_optimizer(settings, lambda _: 0.1, FAMILIES["xvit"])
    params, m, v = {"a.kernel": jnp.full(2, 3.0)}, 0.0, 0.0
    state = optimizer.init(params)
    for step, gradient in enumerate((1.0, -4.0), 1):
        updates, state = optimizer.update({"a.kernel": jnp.full(2, gradient)}, state, params)
        m, v = 0.5 * m + 0.5 * gradient, 0.75 * v + 0.25 * gradient**2
        corrected = m / (1 - 0.5**step) / math.sqrt(v / (1 - 0.75**step))
        np.testing.assert_allclose(updates["a.kernel"], -0.1 * (corrected + 0.2 * 3), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Kinetics/xvit_B16_16x16_k600", xvit_k600.get_config()),
        ("SSv2/xvit_B16_16x16", xvit_ssv2.get_config()),
    ],
)
def test_released_schedules_equal_the_originals(name, config):
    path = goldens.FOLDER / "data/sampling_and_schedule.json"
    points = json.loads(path.read_text())["learning_rate"][name]
    per_epoch = 1000
    schedule = make_schedule(
        OptimizerConfig(**config.optimizer),
        batch_size=config.batch_size,
        total_steps=round(config.num_epochs * per_epoch),
        steps_per_epoch=per_epoch,
    )
    with jax.enable_x64(True):
        for epoch, rate in points:
            actual = float(schedule(jnp.float64(epoch * per_epoch)))
            assert actual == pytest.approx(rate, rel=1e-6, abs=1e-12), epoch


def test_learning_rates_are_scaled_by_the_batch_size():
    optimizer = OptimizerConfig(**xvit_k600.get_config().optimizer)
    settings = {"total_steps": 3000, "steps_per_epoch": 100}
    full_batch = make_schedule(optimizer, batch_size=64, **settings)
    half_batch = make_schedule(optimizer, batch_size=32, **settings)
    for step in (0, 200, 1500):
        assert float(half_batch(step)) == pytest.approx(float(full_batch(step)) / 2)
    expected = "learning rate 0.015 (0.03 at batch size 64, scaled by 32/64)"
    assert describe_rate(optimizer, 32) == expected


def test_sgd_has_coupled_weight_decay_except_for_biases_of_heads():
    """The decay is added to the gradient before Nesterov momentum; one step is checked."""
    settings = OptimizerConfig(**xvit_k600.get_config().optimizer)
    params = {name: jnp.full(3, 2.0) for name in ("consensus.a.bias", "base_model.a.bias", "x.k")}
    grads = {name: jnp.ones(3) for name in params}
    optimizer = make_optimizer(settings, lambda _: 0.1, FAMILIES["xvit"])
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    decayed = 1 + settings.weight_decay * 2.0
    for name, gradient in {"consensus.a.bias": 1.0, "base_model.a.bias": decayed}.items():
        expected = -0.1 * (gradient + 0.9 * gradient)
        np.testing.assert_allclose(updates[name], expected, rtol=1e-6)


def test_freezing_the_backbone_never_freezes_the_classifier():
    settings = dataclasses.replace(MOTION, freeze="backbone")
    for name, options in (("xvit_tiny", {"head": "mean"}), ("stam_16", {"aggregator": "mean"})):
        family = FAMILIES[name.partition("_")[0]]
        _, params = abstract_model(make_model_config(name, width=16, heads=2, depth=2, **options))
        trained = {*params} - frozen_names(settings, params, family)
        assert len(trained) == 2, name  # kernel and bias of the classifier
        assert not any("blocks" in key for key in trained)


@pytest.mark.parametrize("name", ["xvit_tiny", "stam_16"])
def test_layer_decay_and_freezing_by_block(name):
    changed = {"weight_decay": 0.0, "clip_norm": 0.0, "layer_decay": 0.5, "momentum": 0.0}
    settings = dataclasses.replace(MOTION, name="sgd", **changed)
    _, abstract = abstract_model(make_model_config(name, width=16, heads=2, depth=2))
    params = {key: jnp.ones(()) for key in abstract}
    family = FAMILIES[name.partition("_")[0]]
    optimizer = make_optimizer(settings, lambda _: 1.0, family)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    prefix = "base_model." if name == "xvit_tiny" else ""
    head = "consensus.mlp_head.4.kernel" if prefix else "head.kernel"
    scales = {
        "patch_embed.proj.kernel": 0.125,
        "cls_token": 0.125,
        "pos_embed": 0.125,
        "blocks.0.norm1.scale": 0.25,
        "blocks.1.attn.qkv.kernel": 0.5,
        "norm.scale": 1.0,
    }
    for key, scale in {**{prefix + key: value for key, value in scales.items()}, head: 1.0}.items():
        assert -updates[key] == pytest.approx(scale), key
    assert (prefix + "temp_embed" in updates) == (name == "xvit_tiny")
    if name == "xvit_tiny":
        assert -updates["base_model.temp_embed"] == pytest.approx(0.125)
    settings = dataclasses.replace(settings, freeze="backbone")
    frozen = frozen_names(settings, params, family)
    assert prefix + "pos_embed" in frozen
    assert head not in frozen
    assert len(frozen) == sum(
        not key.startswith(("consensus", "aggregate", "head")) for key in params
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "lion", "optimizer.name='lion': must be one of 'adamw', 'sgd'"),
        ("decay", "all", "optimizer.decay='all': must be one of 'kernels', 'released'"),
        ("freeze", "head", "optimizer.freeze='head': must be one of '', 'backbone'"),
        ("learning_rate", 0.0, "optimizer.learning_rate=0.0: must be above 0"),
        ("layer_decay", -1.0, "optimizer.layer_decay=-1.0: must be above 0"),
        ("clip_norm", -1.0, "optimizer.clip_norm=-1.0: must not be below 0"),
    ],
)
def test_invalid_values_are_refused(field, value, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(MOTION, **{field: value})
