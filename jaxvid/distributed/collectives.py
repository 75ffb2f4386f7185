"""Collective operations: calls that all processes of a run must make."""

import math
import platform
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxvid.distributed import process_group
from jaxvid.errors import InputError

Result = TypeVar("Result")
_any = jax.jit(jnp.any)


def gather(value: Any, seconds: float = math.inf) -> list:
    """Return the values of all processes. A collective: all processes must call it.

    Args:
        value: A value that JSON can represent.
        seconds: Maximum time to wait for the other processes; infinite: no limit.

    Raises:
        process_group.PeerError: Another process failed.
        TimeoutError: Another process did not call this function within `seconds`.
    """
    peers = process_group.current()
    return peers.exchange(value, seconds) if peers else [value]


def gather_columns(shard_index: int, columns: dict[str, list]) -> dict[str, list]:
    """Join the columns of all shards of a batch. All processes must call it.

    Args:
        shard_index: Index of this process's shard. Processes with the same index must have the same
            rows, which occur once in the result.
        columns: Name → one value per row of this shard. JSON must be able to represent the values.

    Returns:
        Name → the values of all shards, in the order of the shards.
    """
    shards = dict(gather([shard_index, columns]))
    return {name: sum((shards[i][name] for i in sorted(shards)), []) for name in columns}


def raise_on_all_processes(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function. If it raises an InputError in any process, raise one in all processes.

    If only one process raised it, the other processes would wait for that process forever. All
    processes must call this function.

    Raises:
        InputError: The error of this process; or a `PeerError` with the message of another process.
    """
    result = own_error = None
    try:
        result = function(*args)
    except InputError as error:
        own_error = error
    failures = gather(own_error and [str(own_error), platform.node()])
    if own_error is not None:
        raise own_error
    for process, failure in enumerate(failures):
        if failure is not None:
            raise process_group.PeerError(process, *failure)
    return result


def any_process(flag: bool, mesh: Mesh) -> jax.Array | np.bool_:
    """Return whether `flag` is True in any process. All processes must call it.

    Returns:
        A scalar. With several processes, it is a JAX array that is computed asynchronously.
    """
    if jax.process_count() == 1:
        return np.bool_(flag)
    process_group.current().count_sync_point()
    everywhere = NamedSharding(mesh, P(mesh.axis_names))
    local = np.full(len(mesh.local_devices), flag)
    flags = jax.make_array_from_process_local_data(everywhere, local, (mesh.size,))
    return _any(flags)


def barrier(name: str) -> None:
    """Wait until all processes have reached this barrier.

    Args:
        name: Name of the barrier.

    Raises:
        process_group.PeerError: Another process failed.
        RuntimeError: Another process waits at a barrier with a different name.
    """
    if len(names := {*gather(name)}) > 1:
        raise RuntimeError(f"the processes wait at different barriers: {names}")


def to_host(array: jax.Array) -> np.ndarray:
    """Return a global array as a NumPy array. All processes must call it."""
    if jax.process_count() == 1 or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
