"""Servers that run in a thread, and a model that needs no compilation."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxvid.data.synthetic_motion import LABELS
from jaxvid.models import PRESETS
from jaxvid.serve import bind
from jaxvid.serving.app import make_app
from jaxvid.serving.http_server import HttpServer
from jaxvid.serving.limits import Settings
from jaxvid.serving.served_model import ModelDescription, ServedModel
from jaxvid.storage.preprocessing import Preprocessing

WAIT_SECONDS = 60  # for the machine; no test depends on it


class FakeEngine:
    """An engine whose logits are the mean pixel times the index of the class.

    Attributes:
        warm: Programs and sizes that were warmed up.
        batches: Programs and sizes of all batches.
        is_free: While it is cleared, batches wait.
    """

    programs = ("score", "embed")

    def __init__(self):
        self.warm, self.batches = set(), []
        self.is_free = threading.Event()
        self.is_free.set()

    def warm_up(self, program: str, size: int) -> None:
        self.warm.add((program, size))

    def run(self, program: str, batch: np.ndarray) -> Any:
        assert (program, len(batch)) in self.warm
        self.batches.append((program, len(batch)))
        assert self.is_free.wait(WAIT_SECONDS)
        means = batch.reshape(len(batch), -1).mean(axis=1, dtype=np.float64)[:, None] / 255
        if program == "embed":
            return {"video": means * np.ones(4), "frames": means[:, None] * np.ones((8, 4))}
        return means * np.arange(len(LABELS))

    def probabilities(self, logits: np.ndarray, num_views: int) -> np.ndarray:
        exponentials = np.exp(logits / num_views)
        return exponentials / exponentials.sum(axis=-1, keepdims=True)


def make_fake_model(name: str = "fake", **preprocessing: Any) -> ServedModel:
    """Return a model with a `FakeEngine`; `preprocessing` replaces fields."""
    values = {"num_frames": 8, "short_side": 72, "crop": 64, "mean": 0.5, "std": 0.5}
    made = Preprocessing(**(values | preprocessing))
    description = ModelDescription(labels=list(LABELS), config=None, preprocessing=made)
    card = {"name": "fake", "labels_source": None, "activation": "softmax", "provenance": {}}
    return ServedModel(name, card, description, FakeEngine())


class AttentiveEngine(FakeEngine):
    """A `FakeEngine` that attends to the first patch and to the last frame."""

    programs = ("score", "attend")

    def run(self, program: str, batch: np.ndarray) -> Any:
        if program != "attend":
            return super().run(program, batch)
        assert batch.shape[1:] == (8, 64, 64, 3)
        spatial, temporal = np.zeros((1, 8, 16)), np.zeros((1, 8))
        spatial[..., 0] = temporal[..., -1] = 1
        return {"logits": np.zeros((1, 8)), "spatial": spatial, "temporal": temporal}


def make_attentive_model(name: str = "fake", **preprocessing: Any) -> ServedModel:
    """Return a model with an `AttentiveEngine`; `preprocessing` replaces fields."""
    model = make_fake_model(name, **preprocessing)
    model.engine, model.config = AttentiveEngine(), PRESETS["xvit_tiny"]
    return model


class RunningServer:
    """A server that runs in a thread.

    Attributes:
        port: Its port on 127.0.0.1.
        service: Its state.
    """

    def __init__(self, server: HttpServer, listener: socket.socket):
        self.port, self.service = listener.getsockname()[1], server.service
        self.url = f"http://127.0.0.1:{self.port}"

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a request; return the status, the headers in lower case and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return response.status, names, response.read()

    def get(self, path: str, **headers: str) -> Any:
        """Return the JSON of a GET request with status 200."""
        status, _, body = self.request("GET", path, headers=headers)
        assert status == 200, body
        return json.loads(body)

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Any:
        """Return the JSON of a POST request with status 200."""
        status, _, answer = self.request("POST", path, body, headers)
        assert status == 200, answer
        return json.loads(answer)

    def post_events(self, path: str, body: Any) -> list[tuple[str, dict]]:
        """Return the events that answer a POST request."""
        status, _, answer = self.request("POST", path, body)
        assert status == 200, answer
        events = []
        for block in answer.decode().removesuffix("\n\n").split("\n\n"):
            name, data = block.split("\n")
            events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        return events

    def wait_until_ready(self) -> None:
        """Wait until all networks are compiled."""
        deadline = time.monotonic() + WAIT_SECONDS
        while self.service.status != "ready":
            assert self.service.failure is None, self.service.failure
            assert time.monotonic() < deadline
            time.sleep(0.01)


@contextlib.contextmanager
def running(
    models: Sequence[ServedModel], settings: Settings | None = None, *, ready: bool = True
) -> Iterator[RunningServer]:
    """Run a server in a thread until the end of the context.

    Args:
        models: The models.
        settings: Settings of the server.
        ready: Whether to wait until all networks are compiled.
    """
    settings = settings or Settings()
    server = HttpServer(make_app(models, settings), settings.limits)
    listener, started = bind("127.0.0.1", 0), threading.Event()
    loop = asyncio.new_event_loop()

    def serve() -> None:
        with contextlib.closing(loop):
            loop.run_until_complete(server.serve(listener, started.set))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert started.wait(WAIT_SECONDS)
        running_server = RunningServer(server, listener)
        if ready:
            running_server.wait_until_ready()
        yield running_server
    finally:
        loop.call_soon_threadsafe(server.stop)
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()
