"""Access to tests/golden: results of the original PyTorch code with synthetic weights."""

import json
from pathlib import Path

import jax
import numpy as np

from jaxvid.models import ModelConfig, Params, abstract_model, merge_params
from jaxvid.weights import rules
from tests.golden.synthetic import synthetic_clip, synthetic_param

FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> dict:
    """Return the arrays of a golden file, with `config` and `manifest` parsed, and its `clip`."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        golden = dict(arrays)
    for key in ("config", "manifest"):
        golden[key] = json.loads(str(golden[key]))
    golden["clip"] = synthetic_clip(tuple(golden["clip_shape"]), int(golden["clip_seed"]))
    return golden


def load_full(name: str) -> dict:
    """Return the arrays of a full-size golden file and its `clip`; `name` is the model's preset."""
    with np.load(FOLDER / "full" / f"{name}.npz") as arrays:
        golden = dict(arrays)
    golden["clip"] = synthetic_clip(tuple(golden["clip_shape"]), int(golden["clip_seed"]))
    return golden


def outputs(config: ModelConfig, params: Params, clip: np.ndarray) -> dict[str, jax.Array]:
    """Return the `logits`, `frame_features` and `video_features` of a network."""
    graphdef, _ = abstract_model(config)

    @jax.jit
    def run(params: Params, clip: jax.Array) -> dict[str, jax.Array]:
        model = merge_params(graphdef, params)
        features = model.features(clip)
        return {
            "logits": model(clip),
            "frame_features": features["frames"],
            "video_features": features["video"],
        }

    return run(params, clip)


def differences(golden: dict, outputs: dict[str, jax.Array]) -> dict[str, float]:
    """Return the largest difference of each output that the golden file has."""
    return {
        name: float(abs(np.asarray(output, np.float32) - golden[name]).max())
        for name, output in outputs.items()
        if name in golden
    }


def params(abstract: dict, seed: int) -> dict:
    """Return synthetic values of all weights in `abstract`, in jaxvid's layout.

    Args:
        abstract: Shapes of the weights, by name.
        seed: The `param_seed` of a golden file.
    """
    return {
        name: rules.from_torch(
            name,
            synthetic_param(rules.torch_key(name), rules.torch_shape(name, leaf.shape), seed),
        )
        for name, leaf in abstract.items()
    }


def assert_forward(golden: dict, graphdef, params: dict, get_vit) -> None:
    """Check that logits and block outputs differ from the original implementation by at most 1e-5.

    Args:
        golden: The result of `load`.
        graphdef: Structure of the network.
        params: Weights of the network.
        get_vit: Function that returns the part of a network that has `embed` and `blocks`.
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
    """Check the norm and sampled entries of each array against the original implementation.

    The relative tolerance is 1e-4.

    Args:
        golden: The result of `load`.
        kind: `grad` (gradients) or `final` (weights after training).
        arrays: One array per weight; the keys are jaxvid's names of the weights.
    """
    for key, array in arrays.items():
        array = rules.to_torch(key, np.asarray(array)).astype(np.float64).ravel()
        norm = golden[f"{kind}_norm/{rules.torch_key(key)}"]
        np.testing.assert_allclose(np.linalg.norm(array), norm, rtol=1e-4, err_msg=key)
        sample = golden[f"{kind}_sample/{rules.torch_key(key)}"]
        positions = np.linspace(0, array.size - 1, len(sample)).astype(int)
        # The tolerance of the samples is relative to the largest sample or the array's root mean
        # square, whichever is larger, because single entries can be zero.
        scale = max(np.abs(sample).max(), norm / np.sqrt(array.size))
        np.testing.assert_allclose(array[positions], sample, rtol=0, atol=1e-4 * scale, err_msg=key)


def assert_blocks(golden: dict, blocks: list) -> None:
    """Check that class tokens and token means of recorded blocks differ by at most 1e-5."""
    recorded = {int(key.split("/")[1]) for key in golden if key.startswith("block/")}
    assert {0, len(blocks) - 1} <= recorded
    for i in recorded:
        x = blocks[i].reshape(-1, *blocks[i].shape[2:])  # (b·t n d)
        np.testing.assert_allclose(x[:, 0], golden[f"block/{i}/cls"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(x.mean(1), golden[f"block/{i}/mean"], rtol=0, atol=1e-5)
