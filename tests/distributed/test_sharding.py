"""Data, FSDP and tensor parallelism, alone and combined, give the results of one device."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxvid.distributed import setup, sharding
from jaxvid.errors import InputError
from jaxvid.models import (
    abstract_model,
    build_model,
    family_of,
    make_model_config,
    split_params,
)
from jaxvid.training import steps
from jaxvid.training.optim import OptimizerConfig
from jaxvid.training.step_program import make_step_program
from tests import hlo

# Sizes of the mesh axes 'data', 'fsdp' and 'tensor'.
COMBINATIONS = [
    (2, 2, 2),
    *(
        pytest.param(sizes, marks=pytest.mark.full)
        for sizes in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1))
    ),
]


def splits_of(name, **overrides):
    """Return the weights of a network that tensor parallelism splits."""
    config = make_model_config(name, **overrides)
    return family_of(config).tensor_splits(config)


XVIT = splits_of("xvit_tiny", heads=8)
STAM = splits_of("stam_tiny", heads=8, temporal_heads=4)


def make_mesh(data, fsdp, tensor):
    return sharding.make_mesh(sharding.MeshShape(data=data, fsdp=fsdp, tensor=tensor))


def train(mesh, to_device, drop_path=0.0, **options):
    """Train for 3 steps; return the weights by name, the losses and the final state."""
    sizes = {"width": 64, "depth": 3, "heads": 8, "image_size": 32}
    config = make_model_config("xvit_tiny", **sizes, drop_path=drop_path)
    # Not Adam, which would amplify gradients that are only rounding noise.
    optimizer = optax.sgd(0.03, momentum=0.9, nesterov=True)
    gather = functools.partial(sharding.gather_fsdp, mesh=mesh, tensor_splits=XVIT)
    recipe = steps.Recipe(seed=0, label_smoothing=0.1, gather=gather, **options)
    _, params = split_params(build_model(config, nnx.Rngs(0)))
    state = steps.init_state(params, optimizer, recipe)
    shardings = sharding.state_sharding(state, mesh, XVIT)
    state = jax.tree.map(sharding.shard, state, shardings)
    step = jax.jit(
        functools.partial(
            steps.train_step,
            graphdef=abstract_model(config)[0],
            optimizer=optimizer,
            recipe=recipe,
        ),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    rng, losses = np.random.default_rng(0), []
    for _ in range(3):
        batch = {
            "video": rng.integers(0, 255, (8, 8, 32, 32, 3), np.uint8),
            "label": rng.integers(0, 8, 8).astype(np.int32),
            "mask": np.ones(8, bool),
        }
        state, sums = step(state, to_device(batch))
        losses.append(float(sums["loss"]))
    return jax.device_get(all_weights(state)), losses, state


def all_weights(state):
    """Return the weights and, if there are any, their moving averages, by name."""
    return {f"{kind}.{k}": v for kind in ("params", "ema") for k, v in state.get(kind, {}).items()}


def train_on_one_device(**options):
    mesh = jax.make_mesh(
        (1, 1, 1),
        sharding.AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[:1],
    )
    return train(mesh, lambda batch: batch, **options)[:2]


@pytest.fixture(scope="module")
def one_device():
    return train_on_one_device()


def check_equal(result, expected):
    """Check that losses and weights agree to a relative 5e-6.

    The difference of weights with a norm below 0.05 is divided by 0.05.
    """
    np.testing.assert_allclose(result[1], expected[1], rtol=5e-6)
    worst = max(
        (np.linalg.norm(result[0][name] - value) / max(np.linalg.norm(value), 0.05), name)
        for name, value in expected[0].items()
    )
    assert worst[0] <= 5e-6, worst


@pytest.mark.parametrize("sizes", COMBINATIONS, ids=str)
def test_combinations_equal_one_device(sizes, one_device):
    mesh = make_mesh(*sizes)
    params, losses, state = train(mesh, lambda batch: sharding.to_global_arrays(batch, mesh))
    check_equal((params, losses), one_device)
    _, fsdp, tensor = sizes
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        kernel = state["params"][f"base_model.blocks.0.{layer}.kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // (fsdp * tensor)


@pytest.mark.full
def test_sharded_mixup_and_ema_equal_one_device():
    options = {"mixup_alpha": 0.4, "erase_prob": 0.5, "accumulate_steps": 2, "ema_decay": 0.9}
    options["drop_path"] = 0.2
    mesh = make_mesh(2, 2, 2)
    result = train(mesh, lambda batch: sharding.to_global_arrays(batch, mesh), **options)
    assert any(name.startswith("ema.") for name in result[0])
    check_equal(result, train_on_one_device(**options))


def test_kernels_and_their_moments_have_the_same_sharding():
    mesh = make_mesh(2, 2, 2)
    leaf = jax.ShapeDtypeStruct
    tree = {
        "params": {
            "b.attn.qkv.kernel": leaf((64, 3, 64), "float32"),
            "b.mlp.fc2.kernel": leaf((64, 48), "f4"),
        },
        "opt_state": ({"b.attn.qkv.kernel": leaf((64, 3, 64), "float32")}, leaf((), "int32")),
        "indivisible": {"cls_token": leaf((1, 1, 7), "float32")},
    }
    specs = jax.tree.map(lambda s: s.spec, sharding.state_sharding(tree, mesh, XVIT))
    assert specs["params"]["b.attn.qkv.kernel"] == P("fsdp", None, "tensor")
    assert specs["params"]["b.mlp.fc2.kernel"] == P("tensor", "fsdp")
    assert specs["opt_state"][0]["b.attn.qkv.kernel"] == P("fsdp", None, "tensor")
    assert specs["opt_state"][1] == P()
    assert specs["indivisible"]["cls_token"] == P(None, None, None)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("blocks.0.attn.qkv.kernel", P("fsdp", None, "tensor")),
        ("blocks.0.attn.qkv.bias", P(None, "tensor")),
        ("blocks.0.mlp.fc1.kernel", P("fsdp", "tensor")),
        ("blocks.0.mlp.fc1.bias", P("tensor")),
        ("blocks.0.attn.proj.kernel", P("tensor", "fsdp")),
        ("blocks.0.mlp.fc2.kernel", P("tensor", "fsdp")),
        ("blocks.0.mlp.fc2.bias", P("fsdp")),  # added after the sum over the devices
        ("aggregate.transformer_enc.layers.0.self_attn.in_proj_weight", P("fsdp", None, "tensor")),
        ("aggregate.transformer_enc.layers.0.self_attn.in_proj_bias", P(None, "tensor")),
        ("aggregate.transformer_enc.layers.0.linear1.kernel", P("fsdp", "tensor")),
        ("aggregate.transformer_enc.layers.0.linear1.bias", P("tensor")),
        ("aggregate.transformer_enc.layers.0.self_attn.out_proj.kernel", P("tensor", "fsdp")),
        ("aggregate.transformer_enc.layers.0.linear2.kernel", P("tensor", "fsdp")),
        ("head.kernel", P("fsdp", None)),  # not one of two consecutive layers
        ("patch_embed.proj.kernel", P(None, None, None, "fsdp")),  # likewise
    ],
)
def test_tensor_parallelism_shards_outputs_of_the_first_layer_and_inputs_of_the_second(name, spec):
    _, params = abstract_model(make_model_config("stam_tiny"))
    assert sharding.state_sharding(params, make_mesh(2, 2, 2), STAM)[name].spec == spec


def test_a_device_never_holds_a_part_of_a_head():
    """The width 48 is divisible by tensor=4, but 6 heads and 3 temporal heads are not."""
    config = {"name": "stam_tiny", "width": 48, "heads": 6, "temporal_heads": 3}
    _, params = abstract_model(make_model_config(**config))

    def split_attention(**heads):
        """Return the weights of the first attention layers that are split over `tensor`."""
        splits = splits_of(**{**config, **heads})
        shardings = sharding.state_sharding(params, make_mesh(1, 2, 4), splits)
        assert shardings["blocks.0.mlp.fc1.kernel"].spec == P("fsdp", "tensor")
        return {
            name
            for name, leaf_sharding in shardings.items()
            if "tensor" in leaf_sharding.spec and re.search(r"\.0\.(self_)?attn\.", name)
        }

    spatial = {f"blocks.0.attn.{name}" for name in ("qkv.kernel", "qkv.bias", "proj.kernel")}
    temporal = {
        f"aggregate.transformer_enc.layers.0.self_attn.{name}"
        for name in ("in_proj_weight", "in_proj_bias", "out_proj.kernel")
    }
    assert split_attention() == set()
    assert split_attention(heads=12) == spatial
    assert split_attention(temporal_heads=12) == temporal
    assert split_attention(heads=4, temporal_heads=8) == spatial | temporal


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 6), P("fsdp", None)),  # 6 is not divisible by tensor=4, but 64 by fsdp=2
        ((7, 4), P(None, "tensor")),
        ((2, 4, 8), P(None, "fsdp", "tensor")),
        ((6, 9, 3), P("fsdp", None, None)),  # the longest divisible axis
        ((1, 2), P(None, "fsdp")),
        ((1,), P(None)),
    ],
)
def test_fsdp_shards_the_longest_divisible_axis(shape, spec):
    leaf = jax.ShapeDtypeStruct(shape, "float32")
    shardings = sharding.state_sharding({"mlp.fc1.kernel": leaf}, make_mesh(1, 2, 4), XVIT)
    assert shardings["mlp.fc1.kernel"].spec == spec


def test_trees_without_names_are_sharded():
    mesh, leaf = make_mesh(1, 2, 4), jax.ShapeDtypeStruct((4, 8), "float32")
    for tree in (leaf, [leaf]):
        [leaf_sharding] = jax.tree.leaves(sharding.state_sharding(tree, mesh, XVIT))
        assert leaf_sharding.spec == P(None, "fsdp")
        assert leaf_sharding.mesh == mesh


def test_shapes_get_shardings_and_batches_are_sharded_by_rows():
    mesh = make_mesh(2, 2, 2)
    name, leaf = "b.mlp.fc1.kernel", jax.ShapeDtypeStruct((64, 192), "bfloat16")
    sharded = sharding.with_sharding({name: leaf}, mesh, XVIT)[name]
    assert (sharded.shape, sharded.dtype) == (leaf.shape, leaf.dtype)
    assert (sharded.sharding.spec, sharded.sharding.mesh) == (P("fsdp", "tensor"), mesh)
    batch = {"label": np.arange(8), "video": np.arange(16.0).reshape(8, 2)}
    arrays = sharding.to_global_arrays(batch, mesh)
    assert arrays.keys() == batch.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.sharding.spec == P(("data", "fsdp"))
        assert array.sharding.mesh == mesh
    assert sharding.replicated(mesh).is_fully_replicated
    assert sharding.replicated(mesh).mesh == mesh


def test_mesh_size_minus_one_uses_the_remaining_devices():
    assert dict(make_mesh(-1, 2, 1).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(make_mesh(1, -1, 1).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(2, 4, -1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    # Flax modules need Auto axes: concatenating the class token fails with the other types.
    assert make_mesh(2, 2, 2).axis_types == (jax.sharding.AxisType.Auto,) * 3
    assert all(isinstance(size, int) for size in make_mesh(-1, 2, 1).shape.values())
    for sizes in ((3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (-1, 0, 1), (-2, 4, -1)):
        message = "mesh.data={}, mesh.fsdp={}, mesh.tensor={}".format(*sizes)
        with pytest.raises(InputError, match=f"{message}: do not fit 8 devices"):
            make_mesh(*sizes)


def test_indivisible_batch_sizes_are_refused():
    mesh = make_mesh(4, 2, 1)
    sharding.check_batch_size("batch_size", 16, mesh)
    sharding.check_batch_size("batch_size", 1, make_mesh(1, 1, 8))
    for size in (12, 0, -8):
        with pytest.raises(InputError, match=f"batch_size={size} must be a positive multiple of 8"):
            sharding.check_batch_size("batch_size", size, mesh)


@pytest.mark.full
def test_fsdp_over_eight_devices_takes_an_eighth_of_the_state_memory():
    """Compares the compiler's memory plan of a training step with fsdp=8 and data=8.

    The blocks are those of a ViT-B.
    """
    config = make_model_config("xvit_k400", depth=3, remat="full")
    state_bytes = {}
    for fsdp in (1, 8):
        mesh = make_mesh(8 // fsdp, fsdp, 1)
        program = make_step_program(
            config,
            OptimizerConfig(name="adamw"),
            steps.Recipe(seed=0),
            schedule=lambda step: 0.0 * step,
            mesh=mesh,
            batch_size=8,
        )
        shapes = {"video": ((8, 16, 224, 224, 3), "uint8"), "label": ((8,), "int32")}
        shapes["mask"] = ((8,), "bool")
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
            for name, (shape, dtype) in shapes.items()
        }
        step = program.train_step.func.lower(program.abstract_state, batch, teacher_params=None)
        memory = step.compile().memory_analysis()
        clip_bytes = 16 * 224 * 224 * 3  # each device has one clip of the batch
        state_bytes[fsdp] = memory.argument_size_in_bytes - clip_bytes
    assert state_bytes[8] <= state_bytes[1] / 7
    # Weights and two moments in float32.
    assert state_bytes[1] >= 3 * 4 * config.num_params() > 3 * 4 * 28e6


def test_batch_shard_of_one_process_is_the_whole_batch():
    assert sharding.batch_shard(make_mesh(4, 2, 1), 16) == (0, 1)


@pytest.mark.parametrize(
    # slices: rows of each device of the process; expected: index and number of parts, or None if
    # the rows are not one of several equal parts
    ("slices", "expected"),
    [
        ([(0, 4), (4, 8)], (0, 2)),
        ([(8, 12), (12, 16)], (1, 2)),
        ([(12, 16)], (3, 4)),
        ([(5, 6)], (5, 16)),
        ([(4, 8), (4, 8)], (1, 4)),  # replicated over the axis 'tensor'
        ([(0, 16)], (0, 1)),
        ([(0, 4), (8, 12)], None),  # not contiguous
        ([(2, 6)], None),  # not one of 4 equal parts
        ([(0, 6)], None),  # 16 is not divisible by 6
    ],
)
def test_batch_shard_is_the_rows_of_the_process_devices(slices, expected, monkeypatch):
    def indices_map(shape):
        assert shape == (16,)
        return {i: (slice(*bounds),) for i, bounds in enumerate(slices)}

    stub = types.SimpleNamespace(addressable_devices_indices_map=indices_map)
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: stub)
    mesh = make_mesh(8, 1, 1)
    if expected:
        shard = sharding.batch_shard(mesh, 16)
        assert shard == expected
        assert all(isinstance(number, int) for number in shard)
    else:
        with pytest.raises(InputError, match="process 0 would hold non-contiguous"):
            sharding.batch_shard(mesh, 16)


def test_process_flags_must_be_complete(monkeypatch):
    setup.init_processes()  # without flags and launcher variables: a single process
    for flags in (("host:1", None, None), (None, 2, 0), ("host:1", 2, 2), ("host:1", 2, -1)):
        with pytest.raises(InputError, match="all three are required"):
            setup.init_processes(*flags)


@pytest.mark.parametrize("mix", ["mixup_alpha", "cutmix_alpha"])
def test_mixing_within_devices_needs_no_communication(mix):
    """Mixing within the batch, in contrast, gathers its pixels as uint8."""
    mesh, batch = make_mesh(8, 1, 1), jax.ShapeDtypeStruct
    rows = sharding.batch_sharding(mesh)
    arguments = (
        {
            "video": batch((32, 2, 16, 16, 3), jnp.uint8, sharding=rows),
            "label": batch((32,), jnp.int32, sharding=rows),
            "mask": batch((32,), jnp.bool_, sharding=rows),
        },
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    collectives = {}
    for groups in (8, 1):
        recipe = steps.Recipe(seed=0, erase_prob=0.5, mix_groups=groups, **{mix: 0.4})
        prepare = functools.partial(steps._prepare_clips, recipe=recipe)
        text = jax.jit(prepare).lower(*arguments).compile().as_text()
        shapes = [shape for _, shapes in hlo.collectives(text) for shape in shapes]
        collectives[groups] = [shape for shape in shapes if "16,16" in shape]
    assert not collectives[8]
    assert collectives[1]
    assert not any(shape.startswith("f32[") for shape in collectives[1]), collectives[1]
