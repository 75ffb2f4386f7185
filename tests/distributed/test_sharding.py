"""Every mixture of parallelism computes what one device computes."""

import functools
import types

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxvid.distributed import setup, sharding
from jaxvid.errors import InputError
from jaxvid.models import FAMILIES, abstract_model, make_model_config
from jaxvid.training import steps
from tests.conftest import QUICK

XVIT, STAM = FAMILIES["xvit"].tensor_axis, FAMILIES["stam"].tensor_axis
MIXTURES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (2, 2, 2)]


def make_mesh(data, fsdp, tensor):
    return sharding.make_mesh(sharding.MeshShape(data=data, fsdp=fsdp, tensor=tensor))


def train(mesh, put, drop_path=0.0, **options):
    sizes = {"width": 64, "depth": 3, "image_size": 32}
    config = make_model_config("xvit_tiny", **sizes, drop_path=drop_path)
    # Not Adam, which divides a gradient that is rounding noise by its own size.
    optimizer = optax.sgd(0.03, momentum=0.9, nesterov=True)
    recipe = steps.Recipe(seed=0, label_smoothing=0.1, **options)
    init = functools.partial(steps.init_state, config, optimizer, recipe, seed=0)
    places = sharding.state_sharding(jax.eval_shape(init), mesh, XVIT)
    state = jax.jit(init, out_shardings=places)()
    step = jax.jit(
        functools.partial(
            steps.train_step,
            graphdef=abstract_model(config)[0],
            optimizer=optimizer,
            recipe=recipe,
        ),
        donate_argnums=0,
        out_shardings=(places, sharding.replicated(mesh)),
        compiler_options=QUICK,
    )
    rng, losses = np.random.default_rng(0), []
    for _ in range(3):
        batch = {
            "video": rng.integers(0, 255, (8, 8, 32, 32, 3), np.uint8),
            "label": rng.integers(0, 8, 8).astype(np.int32),
            "mask": np.ones(8, bool),
        }
        state, sums = step(state, put(batch))
        losses.append(float(sums["loss"]))
    return jax.device_get(all_weights(state)), losses, state


def all_weights(state):
    """Weights, and their average where there is one, by name."""
    return {f"{kind}.{k}": v for kind in ("params", "ema") for k, v in state.get(kind, {}).items()}


def train_on_one(**options):
    mesh = jax.make_mesh(
        (1, 1, 1),
        sharding.AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[:1],
    )
    return train(mesh, lambda batch: batch, **options)[:2]


@pytest.fixture(scope="module")
def one_device():
    return train_on_one()


def check_equal(found, expected):
    """Losses and weights to 5e-6; what began at 0 and is small, to that of 0.05."""
    np.testing.assert_allclose(found[1], expected[1], rtol=5e-6)
    worst = max(
        (np.linalg.norm(found[0][name] - value) / max(np.linalg.norm(value), 0.05), name)
        for name, value in expected[0].items()
    )
    assert worst[0] <= 5e-6, worst


@pytest.mark.parametrize("sizes", MIXTURES, ids=str)
def test_mixtures_equal_one_device(sizes, one_device):
    mesh = make_mesh(*sizes)
    params, losses, state = train(mesh, lambda batch: sharding.to_global_arrays(batch, mesh))
    check_equal((params, losses), one_device)
    kernel = state["params"]["base_model.blocks.0.mlp.fc1.kernel"]
    _, fsdp, tensor = sizes
    assert kernel.addressable_shards[0].data.size == kernel.size // (fsdp * tensor)


def test_a_mixture_draws_and_averages_as_one_device_does():
    options = {"mixup_alpha": 0.4, "erase_prob": 0.5, "accumulate_steps": 2, "ema_decay": 0.9}
    options["drop_path"] = 0.2
    mesh = make_mesh(2, 2, 2)
    found = train(mesh, lambda batch: sharding.to_global_arrays(batch, mesh), **options)
    assert any(name.startswith("ema.") for name in found[0])
    check_equal(found, train_on_one(**options))


def test_the_rule_cuts_kernels_and_their_moments_alike():
    mesh = make_mesh(2, 2, 2)
    leaf = jax.ShapeDtypeStruct
    tree = {
        "params": {
            "b.qkv.kernel": leaf((64, 192), "float32"),
            "b.fc2.kernel": leaf((64, 48), "f4"),
        },
        "opt_state": ({"b.qkv.kernel": leaf((64, 192), "float32")}, leaf((), "int32")),
        "odd": {"cls_token": leaf((1, 1, 7), "float32")},
    }
    specs = jax.tree.map(lambda s: s.spec, sharding.state_sharding(tree, mesh, XVIT))
    assert specs["params"]["b.qkv.kernel"] == P("fsdp", "tensor")
    assert specs["params"]["b.fc2.kernel"] == P("tensor", "fsdp")
    assert specs["opt_state"][0]["b.qkv.kernel"] == P("fsdp", "tensor")
    assert specs["opt_state"][1] == P()
    assert specs["odd"]["cls_token"] == P(None, None, None)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("blocks.0.attn.qkv.kernel", P("fsdp", "tensor")),
        ("blocks.0.mlp.fc1.kernel", P("fsdp", "tensor")),
        ("blocks.0.attn.proj.kernel", P("tensor", "fsdp")),
        ("blocks.0.mlp.fc2.kernel", P("tensor", "fsdp")),
        ("aggregate.layers.0.self_attn.in_proj_weight", P("fsdp", "tensor")),
        ("aggregate.layers.0.linear1.kernel", P("fsdp", "tensor")),
        ("aggregate.layers.0.self_attn.out_proj.kernel", P("tensor", "fsdp")),
        ("aggregate.layers.0.linear2.kernel", P("tensor", "fsdp")),
        ("head.kernel", P("fsdp", None)),  # no layer of a pair
        ("blocks.0.attn.qkv.bias", P("fsdp", None)),  # no kernel
    ],
)
def test_the_rule_cuts_the_first_of_two_layers_by_outputs_and_the_second_by_inputs(name, spec):
    leaf = jax.ShapeDtypeStruct((16, 16), "float32")
    found = sharding.state_sharding({name: leaf}, make_mesh(2, 2, 2), STAM)[name]
    assert found.spec == spec


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 6), P("fsdp", None)),  # 6 outputs cannot be cut by 4, 64 inputs by 2
        ((7, 4), P(None, "tensor")),
        ((64,), P("fsdp")),
        ((2, 4, 8), P(None, None, "fsdp")),  # tensor parallelism is for matrices
        ((6, 9, 3), P("fsdp", None, None)),  # the longest axis that can be cut
        ((1, 2), P(None, "fsdp")),
        ((), P()),
    ],
)
def test_the_rule_cuts_the_longest_axis_that_can_be_cut(shape, spec):
    leaf = jax.ShapeDtypeStruct(shape, "float32")
    found = sharding.state_sharding({"qkv.kernel": leaf}, make_mesh(1, 2, 4), XVIT)
    assert found["qkv.kernel"].spec == spec


def test_the_rule_holds_for_trees_without_names():
    mesh, leaf = make_mesh(1, 2, 4), jax.ShapeDtypeStruct((4, 8), "float32")
    for tree in (leaf, [leaf]):
        [found] = jax.tree.leaves(sharding.state_sharding(tree, mesh, XVIT))
        assert found.spec == P(None, "fsdp")
        assert found.mesh == mesh


def test_shapes_get_the_rules_sharding_and_batches_are_cut_by_rows():
    mesh = make_mesh(2, 2, 2)
    leaf = jax.ShapeDtypeStruct((64, 192), "bfloat16")
    found = sharding.with_sharding({"b.qkv.kernel": leaf}, mesh, XVIT)["b.qkv.kernel"]
    assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
    assert (found.sharding.spec, found.sharding.mesh) == (P("fsdp", "tensor"), mesh)
    batch = {"label": np.arange(8), "video": np.arange(16.0).reshape(8, 2)}
    arrays = sharding.to_global_arrays(batch, mesh)
    assert arrays.keys() == batch.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.sharding.spec == P(("data", "fsdp"))
        assert array.sharding.mesh == mesh
    assert sharding.replicated(mesh).is_fully_replicated
    assert sharding.replicated(mesh).mesh == mesh


def test_meshes_fill_what_is_left_and_refuse_the_rest():
    assert dict(make_mesh(-1, 2, 1).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(make_mesh(1, -1, 1).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(2, 4, -1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    # What flax's modules need; the other axis types are refused by the class token's concatenation.
    assert make_mesh(2, 2, 2).axis_types == (jax.sharding.AxisType.Auto,) * 3
    assert all(isinstance(size, int) for size in make_mesh(-1, 2, 1).shape.values())
    for sizes in ((3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (-1, 0, 1), (-2, 4, -1)):
        asked = "mesh.data={}, mesh.fsdp={}, mesh.tensor={}".format(*sizes)
        with pytest.raises(InputError, match=f"{asked}: cannot be laid over 8 devices"):
            make_mesh(*sizes)


def test_batch_sizes_that_cannot_be_cut_are_refused():
    mesh = make_mesh(4, 2, 1)
    sharding.check_batch_size("batch_size", 16, mesh)
    sharding.check_batch_size("batch_size", 1, make_mesh(1, 1, 8))
    for size in (12, 0, -8):
        with pytest.raises(InputError, match=f"batch_size={size} must be a positive multiple of 8"):
            sharding.check_batch_size("batch_size", size, mesh)


def test_fully_sharded_state_takes_an_eighth_of_the_memory():
    """A ViT-B training step, as the compiler plans it: the state under fsdp=8 and on each of 8."""
    config = make_model_config("xvit_k400", remat=True)
    optimizer, recipe = optax.adamw(1e-4), steps.Recipe(seed=0)
    graphdef, _ = abstract_model(config)
    state = jax.eval_shape(functools.partial(steps.init_state, config, optimizer, recipe, seed=0))
    held = {}
    for fsdp in (1, 8):
        mesh = make_mesh(8 // fsdp, fsdp, 1)
        abstract = sharding.with_sharding(state, mesh, XVIT)
        clips = {"video": ((8, 16, 224, 224, 3), "uint8"), "label": ((8,), "int32")}
        batch = {
            name: jax.ShapeDtypeStruct(*what, sharding=sharding.batch_sharding(mesh))
            for name, what in {**clips, "mask": ((8,), "bool")}.items()
        }
        step = functools.partial(
            steps.train_step, graphdef=graphdef, optimizer=optimizer, recipe=recipe
        )
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        step = jax.jit(step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)))
        memory = step.lower(abstract, batch).compile(QUICK).memory_analysis()
        video = 16 * 224 * 224 * 3  # bytes of one clip, the batch's share of a device
        held[fsdp] = memory.argument_size_in_bytes - video
    assert held[8] <= held[1] / 7
    assert held[1] > 3 * 4 * 93e6  # weights and two moments, float32


def test_processes_know_their_rows():
    assert sharding.batch_shard(make_mesh(4, 2, 1), 16) == (0, 1)


@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        ([(0, 4), (4, 8)], (0, 2)),
        ([(8, 12), (12, 16)], (1, 2)),
        ([(12, 16)], (3, 4)),
        ([(5, 6)], (5, 16)),
        ([(4, 8), (4, 8)], (1, 4)),  # 'tensor' spans its devices
        ([(0, 16)], (0, 1)),
        ([(0, 4), (8, 12)], None),  # not in one piece
        ([(2, 6)], None),  # not one of 4 equal parts
        ([(0, 6)], None),  # 16 is not divisible by 6
    ],
)
def test_a_process_makes_the_rows_that_its_devices_hold(slices, expected, monkeypatch):
    def hold(shape):
        assert shape == (16,)
        return {i: (slice(*bounds),) for i, bounds in enumerate(slices)}

    stub = types.SimpleNamespace(addressable_devices_indices_map=hold)
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: stub)
    mesh = make_mesh(8, 1, 1)
    if expected:
        found = sharding.batch_shard(mesh, 16)
        assert found == expected
        assert all(isinstance(number, int) for number in found)
    else:
        with pytest.raises(InputError, match="process 0 would hold scattered clips"):
            sharding.batch_shard(mesh, 16)


def test_flags_of_processes_must_be_complete(monkeypatch):
    setup.init_processes()  # nothing says that there are several
    for flags in (("host:1", None, None), (None, 2, 0), ("host:1", 2, 2), ("host:1", 2, -1)):
        with pytest.raises(InputError, match="all three are needed"):
            setup.init_processes(*flags)
