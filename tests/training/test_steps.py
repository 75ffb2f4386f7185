"""The training and evaluation steps on the device."""

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
    FAMILIES,
    abstract_model,
    build_model,
    make_model_config,
    merge_params,
    split_params,
)
from jaxvid.storage.eval_step import eval_step
from jaxvid.storage.preprocessing import normalize
from jaxvid.training import steps
from jaxvid.training.optim import make_optimizer, make_schedule
from jaxvid.training.steps import (
    Recipe,
    Teacher,
    cross_entropy,
    distillation_loss,
    eval_params,
    init_state,
    train_step,
)
from tests import goldens
from tests.models.test_xvit import config_of as xvit_config

TINY = {"width": 16, "depth": 1, "image_size": 32}


class Stub(nnx.Module):
    """A network whose logits are the first pixel's channels and a constant: known in advance."""

    def __init__(self):
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, video, *, key=None):
        pixel = video[:, 0, 0, 0]  # (b c)
        return jnp.concatenate([pixel, jnp.full((len(video), 1), 0.5)], axis=1) + self.bias[...]


def test_cross_entropy_follows_the_formula():
    logits = np.random.default_rng(0).normal(size=(4, 5))
    labels, smoothing = np.array([0, 4, 2, 2]), 0.3
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -(1 - smoothing) * log_p[range(4), labels] - smoothing * log_p.mean(1)
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing=smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_normalize():
    video = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 1, 3)
    np.testing.assert_allclose(normalize(video, 0.5, 0.5).ravel(), [-1, 1, -0.6], rtol=1e-6)
    fine = np.array([0, 255 * 256, 51 * 256 + 128], np.uint16)  # in units of 1/256 grey level
    expected = [-1, 1, (51.5 / 255 - 0.5) / 0.5]
    np.testing.assert_allclose(normalize(fine, 0.5, 0.5), expected, rtol=1e-6)


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


def test_eval_step_averages_probabilities():
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
    return jax.jit(init)(), jax.jit(step), graphdef


def test_train_step_fits_a_batch_and_returns_sums():
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


def test_the_released_recipe_reproduces_the_original_training(monkeypatch):
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
    optimizer = make_optimizer(config.optimizer, schedule, FAMILIES["xvit"])
    lams, orders = jnp.float32(golden["lams"]), jnp.asarray(golden["perms"])

    def given_mixup(video, key, alpha):
        # The key is fold_in(seed, step), split: the draws that belong to it are found by its bits.
        bits = jax.random.key_data(key)[None]
        step = (jax.random.key_data(keys) == bits).all(axis=-1).argmax()
        lam, order = lams[step], orders[step]
        return lam * video + (1 - lam) * video[order], order, lam

    monkeypatch.setattr("jaxvid.training.batch_augmentation.mixup", given_mixup)
    key = jax.random.key(config.seed)
    keys = jnp.stack([jax.random.split(jax.random.fold_in(key, i), 3)[2] for i in range(5)])
    recipe = Recipe(
        seed=config.seed,
        mean=0.0,
        std=1 / 255,  # the golden's clips are normalised
        label_smoothing=config.label_smoothing,
        mixup_alpha=config.mixup_alpha,
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


@pytest.mark.parametrize(
    "options", [{}, {"mixup_alpha": 0.4, "erase_prob": 0.5}, {"cutmix_alpha": 1.0}], ids=str
)
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


def test_ema_follows_the_weights():
    config = make_model_config("xvit_tiny", **TINY)
    state, step, _ = make_step(config, optax.sgd(0.1), 0, ema_decay=0.5)
    average = jax.device_get(state["params"])
    for i in range(8):
        state, _ = step(state, batch_of(4, i))
        keep = min(0.5, (2 + i) / (11 + i))
        average = {k: keep * average[k] + (1 - keep) * v for k, v in state["params"].items()}
    assert distance(average, state["ema"]) <= 1e-6
    assert eval_params(state) is state["ema"]
    assert distance(state["params"], state["ema"]) > 1e-4


def test_frozen_weights_are_constant_and_have_no_moments():
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


def test_distillation_loss_follows_the_formula():
    rng = np.random.default_rng(0)
    logits, wanted, t = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), 2.5

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(1, keepdims=True)

    p, q = softmax(wanted / t), softmax(logits / t)
    expected = t * t * (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(distillation_loss(logits, wanted, t), expected, rtol=1e-4)
    np.testing.assert_allclose(distillation_loss(wanted, wanted, t), 0, atol=1e-5)


def test_distillation_loss_falls():
    """With all weight on the teacher, labels do not matter, and the divergence falls."""
    config = make_model_config("xvit_tiny", **TINY)
    graphdef, _ = abstract_model(config)
    _, teacher_params = split_params(build_model(config, nnx.Rngs(7)))
    # The teacher wants other pixels: the same video must reach it as its own normalisation gives.
    teacher = Teacher(graphdef=graphdef, mean=0.25, std=0.75, weight=1.0, temperature=2.0)
    recipe, optimizer = Recipe(seed=0), optax.adam(3e-3)
    options = {"graphdef": graphdef, "optimizer": optimizer, "recipe": recipe}
    step = functools.partial(train_step, **options, teacher=teacher)
    step = jax.jit(step)
    state, batch = init_state(config, optimizer, recipe, seed=0), batch_of(6)
    wanted = merge_params(graphdef, teacher_params)(normalize(batch["video"], 0.25, 0.75))
    logits = merge_params(graphdef, state["params"])(normalize(batch["video"], 0.5, 0.5))
    expected = distillation_loss(logits, wanted, 2.0)[batch["mask"]].sum()
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


class Linear(nnx.Module):
    """A network that NumPy can repeat: the mean colour times a kernel, scaled by a draw."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(rngs.normal((3, 4)))
        self.bias = nnx.Param(rngs.normal((4,)))

    def __call__(self, video, *, key=None):
        scale = 1.0 if key is None else 0.5 + jax.random.uniform(key)
        return (
            scale * video.mean(axis=(1, 2, 3)) @ self.kernel[...] + self.bias[None]
        )  # (b classes)


def linear_batch(count=5, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "video": rng.integers(0, 256, (count, 2, 3, 3, 3), np.uint8),
        "label": np.array([0, 3, 1, 1, 2, 0])[:count].astype(np.int32),
        "mask": np.array([True, False, True, True, True, True])[:count],
    }


def softmax(x):
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def linear_step(state, batch, recipe, optimizer=None, **options):
    """One step of `Linear` on the host: the new state and its metrics."""
    graphdef, _ = split_params(Linear(nnx.Rngs(0)))
    optimizer = optimizer or optax.sgd(0.1)
    step = functools.partial(
        train_step, graphdef=graphdef, optimizer=optimizer, recipe=recipe, **options
    )
    return jax.device_get(step(state, batch))


def linear_state(recipe, optimizer=None, seed=0):
    _, params = split_params(Linear(nnx.Rngs(seed)))
    opt_state = (optimizer or optax.sgd(0.1)).init(recipe.trainable(params))
    state = {"params": params, "opt_state": opt_state, "step": jnp.int32(6)}
    return {**state, "ema": params} if recipe.ema_decay else state


def linear_logits(params, video, scale=1.0):
    pixels = scale * np.asarray(video, np.float64).mean(axis=(1, 2, 3))
    return pixels, pixels @ np.asarray(params["kernel"]) + np.asarray(params["bias"])


def keys_of(seed, step):
    """The keys of a step that draws: of the network, of erasing, of mixing."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)


def check_step(found, state, batch, targets, video, *, scale, rate=0.1, smoothing=0.0):
    """Compares a step with the gradient of the mean loss over the clips that are not masked."""
    new_state, metrics = found
    pixels, logits = linear_logits(state["params"], video, scale)
    targets = (1 - smoothing) * targets + smoothing / 4
    mask = batch["mask"][:, None]
    losses = -(mask * targets * np.log(softmax(logits))).sum()
    error = mask * (softmax(logits) - targets) / max(mask.sum(), 1)
    grads = {"kernel": pixels.T @ error, "bias": error.sum(axis=0)}
    for name, grad in grads.items():
        expected = state["params"][name] - rate * grad
        np.testing.assert_allclose(new_state["params"][name], expected, rtol=1e-5, atol=1e-6)
    assert metrics.keys() == {"loss", "top1", "count", "grad_norm"}
    assert metrics["loss"] == pytest.approx(losses, rel=1e-5)
    assert metrics["count"] == mask.sum()
    assert metrics["top1"] == ((logits.argmax(1) == batch["label"]) & batch["mask"]).sum()
    norm = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert new_state["step"] == 7


def test_a_linear_step_is_the_masked_mean_gradient():
    for smoothing, options in ((0.0, {}), (0.3, {"label_smoothing": 0.3, "mean": 0.2, "std": 0.4})):
        recipe, batch = Recipe(seed=3, **options), linear_batch()
        if smoothing:
            batch["mask"][:4] = False  # one clip is left
        key = jax.random.fold_in(jax.random.key(3), 6)
        scale = 0.5 + float(jax.random.uniform(key))
        video = (batch["video"] / 255 - recipe.mean) / recipe.std
        state = linear_state(recipe)
        found = linear_step(state, batch, recipe)
        assert found[0].keys() == {"params", "opt_state", "step"}
        arguments = (found, state, batch, np.eye(4)[batch["label"]], video)
        check_step(*arguments, scale=scale, smoothing=smoothing)
    assert (recipe.trainable({"a": 1}), Recipe(seed=0).mean, Recipe(seed=0).std) == (
        {"a": 1},
        0.5,
        0.5,
    )


def test_a_linear_step_on_masked_clips_changes_nothing():
    recipe, batch = Recipe(seed=0), linear_batch()
    batch["mask"] = np.zeros(5, bool)
    state = linear_state(recipe)
    new_state, metrics = linear_step(state, batch, recipe)
    assert metrics == {"loss": 0, "top1": 0, "count": 0, "grad_norm": 0}
    assert distance(new_state["params"], state["params"]) == 0


@pytest.mark.parametrize(
    ("kind", "erased"), [("mixup", 0.25), ("cutmix", 0.0), ("mixup", 0.0), ("", 0.25)]
)
def test_a_linear_step_mixes_labels_and_masks_partners_of_masked_clips(kind, erased, monkeypatch):
    """Of 5 clips, the second is missing; the first is mixed with it, and so it does not count."""
    order, share, calls = np.array([1, 2, 3, 0, 4]), 0.3, []
    batch = linear_batch()

    def mix(video, key, alpha):
        calls.append((jax.random.key_data(key).tolist(), alpha))
        return share * video + (1 - share) * video[order], jnp.asarray(order), jnp.float32(share)

    def erase(video, key, probability):
        calls.append((jax.random.key_data(key).tolist(), probability))
        return video + 1

    for name in ("mixup", "cutmix"):
        monkeypatch.setattr(
            f"jaxvid.training.batch_augmentation.{name}", mix if name == kind else None
        )
    monkeypatch.setattr("jaxvid.training.batch_augmentation.erase", erase)
    options = {f"{kind}_alpha": 0.4} if kind else {}
    recipe = Recipe(seed=3, erase_prob=erased, label_smoothing=0.1, **options)
    state = linear_state(recipe)
    found = linear_step(state, batch, recipe)
    keys = keys_of(3, 6)
    expected = [(keys[1], erased)] * bool(erased) + [(keys[2], 0.4)] * bool(kind)
    assert calls == [(jax.random.key_data(key).tolist(), value) for key, value in expected]
    video, targets = (batch["video"] / 255 - 0.5) / 0.5 + bool(erased), np.eye(4)[batch["label"]]
    if kind:
        video = share * video + (1 - share) * video[order]
        targets = share * targets + (1 - share) * targets[order]
        batch["mask"] = np.array([False, False, True, True, True])
    scale = 0.5 + float(jax.random.uniform(keys[0]))
    check_step(found, state, batch, targets, video, scale=scale, smoothing=0.1)


def test_a_linear_step_updates_the_ema_with_warm_up():
    recipe = Recipe(seed=0, ema_decay=0.5)
    state = linear_state(recipe)
    for step in (7, 8, 9):  # (1 + 8) / (10 + 8) is one half
        new_state, _ = linear_step(state, linear_batch(seed=step), recipe, optax.sgd(1.0))
        keep = min(0.5, (1 + step) / (10 + step))
        for name, leaf in new_state["params"].items():
            expected = keep * np.asarray(state["ema"][name]) + (1 - keep) * leaf
            np.testing.assert_allclose(new_state["ema"][name], expected, rtol=1e-6)
        state = new_state
        assert eval_params(state) is state["ema"]
    assert eval_params({"params": "weights"}) == "weights"


def test_a_linear_step_does_not_change_frozen_weights():
    recipe = Recipe(seed=0, frozen=frozenset({"bias"}))
    optimizer = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1, momentum=0.9))
    state = linear_state(recipe, optimizer)
    new_state, metrics = linear_step(state, linear_batch(), recipe, optimizer)
    np.testing.assert_array_equal(new_state["params"]["bias"], state["params"]["bias"])
    assert (new_state["params"]["kernel"] != state["params"]["kernel"]).any()
    momentum = new_state["opt_state"][1][0].trace
    assert momentum.keys() == {"kernel"}
    grad = momentum["kernel"] - 0.5 * state["params"]["kernel"]
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(grad), rel=1e-5)


def test_a_linear_step_weights_the_losses_of_labels_and_teacher():
    """The teacher gets the same clips in its own normalisation."""
    teacher_graph, teacher_params = split_params(Linear(nnx.Rngs(9)))
    teacher = Teacher(graphdef=teacher_graph, mean=0.2, std=0.3, weight=0.7, temperature=2.0)
    recipe, batch = Recipe(seed=1, mean=0.4, std=0.6), linear_batch()
    state = linear_state(recipe)
    _, metrics = linear_step(state, batch, recipe, teacher=teacher, teacher_params=teacher_params)
    scale = 0.5 + float(jax.random.uniform(jax.random.fold_in(jax.random.key(1), 6)))
    pixels = batch["video"] / 255
    _, logits = linear_logits(state["params"], (pixels - 0.4) / 0.6, scale)
    _, wanted = linear_logits(teacher_params, (pixels - 0.2) / 0.3)
    labels = -np.log(softmax(logits))[range(5), batch["label"]]
    p, q = softmax(wanted / 2), softmax(logits / 2)
    imitation = 4 * (p * np.log(p / q)).sum(axis=1)
    expected = ((0.3 * labels + 0.7 * imitation) * batch["mask"]).sum()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_accumulation_spreads_each_part_over_the_batch():
    def grad_fn(params, clips, key):
        return {"product": params * jnp.prod(clips["x"]), "draw": jax.random.uniform(key)}

    clips, key = {"x": jnp.arange(1.0, 7.0), "y": jnp.zeros((6, 2))}, jax.random.key(4)
    found = steps._accumulate(grad_fn, jnp.float32(10), clips, key, 2)
    assert found["product"] == 10 * (1 * 3 * 5 + 2 * 4 * 6)
    draws = sum(float(jax.random.uniform(k)) for k in jax.random.split(key, 2))
    assert float(found["draw"]) == pytest.approx(draws)
    whole = steps._accumulate(grad_fn, jnp.float32(10), clips, key, 1)
    assert whole["product"] == 7200
    assert whole["draw"] == jax.random.uniform(key)


def test_a_linear_step_in_parts_equals_the_whole(monkeypatch):
    monkeypatch.setattr(Linear, "__call__", lambda self, video, key: linear_of(self, video))
    found = []
    for parts in (1, 3):
        recipe = Recipe(seed=0, accumulate_steps=parts)
        found.append(linear_step(linear_state(recipe), linear_batch(6), recipe))
    (whole, expected), (parts, sums) = found
    assert distance(whole["params"], parts["params"]) <= 1e-6
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value, rel=1e-5), name
        assert sums[name].dtype == value.dtype, name


def linear_of(model, video):
    return video.mean(axis=(1, 2, 3)) @ model.kernel[...] + model.bias[None]


def test_a_fresh_state_has_moments_of_trained_weights_only(monkeypatch):
    monkeypatch.setattr("jaxvid.training.steps.build_model", lambda config, rngs: config(rngs))
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = init_state(Linear, optimizer, Recipe(seed=0), seed=5)
    assert state.keys() == {"params", "opt_state", "step"}
    assert (state["step"].dtype, state["step"]) == (jnp.int32, 0)
    assert state["opt_state"][0].trace.keys() == {"kernel", "bias"}
    expected = split_params(Linear(nnx.Rngs(5)))[1]
    assert distance(state["params"], expected) == 0
    recipe = Recipe(seed=0, ema_decay=0.9, frozen=frozenset({"bias"}))
    state = init_state(Linear, optimizer, recipe, seed=5)
    assert state["opt_state"][0].trace.keys() == {"kernel"}
    assert distance(state["ema"], expected) == 0
