"""HTTP client for load tests: many connections in one asyncio loop."""

import asyncio
import contextlib
import dataclasses
import http.client
import re
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import h11

READ_BYTES = 2**16


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response of a server.

    Attributes:
        status: HTTP status; 0 if the connection was closed before the end of the response.
        headers: Names in lower case.
        body: The body.
    """

    status: int
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""


async def read_answers(reader: asyncio.StreamReader, method: str = "POST") -> AsyncIterator[Answer]:
    """Yield the responses that arrive on a connection, until it is closed.

    Args:
        reader: The connection.
        method: Method of the requests.
    """
    parser, status, headers, body = _make_parser(method), 0, {}, b""
    while True:
        event = parser.next_event()
        if event is h11.NEED_DATA:
            parser.receive_data(await reader.read(READ_BYTES))
        elif isinstance(event, h11.Response):
            status = event.status_code
            headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            yield Answer(status, headers, body)
            rest, is_closed = parser.trailing_data
            if is_closed or headers.get("connection") == "close":
                return
            parser, status, headers, body = _make_parser(method), 0, {}, b""
            if rest:  # no data would mean that the connection is closed
                parser.receive_data(rest)
        elif isinstance(event, h11.ConnectionClosed):
            return


def _make_parser(method: str) -> h11.Connection:
    """Return a parser of the response to one request."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method=method, target="/", headers=[("Host", "localhost")]))
    parser.send(h11.EndOfMessage())
    return parser


def make_request(path: str, body: bytes, method: str = "POST", **headers: str) -> bytes:
    """Return the bytes of a request; in the names of headers, `_` stands for a hyphen."""
    headers = {"Host": "localhost", "Content_Length": str(len(body))} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + body


async def _read_answer(reader: asyncio.StreamReader) -> Answer:
    """Read a response with `Content-Length`, in much less CPU time than `read_answers`."""
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    body = await reader.readexactly(int(headers["content-length"]))
    return Answer(int(status.split()[1]), headers, body)


async def send_all(
    port: int,
    path: str,
    bodies: Sequence[bytes],
    num_clients: int,
    check: Callable[[Answer], None],
    *,
    method: str = "POST",
) -> list[float]:
    """Send requests from several clients, each of which keeps its connection open.

    Args:
        port: Port of the server on 127.0.0.1.
        path: Path and query.
        bodies: Bodies of the requests. Each client sends the next one when it is idle.
        num_clients: Number of clients.
        check: Called with each response.
        method: Method of the requests.

    Returns:
        Seconds from the start of each request to the end of its response.
    """
    waiting, seconds = iter(bodies), []

    async def run_client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for body in waiting:
            start = time.perf_counter()
            writer.write(make_request(path, body, method))
            answer = await _read_answer(reader)
            seconds.append(time.perf_counter() - start)
            check(answer)
        writer.close()
        await writer.wait_closed()

    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(run_client())
    return seconds


@contextlib.contextmanager
def serving(command: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Run a server until the end of the context.

    Args:
        command: A command that prints a line with the URL, and then serves until SIGTERM.

    Yields:
        The id of the process and its port, when the server is ready.

    Raises:
        RuntimeError: The server ends before it is ready.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            match = re.search(r"http://[^/ ]*:(\d+)", process.stdout.readline())
            if match is None:
                raise RuntimeError(f"{command}: has ended; see the messages above")
            port = int(match[1])
            while get_status(port, "/readyz") != 200:
                if process.poll() is not None:
                    raise RuntimeError(f"{command}: has ended; see the messages above")
                time.sleep(0.1)
            yield process.pid, port
        finally:
            process.terminate()


def get_status(port: int, path: str) -> int:
    """Return the status of a GET request to 127.0.0.1; 0 if there is no response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection), contextlib.suppress(ConnectionError):
        connection.request("GET", path)
        return connection.getresponse().status
    return 0
