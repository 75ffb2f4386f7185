"""A web server on this machine that serves a video, completely or with faults."""

import contextlib
import http.server
import threading
from collections.abc import Iterator


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer requests as their path says; `server.requests` has the paths."""

    def log_message(self, *_) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Send the video, part of it, or an error."""
        data, path = self.server.video, self.path.partition("?")[0]
        self.server.requests.append(self.path)
        if path == "/missing.mp4":
            self.send_error(404)
            return
        if path == "/moved.mp4":
            self.send_response(302)
            self.send_header("Location", "/clip.mp4")
            self.end_headers()
            return
        self.send_response(200)
        kind = "text/html; charset=utf-8" if path == "/page" else "video/mp4"
        self.send_header("Content-Type", kind)
        if path != "/unknown_size.mp4":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            is_partial = path in ("/cut.mp4", "/stalled.mp4")
            self.wfile.write(data[: len(data) // 2] if is_partial else data)
            if path == "/stalled.mp4":
                self.server.stopped.wait()


@contextlib.contextmanager
def serve(video: bytes) -> Iterator[http.server.ThreadingHTTPServer]:
    """Run a server for a video; its address is `server.url`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.video, server.requests, server.stopped = video, [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
