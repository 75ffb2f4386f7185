"""Exchanges between the processes of a run."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxvid.distributed import process_group
from jaxvid.errors import InputError

_any = jax.jit(jnp.any)


def gather(value, seconds: float = math.inf) -> list:
    """Return every process's value; all processes must call it.

    Args:
        value: A tree that JSON can hold.
        seconds: How long to wait for the others.

    Raises:
        processes.PeerError: Another process failed.
        TimeoutError: Another process did not come in time.
    """
    peers = process_group.current()
    return peers.exchange(value, seconds) if peers else [value]


def raise_on_all_processes(function: Callable, *args):
    """Call a function; raise its InputError in any process on all of them, so that none waits.

    Raises:
        InputError: This process's own, or a `PeerError` of another.
    """
    result = refusal = None
    try:
        result = function(*args)
    except InputError as error:
        refusal = error
    causes = gather(refusal and str(refusal))
    if refusal is not None:
        raise refusal
    for process, cause in enumerate(causes):
        if cause is not None:
            raise process_group.PeerError(process, cause)
    return result


def any_process(flag: bool, mesh: Mesh) -> jax.Array | np.bool_:
    """Whether `flag` holds in some process: a scalar that is computed while the caller goes on."""
    if jax.process_count() == 1:
        return np.bool_(flag)
    process_group.current().reach()
    everywhere = NamedSharding(mesh, P(mesh.axis_names))
    local = np.full(len(mesh.local_devices), flag)
    flags = jax.make_array_from_process_local_data(everywhere, local, (mesh.size,))
    return _any(flags)


def barrier(name: str) -> None:
    """Return once every process is here.

    Args:
        name: Of this point of the program.

    Raises:
        processes.PeerError: Another process failed.
        RuntimeError: Another process is at another point.
    """
    if len(names := {*gather(name)}) > 1:
        raise RuntimeError(f"the processes wait for each other at different points: {names}")


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array, also where other processes hold parts of it; all must call it."""
    if jax.process_count() == 1 or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
