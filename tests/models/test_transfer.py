"""Weight transfer to networks with other sizes, classes or parts."""

import dataclasses
import json
import shutil

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
    """Return the structure and random weights of a network; biases are random too."""
    graphdef, abstract = abstract_model(make_model_config(**options))
    rng = np.random.default_rng(seed)
    return graphdef, {
        name: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32)
        for name, leaf in abstract.items()
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write a model folder per case and return their parent."""
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


def start(folder, options: dict):
    """Load a folder into another network; return it, the source and initial weights, the log."""
    graphdef, fresh = random_network(options, seed=2)
    params, lines = model_folder.load_init(folder, make_model_config(**options), fresh)
    found = split_params(jaxvid.load_model(folder))[1]
    return merge_params(graphdef, params), found, fresh, lines


@jax.jit
def run(model, video):
    return model(video), model.features(video)


def clip(options: dict) -> jax.Array:
    size = options["image_size"]
    shape = (2, options.get("num_frames", 8), size, size, 3)
    return jnp.asarray(np.random.default_rng(0).uniform(size=shape), jnp.float32)


def refused(folder, options: dict) -> str:
    with pytest.raises(InputError) as error:
        model_folder.load_init(folder, make_model_config(**options), random_network(options, 2)[1])
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("side", "new"), [(2, 3), (4, 2), (3, 3)])
def test_patch_grids_are_resized_as_in_torch(side, new):
    embed = np.random.default_rng(0).normal(size=(1, 1 + side**2, 5)).astype(np.float32)
    found = resize_pos_embed(jnp.asarray(embed), (new, new))
    grid = torch.from_numpy(embed[:, 1:].reshape(1, side, side, 5)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (new, new), mode="bicubic")
    expected = grid.permute(0, 2, 3, 1).reshape(1, new**2, 5)
    np.testing.assert_array_equal(found[:, 0], embed[:, 0])
    np.testing.assert_allclose(found[:, 1:], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("t", "new"), [(8, 16), (16, 8), (16, 3), (1, 4), (4, 1)])
@pytest.mark.parametrize("kept", [0, 1])
def test_frame_rows_are_interpolated_between_their_centres(t, new, kept):
    embed = np.random.default_rng(0).normal(size=(1, kept + t, 5)).astype(np.float32)
    found = resize_time(jnp.asarray(embed), new, leading_rows=kept)
    at = (np.arange(new) + 0.5) * t / new - 0.5
    expected = [np.interp(at, np.arange(t), row) for row in embed[0, kept:].T]
    np.testing.assert_array_equal(found[:, :kept], embed[:, :kept])
    # A float32 position near row 13 is off by up to 1e-6, times the step between two rows.
    np.testing.assert_allclose(found[0, kept:], np.stack(expected, -1), rtol=0, atol=1e-5)
    ramp = jnp.arange(t, dtype=jnp.float32).reshape(1, t, 1, 1)
    inside = (at >= 0) & (at <= t - 1)
    found = resize_time(ramp, new, leading_rows=0)
    assert found.shape == (1, new, 1, 1)
    np.testing.assert_allclose(found[0, inside, 0, 0], at[inside], rtol=0, atol=1e-5)


# folder, options of the new model, resized weights, reinitialised, unused, lines of the report
CASES = {
    "the same": ("xvit", XVIT, (), (), (), []),
    "xvit classes": (
        *("xvit", {**XVIT, "num_classes": 3}, ()),
        *(("consensus.mlp_head.4.",), ()),
        [
            "reinitialised: consensus.mlp_head.4: 8 classes in the folder, 3 in the model "
            "(2 weights)"
        ],
    ),
    "xvit mean's classes": (
        *("xvit_mean", {**XVIT, "head": "mean", "num_classes": 3}, ()),
        *(("new_fc.",), ()),
        ["reinitialised: new_fc: 8 classes in the folder, 3 in the model (2 weights)"],
    ),
    "stam classes": (
        *("stam", {**STAM, "num_classes": 9}, (), ("head.",), ()),
        ["reinitialised: head: 8 classes in the folder, 9 in the model (2 weights)"],
    ),
    "xvit resolution": (
        *("xvit", {**XVIT, "image_size": 48}, ("base_model.pos_embed",), (), ()),
        ["resized: base_model.pos_embed: 2×2 → 3×3 patches, bicubically"],
    ),
    "stam resolution": (
        *("stam", {**STAM, "image_size": 64}, ("pos_embed",), (), ()),
        ["resized: pos_embed: 2×2 → 4×4 patches, bicubically"],
    ),
    "stam frames": (
        *("stam", {**STAM, "num_frames": 16}, ("aggregate.pos_embed",), (), ()),
        ["resized: aggregate.pos_embed: 8 → 16 frames, linearly"],
    ),
    "a preset of the family": (
        *("stam", {**STAM, "name": "stam_32", "num_frames": 32}, ("aggregate.pos_embed",), (), ()),
        ["resized: aggregate.pos_embed: 8 → 32 frames, linearly"],
    ),
    "xvit frames": ("xvit", {**XVIT, "num_frames": 16}, (), (), (), []),
    "xvit temporal embedding": (
        *("xvit", {**XVIT, "temporal_embedding_frames": 4}, ("base_model.temp_embed",), (), ()),
        ["resized: base_model.temp_embed: 8 → 4 frames, linearly"],
    ),
    "no temporal embedding": (
        *("xvit", {**XVIT, "temporal_embedding_frames": 0}, (), ()),
        ("base_model.temp_embed",),
        ["unused: base_model.temp_embed: not in the model (1 weight)"],
    ),
    "no temporal head": (
        *("xvit", {**XVIT, "head": "mean"}, (), ("new_fc.",), ("consensus.",)),
        [
            "reinitialised: new_fc: not in the folder (2 weights)",
            "unused: consensus: not in the model (18 weights)",
            "differs: head: 'attention' in the folder, 'mean' in the config",
        ],
    ),
    "a temporal head": (
        *("xvit_mean", XVIT, (), ("consensus.",), ("new_fc.",)),
        [
            "reinitialised: consensus: not in the folder (18 weights)",
            "unused: new_fc: not in the model (2 weights)",
            "differs: head: 'mean' in the folder, 'attention' in the config",
        ],
    ),
    "a deeper temporal head": (
        *("xvit", {**XVIT, "head_depth": 3}, ()),
        *(("consensus.temporal_encoder.1.", "consensus.temporal_encoder.2."), ()),
        [
            "reinitialised: consensus.temporal_encoder.1: not in the folder (11 weights)",
            "reinitialised: consensus.temporal_encoder.2: not in the folder (11 weights)",
            "differs: head_depth: 1 in the folder, 3 in the config",
        ],
    ),
    "an aggregator": (
        *("stam_mean", {**STAM, "temporal_heads": 4}, (), ("aggregate.",), ()),
        [
            "reinitialised: aggregate: not in the folder (28 weights)",
            "differs: aggregator: 'mean' in the folder, 'transformer' in the config",
            "differs: temporal_heads: 2 in the folder, 4 in the config",
        ],
    ),
    "a shallower aggregator": (
        *("stam", {**STAM, "temporal_depth": 1}, (), ()),
        ("aggregate.transformer_enc.layers.1.",),
        [
            "unused: aggregate.transformer_enc.layers.1: not in the model (12 weights)",
            "differs: temporal_depth: 2 in the folder, 1 in the config",
        ],
    ),
    "other shifts": (
        *("xvit", {**XVIT, "shift_div": 8, "shift_blocks": (0,), "dropout": 0.2}, (), (), ()),
        [
            "differs: shift_blocks: [] in the folder, [0] in the config",
            "differs: shift_div: 4 in the folder, 8 in the config",
        ],
    ),
    "all at once": (
        "stam",
        {**STAM, "num_classes": 3, "num_frames": 4, "image_size": 64, "temporal_depth": 3},
        ("pos_embed", "aggregate.pos_embed"),
        ("head.", "aggregate.transformer_enc.layers.2."),
        (),
        [
            "resized: aggregate.pos_embed: 8 → 4 frames, linearly",
            "resized: pos_embed: 2×2 → 4×4 patches, bicubically",
            "reinitialised: aggregate.transformer_enc.layers.2: not in the folder (12 weights)",
            "reinitialised: head: 8 classes in the folder, 3 in the model (2 weights)",
            "differs: temporal_depth: 2 in the folder, 3 in the config",
        ],
    ),
}


RUN = ("xvit temporal embedding", "a deeper temporal head", "an aggregator", "all at once")


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_loaded_resized_or_reinitialised(case, folders):
    folder, options, resized, reinitialised, unused, report = CASES[case]
    model, found, fresh, lines = start(folders / folder, options)
    params = split_params(model)[1]
    fit = transfer.plan_transfer(family_of(model.config), found, fresh)
    lists = [fit.loaded, list(fit.resized), sum(fit.reinitialised.values(), [])]
    assert sorted(sum(lists, [])) == sorted(fresh)  # each weight is in exactly one list
    assert sum(fit.unused.values(), []) == [n for n in found if n.startswith(unused or ("-",))]
    assert tuple(sorted(fit.resized)) == tuple(sorted(resized))
    assert lists[2] == [n for n in fresh if n.startswith(reinitialised or ("-",))]
    assert lines == [f"loaded: {len(fit.loaded)} weights", *report]
    for name, array in params.items():
        assert array.shape == fresh[name].shape
        if name in fit.loaded:
            np.testing.assert_array_equal(array, found[name])
            assert (np.asarray(array) != np.asarray(fresh[name])).any(), name
        elif name in lists[2]:
            np.testing.assert_array_equal(array, fresh[name])
    if case in RUN:
        logits, _ = run(model, clip(options))
        assert logits.shape == (2, options["num_classes"])
        assert np.isfinite(logits).all()


def test_resized_weights_hold_the_resized_values(folders):
    options = {**STAM, "num_frames": 4, "image_size": 64}
    model, found, _, _ = start(folders / "stam", options)
    np.testing.assert_array_equal(
        model.pos_embed[...], resize_pos_embed(found["pos_embed"], (4, 4))
    )
    rows = found["aggregate.pos_embed"]
    found_rows = model.aggregate.pos_embed[...]
    np.testing.assert_array_equal(found_rows[:, 0], rows[:, 0])
    np.testing.assert_allclose(
        found_rows[:, 1:], (rows[:, 1::2] + rows[:, 2::2]) / 2, rtol=0, atol=1e-6
    )
    model, found, _, _ = start(folders / "xvit", {**XVIT, "temporal_embedding_frames": 4})
    rows = found["base_model.temp_embed"]
    expected = (rows[:, ::2] + rows[:, 1::2]) / 2
    np.testing.assert_allclose(model.base_model.temp_embed[...], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("folder", "options"), [("xvit", XVIT), ("stam", STAM)])
def test_a_new_class_head_keeps_the_features(folder, options, folders):
    model, _, _, _ = start(folders / folder, {**options, "num_classes": 3})
    source, video = jaxvid.load_model(folders / folder), clip(options)
    (_, expected), (logits, found) = run(source, video), run(model, video)
    assert logits.shape == (2, 3)
    assert expected.keys() == found.keys()
    for name, features in expected.items():
        np.testing.assert_array_equal(found[name], features)


@pytest.mark.parametrize(("family", "options"), [("xvit", XVIT), ("stam", STAM)])
def test_class_head_is_loaded_only_for_the_same_classes_in_the_same_order(
    family, options, tmp_path
):
    """A head whose classes are permuted would be silently wrong."""
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
        kept = [name for name in params if np.array_equal(params[name], fresh[name])]
        assert len(kept) == (2 if reason else 0)
        assert all(name.startswith(FAMILIES[family].class_heads) for name in kept)
        assert any(reason in line for line in lines) if reason else True


def test_transferred_weights_get_the_sharding_of_the_initial_weights(folders):
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=4, tensor=1))
    options = {**STAM, "num_classes": 4, "num_frames": 11, "image_size": 48}
    fresh = random_network(options, seed=2)[1]
    fresh = jax.device_put(
        fresh, sharding.state_sharding(fresh, mesh, FAMILIES["stam"].tensor_axis)
    )
    params, _ = model_folder.load_init(folders / "stam", make_model_config(**options), fresh)
    plain = split_params(start(folders / "stam", options)[0])[1]
    head = ("head.kernel", "head.bias")
    for name, array in params.items():
        assert array.sharding == fresh[name].sharding, name
        expected = fresh[name] if name in head else plain[name]
        np.testing.assert_array_equal(jax.device_get(array), jax.device_get(expected))
    assert len(params["aggregate.pos_embed"].sharding.device_set) == 8


def test_incompatible_networks_are_refused_with_every_difference(folders):
    message = refused(folders / "xvit", {**XVIT, "width": 32, "depth": 3, "num_classes": 5})
    for part in (
        f"{folders / 'xvit'} cannot initialise xvit_tiny: depth: 1 in the folder, 3 in the config",
        "; width: 16 in the folder, 32 in the config; ",
        "; base_model.blocks.*.attn.qkv.kernel: (16, 48) in the folder, (32, 96) in the model; ",
        "; consensus.mlp_head.4.kernel: (16, 8) in the folder, (32, 5) in the model",
        "; base_model.temp_embed: (1, 8, 1, 16) in the folder, (1, 8, 1, 32) in the model",
        "; base_model.blocks.1: not in the folder; base_model.blocks.2: not in the folder; ",
        "use its values with --config.model.NAME=VALUE or choose another folder",
    ):
        assert part in message
    assert message.count("blocks.1") == 1
    message = refused(folders / "stam", {**STAM, "patch_size": 8})
    assert (
        "patch_size: 16 in the folder, 8 in the config; patch_embed.proj.kernel: (16, 16, 3, 16) "
        in message
    )
    message = refused(folders / "stam", {**STAM, "temporal_mlp": 48, "mlp_ratio": 2})
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
    message = refused(tmp_path / "deep", XVIT)
    assert (
        "depth: 2 in the folder, 1 in the config; base_model.blocks.1: not in the model; "
        in message
    )


@pytest.mark.parametrize(
    ("folder", "options", "field"),
    [("xvit", XVIT, "heads"), ("stam", STAM, "heads"), ("stam", STAM, "temporal_heads")],
)
def test_another_number_of_heads_is_refused(folder, options, field, folders):
    message = refused(folders / folder, {**options, field: 4})
    assert f": {field}: 2 in the folder, 4 in the config; use its values" in message


def test_another_family_is_refused(folders):
    message = refused(folders / "stam", XVIT)
    assert "stam contains stam_8, of the family STAM; xvit_tiny is of the family XViT; " in message
    message = refused(folders / "xvit", STAM)
    assert "xvit contains xvit_tiny, of the family XViT; stam_8 is of the family STAM; " in message


def test_an_incomplete_part_is_a_problem(folders):
    found, fresh = (abstract_model(make_model_config(**STAM))[1] for _ in range(2))
    del found["aggregate.cls_token"]
    del fresh["aggregate.transformer_enc.layers.1.norm1.scale"]
    fit = transfer.plan_transfer(FAMILIES["stam"], found, fresh)
    assert fit.problems == [
        "aggregate.cls_token: not in the folder",
        "aggregate.transformer_enc.layers.1: not in the model",
    ]
    assert not fit.reinitialised
    assert not fit.unused


def test_damaged_folders_are_refused(folders, tmp_path):
    def copy(name):
        return shutil.copytree(folders / "xvit", tmp_path / name)

    cut = copy("cut")
    largest = max((cut / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    assert "params is damaged: 1 of" in refused(cut, XVIT)
    for name, changes, expected in (
        ("option", {"size": 1}, "model.json: model xvit_tiny has no option 'size'"),
        ("preset", {"name": "vit"}, "model.json: model 'vit' does not exist"),
        ("sizes", {"width": 32}, "params does not fit the model: "),
    ):
        folder = copy(name)
        card = json.loads((folder / "model.json").read_text())
        card["config"].update(changes)
        (folder / "model.json").write_text(json.dumps(card))
        assert expected in refused(folder, {**XVIT, "width": 32 if name == "sizes" else 16})
    card["config"] = dataclasses.asdict(make_model_config(**XVIT))
    del card["config"]["name"]
    (folder / "model.json").write_text(json.dumps(card))
    assert "model.json: " in refused(folder, XVIT)
    assert "is not a model folder" in refused(tmp_path / "nowhere", XVIT)
