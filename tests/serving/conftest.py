"""Fixtures of the tests of the server."""

from pathlib import Path

import pytest

from tests.serving.running_server import make_fake_model, running


@pytest.fixture(scope="session")
def video(clips) -> bytes:
    """Return the contents of a video file."""
    return Path(clips[0]).read_bytes()


@pytest.fixture(scope="module")
def server():
    """Return a running server with one model that needs no compilation."""
    with running([make_fake_model()]) as server:
        yield server
