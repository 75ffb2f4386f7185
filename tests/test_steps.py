"""The device-side functions: the loss, exact masked sums, and that a step learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxvid.models import abstract_model, make_model_config, merge_params, split_params
from jaxvid.steps import Recipe, cross_entropy, eval_step, init_state, normalize, train_step

TINY = {"width": 16, "depth": 1, "image_size": 32}


class Stub(nnx.Module):
    """A network whose logits are the first pixel's channels and a constant: known in advance."""

    def __init__(self):
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, video, *, key=None):
        pixel = video[:, 0, 0, 0]  # (b c)
        return jnp.concatenate([pixel, jnp.full((len(video), 1), 0.5)], axis=1) + self.bias[...]


def test_cross_entropy_is_the_recipes_formula():
    logits = np.random.default_rng(0).normal(size=(4, 5))
    labels, smoothing = np.array([0, 4, 2, 2]), 0.3
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -(1 - smoothing) * log_p[range(4), labels] - smoothing * log_p.mean(1)
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing=smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_normalize():
    video = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 1, 3)
    np.testing.assert_allclose(normalize(video, 0.5, 0.5).ravel(), [-1, 1, -0.6], rtol=1e-6)


def stub_sums(pixels, labels, mask):
    """`pixels` `(b, v, 3)`: what the stub's logits are."""
    graphdef, params = split_params(Stub())
    batch = {
        "video": np.asarray(pixels, np.uint8)[:, :, None, None, None, :],
        "label": np.asarray(labels, np.int32),
        "mask": np.asarray(mask),
    }
    return jax.jit(functools.partial(eval_step, graphdef=graphdef, mean=0.0, std=1.0))(
        params, batch
    )


def test_eval_step_counts_what_is_known_and_nothing_that_is_masked():
    pixels = [[[255, 0, 0]], [[0, 255, 0]], [[0, 0, 0]], [[255, 0, 0]], [[255, 0, 0]]]
    sums = stub_sums(pixels, [0, 0, 3, 1, 0], [True, True, True, True, False])
    assert int(sums["count"]) == 4
    assert int(sums["top1"]) == 2  # the first, and the third (its constant wins)
    assert int(sums["top5"]) == 4  # four classes: k is 4
    expected = np.zeros((4, 4), int)
    expected[0, 0] = expected[0, 1] = expected[3, 3] = expected[1, 0] = 1
    np.testing.assert_array_equal(sums["confusion"], expected)


def test_views_add_their_logits():
    """Two weak views outvote a strong one only if their sum is larger."""
    views = [[[200, 0, 0], [0, 110, 0], [0, 110, 0]], [[230, 0, 0], [0, 110, 0], [0, 110, 0]]]
    sums = stub_sums(views, [1, 0], [True, True])
    assert int(sums["top1"]) == 0  # the constant 3 · 0.5 beats both sums
    brighter = [[[100, 0, 0], [0, 210, 0], [0, 210, 0]], [[255, 0, 0], [250, 110, 0], [0, 110, 0]]]
    assert int(stub_sums(brighter, [1, 0], [True, True])["top1"]) == 2


def make_step(config, optimizer, seed):
    graphdef, _ = abstract_model(config)
    recipe = Recipe(seed=seed)
    step = functools.partial(
        train_step,
        graphdef=graphdef,
        optimizer=optimizer,
        recipe=recipe,
    )
    init = functools.partial(init_state, config, optimizer, recipe, seed=0)
    return jax.jit(init)(), jax.jit(step), graphdef


def test_train_step_learns_a_batch_and_leaves_metrics_as_sums():
    rng = np.random.default_rng(0)
    batch = {
        "video": rng.integers(0, 255, (8, 8, 32, 32, 3), np.uint8),
        "label": np.arange(8, dtype=np.int32),
        "mask": np.ones(8, bool),
    }
    config = make_model_config("xvit_tiny", **TINY)
    state, step, graphdef = make_step(config, optax.adam(3e-3), seed=0)

    @jax.jit
    def first_losses(params):
        logits = merge_params(graphdef, params)(normalize(batch["video"], 0.5, 0.5))
        return cross_entropy(logits, batch["label"], smoothing=0.0)

    expected, metrics = first_losses(state["params"]).sum(), []
    for _ in range(80):
        state, sums = step(state, batch)
        metrics.append(jax.device_get(sums))
    assert int(state["step"]) == 80
    assert metrics[0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics[0]["count"] == 8
    assert metrics[0]["grad_norm"] > 0
    assert metrics[-1]["loss"] < 0.1 * metrics[0]["loss"]
    assert metrics[-1]["top1"] == 8


def test_dropout_keys_follow_seed_and_step():
    config = make_model_config("xvit_tiny", **TINY, dropout=0.5)
    batch = {
        "video": np.zeros((8, 8, 32, 32, 3), np.uint8),
        "label": np.zeros(8, np.int32),
        "mask": np.ones(8, bool),
    }

    def losses(seed):
        # A learning rate of 0 leaves the weights as they are: only the key changes.
        state, step, _ = make_step(config, optax.sgd(0.0), seed)
        out = []
        for _ in range(2):
            state, sums = step(state, batch)
            out.append(float(sums["loss"]))
        return out

    assert losses(0) == losses(0)
    assert len({*losses(0), *losses(1)}) == 4
