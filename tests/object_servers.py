"""Local servers of S3 and Google Cloud Storage that reset connections and delay answers."""

import contextlib
import functools
import http.server
import json
import logging
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Any
from unittest import mock


class Faults:
    """Faults that a server injects.

    Args:
        reset_share: Share of the requests whose connection is reset.
        slow_share: Share of the requests that wait `slow_seconds`.
        slow_seconds: Seconds.

    Attributes:
        requests: Number of requests.
        resets: Number of connections that were reset.
        forbidden: Whether all requests are answered with 403.
    """

    def __init__(self, reset_share: float, slow_share: float, slow_seconds: float):
        self._rng, self._shares = random.Random(0), (reset_share, slow_share)
        self._slow_seconds = slow_seconds
        self.requests = self.resets = 0
        self.forbidden = False

    def inject(self, connection: socket.socket) -> None:
        """Delay a request, or reset its connection; do nothing if requests are forbidden.

        Raises:
            ConnectionResetError: The connection was reset.
        """
        self.requests += 1
        draw = 1.0 if self.forbidden else self._rng.random()
        if draw < self._shares[0]:
            self.resets += 1
            # Closing a socket with this option sends a reset. `socket.close` would not close it,
            # because the server's file objects share it.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(connection.detach())
            raise ConnectionResetError
        if draw < sum(self._shares):
            time.sleep(self._slow_seconds)


@contextlib.contextmanager
def _running(server: http.server.HTTPServer) -> Iterator[str]:
    """Run a server in a thread of this process; yield its address."""
    server.handle_error = lambda *_: None  # a handler fails if its connection was reset
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def serve_s3(faults: Faults) -> Iterator[str]:
    """Run moto's server; yield its address."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    app = DomainDispatcherApplication(create_backend_app)

    def answer(environ: dict, start_response: Callable) -> Iterable[bytes]:
        faults.inject(environ["werkzeug.socket"])
        if faults.forbidden:
            start_response("403 Forbidden", [("Content-Type", "text/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        return app(environ, start_response)

    with _running(make_server("127.0.0.1", 0, answer, threaded=True)) as address:
        yield address


@contextlib.contextmanager
def serve_gcs(faults: Faults, bucket: str) -> Iterator[str]:
    """Run the server of gcp-storage-emulator with an empty bucket; yield its address.

    Two faults of version 2026.7.19 are corrected: it parses uploads as e-mails, which removes a
    carriage return at the end of a file, and it ignores `ifGenerationMatch=0`, the condition that a
    file does not exist.
    """
    from gcp_storage_emulator import server
    from gcp_storage_emulator.handlers import buckets, objects
    from gcp_storage_emulator.storage import Storage

    logging.getLogger("api.object").setLevel(logging.CRITICAL)
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(bucket, storage)
    read_data, insert = server._read_data, objects._multipart_upload

    class Handler(server.RequestHandler):
        def parse_request(self) -> bool:
            if not super().parse_request():
                return False
            faults.inject(self.connection)
            if faults.forbidden:
                self.send_error(HTTPStatus.FORBIDDEN)
            return not faults.forbidden

    class Server(http.server.HTTPServer):
        request_queue_size = 128

    def read_upload(handler: Handler, query: dict) -> Any:
        content_type = handler.headers.get("Content-Type", "")
        if not content_type.startswith("multipart/related"):
            return read_data(handler, query)
        boundary = content_type.partition("boundary=")[2].strip('"').encode()
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        _, meta, rest = body.split(b"--" + boundary + b"\n", 2)
        head, _, content = rest.partition(b"\n\n")
        return {
            "meta": json.loads(meta.partition(b"\n\n")[2]),
            "content": content.removesuffix(b"\n--" + boundary + b"--"),
            "content-type": head.partition(b":")[2].strip().decode(),
        }

    def insert_if(request: server.Request, response: server.Response, storage: Storage) -> None:
        stored = storage.objects.get(request.params["bucket_name"], {})
        if "ifGenerationMatch" in request.query and request.data["meta"]["name"] in stored:
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
        insert(request, response, storage)

    with (
        mock.patch.object(server, "_read_data", read_upload),
        mock.patch.object(objects, "_multipart_upload", insert_if),
        _running(Server(("127.0.0.1", 0), functools.partial(Handler, storage))) as address,
    ):
        yield address
