"""XViT: parity with the original implementation, and the properties that define the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import motion as motion_config
from jaxvid.errors import InputError
from jaxvid.models import (
    abstract_model,
    create_model,
    make_model_config,
    merge_params,
    split_params,
)
from jaxvid.models.layers import drop_path, dropout, run_blocks
from jaxvid.models.space_time_mixing import shift_time, summarize
from jaxvid.models.xvit import XViTConfig
from jaxvid.training.losses import cross_entropy
from jaxvid.weights import rules
from tests import goldens

GOLDENS = [f"tiny/xvit_tiny_{name}" for name in ("k600", "ssv2", "48px", "256px")]


def config_of(golden: dict) -> XViTConfig:
    """Return the config of a golden's network."""
    sizes = golden["config"]
    _, tokens, _ = dict(golden["manifest"])["base_model.pos_embed"]
    return XViTConfig(
        name="golden",
        num_classes=sizes["num_classes"],
        num_frames=sizes["num_frames"],
        image_size=16 * round((tokens - 1) ** 0.5),
        width=sizes["dim"],
        depth=sizes["depth"],
        heads=sizes["heads"],
        temporal_embedding_frames=sizes["temporal_embedding_frames"],
        shift_segment=sizes["shift_segment"],
        shift_div=sizes["shift_div"],
    )


@pytest.mark.parametrize("name", GOLDENS)
def test_forward_equals_the_original(name):
    golden = goldens.load(name)
    graphdef, abstract = abstract_model(config_of(golden))
    assert {rules.torch_key(key) for key in abstract} == {
        key for key, _ in golden["manifest"] if not key.startswith("new_fc.")
    }
    params = goldens.params(abstract, int(golden["param_seed"]))
    goldens.assert_forward(golden, graphdef, params, lambda model: model.base_model)


@pytest.mark.parametrize("name", GOLDENS)
def test_gradients_equal_the_original(name):
    golden = goldens.load(name)
    graphdef, abstract = abstract_model(config_of(golden))
    params = goldens.params(abstract, int(golden["param_seed"]))

    @jax.jit
    @jax.value_and_grad
    def loss_fn(params):
        logits = merge_params(graphdef, params)(golden["clip"])
        return cross_entropy(logits, golden["labels"], smoothing=0.3).mean()

    loss, grads = loss_fn(params)
    assert abs(loss - golden["loss"]) <= 1e-6
    goldens.assert_samples(golden, "grad", grads)


def test_shift_takes_channels_from_neighbouring_frames():
    x = np.random.default_rng(0).normal(size=(2, 8, 3, 12)).astype(np.float32)
    segment, fold = 4, 3
    expected = x.copy()
    for t in range(8):
        next_frame = x[:, t + 1, :, :fold] if (t + 1) % segment else 0
        previous_frame = x[:, t - 1, :, fold : 2 * fold] if t % segment else 0
        expected[:, t, :, :fold] = next_frame
        expected[:, t, :, fold : 2 * fold] = previous_frame
    np.testing.assert_array_equal(shift_time(jnp.asarray(x), segment, fold), expected)


def demo_model(variant: str, **overrides):
    """Return the model of a variant of configs/motion.py."""
    config = motion_config.get_config(variant).model.to_dict()
    return create_model(**{**config, **overrides})


def run(model, video, key=None) -> jax.Array:
    """Return the logits of clips; dropout is active if there is a key."""
    graphdef, params = split_params(model)
    program = jax.jit(lambda params: merge_params(graphdef, params)(video, key=key))
    return program(params)


def clips(frames: int = 8, size: int = 64) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, frames, size, size, 3))


def test_only_the_blind_demo_model_ignores_the_order_of_frames():
    video = clips()
    for variant, blind in (("", False), ("blind", True)):
        model = demo_model(variant)
        difference = jnp.abs(run(model, video) - run(model, video[:, ::-1])).max()
        assert (difference < 1e-5) == blind, (variant, difference)


def test_every_weight_gets_a_gradient():
    graphdef, params = split_params(demo_model(""))

    def loss_fn(params):
        logits = merge_params(graphdef, params)(clips())
        return cross_entropy(logits, jnp.array([0, 1]), smoothing=0.0).mean()

    for name, grad in jax.jit(jax.grad(loss_fn))(params).items():
        assert jnp.abs(grad).max() > 0, name


def test_split_and_merge_are_inverse():
    model = demo_model("")
    graphdef, params = split_params(model)
    abstract_graphdef, abstract = abstract_model(model.config)
    assert abstract_graphdef == graphdef
    assert {name: leaf.shape for name, leaf in params.items()} == {
        name: leaf.shape for name, leaf in abstract.items()
    }
    shuffled = dict(sorted(params.items(), reverse=True))
    merged = merge_params(graphdef, shuffled)
    np.testing.assert_array_equal(run(merged, clips()), run(model, clips()))


def test_dropout_depends_only_on_the_key():
    model = demo_model("", dropout=0.5, drop_path=0.5)
    video, key = clips(), jax.random.key(1)
    np.testing.assert_array_equal(run(model, video, key), run(model, video, key))
    assert jnp.abs(run(model, video, key) - run(model, video, jax.random.key(2))).max() > 0.01
    assert jnp.abs(run(model, video, key) - run(model, video)).max() > 0.01
    np.testing.assert_array_equal(run(model, video), run(demo_model(""), video))


def test_drop_path_drops_entire_frames_and_preserves_the_mean():
    x = jnp.ones((64, 64, 2, 3))
    dropped = drop_path(x, 0.25, jax.random.key(0))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    per_frame = dropped.reshape(64, 64, -1)
    assert (per_frame.min(-1) == per_frame.max(-1)).all()
    assert abs(dropped.mean() - 1) < 0.05
    assert abs(dropout(x, 0.25, jax.random.key(0)).mean() - 1) < 0.05


def test_scanned_blocks_equal_blocks_run_one_by_one():
    """Drop path has a different rate per block."""
    for options in ({}, {"shift_blocks": (1, 2)}):  # equal blocks; blocks of different structure
        model = demo_model("", depth=5, **options)
        blocks, x = model.base_model.blocks, model.base_model.embed(clips())
        key = jax.random.key(5)
        scanned = run_blocks(blocks, x, rate=0.4, key=key)
        for i, rate in enumerate((0.0, 0.1, 0.2, 0.3, 0.4)):
            x = blocks[i](x, rate=rate, key=jax.random.fold_in(key, i))
        np.testing.assert_allclose(scanned, x[:, :, 0], atol=1e-5)


def test_bfloat16_model_has_float32_weights_and_logits():
    model, bfloat16_model = demo_model(""), demo_model("", dtype="bfloat16")
    params = split_params(bfloat16_model)[1]
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("float32")}
    logits = run(bfloat16_model, clips())
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, run(model, clips()), atol=0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 5}, "width=64 is not divisible by heads=5"),
        ({"num_frames": 12}, "num_frames=12 is not divisible by shift_segment=8"),
        ({"image_size": 60}, "image_size=60 is not divisible by patch_size=16"),
        ({"temporal_embedding_frames": 3}, "num_frames=8 is not divisible by temporal_emb"),
        ({"shift_div": 1}, "shift_div=1"),
        ({"shift_blocks": (2, 3)}, r"shift_blocks=\[3\]: must be 0 to 2"),
        ({"head": "max"}, "head='max': must be one of 'attention', 'mean'"),
        ({"init": "zeros"}, "init='zeros': must be one of"),
        ({"dtype": "float64"}, "dtype='float64': must be one of"),
        ({"dept": 3}, "no option 'dept'; did you mean 'depth'"),
    ],
)
def test_invalid_configs_are_refused_with_the_field_and_its_value(overrides, message):
    with pytest.raises(InputError, match=message):
        make_model_config("xvit_tiny", **overrides)


def test_unknown_model_names_are_refused():
    with pytest.raises(
        InputError, match="'xvit_big' does not exist; expected one of stam_8, stam_16"
    ):
        make_model_config("xvit_big")


def test_clips_of_the_wrong_shape_are_refused():
    model = demo_model("")
    with pytest.raises(ValueError, match="7 frames are not divisible by shift_segment=8"):
        model(clips(frames=7))
    with pytest.raises(ValueError, match=r"got shape \(8, 64, 64, 3\); add the batch axis"):
        model(clips()[0])
    with pytest.raises(ValueError, match="60x60 px are not divisible into patches of 16 px"):
        model(clips(size=60))


def test_lists_from_json_become_tuples_and_configs_can_be_replaced():
    config = make_model_config("xvit_tiny", shift_blocks=[0, 2])
    assert config.shift_blocks == (0, 2)
    assert dataclasses.replace(config, depth=3) == config


@pytest.mark.parametrize(
    ("name", "classes", "segment", "shift_div", "millions"),
    [
        ("xvit_k400", 400, 8, 8, 93.79),
        ("xvit_k600", 600, 8, 8, 93.94),
        ("xvit_ssv2", 174, 16, 4, 93.62),
    ],
)
def test_sizes_of_released_models(name, classes, segment, shift_div, millions):
    config = make_model_config(name)
    assert (config.num_classes, config.shift_segment, config.shift_div) == (
        classes,
        segment,
        shift_div,
    )
    _, params = abstract_model(config)
    count = sum(np.prod(leaf.shape) for leaf in params.values())
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("patch", [pytest.param(16, marks=pytest.mark.full), 32])
def test_larger_backbones_can_be_built(patch):
    """Overrides of the preset sizes give ViT-L/16 and ViT-L/32."""
    large = {"width": 1024, "depth": 24, "heads": 16, "patch_size": patch}
    for name in ("xvit_k400", "stam_16"):
        _, params = abstract_model(make_model_config(name, **large))
        assert sum("attn.qkv.kernel" in key for key in params) >= 24


def test_shift_per_head_moves_a_part_of_each_head():
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 12))
    shifted_heads = [shift_time(part, 4, 1) for part in jnp.split(x, 3, axis=-1)]
    np.testing.assert_array_equal(
        shift_time(x, 4, 1, groups=3), jnp.concatenate(shifted_heads, axis=-1)
    )


def test_summary_tokens_are_the_patch_means_of_the_segment():
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    summaries = summarize(x, 2)
    assert summaries.shape == (2, 4, 2, 3)
    for t in range(4):
        for i in range(2):
            expected = x[:, 2 * (t // 2) + i, 1:].mean(axis=1)
            np.testing.assert_allclose(summaries[:, t, i], expected, rtol=1e-5)


OPTIONS = [
    {"shift": "keys"},
    {"shift": "values"},
    {"shift": "none"},
    {"shift_blocks": (1,)},
    {"shift_per_head": True},
    {"shift_segment": 4},
    {"shift_div": 8},
    {"summary_tokens": True},
    {"head": "mean"},
    {"head_depth": 2},
]


def test_every_option_changes_the_network():
    video = clips()
    default = run(demo_model(""), video)
    np.testing.assert_array_equal(run(demo_model(""), video), default)
    outputs = [np.asarray(run(demo_model("", **options), video)) for options in OPTIONS]
    for i, logits in enumerate(outputs):
        assert np.isfinite(logits).all()
        assert abs(logits - default).max() > 1e-3, OPTIONS[i]
        assert all(abs(logits - other).max() > 1e-4 for other in outputs[:i]), OPTIONS[i]


def test_features_and_attention_weights_have_the_documented_shapes():
    model, video = demo_model("", summary_tokens=True, head_depth=2), clips()
    graphdef, params = split_params(model)

    @jax.jit
    def outputs(params):
        model = merge_params(graphdef, params)
        return model.features(video), model.attention(video)

    features, weights = outputs(params)
    assert features["frames"].shape == (2, 8, 64)
    assert features["video"].shape == (2, 64)
    assert weights["spatial"].shape == (2, 3, 8, 2, 17, 17 + 8)
    assert weights["temporal"].shape == (2, 2, 2, 9, 9)
    for array in weights.values():
        np.testing.assert_allclose(array.sum(-1), 1, rtol=1e-5)
    mean = demo_model("", head="mean").features(video)
    np.testing.assert_array_equal(mean["video"], mean["frames"].mean(axis=1))


@pytest.mark.parametrize("name", [GOLDENS[0], GOLDENS[2]])
def test_bfloat16_logits_stay_near_float32(name):
    """The logits' standard deviation is about 0.5, and bfloat16 has 8 significant bits."""
    golden = goldens.load(name)
    config = dataclasses.replace(config_of(golden), dtype="bfloat16")
    graphdef, abstract = abstract_model(config)
    params = goldens.params(abstract, int(golden["param_seed"]))
    logits = jax.jit(lambda p: merge_params(graphdef, p)(golden["clip"]))(params)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=0.05)
