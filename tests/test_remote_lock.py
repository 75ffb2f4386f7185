"""Tests of jaxvid/remote_lock.py on fsspec's memory file system."""

import json
import re
import time

import fsspec
import pytest

from jaxvid import object_store, remote_lock
from jaxvid.errors import InputError
from tests.waiting import wait_until

FOLDER = "memory://bucket/run"
LOCK = f"{FOLDER}/{remote_lock.LOCK}"


@pytest.fixture(autouse=True)
def store(monkeypatch):
    """Use an empty memory file system; do not wait."""
    monkeypatch.setattr(object_store, "BACKOFF", 0.0)
    monkeypatch.setattr(remote_lock, "SETTLE_SECONDS", 0.0)
    yield
    fsspec.filesystem("memory").store.clear()


def read():
    return json.loads(object_store.read(LOCK))


def write(seconds_ago, owner="other"):
    value = {"owner": owner, "holder": "process 7 on node", "time": time.time() - seconds_ago}
    object_store.write(LOCK, json.dumps(value).encode())


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    with remote_lock.held(FOLDER, tmp_path / "a"):
        for local in (tmp_path / "a", tmp_path / "b"):  # on this and on another machine
            with (
                pytest.raises(InputError, match=rf"^{FOLDER}: in use by another run \(process \d+"),
                remote_lock.held(FOLDER, local),
            ):
                pass
        assert read()["holder"].startswith("process ")
    assert object_store.read(LOCK) is None
    with remote_lock.held(FOLDER, tmp_path / "b"):
        pass


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"owner": 1, "holder": 2, "time": "x"}'])
def test_a_damaged_lock_is_replaced(tmp_path, content):
    object_store.write(LOCK, content)
    with remote_lock.held(FOLDER, tmp_path / "a"):
        assert read()["holder"].startswith("process ")


def test_only_a_stale_lock_of_another_machine_is_taken_over(tmp_path, capsys):
    write(seconds_ago=100)
    with (
        pytest.raises(InputError, match=r"process 7 on node, 100 s ago.* again in 20 s"),
        remote_lock.held(FOLDER, tmp_path / "a"),
    ):
        pass
    write(seconds_ago=130)
    with remote_lock.held(FOLDER, tmp_path / "a"):
        assert read()["holder"].startswith("process ")
    assert re.search("process 7 on node.* was killed .*130 s ago", capsys.readouterr().err)


def test_the_lock_of_a_killed_run_with_the_same_local_copy_is_taken_over_at_once(tmp_path, capsys):
    remote_lock.owner_path(tmp_path / "a").write_text("me")
    write(seconds_ago=1, owner="me")
    with remote_lock.held(FOLDER, tmp_path / "a"):
        assert read()["owner"] == "me"
    assert not remote_lock.owner_path(tmp_path / "a").exists()
    assert not capsys.readouterr().err


def test_the_lock_is_renewed_until_another_run_takes_it_over(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_lock, "RENEW_SECONDS", 0.01)
    with remote_lock.held(FOLDER, tmp_path / "a") as lock:
        first = read()["time"]
        wait_until(lambda: read()["time"] != first, 30)
        lock.check()
        monkeypatch.setattr(remote_lock, "RENEW_SECONDS", 1000.0)
        while read()["owner"] != "other":  # a renewal may have begun before
            write(seconds_ago=0)
            time.sleep(0.05)
        with pytest.raises(InputError, match="in use by another run .process 7 on node"):
            lock.check()
    assert read()["owner"] == "other"  # not deleted


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_lost_lock_stays_lost(tmp_path, has_ended):
    with remote_lock.held(FOLDER, tmp_path / "a") as lock:
        lock.check()
        write(seconds_ago=0)
        if has_ended:
            object_store.delete([LOCK])
        message = "has taken over the folder and has ended" if has_ended else "in use by another"
        with pytest.raises(remote_lock.LostLockError, match=message):
            lock.check()
        object_store.delete([LOCK])
        with pytest.raises(remote_lock.LostLockError, match=message):
            lock.check()


def test_a_repeated_request_that_finds_its_own_lock_succeeds(tmp_path, monkeypatch):
    create = object_store.create

    def repeat(address, data):
        return create(address, data) and create(address, data)

    monkeypatch.setattr(object_store, "create", repeat)
    with remote_lock.held(FOLDER, tmp_path / "a"):
        assert read()["holder"].startswith("process ")


def test_of_two_runs_that_create_the_lock_the_last_one_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "create", lambda address, data: write(0) or True)
    with pytest.raises(InputError, match="in use by another run"):
        remote_lock.RemoteLock(FOLDER, "me").acquire()


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="set JAXVID_CACHE to another folder"),
        remote_lock.held(FOLDER, tmp_path / "file" / "a"),
    ):
        pass
