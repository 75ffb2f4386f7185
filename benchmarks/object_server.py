"""A small S3 server for benchmarks: it serves the files of a folder, read-only.

python -m benchmarks.object_server FOLDER [SECONDS]

It implements the requests that s3fs needs to list and read: ListObjectsV2, HEAD and GET with one
range. It responds after at least SECONDS, does not check credentials, and uses little CPU
time, because the kernel copies the files to the sockets. It prints its address and ends when its
standard input is closed.
"""

import contextlib
import os
import re
import socketserver
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from xml.sax.saxutils import escape

BUCKET = "bucket"
RANGE = re.compile(r"bytes=(\d+)-(\d*)")
MODIFIED = "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n"


def list_objects(folder: Path, query: dict[str, str]) -> bytes:
    """Return the response to ListObjectsV2, with all objects in one page."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    contents, prefixes = [], set()
    for path in sorted(folder.rglob("*")):
        key = str(path.relative_to(folder))
        if not path.is_file() or not key.startswith(prefix):
            continue
        first, separator, _ = key[len(prefix) :].partition(delimiter or "\0")
        if separator:
            prefixes.add(f"{prefix}{first}{delimiter}")
            continue
        status = path.stat()
        contents.append(
            f"<Contents><Key>{escape(key)}</Key><Size>{status.st_size}</Size>"
            f"<ETag>&quot;{status.st_mtime_ns:x}&quot;</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )
    folders = (f"<CommonPrefixes><Prefix>{escape(p)}</Prefix></CommonPrefixes>" for p in prefixes)
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
        f"<KeyCount>{len(contents) + len(prefixes)}</KeyCount><MaxKeys>1000</MaxKeys>"
        f"{''.join(contents)}{''.join(sorted(folders))}</ListBucketResult>"
    )
    return text.encode()


class Handler(socketserver.StreamRequestHandler):
    """Answers the requests of a connection to a `Server`."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Answer requests until the client closes the connection."""
        with contextlib.suppress(ConnectionError):
            while lines := self.read_head():
                self.answer(lines[0], dict(line.lower().split(": ", 1) for line in lines[1:]))

    def read_head(self) -> list[str]:
        """Return the lines of the next request, or none at the end of the connection."""
        lines = []
        while line := self.rfile.readline().decode("latin-1").rstrip("\r\n"):
            lines.append(line)
        return lines

    def answer(self, first: str, headers: dict[str, str]) -> None:
        """Answer one request, given as its first line and its other headers in lower case."""
        method, target, _ = first.split(" ")
        url = urllib.parse.urlsplit(target)
        key = urllib.parse.unquote(url.path).removeprefix(f"/{BUCKET}").strip("/")
        time.sleep(self.server.latency)
        if not key:
            body = list_objects(self.server.folder, dict(urllib.parse.parse_qsl(url.query)))
            self.write_head("200 OK", len(body))
            self.wfile.write(body)
            return
        try:
            file = open(self.server.folder / key, "rb")  # noqa: SIM115 (closed below)
        except OSError:
            self.write_head("404 Not Found", 0)
            return
        with file:
            state = os.fstat(file.fileno())
            start, stop, size = 0, state.st_size, state.st_size
            status, fields = "200 OK", f'ETag: "{state.st_mtime_ns:x}"\r\n{MODIFIED}'
            if match := RANGE.fullmatch(headers.get("range", "")):
                start, stop = int(match[1]), min(int(match[2] or size - 1) + 1, size)
                status = "206 Partial Content"
                fields += f"Content-Range: bytes {start}-{stop - 1}/{size}\r\n"
            self.write_head(status, stop - start, fields)
            while method == "GET" and start < stop:
                start += os.sendfile(self.request.fileno(), file.fileno(), start, stop - start)

    def write_head(self, status: str, length: int, fields: str = "") -> None:
        """Write the headers of an answer."""
        self.request.sendall(
            f"HTTP/1.1 {status}\r\nContent-Type: binary/octet-stream\r\nAccept-Ranges: bytes\r\n"
            f"{fields}Content-Length: {length}\r\n\r\n".encode()
        )


class Server(socketserver.ThreadingTCPServer):
    """The server, with a thread per connection.

    Args:
        folder: The folder that it serves.
        latency: Minimum time of a request in seconds.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self, folder: Path, latency: float):  # noqa: D107
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.latency = folder, latency


def main() -> None:
    """Print the address, and serve a folder until standard input is closed."""
    server = Server(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
