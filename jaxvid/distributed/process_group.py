"""The processes of a run: they exchange values, and end together when one of them fails.

Values are exchanged without devices, through the key-value store of JAX's distributed runtime in
process 0. Every process writes a heartbeat to the store each second. A process that fails writes
the cause before it ends. All other processes read the cause, print it and end, even if their main
thread waits in a device collective or an Orbax barrier.
"""

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from jaxvid import entry_point
from jaxvid.distributed import jax_runtime
from jaxvid.distributed.exits import (
    PeerError,
    describe,
    describe_silence,
    end_at_exit,
    end_now,
    exit_code,
    is_of_runtime,
    report,
)
from jaxvid.distributed.heartbeat import Clock, Heartbeat, SlowProcesses
from jaxvid.distributed.jax_runtime import Connection
from jaxvid.distributed.store import set_last_key
from jaxvid.errors import InputError

JOIN_SECONDS = 300.0  # time limit for the start of all processes of a run
BEAT_SECONDS = 1.0  # time between two heartbeats
LOST_SECONDS = 30.0  # time without a heartbeat after which a process counts as lost
HUNG_SECONDS = 1800.0  # time without progress after which a running process counts as hung
GRACE_SECONDS = 5.0  # time for the main thread to report a failure and end the process
ANNOUNCE_SECONDS = 5.0  # maximum time that a signal's announcement delays the end of the process


def current() -> "ProcessGroup | None":
    """Return the process group of this run, or None if this process runs alone."""
    global _current
    if _current is None and (connection := jax_runtime.connection()):
        _current = ProcessGroup(connection)
        _current.start()
        entry_point.before_stop = _current.announce_signal
    return _current


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """End all processes of the run if the body fails in one; otherwise wait until all finish.

    Raises:
        PeerError: Another process failed.
    """
    peers = current()
    if peers is None:
        yield
        return
    stop = None
    try:
        try:
            yield
        except SystemExit as error:  # usually raised in all processes
            stop = error
        peers.leave()
        jax_runtime.detach()
    except BaseException as error:
        failure = peers.end_together(stop or error)
        if failure is error:
            raise
        raise failure from None
    if stop is not None:
        raise stop


def publish(error: BaseException | None) -> None:
    """Publish a failure of this process to the other processes of the run.

    Call it in an `except` or `finally` clause if the other processes may be waiting in a collective
    that this process did not reach.

    Args:
        error: The exception that is being raised; None and SystemExit are not failures.
    """
    if error is not None and not isinstance(error, SystemExit) and (peers := current()):
        peers.publish(error)


# ------------------------------------------------------------------ the processes of this run


class ProcessGroup:
    """The processes of this run, as seen by one of them.

    Args:
        connection: The connection to the other processes.
    """

    def __init__(self, connection: Connection):
        self.index, self.count, self._host = connection.index, connection.count, connection.host
        self._store, self._lost = connection.store, connection.lost or threading.Event()
        self._rounds = self._reached = self._beats = 0
        self._others = {other: Heartbeat() for other in range(self.count) if other != self.index}
        self._clock, self._slow = Clock(2 * BEAT_SECONDS), SlowProcesses()
        self._contact = True  # whether the store was reached since `_watch` last checked
        self._left = threading.Event()  # set once all processes have left
        self._failed = threading.Event()
        self._failure: PeerError | None = None
        self._own: BaseException | None = None  # failure of this process
        self._report = ""  # message or traceback of `_own`
        self._lock = threading.RLock()  # a signal handler may interrupt the main thread
        # Which one reports the failure: `main`, `watch` or `signal`; see `_claim`.
        self._reporter = ""
        self._code: int | None = None  # exit code, set when the main thread is about to exit
        self._signal = 0  # number of the signal that is ending this process
        self._announced = threading.Event()  # set once the other processes know of the signal

    def start(self) -> None:
        """Start the threads that write heartbeats and that detect failures."""
        for target in (self._beat_until_left, self._watch):
            threading.Thread(target=target, daemon=True).start()

    # -------------------------------------------------------------- exchanges

    def count_sync_point(self) -> None:
        """Count a synchronization point: a collective operation that this process is starting."""
        self._reached += 1

    def exchange(self, value: Any, seconds: float = math.inf) -> list:
        """Return the values of all processes. A collective: all processes must call it.

        Args:
            value: A value that JSON can represent.
            seconds: Maximum time to wait for the other processes; infinite: no limit.

        Raises:
            PeerError: Another process failed.
            TimeoutError: Another process did not call this method within `seconds`.
        """
        deadline = time.monotonic() + seconds
        self.count_sync_point()
        number, self._rounds = self._rounds, self._rounds + 1
        self._check()
        with self._failure_first():
            own = json.dumps([self._host, value])
            self._store.set(f"jaxvid/value/{number}/{self.index}", own)
            received = [
                json.loads(self._wait_for(f"jaxvid/value/{number}/{process}", deadline))
                for process in range(self.count)
            ]
            # All processes have sent their values for this round, so all have read those of the
            # previous round.
            if number:
                self._store.delete(f"jaxvid/value/{number - 1}/{self.index}")
        for process, heartbeat in self._others.items():
            heartbeat.host = received[process][0]  # may fail before its first heartbeat
        return [value for _, value in received]

    def leave(self) -> None:
        """Wait until all processes have finished.

        Process 0 also waits until the other processes know that all have finished. It hosts the
        store, and a process that cannot reach the store would report a failure.

        Raises:
            PeerError: Another process failed.
        """
        with self._failure_first():
            self._store.set(f"jaxvid/state/left/{self.index}", str(self._reached))
            for process in range(self.count):
                self._wait_for(f"jaxvid/state/left/{process}")
        self._left.set()
        key = "jaxvid/state/knows_end"
        if self.index:
            set_last_key(self._store, f"{key}/{self.index}", self._lost, LOST_SECONDS)
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError, TimeoutError, PeerError):
            for process in self._others:
                self._wait_for(f"{key}/{process}", time.monotonic() + LOST_SECONDS)

    def _wait_for(self, key: str, deadline: float = math.inf) -> str:
        while (text := self._store.get(key, BEAT_SECONDS)) is None:
            self._check()
            if time.monotonic() > deadline:
                raise TimeoutError(key)
        return text

    def _check(self) -> None:
        """Raise the failure of the run, if any."""
        if self._failure is not None:
            raise self._as_error(self._failure)

    def _is_own(self, failure: PeerError) -> bool:
        """Return whether the run failed because of an exception in this process.

        It is False if other processes have lost contact with this process.
        """
        return failure.process == self.index and self._own is not None

    def _as_error(self, failure: PeerError) -> InputError:
        """Return the exception to raise in the main thread for the failure of the run."""
        return InputError(failure.cause) if self._is_own(failure) else failure.copy()

    @contextlib.contextmanager
    def _failure_first(self) -> Iterator[None]:
        """If the body cannot reach the store, wait until the cause is recorded, and raise it."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            if not self._failed.wait(LOST_SECONDS + GRACE_SECONDS):
                raise
            raise self._as_error(self._failure) from None

    # -------------------------------------------------------------- failures

    def _record(self, failure: PeerError) -> PeerError:
        """Record a failure unless one is recorded already; return the recorded one."""
        with self._lock:
            if self._failure is None:
                self._failure = failure
        self._failed.set()
        return self._failure

    def _fail(self, process: int, cause: str) -> PeerError:
        """Record a failure of a process, as in `_record`."""
        host = self._host if process == self.index else self._others[process].host
        return self._record(PeerError(process, cause, host))

    def publish(self, error: BaseException) -> PeerError:
        """Publish a failure of this process, unless it was caused by another process.

        Returns:
            The failure that ends the run.
        """
        if isinstance(error, PeerError):
            failure = self._record(error.copy())
        elif is_of_runtime(error) and self._failed.wait(LOST_SECONDS + GRACE_SECONDS):
            failure = self._failure
        else:
            self._report = self._report or report(error)
            self._own = self._own or error
            failure = self._fail(self.index, describe(error))
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._write_failure()
        return failure

    def _write_failure(self) -> None:
        """Write the failure to the store, and a note that this process knows it."""
        failure = self._failure
        fields = [failure.process, failure.cause, failure.host, failure.EXIT_CODE]
        self._store.set_first("jaxvid/state/failure", json.dumps(fields))
        self._store.set(f"jaxvid/state/knows/{self.index}", "")

    def end_together(self, error: BaseException) -> BaseException:
        """Publish a failure, and make this process end within seconds even if its threads hang.

        Returns:
            The exception to raise: `error`, or the failure of another process that caused it.
        """
        failure = self.publish(error)
        if not self._claim("main"):
            threading.Event().wait()  # `_watch` has reported the failure and is ending the process
        caused = is_of_runtime(error) and error is not self._own
        self._wait_until_all_know()
        self._code = failure.EXIT_CODE if caused else exit_code(error)
        end_at_exit(self._code)
        return self._as_error(failure) if caused else error

    def _wait_until_all_know(self) -> None:
        """In process 0, wait until the others have read the failure, for at most 10 s.

        Process 0 hosts the store. The process that failed is not waited for.
        """
        others = self._others.keys() - {self._failure.process}
        deadline = time.monotonic() + 2 * GRACE_SECONDS
        while not self.index and time.monotonic() < deadline:
            states = self._store.list("jaxvid/state/")
            if all(f"jaxvid/state/knows/{process}" in states for process in others):
                return
            time.sleep(0.1)

    def _claim(self, reporter: str) -> bool:
        """Let the first caller report the failure; return whether it is `reporter`."""
        with self._lock:
            self._reporter = self._reporter or reporter
            return self._reporter == reporter

    # -------------------------------------------------------------- threads

    def _beat_until_left(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.beat()

    def beat(self) -> None:
        """Write a heartbeat, and check those of the other processes."""
        self._beats += 1
        own = json.dumps([self._host, self._beats, self._reached])
        self._store.set(f"jaxvid/state/alive/{self.index}", own)
        states, passed = self._store.list("jaxvid/state/"), self._clock.tick()
        self._contact = True
        if failure := states.get("jaxvid/state/failure"):
            self._record(PeerError(*json.loads(failure)))
        for process, heartbeat in self._others.items():
            if (left := states.get(f"jaxvid/state/left/{process}")) is not None:
                heartbeat.reached = int(left)
                if int(left) < self._reached:
                    self._fail(process, "ended before the others were done")
                continue
            alive = states.get(f"jaxvid/state/alive/{process}")
            status = json.loads(alive) if alive else (heartbeat.host, 0, 0)
            heartbeat.update(*status, self._reached, passed)
            if heartbeat.silent > LOST_SECONDS:
                self._fail_silent(process)
            elif heartbeat.behind > HUNG_SECONDS:
                self._fail(process, f"has blocked the others for {HUNG_SECONDS:.0f} s")
        if self._failure is not None:
            self._write_failure()
        elif not self.index:
            own = Heartbeat(self._host, reached=self._reached)
            self._slow.update({self.index: own, **self._others}, passed)

    def _fail_silent(self, process: int) -> None:
        """Record the loss of a process, or of this one if it has lost contact with all others."""
        silent = [other.silent > LOST_SECONDS / 2 for other in self._others.values()]
        if len(silent) > 1 and all(silent):
            cause = f"no heartbeat from any other process for {LOST_SECONDS:.0f} s"
            self._fail(self.index, f"{cause}; they were killed, or its network is down")
        else:
            self._fail(process, describe_silence(LOST_SECONDS))

    def _watch(self) -> None:
        """Detect the loss of process 0. After a failure, end this process even if it hangs."""
        clock, silent = Clock(2 * BEAT_SECONDS), 0.0
        while not self._left.wait(BEAT_SECONDS / 4):
            silent = clock.tick() + (0.0 if self._contact else silent)
            self._contact = False
            if self._signal:
                self._announce()
            if self._lost.is_set():
                self._fail(0, "connection lost; the process was killed or is unreachable")
            elif silent > LOST_SECONDS:
                self._fail(0, describe_silence(LOST_SECONDS))
            if self._failed.is_set():
                self._end()
                return

    def _end(self) -> None:
        """End this process; report the failure unless the main thread does."""
        is_own = self._is_own(self._failure)
        deadline = time.monotonic() + (4 * GRACE_SECONDS if is_own else GRACE_SECONDS)
        while self._reporter != "main" and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._claim("watch"):
            text = self._report if is_own else f"error: {self._failure}\n"
            with contextlib.suppress(OSError):
                os.write(entry_point.stderr_fd(), ("\n" * sys.stderr.isatty() + text).encode())
        else:
            deadline = time.monotonic() + 3 * GRACE_SECONDS
            while self._code is None and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(GRACE_SECONDS)  # the main thread prints the error in this time
        end_now(self._failure.EXIT_CODE if self._code is None else self._code)

    # -------------------------------------------------------------- signals

    def announce_signal(self, number: int) -> None:
        """Before a signal ends this process, make the other processes end with the same exit code.

        `_watch` does the work, because this method may interrupt the main thread anywhere.

        Args:
            number: Number of the signal.
        """
        if self._claim("signal") and not self._left.is_set():
            self._signal = number
            self._announced.wait(ANNOUNCE_SECONDS)

    def _announce(self) -> None:
        number, self._signal = self._signal, 0
        cause = f"received {signal.Signals(number).name}; run the same command to continue"
        self._record(PeerError(self.index, cause, self._host, 128 + number))
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._write_failure()
            self._wait_until_all_know()
        self._announced.set()


_current: ProcessGroup | None = None
