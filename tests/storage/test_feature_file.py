"""Files of features."""

import dataclasses
import sys

import numpy as np
import pytest

from jaxvid.errors import InputError
from jaxvid.storage.feature_file import (
    FeatureTable,
    check_feature_file,
    load_features,
    save_features,
)

PACKAGES = {".npz": "numpy", ".parquet": "pyarrow", ".zarr": "zarr"}
TABLE = FeatureTable(
    features=np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    ids=["a/ä.mp4", "a/\\udcff.mp4"],
    labels=np.array([1, -1], np.int32),
    label_names=["x", "y"],
    padded=np.array([True, False]),
    starts=np.array([0.0, 0.5]),
    ends=np.array([1.0, 1.5]),
    about={"format_version": 1, "model": "ü", "failed": []},
)
UNLABELLED = dataclasses.replace(
    TABLE,
    features=np.ones((2, 5), np.float32),
    labels=np.full(2, -1, np.int32),
    label_names=[],
    starts=None,
    ends=None,
)


@pytest.fixture(params=PACKAGES)
def suffix(request):
    """A suffix whose package is installed."""
    pytest.importorskip(PACKAGES[request.param])
    return request.param


def contents(path) -> dict:
    """Return the bytes of a file, or of the files in a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_a_table_is_read_as_it_was_written(suffix, tmp_path):
    for name, table in (("a", TABLE), ("b", UNLABELLED)):
        path = tmp_path / f"{name}{suffix}"
        check_feature_file("--output", path)
        save_features(path, table)
        read = load_features(path)
        for field in dataclasses.fields(FeatureTable):
            written, value = getattr(table, field.name), getattr(read, field.name)
            if isinstance(written, np.ndarray):
                np.testing.assert_array_equal(value, written)
                assert value.dtype == written.dtype
            else:
                assert value == written
        check_feature_file("--output", path)  # it may be replaced
        save_features(path, table)
        before = contents(path)
        save_features(tmp_path / f"again{suffix}", table)
        assert contents(tmp_path / f"again{suffix}") == before
    assert len([*tmp_path.iterdir()]) == 3  # no temporary files


def test_damaged_files_are_refused_in_one_line(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(InputError, match="does not exist; write it with jaxvid features"):
        load_features(path)
    wrong = dataclasses.replace(TABLE, about={"format_version": 2})
    for table in (wrong, dataclasses.replace(TABLE, labels=np.array([1, -2]))):
        save_features(path, table)
        with pytest.raises(InputError, match="is not a readable file of features") as error:
            load_features(path)
        assert "\n" not in str(error.value)
    largest = max((p for p in [path, *path.rglob("*")] if p.is_file()), key=lambda p: p.name)
    largest.write_bytes(largest.read_bytes()[:40])
    with pytest.raises(InputError, match="is not a readable file of features"):
        load_features(path)


def test_a_missing_package_is_named_before_any_work(tmp_path, monkeypatch):
    for suffix in (".parquet", ".zarr"):
        monkeypatch.setitem(sys.modules, PACKAGES[suffix], None)
        with pytest.raises(InputError, match=f"^{suffix} files need .*: pip install"):
            check_feature_file("--output", tmp_path / f"a{suffix}")


def test_other_folders_are_not_replaced(tmp_path):
    pytest.importorskip("zarr")
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(InputError, match="exists and is not a Zarr group; choose another name"):
        check_feature_file("--output", tmp_path / "a.zarr")
