"""Changes of the list of training videos between two starts of a run."""

import dataclasses
import gzip
import json
import os

import numpy as np
import pytest

from jaxvid.data.clips.clip import ClipSpec
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.data.pipeline import make_train_iter, split_batch
from jaxvid.data.prepare import prepare
from jaxvid.data.sources import Record, VideoDataset, open_dataset
from jaxvid.data.synthetic_motion import write_clip
from jaxvid.data.video_order import VideoOrder
from jaxvid.distributed import sharding
from jaxvid.errors import InputError
from jaxvid.training import run_config, run_metadata, training_videos
from jaxvid.training.skipped_videos import SkippedVideos
from tests.data.test_sources import FRAMES, section, write

NON_UTF8 = os.fsdecode(b"caf\xe9.mp4")
NAMES = ("a.mp4", "b.mp4", NON_UTF8, "d" * 600 + ".mp4")


@pytest.fixture
def videos(tmp_path):
    return [Record(tmp_path / name, label, name) for label, name in enumerate(NAMES)]


def start(workdir, videos, left_out=()):
    """Align, record and save a list of training videos, as each start of `jaxvid.train` does."""
    workdir.mkdir(exist_ok=True)
    data, lost = training_videos.align(
        workdir, VideoDataset({"train": videos, "val": []}, [], left_out)
    )
    mesh = sharding.make_mesh(sharding.MeshShape())
    run_metadata.record_start(workdir, run_metadata.describe_run(mesh, data.records))
    training_videos.save(workdir, data)
    return data, lost


def skip(workdir, *videos):
    """Add videos to `skipped.jsonl`."""
    skipped = SkippedVideos(workdir, num_videos=100, max_share=1.0)
    skipped.note([(training_videos.stored_id(video.id), "broken") for video in videos])


def test_skipped_videos_may_be_removed_from_the_list(videos, tmp_path):
    workdir = tmp_path / "w"
    assert start(workdir, videos)[0].notes == ()
    skip(workdir, *videos[1:])
    for remaining in ([0], [0, 2], [0, 1, 2, 3], [0, 3]):
        data, lost = start(workdir, [videos[i] for i in remaining])
        records = data.records["train"]
        assert [record.id for record in records] == list(NAMES)
        assert [record.label for record in records] == [0, 1, 2, 3]
        assert lost == tuple(NAMES[i] for i in range(4) if i not in remaining)
        assert [records[i] for i in remaining] == [videos[i] for i in remaining]
        for i in set(range(4)) - {*remaining}:
            with pytest.raises(DecodeError, match="no longer in the training list"):
                records[i].open()
        assert len(data.notes) == bool(lost)
    starts = (workdir / "starts.jsonl").read_text().splitlines()
    assert len({json.dumps(json.loads(line)["data"]) for line in starts}) == 1


def test_all_other_changes_of_the_list_are_refused(videos, tmp_path):
    workdir = tmp_path / "w"
    start(workdir, videos)
    skip(workdir, videos[1])
    message = "4 training videos, now there are 2: 1 are missing .*'a.mp4'.*skipped.jsonl"
    with pytest.raises(InputError, match=message):
        start(workdir, videos[2:])
    new = Record(tmp_path / "x.mp4", 0, "x.mp4")
    with pytest.raises(
        InputError, match=r"1 are new \(the first is 'x.mp4'\); restore the list or"
    ):
        start(workdir, [*videos, new])
    relabelled = [Record(videos[0].path, 3, "a.mp4"), *videos[2:]]
    with pytest.raises(InputError, match="labels of its 4 training videos have changed"):
        start(workdir, relabelled)
    assert len((workdir / "starts.jsonl").read_text().splitlines()) == 1


def test_a_reordered_list_is_restored_to_the_first_order(videos, tmp_path):
    start(tmp_path / "w", videos)
    data, lost = start(tmp_path / "w", videos[::-1])
    assert ([record.id for record in data.records["train"]], lost) == (list(NAMES), ())


def test_videos_left_out_by_the_first_start_stay_out(videos, tmp_path):
    workdir = tmp_path / "w"
    start(workdir, videos[:3], left_out=(NAMES[3],))
    data, lost = start(workdir, videos)
    assert ([record.id for record in data.records["train"]], lost) == (list(NAMES[:3]), ())
    assert "1 training videos that the first start left out are available now" in data.notes[0]
    data, lost = start(workdir, videos[1:3], left_out=(NAMES[0], NAMES[3]))
    assert ([record.id for record in data.records["train"]], lost) == (list(NAMES[:3]), ("a.mp4",))


@pytest.mark.parametrize("damage", ["truncated", "different run", "missing", "text"])
def test_a_damaged_list_of_the_first_start_is_ignored(videos, tmp_path, damage):
    workdir, path = tmp_path / "w", tmp_path / "w" / training_videos.FILE
    start(workdir, videos)
    skip(workdir, videos[1])
    complete = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "different run":
        path.write_bytes(gzip.compress(json.dumps({"ids": ["x"], "labels": [0]}).encode()))
    else:
        path.write_bytes(complete[:30] if damage == "truncated" else b"hello")
    with pytest.raises(InputError, match="was started with 4 training videos .*now there are 3"):
        start(workdir, [videos[0], *videos[2:]])
    start(workdir, videos)
    assert path.read_bytes() == complete  # a start with all videos writes it again


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of six clips and their pack; the second and the fifth clip are broken."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(6):
        if i in (1, 4):
            write(folder / f"{i}.mp4", "broken")
        else:
            write_clip(folder / f"{i}.mp4", FRAMES)
    write(folder / "train.csv", "".join(f"{i}.mp4 {i % 2}\n" for i in range(6)))
    write(folder / "labels.txt", "x\ny\n")
    prepare([folder], folder / "pack", Settings(), workers=1)
    return folder


def load_batches(records, count=4):
    """Return the arrays of the first batches, and the decode errors of their videos."""
    spec = ClipSpec(num_frames=2, crop=16, short_side=16, train_short_side=(16, 16))
    order = VideoOrder(seed=3)
    batches = make_train_iter(records, spec=spec, batch_size=3, order=order, num_threads=1)
    try:
        loaded = [next(batches) for _ in range(count)]
    finally:
        batches.close()
    errors = [error for batch in loaded for error in split_batch(batch)[2]]
    return {
        name: np.stack([b[name] for b in loaded]) for name in ("video", "label", "mask", "id")
    }, errors


@pytest.mark.parametrize("source", ["folder", "pack"])
def test_batches_do_not_change_when_broken_videos_are_removed(folder, tmp_path, source):
    """Removed videos fail because they are no longer listed: their files are not opened."""
    data_folder = folder / "pack" if source == "pack" else folder
    records = open_dataset(section(source, data_folder), 2, ("train",)).records["train"]
    start(tmp_path / "w", records)
    expected, errors = load_batches(records)
    assert sum(map(bool, errors)) == 4  # two of six videos in each of two epochs
    skip(tmp_path / "w", records[1], records[4])
    lines = [f"{i}.mp4 {i % 2}\n" for i in (0, 2, 3, 5)]
    write(tmp_path / "train.csv", "".join(lines))
    write(tmp_path / "labels.txt", "x\ny\n")
    shorter = section("folder", tmp_path, str(folder))
    if source == "pack":
        prepare([tmp_path / "train.csv"], tmp_path / "p", Settings(), workers=1, prefix=str(folder))
        shorter = section("pack", tmp_path / "p")
    data, lost = start(tmp_path / "w", open_dataset(shorter, 2, ("train",)).records["train"])
    assert lost == ("1.mp4", "4.mp4")
    actual, errors = load_batches(data.records["train"])
    assert sum("no longer in the training list" in error for error in errors) == 4
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array)


@pytest.mark.parametrize("source", ["folder", "pack"])
def test_skip_broken_leaves_out_videos_known_to_be_broken(folder, tmp_path, source):
    """These are missing files of a list, and videos of a pack that have no frames."""
    if source == "pack":
        broken = ["1.mp4", "4.mp4"]
        data = section("pack", folder / "pack")
    else:
        lines = [f"{i}.mp4 0\n" for i in ("none", 0, 1, 2, "nothing")]
        write(tmp_path / "train.csv", "".join(lines))
        write(tmp_path / "val.csv", "".join(lines))
        write(tmp_path / "labels.txt", "x\ny\n")
        broken = ["none.mp4", "nothing.mp4"]
        data = section("folder", tmp_path, str(folder))
        with pytest.raises(InputError, match="none.mp4 does not exist"):
            open_dataset(data, 2, ("train",))
    data = dataclasses.replace(data, skip_broken=True)
    dataset = open_dataset(data, 2, ("train",))
    ids = [record.id for record in dataset.records["train"]]
    assert list(dataset.left_out) == broken
    assert not {*ids} & {*broken}
    assert ids == [f"{i}.mp4" for i in ((0, 2, 3, 5) if source == "pack" else (0, 1, 2))]
    note = dataset.notes[-1]
    assert (
        f"{len(broken)} of {len(ids) + len(broken)} training videos are missing or broken" in note
    )
    if source == "folder":
        val = open_dataset(data, 2, ("val",))
        assert len(val.records["val"]) == 5  # in validation, missing files count as wrong
        write(tmp_path / "train.csv", "none.mp4 0\n")
        with pytest.raises(InputError, match="all 1 training videos are missing or broken"):
            open_dataset(data, 2, ("train",))


# ------------------------------------------------------------------ splits


def test_a_video_in_both_splits_is_refused_at_the_first_start(tmp_path):
    write(tmp_path / "a.mp4", "1")
    write(tmp_path / "b.mp4", "2")
    a, b = (Record(tmp_path / name, 0, name) for name in ("a.mp4", "b.mp4"))
    data = VideoDataset({"train": [a, b], "val": [a]}, ["x"])
    with pytest.raises(
        InputError, match="1 of 1 validation videos are also training videos: .*same"
    ):
        training_videos.check_overlap(tmp_path / "w", data)
    (tmp_path / "w" / "checkpoints" / "3").mkdir(parents=True)  # a run of an older version
    assert training_videos.check_overlap(tmp_path / "w", data) == data
    copy = Record(write(tmp_path / "c.mp4", "1"), 0, "c.mp4")
    data = VideoDataset({"train": [a, b], "val": [copy]}, ["x"])
    [note] = training_videos.check_overlap(tmp_path / "new", data).notes
    assert note.startswith("warning: 1 of 1 validation videos are also training videos: ")


def test_runs_without_fields_of_the_split_can_be_resumed(config, tmp_path):
    fields = config.to_dict()
    older = {**fields, "data": dict(fields["data"])}
    for name in ("list", "val_share", "group"):
        del older["data"][name]
    run_config.save_config(older, tmp_path)
    assert run_config.compare_config(tmp_path, fields) == {}
    fields["data"]["val_share"] = 0.2
    assert list(run_config.compare_config(tmp_path, fields)) == ["data.val_share"]
