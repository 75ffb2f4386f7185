"""Processes exchange values and failures. Here they are threads that share a store in memory."""

import contextlib
import functools
import signal
import socket
import threading
import time

import jax
import pytest

from jaxvid.distributed import jax_runtime, process_group
from jaxvid.distributed.heartbeat import Clock, Heartbeat, SlowProcesses
from jaxvid.distributed.jax_runtime import Connection
from jaxvid.distributed.process_group import PeerError, ProcessGroup
from jaxvid.distributed.relay import Relay
from jaxvid.distributed.store import set_last_key
from jaxvid.errors import InputError
from tests.waiting import wait_until


class MemoryStore:
    """A `Store` within one process."""

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


def make_peers(count: int) -> tuple[MemoryStore, list[ProcessGroup]]:
    store = MemoryStore()
    return store, [
        ProcessGroup(Connection(store, index, count, None, f"node{index}"))
        for index in range(count)
    ]


def call_in_threads(*functions) -> list:
    """Call functions in threads; return their results or exceptions."""
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


def set_beat_interval(group: ProcessGroup, monkeypatch, seconds: float) -> None:
    """Set the time that a process measures between its heartbeats."""
    monkeypatch.setattr(group._clock, "tick", lambda: seconds)


def test_exchange_returns_all_values_and_the_store_stays_small():
    store, peers = make_peers(3)

    def run(peer):
        return [peer.exchange([peer.index, number, "ü"]) for number in range(50)]

    results = call_in_threads(*[functools.partial(run, peer) for peer in peers])
    expected = [[[index, number, "ü"] for index in range(3)] for number in range(50)]
    assert results == [expected] * 3
    assert len(store.values) == 3  # only the last round
    assert call_in_threads(*[peer.leave for peer in peers]) == [None] * 3


def test_machines_are_known_after_the_first_exchange():
    _, (first, second) = make_peers(2)
    call_in_threads(lambda: first.exchange(0), lambda: second.exchange(0))
    first.beat()  # before the first heartbeat of the other process
    assert str(first._fail(1, "was killed")) == "process 1 on node1: was killed"


def test_a_process_without_heartbeats_is_lost(monkeypatch):
    _, (first, second, third) = make_peers(3)
    set_beat_interval(first, monkeypatch, 2.0)
    third.beat()
    for _ in range(14):
        second.beat()
        first.beat()
    assert first._failure is None
    for _ in range(3):
        second.beat()
        first.beat()
    message = "process 2 on node2: no heartbeat for 30 s; the process was killed or hangs, or the "
    message += "network is down"
    assert str(first._failure) == message
    second.beat()  # reads the failure
    assert str(second._failure) == message
    with pytest.raises(PeerError, match="process 2 on node2: no heartbeat"):
        second.exchange(1)


def test_a_process_that_loses_all_others_names_its_own_machine(monkeypatch):
    _, (first, second, third) = make_peers(3)
    set_beat_interval(first, monkeypatch, 2.0)
    second.beat()
    third.beat()
    for _ in range(17):
        first.beat()
    assert str(first._failure) == (
        "process 0 on node0: no heartbeat from any other process for 30 s; they were killed, or "
        "its network is down"
    )


def watch_processes(seconds: int, count_of_slow) -> None:
    """Update a `SlowProcesses` every second; processes 0 and 2 reach a point every 10 s.

    `count_of_slow` returns the number of points that process 1 has reached after some seconds.
    """
    slow = SlowProcesses()
    for second in range(seconds):
        counts = (second // 10, count_of_slow(second), second // 10)
        slow.update({i: Heartbeat(f"node{i}", 0, count) for i, count in enumerate(counts)}, 1.0)


def test_a_process_for_which_the_others_wait_is_logged(lines):
    watch_processes(600, lambda second: (second + 1) // 10)
    watch_processes(600, lambda second: (second - 2) // 10)
    assert not lines  # a heartbeat may be late, and short waits do not matter
    watch_processes(70, lambda second: (second - 9) // 10)
    assert lines == ["process 1 on node1 is slow: the others waited for it for 42 of the last 60 s"]
    watch_processes(300, lambda second: (second - 9) // 10)
    assert len(lines) == 4  # after 60, 120 and 240 s


def test_clock_ignores_time_while_suspended(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(2.0)
    now[0] += 1.5
    assert clock.tick() == 1.5
    now[0] += 1000
    assert clock.tick() == 2.0


def test_a_hung_process_fails_the_run_after_a_timeout(monkeypatch):
    _, (first, second) = make_peers(2)
    monkeypatch.setattr(process_group, "HUNG_SECONDS", 11.0)
    set_beat_interval(first, monkeypatch, 3.5)
    for _ in range(5):  # longer than the timeout, but no process waits at a synchronization point
        first.beat()
        second.beat()
    first.count_sync_point()
    for _ in range(3):
        second.beat()
        first.beat()
    second.count_sync_point()  # before the timeout
    first.count_sync_point()
    for _ in range(4):
        second.beat()
        first.beat()
    assert first._failure is None
    second.beat()
    first.beat()
    assert str(first._failure) == "process 1 on node1: has blocked the others for 11 s"


def test_a_process_that_ends_early_fails_the_run():
    store, (first, second) = make_peers(2)
    second.beat()
    first.beat()
    first.count_sync_point()
    store.set("jaxvid/state/left/1", "1")
    first.beat()
    assert first._failure is None  # it may leave after its last synchronization point
    first.count_sync_point()
    first.beat()
    assert str(first._failure) == "process 1 on node1: ended before the others were done"


def test_process_0_ends_after_the_others():
    store, (first, second) = make_peers(2)
    ended = []

    def end(peer):
        peer.leave()
        ended.append(peer.index)

    read = store.get

    def read_late(key, seconds):
        time.sleep(0.3)
        return read(key, seconds)

    second._store = MemoryStore()
    second._store.values, second._store.get = store.values, read_late
    call_in_threads(lambda: end(first), lambda: end(second))
    assert ended == [1, 0]


def test_the_last_key_needs_no_answer():
    """Process 0 may end before it has answered."""
    store, lost, answered = MemoryStore(), threading.Event(), threading.Event()
    set_key = store.set

    def set_without_answer(key, value):
        set_key(key, value)
        lost.set()
        answered.wait(60)

    store.set = set_without_answer
    start = time.monotonic()
    set_last_key(store, "end/1", lost, 60)
    set_last_key(store, "end/2", threading.Event(), 0.1)
    assert time.monotonic() - start < 30
    assert store.list("end/") == {"end/1": "", "end/2": ""}
    answered.set()


@pytest.fixture
def ends(monkeypatch):
    """Calls that would have ended the process: "exit" or "now", and the exit code."""
    codes = []
    for module in (process_group, jax_runtime):
        monkeypatch.setattr(module, "end_at_exit", lambda code: codes.append(("exit", code)))
    monkeypatch.setattr(process_group, "end_now", lambda code: codes.append(("now", code)))
    monkeypatch.setattr(process_group, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(process_group, "BEAT_SECONDS", 0.05)
    return codes


DEFECT = "process 1 on node1: ZeroDivisionError: division; see the traceback in its output"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("x does not exist"), 2, "process 1 on node1: x does not exist"),
        (ZeroDivisionError("division\nby zero"), 1, DEFECT),
        (KeyboardInterrupt(), 130, "process 1 on node1: interrupted"),
        (SystemExit(143), 143, "process 1 on node1: ended with exit code 143"),
        (PeerError(2, "y is damaged"), 2, "process 2: y is damaged"),
    ],
)
def test_the_failure_of_a_process_is_raised_in_the_others(error, code, message, ends):
    _, (first, second, _) = make_peers(3)
    assert second.end_together(error) is error
    assert ends == [("exit", code)]
    first.beat()
    with pytest.raises(PeerError) as raised:
        first.exchange(0)
    assert str(raised.value) == message


def runtime_error() -> Exception:
    return jax.errors.JaxRuntimeError("INTERNAL: Gloo all-reduce failed: Connection closed by peer")


def test_runtime_errors_are_replaced_by_their_cause(ends, monkeypatch):
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
    assert str(raised) == "process 1 on node1: the disk is full"
    assert ends == [("exit", 2)]
    # If no other process fails, the error itself is returned.
    monkeypatch.setattr(process_group, "LOST_SECONDS", 0.1)
    _, (alone, _) = make_peers(2)
    error = runtime_error()
    assert alone.end_together(error) is error
    assert ends[1:] == [("exit", 1)]


def test_failures_in_other_threads_are_raised_in_the_main_thread(ends):
    _, (_, second) = make_peers(2)
    second.publish(InputError("the disk is full"))
    with pytest.raises(InputError, match="^the disk is full$"):
        second.exchange(0)
    # The other processes ended before this process reached the next exchange.
    assert str(second.end_together(runtime_error())) == "the disk is full"
    assert ends == [("exit", 2)]


def test_process_0_ends_when_all_others_have_read_the_failure(ends, monkeypatch):
    monkeypatch.setattr(process_group, "GRACE_SECONDS", 20)
    _, (first, second, third) = make_peers(3)
    ending = threading.Thread(target=first.end_together, args=(InputError("no"),))
    ending.start()
    second.beat()
    time.sleep(0.3)
    assert not ends
    third.beat()
    ending.join(20)
    assert ends == [("exit", 2)]


def run_watch(group: ProcessGroup, ends) -> None:
    """Run the watch thread of a process until it ends the process."""
    watch = threading.Thread(target=group._watch, daemon=True)
    watch.start()
    wait_until(lambda: [code for code in ends if code[0] == "now"], 60)
    group._left.set()
    watch.join(60)


def test_a_blocked_process_is_ended_with_one_line(ends, capfd):
    _, (first, second) = make_peers(2)
    second.publish(InputError("the disk is full"))
    first.beat()
    run_watch(first, ends)
    assert ends == [("now", 2)]
    assert capfd.readouterr().err == "error: process 1 on node1: the disk is full\n"


def test_a_failing_process_that_hangs_reports_its_own_failure(ends, capfd):
    _, (_, second) = make_peers(2)
    try:
        _ = 1 // 0
    except ZeroDivisionError as error:
        second.publish(error)
    run_watch(second, ends)
    stderr = capfd.readouterr().err
    assert stderr.startswith("Traceback (most recent call last):\n")
    assert stderr.endswith("ZeroDivisionError: integer division or modulo by zero\n")
    assert ends == [("now", 2)]


def test_a_process_that_was_suspended_for_too_long_ends(ends, capfd):
    _, (first, second) = make_peers(2)
    first.publish(PeerError(1, "no heartbeat for 30 s"))
    second.beat()
    with pytest.raises(PeerError, match="^process 1: no heartbeat"):
        second.exchange(0)
    run_watch(second, ends)
    assert capfd.readouterr().err == "error: process 1: no heartbeat for 30 s\n"


def test_a_signal_to_one_process_ends_all_with_its_exit_code(ends, capfd):
    _, (first, second, third) = make_peers(3)
    message = "process 1 on node1: received SIGTERM; run the same command to continue"

    def receive_signal():
        second.announce_signal(signal.SIGTERM)
        ends.append(("signal", 143))

    signalled = threading.Thread(target=receive_signal)
    signalled.start()
    second._watch()
    signalled.join(60)
    assert ("signal", 143) in ends
    ends.clear()
    first.beat()
    run_watch(first, ends)
    assert ends == [("now", 143)]
    assert capfd.readouterr().err == f"error: {message}\n"
    third.beat()
    with pytest.raises(PeerError, match=message) as raised:
        third.exchange(0)
    assert third.end_together(raised.value) is raised.value
    assert ends == [("now", 143), ("exit", 143)]


def test_failures_are_reported_once(ends, capfd):
    _, (_, second) = make_peers(2)
    second.end_together(InputError("no"))
    run_watch(second, ends)
    assert ends == [("exit", 2), ("now", 2)]
    assert capfd.readouterr().err == ""


def test_the_loss_of_process_0_ends_the_others(ends, capfd, monkeypatch):
    monkeypatch.setattr(process_group, "LOST_SECONDS", 0.5)
    _, (_, second) = make_peers(2)
    run_watch(second, ends)
    assert capfd.readouterr().err.startswith("error: process 0: no heartbeat for ")


class Coordinator:
    """An echo server that sends a greeting first, as gRPC's server does."""

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
        """Close all connections."""
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


def test_the_relay_hides_the_loss_of_the_coordinator_from_the_client(monkeypatch):
    monkeypatch.setenv("no_grpc_proxy", "")  # the relay changes it
    coordinator = Coordinator()
    relay = Relay(coordinator.address)
    assert relay.finds_coordinator()
    with connect(relay.address) as client:
        client.sendall(b"alive?")
        assert client.recv(100) == b"alive?"
        coordinator.hang_up()  # the server still accepts connections
        assert client.recv(100) == b""
    assert not relay.lost.is_set()
    with connect(relay.address) as client:
        coordinator.close()
        assert relay.lost.wait(20)
        client.settimeout(0.5)
        for _ in range(3):  # the relay accepts the messages, but cannot forward them
            client.sendall(b"alive?")
            with pytest.raises(TimeoutError):
                client.recv(100)


def test_the_relay_does_not_connect_to_the_coordinator_of_a_restarted_run(monkeypatch):
    monkeypatch.setenv("no_grpc_proxy", "")  # the relay changes it
    coordinator = Coordinator()
    relay = Relay(coordinator.address)
    with connect(relay.address):
        pass  # the client closes a connection
    relay.joined = True
    with connect(relay.address) as client:
        assert not relay.lost.wait(0.5)
        coordinator.hang_up()  # the server accepts connections, as that of a restarted run would
        assert relay.lost.wait(20)
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.recv(100)
    coordinator.close()


def test_join_names_the_missing_process(monkeypatch, ends):
    state = type("State", (), {"num_processes": 2, "process_id": 1, "client": None})
    monkeypatch.setattr(jax_runtime.distributed, "global_state", state)
    with socket.create_server(("127.0.0.1", 0)) as server:  # finds a free port
        address = f"127.0.0.1:{server.getsockname()[1]}"
    original = jax_runtime._jax.get_distributed_runtime_client

    def initialize():
        jax_runtime._jax.get_distributed_runtime_client(address, 1, init_timeout=5)

    message = f"process 0 at {address} did not join within 0 s; start all processes with the same"
    with pytest.raises(InputError, match=message):
        jax_runtime.join(initialize, 0.3)
    assert jax_runtime._jax.get_distributed_runtime_client is original
    with pytest.raises(InputError, match="another process did not join"):
        jax_runtime.join(lambda: time.sleep(1), 0.3)
    assert ends == [("exit", 2)] * 2

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        jax_runtime.join(fail, 60)


def test_a_single_process_has_no_group():
    assert process_group.current() is None
    process_group.publish(ValueError("no"))
    with pytest.raises(ValueError, match="no"), process_group.failing_together():
        raise ValueError("no")
