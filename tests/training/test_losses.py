"""Losses and class weights, compared with PyTorch and scikit-learn's definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxvid.data.records import Record
from jaxvid.distributed import sharding
from jaxvid.errors import InputError
from jaxvid.training.losses import (
    LossConfig,
    binary_cross_entropy,
    cross_entropy,
    describe_weights,
)
from jaxvid.training.steps import Recipe
from tests.training.test_steps import (
    keys_of,
    linear_batch,
    linear_logits,
    linear_state,
    linear_step,
)

WEIGHTS = (0.5, 2.0, 1.0, 3.0)


def torch_loss(logits, labels, **options):
    """Return the loss of PyTorch's `CrossEntropyLoss`."""
    loss = torch.nn.CrossEntropyLoss(**options)
    return loss(torch.tensor(np.array(logits)), torch.tensor(np.array(labels), dtype=torch.long))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_weighted_cross_entropy_equals_pytorch(smoothing):
    logits = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    labels = linear_batch(count=6)["label"]
    actual = cross_entropy(
        jnp.array(logits), jnp.array(labels), smoothing=smoothing, class_weights=WEIGHTS
    )
    options = {"weight": torch.tensor(WEIGHTS), "label_smoothing": smoothing}
    expected = torch_loss(logits, labels, **options, reduction="none")
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("num_parts", [1, 3])
def test_a_weighted_step_minimises_pytorchs_weighted_mean(num_parts):
    """The second clip is masked; microbatches and smoothing change nothing."""
    recipe = Recipe(seed=3, label_smoothing=0.2, class_weights=WEIGHTS, accumulate_steps=num_parts)
    state, batch = linear_state(recipe), linear_batch(count=6)
    video = (batch["video"] / 255 - 0.5) / 0.5
    network = torch.nn.Linear(3, 4)
    with torch.no_grad():
        network.weight.copy_(torch.tensor(np.array(state["params"]["kernel"]).T))
        network.bias.copy_(torch.tensor(np.array(state["params"]["bias"])))
    key = jax.random.fold_in(jax.random.key(3), 6)
    keys = jax.random.split(key, num_parts) if num_parts > 1 else [key]
    scales = np.array([0.5 + float(jax.random.uniform(key)) for key in keys])
    pixels = scales[np.arange(6) % num_parts, None] * video.mean(axis=(1, 2, 3))
    rows = batch["mask"]
    logits = network(torch.tensor(pixels[rows], dtype=torch.float32))
    criterion = torch.nn.CrossEntropyLoss(weight=torch.tensor(WEIGHTS), label_smoothing=0.2)
    loss = criterion(logits, torch.tensor(batch["label"][rows], dtype=torch.long))
    loss.backward()
    new_state, metrics = linear_step(state, batch, recipe)
    assert metrics["loss"] == pytest.approx(5 * float(loss.detach()), rel=1e-5)
    for name, grad in (("kernel", network.weight.grad.T), ("bias", network.bias.grad)):
        expected = np.array(state["params"][name]) - 0.1 * grad.numpy()
        np.testing.assert_allclose(new_state["params"][name], expected, rtol=1e-5, atol=1e-6)


def test_a_weighted_step_depends_on_the_ratios_of_the_weights_only():
    batch, results = linear_batch(count=6), []
    for factor in (1, 1e-3):
        recipe = Recipe(seed=3, class_weights=tuple(factor * weight for weight in WEIGHTS))
        results.append(linear_step(linear_state(recipe), batch, recipe)[1])
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)


def test_mixed_labels_have_their_weights():
    recipe = Recipe(seed=3, mixup_alpha=0.4, class_weights=WEIGHTS)
    state, batch = linear_state(recipe), linear_batch(count=6)
    batch["mask"][:] = True
    key, _, mix_key = keys_of(3, 6)
    key_lam, key_permutation = jax.random.split(mix_key)
    lam = float(jax.random.beta(key_lam, 0.4, 0.4))
    partner = np.array(jax.random.permutation(key_permutation, 6))
    video = (batch["video"] / 255 - 0.5) / 0.5
    video = lam * video + (1 - lam) * video[partner]
    scale = 0.5 + float(jax.random.uniform(key))
    logits = linear_logits(state["params"], video, scale)[1].astype(np.float32)
    # Both terms have the same labels and therefore the same sum of weights.
    labels, weights = (batch["label"], batch["label"][partner]), torch.tensor(WEIGHTS)
    first, second = (float(torch_loss(logits, label, weight=weights)) for label in labels)
    _, metrics = linear_step(state, batch, recipe)
    assert metrics["loss"] == pytest.approx(6 * (lam * first + (1 - lam) * second), rel=1e-4)
    # If a clip is masked, the two sums differ.
    batch["mask"][0] = False
    mask = batch["mask"] & batch["mask"][partner]
    first, second = (
        torch_loss(logits, label, weight=weights, reduction="none").numpy() for label in labels
    )
    losses = (lam * first + (1 - lam) * second)[mask].sum()
    first, second = (np.array(WEIGHTS)[label] for label in labels)
    weight = (lam * first + (1 - lam) * second)[mask].sum()
    _, metrics = linear_step(state, batch, recipe)
    assert metrics["loss"] == pytest.approx(mask.sum() * losses / weight, rel=1e-4)


def test_the_weighted_mean_does_not_depend_on_the_mesh():
    recipe = Recipe(seed=3, class_weights=WEIGHTS)
    state, batch = linear_state(recipe), linear_batch(count=6)
    _, expected = linear_step(state, batch, recipe)
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=1, tensor=4))
    _, actual = linear_step(state, sharding.to_global_arrays(batch, mesh), recipe)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-6)


def test_balanced_weights_follow_scikit_learn():
    """compute_class_weight("balanced", classes=[0, 1, 3], y=labels) = n / (3 · counts)."""
    records = [Record("a.mp4", label) for label in [0] + [1] * 7 + [3] * 4]
    weights = LossConfig(class_weights="balanced").weights(records, 4)
    np.testing.assert_allclose(weights, [4, 4 / 7, 1, 1])
    names = ["run", "walk", "fall", "sit"]
    [line] = describe_weights(weights, names)
    assert line == "class weights of the loss: walk 0.571, fall 1, sit 1, run 4"
    assert describe_weights((), []) == ()
    [line] = describe_weights((3.0, 1.0, *[2.0] * 7), "abcdefghi")
    assert line == "class weights of the loss: from b 1, to a 3"
    assert "h 2" in describe_weights((3.0, 1.0, *[2.0] * 6), "abcdefgh")[0]


def test_class_weights_are_listed_or_named():
    records = [Record("a.mp4", 0)]
    assert LossConfig().weights(records, 4) == ()
    for text in ("0.5,2,1,3", "[0.5, 2, 1, 3]", "(0.5, 2, 1, 3)"):
        assert LossConfig(class_weights=text).weights(records, 4) == WEIGHTS
    with pytest.raises(InputError, match="has 2 numbers, expected one for each of the 4 classes"):
        LossConfig(class_weights="1,2").weights(records, 4)
    for wrong in ("even", "1,-2", "1,0", "", "1,nan", "1,inf", "X1"):
        with pytest.raises(InputError, match="must be none, balanced or a number above 0"):
            LossConfig(class_weights=wrong)
    with pytest.raises(InputError, match="^loss.name='bce': must be one of 'softmax', 'sigmoid'"):
        LossConfig(name="bce")


@pytest.mark.parametrize("weights", [(), WEIGHTS])
def test_binary_cross_entropy_equals_pytorch(weights):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 4)).astype(np.float32), rng.integers(0, 2, (6, 4))
    actual = binary_cross_entropy(
        jnp.array(logits), jnp.array(labels), smoothing=0.2, class_weights=weights
    )
    criterion = torch.nn.BCEWithLogitsLoss(
        weight=torch.tensor(weights) if weights else None, reduction="none"
    )
    expected = criterion(torch.tensor(logits), torch.tensor(0.8 * labels + 0.05).float())
    np.testing.assert_allclose(actual, expected.mean(axis=1), rtol=1e-5)


@pytest.mark.parametrize("weights", [(), WEIGHTS])
def test_multi_label_targets_are_mixed(weights):
    """The weighted losses are averaged over the clips and classes, as in PyTorch."""
    recipe = Recipe(seed=3, mixup_alpha=0.4, multi_label=True, class_weights=weights)
    state, batch = linear_state(recipe), linear_batch(count=6)
    batch["mask"][:] = True
    batch["label"] = np.random.default_rng(0).integers(0, 2, (6, 4)).astype(np.int32)
    key, _, mix_key = keys_of(3, 6)
    key_lam, key_permutation = jax.random.split(mix_key)
    lam = float(jax.random.beta(key_lam, 0.4, 0.4))
    partner = np.array(jax.random.permutation(key_permutation, 6))
    video = (batch["video"] / 255 - 0.5) / 0.5
    video = lam * video + (1 - lam) * video[partner]
    scale = 0.5 + float(jax.random.uniform(key))
    logits = linear_logits(state["params"], video, scale)[1]
    targets = lam * batch["label"] + (1 - lam) * batch["label"][partner]
    criterion = torch.nn.BCEWithLogitsLoss(weight=torch.tensor(weights) if weights else None)
    expected = criterion(torch.tensor(logits), torch.tensor(targets))
    _, metrics = linear_step(state, batch, recipe)
    assert metrics["loss"] == pytest.approx(6 * float(expected), rel=1e-4)
    hits = batch["label"][np.arange(6), logits.argmax(axis=1)]
    assert metrics["top1"] == hits.sum()
