"""Processes of one run: joining, exchanging values, and ending together when one of them fails.

Values go through the key-value store that JAX's distributed runtime keeps in process 0, so that an
exchange needs no device. Every process writes a sign of life there each second. A process that
fails writes the cause before it ends. All others read it and end with that line, also where their
main thread waits in a device collective or in an Orbax barrier.
"""

import atexit
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Protocol

import jax
from jax._src import distributed
from jax._src.lib import _jax

from jaxvid import guard
from jaxvid.errors import InputError, one_line

JOIN_SECONDS = 300.0  # how long the processes of a run wait for each other at start-up
BEAT_SECONDS = 1.0  # between two signs of life
LOST_SECONDS = 30.0  # without a sign of life for so long, a process is lost
HUNG_SECONDS = 1800.0  # how long the others wait for a process that lives but does not come
COLLECTIVE_LIBRARIES = ("Gloo", "NCCL", "RCCL")
GRACE_SECONDS = 5.0  # for the main thread to end the process by itself


class PeerError(InputError):
    """Another process of the run failed.

    Args:
        process: Its index.
        cause: Why, in one line.
    """

    def __init__(self, process: int, cause: str):
        super().__init__(f"process {process}: {cause}")
        self.process, self.cause = process, cause


def current() -> "Peers | None":
    """Return the processes of this run; None: this one is alone."""
    global _current
    if _current is None and distributed.global_state.client is not None:
        state = distributed.global_state
        lost = _relay.lost if _relay else None
        _current = Peers(JaxStore(state.client), state.process_id, state.num_processes, lost=lost)
        _current.start()
    return _current


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """End all processes of the run if the body raises in one of them; wait for all at its end.

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
        except SystemExit as error:  # usually, all processes stop
            stop = error
        peers.leave()
    except BaseException as error:
        failure = peers.end_together(stop or error)
        if failure is error:
            raise
        raise failure from None
    if stop is not None:
        raise stop


def publish(error: BaseException | None) -> None:
    """Tell the other processes of the run that this one fails.

    For `finally` clauses that wait for something to which the others may not come.

    Args:
        error: What is being raised; None and SystemExit: nothing failed.
    """
    if error is not None and not isinstance(error, SystemExit) and (peers := current()):
        peers.publish(error)


# ------------------------------------------------------------------ JAX's distributed runtime


class Store(Protocol):
    """A key-value store that all processes share."""

    def set(self, key: str, value: str) -> None:
        """Set or overwrite a value."""

    def set_first(self, key: str, value: str) -> None:
        """Set a value unless there is one."""

    def get(self, key: str, seconds: float) -> str | None:
        """Wait for a value; None: there is none yet."""

    def list(self, prefix: str) -> dict[str, str]:
        """Return all keys below a prefix, and their values."""

    def delete(self, key: str) -> None:
        """Delete a key."""


class JaxStore:
    """The store of JAX's distributed client.

    The client is private API (checked with jax 0.10.2). Its functions release the GIL and raise
    JaxRuntimeError where process 0 cannot be reached.
    """

    def __init__(self, client):
        self._client = client

    def set(self, key: str, value: str) -> None:
        """See `Store`."""
        self._client.key_value_set(key, value, allow_overwrite=True)

    def set_first(self, key: str, value: str) -> None:
        """See `Store`."""
        try:
            self._client.key_value_set(key, value)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def get(self, key: str, seconds: float) -> str | None:
        """See `Store`."""
        try:
            return self._client.blocking_key_value_get(key, int(1000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        return None

    def list(self, prefix: str) -> dict[str, str]:
        """See `Store`."""
        return dict(self._client.key_value_dir_get(prefix))

    def delete(self, key: str) -> None:
        """See `Store`."""
        self._client.key_value_delete(key)


class Relay:
    """A local relay to the coordinator in process 0.

    JAX's client aborts its process with a stack dump as soon as its connection to the coordinator
    breaks. The relay keeps the client's end open, so that the loss can be reported in one line.

    Args:
        coordinator: `HOST:PORT`.

    Attributes:
        address: `HOST:PORT` for the client.
        lost: Set once the coordinator cannot be reached any more.
    """

    def __init__(self, coordinator: str):
        host, _, port = coordinator.rpartition(":")
        self._target = host.strip("[]"), int(port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._clients: list[socket.socket] = []  # kept, or Python would close them
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.lost = threading.Event()
        # Without this, gRPC would reach the relay through the HTTP proxy of the environment.
        direct = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")  # noqa: SIM112
        os.environ["no_grpc_proxy"] = f"{direct or ''},127.0.0.1".lstrip(",")  # noqa: SIM112
        threading.Thread(target=self._serve, daemon=True).start()

    def finds_coordinator(self) -> bool:
        """Whether the coordinator answers a connection.

        It is not enough that the kernel accepts one: it does so while the process is being killed.
        """
        try:
            with socket.create_connection(self._target, timeout=5) as probe:
                return bool(probe.recv(1))  # gRPC's server speaks first
        except OSError:
            return False

    def _serve(self) -> None:
        while True:
            client, _ = self._server.accept()
            try:
                remote = socket.create_connection(self._target, timeout=5)
            except OSError:
                client.close()  # gRPC connects again
                continue
            self._clients.append(client)
            remote.settimeout(None)
            for end in (client, remote):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for pump in (self._send, self._receive):
                threading.Thread(target=pump, args=(client, remote), daemon=True).start()

    def _send(self, client: socket.socket, remote: socket.socket) -> None:
        ended = _copy(client, remote)
        _shut(remote)
        remote.close()
        if ended:
            self._clients.remove(client)
            client.close()

    def _receive(self, client: socket.socket, remote: socket.socket) -> None:
        _copy(remote, client)
        if self.finds_coordinator():  # it closed this connection only
            _shut(client)
        else:
            self.lost.set()


def _copy(source: socket.socket, sink: socket.socket) -> bool:
    """Copy until one end breaks; return whether the source came to its end."""
    with contextlib.suppress(OSError):
        while block := source.recv(2**16):
            sink.sendall(block)
        return True
    return False


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


class _Joining:
    """What `join` waits for, and the relay of this process.

    Args:
        make: JAX's constructor of a distributed client.
    """

    def __init__(self, make: Callable):
        self._make = make
        self.relay: Relay | None = None
        self.missing = "the launcher"
        self.given_up = False

    def make_client(self, address: str, process: int, *args, **options):
        """Make JAX's distributed client; in all processes but the first, behind a relay."""
        count = distributed.global_state.num_processes
        others = f"process {1 - process}" if count == 2 else f"one of the {count - 1} others"
        if process:
            self.missing, self.relay = f"process 0 at {address}", Relay(address)
            while not self.relay.finds_coordinator():
                if self.given_up:
                    raise ConnectionError(address)
                time.sleep(0.2)
            address = self.relay.address
        self.missing = others
        return self._make(address, process, *args, **options)


def join(initialize: Callable[[], None], seconds: float) -> None:
    """Join the other processes of the run.

    JAX's call waits in C++ and aborts the process when its time is over. It runs in another
    thread, so that signals are handled and the end of the time is reported in one line.

    Args:
        initialize: Calls `jax.distributed.initialize`.
        seconds: How long to wait for the other processes.

    Raises:
        InputError: Some did not come in time.
        Exception: Whatever `initialize` raises.
    """
    global _relay
    make, errors = _jax.get_distributed_runtime_client, []
    joining, until = _Joining(make), time.monotonic() + seconds

    def run() -> None:
        try:
            initialize()
        except BaseException as error:
            errors.append(error)

    _jax.get_distributed_runtime_client = joining.make_client
    try:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            if time.monotonic() > until:
                raise InputError(
                    f"{joining.missing} did not join within {seconds:.0f} s; start all processes "
                    "with the same --coordinator within --join_seconds"
                )
            thread.join(0.1)
    except BaseException as error:
        joining.given_up = True
        end_at_exit(exit_code(error))  # the thread cannot be stopped
        raise
    finally:
        _jax.get_distributed_runtime_client = make
    if errors:
        raise errors[0]
    _relay = joining.relay


# ------------------------------------------------------------------ the processes of this run


@dataclasses.dataclass
class _Signs:
    """Signs of life of another process.

    Attributes:
        beat: Number of the last one.
        reached: How many common points the process has come to.
        silent: Seconds without a new beat.
        behind: Seconds for which this process has been ahead and the other has not moved on.
    """

    beat: int = 0
    reached: int = 0
    silent: float = 0.0
    behind: float = 0.0

    def update(self, beat: int, reached: int, own_reached: int, passed: float) -> None:
        """Take what the store holds now, `passed` seconds after the last call."""
        waiting = reached == self.reached and reached < own_reached
        self.silent = self.silent + passed if beat == self.beat else 0.0
        self.behind = self.behind + passed if waiting else 0.0
        self.beat, self.reached = beat, reached


class _Clock:
    """Measures time without the time for which this process was suspended."""

    def __init__(self):
        self._last = time.monotonic()

    def tick(self) -> float:
        """Return the seconds since the last call, at most two beats."""
        before, self._last = self._last, time.monotonic()
        return min(self._last - before, 2 * BEAT_SECONDS)


class Peers:
    """The processes of this run, as one of them sees them.

    Args:
        store: What they share.
        index: Of this process.
        count: How many there are.
        lost: Set once the connection to process 0 is broken; None: it cannot break.
    """

    def __init__(
        self, store: Store, index: int, count: int, *, lost: threading.Event | None = None
    ):
        self.index, self.count = index, count
        self._store, self._lost = store, lost or threading.Event()
        self._rounds = self._reached = self._beats = 0
        self._states: dict[str, str] = {}  # what the store held at the last beat
        self._signs = {other: _Signs() for other in range(count) if other != index}
        self._clock, self._contact = _Clock(), True
        self._left = threading.Event()  # set once all processes have left
        self._failed = threading.Event()
        self._failure: PeerError | None = None
        self._own: BaseException | None = None  # this process's failure, and what is printed of it
        self._report = ""
        self._lock, self._reporter = threading.Lock(), ""
        self._code: int | None = None  # set once the main thread has nothing to do but to end

    def start(self) -> None:
        """Start the threads that give signs of life and look for those of the others."""
        for target in (self._beat_on, self._watch):
            threading.Thread(target=target, daemon=True).start()

    # -------------------------------------------------------------- exchanges

    def reach(self) -> None:
        """Count a point that all processes come to."""
        self._reached += 1

    def exchange(self, value, seconds: float = math.inf) -> list:
        """Return every process's value; all processes must call it.

        Args:
            value: A tree that JSON can hold.
            seconds: How long to wait for the others.

        Raises:
            PeerError: Another process failed.
            TimeoutError: Another process did not come in time.
        """
        until = time.monotonic() + seconds
        self.reach()
        number, self._rounds = self._rounds, self._rounds + 1
        self._check()
        with self._failure_first():
            self._store.set(f"jaxvid/value/{number}/{self.index}", json.dumps(value))
            values = [
                json.loads(self._wait_for(f"jaxvid/value/{number}/{process}", until))
                for process in range(self.count)
            ]
            if number:  # all have sent this value, and so have read the one before it
                self._store.delete(f"jaxvid/value/{number - 1}/{self.index}")
        return values

    def leave(self) -> None:
        """Wait until all processes have done their work.

        Process 0 also waits until the others know it: the store ends with it, and to the others
        that would look like a failure.

        Raises:
            PeerError: Another process failed.
        """
        with self._failure_first():
            self._store.set(f"jaxvid/state/left/{self.index}", str(self._reached))
            for process in range(self.count):
                self._wait_for(f"jaxvid/state/left/{process}")
        self._left.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError, TimeoutError, PeerError):
            self._store.set(f"jaxvid/state/knows_end/{self.index}", "")
            for process in range(self.count if not self.index else 0):
                until = time.monotonic() + LOST_SECONDS
                self._wait_for(f"jaxvid/state/knows_end/{process}", until)

    def _wait_for(self, key: str, until: float = math.inf) -> str:
        while (text := self._store.get(key, BEAT_SECONDS)) is None:
            self._check()
            if time.monotonic() > until:
                raise TimeoutError(key)
        return text

    def _check(self) -> None:
        """Raise the failure that ends the run, if there is one."""
        if self._failure is not None:
            raise self._as_error(self._failure)

    def _is_own(self, failure: PeerError) -> bool:
        """Whether it is an error of this process; the others may only have lost sight of it."""
        return failure.process == self.index and self._own is not None

    def _as_error(self, failure: PeerError) -> InputError:
        """Return the error for the main thread; a thread of this process may have failed."""
        if self._is_own(failure):
            return InputError(failure.cause)
        return PeerError(failure.process, failure.cause)

    @contextlib.contextmanager
    def _failure_first(self) -> Iterator[None]:
        """Where the store cannot be reached, raise why once that is known."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            if not self._failed.wait(LOST_SECONDS + GRACE_SECONDS):
                raise
            raise self._as_error(self._failure) from None

    # -------------------------------------------------------------- failures

    def _fail(self, process: int, cause: str) -> PeerError:
        """Note the first failure of the run, and return it."""
        with self._lock:
            if self._failure is None:
                self._failure = PeerError(process, cause)
        self._failed.set()
        return self._failure

    def publish(self, error: BaseException) -> PeerError:
        """Tell the other processes that this one fails, unless it fails because of another.

        Returns:
            The failure that ends the run.
        """
        if isinstance(error, PeerError):
            failure = self._fail(error.process, error.cause)
        elif is_of_runtime(error) and self._failed.wait(LOST_SECONDS + GRACE_SECONDS):
            failure = self._failure
        else:
            self._report = self._report or report(error)
            self._own = self._own or error
            failure = self._fail(self.index, describe(error))
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._tell()
        return failure

    def _tell(self) -> None:
        """Write the failure for the others, and that this process knows it."""
        failure = json.dumps([self._failure.process, self._failure.cause])
        self._store.set_first("jaxvid/state/failure", failure)
        self._store.set(f"jaxvid/state/knows/{self.index}", "")

    def end_together(self, error: BaseException) -> BaseException:
        """Publish a failure, and have this process end within seconds, whatever its threads do.

        Process 0 waits until the others know, for they read it from process 0.

        Returns:
            What to raise: this process's own error, or the failure of the other that caused it.
        """
        failure = self.publish(error)
        if not self._claim("main"):
            threading.Event().wait()  # the watch has reported it, and is ending the process
        caused = is_of_runtime(error) and error is not self._own
        until = time.monotonic() + 2 * GRACE_SECONDS
        while not self.index and time.monotonic() < until and not self._all_know():
            time.sleep(0.1)
        self._code = InputError.EXIT_CODE if caused else exit_code(error)
        end_at_exit(self._code)
        return self._as_error(failure) if caused else error

    def _all_know(self) -> bool:
        """Whether all other processes that live know of the failure."""
        states = self._store.list("jaxvid/state/")
        others = self._signs.keys() - {self._failure.process}
        return all(f"jaxvid/state/knows/{process}" in states for process in others)

    def _claim(self, reporter: str) -> bool:
        """Whether this thread is the one that reports the failure."""
        with self._lock:
            self._reporter = self._reporter or reporter
            return self._reporter == reporter

    # -------------------------------------------------------------- threads

    def _beat_on(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.beat()

    def beat(self) -> None:
        """Give a sign of life, and look for those of the others."""
        self._beats += 1
        own = json.dumps([self._beats, self._reached])
        self._store.set(f"jaxvid/state/alive/{self.index}", own)
        states, passed = self._store.list("jaxvid/state/"), self._clock.tick()
        self._contact = True
        if failure := states.get("jaxvid/state/failure"):
            self._fail(*json.loads(failure))
        for process, signs in self._signs.items():
            if (left := states.get(f"jaxvid/state/left/{process}")) is not None:
                if int(left) < self._reached:
                    self._fail(process, "ended before the others were done")
                continue
            alive = json.loads(states.get(f"jaxvid/state/alive/{process}", "[0, 0]"))
            signs.update(*alive, self._reached, passed)
            if signs.silent > LOST_SECONDS:
                self._fail(process, _silence(LOST_SECONDS))
            elif signs.behind > HUNG_SECONDS:
                self._fail(process, f"has kept the others waiting for {HUNG_SECONDS:.0f} s")
        if self._failure is not None:
            self._tell()

    def _watch(self) -> None:
        """Notice the loss of process 0, and end this process where its main thread does not."""
        clock, silent = _Clock(), 0.0
        while not self._left.wait(BEAT_SECONDS / 4):
            passed, silent = clock.tick(), 0.0 if self._contact else silent
            silent, self._contact = silent + passed, False
            if self._lost.is_set():
                self._fail(0, "its connection broke; it was killed or cannot be reached")
            elif silent > LOST_SECONDS:
                self._fail(0, _silence(LOST_SECONDS))
            if self._failed.is_set():
                self._end()
                return

    def _end(self) -> None:
        """End this process; report the failure unless the main thread does."""
        is_own = self._is_own(self._failure)
        until = time.monotonic() + (4 * GRACE_SECONDS if is_own else GRACE_SECONDS)
        while self._reporter != "main" and time.monotonic() < until:
            time.sleep(0.05)
        if self._claim("watch"):
            text = self._report if is_own else f"error: {self._failure}\n"
            with contextlib.suppress(OSError):
                os.write(guard.stderr_fd(), ("\n" * sys.stderr.isatty() + text).encode())
        else:
            until = time.monotonic() + 3 * GRACE_SECONDS
            while self._code is None and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(GRACE_SECONDS)  # for the line or the traceback
        end_now(InputError.EXIT_CODE if self._code is None else self._code)


_current: Peers | None = None
_relay: Relay | None = None


def _silence(seconds: float) -> str:
    return f"no sign of life for {seconds:.0f} s; it was killed or hangs"


def is_of_runtime(error: BaseException | None) -> bool:
    """Whether an error comes from JAX's runtime: another process may be its cause."""
    while error is not None:
        # XLA also raises ValueErrors: "UNKNOWN: Gloo AllGather failed".
        in_collective = any(library in str(error) for library in COLLECTIVE_LIBRARIES)
        if isinstance(error, jax.errors.JaxRuntimeError) or in_collective:
            return True
        error = error.__cause__ or error.__context__
    return False


def describe(error: BaseException) -> str:
    """Return what the other processes are told of an error, in one line."""
    match error:
        case InputError():
            return str(error)
        case KeyboardInterrupt():
            return "interrupted"
        case SystemExit():
            return f"ended with exit code {exit_code(error)}"
        case Exception() if guard.describe(error)[0] == InputError.EXIT_CODE:
            return guard.describe(error)[1].removeprefix("error: ")
    return f"{type(error).__name__}: {one_line(error)}; its own output has the traceback"


def report(error: BaseException) -> str:
    """Return what this process prints of an error where its main thread cannot."""
    if isinstance(error, Exception) and exit_code(error) == 1:
        return "".join(traceback.format_exception(error))
    return f"error: {describe(error)}\n"


def exit_code(error: BaseException) -> int:
    """Return the exit code of a process that ends with an error."""
    match error:
        case KeyboardInterrupt():
            return 130
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case Exception():
            return guard.describe(error)[0]
    return 1


def end_now(code: int) -> None:
    """End the process at once, without its exit handlers: they would wait for the others."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, SystemExit):  # guard's streams raise the last
            stream.flush()
    guard.exit_now(code)


def end_at_exit(code: int) -> None:
    """End the process with a code once the interpreter exits, before other exit handlers."""
    atexit.register(end_now, code)
