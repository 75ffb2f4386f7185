"""SIGINT and SIGTERM during training."""

import contextlib
import functools
import gc
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import jax

from jaxvid.logs import log

WEAKREFS = ("weakref", "_weakrefset")  # modules whose functions run inside finalizers


class StopSignals:
    """Records SIGINT or SIGTERM, so that the loop can save and stop; a second one acts at once.

    The first signal, and the exit of the context, restore the previous handlers.

    Attributes:
        received: The number of the signal that was received, or None.
    """

    received: int | None = None
    _at_once = False
    _consequence = "saving, then stopping"
    _wakeup_fd = -1

    def __enter__(self) -> "StopSignals":
        try:
            # If the wake-up descriptor stayed, `entry_point` would end the process before the state
            # is saved.
            self._wakeup_fd = signal.set_wakeup_fd(-1)
            self._before = {
                number: signal.signal(number, self._handle)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # not the main thread: signals are left to the caller
            self._before = {}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        consequence = (
            "stopping; everything before the evaluation is saved"
            if self._at_once
            else self._consequence
        )
        with contextlib.suppress(RuntimeError):  # the signal interrupted the writing of a log line
            log.info("%s: %s", signal.Signals(number).name, consequence)
        if not _swallows_exceptions(frame):
            self.check()

    def check(self) -> None:
        """Inside `end_at_once`, end the program if a signal was received.

        Raises:
            SystemExit: A signal was received; the code is 128 + its number.
        """
        if self._at_once and self.received is not None:
            raise SystemExit(128 + self.received)

    def checked(self, function: Callable) -> Callable:
        """Wrap a function so that each call checks for signals first."""

        @functools.wraps(function)
        def call(*args):
            self.check()
            return function(*args)

        return call

    def finish_run(self) -> None:
        """Change what is logged on a signal: the run ends as soon as its outputs are written."""
        self._consequence = "the run ends as soon as its outputs are written"

    @property
    def stops_alone(self) -> bool:
        """Whether a signal stops this process now. Several processes stop together instead."""
        return self.received is not None and jax.process_count() == 1

    @contextlib.contextmanager
    def end_at_once(self) -> Iterator[None]:
        """End the program as soon as a signal is received, for work that a resumed run repeats.

        If there are several processes, none ends early, as the others would wait for it.

        Raises:
            SystemExit: A signal was received; the code is 128 + its number.
        """
        self._at_once = jax.process_count() == 1
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: the handler was not installed by Python
                signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._wakeup_fd)

    def __exit__(self, *_) -> None:
        self._restore()


def _swallows_exceptions(frame: FrameType | None) -> bool:
    """Return whether a frame runs in a finalizer or callback whose exceptions Python ignores."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if frame.f_code in callbacks or frame.f_code.co_name == "__del__" or module in WEAKREFS:
            return True
        frame = frame.f_back
    return False
