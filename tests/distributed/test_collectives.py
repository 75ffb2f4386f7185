"""What devices exchange in compiled programs with tensor parallelism and FSDP."""

import math
import re
from collections import Counter

import jax
import pytest

from jaxvid.distributed import sharding
from jaxvid.models import abstract_model, family_of, make_model_config, merge_params
from jaxvid.training import steps
from jaxvid.training.optim import OptimizerConfig
from jaxvid.training.step_program import make_step_program
from tests import hlo

CLIPS = 16  # clips per batch
# Three blocks: the first two run as one scan, the last one computes only the class token.
SIZES = {"width": 32, "depth": 3, "heads": 4, "image_size": 32}
NETWORKS = {
    "xvit": {"name": "xvit_tiny", "dropout": 0.5, "drop_path": 0.2},
    "xvit_per_head": {
        "name": "xvit_tiny",
        "shift_per_head": True,
        "summary_tokens": True,
        "remat": "full",
    },
    "stam": {"name": "stam_tiny", "temporal_depth": 1, "temporal_mlp": 64, "dropout": 0.1},
}


def make_config(network):
    return make_model_config(**SIZES, **NETWORKS[network])


def make_mesh(tensor, fsdp=1):
    return sharding.make_mesh(sharding.MeshShape(data=-1, fsdp=fsdp, tensor=tensor))


def batch_shapes(config, mesh):
    """Return the shapes and shardings of a batch."""
    rows, leaf = sharding.batch_sharding(mesh), jax.ShapeDtypeStruct
    size = config.image_size
    return {
        "video": leaf((CLIPS, config.num_frames, size, size, 3), "uint8", sharding=rows),
        "label": leaf((CLIPS,), "int32", sharding=rows),
        "mask": leaf((CLIPS,), "bool", sharding=rows),
    }


def count_activations(network, tensor, *, backward) -> Counter:
    """Return how often activations of each shape are summed over the axis `tensor`.

    A sub-block sums its output in the forward pass, and the gradient of its input in the backward
    pass.
    """
    b, t, d = CLIPS // (8 // tensor), 8, SIZES["width"]
    tokens, frames = f"f32[{b},{t},5,{d}]", f"f32[{b},1,{1 + t},{d}]"
    token, frame = f"f32[{b},{t},1,{d}]", f"f32[{b},1,1,{d}]"
    counts = Counter({tokens: 2, token: 2})  # the scanned blocks; the last block
    counts.update({frames: 2} if network == "stam" else {frame: 2})  # the temporal block
    if backward:
        # A last block computes all keys and values, but only one query and its MLP.
        counts.update({tokens: 2 + 1, token: 1})
        counts.update({frames: 2} if network == "stam" else {frames: 1, frame: 1})
        if make_config(network).remat == "full":
            counts[tokens] += 1  # the attention's output is computed again
    return counts


@pytest.mark.parametrize("tensor", [pytest.param(4, marks=pytest.mark.full), 2])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_forward_pass_sums_the_output_of_each_sub_block(network, tensor):
    config, mesh = make_config(network), make_mesh(tensor)
    graphdef, params = abstract_model(config)
    params = sharding.with_sharding(params, mesh, family_of(config).tensor_splits(config))
    video = batch_shapes(config, mesh)["video"]
    forward = jax.jit(lambda params, video: merge_params(graphdef, params)(video / 255.0))
    operations = hlo.collectives(forward.lower(params, video).compile().as_text())
    assert {name for name, _ in operations} == {"all-reduce"}
    counts = Counter(shape for _, shapes in operations for shape in shapes)
    assert counts == count_activations(network, tensor, backward=False)


@pytest.mark.parametrize("tensor", [pytest.param(2, marks=pytest.mark.full), 4])
@pytest.mark.parametrize(
    "network",
    ["xvit", *(pytest.param(n, marks=pytest.mark.full) for n in NETWORKS if n != "xvit")],
)
def test_a_training_step_sums_each_activation_and_each_gradient_once(network, tensor):
    params, operations = compile_step(make_config(network), make_mesh(tensor))
    assert {name for name, _ in operations} == {"all-reduce"}
    counts = count_arrays(operations)
    activations = count_activations(network, tensor, backward=True)
    assert {shape: counts[shape] for shape in activations} == activations
    assert count_elements(counts - activations) == count_gradients(params)


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), pytest.param(2, 2, marks=pytest.mark.full)])
@pytest.mark.parametrize("network", ["xvit", pytest.param("stam", marks=pytest.mark.full)])
def test_fsdp_gathers_each_weight_once_and_exchanges_no_activations(network, fsdp, tensor):
    config, mesh = make_config(network), make_mesh(tensor, fsdp)
    params, operations = compile_step(config, mesh)
    sharded = [leaf for leaf in params.values() if "fsdp" in leaf.sharding.spec]
    assert len(sharded) > 0.8 * len(params)
    gathered = sharding.without_fsdp([leaf.sharding for leaf in sharded])
    local = [s.shard_shape(leaf.shape) for s, leaf in zip(gathered, sharded, strict=True)]
    gathers = [operation for operation in operations if operation[0] == "all-gather"]
    assert count_elements(count_arrays(gathers)) == Counter(map(math.prod, local))
    # The others are sums of gradients and, with tensor parallelism, of activations.
    counts = count_arrays([o for o in operations if o[0] in ("all-reduce", "reduce-scatter")])
    activations = count_activations(network, tensor, backward=True) if tensor > 1 else Counter()
    assert {shape: counts[shape] for shape in activations} == activations
    if fsdp == 8:  # otherwise, a gradient is summed in two steps: over `fsdp` and over `data`
        assert count_elements(counts) == count_gradients(params)


def compile_step(config, mesh):
    """Compile a training step; return the shapes of the weights and the collectives."""
    program = make_step_program(
        config,
        OptimizerConfig(name="adamw", clip_norm=1.0),
        steps.Recipe(seed=0),
        schedule=lambda step: 0.0 * step,
        mesh=mesh,
        batch_size=CLIPS,
    )
    arguments = program.abstract_state, batch_shapes(config, mesh)
    compiled = program.train_step.func.lower(*arguments, teacher_params=None).compile()
    return program.abstract_state["params"], hlo.collectives(compiled.as_text())


def count_gradients(params) -> Counter:
    """Return how many weights have each size on one device, after they are gathered."""
    # Block 1 runs in one scan with block 0.
    leaves = [leaf for name, leaf in params.items() if ".blocks.1." not in f".{name}"]
    gathered = sharding.without_fsdp([leaf.sharding for leaf in leaves])
    pairs = zip(gathered, leaves, strict=True)
    return Counter(math.prod(s.shard_shape(leaf.shape)) for s, leaf in pairs)


def count_arrays(operations) -> Counter:
    """Return how often arrays of each shape are exchanged, without metrics and norms (scalars)."""
    shapes = [shape for _, shapes in operations for shape in shapes]
    return Counter(shape for shape in shapes if not shape.endswith("[]"))


def count_elements(counts: Counter) -> Counter:
    """Return how often arrays of each size are exchanged; `counts` is by shape."""
    sizes = Counter()
    for shape, count in counts.items():
        sizes[math.prod(map(int, re.fullmatch(r"f32\[(.*)\]", shape)[1].split(",")))] += count
    return sizes
