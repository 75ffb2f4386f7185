"""Signals, stalls, traces and late metrics of a training run."""

import contextlib
import functools
import gc
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import jax
import numpy as np

from jaxvid.errors import InputError
from jaxvid.metrics import log, sum_metrics

WEAKREFS = ("weakref", "_weakrefset")  # modules whose functions run as finalizers


class Signals:
    """Records SIGINT and SIGTERM, so that the loop can save and stop; a second one acts at once.

    The handlers that were installed before are restored by the first signal and on exit.

    Attributes:
        received: The number of the signal that was received; None if there was none.
    """

    received: int | None = None
    _at_once = False
    _consequence = "saving, then stopping"
    _wakeup_fd = -1

    def __enter__(self) -> "Signals":
        try:
            # Otherwise `guard` would end the process while it saves.
            self._wakeup_fd = signal.set_wakeup_fd(-1)
            self._before = {
                number: signal.signal(number, self._note)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # not the main thread: whoever called handles signals
            self._before = {}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        then = "stopping; all before it is saved" if self._at_once else self._consequence
        with contextlib.suppress(RuntimeError):  # it came while a line was being written
            log.info("%s: %s", signal.Signals(number).name, then)
        if not _swallows_exceptions(frame):
            self.check()

    def check(self) -> None:
        """Inside `end_at_once`, end the program if a signal was received.

        Raises:
            SystemExit: A signal was received; the code is 128 + its number.
        """
        if self._at_once and self.received is not None:
            raise SystemExit(128 + self.received)

    def checked(self, function: Callable) -> Callable:
        """Wrap a function so that each call checks for signals first."""

        @functools.wraps(function)
        def call(*args):
            self.check()
            return function(*args)

        return call

    def finish_run(self) -> None:
        """Say from now on that a signal does not stop the run: its last outputs are written."""
        self._consequence = "the run ends as soon as its outputs are written"

    @property
    def stops_alone(self) -> bool:
        """Whether a signal stops this process now; one of several stops with the others."""
        return self.received is not None and jax.process_count() == 1

    @contextlib.contextmanager
    def end_at_once(self) -> Iterator[None]:
        """End the program as soon as a signal comes: for work that a continued run does again.

        One of several processes goes on, as the others would wait for it.

        Raises:
            SystemExit: A signal was received; the code is 128 + its number.
        """
        self._at_once = jax.process_count() == 1
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # it was not installed by Python
                signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._wakeup_fd)

    def __exit__(self, *_) -> None:
        self._restore()


def _swallows_exceptions(frame: FrameType | None) -> bool:
    """Whether a frame is part of a finalizer, whose exceptions Python prints and drops."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if frame.f_code in callbacks or frame.f_code.co_name == "__del__" or module in WEAKREFS:
            return True
        frame = frame.f_back
    return False


class Stalls:
    """Logs, while a stage lasts too long, which one it is and what it waits for.

    Args:
        seconds: How long a stage may last before that; each further line takes twice as long.

    Attributes:
        waited: Stage → seconds spent in it.
    """

    def __init__(self, seconds: float):
        self._limit, self._current, self._began = seconds, None, time.monotonic()
        self.waited: dict[str, float] = {}
        self._shared: dict[str, tuple[float, float]] = {}  # stage → waited, when last asked
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def stage(self, name: str, describe: Callable[[], str] = str) -> Iterator[None]:
        """Marks what the caller does.

        Args:
            name: The stage's, for the log.
            describe: Tells, during a stall, what is waited for.
        """
        start = time.monotonic()
        self._current = [name, describe, start, self._limit]
        try:
            yield
        finally:
            self._current = None
            self.waited[name] = self.waited.get(name, 0.0) + time.monotonic() - start

    def share(self, name: str) -> float:
        """The share of the time since the last call for this stage that was spent in it."""
        now, waited = time.monotonic(), self.waited.get(name, 0.0)
        before, since = self._shared.get(name, (0.0, self._began))
        self._shared[name] = (waited, now)
        return (waited - before) / max(now - since, 1e-9)

    def _watch(self) -> None:
        while not self._done.wait(min(self._limit / 4, 5.0)):
            if (current := self._current) is None:
                continue
            name, describe, start, limit = current
            if (passed := time.monotonic() - start) > limit:
                current[3] = 2 * limit
                log.warning("waiting for %s since %.0f s %s", name, passed, describe())

    def close(self) -> None:
        """Ends the watch."""
        self._done.set()
        self._thread.join()


class Trace:
    """A profiler trace of a range of training steps.

    Args:
        steps: First step of the trace and the step before which it ends; None for no trace.
        folder: Where it is written.
        start: The step that the run starts or continues at. Earlier steps cannot be traced.
        total: The run's number of steps.

    Raises:
        InputError: The range ends behind the run's last step.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, *, start: int, total: int):
        self._folder, self._running, self._done = folder, False, start
        self._first, self._end = (max(steps[0], start), steps[1]) if steps else (0, 0)
        if steps and not steps[0] < steps[1] <= total:
            raise InputError(
                f"profile of the steps {steps[0]} to {steps[1]}: the run goes from {start} to "
                f"{total}"
            )
        if steps and self._first >= self._end:
            log.info("no trace: the steps %d to %d are done", *steps)

    def before(self, step: int) -> None:
        """Start the trace if this step is its first."""
        if step == self._first < self._end:
            jax.profiler.start_trace(self._folder)
            self._running, self._done = True, step

    def after(self, step: int, state: dict) -> None:
        """End the trace if it goes up to this step, once the device has computed the state."""
        self._done = step
        if self._running and step == self._end:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Write the trace if it is still running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            log.info(
                "a trace of the steps %d to %d is in %s", self._first, self._done, self._folder
            )


class NotFiniteError(Exception):
    """A step's loss or gradient is not finite.

    Attributes:
        step: Which one.
        ids: Its videos.
    """

    def __init__(self, step: int, ids: list[str]):
        super().__init__(f"step {step}")
        self.step, self.ids = step, ids


class LateMetrics:
    """Sums of the metrics of training steps; read late, so that Python never waits for the device.

    The sums are those of the steps since `take`: the next row of `metrics.jsonl`. A checkpoint
    keeps them, so that a continued run writes the same row.

    Attributes:
        stop: Whether some process had received a signal, at the newest step that was read.
    """

    def __init__(self):
        self._waiting: deque[tuple[int, dict, list[str]]] = deque()
        self._sums: dict[str, np.ndarray] = {}
        self._count = 0
        self.stop = False

    def add(self, step: int, metrics: dict[str, jax.Array], ids: list[str]) -> None:
        """Take a step's metrics, `stop` among them, and the ids of its videos."""
        self._waiting.append((step, metrics, ids))

    def read(self, leave: int = 0) -> None:
        """Fetch all but the newest `leave` steps.

        Raises:
            NotFiniteError: A step's loss or gradient is not finite.
        """
        while len(self._waiting) > leave:
            step, metrics, ids = self._waiting.popleft()
            host = jax.device_get(metrics)
            self.stop = self.stop or bool(host.pop("stop"))
            if not math.isfinite(host["loss"] + host["grad_norm"]):
                raise NotFiniteError(step, ids)
            self._sums = sum_metrics([self._sums, host] if self._count else [host])
            self._count += 1

    def take(self) -> tuple[dict[str, np.ndarray], int]:
        """Return the sums and the number of their steps, and start anew."""
        taken = self._sums, self._count
        self._sums, self._count = {}, 0
        return taken

    def get_state(self) -> dict:
        """Return the sums of the steps that were read, for a checkpoint."""
        return {
            "steps": self._count,
            "sums": {name: value.item() for name, value in self._sums.items()},
        }

    def set_state(self, state: dict) -> None:
        """Continue from a state. JSON keeps int64 and float64 exactly."""
        self._count = state["steps"]
        self._sums = {
            name: (np.float64 if isinstance(value, float) else np.int64)(value)
            for name, value in state["sums"].items()
        }
