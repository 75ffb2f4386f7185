"""A profiler trace of some training steps."""

from pathlib import Path

import jax

from jaxvid.errors import InputError
from jaxvid.logs import log


class ProfilerTrace:
    """A profiler trace of a range of training steps.

    Args:
        steps: First step of the trace and the step before which it ends; None for no trace.
        folder: Output folder of the trace.
        start: The step that the run starts or resumes at. Earlier steps cannot be traced.
        total: The run's number of steps.

    Raises:
        InputError: The range is empty or ends after the run's last step.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, *, start: int, total: int):
        self._folder = folder
        self._running = False
        self._done = start  # number of steps that are done
        self._first = self._end = 0  # an empty range: no trace
        if steps is None:
            return
        first, end = steps
        if not first < end <= total:
            raise InputError(
                f"profile of steps {first} to {end}: expected START < STOP <= {total}, the number "
                "of steps of the run"
            )
        self._first, self._end = max(first, start), end
        if self._first >= self._end:
            log.info("no trace: the steps %d to %d are already done", first, end)

    def before(self, step: int) -> None:
        """Start the trace if this step is its first."""
        if step == self._first < self._end:
            jax.profiler.start_trace(self._folder)
            self._running, self._done = True, step

    def after(self, step: int, state: dict) -> None:
        """End the trace if it ends at this step, after the device has computed the state."""
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
