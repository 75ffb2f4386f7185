"""Batches depend only on the seed and the position; evaluation yields every video once."""

import builtins
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxvid.data import pipeline
from jaxvid.data.clips.clip import (
    ClipSpec,
    cut_eval_crops,
    load_eval_views,
    load_train_clip,
    transforms,
)
from jaxvid.data.formats import tfds_api
from jaxvid.data.pipeline import make_eval_iter, make_train_iter, split_batch
from jaxvid.data.sources import Record, open_dataset, read_list
from jaxvid.data.video_order import VideoOrder
from jaxvid.errors import InputError
from jaxvid.experiment import resolve
from tests.waiting import wait_until

SPEC = ClipSpec(num_frames=8, short_side=72, crop=64, train_short_side=(72, 72))


@pytest.fixture(scope="module")
def records(motion_folder):
    return read_list(motion_folder / "train.csv", 8)


def train_batches(records, count, skip=0, **kwargs):
    settings = {"spec": SPEC, "batch_size": 8, "order": VideoOrder(seed=0), "num_threads": 2}
    settings |= kwargs
    batches = make_train_iter(records, **settings)
    try:
        return [next(batches) for _ in range(skip + count)][skip:]
    finally:
        batches.close()


def assert_equal(a, b):
    assert len(a) == len(b)
    for batch_a, batch_b in zip(a, b, strict=True):
        assert batch_a.keys() == batch_b.keys()
        for name in batch_a:
            np.testing.assert_array_equal(batch_a[name], batch_b[name])


def test_batches_do_not_depend_on_threads_or_workers(records):
    expected = train_batches(records, 8, num_threads=1)
    assert expected[0]["video"].shape == (8, 8, 64, 64, 3)
    assert expected[0]["video"].dtype == np.uint8
    assert_equal(train_batches(records, 8, num_threads=3), expected)
    assert_equal(train_batches(records, 8, num_workers=2), expected)


def test_workers_that_hang_are_killed(records, monkeypatch):
    monkeypatch.setattr(pipeline, "CLOSE_SECONDS", 1.0)
    batches = make_train_iter(
        records, spec=SPEC, batch_size=8, order=VideoOrder(seed=0), num_threads=1, num_workers=2
    )
    next(batches)
    # Grain may start the second worker after the first batch.
    wait_until(lambda: len(multiprocessing.active_children()) == 2, 30)
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    time.sleep(0.5)  # until the batches in the queues are fetched
    batches.close()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_threads_do_not_import_tfds_at_the_same_time(monkeypatch):
    """Otherwise, its lazy imports can deadlock."""
    tfds_api.import_tfds()  # its first import must not meet the function below
    active, counts, original = [], [], builtins.__import__

    def count(name, *args):
        if name != "tensorflow_datasets.proto":
            return original(name, *args)
        active.append(name)
        counts.append(len(active))
        time.sleep(0.05)
        active.pop()
        return original(name, *args)

    tfds_api._example_type.cache_clear()
    monkeypatch.setattr(builtins, "__import__", count)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tfds_api.parse_record, [b""] * 4, [()] * 4)) == [{}] * 4
    assert max(counts) == 1


def test_workers_ignore_signals_and_end_with_their_parent(records, tmp_path):
    """Ctrl-C signals the workers too, but the run needs them until it has saved its state."""
    batches = make_train_iter(
        records, spec=SPEC, batch_size=8, order=VideoOrder(seed=0), num_threads=1, num_workers=1
    )
    next(batches)
    [worker] = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    time.sleep(0.5)
    assert worker.is_alive()
    for _ in range(4):
        next(batches)
    batches.close()
    assert not worker.is_alive()

    script = (
        "import multiprocessing, os, signal, sys, time\n"
        "from jaxvid.data.pipeline import _outlive_signals\n"
        "def work():\n    _outlive_signals()\n    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    worker = multiprocessing.get_context('fork').Process(target=work)\n"
        "    worker.start()\n    print(worker.pid, flush=True)\n"
        "    time.sleep(1)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        worker = int(parent.stdout.readline())
        assert parent.wait() == -signal.SIGKILL
        wait_until(lambda: not is_running(worker), 10)


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_order_differs_between_seeds_and_epochs(records):
    first, second = train_batches(records, 6), train_batches(records, 6, skip=6)
    other_seed = train_batches(records, 6, order=VideoOrder(seed=1))
    for batches in (second, other_seed):
        assert any((a["label"] != b["label"]).any() for a, b in zip(first, batches, strict=True))


def clip_numbers(batches) -> list[int]:
    """Return the sorted numbers of the clips in batches of `numbered` records."""
    return sorted(int(i) for batch in batches for i in batch["indices"])


@pytest.fixture
def numbered(records, monkeypatch):
    """Records for which the pipeline loads their index instead of a clip."""
    numbers = {record.path: i for i, record in enumerate(records)}

    def load(record, rng, spec, out):
        return {"video": out, "indices": np.int32(numbers[record.path]), "padded": False}

    monkeypatch.setattr(pipeline, "load_train_clip", load)
    return records


def test_an_epoch_contains_every_clip_once(numbered):
    assert clip_numbers(train_batches(numbered, 6)) == list(range(48))
    assert clip_numbers(train_batches(numbered, 6, skip=6)) == list(range(48))


def test_shards_are_disjoint_and_complete(numbered):
    shards = [train_batches(numbered, 2, shard=(i, 3)) for i in range(3)]
    assert sorted(sum((clip_numbers(shard) for shard in shards), [])) == list(range(48))


def test_each_process_loads_consecutive_rows_of_every_batch(numbered):
    expected = train_batches(numbered, 5, batch_size=12)
    shards = [train_batches(numbered, 5, batch_size=4, shard=(i, 3)) for i in range(3)]
    for i, batch in enumerate(expected):
        rows = np.concatenate([shard[i]["indices"] for shard in shards])
        np.testing.assert_array_equal(rows, batch["indices"])


def test_each_process_evaluates_consecutive_rows_of_every_batch(motion_folder, monkeypatch):
    records = read_list(motion_folder / "val.csv", 8)

    def load(record, spec, out):
        return {"video": out, "indices": 0, "padded": False, "released": True}

    monkeypatch.setattr(pipeline, "load_eval_views", load)
    ids = []
    for i in range(2):
        options = {"spec": SPEC, "batch_size": 3, "num_threads": 1, "shard": (i, 2)}
        ids.append([split_batch(batch)[1] for batch in make_eval_iter(records, **options)])
    listed = [record.id for record in records]
    assert [sum(rows, []) for rows in zip(*ids, strict=True)] == [
        listed[start : start + 6] for start in range(0, len(records), 6)
    ]


def test_iterator_state_resumes_in_the_middle_of_an_epoch(records):
    settings = {"spec": SPEC, "batch_size": 8, "order": VideoOrder(seed=0), "num_threads": 2}
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


@pytest.mark.parametrize("processes", [2, 4])
def test_resumed_batches_do_not_depend_on_the_number_of_processes(records, processes):
    settings = {"spec": SPEC, "order": VideoOrder(seed=0), "num_threads": 2}
    batches = make_train_iter(records, batch_size=8, **settings)
    for _ in range(7):  # into the second epoch
        next(batches)
    state, expected = batches.get_state(), next(batches)
    batches.close()
    clips = []
    for shard in range(processes):
        resumed = make_train_iter(
            records, batch_size=8 // processes, shard=(shard, processes), **settings
        )
        resumed.set_state(state)
        clips += list(next(resumed)["video"])
        resumed.close()
    resumed_clips = sorted(clip.tobytes() for clip in clips)
    assert resumed_clips == sorted(clip.tobytes() for clip in expected["video"])


@pytest.mark.parametrize(("batch_size", "processes"), [(5, 1), (8, 1), (64, 1), (5, 2), (7, 3)])
def test_evaluation_counts_every_video_once(motion_folder, batch_size, processes):
    records = read_list(motion_folder / "val.csv", 8)
    labels, batch_counts = [], set()
    for shard in range(processes):
        batches = make_eval_iter(
            records,
            spec=SPEC,
            batch_size=batch_size,
            num_threads=2,
            shard=(shard, processes),
        )
        batches = list(batches)
        batch_counts.add(len(batches))
        for batch in batches:
            assert batch["video"].shape == (batch_size, 1, 8, 64, 64, 3)
            assert not batch["video"][~batch["mask"]].any()
            labels += batch["label"][batch["mask"]].tolist()
    assert len(batch_counts) == 1  # processes run the same number of collective steps
    assert sorted(labels) == sorted(record.label for record in records)


def test_views_are_ordered_by_clip_and_crop(motion_folder):
    path = motion_folder / "val" / "00000.mp4"
    spec = dataclasses.replace(SPEC, short_side=80, num_clips=3, num_crops=3)
    views = load_eval_views(path, spec)
    assert views["video"].shape == (9, 8, 64, 64, 3)
    assert views["indices"].shape == (3, 8)
    single = load_eval_views(path, dataclasses.replace(spec, num_clips=1, num_crops=1))
    np.testing.assert_array_equal(views["video"][1], single["video"][0])  # first clip, centre crop
    assert not single["padded"]
    too_long = dataclasses.replace(spec, sampling="dense_stride", num_clips=1)
    assert load_eval_views(path, too_long)["padded"]


def test_undecodable_videos_are_masked_with_the_reason(records, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_text("hello")
    num_broken = 0
    for batch in train_batches([*records[:15], Record(broken, 3)], 2):
        arrays, ids, errors = split_batch(batch)
        assert sorted(arrays) == ["label", "mask", "video"]
        np.testing.assert_array_equal(arrays["mask"], [not error for error in errors])
        for i in np.flatnonzero(~arrays["mask"]):
            num_broken += 1
            assert not arrays["video"][i].any()
            assert ids[i] == str(broken)
            assert "broken.mp4: cannot be decoded" in errors[i]
    assert num_broken == 1
    batches = make_eval_iter(
        [Record(broken, 3), records[0]], spec=SPEC, batch_size=3, num_threads=1
    )
    [batch] = list(batches)
    assert batch["mask"].tolist() == [False, True, False]
    assert batch["label"].tolist() == [3, records[0].label, 0]
    _, ids, errors = split_batch(batch)
    assert ids == [str(broken), records[0].id, ""]
    assert [bool(error) for error in errors] == [True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sampling": "sparse"},
            "sampling='sparse': must be one of 'segments', 'dense_stride', 'uniform_10s'",
        ),
        ({"num_clips": 4}, "num_clips=4: must be 1 to 3 with sampling='segments'"),
        ({"num_crops": 2}, "num_crops=2: must be one of 1, 3"),
        ({"short_side": 32}, "short_side=32 is smaller than the crop of 64 px"),
        ({"augment": "auto"}, "augment='auto': must be one of '', 'autoaugment', 'randaugment'"),
    ],
)
def test_invalid_clip_specs_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SPEC, **options)


def test_training_short_side_is_drawn_between_its_bounds(records, monkeypatch):
    sizes, original_resize = set(), transforms.resize_short_side

    def resize(frames, short_side, *, exact):
        sizes.add(short_side)
        return original_resize(frames, short_side, exact=exact)

    monkeypatch.setattr(transforms, "resize_short_side", resize)
    spec, rng = dataclasses.replace(SPEC, train_short_side=(64, 67)), np.random.default_rng(0)
    for _ in range(40):
        load_train_clip(records[0], rng, spec)
    # Threads of iterators that earlier tests closed may still resize frames to SPEC.short_side.
    assert sizes - {SPEC.short_side} == {64, 65, 66, 67}


def test_augmented_clips_are_reproducible_and_have_the_crop_size(records):
    recipes = [
        {
            "sampling": "dense_stride",
            "train_crop": "multiscale",
            "augment": "autoaugment",
            "flip_prob": 0.5,
        },
        {"sampling": "segments", "train_short_side": (64, 80), "augment": "randaugment"},
        {"sampling": "uniform_10s", "by_time": True},
    ]
    for recipe in recipes:
        spec = dataclasses.replace(SPEC, **recipe)
        for seed in range(3):
            clip = load_train_clip(records[seed], np.random.default_rng(seed), spec)
            again = load_train_clip(records[seed], np.random.default_rng(seed), spec)
            assert clip["video"].shape == (8, 64, 64, 3)
            assert clip["video"].dtype == np.uint8
            np.testing.assert_array_equal(clip["video"], again["video"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "list.csv is empty"),
        ("a.mp4\n", "list.csv:1: 'a.mp4' is not 'path label'"),
        ("a.mp4 0\na.mp4 x\n", "list.csv:2: has the class name 'x', but line 1 has the"),
        ("a.mp4 -1\n", "is not 'path label'"),
        ("a.mp4 8\n", "list.csv:1: label 8 is out of range: with 8 classes, labels are 0 to 7"),
        ("b.mp4 0\n", "list.csv:1: .*b.mp4 does not exist"),
        ("a.mp4 0\nempty.mp4 0\n", "list.csv:2: .*empty.mp4 is empty"),
    ],
)
def test_malformed_lists_are_refused_with_the_line_number(tmp_path, lines, message):
    (tmp_path / "a.mp4").write_text("x")
    (tmp_path / "empty.mp4").write_text("")
    (tmp_path / "list.csv").write_text(lines)
    with pytest.raises(InputError, match=message):
        read_list(tmp_path / "list.csv", 8)


def test_paths_may_contain_spaces_and_unicode(tmp_path):
    (tmp_path / "Ein Vidéo 影.mp4").write_text("x")
    (tmp_path / "list.csv").write_text("Ein Vidéo 影.mp4 3\r\n", encoding="utf-8")
    [record] = read_list(tmp_path / "list.csv", 8)
    assert record == Record(Path(tmp_path / "Ein Vidéo 影.mp4"), 3)


def test_invalid_data_folders_are_refused(config, motion_folder):
    data = resolve(config).dataset
    assert len(open_dataset(data, 8, ("val",)).labels) == 8
    with pytest.raises(InputError, match="set --config.model.num_classes=8"):
        open_dataset(data, 9, ("val",))
    data = dataclasses.replace(data, folder=str(motion_folder / "nothing"))
    with pytest.raises(InputError, match="nothing does not exist"):
        open_dataset(data, 8, ("val",))
    with pytest.raises(InputError, match="data.source='kinetics': must be one of 'motion'"):
        dataclasses.replace(data, source="kinetics")


def test_clips_are_mirrored_with_flip_prob(records):
    def load(probability, seed=0):
        spec = dataclasses.replace(SPEC, flip_prob=probability)
        return load_train_clip(records[0], np.random.default_rng(seed), spec)["video"]

    np.testing.assert_array_equal(load(1.0), load(0.0)[:, :, ::-1])
    mirrored = sum((load(0.5, seed) != load(0.0, seed)).any() for seed in range(40))
    assert 8 < mirrored < 32  # four standard deviations


@pytest.mark.parametrize("num_crops", [1, 3])
def test_clips_and_views_are_written_directly_into_the_batch(records, monkeypatch, num_crops):
    """All crops of a clip are cut from the same frames, without copies in between."""
    spec = dataclasses.replace(SPEC, short_side=80, num_clips=2, num_crops=num_crops)
    targets, frames = {"load_train_clip": [], "load_eval_views": []}, []
    for name, outs in targets.items():
        original = getattr(pipeline, name)

        def load(*args, outs=outs, original=original):
            outs.append(args[-1])
            return original(*args)

        monkeypatch.setattr(pipeline, name, load)

    def cut(resized, spec):
        frames.append(resized)
        views = cut_eval_crops(resized, spec)
        assert all(np.shares_memory(view, resized) for view in views)
        return views

    monkeypatch.setattr("jaxvid.data.clips.clip.cut_eval_crops", cut)
    options = {"spec": spec, "batch_size": 2, "num_threads": 1}
    iterators = (
        make_train_iter(records[:2], order=VideoOrder(seed=0), **options),
        make_eval_iter(records[:2], **options),
    )
    for batches, outs in zip(iterators, targets.values(), strict=True):
        batch = next(batches)
        batches.close()
        for row in batch["video"]:  # the second batch may be loaded already
            assert any(np.shares_memory(row, out) for out in outs)
    assert len(frames) == 2 * 2 * SPEC.num_frames  # videos · clips · frames
    for record, views in zip(records[:2], batch["video"], strict=True):
        np.testing.assert_array_equal(load_eval_views(record, spec)["video"], views)
