"""Estimate the memory of a training step without data: `python main.py --mode plan`.

The training step is compiled, but not run. The figures are those of XLA's memory analysis for the
backend of this machine. A CPU compiles other kernels than a GPU, so that its temporary memory is
only a rough estimate for a GPU.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxvid import progress
from jaxvid.distributed import sharding
from jaxvid.errors import InputError
from jaxvid.experiment import Experiment, check_batch_sizes
from jaxvid.models import family_of
from jaxvid.storage.preprocessing import clip_shape
from jaxvid.training.step_program import StepProgram, make_step_program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each device during a training step.

    Attributes:
        weights: The weights, and their moving average if there is one.
        optimizer: The state of the optimizer.
        batch: Pixels, labels and masks.
        temporary: Activations, gradients and everything else that XLA allocates for the step.
    """

    weights: int
    optimizer: int
    batch: int
    temporary: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.optimizer + self.batch + self.temporary


def make_program(experiment: Experiment, batch_size: int) -> tuple[StepProgram, Mesh]:
    """Return the training step of an experiment at a learning rate of 0, and its mesh.

    Args:
        experiment: The resolved config.
        batch_size: Clips per step, over all devices.

    Raises:
        InputError: The mesh does not fit the devices, or a batch size does not fit the mesh.
    """
    mesh = sharding.make_mesh(experiment.mesh)
    check_batch_sizes(dataclasses.replace(experiment, batch_size=batch_size), mesh)
    program = make_step_program(
        experiment.model,
        experiment.optimizer,
        experiment.recipe,
        schedule=lambda step: 0.0 * step,
        mesh=mesh,
        batch_size=batch_size,
    )
    return program, mesh


def measure(experiment: Experiment, batch_size: int) -> Memory:
    """Compile the training step and return its memory per device.

    Args:
        experiment: The resolved config.
        batch_size: Clips per step, over all devices.

    Raises:
        InputError: As in `make_program`.
    """
    program, mesh = make_program(experiment, batch_size)
    state = program.abstract_state
    rows = sharding.batch_sharding(mesh)
    shape = clip_shape(experiment.train_clips, batch_size)
    classes = (experiment.model.num_classes,) if experiment.loss.multi_label else ()
    label_shape = (batch_size, *classes)
    batch = {
        "video": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct(label_shape, jnp.int32, sharding=rows),
        "mask": jax.ShapeDtypeStruct((batch_size,), jnp.bool_, sharding=rows),
    }
    lowered = program.train_step.func.lower(state, batch, teacher_params=None)
    with progress.compiling(f"the training step for batch size {batch_size}"):
        compiled = lowered.compile()
    return Memory(
        weights=_bytes(state["params"]) + _bytes(state.get("ema", {})),
        optimizer=_bytes(state["opt_state"]),
        batch=_bytes(batch),
        temporary=compiled.memory_analysis().temp_size_in_bytes,
    )


def largest_batch(experiment: Experiment, memory_bytes: float) -> tuple[int, Memory] | None:
    """Find a batch size that fits into the memory of a device, at most 2 % below the largest.

    The training step is compiled for several sizes.

    Args:
        experiment: The resolved config.
        memory_bytes: Memory of a device.

    Returns:
        The batch size over all devices and its memory, or None if one clip per device does not fit.
    """
    mesh = sharding.make_mesh(experiment.mesh)
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * experiment.recipe.accumulate_steps
    fitting, result, excessive = 0, None, None  # clips per device
    clips = 2
    while excessive is None or excessive - fitting > max(1, fitting // 50):
        memory = measure(experiment, unit * clips)
        if memory.total <= memory_bytes:
            fitting, result = clips, (unit * clips, memory)
            # Assume that the memory is proportional to the batch size, then bisect.
            clips = max(clips + 1, min(8 * clips, int(clips * memory_bytes / memory.total)))
        else:
            excessive = clips
        if excessive is not None:
            clips = (fitting + excessive) // 2
    return result


def describe(experiment: Experiment, memory_gb: float | None = None) -> str:
    """Describe the network, the memory of a training step, and the largest batch, as text.

    Args:
        experiment: The resolved config.
        memory_gb: Memory of a device in 10⁹ bytes; None: do not search for the largest batch.

    Raises:
        InputError: As in `measure`, or the config has a teacher, whose memory is not estimated.
    """
    if experiment.distill.teacher:
        raise InputError("distill.teacher: --mode plan does not support distillation; set it to ''")
    model, mesh = experiment.model, sharding.make_mesh(experiment.mesh)
    clip = family_of(model).multiply_adds(model, True)
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [
        f"{model.name}: {model.num_params() / 1e6:.2f} M parameters, {clip / 1e9:.3g} G "
        "multiply-adds per clip in the forward pass (attention products included)",
        f"mesh {sizes}; {jax.default_backend()} backend, {model.dtype}",
    ]
    memory = measure(experiment, experiment.batch_size)
    lines.append(f"batch size {experiment.batch_size}: {_describe_memory(memory)}")
    if memory_gb is not None:
        result = largest_batch(experiment, 1e9 * memory_gb)
        if result is None:
            lines.append(f"no batch fits into {memory_gb:g} GB per device")
        else:
            lines.append(
                f"largest batch size for {memory_gb:g} GB per device: {result[0]}: "
                f"{_describe_memory(result[1])}"
            )
    if jax.default_backend() == "cpu":
        lines.append("compiled for a CPU: the temporary memory is a rough estimate for a GPU")
    return "\n".join(lines)


def _describe_memory(memory: Memory) -> str:
    parts = dataclasses.asdict(memory)
    text = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in parts.items())
    return f"{memory.total / 1e9:.3f} GB per device ({text})"


def _bytes(tree: object) -> int:
    """Return the bytes of the part of a tree of shapes that is on one device."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )
