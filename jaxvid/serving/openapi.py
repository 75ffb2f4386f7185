"""The OpenAPI document of the API."""

from typing import Any


def make_document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxvid", "version": "1"},
        "paths": {},
    }
