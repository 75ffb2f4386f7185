"""A local S3 server, moto's, that resets some of its connections and delays some answers."""

import contextlib
import logging
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator


class Faults:
    """A WSGI application that passes requests on, and injects faults.

    Args:
        app: The application.
        reset_share: Share of the requests whose connection is reset.
        slow_share: Share of the requests that wait `slow_seconds`.
        slow_seconds: Seconds.

    Attributes:
        requests: Number of requests.
        resets: Number of connections that were reset.
        forbidden: Whether all requests are answered with 403.
    """

    def __init__(self, app: Callable, reset_share: float, slow_share: float, slow_seconds: float):
        self._app, self._rng = app, random.Random(0)
        self._shares, self._slow_seconds = (reset_share, slow_share), slow_seconds
        self.requests = self.resets = 0
        self.forbidden = False

    def __call__(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        self.requests += 1
        if self.forbidden:
            start_response("403 Forbidden", [("Content-Type", "text/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        draw = self._rng.random()
        if draw < self._shares[0]:
            self.resets += 1
            connection = environ["werkzeug.socket"]
            # Closing a socket with this option sends a reset. `socket.close` would not close it,
            # because the server's file objects share it.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(connection.detach())
            raise ConnectionResetError
        if draw < sum(self._shares):
            time.sleep(self._slow_seconds)
        return self._app(environ, start_response)


@contextlib.contextmanager
def serve(
    reset_share: float = 0.0, slow_share: float = 0.0, slow_seconds: float = 0.5
) -> Iterator[tuple[str, Faults]]:
    """Run the server in threads of this process; yield its address and its faults.

    Arguments: `Faults`.
    """
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    app = DomainDispatcherApplication(create_backend_app)
    faults = Faults(app, reset_share, slow_share, slow_seconds)
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    server.handle_error = lambda *_: None  # a handler fails if its connection was reset
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        server.shutdown()
        thread.join()
