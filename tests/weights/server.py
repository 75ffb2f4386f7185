"""A local HTTP server with the faults of real ones, for tests of downloads."""

import contextlib
import dataclasses
import http.server
import re
import threading
import time
from collections.abc import Iterator


@dataclasses.dataclass
class Server:
    """Files that a server offers, and its behaviour. All attributes may change at any time.

    Attributes:
        files: Path → contents.
        validators: Whether responses have an ETag, so that downloads can be continued.
        cut_after: Bytes after which a connection is closed; None: never.
        status: Status of all responses instead of the file; None: the file.
        ranges: Whether parts of files are sent.
        pause: Seconds to wait before each block of 64 kB.
        requests: Path and `Range` header (or "") of all requests so far.
        url: Address of the server, without a slash at the end.
    """

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    validators: bool = True
    cut_after: int | None = None
    status: int | None = None
    ranges: bool = True
    pause: float = 0.0
    requests: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    url: str = ""

    def etag(self, path: str) -> str:
        """Return a validator of a file, which changes with its contents."""
        return f'"{hash(self.files[path])}"'


@contextlib.contextmanager
def serve(**options) -> Iterator[Server]:
    """Run a server while the body runs; the options are attributes of `Server`."""
    server = Server(**options)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            _answer(server, self)

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    server.url = f"http://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


def _answer(server: Server, handler: http.server.BaseHTTPRequestHandler) -> None:
    """Answer a GET request."""
    part = handler.headers.get("Range", "")
    server.requests.append((handler.path, part))
    if server.status or handler.path not in server.files:
        handler.send_error(server.status or 404)
        return
    data, start = server.files[handler.path], 0
    is_current = handler.headers.get("If-Range") == server.etag(handler.path)
    if part and server.ranges and is_current:
        start = int(re.fullmatch(r"bytes=(\d+)-", part)[1])
        if start >= len(data):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(data)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    else:
        handler.send_response(200)
    if server.validators:
        handler.send_header("ETag", server.etag(handler.path))
    handler.send_header("Content-Length", str(len(data) - start))
    handler.end_headers()
    end = len(data) if server.cut_after is None else min(len(data), start + server.cut_after)
    with contextlib.suppress(ConnectionError):
        for offset in range(start, end, 2**16):
            time.sleep(server.pause)
            handler.wfile.write(data[offset : min(end, offset + 2**16)])
