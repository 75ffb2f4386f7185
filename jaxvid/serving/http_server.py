"""The HTTP/1.1 server: uvicorn with limits of connections and of the time for headers."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxvid.serving.limits import Limits
from jaxvid.serving.service import Service

END_SECONDS = 5.0  # time for requests to end after the drain time
HEADER_BYTES = 65536  # maximum size of the headers of a request


class HttpServer:
    """A server for an application of `make_app`.

    Args:
        app: The application.
        limits: Limits of connections.

    Attributes:
        service: State of the application.
        num_ended: Number of requests that were ended with status 503 after `stop`.
    """

    def __init__(self, app: Starlette, limits: Limits):
        self.service: Service = app.state.service
        config = uvicorn.Config(
            app,
            http=_make_protocol(limits.header_seconds, limits.stall_seconds),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=limits.connections,
            timeout_graceful_shutdown=round(limits.drain_seconds + END_SECONDS),
            h11_max_incomplete_event_size=HEADER_BYTES,
        )
        self._server, self._drain_seconds = _Server(config), limits.drain_seconds
        self.num_ended = 0
        self.service.on_failure = self.stop

    def stop(self) -> None:
        """Accept no more requests, complete those in progress, and return from `serve`.

        Requests that take longer than `drain_seconds` get status 503.
        """
        self.service.is_stopping = True
        self._server.should_exit = True
        asyncio.get_running_loop().call_later(self._drain_seconds, self._end_requests)

    def _end_requests(self) -> None:
        self.num_ended = self.service.end_requests()

    async def serve(self, listener: socket.socket, on_start: Callable[[], None]) -> None:
        """Serve until `stop` is called and the requests in progress are completed.

        Args:
            listener: A listening socket.
            on_start: Called when connections are accepted.
        """
        # Malformed requests and lost connections must not fill the log.
        for name in ("asyncio", "uvicorn.error", "python_multipart"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._server.on_start = on_start
        await self._server.serve([listener])


class _Server(uvicorn.Server):
    """A server whose caller handles signals."""

    on_start: Callable[[], None]

    @contextlib.contextmanager
    def capture_signals(self):
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_start()


def _make_protocol(header_seconds: float, stall_seconds: float) -> type[H11Protocol]:
    """Return a protocol that closes connections of clients that do not send or read in time.

    Args:
        header_seconds: Maximum time from the connection, or from the end of the last response, to
            the end of the headers.
        stall_seconds: Maximum time without the client reading its response.
    """

    class Protocol(H11Protocol):
        _header_timer: asyncio.TimerHandle | None = None
        _stall_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._update_timer()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._update_timer()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._update_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._cancel_timer()
            self.resume_writing()

        def _update_timer(self) -> None:
            """Start the timer while no request is in progress."""
            is_waiting = self.cycle is None or self.cycle.response_complete
            if not is_waiting:
                self._cancel_timer()
            elif self._header_timer is None:
                self._header_timer = self.loop.call_later(header_seconds, self._close)

        def _cancel_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _close(self) -> None:
            self.transport.close()  # sends buffered data first
            self.loop.call_later(stall_seconds, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stall_timer = self.loop.call_later(stall_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stall_timer is not None:
                self._stall_timer.cancel()
                self._stall_timer = None

    return Protocol
