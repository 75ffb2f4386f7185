"""A local relay that hides the loss of the coordinator from JAX's client."""

import contextlib
import os
import socket
import threading


class Relay:
    """A local relay to the coordinator in process 0.

    JAX's client aborts the process with a stack dump as soon as the connection to the coordinator
    breaks. The relay keeps the client's connection open. The loss can then be reported in one line.

    Args:
        coordinator: `HOST:PORT` of the coordinator.

    Attributes:
        address: `HOST:PORT` of the relay, to which the client connects.
        joined: Whether this process has joined the run. From then on, a broken connection means
            that the coordinator is lost. If this process was suspended, another coordinator may
            accept connections: that of the restarted run.
        lost: Set once the connection to the coordinator is lost.
    """

    def __init__(self, coordinator: str):
        host, _, port = coordinator.rpartition(":")
        self._target = host.strip("[]"), int(port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._clients: list[socket.socket] = []  # references, or Python would close the sockets
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.joined, self.lost = False, threading.Event()
        # Bypass any HTTP proxy set in the environment: gRPC would use it to connect to the relay.
        no_proxy = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")  # noqa: SIM112
        os.environ["no_grpc_proxy"] = f"{no_proxy or ''},127.0.0.1".lstrip(",")  # noqa: SIM112
        threading.Thread(target=self._serve, daemon=True).start()

    def finds_coordinator(self) -> bool:
        """Return whether the coordinator is running: it accepts a connection and sends data.

        An accepted connection alone does not prove it, because the kernel still accepts connections
        to a process that is ending.
        """
        try:
            with socket.create_connection(self._target, timeout=5) as probe:
                return bool(probe.recv(1))  # a gRPC server sends data first
        except OSError:
            return False

    def _serve(self) -> None:
        while True:
            client, _ = self._server.accept()
            try:
                remote = socket.create_connection(self._target, timeout=5)
            except OSError:
                client.close()  # gRPC then tries to connect again
                continue
            self._clients.append(client)
            remote.settimeout(None)
            for connection in (client, remote):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            closed = threading.Event()  # set once the client has closed the connection
            for pump in (self._send, self._receive):
                threading.Thread(target=pump, args=(client, remote, closed), daemon=True).start()

    def _send(self, client: socket.socket, remote: socket.socket, closed: threading.Event) -> None:
        if _copy(client, remote):
            closed.set()
        _shut(remote)
        remote.close()
        if closed.is_set():
            self._clients.remove(client)
            client.close()

    def _receive(
        self, client: socket.socket, remote: socket.socket, closed: threading.Event
    ) -> None:
        _copy(remote, client)
        if closed.is_set():
            return
        if not self.joined and self.finds_coordinator():  # it closed only this connection
            _shut(client)
        else:
            self.lost.set()


def _copy(source: socket.socket, sink: socket.socket) -> bool:
    """Copy bytes until the source is closed (return True) or a connection breaks (False)."""
    with contextlib.suppress(OSError):
        while block := source.recv(2**16):
            sink.sendall(block)
        return True
    return False


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
