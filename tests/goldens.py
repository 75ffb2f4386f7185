"""Reads tests/golden: numbers that the original PyTorch programs produced on synthetic weights."""

import json
from pathlib import Path

import numpy as np

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


def torch_name(name: str) -> str:
    """The state_dict key that a weight of ours goes by."""
    path, leaf = name.rsplit(".", 1)
    return f"{path}.weight" if leaf in ("kernel", "scale") else name


def to_torch(name: str, array) -> np.ndarray:
    """A weight of ours as torch stores it: kernels have their output axis first."""
    array = np.asarray(array)
    if name.endswith(".kernel"):
        return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
    return array


def from_torch(name: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`."""
    if name.endswith(".kernel"):
        return array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
    return array


def params(abstract: dict, seed: int) -> dict:
    """Synthetic weights for every weight in `abstract`, in our layout."""
    out = {}
    for name, leaf in abstract.items():
        shape = to_torch(name, np.empty(leaf.shape, bool)).shape
        out[name] = from_torch(name, synthetic_param(torch_name(name), shape, seed))
    return out
