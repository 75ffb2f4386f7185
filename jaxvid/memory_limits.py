"""Limits of the memory of a process: `ulimit -v` (address space) and `ulimit -d` (data)."""

import importlib
import os
import re
import resource
from pathlib import Path

from jaxvid.errors import InputError

KINDS = {"ulimit -v": resource.RLIMIT_AS, "ulimit -d": resource.RLIMIT_DATA}
USED = {"ulimit -v": "VmSize", "ulimit -d": "VmData"}  # lines of /proc/self/status
OPENBLAS_BYTES = 300 * 10**6  # twice what NumPy and SciPy need to load their copies of OpenBLAS


def describe() -> list[str]:
    """Return a text for each limit that is set, e.g. `ulimit -v is 4000 MB`."""
    return [f"{name} is {limit / 1e6:.0f} MB" for name, limit in _limits().items()]


def load_openblas() -> None:
    """Load OpenBLAS first: while it is loaded, it retries failed allocations without end.

    Raises:
        InputError: A limit does not leave enough memory.
    """
    status = Path("/proc/self/status").read_text()
    for name, limit in _limits().items():
        used = int(re.search(rf"{USED[name]}:\s*(\d+) kB", status)[1]) * 1024
        if limit - used < OPENBLAS_BYTES:
            raise InputError(f"out of memory ({'; '.join(describe())}); raise the limit")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its buffers grow with the number of threads
    for module in ("numpy", "scipy.special"):
        importlib.import_module(module)


def _limits() -> dict[str, int]:
    """Return the limits that are set, in bytes."""
    limits = {name: resource.getrlimit(kind)[0] for name, kind in KINDS.items()}
    return {name: limit for name, limit in limits.items() if limit != resource.RLIM_INFINITY}
