"""Tests of jaxvid/models/implementation.py: all choices compute the same network."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid import load_model, save_model
from jaxvid.config import check_names
from jaxvid.errors import InputError
from jaxvid.models import (
    abstract_model,
    create_model,
    make_model_config,
    merge_params,
    split_params,
)
from jaxvid.models.implementation import CHOICES, FASTEST, choose
from jaxvid.models.layers import attend
from jaxvid.storage.model_card import load_card

SIZES = {"width": 16, "depth": 3, "heads": 2, "image_size": 32, "drop_path": 0.3}
BASE = {"attention": "matmul", "scan": "on", "remat": "none"}
OTHERS = [
    {"attention": "xla"},
    {"scan": "off", "remat": "dots"},
    {"attention": "xla", "scan": "off", "remat": "full"},
]


@functools.cache
def weights(name):
    return split_params(create_model(name, **SIZES))[1]


def gradient_program(name, **choices):
    """Return the lowered gradient of the summed logits, and its arguments."""
    graphdef, _ = abstract_model(make_model_config(name, **SIZES, **choices))
    video = np.random.default_rng(0).normal(size=(2, 8, 32, 32, 3)).astype(np.float32)

    def loss_fn(params, video):
        logits = merge_params(graphdef, params)(video, key=jax.random.key(3))
        return logits.sum(), logits

    arguments = weights(name), video
    return jax.jit(jax.grad(loss_fn, has_aux=True)).lower(*arguments), arguments


@pytest.fixture(scope="module", params=["xvit_tiny", "stam_tiny"])
def base(request):
    """Return the name of a network, and its gradient and logits with the choices `BASE`."""
    lowered, arguments = gradient_program(request.param, **BASE)
    return request.param, lowered.as_text(), *lowered.compile()(*arguments)


@pytest.mark.parametrize(
    "choices",
    [*(pytest.param(choices, marks=pytest.mark.full) for choices in OTHERS[:-1]), OTHERS[-1]],
    ids=lambda choices: ",".join(f"{k}={v}" for k, v in choices.items()),
)
def test_choices_give_the_same_logits_and_gradients(base, choices):
    name, text, gradient, logits = base
    lowered, arguments = gradient_program(name, **BASE | choices)
    assert lowered.as_text() != text
    other_gradient, other_logits = lowered.compile()(*arguments)
    np.testing.assert_allclose(other_logits, logits, rtol=1e-5, atol=1e-6)
    assert np.abs(logits).max() > 0.1
    for key, grad in gradient.items():
        np.testing.assert_allclose(other_gradient[key], grad, rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", ["xvit_tiny", "stam_tiny"])
def test_rematerialisation_repeats_matrix_products(name):
    products = []
    for remat in CHOICES["remat"]:
        lowered, _ = gradient_program(name, **BASE | {"remat": remat})
        products.append(lowered.as_text().count("dot_general"))
    assert products[0] < products[1] < products[2]


def test_scan_off_unrolls_the_blocks():
    scanned, unrolled = (
        gradient_program("xvit_tiny", **BASE | {"scan": scan})[0].as_text().count("dot_general")
        for scan in ("on", "off")
    )
    assert unrolled > 1.2 * scanned


def test_attention_implementations_agree_in_bfloat16():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 3, 17, 32), jnp.bfloat16)
    expected = attend(*(x.astype(jnp.float32) for x in (q, k, v)), 4)
    for implementation in ("matmul", "xla"):
        mixed = attend(q, k, v, 4, implementation=implementation)
        assert mixed.dtype == jnp.bfloat16
        np.testing.assert_allclose(mixed.astype(np.float32), expected, atol=0.02)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
def test_cudnn_attention_agrees():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 3, 197, 128), jnp.bfloat16)
    expected = attend(q, k, v, 2)
    mixed = attend(q, k, v, 2, implementation="cudnn")
    np.testing.assert_allclose(mixed.astype(np.float32), expected.astype(np.float32), atol=0.02)


def test_one_query_uses_matrix_products():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 9, 8))

    def lower(num_queries, implementation):
        run = functools.partial(attend, heads=2, implementation=implementation)
        return jax.jit(run).lower(q[:, :, :num_queries], k, v).as_text()

    assert lower(1, "xla") == lower(1, "matmul")
    assert lower(2, "xla") != lower(2, "matmul")


def test_auto_uses_the_measured_choices_of_the_backend(monkeypatch):
    monkeypatch.setitem(FASTEST, "tpu", {"attention": "xla", "scan": "off"})
    assert (choose("attention", "auto"), choose("scan", "auto")) == ("matmul", "on")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert (choose("attention", "auto"), choose("scan", "auto")) == ("xla", "off")
    assert choose("attention", "matmul") == "matmul"
    monkeypatch.setattr(jax, "default_backend", lambda: "new")
    assert choose("scan", "auto") == FASTEST["cpu"]["scan"]
    for values in FASTEST.values():
        assert all(value in CHOICES[field][1:] for field, value in values.items())


def test_invalid_choices_are_refused():
    for overrides, message in (
        (
            {"attention": "flash"},
            "attention='flash': must be one of 'auto', 'matmul', 'xla', 'cudnn'",
        ),
        ({"scan": True}, "scan=True: expected type str"),
        ({"remat": "dot"}, "remat='dot': must be one of 'none', 'dots', 'full'"),
        ({"attention": "cudnn"}, "attention='cudnn' needs dtype='bfloat16', not 'float32'"),
    ):
        with pytest.raises(InputError, match=message):
            make_model_config("xvit_tiny", **overrides)
    model = create_model("xvit_tiny", **SIZES, attention="cudnn", dtype="bfloat16")
    with pytest.raises(InputError, match="attention=cudnn: needs an NVIDIA GPU, but the backend"):
        model(jnp.zeros((1, 8, 32, 32, 3)))


def test_choices_are_not_stored_with_the_weights(tmp_path):
    model = create_model("xvit_tiny", **SIZES, attention="xla", scan="off", remat="full")
    save_model(model, tmp_path / "model")
    config = load_card(tmp_path / "model")["config"]
    assert not CHOICES.keys() & config.keys()
    assert load_model(tmp_path / "model").config == make_model_config("xvit_tiny", **SIZES)


def test_older_model_folders_with_a_boolean_remat_are_read(tmp_path):
    save_model(create_model("xvit_tiny", **SIZES), tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    card = json.loads(path.read_text())
    card["config"]["remat"] = True
    path.write_text(json.dumps(card))
    assert load_model(tmp_path / "model").config.remat == "full"
    with pytest.raises(InputError, match="model.remat='true': was renamed to 'full'"):
        check_names({"model": {"remat": "true"}})
