"""Processes, the device mesh, and the one rule that gives every leaf of the state its sharding."""

import functools
import math
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxvid import processes
from jaxvid.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
# Tensor parallelism: the axis of a kernel that is cut, output for the first Linear layer of a pair
# and input for the second.
TENSOR_AXIS = {"qkv": -1, "fc1": -1, "proj": 0, "fc2": 0}
TENSOR_AXIS |= {"self_attn": -1, "linear1": -1, "out_proj": 0, "linear2": 0}  # STAM's aggregator
# How launchers tell how many processes there are, and how many on this machine, and JAX's name for
# the way to join them. Slurm's SLURM_NTASKS does not count: it is the allocation's, and what runs
# in one without srun runs alone. mpirun may start its helpers by srun, and so comes first.
LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "mpi4py"),
    "SLURM_STEP_NUM_TASKS": ("SLURM_STEP_TASKS_PER_NODE", "slurm"),
    "PMI_SIZE": ("MPI_LOCALNRANKS", "mpi4py"),
}
NEEDS = {"mpi4py": "the package mpi4py", "k8s": "the package kubernetes", "slurm": "srun"}
TELL_SECONDS = 10  # a longer wait for the other processes is logged
SHUTDOWN_SECONDS = 60  # how long the processes wait for each other at exit, when all are done
# JAX's own heartbeats must never time out: they abort a process with a stack dump.
HEARTBEAT_SECONDS = 10**6


def init_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    join_seconds: float = processes.JOIN_SECONDS,
) -> None:
    """Join the other processes of this run, if there are any; call it before JAX is used.

    Without arguments the environment decides: a Slurm step or MPI of several tasks, or an indexed
    Kubernetes job. Open MPI from 5 on and other MPIs need the package `mpi4py`, Kubernetes needs
    `kubernetes`. A process has all devices of its machine, or one if a launcher started several
    there.

    Args:
        coordinator: `HOST:PORT` of process 0, the same in all processes.
        num_processes: How many there are; 1 alone: only this one, whatever the environment says.
        process_id: Which one this is, from 0.
        join_seconds: How long to wait for the others.

    Raises:
        InputError: The arguments are incomplete, or the processes cannot be joined.
    """
    explicit = (coordinator, num_processes, process_id)
    # JAX's detection would restrict a process to one device even if all is said.
    method, shares_devices = "deactivate", False
    if explicit == (None, 1, None):
        return
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit) or not 0 <= process_id < num_processes:
            raise InputError(
                f"--coordinator {coordinator} --num_processes {num_processes} --process_id "
                f"{process_id}: all three are needed, and the id counts from 0"
            )
        reason = "--num_processes"
    elif several := [n for n in LAUNCHERS if os.environ.get(n, "1") not in ("", "0", "1")]:
        reason = several[0]
        here, method = LAUNCHERS[reason]
        # Slurm writes 1(x4) for four machines with one process each.
        shares_devices = os.environ.get(here, "").partition("(")[0] != "1"
        if "OMPI_MCA_orte_hnp_uri" in os.environ:  # Open MPI before 5
            method = "ompi"
        num_processes = int(os.environ[reason])
    elif {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
        method, reason = "k8s", "JOB_COMPLETION_INDEX"
    else:
        return
    told = threading.Timer(
        *(TELL_SECONDS, print),
        args=(f"waiting for the other processes ({reason} is set); alone: --num_processes 1",),
        kwargs={"file": sys.stderr, "flush": True},
    )
    told.start()
    # It would swallow a SIGTERM that comes before training does.
    jax.config.update("jax_enable_preemption_service", False)
    initialize = functools.partial(
        jax.distributed.initialize,
        *(coordinator, num_processes, process_id),
        cluster_detection_method=method,
        initialization_timeout=HEARTBEAT_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    try:
        processes.join(initialize, join_seconds)
    except InputError:
        raise
    except (RuntimeError, ValueError, ImportError, KeyError) as error:
        need = f"; {reason} is set, which needs {NEEDS[method]}" if method in NEEDS else ""
        why = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(
            f"the processes cannot be joined ({why}{need}); give --coordinator, --num_processes "
            "and --process_id, or --num_processes 1 alone for a process by itself"
        ) from None
    finally:
        told.cancel()
    if not shares_devices:
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, os.environ.get("JAX_LOCAL_DEVICE_IDS") or "all")


def make_mesh(mesh) -> Mesh:
    """A mesh ('data', 'fsdp', 'tensor') over all devices.

    Args:
        mesh: The config's `mesh`: a size for each axis; -1 for one axis: what is left.

    Raises:
        InputError: The sizes do not multiply to the number of devices.
    """
    sizes = [mesh[axis] for axis in AXES]
    devices = jax.device_count()
    if sizes.count(-1) == 1:
        rest = math.prod(size for size in sizes if size != -1)
        if rest > 0 and devices % rest == 0:
            sizes[sizes.index(-1)] = devices // rest
    if min(sizes) < 1 or math.prod(sizes) != devices:
        asked = ", ".join(f"mesh.{axis}={mesh[axis]}" for axis in AXES)
        raise InputError(
            f"{asked}: cannot be laid over {devices} devices; "
            "the sizes must multiply to that number (one may be -1)"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are cut along their first axis over 'data' and 'fsdp'."""
    return NamedSharding(mesh, BATCH)


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Refuses a global batch size that the mesh cannot cut evenly."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % parts:
        raise InputError(
            f"{name}={batch_size} must be a positive multiple of {parts} (mesh.data · mesh.fsdp)"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def state_sharding(abstract_state, mesh: Mesh):
    """The sharding of every leaf of the state, or of any tree whose dict keys name weights.

    A kernel's `TENSOR_AXIS` is cut over 'tensor', and of a leaf's other axes the longest that
    divides is cut over 'fsdp'. The optimiser's moments follow their weights.

    Args:
        abstract_state: Tree of arrays or shapes.
        mesh: As `make_mesh` gives it.

    Returns:
        The same tree with a `NamedSharding` at each leaf.
    """

    def rule(path, leaf) -> NamedSharding:
        spec = [None] * leaf.ndim
        name = str(getattr(path[-1], "key", "")) if path else ""
        module, _, kind = name.rpartition(".")
        is_kernel = kind in ("kernel", "in_proj_weight")
        axis = TENSOR_AXIS.get(module.rpartition(".")[2]) if is_kernel else None
        if leaf.ndim == 2 and axis is not None and leaf.shape[axis] % mesh.shape["tensor"] == 0:
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


def with_sharding(abstract_tree, mesh: Mesh):
    """The same tree of shapes, each with its sharding from `state_sharding`."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract_tree,
        state_sharding(abstract_tree, mesh),
    )


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on its devices as part of the global arrays."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def rows_of_process(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Which part of every global batch this process makes.

    Returns:
        `(index, count)`: part `index` of `count` equal ones. Processes that share their rows, where
        'tensor' spans several, get the same part.

    Raises:
        InputError: The process's devices hold rows that are not one such part.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = sorted({row for (place,) in places for row in range(batch_size)[place]})
    size = len(rows)
    if rows[-1] - rows[0] + 1 != size or batch_size % size or rows[0] % size:
        raise InputError(
            f"mesh {dict(mesh.shape)}: process {jax.process_index()} would hold scattered clips of "
            "a batch; let mesh.fsdp · mesh.tensor be a multiple or a divisor of its devices"
        )
    return rows[0] // size, batch_size // size


def gather(value, seconds: float = math.inf) -> list:
    """Return every process's value; all processes must call it.

    Args:
        value: A tree that JSON can hold.
        seconds: How long to wait for the others.

    Raises:
        processes.PeerError: Another process failed.
        TimeoutError: Another process did not come in time.
    """
    peers = processes.current()
    return peers.exchange(value, seconds) if peers else [value]


def in_all(function: Callable, *args):
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
            raise processes.PeerError(process, cause)
    return result


def any_process(flag: bool, mesh: Mesh) -> jax.Array | np.bool_:
    """Whether `flag` holds in some process: a scalar that is computed while the caller goes on."""
    if jax.process_count() == 1:
        return np.bool_(flag)
    processes.current().reach()
    everywhere = NamedSharding(mesh, P(mesh.axis_names))
    local = np.full(len(mesh.local_devices), flag)
    flags = jax.make_array_from_process_local_data(everywhere, local, (mesh.size,))
    return _any(flags)


_any = jax.jit(jnp.any)


def wait_for_all(name: str) -> None:
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


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next start is quick.

    `JAX_COMPILATION_CACHE_DIR` moves it; an empty value turns it off. Without a home directory
    (`HOME` is not set and the user has no passwd entry) there is no cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache / "jaxvid" / "xla"))
