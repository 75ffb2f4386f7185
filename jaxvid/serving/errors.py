"""Error responses."""

from collections.abc import Mapping

from jaxvid.errors import printable


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: HTTP status.
        message: One line: what is wrong and how to fix it.
        headers: Headers of the response.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})

    def to_json(self) -> dict:
        """Return the body of the response."""
        return {"error": {"status": self.status, "message": printable(self)}}


class OverloadedError(RequestError):
    """Too many requests are waiting.

    Args:
        retry_seconds: Time after which the client may try again.
    """

    def __init__(self, retry_seconds: int = 1):
        message = f"the server is busy; try again in {retry_seconds} s"
        super().__init__(429, message, {"Retry-After": str(retry_seconds)})


class DecodeTimeoutError(RequestError):
    """Decoding a video takes too long.

    Args:
        seconds: The limit.
    """

    def __init__(self, seconds: float):
        super().__init__(
            422, f"video: decoding takes longer than {seconds:g} s; shorten or re-encode the video"
        )
