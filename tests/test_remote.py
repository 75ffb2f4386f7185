"""Data and models at addresses equal local ones, on fsspec's memory file system."""

import dataclasses
from pathlib import Path

import fsspec
import numpy as np
import pytest

from jaxvid import object_store, remote
from jaxvid.data import check
from jaxvid.data.clips.clip import ClipSpec, load_train_clip
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.input_videos import open_input
from jaxvid.data.prepare import prepare
from jaxvid.data.sources import DatasetConfig, guess_source, open_dataset
from jaxvid.errors import InputError
from jaxvid.inference.inputs import VideoInput
from jaxvid.models import create_model
from jaxvid.storage import model_folder
from jaxvid.weights.resolve import load_model

SPEC = ClipSpec(num_frames=4, crop=56, short_side=64, train_short_side=(64, 64))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Use an empty cache and an empty memory file system; do not wait between requests."""
    monkeypatch.setenv("JAXVID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "BACKOFF", 0.0)
    yield tmp_path / "cache"
    fsspec.filesystem("memory").store.clear()


def upload(folder, address):
    fsspec.filesystem("memory").put(
        f"{folder}/", f"{address.removeprefix('memory:/')}/", recursive=True
    )


def load(source, folder, **fields):
    data = DatasetConfig(source=source, folder=str(folder), **fields)
    dataset = open_dataset(data, 8, ("train", "val"))
    clips = [
        load_train_clip(record, np.random.default_rng(i), SPEC)["video"]
        for i, record in enumerate(dataset.records["train"][:5])
    ]
    return dataset, np.stack(clips)


def check_equal(source, local, address, **fields):
    dataset, clips = load(source, local, **fields)
    upload(local, address)
    copy, copied = load(source, address, **fields)
    np.testing.assert_array_equal(clips, copied)
    assert copy.labels == dataset.labels
    for split, records in dataset.records.items():
        assert [(r.id, r.label) for r in records] == [(r.id, r.label) for r in copy.records[split]]


def test_lists_equal_local_ones(motion_folder):
    check_equal("folder", motion_folder, "memory://bucket/motion")
    assert guess_source(remote.local_path("memory://bucket/motion")) == ("folder", 8)


def test_packs_are_read_by_range(motion_folder, tmp_path, monkeypatch):
    for name, per_record in (("single", 1), ("groups", 4)):
        pack = tmp_path / name
        prepare([motion_folder], pack, Settings(frames_per_record=per_record), workers=2)
        check_equal("pack", pack, f"memory://bucket/{name}")
    dataset, _ = load("pack", "memory://bucket/single")
    assert Path(dataset.records["train"].paths[0]).stat().st_blocks
    copy = open_dataset(
        DatasetConfig(source="pack", folder="memory://bucket/single"), 8, ("train",)
    )
    record = copy.records["train"][7]
    asked = []
    read = object_store.read_ranges
    monkeypatch.setattr(
        object_store, "read_ranges", lambda a, ranges: asked.append(ranges) or read(a, ranges)
    )
    load_train_clip(record, np.random.default_rng(0), SPEC)
    assert len(asked) <= 1  # one call for all frames of the clip


def test_class_folders_and_absolute_addresses(motion_folder, tmp_path):
    for split in ("train", "val"):
        for i, video in enumerate(sorted((motion_folder / split).iterdir())[:8]):
            target = tmp_path / "classes" / split / f"class{i % 4}" / video.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(video.read_bytes())
    upload(tmp_path / "classes", "memory://bucket/classes")
    data = DatasetConfig(source="class_folders", folder="memory://bucket/classes")
    records = open_dataset(data, 4, ("train",)).records["train"]
    assert [r.id for r in records][:1] == ["class0/00000.mp4"]
    lines = "".join(f"memory://bucket/classes/train/{r.id},{r.label}\n" for r in records)
    (tmp_path / "list.csv").write_text(lines)
    listed = open_input(tmp_path / "list.csv").records
    with listed[3].open() as video, records[3].open() as same:
        np.testing.assert_array_equal(video.get_frames([0]), same.get_frames([0]))
    found = open_input(Path("memory://bucket/classes/train"))  # `Path` drops a slash
    assert found.kind == "class folders"
    assert len(found.records) == 8


def test_messages_name_the_address(motion_folder, capsys):
    upload(motion_folder, "memory://bucket/motion")
    fs = fsspec.filesystem("memory")
    fs.rm("/bucket/motion/train/00003.mp4")
    fs.pipe_file("/bucket/motion/train/00005.mp4", b"no video")
    with pytest.raises(
        InputError,
        match=r"^memory://bucket/motion/train.csv:4: memory://.*00003.mp4 does not exist",
    ):
        load("folder", "memory://bucket/motion")
    report = check.check(["memory://bucket/motion"], 2)
    reasons = [row["reason"] for row in report["broken"]]
    assert reasons[0] == "memory://bucket/motion/train/00003.mp4 does not exist"
    assert reasons[1].startswith("memory://bucket/motion/train/00005.mp4: cannot be decoded")
    for address, message in (
        ("memory://bucket/none", "memory://bucket/none: no such file or folder"),
        ("memory://bucket/../motion", "has an empty part"),
    ):
        with pytest.raises(InputError, match=message):
            load("folder", address)
    with pytest.raises(InputError, match="must be a local folder"):
        load("motion", "memory://bucket/motion", motion={"num_train": 8, "num_val": 8, "seed": 0})
    with pytest.raises(InputError, match=r"data.cache_gb=0: must be above 0"):
        load("folder", "memory://bucket/motion", cache_gb=0)


def test_removed_and_changed_files_are_noticed(motion_folder, tmp_path):
    upload(motion_folder, "memory://bucket/motion")
    load("folder", "memory://bucket/motion", cache_dir=str(tmp_path / "own"))
    fs = fsspec.filesystem("memory")
    lines = fs.cat_file("/bucket/motion/train.csv").splitlines(keepends=True)
    fs.pipe_file("/bucket/motion/train.csv", b"".join(lines[:9]))
    fs.rm("/bucket/motion/train/00020.mp4")
    fs.pipe_file("/bucket/motion/train/00000.mp4", fs.cat_file("/bucket/motion/train/00001.mp4"))
    dataset, clips = load("folder", "memory://bucket/motion", cache_dir=str(tmp_path / "own"))
    assert len(dataset.records["train"]) in (8, 9)
    same = load_train_clip(dataset.records["train"][1], np.random.default_rng(0), SPEC)["video"]
    np.testing.assert_array_equal(clips[0], same)
    assert not dataset.records["train"][0].path.with_name("00020.mp4").exists()


def test_models_and_single_videos(motion_folder, tmp_path):
    model = create_model("xvit_tiny", num_classes=3, seed=0)
    model_folder.save_model(model, tmp_path / "model")
    upload(tmp_path / "model", "memory://bucket/model")
    loaded = load_model("memory://bucket/model")
    expected = model_folder.fingerprint(model_folder.split_params(model)[1])
    assert model_folder.fingerprint(model_folder.split_params(loaded)[1]) == expected
    with pytest.raises(InputError, match=r"memory://bucket/no: no such file or folder"):
        load_model("memory://bucket/no")

    upload(motion_folder / "val", "memory://bucket/val")
    video = VideoInput("memory://bucket/val/00000.mp4")
    assert video.id == "memory://bucket/val/00000.mp4"
    with video, video.open() as reader:
        assert reader.num_frames > 1
    video = VideoInput("memory://bucket/val/none.mp4")
    with video, pytest.raises(InputError, match="memory://bucket/val/none.mp4 does not exist"):
        video.open()


def test_every_field_of_the_config_reaches_the_cache(motion_folder, tmp_path):
    upload(motion_folder, "memory://bucket/motion")
    data = DatasetConfig(
        source="folder", folder="memory://bucket/motion", cache_dir=str(tmp_path / "own")
    )
    records = open_dataset(dataclasses.replace(data, cache_gb=1e-6), 8, ("train",)).records
    for record in records["train"][:4]:
        record.open().close()
    kept = [record for record in records["train"][:4] if record.path.stat().st_blocks]
    assert str(records["train"][0].path).startswith(str(tmp_path / "own"))
    assert not kept  # the limit is below the size of a video
