"""Checks of every request, and the security headers of every response."""

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxvid.errors import short_repr
from jaxvid.serving.errors import RequestError
from jaxvid.serving.limits import Settings

# Paths that need no token: the page, which asks for it, and health checks.
PUBLIC_PATHS = ("/", "/healthz", "/readyz", "/openapi.json")
PUBLIC_FOLDERS = ("/static/", "/samples/")
SAFE_METHODS = ("GET", "HEAD")

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
}


class Security:
    """ASGI middleware that refuses cross-origin requests and requests without the token.

    No response has the header `Access-Control-Allow-Origin`, so that scripts of other web sites
    cannot read responses.

    Args:
        app: The application.
        settings: The token, and the names of the server.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and add the headers to its response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            self._check(HTTPConnection(scope))
        except RequestError as error:
            response = JSONResponse(error.to_json(), error.status, error.headers)
            await response(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _check(self, request: HTTPConnection) -> None:
        """Refuse a request.

        Raises:
            RequestError: The reason.
        """
        headers, path = request.headers, request.scope["path"]
        _check_host(headers, self._settings.public_hosts)
        if request.scope["method"] not in SAFE_METHODS:
            _check_origin(headers)
        if path not in PUBLIC_PATHS and not path.startswith(PUBLIC_FOLDERS):
            check_token(headers, self._settings.token)


def _check_host(headers: Headers, public_hosts: tuple[str, ...]) -> None:
    """Refuse names of other hosts, to protect against DNS rebinding.

    IP addresses are accepted: DNS rebinding needs a host name.

    Raises:
        RequestError: The name is unknown.
    """
    values = headers.getlist("host")
    name = _host_name(values[0]) if len(values) == 1 else None
    if name is None:
        raise RequestError(400, "Host: expected one valid header")
    if name == "localhost" or name in public_hosts or _is_ip_address(name):
        return
    raise RequestError(
        421, f"Host: {short_repr(name)} is not a name of this server; see --public_host"
    )


def _host_name(host: str) -> str | None:
    """Return the name in a `Host` header in lower case, without port; None if it is invalid."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises a ValueError if it is invalid
    except ValueError:
        return None
    return parts.hostname if parts.netloc == host and "@" not in host else None


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _check_origin(headers: Headers) -> None:
    """Refuse cross-origin requests of browsers.

    Raises:
        RequestError: The origin is another web site.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    is_same = site in ("same-origin", "none") if site else True
    if origin is not None:
        is_same = is_same and urlsplit(origin).netloc.lower() == headers["host"].lower()
    if not is_same:
        raise RequestError(
            403, "Origin: requests of other web sites are refused; send them from a server instead"
        )


def check_token(headers: Headers, token: str) -> None:
    """Refuse requests without the token, in constant time.

    Args:
        headers: Headers of the request.
        token: The token; empty: none is needed.

    Raises:
        RequestError: The token is missing or wrong.
    """
    if not token:
        return
    scheme, _, value = headers.get("authorization", "").partition(" ")
    is_right = hmac.compare_digest(value.strip().encode("latin-1"), token.encode())
    if scheme.lower() != "bearer" or not is_right:
        problem = "is wrong" if value else "is missing"
        raise RequestError(
            401,
            f"Authorization: the token {problem}; send the header 'Authorization: Bearer TOKEN'",
            {"WWW-Authenticate": 'Bearer realm="jaxvid"'},
        )
