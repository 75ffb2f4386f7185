"""Progress of long operations: a bar on a terminal, or log lines."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

LINE_SECONDS = 10.0  # minimum time between two progress lines


def to_stderr(line: str) -> None:
    """Print a line on stderr, unless stderr is a terminal, which may show the bar."""
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


class Progress:
    """Number of finished items, items per second and remaining time.

    Args:
        total: Number of items.
        title: Name of the operation.
        unit: Name of an item, in the singular, or an abbreviation in capitals, e.g. `MB`.
        done: Number of items that an earlier run finished.
        bar: Whether to show a bar if stderr is a terminal.
        write_line: Called with a progress line, at most every `LINE_SECONDS`; None: no lines.

    Attributes:
        done: Number of finished items.
    """

    def __init__(
        self,
        total: int,
        *,
        title: str,
        unit: str,
        done: int = 0,
        bar: bool = True,
        write_line: Callable[[str], None] | None = to_stderr,
    ):
        self._total, self._title, self._write_line = total, title, write_line
        self._units = unit if unit.isupper() else f"{unit}s"
        self.done = self._start_count = done
        self._start = self._last_line = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=f" {unit}",
            desc=title,
            leave=False,
            dynamic_ncols=True,
            disable=not (bar and sys.stderr.isatty()),
        )

    def advance(self, count: int, note: str = "") -> None:
        """Add `count` finished items; show `note` after the numbers."""
        self.done += count
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        if self._write_line is not None and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            line = f"{self._title}: {self.done}/{self._total} {self._units}, {self.rate():.1f}/s"
            parts = (line, f"{self.time_left()} left", note)
            self._write_line(", ".join(part for part in parts if part))

    def rate(self) -> float:
        """Return the items per second since the start of this run."""
        return (self.done - self._start_count) / max(time.monotonic() - self._start, 1e-9)

    def time_left(self) -> str:
        """Return the remaining time at the current rate, e.g. `01:30`, or `?` if it is unknown."""
        rate = self.rate()
        return tqdm.format_interval((self._total - self.done) / rate) if rate else "?"

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
