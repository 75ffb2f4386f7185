"""Tests of jaxvid/object_store.py on fsspec's memory file system."""

import sys
from pathlib import Path

import fsspec
import pytest

from jaxvid import object_store
from jaxvid.errors import InputError


@pytest.fixture
def memory(monkeypatch):
    """Return fsspec's memory file system, empty; repeated requests do not wait."""
    monkeypatch.setattr(object_store, "BACKOFF", 0.0)
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def test_addresses():
    for text in ("s3://b/a.mp4", "gs://b", "https://host/a", "memory://b/a", Path("s3://b/a")):
        assert object_store.is_remote(text)
    for text in ("a.mp4", "/s3/b", "x:y", "12:30.mp4", "hf://user/repo", "s3:", ""):
        assert not object_store.is_remote(text)
    assert object_store.to_address(Path("s3://b/a.mp4")) == "s3://b/a.mp4"
    assert object_store.to_address("s3://b/folder/") == "s3://b/folder"
    for text in ("s3://b/../a", "s3://b//a", "s3://b/./a"):
        with pytest.raises(InputError, match="has an empty part, '.' or '..'"):
            object_store.to_address(text)


def test_versions_and_listing(memory):
    memory.pipe({"/b/x/a": b"12345", "/b/x/y/c": b"", "/b/x/../d": b"outside"})
    found = object_store.find("memory://b/x")
    assert {name: info.size for name, info in found.items()} == {"a": 5, "y/c": 0}
    assert object_store.info("memory://b/x/a") == found["a"]
    assert object_store.info("memory://b/x/none") is None
    assert object_store.info("memory://b/x") is None  # a folder
    assert object_store.find("memory://b/none") == {}
    memory.pipe_file("/b/x/a", b"54321")
    assert object_store.info("memory://b/x/a").stamp != found["a"].stamp


def test_temporary_errors_are_tried_again(memory, monkeypatch):
    memory.pipe_file("/b/a", bytes(range(100)))
    failures, read = [OSError("reset"), TimeoutError(), RuntimeError("try later")], memory.cat_file

    def fail_first(path, *options, **named):
        if failures:
            raise failures.pop()
        return read(path, *options, **named)

    monkeypatch.setattr(type(memory), "cat_file", lambda self, *a, **k: fail_first(*a, **k))
    assert object_store.read_ranges("memory://b/a", [(10, 20), (50, 52)]) == [
        bytes(range(10, 20)),
        b"23",
    ]
    assert not failures


@pytest.mark.parametrize(
    ("error", "message", "attempts"),
    [
        (OSError("connection reset\nsecond line"), "8 requests failed, .*reset; check", 8),
        (PermissionError("Forbidden"), "access refused .*your credentials", 1),
        (RuntimeError("Unable to locate credentials"), "access refused", 1),
        (ImportError("no module"), "needs fsspec .*pip install fsspec", 1),
    ],
)
def test_lasting_errors_are_one_line(memory, error, message, attempts):
    calls = []

    def fail(fs, path):
        calls.append(path)
        raise error

    with pytest.raises(InputError, match=f"memory://b/a: {message}") as refusal:
        object_store.call("memory://b/a", fail)
    assert "\n" not in str(refusal.value)
    assert len(calls) == attempts


def test_a_file_that_became_shorter_is_refused(memory):
    memory.pipe_file("/b/a", b"123")
    with pytest.raises(InputError, match="memory://b/a: 8 requests failed.*3 bytes received"):
        object_store.read_ranges("memory://b/a", [(0, 5)])
    with pytest.raises(FileNotFoundError):
        object_store.read_ranges("memory://b/none", [(0, 5)])


def test_missing_clients_and_buckets_are_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # it cannot be imported
    with pytest.raises(InputError, match="gs://bucket/a: needs gcsfs .*pip install gcsfs"):
        object_store.info("gs://bucket/a")
