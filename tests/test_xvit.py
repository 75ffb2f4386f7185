"""XViT against the original program's numbers, and the properties that define it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.models import PRESETS, abstract_model, create_model, merge_params, split_params
from jaxvid.models.surgery import resize_pos_embed
from jaxvid.models.xvit import XViTConfig, shift_time
from tests import goldens

GOLDENS = [f"tiny/xvit_tiny_{name}" for name in ("k600", "ssv2", "48px", "256px")]


def config_of(golden: dict) -> XViTConfig:
    sizes = golden["config"]
    pos_embed = dict(golden["manifest"])["base_model.pos_embed"]
    return XViTConfig(
        name="golden",
        num_classes=sizes["num_classes"],
        num_frames=sizes["num_frames"],
        image_size=round((pos_embed[1] - 1) ** 0.5) * 16,
        width=sizes["dim"],
        depth=sizes["depth"],
        heads=sizes["heads"],
        temporal_embedding_frames=sizes["temporal_embedding_frames"],
        shift_segment=sizes["shift_segment"],
        shift_div=sizes["shift_div"],
        shift_blocks=range(sizes["depth"]),
    )


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_forward(name):
    """Logits within 1e-5 and every recorded block within 1e-5 of the original program's."""
    golden = goldens.load(name)
    graphdef, abstract = abstract_model(config_of(golden))
    assert {goldens.torch_name(key) for key in abstract} == {
        key for key, _ in golden["manifest"] if not key.startswith("new_fc.")
    }
    params = goldens.params(abstract, int(golden["param_seed"]))

    @jax.jit
    def run(params, clip):
        backbone = merge_params(graphdef, params).base_model
        x, outputs = backbone.embed(clip), []
        for block in backbone.blocks:
            x = block(x)
            outputs.append(x)
        return merge_params(graphdef, params)(clip), outputs

    logits, blocks = run(params, golden["clip"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-5)
    for i, x in enumerate(blocks):
        if f"block/{i}/cls" not in golden:
            continue
        x = x.reshape(-1, *x.shape[2:])  # (b·t n d)
        np.testing.assert_allclose(x[:, 0], golden[f"block/{i}/cls"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(x.mean(1), golden[f"block/{i}/mean"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_gradients(name):
    """Loss within 1e-6, each weight's gradient norm and samples within 1e-4 relative."""
    from jaxvid.steps import cross_entropy

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
    for key, grad in grads.items():
        grad = goldens.to_torch(key, grad).astype(np.float64).ravel()
        norm = golden[f"grad_norm/{goldens.torch_name(key)}"]
        np.testing.assert_allclose(np.linalg.norm(grad), norm, rtol=1e-4, err_msg=key)
        sample = golden[f"grad_sample/{goldens.torch_name(key)}"]
        places = np.linspace(0, grad.size - 1, len(sample)).astype(int)
        scale = max(np.abs(sample).max(), norm / np.sqrt(grad.size))
        np.testing.assert_allclose(grad[places], sample, rtol=0, atol=1e-4 * scale, err_msg=key)
