"""Tests of jaxvid/block_cache.py on fsspec's memory file system."""

import concurrent.futures
import functools
import os

import fsspec
import numpy as np
import pytest

from jaxvid import block_cache, object_store
from jaxvid.block_cache import BLOCK, Pinned
from jaxvid.errors import InputError


class Store:
    """Objects in memory, and the ranges that were read.

    Args:
        folder: The cache folder.
    """

    def __init__(self, folder):
        self.folder, self.ranges = folder, []
        self.fs = fsspec.filesystem("memory")

    def put(self, name: str, num_blocks: float, seed: int = 0):
        """Write an object and place its copy; return the path and the data."""
        data = np.random.default_rng(seed).bytes(int(num_blocks * BLOCK))
        self.fs.pipe_file(f"/b/{name}", data)
        path = block_cache.path_of(f"memory://b/{name}", block_cache.tree(self.folder))
        block_cache.place(path, object_store.info(f"memory://b/{name}"))
        return path, data


@pytest.fixture
def store(tmp_path, monkeypatch):
    store, read = Store(tmp_path), object_store.read_ranges

    def record(address, ranges):
        store.ranges += ranges
        return read(address, ranges)

    monkeypatch.setattr(object_store, "read_ranges", record)
    monkeypatch.setattr(block_cache, "MAX_GAP", BLOCK)  # the files of these tests are small
    yield store
    store.fs.store.clear()


def fetch(path, *ranges):
    with Pinned(path) as pinned:
        pinned.fetch(ranges or None)


def test_only_missing_blocks_are_read(store):
    path, data = store.put("a", 10.5)
    assert path.stat().st_size == len(data)
    assert path.stat().st_blocks == 0
    assert block_cache.address_of(path) == "memory://b/a"
    fetch(path, (BLOCK + 5, BLOCK + 6), (6 * BLOCK - 1, 6 * BLOCK + 1))
    assert store.ranges == [(BLOCK, 2 * BLOCK), (5 * BLOCK, 7 * BLOCK)]
    content = path.read_bytes()
    assert content[BLOCK : 2 * BLOCK] == data[BLOCK : 2 * BLOCK]
    assert content[5 * BLOCK : 7 * BLOCK] == data[5 * BLOCK : 7 * BLOCK]
    assert not any(content[:BLOCK])
    fetch(path, (BLOCK, 2 * BLOCK))
    assert len(store.ranges) == 2
    # The block between two missing ones is read again, because one request is faster than two.
    fetch(path)
    assert store.ranges[2:] == [(0, 5 * BLOCK), (7 * BLOCK, len(data))]
    assert path.read_bytes() == data


def test_local_files_are_unchanged(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"local")
    fetch(path)
    fetch(tmp_path / "none")
    assert os.listdir(tmp_path) == ["a"]


def test_a_new_version_replaces_the_old_one(store):
    path, _ = store.put("a", 2)
    fetch(path)
    path, data = store.put("a", 2, seed=1)
    assert not any(path.read_bytes())
    fetch(path)
    assert path.read_bytes() == data
    path, data = store.put("a", 3, seed=2)
    fetch(path)
    assert path.read_bytes() == data


def test_an_unknown_object_is_looked_up(store):
    path, data = store.put("a", 1)
    path.unlink()
    fetch(path)
    assert path.read_bytes() == data
    with pytest.raises(FileNotFoundError):
        fetch(path.with_name("none"))


def test_a_deleted_copy_is_read_again(store):
    for delete in (block_cache.remove, os.unlink):
        path, data = store.put("a", 2)
        fetch(path)
        delete(path)
        path, data = store.put("a", 2)
        fetch(path)
        assert path.read_bytes() == data
        fetch(path)
        os.unlink(path)
        fetch(path)  # looked up
        assert path.read_bytes() == data
    with Pinned(path):
        block_cache.remove(path)
    assert path.exists()


def test_threads_share_a_new_file(store):
    path, data = store.put("a", 40)
    for _ in range(10):
        block_cache.remove(path)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            parts = [(i * BLOCK, (i + 2) * BLOCK) for i in range(0, 40, 2)]
            list(pool.map(functools.partial(fetch, path), parts))
        assert path.read_bytes() == data


def test_the_least_recently_used_files_are_freed(store):
    block_cache.set_limit(store.folder, 3.5 * BLOCK / 1e9)
    paths = [store.put(f"{i}", 1, seed=i)[0] for i in range(5)]
    for i, path in enumerate(paths):
        fetch(path)
        os.utime(path, ns=(i * 10**9, path.stat().st_mtime_ns))
    assert [path.stat().st_blocks > 0 for path in paths] == [False, False, True, True, True]
    # A pinned file is not freed, although it is the oldest. The file stays readable.
    store.ranges.clear()
    with Pinned(paths[2]) as pinned:
        pinned.fetch()
        fetch(paths[0])
        fetch(paths[1])
        assert paths[2].stat().st_blocks
    assert not paths[3].stat().st_blocks
    assert len(store.ranges) == 2


def test_a_killed_process_leaves_a_usable_cache(store, monkeypatch):
    path, data = store.put("a", 2)
    info = object_store.info("memory://b/a")

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # killed before the time is restored
        patch.setattr(os, "utime", die)
        with pytest.raises(KeyboardInterrupt):
            fetch(path)
    assert path.stat().st_mtime_ns != info.stamp
    store.ranges.clear()
    fetch(path)
    assert store.ranges  # the blocks were written, but not marked
    assert path.read_bytes() == data
    os.utime(path)  # killed after the blocks were marked
    store.ranges.clear()
    block_cache.place(path, info)
    fetch(path)
    assert not store.ranges
    assert path.stat().st_mtime_ns == info.stamp


def test_a_cache_that_cannot_be_written_is_one_line(store, monkeypatch):
    path, _ = store.put("a", 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(block_cache, "_write", full)
    with pytest.raises(InputError, match=r"^memory://b/a: its copy .*No space left.*cache_gb"):
        fetch(path)
