"""Tests of jaxvid/remote_folder.py on fsspec's memory file system."""

import shutil
import time

import fsspec
import pytest

from jaxvid import object_store, remote_folder, remote_lock
from jaxvid.errors import InputError
from jaxvid.training import checkpoint_files

ADDRESS = "memory://bucket/run"
MANIFEST = f"{ADDRESS}/{remote_folder.MANIFEST}"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Return the class of the memory file system; use an empty cache, and do not wait."""
    monkeypatch.setenv("JAXVID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "BACKOFF", 0.0)
    monkeypatch.setattr(remote_lock, "SETTLE_SECONDS", 0.0)
    fs = fsspec.filesystem("memory")
    yield type(fs)
    fs.store.clear()


def contents():
    return {
        name: object_store.read_ranges(f"{ADDRESS}/{name}", [(0, info.size)])[0]
        for name, info in object_store.find(ADDRESS).items()
    }


def write_and_fail(folder):
    (folder / "best").mkdir()
    (folder / "best/a").write_text("first")
    (folder / ".x.partial").write_text("unfinished")
    raise KeyError


def test_a_workdir_is_uploaded_if_the_program_fails(store):
    with pytest.raises(KeyError), remote_folder.opened(ADDRESS) as folder:
        write_and_fail(folder)
    assert contents().keys() == {"best/a", remote_folder.MANIFEST}
    # The local copy is newer: the process was killed before it uploaded this file.
    (folder / "b").write_text("second")
    object_store.write(f"{ADDRESS}/part_of_an_upload", b"")
    with remote_folder.opened(ADDRESS) as folder:
        assert sorted(path.name for path in folder.iterdir()) == [".x.partial", "b", "best"]
        (folder / "best/a").unlink()
    assert not folder.exists()
    assert contents().keys() == {"b", "part_of_an_upload", remote_folder.MANIFEST}
    with remote_folder.opened(ADDRESS) as folder:
        assert [path.name for path in folder.iterdir()] == ["b"]


def test_another_machine_has_precedence(store):
    with pytest.raises(KeyError), remote_folder.opened(ADDRESS) as folder:
        write_and_fail(folder)
    object_store.write(f"{ADDRESS}/c", b"of another machine")
    object_store.write(MANIFEST, b'["c"]')
    with remote_folder.opened(ADDRESS) as folder:
        assert [path.name for path in folder.iterdir()] == ["c"]


def test_a_failed_upload_is_repeated_after_the_next_checkpoint(store, monkeypatch, lines):
    write = store.pipe_file

    def fail(*_, **__):
        raise OSError("connection reset")

    with remote_folder.opened(ADDRESS) as folder:
        (folder / "a").write_text("first")
        monkeypatch.setattr(store, "pipe_file", fail)
        checkpoint_files.upload(folder)
        assert "not uploaded: memory://bucket/run/a: 8 requests failed" in lines[0]
        with pytest.raises(InputError, match="8 requests failed"):
            remote_folder.push(folder)
        monkeypatch.setattr(store, "pipe_file", write)
        checkpoint_files.upload(folder)
        assert contents()["a"] == b"first"


def test_only_changed_files_are_uploaded(store, monkeypatch):
    written, write = [], object_store.write
    monkeypatch.setattr(
        object_store, "write", lambda address, data: written.append(address) or write(address, data)
    )
    with remote_folder.opened(ADDRESS) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(name)
        remote_folder.push(folder)
        written.clear()
        remote_folder.push(folder)
        assert not written
        (folder / "b").write_text("changed")
    assert written == [f"{ADDRESS}/b", MANIFEST]


def write_after_another_run_has_taken_over(folder):
    taken = f'{{"owner": "x", "holder": "process 7 on node", "time": {time.time()}}}'
    object_store.write(f"{ADDRESS}/{remote_lock.LOCK}", taken.encode())
    (folder / "a").write_text("too late")


def upload_after_another_run_has_taken_over(folder):
    write_after_another_run_has_taken_over(folder)
    checkpoint_files.upload(folder)
    pytest.fail("the run continues")


def test_nothing_is_uploaded_once_another_run_has_taken_over(store):
    message = "in use by another run .process 7 on node"
    with pytest.raises(InputError, match=message), remote_folder.opened(ADDRESS) as folder:
        write_after_another_run_has_taken_over(folder)
    assert contents().keys() == {remote_lock.LOCK}
    assert (folder / "a").exists()


def test_a_checkpoint_after_that_ends_the_run(store):
    with (
        pytest.raises(remote_lock.LostLockError, match="in use by another run"),
        remote_folder.opened(ADDRESS) as folder,
    ):
        upload_after_another_run_has_taken_over(folder)
    assert contents().keys() == {remote_lock.LOCK}


def write_large_files_and_fail(folder, size):
    for name in ("a.pack", "b.txt"):
        (folder / name).write_bytes(b"x" * size)
    remote_folder.push(folder)
    status = (folder / "a.pack").stat()
    assert (status.st_size, status.st_blocks) == (size, 0)
    assert (folder / "b.txt").read_bytes() == b"x" * size
    raise KeyError


def test_uploaded_files_that_are_not_read_again_need_no_disk_space(store):
    size, sparse = 10**6, ("*.pack",)
    with pytest.raises(KeyError), remote_folder.opened(ADDRESS, sparse=sparse) as folder:
        write_large_files_and_fail(folder, size)
    assert contents()["a.pack"] == b"x" * size  # not replaced by the sparse file
    shutil.rmtree(folder)  # continue on another machine
    with remote_folder.opened(ADDRESS, sparse=sparse) as folder:
        assert (folder / "a.pack").stat().st_blocks == 0
        assert (folder / "a.pack").stat().st_size == size
    assert contents()["a.pack"] == b"x" * size


def test_a_web_address_is_refused():
    with (
        pytest.raises(InputError, match="^https://a.org/run cannot be written; choose a local"),
        remote_folder.opened("https://a.org/run"),
    ):
        pass


def test_a_replaced_folder_has_only_the_new_files(store, tmp_path):
    for name in ("mark", "old/x", "y"):
        object_store.write(f"{ADDRESS}/{name}", b"before")
    for name in ("mark", "new/z", "y"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("after")
    remote_folder.replace(ADDRESS, tmp_path, "mark")
    assert contents() == {"mark": b"after", "new/z": b"after", "y": b"after"}


def test_local_folders_are_unchanged(tmp_path):
    with remote_folder.opened(tmp_path) as folder:
        assert folder == tmp_path
        (folder / "a").write_text("")
        remote_folder.push(folder)
    assert (tmp_path / "a").exists()
