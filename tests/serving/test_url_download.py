"""Downloads of videos from public addresses only."""

import asyncio
import contextlib
import io
import json
import socket
import threading

import pytest

from jaxvid.serving import url_download
from jaxvid.serving.errors import RequestError
from jaxvid.serving.limits import Limits, Settings
from tests.serving.running_server import make_fake_model, running

LIMITS = Limits(upload_bytes=10_000, upload_seconds=5.0, stall_seconds=0.5)
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # metadata of cloud machines
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("240.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::1", False),
        ("2001:0:53aa:64c:0:0:80ff:fffe", False),
    ],
)
def test_only_public_addresses_are_allowed(address, expected):
    assert url_download.is_public(address) is expected


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/a.mp4",
        "http://",
        "http://[::1",
        "http://a:99999/",
        "example.org/a.mp4",
        "http://user:password@example.org/",
        "http://user@example.org/",
        "gopher://example.org",
        "",
    ],
)
def test_other_urls_are_refused(url):
    with pytest.raises(RequestError) as caught:
        url_download.parse(url)
    assert caught.value.status == 400
    assert "password@" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1/", "http://localhost:1/", "http://[::1]/", "http://2130706433/"),
        *("http://0x7f.1/", "http://[::ffff:127.0.0.1]/", "http://169.254.169.254/latest"),
    ],
)
def test_private_addresses_are_refused_before_a_connection(url):
    with pytest.raises(RequestError, match="has no public IP address") as caught:
        asyncio.run(url_download.download(url, io.BytesIO(), LIMITS))
    assert caught.value.status == 400


@contextlib.contextmanager
def answering(answers: dict[bytes, bytes]):
    """Yield the port of a server that sends fixed answers, and the list of its requests."""
    requests = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                data = b""
                while b"\r\n\r\n" not in data:
                    data += connection.recv(65536)
                requests.append(data)
                connection.sendall(answers[data.split(b" ")[1]])
                if b"/stall" in data:
                    connection.recv(1)  # until the client gives up

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], requests
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(30)


@pytest.fixture
def private_allowed(monkeypatch):
    """Allow 127.0.0.1, but no other private address."""
    is_public = url_download.is_public
    allow = lambda text: text == "127.0.0.1" or is_public(text)  # noqa: E731
    monkeypatch.setattr(url_download, "is_public", allow)


def fetch(port: int, path: str) -> bytes:
    file = io.BytesIO()
    size = asyncio.run(url_download.download(f"http://127.0.0.1:{port}{path}", file, LIMITS))
    assert size == len(file.getvalue())
    return file.getvalue()


@pytest.mark.usefixtures("private_allowed")
def test_files_are_downloaded_and_redirects_followed():
    chunked = OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    answers = {
        b"/a%20b?x=1": OK + b"Content-Length: 3\r\n\r\nabc",
        b"/chunked": chunked,
        b"/closed": OK + b"\r\nabc",
        b"/moved": b"HTTP/1.1 302 Found\r\nLocation: /chunked\r\nContent-Length: 0\r\n\r\n",
    }
    with answering(answers) as (port, requests):
        assert fetch(port, "/a b?x=1#fragment") == b"abc"
        assert fetch(port, "/closed") == b"abc"
        assert fetch(port, "/moved") == b"abcde"
        assert f"Host: 127.0.0.1:{port}".encode() in requests[0]


@pytest.mark.usefixtures("private_allowed")
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "HTTP 404"),
        (OK + b"Content-Type: text/html\r\nContent-Length: 1\r\n\r\nx", "it is a web page"),
        (OK + b"Content-Length: 99999\r\n\r\n" + bytes(20_000), "it is larger than 0.01 MB"),
        (OK + b"Content-Length: 0\r\n\r\n", "it is empty"),
        (OK + b"Content-Length: 9\r\n\r\nx", "peer closed connection"),
        (b"SSH-2.0\r\n\r\n", "illegal status line"),
        (b"HTTP/1.1 302 Found\r\nLocation: /a\r\nContent-Length: 0\r\n\r\n", "5 redirects"),
    ],
)
def test_failing_downloads_are_refused(answer, message):
    with answering({b"/a": answer}) as (port, _), pytest.raises(RequestError) as caught:
        fetch(port, "/a")
    assert caught.value.status == 422
    assert message in str(caught.value)


@pytest.mark.usefixtures("private_allowed")
def test_redirects_to_private_addresses_are_refused():
    for target in (b"http://127.0.0.2/", b"file:///etc/passwd", b"http://[::1]:1/"):
        answer = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + target + b"\r\n\r\n"
        with answering({b"/a": answer}) as (port, requests), pytest.raises(RequestError) as caught:
            fetch(port, "/a")
        assert caught.value.status == 400
        assert len(requests) == 1


@pytest.mark.usefixtures("private_allowed")
def test_a_server_that_stalls_is_given_up():
    with answering({b"/stall": OK + b"Content-Length: 9\r\n\r\nx"}) as (port, _):
        with pytest.raises(RequestError, match="cannot be downloaded") as caught:
            fetch(port, "/stall")
        assert caught.value.status == 422


@pytest.mark.usefixtures("private_allowed")
def test_the_connection_is_made_to_the_checked_address(monkeypatch):
    """The name server gives the public address once, and then another one."""
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])

    async def find(parts):
        return next(answers)

    monkeypatch.setattr(url_download, "find_addresses", find)
    with answering({b"/a": OK + b"Content-Length: 1\r\n\r\nx"}) as (port, requests):
        file = io.BytesIO()
        asyncio.run(url_download.download(f"http://rebinding.example:{port}/a", file, LIMITS))
        assert f"Host: rebinding.example:{port}".encode() in requests[0]
    assert file.getvalue() == b"x"


@pytest.mark.usefixtures("private_allowed")
def test_predictions_of_urls(video):
    body = OK + f"Content-Length: {len(video)}\r\n\r\n".encode() + video
    json_type = {"Content-Type": "application/json"}
    with (
        answering({b"/clip.mp4": body}) as (port, _),
        running([make_fake_model()], Settings(allow_urls=True)) as server,
    ):
        request = json.dumps({"url": f"http://127.0.0.1:{port}/clip.mp4"})
        by_url = server.post("/v1/predict", request, json_type)
        assert by_url["top"] == server.post("/v1/predict", video)["top"]
        request = json.dumps({"url": "http://10.0.0.1/clip.mp4"})
        status, _, answer = server.request("POST", "/v1/predict", request, json_type)
    assert (status, json.loads(answer)["error"]["status"]) == (400, 400)
