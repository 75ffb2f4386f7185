"""A watchdog for stages of training that block."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from jaxvid.logs import log


class Watchdog:
    """Logs a stage that blocks, and what it waits for.

    Args:
        seconds: Duration of a stage after which it is logged, doubled after each line.

    Attributes:
        waited: Stage → seconds spent in it.
    """

    def __init__(self, seconds: float):
        self._limit, self._current, self._began = seconds, None, time.monotonic()
        self.waited: dict[str, float] = {}
        # Stage → (seconds spent in it, time) at the last call of `share`.
        self._shared: dict[str, tuple[float, float]] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def stage(self, name: str, describe: Callable[[], str] = str) -> Iterator[None]:
        """Measure the time of a stage, and log the stage if it blocks.

        Args:
            name: The name of the stage.
            describe: Returns a description of what the stage waits for; empty: unknown.
        """
        start = time.monotonic()
        self._current = [name, describe, start, self._limit]
        try:
            yield
        finally:
            self._current = None
            self.waited[name] = self.waited.get(name, 0.0) + time.monotonic() - start

    def share(self, name: str) -> float:
        """Return the share of time spent in a stage since the last call for this stage.

        The first call counts from the start of the watchdog.
        """
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
                cause = f": {text}" if (text := describe()) else ""
                log.warning("waiting for %s for %.0f s%s", name, passed, cause)

    def close(self) -> None:
        """Stop the thread."""
        self._done.set()
        self._thread.join()
