"""Detection of lost and hung processes from their heartbeats."""

import dataclasses
import time


@dataclasses.dataclass
class Heartbeat:
    """Progress of another process, according to its heartbeats.

    Attributes:
        beat: Number of its last heartbeat.
        reached: Number of synchronization points that it has reached.
        silent: Seconds since its last heartbeat.
        behind: Seconds without progress while this process has reached more synchronization points.
    """

    beat: int = 0
    reached: int = 0
    silent: float = 0.0
    behind: float = 0.0

    def update(self, beat: int, reached: int, own_reached: int, passed: float) -> None:
        """Update the record from the store, `passed` seconds after the last call."""
        is_waiting = reached == self.reached and reached < own_reached
        self.silent = self.silent + passed if beat == self.beat else 0.0
        self.behind = self.behind + passed if is_waiting else 0.0
        self.beat, self.reached = beat, reached


class Clock:
    """Measures time, excluding time for which this process was suspended.

    Args:
        max_step: Maximum time in seconds that is counted between two calls of `tick`.
    """

    def __init__(self, max_step: float):
        self._last, self._max_step = time.monotonic(), max_step

    def tick(self) -> float:
        """Return the seconds since the last call, at most `max_step`."""
        before, self._last = self._last, time.monotonic()
        return min(self._last - before, self._max_step)
