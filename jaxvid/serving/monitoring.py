"""Metrics of the server, in the format of Prometheus."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_GONE = 499  # status of a request whose client disconnected before the response
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)  # bucket limits


class Metrics:
    """Counters, gauges and histograms of one server.

    Attributes:
        batches: Items per batch, before padding, by model.
        stages: Seconds of a request by stage: upload, decode, network.
    """

    def __init__(self):
        self._registry = CollectorRegistry()
        options = {"registry": self._registry, "namespace": "jaxvid"}
        self._requests = Counter(
            "requests", "Completed requests", ["route", "method", "status"], **options
        )
        self._seconds = Histogram(
            "request_seconds",
            "Time to the end of the response",
            ["route"],
            buckets=SECONDS,
            **options,
        )
        self.batches = Histogram(
            "batch_items", "Items per batch", ["model"], buckets=(1, 2, 4, 8, 16, 32, 64), **options
        )
        self.stages = Histogram(
            "stage_seconds", "Time of a request by stage", ["stage"], buckets=SECONDS, **options
        )
        self._options = options

    def add_gauge(self, name: str, description: str, function: Callable[[], float]) -> None:
        """Add a gauge whose value a function returns."""
        Gauge(name, description, **self._options).set_function(function)

    def observe_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a completed request."""
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def observe_batch(self, model: str, size: int) -> None:
        """Count a batch."""
        self.batches.labels(model).observe(size)

    def to_text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class Monitoring:
    """ASGI middleware that counts requests by route and status.

    Args:
        app: The application.
        metrics: The metrics.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = CLIENT_GONE, time.monotonic()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            status = 500
            raise
        finally:
            # Arbitrary paths must not become label values.
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"
            self._metrics.observe_request(route, method, status, time.monotonic() - start)
