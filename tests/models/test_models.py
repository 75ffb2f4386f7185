"""Limits of model configs, parameter counts, and construction of deep models."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from jaxvid.errors import InputError
from jaxvid.models import PRESETS, abstract_model, create_model, make_model_config, split_params
from jaxvid.models.layers import qkv_linear, torch_kernel_init

MEAN = {"stam": {"aggregator": "mean"}, "xvit": {"head": "mean", "temporal_embedding_frames": 0}}
SMALL = {"depth": 2, "mlp_ratio": 3}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in PRESETS),
        ("stam_tiny", MEAN["stam"] | SMALL),
        ("xvit_tiny", MEAN["xvit"] | SMALL),
        ("xvit_tiny", {"head_depth": 2, "num_classes": 3, **SMALL}),
    ],
)
def test_num_params_equals_the_built_network(name, options):
    config = make_model_config(name, **options)
    _, params = abstract_model(config)
    assert config.num_params() == sum(math.prod(leaf.shape) for leaf in params.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 10**9}, "model xvit_k400: depth=1000000000: must be 1 to 128"),
        ({"num_frames": 10**9}, "num_frames=1000000000: must be 1 to 4096"),
        ({"depth": True}, "depth=True: expected type int"),
        ({"depth": 12.0}, "depth=12.0: expected type int"),
        ({"mlp_ratio": 0}, "mlp_ratio=0: must be 1 to 64"),
        ({"dropout": math.nan}, "dropout=nan: must be 0 to 1"),
        ({"remat": 1}, "remat=1: expected type str"),
        ({"width": 32768, "heads": 1, "depth": 128}, "[0-9]+ G parameters, at most 10 G"),
        ({"image_size": 8192, "patch_size": 2}, "16777216 patches per frame, at most 65536"),
    ],
)
def test_invalid_options_are_refused_with_their_name_and_limits(options, message):
    with pytest.raises(InputError, match=message):
        make_model_config("xvit_k400", **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        # the size of ViT-g/14
        ("stam_64", {"width": 1408, "depth": 40, "heads": 16, "patch_size": 14}),
        # longer and larger clips than those of any released model
        ("xvit_k600", {"num_frames": 128, "image_size": 512}),
        ("stam_64", {"num_frames": 256, "image_size": 1024, "num_classes": 21843}),
    ],
)
def test_large_networks_are_accepted(name, options):
    assert make_model_config(name, **options).num_params() < 3e9


def test_abstract_model_of_the_largest_depth():
    """This takes seconds. With the counters of nnx.Rngs, it would take two minutes."""
    _, params = abstract_model(make_model_config("xvit_tiny", depth=128))
    assert "base_model.blocks.127.attn.qkv.kernel" in params


def test_queries_keys_and_values_are_those_of_one_linear_layer():
    """Also the initial weights are the same, and the keys that later layers draw from."""
    rngs, other_rngs = nnx.Rngs(0), nnx.Rngs(0)
    layer = qkv_linear(8, torch_kernel_init, "float32", rngs=rngs)
    linear = nnx.Linear(8, 24, kernel_init=torch_kernel_init, rngs=other_rngs)
    linear.bias[...] = jax.random.normal(jax.random.key(1), (24,))
    assert rngs.params() == other_rngs.params()
    np.testing.assert_array_equal(layer.kernel[...].reshape(8, 24), linear.kernel[...])
    assert not layer.bias[...].any()
    layer.bias[...] = linear.bias[...].reshape(3, 8)
    x = jax.random.normal(jax.random.key(2), (2, 5, 8))
    np.testing.assert_array_equal(layer(x).reshape(2, 5, 24), linear(x))


def test_the_aggregator_starts_from_the_bound_of_the_fused_matrix():
    model = create_model("stam_tiny", width=32, depth=1)
    name = "aggregate.transformer_enc.layers.0.self_attn.in_proj_weight"
    weight, bound = split_params(model)[1][name], (6 / (32 + 96)) ** 0.5
    assert weight.shape == (32, 3, 32)
    assert 0.99 * bound < abs(weight).max() <= bound
