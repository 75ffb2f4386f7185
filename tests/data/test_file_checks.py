"""Checks of many files, with threads if the file system is slow."""

import threading

import pytest

from jaxvid.data import file_checks
from jaxvid.data.file_checks import find_missing, map_files


@pytest.mark.parametrize(("limit", "num_threads"), [(float("inf"), 1), (-1.0, 2)])
def test_slow_file_systems_are_read_by_threads(monkeypatch, limit, num_threads):
    monkeypatch.setattr(file_checks, "SLOW_SECONDS", limit)
    monkeypatch.setattr(file_checks, "CHUNK_FILES", 3)
    threads = set()

    def double(number):
        threads.add(threading.current_thread() is threading.main_thread())
        return 2 * number

    assert list(map_files(double, range(20))) == list(range(0, 40, 2))
    assert len(threads) == num_threads
    assert list(map_files(double, [])) == []


def test_unusable_files_are_found_by_index(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "file").write_text("x")
    files = [tmp_path / "file", str(tmp_path / "empty"), None, tmp_path, tmp_path / "no"]
    expected = [(1, "is empty"), (3, "is not a file"), (4, "does not exist")]
    assert list(find_missing(files)) == expected
