"""What watches over a training run: signals, waits that last too long, losses that blow up."""

import contextlib
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import jax
import numpy as np

from jaxvid.metrics import log, sum_metrics


class Signals:
    """Notes SIGINT and SIGTERM, so that the loop can save and stop; a second one acts at once.

    Attributes:
        received: The signal that came; None: none yet.
    """

    received: int | None = None
    _at_once = False
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

    def _note(self, number: int, _) -> None:
        self.received = number
        self._restore()
        then = "stopping; all before it is saved" if self._at_once else "saving, then stopping"
        log.info("%s: %s", signal.Signals(number).name, then)
        if self._at_once:
            raise SystemExit(128 + number)

    @contextlib.contextmanager
    def end_at_once(self) -> Iterator[None]:
        """Inside, a signal ends the program at once: for work that a continued run does again.

        One of several processes goes on, for the others would wait for it.

        Raises:
            SystemExit: A signal came; code 128 + its number.
        """
        self._at_once = jax.process_count() == 1
        try:
            if self._at_once and self.received is not None:
                raise SystemExit(128 + self.received)
            yield
        finally:
            self._at_once = False

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._wakeup_fd)

    def __exit__(self, *_) -> None:
        self._restore()


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
    """Metrics of steps that the device may still compute; read late, so that it never waits.

    Attributes:
        stop: Whether some process had been told to stop, at the newest step that was read.
    """

    def __init__(self):
        self._waiting: deque[tuple[int, dict, list[str]]] = deque()
        self._read: list[dict] = []
        self.stop = False

    def add(self, step: int, metrics: dict[str, jax.Array], ids: list[str]) -> None:
        """Takes a step's metrics, `stop` among them, and its videos."""
        self._waiting.append((step, metrics, ids))

    def read(self, leave: int = 0) -> None:
        """Fetches all but the newest `leave` steps.

        Raises:
            NotFiniteError: A step's loss or gradient is not.
        """
        while len(self._waiting) > leave:
            step, metrics, ids = self._waiting.popleft()
            host = jax.device_get(metrics)
            self.stop = self.stop or bool(host.pop("stop"))
            if not math.isfinite(host["loss"] + host["grad_norm"]):
                raise NotFiniteError(step, ids)
            self._read.append(host)

    def take(self) -> tuple[dict[str, np.ndarray], int]:
        """The sums of what was read since the last call, and of how many steps."""
        read, self._read = self._read, []
        return sum_metrics(read), len(read)
