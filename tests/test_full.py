"""Released models at full size: equality with the original implementations, and conversion."""

import json

import jax
import numpy as np
import pytest
import torch

import jaxvid
from convert import flax_to_torch, torch_to_flax
from convert.torch_reference import build_reference
from jaxvid.models import (
    abstract_model,
    family_of,
    make_model_config,
    merge_params,
    split_params,
)
from jaxvid.storage import model_folder
from jaxvid.weights import rules
from tests import goldens
from tests.golden.synthetic import synthetic_clip, synthetic_param
from tests.weights.server import serve

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]
# Models with recorded outputs of the original implementations.
RECORDED = ["stam_8", "stam_16", "xvit_k400", "xvit_k600", "xvit_ssv2"]
ALL = [*RECORDED, "stam_32", "stam_64"]


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a released checkpoint's weights, by name.

    If they were not recorded, they are those of the PyTorch reference.
    """
    path = goldens.FOLDER / f"full/{name}.manifest.json"
    if not path.exists():
        state = build_reference(make_model_config(name)).state_dict()
        return {key: tuple(value.shape) for key, value in state.items()}
    return {key: tuple(shape) for key, shape in json.loads(path.read_text())}


@pytest.mark.parametrize("name", RECORDED)
def test_full_size_models_equal_the_original_programs(name):
    golden, config = goldens.load_full(name), make_model_config(name)
    _, abstract = abstract_model(config)
    shapes = {rules.torch_key(key): rules.torch_shape(key, v.shape) for key, v in abstract.items()}
    # The original implementation of XViT does not use the layer `new_fc`.
    assert shapes == {k: v for k, v in manifest(name).items() if not k.startswith("new_fc.")}
    params = goldens.params(abstract, int(golden["seed"]))
    differences = goldens.differences(golden, goldens.outputs(config, params, golden["clip"]))
    print(name, {output: f"{value:.1e}" for output, value in differences.items()})
    assert max(differences.values()) <= 1e-4


@pytest.mark.parametrize("name", ["stam_8", "xvit_k600"])
def test_256_px_logits_equal_the_torch_reference(name):
    config = make_model_config(name)
    state = {
        key: torch.from_numpy(np.array(synthetic_param(key, shape, 5)))
        for key, shape in manifest(name).items()
    }
    reference = build_reference(config)
    reference.load_state_dict(state, strict=True)
    clip = synthetic_clip((1, config.num_frames, 256, 256, 3), 6)
    with torch.no_grad():
        expected = reference(torch.from_numpy(clip)).numpy()
    del reference, state
    graphdef, abstract = abstract_model(config)
    params = goldens.params(abstract, 5)
    logits = jax.jit(lambda p, c: merge_params(graphdef, p)(c))(params, clip)
    print(name, f"256 px: {float(abs(logits - expected).max()):.1e}")
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_full_size_round_trips_are_bit_identical(name, tmp_path):
    shapes = manifest(name)
    state = {
        key: torch.from_numpy(np.array(synthetic_param(key, shape, 1)))
        for key, shape in shapes.items()
    }
    state_key = "model" if name.startswith("stam") else "model_state"
    torch.save({state_key: state}, tmp_path / "in.pth")
    arguments = ["--model", name, "--input", str(tmp_path / "in.pth")]
    assert torch_to_flax.main([*arguments, "--output", str(tmp_path / "model")]) == 0
    arguments = ["--input", str(tmp_path / "model"), "--output", str(tmp_path / "out.pth")]
    assert flax_to_torch.main(arguments) == 0
    converted = torch.load(tmp_path / "out.pth", weights_only=True)[state_key]
    assert converted.keys() == state.keys()
    for key, tensor in state.items():
        if not key.startswith("new_fc."):
            assert torch.equal(converted[key], tensor), key
    assert jaxvid.load_model(tmp_path / "model").config == make_model_config(name)


@pytest.mark.parametrize(("name", "is_zip"), [("stam_16", True), ("xvit_k600", False)])
def test_full_size_weights_are_downloaded_by_name(name, is_zip, tmp_path, monkeypatch):
    state = {
        key: torch.from_numpy(np.array(synthetic_param(key, shape, 1)))
        for key, shape in manifest(name).items()
    }
    path = tmp_path / "in.pth"
    torch.save({"model": state}, path, _use_new_zipfile_serialization=is_zip)
    del state
    arguments = ["--model", name, "--input", str(path), "--output", str(tmp_path / "model")]
    assert torch_to_flax.main(arguments) == 0
    monkeypatch.setenv("JAXVID_CACHE", str(tmp_path / "cache"))
    with serve(files={"/a.pth": path.read_bytes()}, cut_after=200 * 10**6) as server:
        releases = family_of(make_model_config(name)).released_weights
        monkeypatch.setitem(releases, name, f"{server.url}/a.pth")
        model = jaxvid.load_model(name, pretrained=True)
        assert len(server.requests) > 1
    expected = jaxvid.load_model(tmp_path / "model")
    params, expected = (split_params(network)[1] for network in (model, expected))
    assert model_folder.fingerprint(params) == model_folder.fingerprint(expected)
