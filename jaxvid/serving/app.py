"""The ASGI application: routes, error responses and middleware."""

import contextlib
import errno
from collections.abc import AsyncIterator, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.serving import api, page_routes
from jaxvid.serving.errors import RequestError
from jaxvid.serving.event_stream import to_request_error
from jaxvid.serving.limits import Settings
from jaxvid.serving.monitoring import CLIENT_GONE, Monitoring
from jaxvid.serving.security import Security
from jaxvid.serving.served_model import ServedModel
from jaxvid.serving.service import Service

HTTP_ERRORS = {
    404: "not found; see /openapi.json",
    405: "this method is not allowed; see /openapi.json",
}


def make_app(models: Sequence[ServedModel], settings: Settings) -> Starlette:
    """Make the application. It compiles its networks after it has started.

    Args:
        models: The models; the first one is the default.
        settings: Settings of the server.

    Returns:
        The application. Its `state.service` is a `Service`.
    """
    service = Service(models, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    app = Starlette(
        routes=[*api.ROUTES, *page_routes.ROUTES],
        middleware=[
            Middleware(Monitoring, service.metrics),
            Middleware(Security, settings),
        ],
        exception_handlers={
            RequestError: _answer_error,
            DecodeError: _answer_error,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_nobody,
            OSError: _answer_os_error,
            Exception: _answer_defect,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


async def _answer_error(_: Request, error: RequestError | DecodeError) -> Response:
    error = to_request_error(error)
    return JSONResponse(error.to_json(), error.status, error.headers)


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {HTTP_ERRORS[error.status_code]}"
    return await _answer_error(request, RequestError(error.status_code, message, error.headers))


async def _answer_os_error(request: Request, error: OSError) -> Response:
    """Return status 507 if the disk is full, otherwise 500."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error
    return await _answer_error(request, RequestError(507, "the disk of the server is full"))


async def _answer_nobody(*_: object) -> Response:
    return Response(status_code=CLIENT_GONE)  # for the metrics; the client does not receive it


async def _answer_defect(request: Request, _: Exception) -> Response:
    """Return status 500 for an unexpected exception; its traceback is printed on stderr."""
    return await _answer_error(request, RequestError(500, "internal error; see the server's log"))
