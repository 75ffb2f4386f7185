"""Bodies of requests, their limits, and requests that end early."""

import asyncio
import concurrent.futures
import json
import os
import socket
import time
import types

import pytest

from jaxvid.serving import uploads
from jaxvid.serving.errors import RequestError
from jaxvid.serving.limits import Limits, Settings
from tests.serving.running_server import make_fake_model, running
from tests.serving.test_api import make_form
from tests.waiting import wait_until

LIMITS = Limits(upload_bytes=200_000, stall_seconds=0.2, header_seconds=0.5)


@pytest.fixture(scope="module")
def strict():
    """Return a server with low limits."""
    with running([make_fake_model()], Settings(limits=LIMITS)) as server:
        yield server


def send(server, data: bytes, *, then=()) -> bytes:
    """Send bytes, and more after pauses; return the answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(data)
        for pause, more in then:
            time.sleep(pause)
            connection.sendall(more)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def post(*headers: str) -> bytes:
    lines = ["POST /v1/predict HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def error_of(answer: bytes) -> dict:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_a_declared_size_above_the_limit_is_refused_before_the_body(strict):
    error = error_of(send(strict, post("Content-Length: 2000000000")))
    assert error == {
        "status": 413,
        "message": "the body is larger than the limit of 0.2 MB; send a smaller one",
    }


def test_a_chunked_body_above_the_limit_is_refused(strict):
    chunk = b"8000\r\n" + bytes(0x8000) + b"\r\n"
    error = error_of(send(strict, post("Transfer-Encoding: chunked") + 7 * chunk))
    assert error["status"] == 413


def test_slow_bodies_are_refused(strict):
    error = error_of(send(strict, post("Content-Length: 100000") + bytes(50_000)))
    assert error == {"status": 408, "message": "no data of the body for 0.2 s; try again"}


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(upload_seconds=0.1), "the upload takes longer than 0.1 s; try again"),
        (
            Limits(stall_seconds=0.5, upload_rate=50_000.0),
            "the upload is slower than 50 kB/s; try again",
        ),
    ],
)
def test_uploads_that_trickle_are_refused(limits, message):
    async def trickle():
        while True:
            await asyncio.sleep(0.01)
            yield b"x"

    async def read():
        request = types.SimpleNamespace(headers={}, stream=trickle)
        async for _ in uploads.read_body(request, limits, 1000):
            pass

    with pytest.raises(RequestError) as caught:
        asyncio.run(read())
    assert (caught.value.status, str(caught.value)) == (408, message)


def test_slow_headers_close_the_connection(strict):
    assert send(strict, b"GET /healthz HT") == b""
    with pytest.raises(ConnectionError):  # one byte at a time
        send(strict, b"GET /healthz HTTP/1.1\r\n", then=[(0.2, b"X")] * 20)


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"", {}, 400, "the body is empty; send a video"),
        (b"x", {"Content-Type": "text/html"}, 415, "Content-Type: expected video/*"),
        (b"x", {"Content-Type": "multipart/form-data"}, 400, "Content-Type: multipart/form-data"),
        (b"x", {"Content-Type": f"multipart/form-data; boundary={300 * 'x'}"}, 400, "the form is"),
        (b"garbage", {"Content-Type": "multipart/form-data; boundary=XX"}, 400, "the form is"),
        (b"{}", {"Content-Type": "application/json"}, 400, "the body: expected JSON"),
        (b'{"url": 5}', {"Content-Type": "application/json"}, 400, "the body: expected JSON"),
        (b"[" * 5000, {"Content-Type": "application/json"}, 400, "the body: expected JSON"),
        (b'{"url": "http://a.b/c"}', {"Content-Type": "application/json"}, 403, "url: this server"),
        (*make_form({"other": b"x"}), 400, "the form has no field video"),
        (*make_form({"video": b""}), 400, "the field video is empty"),
        (*make_form({str(i): b"" for i in range(102)}), 400, "the form has more than 101 fields"),
        (make_form({"video": b"x"})[0][:-10], make_form({})[1], 400, "the form has no closing"),
    ],
)
def test_bad_bodies_are_refused(strict, body, headers, status, message):
    actual, _, answer = strict.request("POST", "/v1/predict", body, headers)
    error = json.loads(answer)["error"]
    assert (actual, error["status"]) == (status, status)
    assert error["message"].startswith(message)


def test_several_videos_in_one_form_are_refused(strict):
    body, headers = make_form({"video": b"x"})
    body = body.replace(b"--XX--", b"") + body
    status, _, answer = strict.request("POST", "/v1/predict", body, headers)
    assert status == 400
    assert "too many fields video; send at most 1" in json.loads(answer)["error"]["message"]


def test_uploads_leave_no_files_and_descriptors(server, video, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server.post("/v1/predict", video)  # opens what stays open
    before = len(os.listdir("/proc/self/fd"))
    for name in ("../../evil\x1b[31m.mp4", "a.mp4"):
        body, headers = make_form({"video": video}, name)
        server.post("/v1/predict", body, headers)
        body, headers = make_form({"video": video[:200]}, name)
        assert server.request("POST", "/v1/predict", body, headers)[0] == 422
    assert [*tmp_path.iterdir()] == []
    # The last connection may still be closing.
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, 30)
    assert "evil" not in "".join(capfd.readouterr())


def test_too_many_requests_are_refused(video):
    model = make_fake_model()
    with running([model], Settings(limits=Limits(requests=1))) as server:
        model.engine.is_free.clear()
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(post(f"Content-Length: {len(video)}") + video)
            while not server.service.num_requests():
                time.sleep(0.01)
            status, headers, answer = server.request("POST", "/v1/predict", video)
            model.engine.is_free.set()
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    assert status == 429
    assert int(headers["retry-after"]) >= 1
    assert "the server is busy" in json.loads(answer)["error"]["message"]


def test_decoded_clips_wait_for_memory(video):
    model = make_fake_model()
    with running([model], Settings(limits=Limits(decoded_bytes=1))) as server:
        model.engine.is_free.clear()
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            answers = [threads.submit(server.post, "/v1/predict", video) for _ in range(2)]
            while server.service.num_requests() < 2 or not model.engine.batches:
                time.sleep(0.01)
            time.sleep(0.2)
            model.engine.is_free.set()
            assert [answer.result()["model"] for answer in answers] == ["fake", "fake"]
    assert model.engine.batches == [("score", 1), ("score", 1)]


def test_requests_that_take_too_long_to_end_are_answered_when_the_server_stops(video):
    model = make_fake_model()
    settings = Settings(limits=Limits(drain_seconds=0.2))
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        with running([model], settings) as server:
            model.engine.is_free.clear()
            paths = ("/v1/predict", "/v1/timeline?window=9&stride=9")
            answers = [threads.submit(server.request, "POST", path, video) for path in paths]
            while not model.engine.batches or server.service.num_requests() < 2:
                time.sleep(0.01)
            time.sleep(0.2)
        (status, _, body), (_, _, events) = [answer.result() for answer in answers]
        model.engine.is_free.set()
    assert (status, json.loads(body)["error"]["message"]) == (503, "the server is stopping")
    assert b"the server is stopping" in events


def test_an_answer_after_the_deadline_is_an_error(video):
    model = make_fake_model()
    with running([model], Settings(limits=Limits(deadline_seconds=0.5))) as server:
        model.engine.is_free.clear()
        status, _, answer = server.request("POST", "/v1/predict", video)
        model.engine.is_free.set()
        assert status == 504
        assert "no response within 0.5 s" in json.loads(answer)["error"]["message"]
        assert server.post("/v1/predict", video)["model"] == "fake"


def test_a_client_that_disconnects_leaves_the_queue(video):
    model = make_fake_model()
    with running([model]) as server:
        model.engine.is_free.clear()
        for path in ("/v1/predict", "/v1/timeline?window=1&stride=1"):
            data = post(f"Content-Length: {len(video)}").replace(b"/v1/predict", path.encode())
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
                connection.sendall(data + video)
                wait_until(server.service.num_requests, 30)
                time.sleep(0.1)
            wait_until(lambda: not server.service.num_requests(), 30)
        model.engine.is_free.set()
        assert server.post("/v1/predict", video)["model"] == "fake"
        text = server.request("GET", "/metrics")[2].decode()
    assert 'route="/v1/predict",status="499"} 1.0' in text
