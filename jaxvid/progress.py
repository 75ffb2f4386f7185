"""Progress of long operations: a bar on a terminal, or log lines."""

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from jaxvid.errors import InputError

LINE_SECONDS = 10.0  # minimum time between two progress lines
COMPILE_SECONDS = 1.0  # duration of a compilation after which it is announced
_compiling = threading.local()  # has `name` inside `compiling`


def to_stderr(line: str) -> None:
    """Print a line on stderr, unless stderr is a terminal, which may show the bar."""
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def print_above_bar(line: str) -> None:
    """Print a line on stderr, above the bar if there is one. A closed stderr is ignored."""
    with contextlib.suppress(SystemExit, InputError, OSError):
        tqdm.write(line, file=sys.stderr)


@contextlib.contextmanager
def compiling(name: str, write_line: Callable[[str], None] = print_above_bar) -> Iterator[None]:
    """Announce the compilation in the body, and its duration, if it is slow.

    Programs in the compilation cache usually load in less than `COMPILE_SECONDS`, so that they are
    not announced. In the body of another `compiling` of the same thread, which announces all
    compilations together, nothing is announced.

    Args:
        name: Name of the compiled function, e.g. `the training step`.
        write_line: Called with `compiling NAME…` after `COMPILE_SECONDS`, by another thread, and
            with `compiled in 14 s` at the end.
    """
    if hasattr(_compiling, "name"):
        yield
        return
    announced, start = threading.Event(), time.monotonic()

    def announce() -> None:
        announced.set()
        write_line(f"compiling {name}…")

    timer = threading.Timer(COMPILE_SECONDS, announce)
    timer.daemon = True
    timer.start()
    _compiling.name = name
    try:
        yield
    finally:
        del _compiling.name
        timer.cancel()
        timer.join()
    if announced.is_set():
        write_line(f"compiled in {time.monotonic() - start:.0f} s")


def announce_compilation(
    function: Callable[..., Any], name: str, write_line: Callable[[str], None]
) -> Callable[..., Any]:
    """Wrap a jitted function so that its compilation in the first call is announced.

    Args:
        function: A function returned by `jax.jit`, or a `functools.partial` of one.
        name: As in `compiling`.
        write_line: As in `compiling`.
    """
    compiled = False

    def call(*args: Any) -> Any:
        nonlocal compiled
        if not compiled:
            # Tracing is excluded, because it takes as long if the program is in the cache.
            partial = functools.partial(function, *args)
            lowered = partial.func.lower(*partial.args, **partial.keywords)
            with compiling(name, write_line):
                lowered.compile()
            compiled = True
        return function(*args)  # JAX reuses the compiled program

    return call


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
