"""Partial results of an interrupted program."""

import shutil

import jax
import numpy as np
import pytest

from jaxvid.distributed import collectives
from jaxvid.errors import InputError
from jaxvid.storage.partial_results import PartialResults


def test_partial_results_are_loaded_only_under_the_same_key(tmp_path):
    part = {"scores": np.ones((2, 3)), "padded": np.array([True, False]), "error": ["", "ü broken"]}
    partial = PartialResults(tmp_path / "u", {"a": 1})
    assert partial.load() == []
    partial.add(part)
    partial.add(part)
    [first, second] = PartialResults(tmp_path / "u", {"a": 1}).load()
    assert first["error"] == second["error"] == ["", "ü broken"]
    np.testing.assert_array_equal(first["scores"], part["scores"])
    other = PartialResults(tmp_path / "u", {"a": 2, "b": 3})
    assert other.load() == []
    assert "because these differ: a, b; starting again" in other.note
    again = PartialResults(tmp_path / "u", {"a": 1})
    assert (again.load(), again.note) == ([], "")  # nothing was stored under the other key
    partial.remove()
    assert not (tmp_path / "u").exists()


def add_parts(folder, count):
    """Store `count` batches under the key `{"a": 1}`."""
    partial = PartialResults(folder, {"a": 1})
    partial.load()
    for i in range(count):
        partial.add({"scores": np.full((2, 3), i), "error": ["", ""]})


def test_damaged_batches_are_not_loaded(tmp_path):
    add_parts(tmp_path, 3)
    data = (tmp_path / "1.npz").read_bytes()
    for damaged in (b"", data[:40], data[: len(data) // 2]):
        (tmp_path / "1.npz").write_bytes(damaged)
        # Loading stops at the damaged batch, the second of three.
        assert len(PartialResults(tmp_path, {"a": 1}).load()) == 1
    (tmp_path / "key.json").write_bytes(b"\xff")
    assert PartialResults(tmp_path, {"a": 1}).load() == []


def test_undeletable_partial_results_are_refused(tmp_path, monkeypatch):
    add_parts(tmp_path / "u", 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(InputError, match="u cannot be deleted; delete it by hand"):
        PartialResults(tmp_path / "u", {"a": 2}).load()


def test_process_0_decides_which_partial_results_are_loaded(tmp_path, monkeypatch):
    add_parts(tmp_path, 3)
    # What `gather` returns: a value of process 0 and one of process 1. In the first load, these are
    # whether it finds the key, and its error; in the second, whether it finds the key, and the
    # number of batches that it finds.
    gathered = iter([[False, True], [None, None], [True, True], [3, 2]])
    monkeypatch.setattr(collectives, "gather", lambda value: next(gathered))
    with monkeypatch.context() as patch:
        # This is process 1. Process 0 finds a different key and deletes the batches, but process 1
        # may still see them. It must neither load nor delete them.
        patch.setattr(jax, "process_index", lambda: 1)
        assert PartialResults(tmp_path, {"a": 1}).load() == []
    # This is process 0, which finds three batches. Process 1 finds only two.
    assert len(PartialResults(tmp_path, {"a": 1}).load()) == 2
