"""The page, and the routes that only the page uses."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from jaxvid.serving.errors import RequestError

PAGE = Path(__file__).parent / "page"
FILES = {"page.css": "text/css", "page.js": "text/javascript"}


async def index(_: Request) -> Response:
    """Return the page."""
    return FileResponse(PAGE / "index.html", media_type="text/html")


async def static(request: Request) -> Response:
    """Return a file of the page."""
    name = request.path_params["name"]
    if name not in FILES:
        raise RequestError(404, f"/static/{name}: not found")
    return FileResponse(PAGE / name, media_type=FILES[name])


ROUTES = [
    Route("/", index),
    Route("/static/{name}", static),
]
