"""Exchanges and failures of the processes of a run, with a store in memory."""

import contextlib
import socket
import threading
import time

import jax
import pytest

from jaxvid import processes
from jaxvid.errors import InputError
from jaxvid.processes import PeerError, Peers, Relay


class MemoryStore:
    """The store of `Peers`, within one process."""

    def __init__(self):
        self.values: dict[str, str] = {}
        self._changed = threading.Condition()

    def set(self, key, value):
        with self._changed:
            self.values[key] = value
            self._changed.notify_all()

    def set_first(self, key, value):
        with self._changed:
            self.values.setdefault(key, value)

    def get(self, key, seconds):
        with self._changed:
            self._changed.wait_for(lambda: key in self.values, min(seconds, 0.05))
            return self.values.get(key)

    def list(self, prefix):
        return {key: value for key, value in self.values.items() if key.startswith(prefix)}

    def delete(self, key):
        del self.values[key]


def make_peers(count: int) -> tuple[MemoryStore, list[Peers]]:
    store = MemoryStore()
    return store, [Peers(store, index, count) for index in range(count)]


def in_threads(*functions) -> list:
    """What functions that wait for each other return or raise."""
    results = [None] * len(functions)

    def run(i):
        try:
            results[i] = functions[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def let_pass(peers: Peers, monkeypatch, seconds: float) -> None:
    """Have the next beats of a process come that many seconds after each other."""
    monkeypatch.setattr(peers._clock, "tick", lambda: seconds)


def test_every_process_gets_all_values_and_the_store_stays_small():
    store, peers = make_peers(3)

    def run(one):
        return [one.exchange([one.index, number, "ü"]) for number in range(50)]

    found = in_threads(*[lambda one=one: run(one) for one in peers])
    expected = [[[index, number, "ü"] for index in range(3)] for number in range(50)]
    assert found == [expected] * 3
    assert len(store.values) == 3  # the last round alone
    assert in_threads(*[one.leave for one in peers]) == [None] * 3


def test_a_process_without_signs_of_life_is_lost(monkeypatch):
    _, (first, second, _) = make_peers(3)
    let_pass(first, monkeypatch, 2.0)
    for _ in range(14):
        second.beat()
        first.beat()
    assert first._failure is None
    for _ in range(3):
        second.beat()
        first.beat()
    message = "process 2: no sign of life for 30 s; it was killed or hangs"
    assert str(first._failure) == message
    second.beat()  # the others learn of it
    assert str(second._failure) == message
    with pytest.raises(PeerError, match="process 2: no sign"):
        second.exchange(1)


def test_time_in_which_a_process_was_suspended_does_not_count(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = processes._Clock()
    now[0] += 1.5
    assert clock.tick() == 1.5
    now[0] += 1000
    assert clock.tick() == 2 * processes.BEAT_SECONDS


def test_a_process_that_lives_but_does_not_come_is_given_up_after_long(monkeypatch):
    _, (first, second) = make_peers(2)
    monkeypatch.setattr(processes, "HUNG_SECONDS", 11.0)
    let_pass(first, monkeypatch, 3.5)
    for _ in range(5):  # both work, for longer than that
        first.beat()
        second.beat()
    first.reach()
    for _ in range(3):
        second.beat()
        first.beat()
    second.reach()  # it was late
    first.reach()
    for _ in range(4):
        second.beat()
        first.beat()
    assert first._failure is None
    second.beat()
    first.beat()
    assert str(first._failure) == "process 1: has kept the others waiting for 11 s"


def test_a_process_that_ends_before_the_others_are_done_is_noticed():
    store, (first, second) = make_peers(2)
    first.reach()
    store.set("jaxvid/state/left/1", "1")
    first.beat()
    assert first._failure is None  # process 0 alone writes the reports
    first.reach()
    first.beat()
    assert str(first._failure) == "process 1: ended before the others were done"


def test_process_0_stays_until_the_others_know_that_all_are_done():
    store, (first, second) = make_peers(2)
    ended = []

    def end(one):
        one.leave()
        ended.append(one.index)

    read = store.get

    def read_late(key, seconds):
        time.sleep(0.3)
        return read(key, seconds)

    second._store = MemoryStore()
    second._store.values, second._store.get = store.values, read_late
    in_threads(lambda: end(first), lambda: end(second))
    assert ended == [1, 0]


@pytest.fixture
def ends(monkeypatch):
    """Exit codes with which the process would have ended."""
    codes = []
    monkeypatch.setattr(processes, "end_at_exit", lambda code: codes.append(("exit", code)))
    monkeypatch.setattr(processes, "end_now", lambda code: codes.append(("now", code)))
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(processes, "BEAT_SECONDS", 0.05)
    return codes


DEFECT = "process 1: ZeroDivisionError: division; its own output has the traceback"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (InputError("x does not exist"), 2, "process 1: x does not exist"),
        (ZeroDivisionError("division\nby zero"), 1, DEFECT),
        (KeyboardInterrupt(), 130, "process 1: interrupted"),
        (SystemExit(143), 143, "process 1: ended with exit code 143"),
        (PeerError(2, "y is damaged"), 2, "process 2: y is damaged"),
    ],
)
def test_the_failure_of_a_process_is_told_to_the_others(error, code, told, ends):
    _, (first, second, _) = make_peers(3)
    assert second.end_together(error) is error
    assert ends == [("exit", code)]
    first.beat()
    with pytest.raises(PeerError) as raised:
        first.exchange(0)
    assert str(raised.value) == told


def runtime_error() -> Exception:
    return jax.errors.JaxRuntimeError("INTERNAL: Gloo all-reduce failed: Connection closed by peer")


def test_an_error_of_the_runtime_is_reported_by_its_cause(ends, monkeypatch):
    _, (first, second) = make_peers(2)
    second.publish(InputError("the disk is full"))
    first.beat()
    try:
        try:
            raise runtime_error()
        except jax.errors.JaxRuntimeError:
            raise InputError("a checkpoint cannot be written") from None
    except InputError as error:
        raised = first.end_together(error)
    assert str(raised) == "process 1: the disk is full"
    assert ends == [("exit", 2)]
    # Its own, if no other process fails.
    monkeypatch.setattr(processes, "LOST_SECONDS", 0.1)
    _, (alone, _) = make_peers(2)
    error = runtime_error()
    assert alone.end_together(error) is error
    assert ends[1:] == [("exit", 1)]


def test_a_failure_in_another_thread_is_raised_in_the_main_thread(ends):
    _, (_, second) = make_peers(2)
    second.publish(InputError("the disk is full"))
    with pytest.raises(InputError, match="^the disk is full$"):
        second.exchange(0)
    # The others ended before this process came to the next exchange.
    assert str(second.end_together(runtime_error())) == "the disk is full"
    assert ends == [("exit", 2)]


def test_process_0_ends_once_the_others_know(ends, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 20)
    _, (first, second, third) = make_peers(3)
    ending = threading.Thread(target=first.end_together, args=(InputError("no"),))
    ending.start()
    second.beat()
    time.sleep(0.3)
    assert not ends
    third.beat()
    ending.join(20)
    assert ends == [("exit", 2)]


def run_watch(peers: Peers, ends) -> None:
    """Run a process's watch until it has ended the process."""
    watch = threading.Thread(target=peers._watch, daemon=True)
    watch.start()
    until = time.monotonic() + 60
    while not [code for code in ends if code[0] == "now"]:
        assert time.monotonic() < until
        time.sleep(0.01)
    peers._left.set()
    watch.join(60)


def test_a_process_whose_main_thread_waits_is_ended_with_one_line(ends, capfd):
    _, (first, second) = make_peers(2)
    second.publish(InputError("the disk is full"))
    first.beat()
    run_watch(first, ends)
    assert ends == [("now", 2)]
    assert capfd.readouterr().err == "error: process 1: the disk is full\n"


def test_a_failing_process_that_hangs_while_it_ends_reports_its_own_failure(ends, capfd):
    _, (_, second) = make_peers(2)
    try:
        _ = 1 // 0
    except ZeroDivisionError as error:
        second.publish(error)
    run_watch(second, ends)
    told = capfd.readouterr().err
    assert told.startswith("Traceback (most recent call last):\n")
    assert told.endswith("ZeroDivisionError: integer division or modulo by zero\n")
    assert ends == [("now", 2)]


def test_a_process_that_the_others_have_given_up_says_so(ends, capfd):
    """It was suspended, and continues."""
    _, (first, second) = make_peers(2)
    first.publish(PeerError(1, "no sign of life for 30 s"))
    second.beat()
    with pytest.raises(PeerError, match="^process 1: no sign of life"):
        second.exchange(0)
    run_watch(second, ends)
    assert capfd.readouterr().err == "error: process 1: no sign of life for 30 s\n"


def test_what_the_main_thread_reports_is_not_reported_twice(ends, capfd):
    _, (_, second) = make_peers(2)
    second.end_together(InputError("no"))
    run_watch(second, ends)
    assert ends == [("exit", 2), ("now", 2)]
    assert capfd.readouterr().err == ""


def test_silence_of_process_0_is_noticed_by_the_others(ends, capfd, monkeypatch):
    monkeypatch.setattr(processes, "LOST_SECONDS", 0.5)
    _, (_, second) = make_peers(2)
    run_watch(second, ends)
    assert capfd.readouterr().err.startswith("error: process 0: no sign of life for ")


class Coordinator:
    """A server that greets, as gRPC's does, and says what it is told."""

    def __init__(self):
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            connection.sendall(b"hello")
            self.connections.append(connection)
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while text := connection.recv(100):
                connection.sendall(text)

    def hang_up(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()
        self.hang_up()


def connect(address: str) -> socket.socket:
    host, port = address.split(":")
    client = socket.create_connection((host, int(port)), timeout=20)
    assert client.recv(100) == b"hello"
    return client


def test_the_relay_hides_the_loss_of_the_coordinator_from_the_client():
    coordinator = Coordinator()
    relay = Relay(coordinator.address)
    assert relay.finds_coordinator()
    with connect(relay.address) as client:
        client.sendall(b"there?")
        assert client.recv(100) == b"there?"
        coordinator.hang_up()  # it lives, and closes this connection alone
        assert client.recv(100) == b""
    assert not relay.lost.is_set()
    with connect(relay.address) as client:
        coordinator.close()
        assert relay.lost.wait(20)
        client.settimeout(0.5)
        for _ in range(3):  # the relay cannot pass them on
            client.sendall(b"there?")
            with pytest.raises(TimeoutError):
                client.recv(100)


def test_processes_that_do_not_come_are_named(monkeypatch, ends):
    state = type("State", (), {"num_processes": 2, "process_id": 1, "client": None})
    monkeypatch.setattr(processes.distributed, "global_state", state)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    make = processes._jax.get_distributed_runtime_client

    def initialize():
        processes._jax.get_distributed_runtime_client(address, 1, init_timeout=5)

    message = f"process 0 at {address} did not join within 0 s; start all processes with the same"
    with pytest.raises(InputError, match=message):
        processes.join(initialize, 0.3)
    assert processes._jax.get_distributed_runtime_client is make
    with pytest.raises(InputError, match="the launcher did not join"):
        processes.join(lambda: time.sleep(1), 0.3)
    assert ends == [("exit", 2)] * 2

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        processes.join(fail, 60)


def test_alone_nothing_is_exchanged(monkeypatch):
    assert processes.current() is None
    processes.publish(ValueError("no"))
    with pytest.raises(ValueError, match="no"), processes.failing_together():
        raise ValueError("no")
