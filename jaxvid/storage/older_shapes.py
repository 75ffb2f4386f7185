"""Weights in files of older versions, whose shapes were different.

In older files, queries, keys and values share one axis: `(d, 3·d)` instead of `(d, 3, d)`, and
`(3·d,)` instead of `(3, d)`. The elements are in the same order.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxvid.models.family import QKV_WEIGHTS

Tree = Any  # a pytree


def older_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a weight has in older files."""
    return (*shape[:-2], shape[-2] * shape[-1]) if name.endswith(QKV_WEIGHTS) else tuple(shape)


def match_file(target: Tree, stored: Mapping[str, Any]) -> Tree:
    """Give the leaves of a restore target the shapes that they have in an older file.

    Args:
        target: Tree of the arrays to restore. Its dict keys name weights. Leaves are shapes with
            optional shardings, or NumPy arrays.
        stored: The weights in the file by name; only their shapes are read. Other leaves of the
            target, for example moments of the optimizer, have the shapes of their weights.

    Returns:
        The target to restore. Leaves whose shape in the file is neither the current nor the older
        one are unchanged.
    """

    def rule(path: tuple, leaf: Any) -> Any:
        name = getattr(path[-1], "key", None)
        if name not in stored or leaf.shape == tuple(stored[name].shape):
            return leaf
        shape = older_shape(name, leaf.shape)
        if shape != tuple(stored[name].shape):
            return leaf
        if isinstance(leaf, np.ndarray):
            return np.broadcast_to(leaf.dtype.type(0), shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=_older_sharding(leaf))

    return jax.tree_util.tree_map_with_path(rule, target)


def _older_sharding(leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding | None:
    """Return the sharding of an array whose last two axes are merged to one."""
    if not isinstance(leaf.sharding, NamedSharding):
        return leaf.sharding
    spec = (*leaf.sharding.spec, *[None] * leaf.ndim)[: leaf.ndim]
    return NamedSharding(leaf.sharding.mesh, P(*spec[:-2], spec[-1]))


def to_current(restored: Tree, target: Tree) -> Tree:
    """Reshape restored arrays to the shapes and shardings of the target given to `match_file`."""

    def rule(array: Any, leaf: Any) -> Any:
        if array.shape == leaf.shape:
            return array
        if isinstance(array, np.ndarray):
            return array.reshape(leaf.shape)
        # Compiled, because the array may span several processes.
        reshape = jax.jit(_reshape, static_argnums=1, out_shardings=leaf.sharding)
        return reshape(array, leaf.shape)

    return jax.tree.map(rule, restored, target)


def _reshape(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return x.reshape(shape)
