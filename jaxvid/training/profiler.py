"""A profiler trace of some training steps."""

from pathlib import Path

import jax

from jaxvid.errors import InputError
from jaxvid.logs import log


class ProfilerTrace:
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
