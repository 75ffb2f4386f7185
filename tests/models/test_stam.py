"""STAM: parity with the original implementation, and the properties that define the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.errors import InputError
from jaxvid.models import (
    abstract_model,
    create_model,
    make_model_config,
    merge_params,
    split_params,
)
from jaxvid.models.stam import STAMConfig
from jaxvid.training.losses import cross_entropy
from jaxvid.weights import rules
from tests import goldens

GOLDENS = ["tiny/stam_tiny_4f", "tiny/stam_tiny_16f"]
TINY = {"width": 32, "depth": 2, "heads": 4, "image_size": 32, "temporal_depth": 2}


def config_of(golden: dict, **overrides) -> STAMConfig:
    """Return the config of a golden's network."""
    sizes = golden["config"]
    _, tokens, _ = dict(golden["manifest"])["pos_embed"]
    return STAMConfig(
        name="golden",
        num_classes=sizes["num_classes"],
        num_frames=sizes["num_frames"],
        image_size=16 * round((tokens - 1) ** 0.5),
        width=sizes["dim"],
        depth=sizes["depth"],
        heads=sizes["heads"],
        temporal_depth=sizes["temporal_layers"],
        temporal_heads=sizes["temporal_heads"],
        temporal_mlp=sizes["temporal_mlp"],
        **overrides,
    )


@pytest.mark.parametrize("name", GOLDENS)
def test_forward_equals_the_original(name):
    golden = goldens.load(name)
    graphdef, abstract = abstract_model(config_of(golden))
    assert {rules.torch_key(key) for key in abstract} == {key for key, _ in golden["manifest"]}
    params = goldens.params(abstract, int(golden["param_seed"]))
    goldens.assert_forward(golden, graphdef, params, lambda model: model)


@pytest.mark.parametrize("name", GOLDENS)
def test_gradients_equal_the_original(name):
    golden = goldens.load(name)
    graphdef, abstract = abstract_model(config_of(golden))
    params = goldens.params(abstract, int(golden["param_seed"]))

    @jax.jit
    @jax.value_and_grad
    def loss_fn(params):
        logits = merge_params(graphdef, params)(golden["clip"])
        return cross_entropy(logits, golden["labels"], smoothing=0.0).mean()

    loss, grads = loss_fn(params)
    assert abs(loss - golden["loss"]) <= 1e-6
    goldens.assert_samples(golden, "grad", grads)


def test_the_mean_aggregator_equals_the_original():
    golden = goldens.load("tiny/stam_tiny_4f")
    with np.load(goldens.FOLDER / "tiny/stam_tiny_4f_mean_aggregate.npz") as arrays:
        expected = arrays["logits"]
    graphdef, abstract = abstract_model(config_of(golden, aggregator="mean"))
    assert not any(name.startswith("aggregate") for name in abstract)
    params = goldens.params(abstract, int(golden["param_seed"]))
    logits = jax.jit(lambda p: merge_params(graphdef, p)(golden["clip"]))(params)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "frames", "millions"),
    [("stam_8", 8, 119.199), ("stam_16", 16, 119.206), ("stam_32", 32, 119.218)]
    + [("stam_64", 64, 119.242)],
)
def test_sizes_of_released_models(name, frames, millions):
    config = make_model_config(name)
    assert config.num_frames == frames
    _, params = abstract_model(config)
    count = sum(np.prod(leaf.shape) for leaf in params.values())
    assert round(count / 1e6, 3) == millions


def run(model, video, key=None):
    """Return the logits of clips; dropout is active if there is a key."""
    graphdef, params = split_params(model)
    program = jax.jit(lambda params: merge_params(graphdef, params)(video, key=key))
    return program(params)


def test_features_attention_and_dropout():
    model = create_model("stam_8", num_classes=5, **TINY)
    video = jax.random.uniform(jax.random.key(0), (2, 8, 32, 32, 3))
    graphdef, params = split_params(model)

    @jax.jit
    def outputs(params):
        model = merge_params(graphdef, params)
        return model.features(video), model.attention(video), model(video)

    features, weights, logits = outputs(params)
    assert features["frames"].shape == (2, 8, 32)
    assert features["video"].shape == (2, 32)
    np.testing.assert_allclose(model.head(features["video"]), logits, atol=1e-5)
    assert weights["spatial"].shape == (2, 2, 8, 4, 5, 5)
    assert weights["temporal"].shape == (2, 2, 8, 9, 9)
    for array in weights.values():
        np.testing.assert_allclose(array.sum(-1), 1, rtol=1e-5)
    key = jax.random.key(1)
    np.testing.assert_array_equal(run(model, video, key), run(model, video, key))
    assert jnp.abs(run(model, video, key) - logits).max() > 1e-3


def test_frame_features_are_independent_but_logits_depend_on_the_order():
    model = create_model("stam_8", num_classes=5, **TINY)
    video = jax.random.uniform(jax.random.key(0), (1, 8, 32, 32, 3))
    features = jax.jit(lambda v: model.frame_features(v))
    np.testing.assert_allclose(features(video)[:, ::-1], features(video[:, ::-1]), atol=1e-5)
    pos_embed = model.aggregate.pos_embed  # its initial values are too small for a difference
    pos_embed[...] = 0.3 * jax.random.normal(jax.random.key(1), pos_embed.shape)
    assert jnp.abs(run(model, video) - run(model, video[:, ::-1])).max() > 1e-5


def test_the_mean_aggregator_ignores_the_order_of_frames():
    video = jax.random.uniform(jax.random.key(0), (2, 8, 64, 64, 3))
    averaging = create_model("stam_tiny", aggregator="mean")
    np.testing.assert_allclose(run(averaging, video), run(averaging, video[:, ::-1]), atol=1e-5)
    model = create_model("stam_tiny")
    assert jnp.abs(run(model, video) - run(model, video[:, ::-1])).max() > 1e-3


def test_weights_of_the_small_init_scale_with_the_fan_in():
    _, params = split_params(create_model("stam_tiny"))
    kernels = {name: leaf for name, leaf in params.items() if name.endswith("kernel")}
    assert len(kernels) > 10
    for name, kernel in kernels.items():
        if not name.startswith("patch_embed"):
            assert kernel.std() == pytest.approx(kernel.shape[0] ** -0.5, rel=0.1), name
    assert params["pos_embed"].std() == pytest.approx(0.3, rel=0.1)
    assert params["aggregate.pos_embed"].std() == pytest.approx(1, rel=0.1)
    _, released = split_params(create_model("stam_tiny", init="released"))
    for name in (*kernels, "pos_embed", "aggregate.pos_embed"):
        if not name.startswith("patch_embed"):
            assert released[name].std() == pytest.approx(0.02, rel=0.15), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 5}, "width=768 is not divisible by heads=5"),
        ({"temporal_heads": 7}, "width=768 is not divisible by temporal_heads=7"),
        ({"patch_size": 15}, "image_size=224 is not divisible by patch_size=15"),
        ({"aggregator": "max"}, "aggregator='max': must be one of 'transformer', 'mean'"),
        ({"init": "zeros"}, "init='zeros': must be one of 'released', 'small'"),
    ],
)
def test_invalid_configs_are_refused_with_the_field_and_its_value(overrides, message):
    with pytest.raises(InputError, match=message):
        make_model_config("stam_8", **overrides)


def test_a_different_number_of_frames_is_refused():
    model = create_model("stam_8", num_classes=5, **TINY)
    with pytest.raises(ValueError, match="expected 8 frames, got 4"):
        model(jnp.zeros((1, 4, 32, 32, 3)))
