"""Reads tests/golden: numbers that the original PyTorch programs produced on synthetic weights."""

import json
from pathlib import Path

import jax
import numpy as np

from convert import rules
from jaxvid.models import merge_params
from tests.golden.synthetic import synthetic_clip, synthetic_param

FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> dict:
    """A golden's arrays, with `config` and `manifest` decoded and `clip` drawn."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        golden = dict(arrays)
    for key in ("config", "manifest"):
        golden[key] = json.loads(str(golden[key]))
    golden["clip"] = synthetic_clip(tuple(golden["clip_shape"]), int(golden["clip_seed"]))
    return golden


def params(abstract: dict, seed: int) -> dict:
    """Synthetic weights for every weight in `abstract`, in our layout."""
    return {
        name: rules.from_torch(
            name,
            synthetic_param(rules.torch_key(name), rules.torch_shape(name, leaf.shape), seed),
        )
        for name, leaf in abstract.items()
    }


def assert_forward(golden: dict, graphdef, params: dict, get_vit) -> None:
    """Logits and every recorded block within 1e-5 of the original program's.

    Args:
        golden: As `load` gives it.
        graphdef: The network's structure.
        params: Its weights.
        get_vit: Network → the part that holds `embed` and `blocks`.
    """

    @jax.jit
    def blocks_and_logits(params, clip):
        model = merge_params(graphdef, params)
        x, outputs = get_vit(model).embed(clip), []
        for block in get_vit(model).blocks:
            x = block(x)
            outputs.append(x)
        return model(clip), outputs

    logits, blocks = blocks_and_logits(params, golden["clip"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-5)
    assert_blocks(golden, blocks)


def assert_samples(golden: dict, kind: str, arrays: dict) -> None:
    """Norms and samples within 1e-4 relative of the original program's.

    Args:
        golden: As `load` gives it.
        kind: `grad` (gradients) or `final` (weights after training).
        arrays: One for each weight, under our names.
    """
    for key, array in arrays.items():
        array = rules.to_torch(key, np.asarray(array)).astype(np.float64).ravel()
        norm = golden[f"{kind}_norm/{rules.torch_key(key)}"]
        np.testing.assert_allclose(np.linalg.norm(array), norm, rtol=1e-4, err_msg=key)
        sample = golden[f"{kind}_sample/{rules.torch_key(key)}"]
        places = np.linspace(0, array.size - 1, len(sample)).astype(int)
        # Relative to the larger of the samples and the array's root mean square: single entries
        # can be zero.
        scale = max(np.abs(sample).max(), norm / np.sqrt(array.size))
        np.testing.assert_allclose(array[places], sample, rtol=0, atol=1e-4 * scale, err_msg=key)


def assert_blocks(golden: dict, blocks: list) -> None:
    """Every recorded block's class token and token mean within 1e-5 of the original program's."""
    recorded = {int(key.split("/")[1]) for key in golden if key.startswith("block/")}
    assert {0, len(blocks) - 1} <= recorded
    for i in recorded:
        x = blocks[i].reshape(-1, *blocks[i].shape[2:])  # (b·t n d)
        np.testing.assert_allclose(x[:, 0], golden[f"block/{i}/cls"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(x.mean(1), golden[f"block/{i}/mean"], rtol=0, atol=1e-5)
