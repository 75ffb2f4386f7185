"""Tests of jaxvid/atomic.py: outputs in remote storage. Other tests check local outputs."""

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jaxvid.atomic import check_output, output_path, write_file, write_json
from jaxvid.data import check
from jaxvid.errors import InputError
from jaxvid.inference.class_timeline import ClassTimeline


class Bucket(MemoryFileSystem):
    """Remote storage in this process's memory."""

    store, pseudo_dirs = {}, [""]
    locked = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3://"))

    def _open(self, path, mode="rb", **kwargs):
        if self.locked:
            raise RuntimeError(f"access to {path} denied\n(second line)")  # not an OSError
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket():
    """Use `Bucket` for `s3://`, and return its files."""
    fsspec.register_implementation("s3", Bucket, clobber=True)
    yield Bucket.store
    Bucket.store.clear()


def test_output_path_keeps_local_paths():
    for text in ("a.json", "/dev/null", "x:y/z.json"):
        assert output_path(text) == Path(text)
        assert isinstance(output_path(text), Path)
    assert str(output_path("s3://bucket/a.json")) == "s3://bucket/a.json"


def test_remote_outputs(bucket):
    path = output_path("s3://bucket/folder/report.json")
    check_output("--json", path)
    assert not bucket  # the probe was removed
    write_json(path, {"a": 1})
    write_file(path.with_name("b"), b"data")
    contents = {name: file.getvalue() for name, file in bucket.items()}
    assert contents == {
        "/bucket/folder/report.json": b'{\n  "a": 1\n}\n',
        "/bucket/folder/b": b"data",
    }


def test_programs_write_remote_outputs(bucket, motion_folder, capsys, monkeypatch):
    csv = str(motion_folder / "val.csv")
    monkeypatch.setattr("sys.argv", ["check", csv, "--json", "s3://bucket/check.json"])
    with pytest.raises(SystemExit) as done:
        check.main()
    assert done.value.code == 0
    assert json.loads(bucket["/bucket/check.json"].getvalue())["videos"] == 24

    timeline = ClassTimeline(
        video="v.mp4",
        labels=["a", "b"],
        starts=np.array([0.0, 1.0]),
        ends=np.array([1.0, 2.0]),
        padded=np.array([False, False]),
        stride=1.0,
        probabilities=np.array([[0.25, 0.75], [0.5, 0.5]]),
    )
    timeline.save("s3://bucket/timeline")
    assert {name for name in bucket if "timeline" in name} == {
        f"/bucket/timeline.{kind}" for kind in ("csv", "json", "png")
    }


def test_remote_storage_that_fails_is_one_line(bucket, monkeypatch):
    monkeypatch.setattr(Bucket, "locked", True)
    path = output_path("s3://bucket/a.json")
    for write in (lambda: check_output("--json", path), lambda: write_json(path, 1)):
        with pytest.raises(InputError) as error:
            write()
        assert str(error.value).startswith("s3://bucket/a.json: access refused (")
        assert "\n" not in str(error.value)
