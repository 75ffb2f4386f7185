"""Fingerprints of the data, and the records of the starts of a run."""

import dataclasses
import hashlib
import json
import os

import pytest

from jaxvid.data import fingerprints
from jaxvid.data.formats.pack_reader import PackRecords
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.prepare import prepare
from jaxvid.data.sources import Record, read_list
from jaxvid.distributed import collectives, sharding
from jaxvid.errors import InputError
from jaxvid.training import run_metadata


@pytest.fixture
def videos(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    return [Record(tmp_path / "a", 0, "a"), Record(tmp_path / "b", 1, "b")]


def start(workdir, records):
    """Record the start of a run on these training videos."""
    mesh = sharding.make_mesh(sharding.MeshShape())
    run_metadata.record_start(
        workdir, run_metadata.describe_run(mesh, {"train": records, "val": []})
    )


def test_ids_labels_and_files_have_fingerprints(videos):
    first, second = videos
    relabelled = [first, dataclasses.replace(second, label=0)]
    assert fingerprints.fingerprint(relabelled) == fingerprints.fingerprint(videos)
    assert fingerprints.fingerprint_labels(relabelled) != fingerprints.fingerprint_labels(videos)
    assert fingerprints.fingerprint(videos[::-1]) != fingerprints.fingerprint(videos)
    expected = hashlib.sha256(b"0\x001\x00").hexdigest()  # equal in all processes
    assert fingerprints.fingerprint_labels(videos) == expected
    files = fingerprints.fingerprint_files(videos)
    assert fingerprints.fingerprint_files(relabelled) == files
    os.utime(second.path, ns=(0, 0))
    changed = fingerprints.fingerprint_files(videos)
    second.path.write_text("repaired")
    os.utime(second.path, ns=(0, 0))
    longer = fingerprints.fingerprint_files(videos)
    second.path.unlink()
    assert len({files, changed, longer, fingerprints.fingerprint_files(videos)}) == 4


def test_a_pack_has_fingerprints_of_its_list_and_its_files(motion_folder, tmp_path):
    prepare([motion_folder], tmp_path / "pack", Settings(), workers=1)
    packed = PackRecords(str(tmp_path / "pack"), "val")
    listed = read_list(motion_folder / "val.csv", 8)
    assert fingerprints.describe_videos(packed) == fingerprints.describe_videos(listed)
    before = fingerprints.fingerprint_files(packed)
    os.utime(packed.paths[0], ns=(0, 0))
    assert fingerprints.fingerprint_files(packed) != before


def test_a_run_refuses_relabelled_training_videos(videos, tmp_path):
    start(tmp_path, videos)
    start(tmp_path, videos)
    relabelled = [dataclasses.replace(record, label=1) for record in videos]
    message = r"labels of its 2 training videos have changed \(.*restore the list or choose"
    with pytest.raises(InputError, match=message):
        start(tmp_path, relabelled)
    with pytest.raises(InputError, match="started with 2 training videos .*now there are 1"):
        start(tmp_path, videos[:1])


def test_starts_without_label_fingerprints_are_accepted(videos, tmp_path):
    start(tmp_path, videos)
    path = tmp_path / "starts.jsonl"
    start_record = json.loads(path.read_text())
    del start_record["data"]["train"]["labels_sha256"]
    path.write_text(json.dumps(start_record) + "\n")
    start(tmp_path, videos)
    assert len(path.read_text().splitlines()) == 2
    with pytest.raises(InputError, match="now there are 1"):
        start(tmp_path, videos[:1])


def test_processes_with_different_labels_are_refused(videos, monkeypatch):
    other = fingerprints.describe_videos(
        [dataclasses.replace(record, label=1) for record in videos]
    )
    monkeypatch.setattr(collectives, "gather", lambda value: [value, value, other])
    with pytest.raises(
        InputError, match="process 2: its videos or labels differ from those of proc"
    ):
        run_metadata.check_same_videos(fingerprints.describe_videos(videos))


def test_file_names_that_are_not_utf8_have_fingerprints(tmp_path, monkeypatch):
    non_utf8 = os.fsdecode(b"caf\xe9.mp4")
    hashes = {
        fingerprints.fingerprint([Record(tmp_path / name, 0, name)])
        for name in (non_utf8, "caf.mp4", "café.mp4")
    }
    assert len(hashes) == 3
    monkeypatch.setattr("sys.argv", ["main.py", non_utf8])
    start(tmp_path, [Record(tmp_path / non_utf8, 0, non_utf8)])
    start(tmp_path, [Record(tmp_path / non_utf8, 0, non_utf8)])
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [line["command"] for line in starts] == [["main.py", non_utf8]] * 2


def test_a_start_that_cannot_be_recorded_is_refused(videos, tmp_path):
    with pytest.raises(InputError, match="starts.jsonl cannot be written"):
        start(tmp_path / "a", videos)
