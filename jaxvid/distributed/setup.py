"""Joining the processes of a run, and the cache of compiled programs."""

import contextlib
import functools
import os
import sys
import threading
from pathlib import Path

import jax

from jaxvid.distributed import process_group
from jaxvid.errors import InputError

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
REPORT_SECONDS = 30.0  # how long a process with an invalid command line waits for the others


def init_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    join_seconds: float = process_group.JOIN_SECONDS,
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
        process_group.join(initialize, join_seconds)
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


def end_other_processes(values: dict[str, str], cause: str) -> None:
    """Join the other processes of the run, so that they end with an error of this one.

    Args:
        values: The flags `coordinator`, `num_processes` and `process_id`, as far as they are given.
        cause: The error message.
    """
    with contextlib.suppress(InputError, ValueError):
        names = ("num_processes", "process_id")
        numbers = [int(values[name]) if name in values else None for name in names]
        init_processes(values.get("coordinator"), *numbers, join_seconds=REPORT_SECONDS)
        if peers := process_group.current():
            peers.end_together(InputError(cause))
