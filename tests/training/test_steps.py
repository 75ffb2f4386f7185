"""The training and evaluation steps, which run on the device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import xvit_k600
from jaxvid.distributed import sharding
from jaxvid.errors import InputError
from jaxvid.models import (
    FAMILIES,
    abstract_model,
    build_model,
    make_model_config,
    merge_params,
    split_params,
)
from jaxvid.storage.eval_step import eval_step, onnx_eval_step, run_ahead
from jaxvid.storage.preprocessing import normalize, renormalize
from jaxvid.training import steps
from jaxvid.training.losses import cross_entropy, distillation_loss
from jaxvid.training.optim import make_optimizer, make_schedule
from jaxvid.training.steps import (
    Recipe,
    Teacher,
    eval_params,
    init_state,
    train_step,
)
from tests import goldens
from tests.models.test_xvit import config_of as xvit_config

TINY = {"width": 16, "depth": 1, "image_size": 32}


class Stub(nnx.Module):
    """A network whose logits are the three channels of a clip's first pixel, and 0.5."""

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
    actual = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing=smoothing)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_normalize():
    video = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 1, 3)
    np.testing.assert_allclose(normalize(video, 0.5, 0.5).ravel(), [-1, 1, -0.6], rtol=1e-6)
    fine = np.array([0, 255 * 256, 51 * 256 + 128], np.uint16)  # in units of 1/256 grey level
    expected = [-1, 1, (51.5 / 255 - 0.5) / 0.5]
    np.testing.assert_allclose(normalize(fine, 0.5, 0.5), expected, rtol=1e-6)


STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def test_normalize_per_channel():
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (2, 2, 4, 4, 3), np.uint8)
    expected = (video / 255 - np.array(STATISTICS["mean"])) / np.array(STATISTICS["std"])
    np.testing.assert_allclose(normalize(video, **STATISTICS), expected, rtol=1e-5, atol=1e-6)
    # Three equal numbers give the same bits as one number.
    same = normalize(jnp.asarray(video), (0.3,) * 3, (0.7,) * 3)
    np.testing.assert_array_equal(same, normalize(jnp.asarray(video), 0.3, 0.7))


def test_renormalize_replaces_the_normalisation():
    video = np.random.default_rng(0).integers(0, 256, (2, 2, 4, 4, 3), np.uint8)
    for old in (STATISTICS, {"mean": 0.5, "std": 0.5}):
        for new in (STATISTICS, {"mean": 0.0, "std": 1.0}):
            actual = renormalize(normalize(video, **old), *old.values(), *new.values())
            np.testing.assert_allclose(actual, normalize(video, **new), rtol=1e-4, atol=1e-5)


def stub_scores(pixels, score="logits", mean=0.0):
    """Run `eval_step` with the stub on views of one frame of one pixel.

    Args:
        pixels: `(b, v, 3)`; the logits of a view are its pixel / 255, and 0.5.
        score: As in the config.
        mean: As in the config.

    Returns:
        The results of `eval_step`, on the host.
    """
    graphdef, params = split_params(Stub())
    batch = {"video": np.asarray(pixels, np.uint8)[:, :, None, None, None, :]}
    options = {"graphdef": graphdef, "mean": mean, "std": 1.0, "score": score}
    return jax.device_get(jax.jit(functools.partial(eval_step, **options))(params, batch))


def test_eval_step_sums_the_logits_of_the_views():
    """The sum decides, not the number of views that favour a class."""
    views = [[[255, 0, 0], [0, 102, 0], [0, 102, 0]], [[102, 0, 0], [0, 204, 0], [0, 204, 0]]]
    results = stub_scores(views)
    np.testing.assert_allclose(results["scores"][0], [1.0, 0.8, 0.0, 1.5], rtol=1e-5)
    np.testing.assert_allclose(results["scores"][1], [0.4, 1.6, 0.0, 1.5], rtol=1e-5)
    shifted = stub_scores(views, mean=(0.0, 0.1, 0.2))["scores"]
    np.testing.assert_allclose(shifted[1], [0.4, 1.3, -0.6, 1.5], rtol=1e-5)
    exp = np.exp(results["scores"] / 3)
    np.testing.assert_allclose(results["probabilities"], exp / exp.sum(1, keepdims=True), rtol=1e-5)


def test_eval_step_averages_probabilities():
    views = [[[255, 0, 0], [0, 102, 0]]]
    results = stub_scores(views, score="probabilities")
    logits = np.array([[1, 0, 0, 0.5], [0, 0.4, 0, 0.5]])
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(results["scores"][0], probabilities.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(results["scores"], results["probabilities"])


@pytest.mark.parametrize("score", ["logits", "probabilities"])
def test_onnx_eval_step_equals_eval_step(score):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 3), np.uint8)
    expected, shapes = stub_scores(pixels, score), []

    def network(video):
        shapes.append(video.shape)
        pixel = video[:, 0, 0, 0] / np.float32(255)
        return np.concatenate([pixel, np.full((len(video), 1), 0.5, np.float32)], axis=1)

    batch = {"video": pixels[:, :, None, None, None, :]}
    results = onnx_eval_step(batch, network=network, score=score, activation="softmax")
    assert shapes == [(6, 1, 1, 1, 3)]
    for name, values in expected.items():
        np.testing.assert_allclose(results[name], values, rtol=1e-5)
    sigmoid = onnx_eval_step(batch, network=network, score=score, activation="sigmoid")
    assert not np.allclose(sigmoid["probabilities"], results["probabilities"])


@pytest.mark.parametrize("num_batches", [0, 1, 4])
def test_run_ahead_of_eval_step_by_one_batch(num_batches):
    """The step of the next batch is called before the outputs of a batch are used."""
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=1, tensor=4))
    calls = []

    def step(params, batch):
        assert batch.keys() == {"video"}
        assert batch["video"].sharding.mesh == mesh
        calls.append(params)
        return batch["video"] + params

    batches = [(np.full((2, 3), i), f"batch {i}") for i in range(num_batches)]
    for i, (outputs, metadata) in enumerate(run_ahead(step, 10, iter(batches), mesh)):
        assert metadata == f"batch {i}"
        np.testing.assert_array_equal(outputs, np.full((2, 3), 10 + i))
        assert calls == [10] * min(i + 2, num_batches)
    assert len(calls) == num_batches


def make_step(config, optimizer, seed, **options):
    """Return an initial state, the jitted training step and the network's structure."""
    graphdef, _ = abstract_model(config)
    recipe = Recipe(seed=seed, **options)
    step = functools.partial(
        train_step,
        graphdef=graphdef,
        optimizer=optimizer,
        recipe=recipe,
    )
    return fresh_state(config, optimizer, recipe), jax.jit(step), graphdef


def fresh_state(config, optimizer, recipe):
    """Return an initial state with the weights of seed 0."""
    return init_state(split_params(build_model(config, nnx.Rngs(0)))[1], optimizer, recipe)


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
        # With a learning rate of 0, the weights do not change: only the key does.
        state, step, _ = make_step(config, optax.sgd(0.0), seed)
        out = []
        for _ in range(2):
            state, sums = step(state, batch)
            out.append(float(sums["loss"]))
        return out

    assert losses(0) == losses(0)
    assert len({*losses(0), *losses(1)}) == 4


def test_the_released_recipe_reproduces_the_original_training(monkeypatch):
    """Five steps of XViT's recipe, with the random draws of mixup from the original run."""
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
    lams, permutations = jnp.float32(golden["lams"]), jnp.asarray(golden["perms"])

    def recorded_mixup(video, key, alpha, **_):
        # The step is not an argument: find it by comparing the key with those of all steps.
        bits = jax.random.key_data(key)[None]
        step = (jax.random.key_data(keys) == bits).all(axis=-1).argmax()
        lam, permutation = lams[step], permutations[step]
        return lam * video + (1 - lam) * video[permutation], permutation, lam

    monkeypatch.setattr("jaxvid.training.batch_augmentation.mixup", recorded_mixup)
    key = jax.random.key(config.seed)
    keys = jnp.stack([jax.random.split(jax.random.fold_in(key, i), 3)[2] for i in range(5)])
    recipe = Recipe(
        seed=config.seed,
        mean=0.0,
        std=1 / 255,  # no change: the golden's clips are normalised already
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


def random_batch(count, seed=0):
    """Return a batch of random clips; the second one is masked."""
    rng = np.random.default_rng(seed)
    return {
        "video": rng.integers(0, 255, (count, 8, 32, 32, 3), np.uint8),
        "label": rng.integers(0, 8, count).astype(np.int32),
        "mask": np.arange(count) != 1,
    }


def distance(a, b):
    """Return the largest absolute difference between two dictionaries of arrays."""
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"mixup_alpha": 0.4, "erase_prob": 0.5}, marks=pytest.mark.full),
        pytest.param({"cutmix_alpha": 1.0}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_accumulation_equals_the_full_batch(options):
    config, optimizer = make_model_config("xvit_tiny", **TINY), optax.sgd(0.1, momentum=0.9)
    results = []
    for num_parts in (1, 4):
        state, step, _ = make_step(config, optimizer, 0, accumulate_steps=num_parts, **options)
        for i in range(2):
            state, sums = step(state, random_batch(8, i))
        results.append((state["params"], jax.device_get(sums)))
    (full_batch, expected), (accumulated, sums) = results
    assert distance(full_batch, accumulated) <= 1e-6
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value, rel=1e-5), name
    # One clip is masked. With mixing, the clip that it is mixed into is masked too.
    assert sums["count"] <= 7


def test_ema_follows_the_weights():
    config = make_model_config("xvit_tiny", **TINY)
    state, step, _ = make_step(config, optax.sgd(0.1), 0, ema_decay=0.5)
    average = jax.device_get(state["params"])
    for i in range(8):
        state, _ = step(state, random_batch(4, i))
        decay = min(0.5, (2 + i) / (11 + i))
        average = {k: decay * average[k] + (1 - decay) * v for k, v in state["params"].items()}
    assert distance(average, state["ema"]) <= 1e-6
    assert eval_params(state) is state["ema"]
    assert distance(state["params"], state["ema"]) > 1e-4


def test_frozen_weights_are_constant_and_have_no_moments():
    config = make_model_config("xvit_tiny", **TINY)
    names = abstract_model(config)[1]
    frozen = frozenset(name for name in names if name.startswith("base_model."))
    state, step, _ = make_step(config, optax.adamw(0.1, weight_decay=1.0), 0, frozen=frozen)
    assert not any("base_model" in str(path) for path, _ in tree_paths(state["opt_state"]))
    after, _ = step(state, random_batch(4))
    for name in names:
        unchanged = bool((after["params"][name] == state["params"][name]).all())
        assert unchanged == (name in frozen), name


def tree_paths(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def test_distillation_loss_follows_the_formula():
    rng = np.random.default_rng(0)
    logits, teacher_logits, t = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), 2.5
    p, q = softmax(teacher_logits / t), softmax(logits / t)
    expected = t * t * (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(distillation_loss(logits, teacher_logits, t), expected, rtol=1e-4)
    np.testing.assert_allclose(distillation_loss(teacher_logits, teacher_logits, t), 0, atol=1e-5)


@pytest.mark.full  # the loss of a step is compared with the formula below
def test_training_decreases_the_distillation_loss():
    """With all weight on the teacher, the loss does not depend on the labels."""
    config = make_model_config("xvit_tiny", **TINY)
    graphdef, _ = abstract_model(config)
    _, teacher_params = split_params(build_model(config, nnx.Rngs(7)))
    # The teacher gets the same video as the student, but in its own normalisation.
    teacher = Teacher(graphdef=graphdef, mean=0.25, std=0.75, weight=1.0, temperature=2.0)
    recipe, optimizer = Recipe(seed=0), optax.adam(3e-3)
    options = {"graphdef": graphdef, "optimizer": optimizer, "recipe": recipe}
    step = functools.partial(train_step, **options, teacher=teacher)
    step = jax.jit(step)
    state, batch = fresh_state(config, optimizer, recipe), random_batch(6)
    teacher_logits = merge_params(graphdef, teacher_params)(normalize(batch["video"], 0.25, 0.75))
    logits = merge_params(graphdef, state["params"])(normalize(batch["video"], 0.5, 0.5))
    expected = distillation_loss(logits, teacher_logits, 2.0)[batch["mask"]].sum()
    losses = []
    for _ in range(60):
        state, sums = step(state, batch, teacher_params)
        losses.append(float(sums["loss"]))
    assert losses[0] == pytest.approx(float(expected), rel=1e-4)
    assert losses[-1] < 0.1 * losses[0]
    relabelled = {**batch, "label": (batch["label"] + 1) % 8}
    assert (
        step(state, relabelled, teacher_params)[1]["loss"]
        == step(state, batch, teacher_params)[1]["loss"]
    )


class Linear(nnx.Module):
    """A linear classifier of a clip's mean colour.

    With a key, the mean colour is scaled at random; this takes the place of dropout.
    """

    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(rngs.normal((3, 4)))
        self.bias = nnx.Param(rngs.normal((4,)))

    def __call__(self, video, *, key=None):
        scale = 1.0 if key is None else 0.5 + jax.random.uniform(key)
        return (
            scale * video.mean(axis=(1, 2, 3)) @ self.kernel[...] + self.bias[None]
        )  # (b classes)


def linear_batch(count=5, seed=0):
    """Return a batch for `Linear`; the second clip is masked."""
    rng = np.random.default_rng(seed)
    return {
        "video": rng.integers(0, 256, (count, 2, 3, 3, 3), np.uint8),
        "label": np.array([0, 3, 1, 1, 2, 0])[:count].astype(np.int32),
        "mask": np.array([True, False, True, True, True, True])[:count],
    }


def softmax(x):
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def linear_step(state, batch, recipe, optimizer=None, **options):
    """Run a training step of `Linear`; return the new state and the metrics, on the host."""
    graphdef, _ = split_params(Linear(nnx.Rngs(0)))
    optimizer = optimizer or optax.sgd(0.1)
    step = functools.partial(
        train_step, graphdef=graphdef, optimizer=optimizer, recipe=recipe, **options
    )
    return jax.device_get(step(state, batch))


def linear_state(recipe, optimizer=None, seed=0):
    """Return a training state of `Linear` at step 6."""
    _, params = split_params(Linear(nnx.Rngs(seed)))
    return {**init_state(params, optimizer or optax.sgd(0.1), recipe), "step": jnp.int32(6)}


def linear_logits(params, video, scale=1.0):
    """Compute `Linear` with NumPy; return the scaled mean colours and the logits."""
    pixels = scale * np.asarray(video, np.float64).mean(axis=(1, 2, 3))
    return pixels, pixels @ np.asarray(params["kernel"]) + np.asarray(params["bias"])


def keys_of(seed, step):
    """Return the keys of a step with augmentation: for the network, erasing and mixing."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)


def check_step(result, state, batch, targets, video, *, scale, rate=0.1, smoothing=0.0):
    """Check a plain SGD step of `Linear` against NumPy.

    Args:
        result: The new state and the metrics.
        state: The state before the step.
        batch: The batch; its mask is True for the clips that must count.
        targets: `(b, 4)` expected label distributions, before smoothing.
        video: Expected input of the network, normalised and augmented.
        scale: The network's random scale.
        rate: The learning rate.
        smoothing: Label smoothing.
    """
    new_state, metrics = result
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


def test_a_linear_step_follows_the_masked_mean_gradient():
    for smoothing, options in ((0.0, {}), (0.3, {"label_smoothing": 0.3, "mean": 0.2, "std": 0.4})):
        recipe, batch = Recipe(seed=3, **options), linear_batch()
        if smoothing:
            batch["mask"][:4] = False  # a single clip counts
        key = jax.random.fold_in(jax.random.key(3), 6)
        scale = 0.5 + float(jax.random.uniform(key))
        video = (batch["video"] / 255 - recipe.mean) / recipe.std
        state = linear_state(recipe)
        result = linear_step(state, batch, recipe)
        assert result[0].keys() == {"params", "opt_state", "step"}
        targets = np.eye(4)[batch["label"]]
        check_step(result, state, batch, targets, video, scale=scale, smoothing=smoothing)
    assert recipe.trainable({"a": 1}) == {"a": 1}


def test_impossible_recipes_are_refused_and_defaults_are_off():
    for decay in (-0.1, 1.0, 1.5):
        with pytest.raises(InputError, match=f"ema_decay={decay}"):
            Recipe(seed=0, ema_decay=decay)
    with pytest.raises(InputError, match="mixup_alpha=0.2, cutmix_alpha=1.0: "):
        Recipe(seed=0, mixup_alpha=0.2, cutmix_alpha=1.0)
    recipe = Recipe(seed=0)
    assert (recipe.mean, recipe.std) == (0.5, 0.5)
    assert (recipe.mixup_alpha, recipe.cutmix_alpha, recipe.erase_prob) == (0.0, 0.0, 0.0)


def test_a_linear_step_on_masked_clips_changes_no_weights():
    recipe, batch = Recipe(seed=0), linear_batch()
    batch["mask"] = np.zeros(5, bool)
    state = linear_state(recipe)
    new_state, metrics = linear_step(state, batch, recipe)
    assert metrics == {"loss": 0, "top1": 0, "count": 0, "grad_norm": 0}
    assert distance(new_state["params"], state["params"]) == 0


@pytest.mark.parametrize(
    ("kind", "erase_prob"), [("mixup", 0.25), ("cutmix", 0.0), ("mixup", 0.0), ("", 0.25)]
)
def test_a_linear_step_mixes_labels_and_masks_partners_of_masked_clips(
    kind, erase_prob, monkeypatch
):
    """The second of 5 clips is masked. It is mixed into the first, so the first is masked too."""
    permutation, share, calls = np.array([1, 2, 3, 0, 4]), 0.3, []
    batch = linear_batch()

    def mix(video, key, alpha, *, groups, partners):
        calls.append((jax.random.key_data(key).tolist(), alpha))
        assert groups == 1
        mixed = share * video + (1 - share) * partners(jnp.asarray(permutation))
        return mixed, jnp.asarray(permutation), jnp.float32(share)

    def draw_boxes(shape, key, probability):
        calls.append((jax.random.key_data(key).tolist(), probability))
        return jnp.broadcast_to(jnp.arange(1.0, 6.0)[:, None, None], shape)

    for name in ("mixup", "cutmix"):
        monkeypatch.setattr(
            f"jaxvid.training.batch_augmentation.{name}", mix if name == kind else None
        )
    monkeypatch.setattr("jaxvid.training.batch_augmentation.draw_boxes", draw_boxes)
    add_boxes = lambda video, boxes: video + boxes[:, None, :, :, None]  # noqa: E731
    monkeypatch.setattr("jaxvid.training.batch_augmentation.erase", add_boxes)
    options = {f"{kind}_alpha": 0.4} if kind else {}
    recipe = Recipe(seed=3, erase_prob=erase_prob, label_smoothing=0.1, **options)
    state = linear_state(recipe)
    result = linear_step(state, batch, recipe)
    keys = keys_of(3, 6)
    expected = [(keys[1], erase_prob)] * bool(erase_prob) + [(keys[2], 0.4)] * bool(kind)
    assert calls == [(jax.random.key_data(key).tolist(), value) for key, value in expected]
    video = (batch["video"] / 255 - 0.5) / 0.5
    if erase_prob:
        video += np.arange(1.0, 6.0).reshape(5, 1, 1, 1, 1)
    targets = np.eye(4)[batch["label"]]
    if kind:
        video = share * video + (1 - share) * video[permutation]
        targets = share * targets + (1 - share) * targets[permutation]
        batch["mask"] = np.array([False, False, True, True, True])
    scale = 0.5 + float(jax.random.uniform(keys[0]))
    check_step(result, state, batch, targets, video, scale=scale, smoothing=0.1)


def test_clips_are_mixed_within_devices_unless_each_has_one_clip():
    def mix_groups(batch_size, data, **options):
        mesh = sharding.make_mesh(sharding.MeshShape(data=data, fsdp=8 // data, tensor=1))
        recipe = Recipe(seed=0, **options).for_run(mesh, batch_size, frozenset({"a"}))
        assert (recipe.seed, recipe.frozen, type(recipe.mix_groups)) == (0, {"a"}, int)
        return recipe.mix_groups

    assert mix_groups(16, data=8) == mix_groups(32, data=4) == 8
    assert mix_groups(8, data=8) == 4  # pairs of devices
    assert mix_groups(20, data=8) == 4  # not divisible by 8
    assert mix_groups(1, data=8) == 1
    assert mix_groups(16, data=8, mix_within="batch") == 1
    with pytest.raises(InputError, match="mix_within='node': must be one of 'device', 'batch'"):
        Recipe(seed=0, mix_within="node")


def test_a_linear_step_updates_the_ema_with_warm_up():
    recipe = Recipe(seed=0, ema_decay=0.5)
    state = linear_state(recipe)
    for step in (7, 8, 9):  # the warm-up ends at 8: (1 + 8) / (10 + 8) = 0.5
        new_state, _ = linear_step(state, linear_batch(seed=step), recipe, optax.sgd(1.0))
        decay = min(0.5, (1 + step) / (10 + step))
        for name, leaf in new_state["params"].items():
            expected = decay * np.asarray(state["ema"][name]) + (1 - decay) * leaf
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


@pytest.mark.parametrize(
    ("own", "others"),
    [((0.4, 0.6), (0.2, 0.3)), ((0.4, 0.6), tuple(STATISTICS.values())),
     (tuple(STATISTICS.values()), (0.2, 0.3))],
)  # fmt: skip
def test_a_linear_step_weights_the_losses_of_labels_and_teacher(own, others):
    """The teacher gets the same clips in its own normalisation."""
    teacher_graph, teacher_params = split_params(Linear(nnx.Rngs(9)))
    options = {"weight": 0.7, "temperature": 2.0}
    teacher = Teacher(graphdef=teacher_graph, mean=others[0], std=others[1], **options)
    recipe, batch = Recipe(seed=1, mean=own[0], std=own[1]), linear_batch()
    state = linear_state(recipe)
    _, metrics = linear_step(state, batch, recipe, teacher=teacher, teacher_params=teacher_params)
    scale = 0.5 + float(jax.random.uniform(jax.random.fold_in(jax.random.key(1), 6)))
    pixels = batch["video"] / 255
    own, others = np.array(own), np.array(others)
    _, logits = linear_logits(state["params"], (pixels - own[0]) / own[1], scale)
    _, teacher_logits = linear_logits(teacher_params, (pixels - others[0]) / others[1])
    label_losses = -np.log(softmax(logits))[range(5), batch["label"]]
    p, q = softmax(teacher_logits / 2), softmax(logits / 2)
    teacher_losses = 4 * (p * np.log(p / q)).sum(axis=1)
    expected = ((0.3 * label_losses + 0.7 * teacher_losses) * batch["mask"]).sum()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_accumulation_spreads_each_part_over_the_batch():
    def grad_fn(params, clips, key):
        return {"product": params * jnp.prod(clips["x"]), "draw": jax.random.uniform(key)}

    clips, key = {"x": jnp.arange(1.0, 7.0), "y": jnp.zeros((6, 2))}, jax.random.key(4)
    sums = steps._accumulate(grad_fn, jnp.float32(10), clips, key, 2)
    assert sums["product"] == 10 * (1 * 3 * 5 + 2 * 4 * 6)
    draws = sum(float(jax.random.uniform(k)) for k in jax.random.split(key, 2))
    assert float(sums["draw"]) == pytest.approx(draws)
    full_batch = steps._accumulate(grad_fn, jnp.float32(10), clips, key, 1)
    assert full_batch["product"] == 7200
    assert full_batch["draw"] == jax.random.uniform(key)


def test_a_linear_step_with_accumulation_equals_the_full_batch(monkeypatch):
    # Remove the random scale, because its key differs between the parts of a batch.
    monkeypatch.setattr(Linear, "__call__", lambda self, video, key: unscaled_logits(self, video))
    results = []
    for num_parts in (1, 3):
        recipe = Recipe(seed=0, accumulate_steps=num_parts)
        results.append(linear_step(linear_state(recipe), linear_batch(6), recipe))
    (full_batch, expected), (accumulated, sums) = results
    assert distance(full_batch["params"], accumulated["params"]) <= 1e-6
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value, rel=1e-5), name
        assert sums[name].dtype == value.dtype, name


def unscaled_logits(model, video):
    return video.mean(axis=(1, 2, 3)) @ model.kernel[...] + model.bias[None]


def test_a_fresh_state_has_moments_of_trained_weights_only():
    params = split_params(Linear(nnx.Rngs(5)))[1]
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = init_state(params, optimizer, Recipe(seed=0))
    assert state.keys() == {"params", "opt_state", "step"}
    assert (state["step"].dtype, state["step"]) == (jnp.int32, 0)
    assert state["opt_state"][0].trace.keys() == {"kernel", "bias"}
    assert distance(state["params"], params) == 0
    recipe = Recipe(seed=0, ema_decay=0.9, frozen=frozenset({"bias"}))
    state = init_state(params, optimizer, recipe)
    assert state["opt_state"][0].trace.keys() == {"kernel"}
    assert distance(state["ema"], params) == 0
