"""Data and models at addresses equal local ones, on fsspec's memory file system."""

import concurrent.futures
import dataclasses
import json
import pickle
import shutil
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from jaxvid import block_cache, object_store, remote, remote_lock
from jaxvid.atomic import output_path
from jaxvid.compare import compare
from jaxvid.data import check, pipeline, read_ahead
from jaxvid.data import prepare as prepare_module
from jaxvid.data.clips.clip import ClipSpec, load_eval_views, load_train_clip
from jaxvid.data.formats.array_record_file import ArrayRecordFile
from jaxvid.data.formats.pack_writer import Settings, encode
from jaxvid.data.input_videos import open_input
from jaxvid.data.prepare import prepare
from jaxvid.data.sources import DatasetConfig, guess_source, open_dataset
from jaxvid.data.video_order import VideoOrder
from jaxvid.errors import InputError, with_addresses
from jaxvid.features import FeatureOptions, features
from jaxvid.inference.inputs import VideoInput
from jaxvid.models import create_model
from jaxvid.storage import model_folder
from jaxvid.storage.feature_file import load_features
from jaxvid.visualize import visualize
from jaxvid.weights.resolve import load_model
from tests.data.packs import read_pack
from tests.data.tfds_ucf101 import CLASSES, write_ucf101

OFFSETS = "memory://bucket/pack/train_offsets.bin"
SPEC = ClipSpec(num_frames=4, crop=56, short_side=64, train_short_side=(64, 64))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Use an empty cache and an empty memory file system; do not wait between requests."""
    monkeypatch.setenv("JAXVID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "BACKOFF", 0.0)
    monkeypatch.setattr(remote_lock, "SETTLE_SECONDS", 0.0)
    yield tmp_path / "cache"
    fsspec.filesystem("memory").store.clear()


def test_paths_of_copies_are_replaced_by_addresses():
    copy = "/home/me/.cache/jaxvid/remote/jaxvid-objects/s3/bucket/a.mp4"
    address = "s3://bucket/a.mp4"
    text = "error: '{}' and ({}), of {}: broken"
    assert with_addresses(text.format(copy, copy, copy)) == text.format(address, address, address)
    word = "/x" * 10**6  # in quadratic time, this would take hours
    assert with_addresses(word) == word


def upload(folder, address):
    fsspec.filesystem("memory").put(
        f"{folder}/", f"{address.removeprefix('memory:/')}/", recursive=True
    )


def load(source, folder, splits=("train", "val"), **fields):
    data = DatasetConfig(source=source, folder=str(folder), **fields)
    dataset = open_dataset(data, 8, splits)
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


def test_tfds_data_sets_equal_local_ones(tmp_path):
    write_ucf101(tmp_path / "tfds", {"train": [[(0, 0), (1, 2)], [(2, 100)]], "val": [[(3, 1)]]})
    upload(tmp_path / "tfds", "memory://bucket/tfds")
    object_store.write("memory://bucket/tfds/other/1.0.0/other-train.array_record", b"x")
    frames = []
    for folder in (str(tmp_path / "tfds"), "memory://bucket/tfds"):
        data = DatasetConfig(source="tfds", folder="", name="ucf101:2.0.0", tfds_dir=folder)
        records = open_dataset(data, CLASSES, ("train", "val")).records
        assert [(r.id, r.label) for r in records["train"]] == [
            *(("train/0", 0), ("train/1", 2), ("train/2", 100))
        ]
        with records["val"][0].open() as video:
            frames.append(video.get_frames(range(8)))
    np.testing.assert_array_equal(*frames)
    assert not [*(tmp_path / "cache").rglob("other*")]
    data = dataclasses.replace(data, name="none")
    with pytest.raises(InputError, match="^memory://bucket/tfds/none: no such file or folder"):
        open_dataset(data, CLASSES, ("train",))


def test_packs_are_read_without_array_record_unless_offsets_are_missing(
    motion_folder, tmp_path, monkeypatch
):
    prepare([motion_folder], tmp_path / "pack", Settings(), workers=2)
    upload(tmp_path / "pack", "memory://bucket/pack")
    _, expected = load("pack", tmp_path / "pack")
    with monkeypatch.context() as patch:
        reader = property(lambda _: pytest.fail("array_record was used"))
        patch.setattr(ArrayRecordFile, "_reader", reader)
        dataset, clips = load("pack", "memory://bucket/pack")
        np.testing.assert_array_equal(clips, expected)
        # Another process frees the blocks of the open files.
        records = dataset.records["train"]
        for path in (records.paths[0], remote.local_path(OFFSETS)):
            block_cache._empty(Path(path))
        again = [
            load_train_clip(record, np.random.default_rng(i), SPEC)["video"]
            for i, record in enumerate(records[:5])
        ]
        np.testing.assert_array_equal(again, expected)
    object_store.delete([OFFSETS])
    object_store.write(OFFSETS.replace("train", "val"), b"damaged")
    _, clips = load("pack", "memory://bucket/pack", splits=("train",))
    np.testing.assert_array_equal(clips, expected)
    with pytest.raises(InputError, match="^memory://bucket/pack/val_offsets.bin: does not match"):
        load("pack", "memory://bucket/pack")


@pytest.mark.parametrize("source", ["pack", "folder"])
def test_the_frames_of_the_next_clips_are_read_ahead(motion_folder, tmp_path, monkeypatch, source):
    folder = motion_folder
    if source == "pack":
        folder = tmp_path / "pack"
        prepare([motion_folder], folder, Settings(), workers=2)
    upload(folder, "memory://bucket/data")
    data = DatasetConfig(source=source, folder="memory://bucket/data")
    records = open_dataset(data, 8, ("train",)).records["train"]
    for record, rng in ((records[7], np.random.default_rng(1)), (records[11], None)):
        read_ahead.read_ahead(record, SPEC, rng)
        read_ahead._running[record.id].result()
        with monkeypatch.context() as patch:
            patch.setattr(object_store, "read_ranges", lambda *_: pytest.fail("a request"))
            load_eval_views(record, SPEC) if rng is None else load_train_clip(record, rng, SPEC)


def test_no_task_is_started_once_the_store_cannot_be_reached(motion_folder, monkeypatch):
    upload(motion_folder, "memory://bucket/data")
    data = DatasetConfig(source="folder", folder="memory://bucket/data")
    records = open_dataset(data, 8, ("train",)).records["train"]
    attempts, is_ready = [], threading.Event()

    def fail(*_):
        attempts.append(None)
        is_ready.wait(30)
        raise InputError("unreachable")

    monkeypatch.setattr(object_store, "read_ranges", fail)
    for record in records:
        read_ahead.read_ahead(record, SPEC)
    is_ready.set()
    concurrent.futures.wait(read_ahead.cancel(), timeout=30)
    assert 1 <= len(attempts) <= read_ahead.THREADS


def test_the_same_frames_are_drawn_ahead(motion_folder, monkeypatch):
    upload(motion_folder, "memory://bucket/data")
    data = DatasetConfig(source="folder", folder="memory://bucket/data")
    records = open_dataset(data, 8, ("train",)).records["train"]
    ahead, loaded = {}, {}

    def draw_ahead(record, _, rng):
        ahead[record.id] = float(rng.random())

    def load(record, rng, _, out):
        loaded[record.id] = float(rng.random())
        return {"video": out, "indices": np.zeros(SPEC.num_frames, np.int32), "padded": False}

    monkeypatch.setattr(pipeline, "read_ahead", draw_ahead)
    monkeypatch.setattr(pipeline, "load_train_clip", load)
    options = {"spec": SPEC, "batch_size": 4, "order": VideoOrder(seed=3), "num_threads": 1}
    iterator = pipeline.make_train_iter(records, **options)
    for _ in range(6):  # half an epoch, so that no video is drawn twice
        next(iterator)
    iterator.close()
    both = ahead.keys() & loaded.keys()
    assert len(both) >= 12
    assert {id_: ahead[id_] for id_ in both} == {id_: loaded[id_] for id_ in both}


def test_packs_are_written_file_by_file(motion_folder, tmp_path, monkeypatch):
    settings = Settings(clips_per_file=10)
    expected = prepare([motion_folder], tmp_path / "pack", settings, workers=2)
    address, writes = "memory://bucket/pack", prepare_module.write_part

    def fail_at_the_third(part, *arguments):
        if part.number == 2:
            raise KeyError
        writes(part, *arguments)

    monkeypatch.setattr(prepare_module, "write_part", fail_at_the_third)
    with pytest.raises(KeyError):
        prepare([motion_folder], address, settings, workers=2)
    stored = object_store.find(address)
    assert len([name for name in stored if "array_record" in name]) == 2
    shutil.rmtree(tmp_path / "cache")  # continue on another machine
    monkeypatch.setattr(prepare_module, "write_part", writes)
    report = prepare([motion_folder], address, settings, workers=2)
    assert report["packed_bytes"] == expected["packed_bytes"]
    files = {name: object_store.read(f"{address}/{name}") for name in object_store.find(address)}
    names = {name for name in files if not name.startswith(".") and name != "report.json"}
    assert {name: files[name] for name in names} == read_pack(tmp_path / "pack")
    assert not [*(tmp_path / "cache").rglob("*array_record*")]

    with pytest.raises(InputError, match=f"^{address}: only one process can write a pack"):
        prepare([motion_folder], address, settings, workers=2, shard=(0, 2))
    with pytest.raises(InputError, match=f"^{address} was started with different settings"):
        prepare([motion_folder], address, Settings(), workers=2)


def test_workers_on_other_machines_read_videos_by_address(motion_folder, tmp_path):
    upload(motion_folder, "memory://bucket/motion")
    records, _ = check.gather(["memory://bucket/motion"])
    record = pickle.loads(pickle.dumps(records["train"][3]))
    expected = encode(record, "train", Settings())
    shutil.rmtree(tmp_path / "cache")
    clip = encode(record, "train", Settings())
    assert clip.jpegs == expected.jpegs
    assert clip.jpegs


@pytest.mark.parametrize("suffix", ["npz", "zarr"])
def test_features_are_written_to_an_address(motion_folder, folders, tmp_path, suffix):
    if suffix == "zarr":
        pytest.importorskip("zarr", reason="zarr is not installed")
    videos = open_input(motion_folder, "val")
    videos = dataclasses.replace(videos, records=videos.records[:8])
    address = f"memory://bucket/out/f.{suffix}"
    local = tmp_path / f"f.{suffix}"
    options = FeatureOptions(num_clips=1)
    features(videos, folders / "xvit", output_path(str(local)), options)
    for _ in range(2):  # the second replaces the first
        features(videos, folders / "xvit", output_path(address), options)
    expected, table = load_features(local), load_features(Path(address))
    np.testing.assert_array_equal(table.features, expected.features)
    assert table.ids == expected.ids
    assert not list((tmp_path / "cache").rglob("*unfinished*"))
    object_store.write("memory://bucket/other.zarr/x", b"")
    if suffix == "zarr":
        with pytest.raises(InputError, match="other.zarr exists and is not a Zarr group"):
            features(videos, folders / "xvit", output_path("memory://bucket/other.zarr"), options)


def test_pictures_are_written_to_an_address(motion_folder, folders):
    video = motion_folder / "val" / "00000.mp4"
    visualize(video, folders / "xvit", "memory://bucket/a.png", num_clips=1)
    assert object_store.read("memory://bucket/a.png").startswith(b"\x89PNG")
    upload(video.parent, "memory://bucket/val")
    address = "memory://bucket/val/00000.mp4"
    with pytest.raises(InputError, match=f"^{address} is the video itself"):
        visualize(address, folders / "xvit", address)
    with pytest.raises(InputError, match=r"^https://a.org/b.png cannot be written"):
        visualize(video, folders / "xvit", "https://a.org/b.png")


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
    for _ in range(2):  # the second replaces the first
        model_folder.save_model(model, "memory://bucket/model")
    loaded = load_model("memory://bucket/model")
    expected = model_folder.fingerprint(model_folder.split_params(model)[1])
    assert model_folder.fingerprint(model_folder.split_params(loaded)[1]) == expected
    with pytest.raises(InputError, match=r"memory://bucket/no: no such file or folder"):
        load_model("memory://bucket/no")
    object_store.write("memory://bucket/other/file", b"")
    with pytest.raises(InputError, match=r"^memory://bucket/other exists and is not a model"):
        model_folder.save_model(model, "memory://bucket/other")

    upload(motion_folder / "val", "memory://bucket/val")
    video = VideoInput("memory://bucket/val/00000.mp4")
    assert video.id == "memory://bucket/val/00000.mp4"
    with video, video.open() as reader:
        assert reader.num_frames > 1
    video = VideoInput("memory://bucket/val/none.mp4")
    with video, pytest.raises(InputError, match="memory://bucket/val/none.mp4 does not exist"):
        video.open()


def test_evaluations_at_addresses_are_compared(tmp_path):
    report = {"protocol": {}, "num_videos": 1, "labels": ["a", "b"], "top1": 100.0, "top5": 100.0}
    table = "id,label,prediction,correct,top5,probabilities\n"
    table += 'x.mp4,0,0,1,"[0, 1]","[0.9, 0.1]"\n'
    for name in ("before", "after"):
        object_store.write(f"memory://bucket/{name}/eval.json", json.dumps(report).encode())
        object_store.write(f"memory://bucket/{name}/eval_videos.csv", table.encode())
    text, file = compare(
        "memory://bucket/before", "memory://bucket/after/eval.json", "memory://bucket/compared"
    )
    assert text.startswith("before: memory://bucket/before/eval.json\n")
    assert str(file) == "memory://bucket/compared/comparison.json"
    assert json.loads(object_store.read(str(file)))["after"] == "memory://bucket/after/eval.json"
    with pytest.raises(InputError, match="^memory://bucket/none/eval_videos.csv: no such file"):
        compare("memory://bucket/none", "memory://bucket/after")


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
