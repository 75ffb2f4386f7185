"""The precision of every matrix product, read from the lowered StableHLO."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvid.models import FAMILIES, abstract_model, create_model, make_model_config, merge_params
from jaxvid.models.precision import DTYPES
from jaxvid.training.steps import Recipe, init_state, train_step

TINY = {"width": 16, "depth": 2, "image_size": 32, "patch_size": 16}
EXPECTED = {"float32": "HIGHEST", "tfloat32": "HIGH", "bfloat16": "DEFAULT"}
PLATFORMS = ("cpu", "cuda")


def precisions(text: str) -> list[str]:
    """Return the precision of each operand of each `dot_general` in a StableHLO program."""
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert "stablehlo.convolution" not in text
    matches = [re.search(r"precision = \[(\w+), (\w+)\]", line) for line in lines]
    return [name for match in matches for name in (match.groups() if match else ("DEFAULT",) * 2)]


def lower(function, *arguments, platform):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("name", "attention", "dtype"),
    [
        *((name, "matmul", dtype) for name in ("xvit_tiny", "stam_tiny") for dtype in DTYPES),
        ("xvit_tiny", "xla", "float32"),
    ],
)
def test_all_products_of_a_training_step_have_the_precision_of_the_dtype(
    name, attention, dtype, platform
):
    config = make_model_config(name, dtype=dtype, attention=attention, drop_path=0.1, **TINY)
    graphdef, params = abstract_model(config)
    optimizer, recipe = optax.adam(1e-3), Recipe(seed=0)
    init = functools.partial(init_state, optimizer=optimizer, recipe=recipe)
    state = jax.eval_shape(init, params)
    shapes = {"video": ((2, 8, 32, 32, 3), jnp.uint8), "label": ((2,), jnp.int32)}
    shapes |= {"mask": ((2,), jnp.bool_)}
    batch = {key: jax.ShapeDtypeStruct(*shape) for key, shape in shapes.items()}
    options = {"graphdef": graphdef, "optimizer": optimizer, "recipe": recipe}
    step = functools.partial(train_step, **options)
    actual = precisions(lower(step, state, batch, platform=platform))
    assert len(actual) > 40
    assert set(actual) == {EXPECTED[dtype]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["xvit_tiny", "stam_tiny"])
def test_all_methods_of_a_network_have_the_precision_of_the_dtype(name, dtype):
    """The clip is larger than `image_size`, so that the positional embedding is resized."""
    graphdef, params = abstract_model(make_model_config(name, dtype=dtype, **TINY))
    clip = jax.ShapeDtypeStruct((1, 8, 48, 48, 3), jnp.float32)
    for method in ("__call__", "features", "attention"):
        run = lambda p, x, method=method: getattr(merge_params(graphdef, p), method)(x)  # noqa: E731
        actual = precisions(lower(run, params, clip, platform="cuda"))
        # `jax.image.resize` always uses the highest precision.
        assert set(actual) in ({EXPECTED[dtype]}, {EXPECTED[dtype], "HIGHEST"})
        assert actual.count(EXPECTED[dtype]) > 10


def test_dtypes_change_rounding_only():
    clip = np.random.default_rng(0).normal(size=(1, 8, 32, 32, 3)).astype(np.float32)
    logits = {
        dtype: np.asarray(jax.jit(create_model("xvit_tiny", dtype=dtype, **TINY))(clip))
        for dtype in DTYPES
    }
    assert {values.dtype for values in logits.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(logits["tfloat32"], logits["float32"])  # the same on a CPU
    difference = np.abs(logits["bfloat16"] - logits["float32"]).max()
    assert 0 < difference < 0.05


def test_every_family_is_covered():
    assert set(FAMILIES) == {"stam", "xvit"}
