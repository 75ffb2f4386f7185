"""How far a long job is: a bar on a terminal, whole lines in a log."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

LINE_SECONDS = 10.0  # from one line to the next


def to_stderr(line: str) -> None:
    """Prints a line, unless a terminal shows the bar."""
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


class Progress:
    """Items done, items a second and the time left.

    Args:
        total: Number of items.
        title: What is being done.
        unit: What an item is, in the singular.
        done: Items that an earlier run did.
        bar: Whether a terminal shows a bar.
        tell: Gets a line every `LINE_SECONDS`; None: no lines.

    Attributes:
        done: Items done so far.
    """

    def __init__(
        self,
        total: int,
        *,
        title: str,
        unit: str,
        done: int = 0,
        bar: bool = True,
        tell: Callable[[str], None] | None = to_stderr,
    ):
        self._total, self._title, self._unit, self._tell = total, title, unit, tell
        self.done = self._start_count = done
        self._start = self._told = time.monotonic()
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
        """Counts items as done; `note` is shown behind the numbers."""
        self.done += count
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        if self._tell is not None and now - self._told >= LINE_SECONDS:
            self._told = now
            line = f"{self._title}: {self.done}/{self._total} {self._unit}s, {self.rate():.1f}/s"
            self._tell(", ".join(part for part in (line, f"{self.time_left()} left", note) if part))

    def rate(self) -> float:
        """Items a second since the start of this run."""
        return (self.done - self._start_count) / max(time.monotonic() - self._start, 1e-9)

    def time_left(self) -> str:
        """Minutes and seconds at that rate."""
        rate = self.rate()
        return tqdm.format_interval((self._total - self.done) / rate) if rate else "?"

    def close(self) -> None:
        """Clears the bar."""
        self._bar.close()
