"""Compared sides of a benchmark: each runs in its own process, and they take turns.

This module imports neither JAX nor PyTorch, so that the process that compares the sides does not
use the device.
"""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from jaxvid.errors import one_line

THREADS = 2  # of PyTorch on a CPU
ENVIRONMENT = {
    "OMP_NUM_THREADS": str(THREADS),
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # leave memory to the other sides
    # Keep freed memory in the process (glibc). Otherwise each step would allocate fresh memory. A
    # virtual machine may take seconds to provide a GB, which would be counted as time of the step.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}


class Workload(NamedTuple):
    """What every side computes.

    Attributes:
        model: Name of a preset.
        batch: Clips per step.
        dtype: Compute dtype, as in a model's config.
        train: Whether a step is a training step; otherwise, it is a forward pass.
        fields: Name and value of fields of the model's config that differ from the preset.
    """

    model: str
    batch: int
    dtype: str
    train: bool
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """Name of a step."""
        return "training step" if self.train else "forward pass"

    @property
    def command(self) -> str:
        """The command that measures this workload."""
        options = f"--model {self.model} --batch {self.batch} --dtype {self.dtype}"
        return f"python benchmarks/forward.py {options}{' --train' if self.train else ''}"


class Program(NamedTuple):
    """The program of a side.

    Attributes:
        run: Function of a number of steps: runs them and waits for the last result.
        peak_bytes: Function that returns the peak memory so far.
        platform: `gpu` or `cpu`.
        compile_seconds: Time for tracing and compilation; None if it is part of the first step.
    """

    run: Callable[[int], None]
    peak_bytes: Callable[[], int]
    platform: str
    compile_seconds: float | None


class SideError(RuntimeError):
    """An exception in the process of a side, or its end; the message is one line."""


def resident_peak() -> int:
    """Return the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Side:
    """A process that runs one side of a comparison.

    Args:
        make: Function without arguments that returns a `Program`; it is called in the process.
            None: the process has no program, and only `call` can be used.
        environment: Environment variables of the process, e.g. `XLA_FLAGS`.
    """

    def __init__(
        self,
        make: Callable[[], Program] | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        """Start the process."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)  # glibc reads them when the process starts
        spawn = multiprocessing.get_context("spawn")
        self._make = make
        self._pool = ProcessPoolExecutor(
            1, mp_context=spawn, initializer=_set_up, initargs=({**(environment or {})},)
        )
        self._pid = self._pool.submit(os.getpid)

    def start(self) -> Future:
        """Start to build the program and to run it once; `finish` waits for it."""
        return self._pool.submit(_guarded, _prepare, self._make)

    def finish(
        self, future: Future, timeout: float | None = None
    ) -> tuple[str, float | None, float]:
        """Wait for a call that `start` returned.

        Args:
            future: The call.
            timeout: Seconds to wait; None: no limit.

        Returns:
            The platform, the compile time as in `Program`, and the total time in seconds.

        Raises:
            SideError: The call raised an exception, the process ended, or the time is over.
        """
        try:
            return future.result(timeout)
        except BrokenProcessPool:
            raise SideError("the process was aborted; its output has the reason") from None
        except TimeoutError:
            self.kill()
            raise SideError("not ready in time") from None

    def seconds(self, count: int = 1) -> float:
        """Run `count` steps and return the mean time of one in seconds.

        Raises:
            SideError: As in `finish`.
        """
        return self.call(_time, count)

    def peak_bytes(self) -> int:
        """Return the peak memory of the side in bytes, on the GPU if there is one."""
        return self.call(_peak_bytes)

    def call(self, function: Callable, *arguments: Any) -> Any:
        """Call a function in the process.

        Raises:
            SideError: As in `finish`.
        """
        return self.finish(self._pool.submit(_guarded, function, *arguments))

    def kill(self) -> None:
        """Kill the process, which may be in the middle of a call."""
        for child in multiprocessing.active_children():
            if child.pid == self._pid.result():
                child.kill()

    def close(self) -> None:
        """End the process, which frees its memory on the device."""
        self._pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------ in the process of a side

_program: Program


def _set_up(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def _guarded(function: Callable, *arguments: Any) -> Any:
    """Call a function; replace an exception, which may not be picklable, by a SideError."""
    try:
        return function(*arguments)
    except Exception as error:
        message = f"{type(error).__name__}: {one_line(error, 300)}"
        print(message, flush=True)
        raise SideError(message) from None


def _prepare(make: Callable[[], Program]) -> tuple[str, float | None, float]:
    global _program
    start = time.perf_counter()
    _program = make()
    _program.run(1)
    return _program.platform, _program.compile_seconds, time.perf_counter() - start


def _time(count: int) -> float:
    start = time.perf_counter()
    _program.run(count)
    return (time.perf_counter() - start) / count


def _peak_bytes() -> int:
    return _program.peak_bytes()
