"""Tensor parallelism exchanges activations only once per sub-block."""

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


def make_mesh(tensor):
    return sharding.make_mesh(sharding.MeshShape(data=-1, tensor=tensor))


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
@pytest.mark.parametrize("network", NETWORKS)
def test_a_training_step_sums_each_activation_and_each_gradient_once(network, tensor):
    config, mesh = make_config(network), make_mesh(tensor)
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
    operations = hlo.collectives(compiled.as_text())
    assert {name for name, _ in operations} == {"all-reduce"}
    counts = Counter(shape for _, shapes in operations for shape in shapes)
    # Metrics and the norm of the gradient.
    counts = Counter({shape: n for shape, n in counts.items() if not shape.endswith("[]")})
    activations = count_activations(network, tensor, backward=True)
    assert {shape: counts[shape] for shape in activations} == activations
    gradients, weights = Counter(), Counter()  # number of arrays by number of elements
    for shape, count in (counts - activations).items():
        sizes = re.fullmatch(r"f32\[(.*)\]", shape)[1].split(",")
        gradients[math.prod(map(int, sizes))] += count
    for name, leaf in program.abstract_state["params"].items():
        if ".blocks.1." not in f".{name}":  # runs in one scan with block 0
            weights[math.prod(leaf.sharding.shard_shape(leaf.shape))] += 1
    assert gradients == weights
