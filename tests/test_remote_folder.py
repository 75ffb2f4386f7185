"""Tests of jaxvid/remote_folder.py on fsspec's memory file system."""

import fsspec
import pytest

from jaxvid import object_store, remote_folder
from jaxvid.errors import InputError
from jaxvid.training import checkpoint_files

ADDRESS = "memory://bucket/run"
MANIFEST = f"{ADDRESS}/{remote_folder.MANIFEST}"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Return the class of the memory file system; use an empty cache, and do not wait."""
    monkeypatch.setenv("JAXVID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "BACKOFF", 0.0)
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


def test_local_folders_are_unchanged(tmp_path):
    with remote_folder.opened(tmp_path) as folder:
        assert folder == tmp_path
        (folder / "a").write_text("")
        remote_folder.push(folder)
    assert (tmp_path / "a").exists()
