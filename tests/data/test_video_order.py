"""The order of training videos: balanced classes and repeated augmentation."""

import collections
import itertools

import numpy as np
import pytest

from jaxvid.data import pipeline
from jaxvid.data.pipeline import make_train_iter
from jaxvid.data.records import Record
from jaxvid.data.video_order import VideoOrder
from jaxvid.errors import InputError
from tests.data.test_pipeline import SPEC

# 2, 7 and 4 videos of the classes 0, 1 and 3; class 2 has none.
RECORDS = [Record(f"{i}.mp4", label) for i, label in enumerate([0] * 2 + [1] * 7 + [3] * 4)]
BALANCED = VideoOrder(seed=0, sampler="balanced").for_videos(RECORDS)


@pytest.fixture(autouse=True)
def _load_numbers(monkeypatch):
    """Load a random number in place of a clip."""

    def load(record, rng, spec, out):
        return {"video": out, "indices": np.int64(rng.integers(2**62)), "padded": False}

    monkeypatch.setattr(pipeline, "load_train_clip", load)


def make_batches(order, batch_size, **options):
    return make_train_iter(
        RECORDS, spec=SPEC, batch_size=batch_size, order=order, num_threads=1, **options
    )


def numbers_of(batch) -> list[int]:
    """Return the numbers of the videos in a batch."""
    return [int(id_.split(".")[0]) for id_ in pipeline.split_batch(batch)[1]]


def test_balanced_epochs_draw_every_class_and_its_videos_equally_often():
    """An epoch has 15 clips, 5 per class; 28 epochs are whole passes over every class."""
    assert BALANCED.epoch_clips(len(RECORDS)) == 15
    stream = BALANCED.stream(RECORDS, batch_size=15)
    numbers = [int(stream[i].path.split(".")[0]) for i in range(28 * 15)]
    epochs = np.reshape(numbers, (28, 15)).tolist()
    for epoch in epochs:
        assert collections.Counter(RECORDS[i].label for i in epoch) == {0: 5, 1: 5, 3: 5}
        assert sorted(epoch.count(i) for i in range(2)) == [2, 3]
    counts = collections.Counter(itertools.chain(*epochs))
    assert [counts[i] for i in range(13)] == [70] * 2 + [20] * 7 + [35] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 28
    labels = [[RECORDS[i].label for i in epoch] for epoch in epochs]
    assert len({*map(tuple, labels)}) == 28  # the classes are shuffled within an epoch


def test_balanced_order_depends_on_the_seed_and_describes_itself():
    first = numbers_of(next(make_batches(BALANCED, 15)))
    assert numbers_of(next(make_batches(BALANCED, 15))) == first
    other = VideoOrder(seed=1, sampler="balanced").for_videos(RECORDS)
    assert numbers_of(next(make_batches(other, 15))) != first
    names = ["run", "walk", "fall", "sit"]
    [line] = BALANCED.describe(names, num_clips=15, batch_size=6)
    assert line == (
        "data.sampler=balanced: each class is drawn 5 times per epoch. Draws per video and epoch: "
        "run 2.5 (2 videos), sit 1.25 (4 videos), walk 0.714 (7 videos); 1 of 4 classes have no "
        "training video"
    )
    assert VideoOrder(seed=0).describe(names, num_clips=15, batch_size=6) == ()
    with pytest.raises(InputError, match="data.sampler='even': must be one of 'uniform', 'bal"):
        VideoOrder(seed=0, sampler="even")


REPEATED = VideoOrder(seed=0, repeats=3)


@pytest.mark.parametrize(
    ("order", "num_workers"),
    [(BALANCED, 0), (REPEATED, 0), pytest.param(BALANCED, 1, marks=pytest.mark.full)],
)
def test_batches_are_sharded_and_resumed_exactly(order, num_workers):
    batches = make_batches(order, 6)
    expected = [next(batches) for _ in range(6)]
    batches.close()
    for shard in range(2 - num_workers):
        batches = make_batches(order, 3, shard=(shard, 2), num_workers=num_workers)
        for _ in range(3):
            next(batches)
        state = batches.get_state()
        batches.close()
        batches = make_batches(order, 3, shard=(shard, 2), num_workers=num_workers)
        batches.set_state(state)
        rows = slice(3 * shard, 3 * shard + 3)
        for batch in expected[3:]:
            part = next(batches)
            assert numbers_of(part) == numbers_of(batch)[rows]
            np.testing.assert_array_equal(part["indices"], batch["indices"][rows])
        batches.close()


def test_repeats_draw_each_video_several_times_per_batch():
    """The clips of a video differ, and are as far apart in the batch as possible."""
    batches, plain = make_batches(REPEATED, 6), make_batches(VideoOrder(seed=0), 2)
    for _ in range(8):
        batch, videos = next(batches), numbers_of(next(plain))
        assert numbers_of(batch) == 3 * videos
        assert len({*batch["indices"].tolist()}) == 6
    batches.close()
    plain.close()
    [line] = REPEATED.describe([], num_clips=13, batch_size=6)
    assert line == (
        "data.repeats=3: a batch has 2 videos, each 3 times; an epoch has 13 clips of 4.33 videos"
    )
    both = VideoOrder(seed=0, sampler="balanced", repeats=3).for_videos(RECORDS)
    batches = make_batches(both, 6)
    drawn = collections.Counter()
    for _ in range(int(15 * 3 / 6 * 2)):  # two epochs of 15 videos, each video three times
        drawn.update(RECORDS[i].label for i in numbers_of(next(batches)))
    batches.close()
    assert drawn == {0: 30, 1: 30, 3: 30}


def test_invalid_repeats_are_refused():
    with pytest.raises(InputError, match="data.repeats=0: must be at least 1"):
        VideoOrder(seed=0, repeats=0)
    with pytest.raises(InputError, match="data.repeats=3: batch_size=8 is not a multiple of it"):
        REPEATED.check_batch_size(8)
