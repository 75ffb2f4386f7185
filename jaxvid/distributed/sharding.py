"""Device mesh and sharding rules for batches and the training state."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxvid.errors import InputError

Tree = Any  # a pytree
AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
# End of a weight's name, e.g. `attn.qkv.kernel` → the axis that is sharded over 'tensor', and the
# number of attention heads on this axis, or None if it has no heads.
TensorSplits = Mapping[str, tuple[int, int | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Sizes of the device mesh's axes.

    Attributes:
        data: Number of groups of devices; each group has a copy of the weights.
        fsdp: Number of devices over which a group shards the weights. Batches are split over `data`
            and `fsdp`.
        tensor: Number of devices that share each matrix product. One of the three sizes may be -1:
            the number of devices divided by the product of the two others.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    @property
    def size(self) -> int | None:
        """Number of devices, or None if a size is -1."""
        sizes = [getattr(self, axis) for axis in AXES]
        return math.prod(sizes) if min(sizes) > 0 else None


def make_mesh(shape: MeshShape) -> Mesh:
    """Return a mesh ('data', 'fsdp', 'tensor') over all devices.

    Raises:
        InputError: The product of the sizes is not the number of devices.
    """
    sizes = [getattr(shape, axis) for axis in AXES]
    devices = jax.device_count()
    if sizes.count(-1) == 1:
        rest = math.prod(size for size in sizes if size != -1)
        if rest > 0 and devices % rest == 0:
            sizes[sizes.index(-1)] = devices // rest
    if min(sizes) < 1 or math.prod(sizes) != devices:
        asked = ", ".join(f"mesh.{axis}={getattr(shape, axis)}" for axis in AXES)
        raise InputError(
            f"{asked}: do not fit {devices} devices; "
            "the product of the sizes must be that number (one size may be -1)"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batches: the first axis is split over 'data' and 'fsdp'."""
    return NamedSharding(mesh, BATCH)


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Refuse a global batch size that is not divisible by the mesh axes 'data' and 'fsdp'."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % parts:
        raise InputError(
            f"{name}={batch_size} must be a positive multiple of {parts} (mesh.data · mesh.fsdp)"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that gives every device a complete copy of an array."""
    return NamedSharding(mesh, P())


def state_sharding(abstract_state: Tree, mesh: Mesh, tensor_splits: TensorSplits) -> Tree:
    """Return the sharding of every leaf of the state, or of any tree whose dict keys name weights.

    A weight in `tensor_splits` is sharded over 'tensor' along the given axis, if the number of
    heads on this axis, or its size if it has no heads, is divisible by the size of 'tensor'. The
    longest of the other axes whose sizes are divisible by that of 'fsdp' is sharded over 'fsdp'.
    The moments of the optimizer have the sharding of their weights.

    Args:
        abstract_state: Tree of arrays or shapes.
        mesh: The mesh, from `make_mesh`.
        tensor_splits: The weights to shard over 'tensor', from `Family.tensor_splits`.

    Returns:
        The same tree with a `NamedSharding` at each leaf.
    """

    def rule(path: tuple, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        spec = [None] * leaf.ndim
        name = str(getattr(path[-1], "key", "")) if path else ""
        for end, (axis, heads) in tensor_splits.items():
            if f".{name}".endswith(f".{end}"):
                parts = leaf.shape[axis] if heads is None else heads
                if parts % mesh.shape["tensor"] == 0:
                    spec[axis] = "tensor"
        free = [
            i
            for i, size in enumerate(leaf.shape)
            if spec[i] is None and size > 1 and size % mesh.shape["fsdp"] == 0
        ]
        if free:
            spec[max(free, key=lambda i: leaf.shape[i])] = "fsdp"
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(rule, abstract_state)


def gather_fsdp(params: Tree, mesh: Mesh, tensor_splits: TensorSplits) -> Tree:
    """Gather weights that are sharded over 'fsdp', in a jitted function.

    Each device then computes its own part of the batch with complete weights, as ZeRO does
    (Rajbhandari et al., arXiv:1910.02054). Otherwise, XLA may split the activations like the
    weights, and give each device a part of the width but the clips of all devices. Gradients with
    respect to the result are sharded like the weights.

    Args:
        params: Weights by name, sharded as in `state_sharding`.
        mesh: The mesh.
        tensor_splits: The weights that are sharded over 'tensor', which are not gathered over it.
    """
    if mesh.shape["fsdp"] == 1:
        return params
    sharded = state_sharding(params, mesh, tensor_splits)
    gathered = without_fsdp(sharded)

    @jax.custom_vjp
    def gather(params: Tree) -> Tree:
        return jax.lax.with_sharding_constraint(params, gathered)

    def forward(params: Tree) -> tuple[Tree, None]:
        return gather(params), None

    def backward(_: None, gradients: Tree) -> tuple[Tree]:
        return (jax.lax.with_sharding_constraint(gradients, sharded),)

    gather.defvjp(forward, backward)
    return gather(params)


def without_fsdp(shardings: Tree) -> Tree:
    """Return the same shardings, but replicated over 'fsdp'."""
    return jax.tree.map(
        lambda s: NamedSharding(s.mesh, P(*(None if axis == "fsdp" else axis for axis in s.spec))),
        shardings,
    )


def shard(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Return a global array, made from a complete copy in each process."""
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def with_sharding(abstract_tree: Tree, mesh: Mesh, tensor_splits: TensorSplits) -> Tree:
    """Add the shardings of `state_sharding` to a tree of shapes."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_tree,
        state_sharding(abstract_tree, mesh, tensor_splits),
    )


def to_global_arrays(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return global arrays, made from each process's part of a batch."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def batch_shard(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Return the part of every global batch that this process loads.

    Returns:
        `(index, count)`: part `index` of `count` equal parts. If 'tensor' spans several processes,
        these load the same part.

    Raises:
        InputError: The rows of this process's devices are not one such part.
    """
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = sorted({row for (rows,) in slices for row in range(batch_size)[rows]})
    size = len(rows)
    if rows[-1] - rows[0] + 1 != size or batch_size % size or rows[0] % size:
        raise InputError(
            f"mesh {dict(mesh.shape)}: process {jax.process_index()} would hold non-contiguous "
            "rows of a batch; make mesh.fsdp · mesh.tensor a multiple or a divisor of the number "
            "of its devices"
        )
    return rows[0] // size, batch_size // size
