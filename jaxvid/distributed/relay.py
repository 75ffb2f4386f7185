"""A local relay to the coordinator, which hides its loss from JAX's client."""

import contextlib
import os
import socket
import threading


class Relay:
    """A local relay to the coordinator in process 0.

    JAX's client aborts the process with a stack dump as soon as the connection to the coordinator
    breaks. The relay keeps the client's connection open, so that the loss is reported in one line.

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
        """Return whether the coordinator answers a connection.

        An accepted connection is not enough: the kernel accepts connections of a dying process.
        """
        try:
            with socket.create_connection(self._target, timeout=5) as probe:
                return bool(probe.recv(1))  # gRPC's server sends first
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
        if self.finds_coordinator():  # the coordinator closed only this connection
            _shut(client)
        else:
            self.lost.set()


def _copy(source: socket.socket, sink: socket.socket) -> bool:
    """Copy until one connection breaks; return whether the source reached its end."""
    with contextlib.suppress(OSError):
        while block := source.recv(2**16):
            sink.sendall(block)
        return True
    return False


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
