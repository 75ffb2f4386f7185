"""Joining the processes of a run, and JAX's compilation cache."""

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxvid.distributed import jax_runtime, process_group
from jaxvid.errors import InputError
from jaxvid.files import cache_dir

# Environment variables that launchers set: number of processes → (number of processes on this
# machine, matching cluster-detection method of JAX). SLURM_NTASKS is not used: it is also set in an
# allocation in which a program runs alone, without srun. Open MPI comes first, because mpirun may
# start its processes with srun.
LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "mpi4py"),
    "SLURM_STEP_NUM_TASKS": ("SLURM_STEP_TASKS_PER_NODE", "slurm"),
    "PMI_SIZE": ("MPI_LOCALNRANKS", "mpi4py"),
}
# Cluster-detection method → what it requires.
NEEDS = {"mpi4py": "the package mpi4py", "k8s": "the package kubernetes", "slurm": "srun"}
LOG_SECONDS = 10  # time waiting for the other processes after which a line is printed
# JAX's own timeouts of joining and of heartbeats must never be reached: they abort the process with
# a stack dump. `jax_runtime.join` limits the join, and `process_group` has its own heartbeats.
UNLIMITED_SECONDS = 10**6
DETERMINISTIC_FLAG = "--xla_gpu_exclude_nondeterministic_ops=true"
REPORT_SECONDS = 30.0  # time that a process with an invalid command line waits for the others


def init_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    join_seconds: float = process_group.JOIN_SECONDS,
) -> None:
    """Join the other processes of this run, if any. It must be called before JAX is used.

    Without arguments, the number of processes is read from the environment that Slurm (`srun`),
    MPI or an indexed Kubernetes job sets. Open MPI 5 and other MPI libraries need the package
    `mpi4py`, Kubernetes needs `kubernetes`. A process uses all devices of its machine, or one
    device if a launcher started several processes on the machine. `JAX_LOCAL_DEVICE_IDS` selects
    other devices.

    Args:
        coordinator: `HOST:PORT` of process 0, the same in all processes.
        num_processes: Number of processes. If it is 1 and `coordinator` and `process_id` are None,
            the process runs alone, and the environment is ignored.
        process_id: Index of this process.
        join_seconds: Maximum time to wait for the other processes.

    Raises:
        InputError: The arguments are incomplete or invalid, or joining the processes failed.
    """
    explicit = (coordinator, num_processes, process_id)
    # With explicit arguments, JAX's detection is off: it would restrict the process to one device.
    method, shares_devices = "deactivate", False
    if explicit == (None, 1, None):
        return
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit) or not 0 <= process_id < num_processes:
            raise InputError(
                f"--coordinator {coordinator} --num_processes {num_processes} --process_id "
                f"{process_id}: all three are required, and the id must be 0 to num_processes - 1"
            )
        reason = "--num_processes"
    elif launchers := [n for n in LAUNCHERS if os.environ.get(n, "1") not in ("", "0", "1")]:
        reason = launchers[0]
        local_variable, method = LAUNCHERS[reason]
        # Slurm writes 1(x4) for four machines with one process each.
        shares_devices = os.environ.get(local_variable, "").partition("(")[0] != "1"
        if "OMPI_MCA_orte_hnp_uri" in os.environ:  # Open MPI before 5
            method = "ompi"
        num_processes = int(os.environ[reason])
    elif {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
        method, reason = "k8s", "JOB_COMPLETION_INDEX"
    else:
        return
    # JAX's preemption service would swallow a SIGTERM that is received before training starts.
    jax.config.update("jax_enable_preemption_service", False)
    initialize = functools.partial(
        jax.distributed.initialize,
        *(coordinator, num_processes, process_id),
        cluster_detection_method=method,
        initialization_timeout=UNLIMITED_SECONDS,
        heartbeat_timeout_seconds=UNLIMITED_SECONDS,
    )
    try:
        with _log_long_wait(reason):
            jax_runtime.join(initialize, join_seconds)
    except InputError:
        raise
    except (RuntimeError, ValueError, ImportError, KeyError) as error:
        need = f"; {reason} is set, which needs {NEEDS[method]}" if method in NEEDS else ""
        cause = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(
            f"joining the processes failed ({cause}{need}); set --coordinator, --num_processes and "
            "--process_id, or only --num_processes 1 to run alone"
        ) from None
    if not shares_devices:
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, os.environ.get("JAX_LOCAL_DEVICE_IDS") or "all")


@contextlib.contextmanager
def _log_long_wait(reason: str) -> Iterator[None]:
    """Print a line on stderr if the body takes longer than `LOG_SECONDS`."""
    message = (
        f"waiting for the other processes ({reason} is set); use --num_processes 1 to run alone"
    )
    options = {"file": sys.stderr, "flush": True}
    timer = threading.Timer(LOG_SECONDS, print, args=(message,), kwargs=options)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def use_compilation_cache() -> None:
    """Enable JAX's compilation cache in the user's cache folder, see `files.cache_dir`.

    `JAX_COMPILATION_CACHE_DIR` sets a different folder; an empty value disables the cache. If
    there is no home directory (`HOME` is not set and the user has no passwd entry), the cache is
    not enabled.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = cache_dir() / "xla"
    except RuntimeError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def provide_cpu_devices(count: int | None) -> None:
    """Give JAX's CPU backend this number of fake devices, so that a larger machine can be planned.

    It has no effect if XLA_FLAGS sets the number. It must be called before JAX uses a device.

    Args:
        count: Number of devices; None: one.
    """
    if count and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count)


def prepare_compilation(workdir: Path, *, deterministic: bool) -> None:
    """Choose how XLA compiles for a run. It must be called before JAX uses a device.

    A deterministic run excludes GPU operations whose results change between executions. It keeps
    compiled programs and the results of autotuning in its workdir, so that a resumed run executes
    the same kernels.

    Args:
        workdir: The run's folder.
        deterministic: Whether the run is deterministic on GPUs. On CPUs, every run is.

    Raises:
        InputError: JAX has already used a device, so that XLA's flags are fixed.
    """
    if not deterministic:
        use_compilation_cache()
        return
    if DETERMINISTIC_FLAG not in os.environ.get("XLA_FLAGS", "").split():
        if jax_runtime.devices_are_used():
            raise InputError(
                "deterministic=True: JAX has already used a device; set "
                f"XLA_FLAGS={DETERMINISTIC_FLAG} in the environment"
            )
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_FLAG}".strip()
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "xla_cache"))


def end_other_processes(values: dict[str, str], cause: str) -> None:
    """Join the other processes of the run, and end all processes with an error of this one.

    Args:
        values: Values of those of `coordinator`, `num_processes` and `process_id` that are set.
        cause: The error message.
    """
    with contextlib.suppress(InputError, ValueError):
        names = ("num_processes", "process_id")
        numbers = [int(values[name]) if name in values else None for name in names]
        init_processes(values.get("coordinator"), *numbers, join_seconds=REPORT_SECONDS)
        if peers := process_group.current():
            peers.end_together(InputError(cause))
