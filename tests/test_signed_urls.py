"""Tests of jaxvid/signed_urls.py; fsspec's memory file system is the store and the web server."""

import fsspec
import pytest

from jaxvid import object_store, signed_urls

DATA = bytes(range(100))
RANGES = [(0, 5), (20, 22), (90, 100)]


class Web:
    """A client for web servers.

    Args:
        answers: Function from a range to its answer.
    """

    def __init__(self, answers):
        self._answers, self.calls = answers, []

    def cat_ranges(self, urls, starts, stops, on_error, batch_size):
        assert (on_error, batch_size) == ("return", object_store.MAX_REQUESTS)
        self.calls.append(urls)
        return [self._answers(*part) for part in zip(starts, stops, strict=True)]


@pytest.fixture
def read(monkeypatch):
    """Return a function that reads `RANGES` of a file, with the answers to its signed URL."""
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/b/a", DATA)
    signed = []
    monkeypatch.setattr(object_store, "BACKOFF", 0.0)
    monkeypatch.setattr(signed_urls, "_paused_until", 0.0)
    monkeypatch.setattr(signed_urls, "_has_proxy", lambda: False)
    monkeypatch.setattr(type(fs), "protocol", ("memory", "s3"))
    sign = lambda self, path, expiration: signed.append(path) or f"https://host{path}"  # noqa: E731
    monkeypatch.setattr(type(fs), "sign", sign)
    signed_urls._sign.cache_clear()

    def read(answers):
        web = Web(answers)
        monkeypatch.setattr(signed_urls, "_client", lambda: web)
        parts = object_store.read_ranges("memory://b/a", RANGES)
        assert parts == [DATA[start:stop] for start, stop in RANGES]
        return web.calls

    read.signed = signed
    yield read
    fs.store.clear()
    signed_urls._sign.cache_clear()


def test_ranges_are_read_with_one_signed_url(read):
    for _ in range(2):
        assert read(lambda start, stop: DATA[start:stop]) == [["https://host/b/a"] * 3]
    assert read.signed == ["/b/a"]


def test_failed_and_short_ranges_are_read_by_the_client(read):
    answers = {0: OSError("reset"), 20: DATA[20:22], 90: DATA}  # the last is the whole file
    for _ in range(2):
        assert len(read(lambda start, _: answers[start])) == 1


def test_urls_are_not_used_for_a_time_if_all_requests_fail(read, monkeypatch):
    assert len(read(lambda *_: OSError("403"))) == 1
    assert not read(lambda start, stop: DATA[start:stop])
    monkeypatch.setattr(signed_urls, "_paused_until", 0.0)
    assert len(read(lambda start, stop: DATA[start:stop])) == 1


def test_urls_are_not_used_with_a_proxy(read, monkeypatch):
    monkeypatch.setattr(signed_urls, "_has_proxy", lambda: True)
    assert not read(lambda start, stop: DATA[start:stop])
