"""Parameters in the query of a request."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request

from jaxvid.errors import short_repr
from jaxvid.serving.errors import RequestError


def read(request: Request, kinds: Mapping[str, Callable[[str, str], Any]]) -> dict[str, Any]:
    """Return the parameters in the query of a request; those that are missing are None.

    Args:
        request: The request.
        kinds: Name of each parameter → function that parses its name and value.

    Raises:
        RequestError: A parameter is unknown, repeated or invalid.
    """
    values = dict.fromkeys(kinds)
    for name, text in request.query_params.multi_items():
        if name not in kinds:
            known = ", ".join(kinds) or "none"
            raise RequestError(400, f"{short_repr(name)}: unknown parameter; expected {known}")
        if values[name] is not None:
            raise RequestError(400, f"{name}: is given twice; give it once")
        values[name] = kinds[name](name, text)
    return values


def text(_: str, value: str) -> str:
    """Return the value of a parameter."""
    return value


def whole_number(minimum: int, maximum: int) -> Callable[[str, str], int]:
    """Return a parser of whole numbers."""

    def parse(name: str, value: str) -> int:
        is_number = value.isascii() and value.isdecimal() and len(value) < 10
        if not is_number or not minimum <= int(value) <= maximum:
            raise RequestError(
                400,
                f"{name}={short_repr(value)}: must be a whole number from {minimum} to {maximum}",
            )
        return int(value)

    return parse


def seconds(name: str, value: str) -> float:
    """Parse a number of seconds."""
    with contextlib.suppress(ValueError):
        number = float(value)
        if 0 < number < float("inf"):
            return number
    raise RequestError(400, f"{name}={short_repr(value)}: must be a number of seconds above 0")
