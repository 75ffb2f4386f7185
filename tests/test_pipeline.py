"""Batches are functions of the seed and the position alone, and evaluation misses nothing."""

from pathlib import Path

import numpy as np
import pytest

from jaxvid.data import pipeline
from jaxvid.data.decode import DecodeError
from jaxvid.data.pipeline import load_eval_views, make_eval_iter, make_train_iter
from jaxvid.data.sources import Record, open_folder, read_list
from jaxvid.errors import InputError

CLIP = {"num_frames": 8, "short_side": 72, "crop": 64}


@pytest.fixture(scope="module")
def records(motion_folder):
    return read_list(motion_folder / "train.csv", 8)


def train_batches(records, count, skip=0, **kwargs):
    settings = {"batch_size": 8, "seed": 0, "num_threads": 2, **CLIP, **kwargs}
    batches = make_train_iter(records, **settings)
    try:
        return [next(batches) for _ in range(skip + count)][skip:]
    finally:
        batches.close()


def assert_equal(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


def test_batches_do_not_depend_on_threads_or_workers(records):
    expected = train_batches(records, 8, num_threads=1)
    assert expected[0]["video"].shape == (8, 8, 64, 64, 3)
    assert expected[0]["video"].dtype == np.uint8
    assert_equal(train_batches(records, 8, num_threads=3), expected)
    assert_equal(train_batches(records, 8, num_workers=2), expected)


def test_seeds_and_epochs_differ(records):
    first, second = train_batches(records, 6), train_batches(records, 6, skip=6)
    other = train_batches(records, 6, seed=1)
    for batches in (second, other):
        assert any((a["label"] != b["label"]).any() for a, b in zip(first, batches, strict=True))


def seen(batches) -> list[int]:
    return sorted(int(i) for batch in batches for i in batch["id"])


@pytest.fixture
def numbered(records, monkeypatch):
    """Records whose clips are their own number."""
    places = {record.path: i for i, record in enumerate(records)}

    def load(record, rng, **_):
        return {"id": np.int32(places[record.path])}

    monkeypatch.setattr(pipeline, "load_train_clip", load)
    return records


def test_an_epoch_shows_every_clip_once(numbered):
    assert seen(train_batches(numbered, 6)) == list(range(48))
    assert seen(train_batches(numbered, 6, skip=6)) == list(range(48))


def test_shards_are_disjoint_and_complete(numbered):
    shards = [train_batches(numbered, 2, shard=(i, 3)) for i in range(3)]
    assert sorted(sum((seen(shard) for shard in shards), [])) == list(range(48))


def test_the_iterators_state_resumes_in_the_middle_of_an_epoch(records):
    settings = {"batch_size": 8, "seed": 0, "num_threads": 2, **CLIP}
    batches = make_train_iter(records, **settings)
    for _ in range(4):
        next(batches)
    state = batches.get_state()
    expected = [next(batches) for _ in range(4)]
    batches.close()
    resumed = make_train_iter(records, **settings)
    resumed.set_state(state)
    assert_equal([next(resumed) for _ in range(4)], expected)
    resumed.close()


@pytest.mark.parametrize(("batch_size", "processes"), [(5, 1), (8, 1), (64, 1), (5, 2), (7, 3)])
def test_evaluation_counts_every_video_once(motion_folder, batch_size, processes):
    records = read_list(motion_folder / "val.csv", 8)
    labels, lengths = [], set()
    for shard in range(processes):
        batches = make_eval_iter(
            records,
            batch_size=batch_size,
            num_clips=1,
            num_crops=1,
            num_threads=2,
            shard=(shard, processes),
            **CLIP,
        )
        found = list(batches)
        lengths.add(len(found))
        for batch in found:
            assert batch["video"].shape == (batch_size, 1, 8, 64, 64, 3)
            assert not batch["video"][~batch["mask"]].any()
            labels += batch["label"][batch["mask"]].tolist()
    assert len(lengths) == 1  # processes that step together need the same number of steps
    assert sorted(labels) == sorted(record.label for record in records)


def test_views_are_clips_of_crops(motion_folder):
    path = motion_folder / "val" / "00000.mp4"
    views = load_eval_views(path, num_clips=3, num_crops=3, **{**CLIP, "short_side": 80})
    assert views.shape == (9, 8, 64, 64, 3)
    one = load_eval_views(path, num_clips=1, num_crops=1, **{**CLIP, "short_side": 80})
    np.testing.assert_array_equal(views[1], one[0])  # first clip, centre


def test_an_undecodable_video_stops_the_iteration_with_its_name(records, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_text("hello")
    with pytest.raises(DecodeError, match="broken.mp4: cannot be decoded"):
        train_batches([*records, Record(broken, 0)], 7)
    batches = make_eval_iter(
        [Record(broken, 0)], batch_size=1, num_clips=1, num_crops=1, num_threads=1, **CLIP
    )
    with pytest.raises(DecodeError, match="broken.mp4: cannot be decoded"):
        next(batches)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "list.csv is empty"),
        ("a.mp4\n", "list.csv:1: 'a.mp4' is not 'path label'"),
        ("a.mp4 0\na.mp4 x\n", "list.csv:2: 'a.mp4 x' is not 'path label'"),
        ("a.mp4 -1\n", "is not 'path label'"),
        ("a.mp4 8\n", "list.csv:1: label 8 is out of range: model.num_classes=8 allows 0 to 7"),
        ("b.mp4 0\n", "list.csv:1: .*b.mp4 does not exist"),
        ("a.mp4 0\nempty.mp4 0\n", "list.csv:2: .*empty.mp4 is empty"),
    ],
)
def test_bad_lists_are_refused_by_line(tmp_path, lines, message):
    (tmp_path / "a.mp4").write_text("x")
    (tmp_path / "empty.mp4").write_text("")
    (tmp_path / "list.csv").write_text(lines)
    with pytest.raises(InputError, match=message):
        read_list(tmp_path / "list.csv", 8)


def test_paths_may_hold_spaces_and_any_script(tmp_path):
    (tmp_path / "Ein Vidéo 影.mp4").write_text("x")
    (tmp_path / "list.csv").write_text("Ein Vidéo 影.mp4 3\r\n", encoding="utf-8")
    [record] = read_list(tmp_path / "list.csv", 8)
    assert record == Record(Path(tmp_path / "Ein Vidéo 影.mp4"), 3)


def test_folders_are_refused_with_the_way_out(config, motion_folder):
    with config.unlocked():
        assert len(open_folder(config.data, 8, ("val",)).labels) == 8
        with pytest.raises(InputError, match="set --config.model.num_classes=8"):
            open_folder(config.data, 9, ("val",))
        config.data.folder = str(motion_folder / "nothing")
        with pytest.raises(InputError, match="a data folder holds train.csv"):
            open_folder(config.data, 8, ("val",))
        config.data.source = "kinetics"
        with pytest.raises(InputError, match="data.source='kinetics': there are 'motion' and"):
            open_folder(config.data, 8, ("val",))
