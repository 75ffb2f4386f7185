"""Weight transfer to networks that differ in sizes, classes or parts."""

import dataclasses
import json
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxvid
from jaxvid.distributed import sharding
from jaxvid.errors import InputError
from jaxvid.models import (
    FAMILIES,
    abstract_model,
    family_of,
    make_model_config,
    merge_params,
    split_params,
    transfer,
)
from jaxvid.models.resize import resize_pos_embed, resize_time
from jaxvid.storage import model_folder

XVIT = {"name": "xvit_tiny", "num_classes": 8, "width": 16, "depth": 1, "image_size": 32}
STAM = {
    **{"name": "stam_8", "num_classes": 8, "width": 16, "depth": 1, "heads": 2, "image_size": 32},
    **{"temporal_depth": 2, "temporal_heads": 2, "temporal_mlp": 32, "dropout": 0.0},
}


def random_network(options: dict, seed: int) -> tuple:
    """Return the structure and random weights of a network; not even biases are zero."""
    graphdef, abstract = abstract_model(make_model_config(**options))
    rng = np.random.default_rng(seed)
    return graphdef, {
        name: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32)
        for name, leaf in abstract.items()
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write a model folder for each network and return their parent."""
    root = tmp_path_factory.mktemp("folders")
    sizes = {
        "xvit": XVIT,
        "xvit_mean": {**XVIT, "head": "mean"},
        "stam": STAM,
        "stam_mean": {**STAM, "aggregator": "mean"},
    }
    for name, options in sizes.items():
        jaxvid.save_model(merge_params(*random_network(options, seed=1)), root / name)
    return root


def transfer_weights(folder, options: dict):
    """Initialise a network with the weights of a model folder.

    Returns:
        The network, the folder's weights, the network's weights before the transfer, and the lines
        of the log.
    """
    graphdef, fresh = random_network(options, seed=2)
    params, lines = model_folder.load_init(folder, make_model_config(**options), fresh)
    source = split_params(jaxvid.load_model(folder))[1]
    return merge_params(graphdef, params), source, fresh, lines


@jax.jit
def run(model, video):
    """Return the logits and the features of clips."""
    return model(video), model.features(video)


def random_clips(options: dict) -> jax.Array:
    """Return two random clips for a network with these options."""
    size = options["image_size"]
    shape = (2, options.get("num_frames", 8), size, size, 3)
    return jnp.asarray(np.random.default_rng(0).uniform(size=shape), jnp.float32)


def refusal(folder, options: dict) -> str:
    """Return the error message of a refused transfer: a single line that names the folder."""
    with pytest.raises(InputError) as error:
        model_folder.load_init(folder, make_model_config(**options), random_network(options, 2)[1])
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("side", "new"), [(2, 3), (4, 2), (3, 3)])
def test_patch_grids_are_resized_as_in_torch(side, new):
    embed = np.random.default_rng(0).normal(size=(1, 1 + side**2, 5)).astype(np.float32)
    resized = resize_pos_embed(jnp.asarray(embed), (new, new))
    grid = torch.from_numpy(embed[:, 1:].reshape(1, side, side, 5)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (new, new), mode="bicubic")
    expected = grid.permute(0, 2, 3, 1).reshape(1, new**2, 5)
    np.testing.assert_array_equal(resized[:, 0], embed[:, 0])
    np.testing.assert_allclose(resized[:, 1:], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("t", "new"), [(8, 16), (16, 8), (16, 3), (1, 4), (4, 1)])
@pytest.mark.parametrize("leading_rows", [0, 1])
def test_frame_rows_are_interpolated_between_their_centres(t, new, leading_rows):
    embed = np.random.default_rng(0).normal(size=(1, leading_rows + t, 5)).astype(np.float32)
    resized = resize_time(jnp.asarray(embed), new, leading_rows=leading_rows)
    positions = (np.arange(new) + 0.5) * t / new - 0.5
    expected = [np.interp(positions, np.arange(t), row) for row in embed[0, leading_rows:].T]
    np.testing.assert_array_equal(resized[:, :leading_rows], embed[:, :leading_rows])
    expected = np.stack(expected, -1)
    # A float32 position near 13 has an error of up to 1e-6, which the interpolation multiplies by
    # the difference of two rows.
    np.testing.assert_allclose(resized[0, leading_rows:], expected, rtol=0, atol=1e-5)
    # Between the outermost centres, a ramp of frame numbers gives the positions themselves.
    ramp = jnp.arange(t, dtype=jnp.float32).reshape(1, t, 1, 1)
    inside = (positions >= 0) & (positions <= t - 1)
    resized = resize_time(ramp, new, leading_rows=0)
    assert resized.shape == (1, new, 1, 1)
    np.testing.assert_allclose(resized[0, inside, 0, 0], positions[inside], rtol=0, atol=1e-5)


class Case(NamedTuple):
    """A transfer of weights, and its expected result.

    Attributes:
        folder: Name of the model folder.
        options: Options of the new model.
        resized: Weights that are resized.
        reinitialised: Prefixes of the weights that keep their initial values.
        unused: Prefixes of the folder's weights that are not used.
        report: Lines of the log after the first, which is the number of loaded weights.
    """

    folder: str
    options: dict
    resized: tuple[str, ...] = ()
    reinitialised: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    report: tuple[str, ...] = ()


CASES = {
    "the same": Case("xvit", XVIT),
    "xvit classes": Case(
        "xvit",
        {**XVIT, "num_classes": 3},
        reinitialised=("consensus.mlp_head.4.",),
        report=(
            "reinitialised: consensus.mlp_head.4: 8 classes in the folder, 3 in the model "
            "(2 weights)",
        ),
    ),
    "xvit_mean classes": Case(
        "xvit_mean",
        {**XVIT, "head": "mean", "num_classes": 3},
        reinitialised=("new_fc.",),
        report=("reinitialised: new_fc: 8 classes in the folder, 3 in the model (2 weights)",),
    ),
    "stam classes": Case(
        "stam",
        {**STAM, "num_classes": 9},
        reinitialised=("head.",),
        report=("reinitialised: head: 8 classes in the folder, 9 in the model (2 weights)",),
    ),
    "xvit resolution": Case(
        "xvit",
        {**XVIT, "image_size": 48},
        resized=("base_model.pos_embed",),
        report=("resized: base_model.pos_embed: 2×2 → 3×3 patches, bicubically",),
    ),
    "stam resolution": Case(
        "stam",
        {**STAM, "image_size": 64},
        resized=("pos_embed",),
        report=("resized: pos_embed: 2×2 → 4×4 patches, bicubically",),
    ),
    "stam frames": Case(
        "stam",
        {**STAM, "num_frames": 16},
        resized=("aggregate.pos_embed",),
        report=("resized: aggregate.pos_embed: 8 → 16 frames, linearly",),
    ),
    "a different preset of the family": Case(
        "stam",
        {**STAM, "name": "stam_32", "num_frames": 32},
        resized=("aggregate.pos_embed",),
        report=("resized: aggregate.pos_embed: 8 → 32 frames, linearly",),
    ),
    "xvit frames": Case("xvit", {**XVIT, "num_frames": 16}),
    "xvit temporal embedding": Case(
        "xvit",
        {**XVIT, "temporal_embedding_frames": 4},
        resized=("base_model.temp_embed",),
        report=("resized: base_model.temp_embed: 8 → 4 frames, linearly",),
    ),
    "no temporal embedding": Case(
        "xvit",
        {**XVIT, "temporal_embedding_frames": 0},
        unused=("base_model.temp_embed",),
        report=("unused: base_model.temp_embed: not in the model (1 weight)",),
    ),
    "no temporal head": Case(
        "xvit",
        {**XVIT, "head": "mean"},
        reinitialised=("new_fc.",),
        unused=("consensus.",),
        report=(
            "reinitialised: new_fc: not in the folder (2 weights)",
            "unused: consensus: not in the model (18 weights)",
            "differs: head: 'attention' in the folder, 'mean' in the config",
        ),
    ),
    "a temporal head": Case(
        "xvit_mean",
        XVIT,
        reinitialised=("consensus.",),
        unused=("new_fc.",),
        report=(
            "reinitialised: consensus: not in the folder (18 weights)",
            "unused: new_fc: not in the model (2 weights)",
            "differs: head: 'mean' in the folder, 'attention' in the config",
        ),
    ),
    "a deeper temporal head": Case(
        "xvit",
        {**XVIT, "head_depth": 3},
        reinitialised=("consensus.temporal_encoder.1.", "consensus.temporal_encoder.2."),
        report=(
            "reinitialised: consensus.temporal_encoder.1: not in the folder (11 weights)",
            "reinitialised: consensus.temporal_encoder.2: not in the folder (11 weights)",
            "differs: head_depth: 1 in the folder, 3 in the config",
        ),
    ),
    "an aggregator": Case(
        "stam_mean",
        {**STAM, "temporal_heads": 4},
        reinitialised=("aggregate.",),
        report=(
            "reinitialised: aggregate: not in the folder (28 weights)",
            "differs: aggregator: 'mean' in the folder, 'transformer' in the config",
            "differs: temporal_heads: 2 in the folder, 4 in the config",
        ),
    ),
    "a shallower aggregator": Case(
        "stam",
        {**STAM, "temporal_depth": 1},
        unused=("aggregate.transformer_enc.layers.1.",),
        report=(
            "unused: aggregate.transformer_enc.layers.1: not in the model (12 weights)",
            "differs: temporal_depth: 2 in the folder, 1 in the config",
        ),
    ),
    "different shifts": Case(
        "xvit",
        {**XVIT, "shift_div": 8, "shift_blocks": (0,), "dropout": 0.2},
        report=(
            "differs: shift_blocks: [] in the folder, [0] in the config",
            "differs: shift_div: 4 in the folder, 8 in the config",
        ),
    ),
    "several changes": Case(
        "stam",
        {**STAM, "num_classes": 3, "num_frames": 4, "image_size": 64, "temporal_depth": 3},
        resized=("pos_embed", "aggregate.pos_embed"),
        reinitialised=("head.", "aggregate.transformer_enc.layers.2."),
        report=(
            "resized: aggregate.pos_embed: 8 → 4 frames, linearly",
            "resized: pos_embed: 2×2 → 4×4 patches, bicubically",
            "reinitialised: aggregate.transformer_enc.layers.2: not in the folder (12 weights)",
            "reinitialised: head: 8 classes in the folder, 3 in the model (2 weights)",
            "differs: temporal_depth: 2 in the folder, 3 in the config",
        ),
    ),
}

# Cases whose new network is also run.
RUN_CASES = (
    "xvit temporal embedding",
    "a deeper temporal head",
    "an aggregator",
    "several changes",
)


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_loaded_resized_or_reinitialised(case, folders):
    folder, options, resized, reinitialised, unused, report = CASES[case]
    model, source, fresh, lines = transfer_weights(folders / folder, options)
    params = split_params(model)[1]
    plan = transfer.plan_transfer(family_of(model.config), source, fresh)
    fresh_names = sum(plan.reinitialised.values(), [])
    # Each weight is in exactly one of the lists.
    assert sorted([*plan.loaded, *plan.resized, *fresh_names]) == sorted(fresh)
    assert sum(plan.unused.values(), []) == [name for name in source if name.startswith(unused)]
    assert sorted(plan.resized) == sorted(resized)
    assert fresh_names == [name for name in fresh if name.startswith(reinitialised)]
    assert lines == [f"loaded: {len(plan.loaded)} weights", *report]
    for name, array in params.items():
        assert array.shape == fresh[name].shape
        if name in plan.loaded:
            np.testing.assert_array_equal(array, source[name])
            assert (np.asarray(array) != np.asarray(fresh[name])).any(), name
        elif name in fresh_names:
            np.testing.assert_array_equal(array, fresh[name])
    if case in RUN_CASES:
        logits, _ = run(model, random_clips(options))
        assert logits.shape == (2, options["num_classes"])
        assert np.isfinite(logits).all()


def test_resized_embeddings_have_the_interpolated_values(folders):
    options = {**STAM, "num_frames": 4, "image_size": 64}
    model, source, _, _ = transfer_weights(folders / "stam", options)
    np.testing.assert_array_equal(
        model.pos_embed[...], resize_pos_embed(source["pos_embed"], (4, 4))
    )
    rows = source["aggregate.pos_embed"]
    resized_rows = model.aggregate.pos_embed[...]
    np.testing.assert_array_equal(resized_rows[:, 0], rows[:, 0])
    np.testing.assert_allclose(
        resized_rows[:, 1:], (rows[:, 1::2] + rows[:, 2::2]) / 2, rtol=0, atol=1e-6
    )
    options = {**XVIT, "temporal_embedding_frames": 4}
    model, source, _, _ = transfer_weights(folders / "xvit", options)
    rows = source["base_model.temp_embed"]
    expected = (rows[:, ::2] + rows[:, 1::2]) / 2
    np.testing.assert_allclose(model.base_model.temp_embed[...], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("folder", "options"), [("xvit", XVIT), ("stam", STAM)])
def test_a_new_class_head_does_not_change_the_features(folder, options, folders):
    model, _, _, _ = transfer_weights(folders / folder, {**options, "num_classes": 3})
    source, video = jaxvid.load_model(folders / folder), random_clips(options)
    _, expected = run(source, video)
    logits, features = run(model, video)
    assert logits.shape == (2, 3)
    assert expected.keys() == features.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(features[name], array)


@pytest.mark.parametrize(("family", "options"), [("xvit", XVIT), ("stam", STAM)])
def test_class_head_is_loaded_only_for_the_same_classes_in_the_same_order(
    family, options, tmp_path
):
    """A head with the classes in a different order would be wrong without an error."""
    names = [*"abcdefgh"]
    source = merge_params(*random_network(options, seed=1))
    jaxvid.save_model(source, tmp_path / "m", labels=names)
    config, fresh = make_model_config(**options), random_network(options, seed=2)[1]
    for labels, reason in (
        (names, None),
        ([str(i) for i in range(8)], None),  # no names to compare
        (names[::-1], "different classes: class 0 is 'a' in the model, 'h' in the data"),
    ):
        params, lines = model_folder.load_init(tmp_path / "m", config, fresh, labels)
        unchanged = [name for name in params if np.array_equal(params[name], fresh[name])]
        assert len(unchanged) == (2 if reason else 0)
        assert all(name.startswith(FAMILIES[family].class_heads) for name in unchanged)
        if reason:
            assert any(reason in line for line in lines)


def test_transferred_weights_get_the_sharding_of_the_initial_weights(folders):
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=4, tensor=1))
    options = {**STAM, "num_classes": 4, "num_frames": 11, "image_size": 48}
    config, fresh = make_model_config(**options), random_network(options, seed=2)[1]
    splits = FAMILIES["stam"].tensor_splits(config)
    fresh = jax.device_put(fresh, sharding.state_sharding(fresh, mesh, splits))
    params, _ = model_folder.load_init(folders / "stam", config, fresh)
    unsharded = split_params(transfer_weights(folders / "stam", options)[0])[1]
    head = ("head.kernel", "head.bias")
    for name, array in params.items():
        assert array.sharding == fresh[name].sharding, name
        expected = fresh[name] if name in head else unsharded[name]
        np.testing.assert_array_equal(jax.device_get(array), jax.device_get(expected))
    assert len(params["aggregate.pos_embed"].sharding.device_set) == 8


def test_incompatible_networks_are_refused_with_every_difference(folders):
    message = refusal(folders / "xvit", {**XVIT, "width": 32, "depth": 3, "num_classes": 5})
    for part in (
        f"{folders / 'xvit'} cannot initialise xvit_tiny: depth: 1 in the folder, 3 in the config",
        "; width: 16 in the folder, 32 in the config; ",
        "base_model.blocks.*.attn.qkv.kernel: (16, 3, 16) in the folder, (32, 3, 32) in the model",
        "; consensus.mlp_head.4.kernel: (16, 8) in the folder, (32, 5) in the model",
        "; base_model.temp_embed: (1, 8, 1, 16) in the folder, (1, 8, 1, 32) in the model",
        "; base_model.blocks.1: not in the folder; base_model.blocks.2: not in the folder; ",
        "use its values with --config.model.NAME=VALUE or choose another folder",
    ):
        assert part in message
    assert message.count("blocks.1") == 1
    message = refusal(folders / "stam", {**STAM, "patch_size": 8})
    assert (
        "patch_size: 16 in the folder, 8 in the config; patch_embed.proj.kernel: (16, 16, 3, 16) "
        in message
    )
    message = refusal(folders / "stam", {**STAM, "temporal_mlp": 48, "mlp_ratio": 2})
    assert (
        "; aggregate.transformer_enc.layers.*.linear1.kernel: (16, 32) in the folder, " in message
    )
    assert (
        "mlp_ratio: 4 in the folder, 2 in the config; temporal_mlp: 32 in the folder, 48 in"
        in message
    )


def test_a_shallower_backbone_is_refused(folders, tmp_path):
    jaxvid.save_model(
        merge_params(*random_network({**XVIT, "depth": 2}, seed=1)), tmp_path / "deep"
    )
    message = refusal(tmp_path / "deep", XVIT)
    assert (
        "depth: 2 in the folder, 1 in the config; base_model.blocks.1: not in the model; "
        in message
    )


@pytest.mark.parametrize(
    ("folder", "options", "field"),
    [("xvit", XVIT, "heads"), ("stam", STAM, "heads"), ("stam", STAM, "temporal_heads")],
)
def test_a_different_number_of_heads_is_refused(folder, options, field, folders):
    message = refusal(folders / folder, {**options, field: 4})
    assert f": {field}: 2 in the folder, 4 in the config; use its values" in message


def test_a_different_family_is_refused(folders):
    message = refusal(folders / "stam", XVIT)
    assert "stam contains stam_8, of the family STAM; xvit_tiny is of the family XViT; " in message
    message = refusal(folders / "xvit", STAM)
    assert "xvit contains xvit_tiny, of the family XViT; stam_8 is of the family STAM; " in message


def test_incomplete_parts_are_problems(folders):
    source, fresh = (abstract_model(make_model_config(**STAM))[1] for _ in range(2))
    del source["aggregate.cls_token"]
    del fresh["aggregate.transformer_enc.layers.1.norm1.scale"]
    plan = transfer.plan_transfer(FAMILIES["stam"], source, fresh)
    assert plan.problems == [
        "aggregate.cls_token: not in the folder",
        "aggregate.transformer_enc.layers.1: not in the model",
    ]
    assert not plan.reinitialised
    assert not plan.unused


def test_damaged_folders_are_refused(folders, tmp_path):
    def copy(name):
        return shutil.copytree(folders / "xvit", tmp_path / name)

    truncated = copy("truncated")
    largest = max((truncated / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    assert "params is damaged: 1 of" in refusal(truncated, XVIT)
    for name, changes, expected in (
        ("option", {"size": 1}, "model.json: model xvit_tiny has no option 'size'"),
        ("preset", {"name": "vit"}, "model.json: model 'vit' does not exist"),
        ("sizes", {"width": 32}, "params does not fit the model: "),
    ):
        folder = copy(name)
        card = json.loads((folder / "model.json").read_text())
        card["config"].update(changes)
        (folder / "model.json").write_text(json.dumps(card))
        assert expected in refusal(folder, {**XVIT, "width": 32 if name == "sizes" else 16})
    card["config"] = dataclasses.asdict(make_model_config(**XVIT))
    del card["config"]["name"]
    (folder / "model.json").write_text(json.dumps(card))
    assert "model.json: " in refusal(folder, XVIT)
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere", XVIT)
