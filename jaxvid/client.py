"""Client of `jaxvid serve`. It needs only the standard library.

client = jaxvid.Client("http://127.0.0.1:7860")
print(client.predict("clip.mp4").top[0].label)
"""

import contextlib
import dataclasses
import http.client
import json
import os
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any, BinaryIO

from jaxvid.errors import InputError

# Path, URL (if the server allows it), contents of a video file, or file object in binary mode.
Video = str | os.PathLike | bytes | BinaryIO
BUSY = (429, 503)  # statuses after which a request is repeated
MAX_PAUSE = 10.0  # seconds


class ServerError(Exception):
    """An error response, or no response.

    Args:
        message: What is wrong.
        status: HTTP status; 0: no response.
        retry_after: Seconds after which to try again (`Retry-After`); None: do not try again.
    """

    def __init__(self, message: str, status: int = 0, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclasses.dataclass(frozen=True)
class ClassProbability:
    """A class and its probability.

    Attributes:
        label: Name of the class.
        index: Index of the class.
        probability: Its probability.
    """

    label: str
    index: int
    probability: float


@dataclasses.dataclass(frozen=True)
class ServedPrediction:
    """The predicted classes of a video.

    Attributes:
        model: Name of the model.
        top: The most likely classes, in descending order of probability.
        padded: Whether the video is too short for a clip, so that frames are repeated.
        seconds: Wall time on the server: `decode`, `network` and `total`.
        warnings: Unusual properties of the video, one sentence each.
    """

    model: str
    top: tuple[ClassProbability, ...]
    padded: bool
    seconds: dict[str, float]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ServedFeatures:
    """Features of a video, averaged over its views.

    Attributes:
        model: Name of the model.
        vector: The features.
    """

    model: str
    vector: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class ServedWindow:
    """The predicted classes of a window of a video.

    Attributes:
        start: Start of the window in seconds.
        end: End of the window in seconds.
        padded: Whether the window is too short for a clip, so that frames are repeated.
        top: The most likely classes, in descending order of probability.
        share_done: Share of the video's windows that are classified, 0 to 1.
    """

    start: float
    end: float
    padded: bool
    top: tuple[ClassProbability, ...]
    share_done: float


class Client:
    """Client of a server.

    A video is a path, a URL (if the server was started with `--allow_urls`), the contents of a
    video file, or a file object opened in binary mode.

    Args:
        url: Address of the server.
        token: The server's secret; None: $JAXVID_TOKEN, or none.
        timeout: Maximum seconds without any data from the server.
        retry_seconds: Maximum time for which a request is repeated while the server is busy.

    Raises:
        InputError: `url` is not an http or https address.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:7860",
        *,
        token: str | None = None,
        timeout: float = 120.0,
        retry_seconds: float = 60.0,
    ):
        self._parts = urllib.parse.urlsplit(url)
        if self._parts.scheme not in ("http", "https") or not self._parts.hostname:
            raise InputError(f"{url}: expected the address of a server, http://HOST:PORT")
        self._token = os.environ.get("JAXVID_TOKEN") if token is None else token
        self._timeout, self._retry_seconds = timeout, retry_seconds

    def predict(
        self, video: Video, *, top_k: int = 5, views: int | None = None, model: str | None = None
    ) -> ServedPrediction:
        """Classify a video.

        Args:
            video: The video.
            top_k: Number of classes to return. If the model has fewer classes, all are returned.
            views: Number of views; None: from the model card.
            model: Name of the model; None: the first one of the server.

        Raises:
            ServerError: The server refuses the request or cannot decode the video.
        """
        with self._post("/v1/predict", video, top_k=top_k, views=views, model=model) as response:
            answer = json.load(response)
        return ServedPrediction(
            model=answer["model"],
            top=_classes(answer["top"]),
            padded=answer["padded"],
            seconds=answer["seconds"],
            warnings=tuple(answer["warnings"]),
        )

    def features(self, video: Video, *, model: str | None = None) -> ServedFeatures:
        """Compute the features of a video.

        Args:
            video: The video.
            model: Name of the model; None: the first one of the server.

        Raises:
            ServerError: The server refuses the request or cannot decode the video.
        """
        with self._post("/v1/features", video, model=model) as response:
            answer = json.load(response)
        return ServedFeatures(answer["model"], tuple(answer["vector"]))

    def timeline(
        self,
        video: Video,
        *,
        window: float,
        stride: float,
        top_k: int = 5,
        model: str | None = None,
    ) -> Iterator[ServedWindow]:
        """Classify sliding windows of a video.

        Args:
            video: The video.
            window: Length of a window in seconds.
            stride: Time between the starts of consecutive windows in seconds.
            top_k: Number of classes per window.
            model: Name of the model; None: the first one of the server.

        Yields:
            Each window as soon as it is classified.

        Raises:
            ServerError: The server refuses the request or cannot decode the video.
        """
        options = {"window": window, "stride": stride, "top_k": top_k, "model": model}
        with self._post("/v1/timeline", video, **options) as response:
            total, done = 0, 0
            for name, data in _read_events(response):
                if name == "plan":
                    total = data["windows"]
                elif name == "window":
                    done += 1
                    classes = _classes(data.pop("top"))
                    yield ServedWindow(**data, top=classes, share_done=done / total)
                elif name == "error":
                    raise ServerError(data["message"], data["status"])

    def models(self) -> list[dict[str, Any]]:
        """Return the model cards of the server.

        Raises:
            ServerError: The server refuses the request.
        """
        with self._request("GET", "/v1/model", None, {}) as response:
            return json.load(response)

    def model(self, name: str | None = None) -> dict[str, Any]:
        """Return the card of a model; None: the first one of the server.

        Raises:
            ServerError: The server refuses the request.
            InputError: The server has no such model.
        """
        cards = self.models()
        for card in cards:
            if name in (None, card["name"]):
                return card
        known = ", ".join(repr(card["name"]) for card in cards)
        raise InputError(f"model={name!r}: must be one of {known}")

    # -------------------------------------------------------------- requests

    def _post(
        self, path: str, video: Video, **options: Any
    ) -> contextlib.AbstractContextManager[http.client.HTTPResponse]:
        """Send a video; return the response, to be used in a `with` block."""
        given = {name: value for name, value in options.items() if value is not None}
        query = f"?{urllib.parse.urlencode(given)}" if given else ""
        headers = {"Content-Type": "application/octet-stream"}
        if isinstance(video, str) and video.startswith(("http://", "https://")):
            headers["Content-Type"] = "application/json"
            video = json.dumps({"url": video}).encode()
        elif hasattr(video, "read"):
            video = video.read()
            if isinstance(video, str):
                raise InputError("the video is opened in text mode; open it with mode 'rb'")
        return self._request("POST", path + query, video, headers)

    @contextlib.contextmanager
    def _request(
        self, method: str, path: str, body: bytes | str | os.PathLike | None, headers: dict
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request, repeatedly while the server is busy; yield the response with status 200.

        Raises:
            ServerError: Another status, or no response.
        """
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        end = time.monotonic() + self._retry_seconds
        while True:
            connection = self._connect()
            with contextlib.closing(connection):
                try:
                    response = _exchange(connection, method, self._parts.path.rstrip("/") + path,
                                         body, headers)  # fmt: skip
                    if response.status == 200:
                        yield response
                        return
                    error = _read_error(response)
                except (OSError, http.client.HTTPException) as problem:
                    if isinstance(problem, FileNotFoundError | PermissionError):
                        raise
                    reason = getattr(problem, "strerror", None) or problem
                    raise ServerError(f"{self._parts.geturl()}: no response ({reason})") from None
            pause = min(error.retry_after or 0, MAX_PAUSE)
            if error.status not in BUSY or not pause or time.monotonic() + pause > end:
                raise error
            time.sleep(pause)

    def _connect(self) -> http.client.HTTPConnection:
        is_https = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if is_https else http.client.HTTPConnection
        return kind(self._parts.hostname, self._parts.port, timeout=self._timeout)


def _exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | str | os.PathLike | None,
    headers: dict[str, str],
) -> http.client.HTTPResponse:
    """Send a request and return the response."""
    with contextlib.ExitStack() as stack:
        if isinstance(body, str | os.PathLike):
            body = stack.enter_context(open(body, "rb"))
            headers = headers | {"Content-Length": str(os.fstat(body.fileno()).st_size)}
        # A server that refuses a request responds and closes the connection before it has read the
        # whole body.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, path, body, headers)
        return connection.getresponse()


def _read_error(response: http.client.HTTPResponse) -> ServerError:
    """Return the error of a response with another status than 200."""
    text = response.read().decode(errors="replace")
    message = f"HTTP {response.status} {response.reason}"
    with contextlib.suppress(ValueError, KeyError, TypeError):
        message = json.loads(text)["error"]["message"]
    retry_after = response.headers.get("Retry-After", "")
    return ServerError(
        message, response.status, float(retry_after) if retry_after.isdecimal() else None
    )


def _read_events(response: http.client.HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the data of each server-sent event.

    Raises:
        ServerError: The connection was closed before the last event.
    """
    name = ""
    for line in response:
        field, _, value = line.decode().rstrip("\n").partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)
    if name not in ("done", "error"):
        raise ServerError("the server closed the connection early")


def _classes(entries: list[dict[str, Any]]) -> tuple[ClassProbability, ...]:
    return tuple(ClassProbability(**entry) for entry in entries)
