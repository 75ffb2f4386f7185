"""Waiting for other threads and processes."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    """Wait until `condition()` is true; fail after `seconds`.

    Tests of pages use it, too: Playwright's `wait_for_function` evaluates strings in the page,
    which eval.html's content security policy forbids.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true within {seconds:.0f} seconds"
        time.sleep(0.01)
