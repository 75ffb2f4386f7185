"""Detection of lost, hung and slow processes from their heartbeats."""

import collections
import dataclasses
import time

from jaxvid.distributed.exits import describe_process
from jaxvid.logs import log

SLOW_SECONDS = 60.0  # length of the first window in which waits for a process are counted


@dataclasses.dataclass
class Heartbeat:
    """Progress of another process, according to its heartbeats.

    Attributes:
        host: Name of its machine; empty: not known yet.
        beat: Number of its last heartbeat.
        reached: Number of synchronization points that it has reached.
        silent: Seconds since its last heartbeat.
        behind: Seconds without progress while this process has reached more synchronization points.
    """

    host: str = ""
    beat: int = 0
    reached: int = 0
    silent: float = 0.0
    behind: float = 0.0

    def update(self, host: str, beat: int, reached: int, own_reached: int, passed: float) -> None:
        """Update the record from the store, `passed` seconds after the last call."""
        is_waiting = reached == self.reached and reached < own_reached
        self.silent = self.silent + passed if beat == self.beat else 0.0
        self.behind = self.behind + passed if is_waiting else 0.0
        self.host, self.beat, self.reached = host, beat, reached


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


class SlowProcesses:
    """Logs processes for which the others wait more than half of the time.

    Only waits of more than two heartbeats are counted, because the last heartbeats of two processes
    may be a second apart.
    """

    def __init__(self):
        self._window = SLOW_SECONDS  # doubled after each log line
        # Number of synchronization points that the fastest process had reached two heartbeats ago,
        # and one heartbeat ago.
        self._fastest = collections.deque([0, 0], maxlen=2)
        # Seconds of each heartbeat, and the processes for which the others were waiting.
        self._beats: collections.deque[tuple[float, set[int]]] = collections.deque()

    def update(self, processes: dict[int, Heartbeat], passed: float) -> None:
        """Update the record, and log processes that are slow.

        Args:
            processes: All processes by index.
            passed: Seconds since the last call.
        """
        late = {index for index, other in processes.items() if other.reached < self._fastest[0]}
        self._fastest.append(max(other.reached for other in processes.values()))
        self._beats.append((passed, late))
        total = sum(seconds for seconds, _ in self._beats)
        while total - self._beats[0][0] >= self._window:
            total -= self._beats.popleft()[0]
        if total < self._window:
            return
        for index in sorted(late):
            wait = sum(seconds for seconds, others in self._beats if index in others)
            if wait > total / 2:
                name = describe_process(index, processes[index].host)
                text = "%s is slow: the others waited for it for %.0f of the last %.0f s"
                log.warning(text, name, wait, total)
                self._window = 2 * total
