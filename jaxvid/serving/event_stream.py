"""Responses that are streams of server-sent events."""

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.serving.errors import RequestError
from jaxvid.serving.served_model import Event
from jaxvid.serving.service import Service, guard
from jaxvid.serving.uploads import Upload


class EventStream:
    """An ASGI response that receives a video and sends events about it.

    An error before the first event sets the HTTP status. A later error is sent as the last event,
    `error`, with the contents of an error response.

    Args:
        service: State of the server.
        request: The request.
        events: Returns the events for an upload. The last one is `done`.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        events: Callable[[Upload], AsyncIterator[Event]],
    ):
        self._service, self._request, self._events = service, request, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Receive the video and send the events."""
        limit, is_started = self._service.settings.limits.stream_seconds, False

        async def send_event(name: str, data: dict[str, Any]) -> None:
            nonlocal is_started
            if not is_started:
                is_started = True
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            body = f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        try:
            async with (
                self._service.receive(self._request) as upload,
                guard(self._request, limit),
                contextlib.aclosing(self._events(upload)) as events,
            ):
                async for name, data in events:
                    await send_event(name, data)
        except ClientDisconnect:
            if is_started:
                return  # the status has already been sent
            raise
        except (RequestError, DecodeError) as error:
            if not is_started:
                raise
            await send_event("error", to_request_error(error).to_json()["error"])
        await send({"type": "http.response.body"})


HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),  # nginx passes events on at once
]


def to_request_error(error: RequestError | DecodeError) -> RequestError:
    """Return status 422 for a video that cannot be decoded; return other errors unchanged."""
    return error if isinstance(error, RequestError) else RequestError(422, str(error))
