"""Model folders and checkpoints of older versions are read into the current shapes of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxvid
from jaxvid.distributed import sharding
from jaxvid.errors import InputError
from jaxvid.models import abstract_model, family_of, make_model_config, split_params
from jaxvid.models.family import QKV_WEIGHTS
from jaxvid.storage import model_card, model_folder
from jaxvid.training import checkpoint, steps
from jaxvid.training.optim import OptimizerConfig
from jaxvid.training.step_program import make_step_program

TINY = {"width": 16, "depth": 2, "heads": 4, "image_size": 32}
MODELS = ("xvit_tiny", "stam_tiny")


def make_mesh():
    return sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, tensor=2))


def as_older(tree):
    """Return a tree with queries, keys and values in one axis, as older versions stored them."""

    def rule(path, leaf):
        if not str(getattr(path[-1], "key", "")).endswith(QKV_WEIGHTS):
            return leaf
        return jnp.reshape(leaf, (*leaf.shape[:-2], -1))

    return jax.tree_util.tree_map_with_path(rule, tree)


def save_older_folder(folder, name, **overrides):
    """Save a network in the older shapes and return its weights in the current ones."""
    model = jaxvid.create_model(name, **{**TINY, **overrides}, seed=3)
    params = split_params(model)[1]
    card = model_card.make_card(model.config, preprocessing=None, labels=None, provenance={})
    older = as_older(params)
    assert sum(older[key].shape != params[key].shape for key in params) >= 4
    model_folder.save_model_folder(folder, older, card)
    return params


def check_equal(restored, expected):
    """Check that two trees have the same values, shapes and dtypes."""
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    for (path, leaf), array in zip(leaves, jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == array.dtype, path
        np.testing.assert_array_equal(jax.device_get(leaf), jax.device_get(array), err_msg=path)


@pytest.mark.parametrize("name", MODELS)
def test_model_folders(name, tmp_path):
    params = save_older_folder(tmp_path / "older", name)
    model = jaxvid.load_model(tmp_path / "older")
    check_equal(split_params(model)[1], params)
    jaxvid.save_model(model, tmp_path / "newer")
    check_equal(split_params(jaxvid.load_model(tmp_path / "newer"))[1], params)


@pytest.mark.parametrize("name", MODELS)
def test_model_folders_are_restored_onto_a_mesh(name, tmp_path):
    params = save_older_folder(tmp_path / "older", name)
    config = make_model_config(name, **TINY)
    splits = family_of(config).tensor_splits(config)
    abstract = sharding.with_sharding(abstract_model(config)[1], make_mesh(), splits)
    restored = model_folder.load_params(tmp_path / "older", abstract)
    check_equal(restored, params)
    for key, leaf in restored.items():
        assert leaf.sharding.is_equivalent_to(abstract[key].sharding, leaf.ndim), key


def test_model_folders_initialise_networks_with_other_parts(tmp_path):
    """The weights of the temporal head are read into host memory, and are not used."""
    params = save_older_folder(tmp_path / "older", "xvit_tiny")
    model = jaxvid.create_model("xvit_tiny", **TINY, head="mean", num_classes=3, seed=4)
    fresh = split_params(model)[1]
    restored, lines = model_folder.load_init(tmp_path / "older", model.config, fresh)
    assert "unused: consensus: not in the model (18 weights)" in lines
    names = [key for key in fresh if not key.startswith("new_fc.")]
    check_equal({key: restored[key] for key in names}, {key: params[key] for key in names})


def test_folders_of_a_different_width_are_refused(tmp_path):
    """With the width 16, (16, 48) is not the older shape of (32, 3, 32)."""
    params = save_older_folder(tmp_path / "older", "xvit_tiny")
    wider = abstract_model(make_model_config("xvit_tiny", **{**TINY, "width": 32}))[1]
    message = r"attn.qkv.kernel: \(16, 48\) in the folder, \(32, 3, 32\) in the model"
    with pytest.raises(InputError, match=message):
        model_folder.load_params(tmp_path / "older", wider)
    # Only queries, keys and values were stored in another shape.
    name = "base_model.blocks.0.attn.proj.kernel"
    card = model_card.load_card(tmp_path / "older")
    flat = {**params, name: params[name].reshape(-1)}
    model_folder.save_model_folder(tmp_path / "flat", flat, card)
    with pytest.raises(InputError, match=rf"{name}: \(256,\) in the folder, \(16, 16\) in the mod"):
        jaxvid.load_model(tmp_path / "flat")


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints(name, tmp_path):
    """Weights, their moving average and the optimizer's moments are restored onto a mesh."""

    class Log:
        def get_state(self):
            return {"steps": 3}

        def set_state(self, state):
            assert state == {"steps": 3}

    program = make_step_program(
        make_model_config(name, **TINY),
        OptimizerConfig(name="adamw"),
        steps.Recipe(seed=0, ema_decay=0.9),
        schedule=lambda step: 0.0 * step,
        mesh=make_mesh(),
        batch_size=8,
    )
    rng, abstract = np.random.default_rng(0), program.abstract_state
    state = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 100, leaf.dtype), abstract
    )
    state["step"] = jnp.asarray(7)
    manager = checkpoint.make_manager(tmp_path, keep=1)
    checkpoint.save_checkpoint(manager, as_older(state), {"log": Log()})
    checkpoint.finish_saving(manager)
    manager.close()

    manager, restored = checkpoint.restore_newest(tmp_path, abstract, {"log": Log()}, keep=1)
    manager.close()
    check_equal(restored, state)
    for leaf, target in zip(*map(jax.tree.leaves, (restored, abstract)), strict=True):
        assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)
    restored = checkpoint.restore_params(tmp_path, 7, abstract["params"])
    check_equal(restored, state["ema"])
    for key, leaf in restored.items():
        assert leaf.sharding.is_equivalent_to(abstract["params"][key].sharding, leaf.ndim)
