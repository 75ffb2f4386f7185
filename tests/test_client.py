"""The client of `jaxvid serve`."""

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jaxvid
from jaxvid.client import ServerError
from jaxvid.errors import InputError
from jaxvid.serving.limits import Limits, Settings
from tests.serving.running_server import make_fake_model, running


@pytest.fixture(scope="module")
def server():
    """Return a running server with two models and a token."""
    models = [make_fake_model(), make_fake_model("other")]
    limits = Limits(upload_bytes=100_000, requests=1)
    with running(models, Settings(token="a-secret", limits=limits)) as server:
        yield server


@pytest.fixture
def client(server) -> jaxvid.Client:
    return jaxvid.Client(server.url, token="a-secret")


def test_all_kinds_of_videos_give_the_same_prediction(client, clips):
    path = Path(clips[0])
    expected = client.predict(path)
    assert expected.model == "fake"
    assert len(expected.top) == 5
    assert expected.top[0].probability >= expected.top[1].probability
    assert (expected.padded, expected.warnings) == (False, ())
    for video in (str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert client.predict(video).top == expected.top


def test_options(client, clips):
    prediction = client.predict(clips[0], top_k=2, views=2, model="other")
    assert (prediction.model, len(prediction.top)) == ("other", 2)


def test_features(client, clips):
    features = client.features(clips[0], model="other")
    assert features.model == "other"
    assert len(features.vector) == 4


def test_timeline(client, clips):
    windows = list(client.timeline(clips[0], window=0.5, stride=0.25, top_k=1))
    assert [len(window.top) for window in windows] == [1] * len(windows)
    assert [window.start for window in windows] == sorted({window.start for window in windows})
    assert windows[-1].share_done == 1


def test_model_cards(client):
    assert [card["name"] for card in client.models()] == ["fake", "other"]
    assert client.model()["name"] == "fake"
    assert client.model("other")["name"] == "other"
    with pytest.raises(InputError, match="model='x': must be one of 'fake', 'other'"):
        client.model("x")


def test_errors_of_the_server(client, server, clips, tmp_path):
    for call, status in (
        (lambda: client.predict(b"not a video"), 422),
        (lambda: client.predict(clips[0], top_k=0), 400),
        (lambda: list(client.timeline(b"not a video", window=1, stride=1)), 422),
        (lambda: client.predict(bytes(20_000_000)), 413),  # refused before it is sent
        (lambda: client.predict("https://example.org/clip.mp4"), 403),
        (lambda: jaxvid.Client(server.url, token="wrong").predict(clips[0]), 401),
    ):
        with pytest.raises(ServerError) as caught:
            call()
        assert caught.value.status == status, caught.value


def test_other_errors(clips, tmp_path):
    with pytest.raises(InputError, match="expected the address of a server"):
        jaxvid.Client("localhost:7860")
    message = r"http://127\.0\.0\.1:9: no response \(Connection refused"
    with pytest.raises(ServerError, match=message):
        jaxvid.Client("http://127.0.0.1:9").predict(clips[0])
    with pytest.raises(FileNotFoundError):
        jaxvid.Client("http://127.0.0.1:9").predict(tmp_path / "missing.mp4")
    with pytest.raises(InputError, match="text mode"):
        jaxvid.Client("http://127.0.0.1:9").predict(io.StringIO("x"))


def test_a_busy_server_is_asked_again(server, client, clips, monkeypatch):
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        requests.clear()

    requests = server.service._requests
    monkeypatch.setattr(time, "sleep", pause)
    requests.add("another")
    assert client.predict(clips[0]).model == "fake"
    assert pauses == [1]
    requests.add("another")
    impatient = jaxvid.Client(server.url, token="a-secret", retry_seconds=0)
    with pytest.raises(ServerError) as caught:
        impatient.predict(clips[0])
    requests.clear()
    assert caught.value.status == 429


def test_the_client_imports_only_the_standard_library():
    source = "import sys, jaxvid; jaxvid.Client('http://a'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"numpy", "jax", "starlette", "etils"} & {*done.stdout.split()}
