"""The device-side functions: the loss, exact masked sums, and that a step learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import xvit_k600
from jaxvid.models import (
    abstract_model,
    build_model,
    make_model_config,
    merge_params,
    split_params,
)
from jaxvid.optim import make_optimizer, make_schedule
from jaxvid.steps import (
    Recipe,
    Teacher,
    best_params,
    cross_entropy,
    divergence,
    eval_step,
    init_state,
    normalize,
    train_step,
)
from tests import goldens
from tests.conftest import QUICK
from tests.test_xvit import config_of as xvit_config

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


def stub_scores(pixels, score="logits"):
    """What `eval_step` gives for `pixels` `(b, v, 3)`, which are what the stub's logits are."""
    graphdef, params = split_params(Stub())
    batch = {"video": np.asarray(pixels, np.uint8)[:, :, None, None, None, :]}
    options = {"graphdef": graphdef, "mean": 0.0, "std": 1.0, "score": score}
    return jax.device_get(jax.jit(functools.partial(eval_step, **options))(params, batch))


def test_eval_step_sums_the_logits_of_the_views():
    """Two weak views outvote a strong one only if their sum is larger."""
    views = [[[255, 0, 0], [0, 102, 0], [0, 102, 0]], [[102, 0, 0], [0, 204, 0], [0, 204, 0]]]
    found = stub_scores(views)
    np.testing.assert_allclose(found["scores"][0], [1.0, 0.8, 0.0, 1.5], rtol=1e-5)
    np.testing.assert_allclose(found["scores"][1], [0.4, 1.6, 0.0, 1.5], rtol=1e-5)
    exp = np.exp(found["scores"] / 3)
    np.testing.assert_allclose(found["probabilities"], exp / exp.sum(1, keepdims=True), rtol=1e-5)


def test_eval_step_averages_probabilities_if_told_so():
    views = [[[255, 0, 0], [0, 102, 0]]]
    found = stub_scores(views, score="probabilities")
    logits = np.array([[1, 0, 0, 0.5], [0, 0.4, 0, 0.5]])
    each = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found["scores"][0], each.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(found["scores"], found["probabilities"])


def make_step(config, optimizer, seed, **options):
    graphdef, _ = abstract_model(config)
    recipe = Recipe(seed=seed, **options)
    step = functools.partial(
        train_step,
        graphdef=graphdef,
        optimizer=optimizer,
        recipe=recipe,
    )
    init = functools.partial(init_state, config, optimizer, recipe, seed=0)
    return jax.jit(init)(), jax.jit(step, compiler_options=QUICK), graphdef


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


def test_the_released_recipe_follows_the_originals_trajectory(monkeypatch):
    """Five steps of XViT's recipe: its schedule, optimiser and loss; mixup's draws are given."""
    golden = goldens.load("tiny/xvit_tiny_train_trajectory")
    model_config = dataclasses.replace(xvit_config(golden), dropout=0.0)
    graphdef, abstract = abstract_model(model_config)
    config = xvit_k600.get_config()
    schedule = make_schedule(
        config.optimizer,
        batch_size=config.batch_size,
        total_steps=round(config.num_epochs * int(golden["steps_per_epoch"])),
        steps_per_epoch=int(golden["steps_per_epoch"]),
    )
    optimizer = make_optimizer(config.optimizer, schedule)
    lams, orders = jnp.float32(golden["lams"]), jnp.asarray(golden["perms"])

    def given_mixup(video, key, alpha):
        # The key is fold_in(seed, step), split: the draws that belong to it are found by its bits.
        bits = jax.random.key_data(key)[None]
        step = (jax.random.key_data(keys) == bits).all(axis=-1).argmax()
        lam, order = lams[step], orders[step]
        return lam * video + (1 - lam) * video[order], order, lam

    monkeypatch.setattr("jaxvid.mixing.mixup", given_mixup)
    key = jax.random.key(config.seed)
    keys = jnp.stack([jax.random.split(jax.random.fold_in(key, i), 3)[2] for i in range(5)])
    recipe = Recipe(
        seed=config.seed,
        mean=0.0,
        std=1 / 255,  # the golden's clips are normalised
        label_smoothing=config.label_smoothing,
        mixup=config.mixup,
    )
    step = jax.jit(
        functools.partial(train_step, graphdef=graphdef, optimizer=optimizer, recipe=recipe)
    )
    params = goldens.params(abstract, int(golden["param_seed"]))
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), int)}
    for i, expected in enumerate(golden["losses"]):
        assert float(schedule(i)) == pytest.approx(float(golden["lrs"][i]), rel=1e-6)
        clips = {"video": golden["clip"][i], "label": golden["labels"][i].astype(np.int32)}
        state, sums = step(state, {**clips, "mask": np.ones(4, bool)})
        assert abs(float(sums["loss"]) / 4 - expected) <= 1e-5, i
    goldens.assert_samples(golden, "final", state["params"])


def batch_of(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "video": rng.integers(0, 255, (count, 8, 32, 32, 3), np.uint8),
        "label": rng.integers(0, 8, count).astype(np.int32),
        "mask": np.arange(count) != 1,
    }


def distance(a, b):
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


@pytest.mark.parametrize("options", [{}, {"mixup": 0.4, "erase": 0.5}, {"cutmix": 1.0}], ids=str)
def test_accumulation_equals_the_large_batch(options):
    config, optimizer = make_model_config("xvit_tiny", **TINY), optax.sgd(0.1, momentum=0.9)
    found = []
    for parts in (1, 4):
        state, step, _ = make_step(config, optimizer, 0, accumulate_steps=parts, **options)
        for i in range(2):
            state, sums = step(state, batch_of(8, i))
        found.append((state["params"], jax.device_get(sums)))
    (whole, expected), (parts, sums) = found
    assert distance(whole, parts) <= 1e-6
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value, rel=1e-5), name
    assert sums["count"] <= 7  # one is masked, and with mixing its partner


def test_averages_follow_the_weights():
    config = make_model_config("xvit_tiny", **TINY)
    state, step, _ = make_step(config, optax.sgd(0.1), 0, ema_decay=0.5)
    average = jax.device_get(state["params"])
    for i in range(8):
        state, _ = step(state, batch_of(4, i))
        keep = min(0.5, (2 + i) / (11 + i))
        average = {k: keep * average[k] + (1 - keep) * v for k, v in state["params"].items()}
    assert distance(average, state["ema"]) <= 1e-6
    assert best_params(state) is state["ema"]
    assert distance(state["params"], state["ema"]) > 1e-4


def test_frozen_weights_stay_and_have_no_moments():
    config = make_model_config("xvit_tiny", **TINY)
    names = abstract_model(config)[1]
    frozen = frozenset(name for name in names if name.startswith("base_model."))
    state, step, _ = make_step(config, optax.adamw(0.1, weight_decay=1.0), 0, frozen=frozen)
    assert not any("base_model" in str(path) for path, _ in tree_paths(state["opt_state"]))
    after, _ = step(state, batch_of(4))
    for name in names:
        same = bool((after["params"][name] == state["params"][name]).all())
        assert same == (name in frozen), name


def tree_paths(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def test_divergence_is_the_formula():
    rng = np.random.default_rng(0)
    logits, wanted, t = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), 2.5

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(1, keepdims=True)

    p, q = softmax(wanted / t), softmax(logits / t)
    expected = t * t * (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(divergence(logits, wanted, t), expected, rtol=1e-4)
    np.testing.assert_allclose(divergence(wanted, wanted, t), 0, atol=1e-5)


def test_a_student_imitates_its_teacher():
    """With all weight on the teacher, labels do not matter, and the divergence falls."""
    config = make_model_config("xvit_tiny", **TINY)
    graphdef, _ = abstract_model(config)
    _, teacher_params = split_params(build_model(config, nnx.Rngs(7)))
    # The teacher wants other pixels: the same video must reach it as its own normalisation gives.
    teacher = Teacher(graphdef=graphdef, mean=0.25, std=0.75, weight=1.0, temperature=2.0)
    recipe, optimizer = Recipe(seed=0), optax.adam(3e-3)
    options = {"graphdef": graphdef, "optimizer": optimizer, "recipe": recipe}
    step = functools.partial(train_step, **options, teacher=teacher)
    step = jax.jit(step, compiler_options=QUICK)
    state, batch = init_state(config, optimizer, recipe, seed=0), batch_of(6)
    wanted = merge_params(graphdef, teacher_params)(normalize(batch["video"], 0.25, 0.75))
    logits = merge_params(graphdef, state["params"])(normalize(batch["video"], 0.5, 0.5))
    expected = divergence(logits, wanted, 2.0)[batch["mask"]].sum()
    losses = []
    for _ in range(60):
        state, sums = step(state, batch, teacher_params)
        losses.append(float(sums["loss"]))
    assert losses[0] == pytest.approx(float(expected), rel=1e-4)
    assert losses[-1] < 0.1 * losses[0]
    other = {**batch, "label": (batch["label"] + 1) % 8}
    assert (
        step(state, other, teacher_params)[1]["loss"]
        == step(state, batch, teacher_params)[1]["loss"]
    )
