"""Frame sampling; evaluation indices are identical to those of the original implementations."""

import contextlib
import json
import types

import numpy as np
import pytest

from jaxvid.data.clips.clip import ClipSpec, load_eval_views
from jaxvid.data.clips.sampling import (
    SAMPLINGS,
    dense_stride_indices,
    frames_at_times,
    in_released_subset,
    is_padded,
    make_indices,
    max_views,
    segment_indices,
    uniform_10s_indices,
)
from tests import goldens

CASES = json.loads((goldens.FOLDER / "data/sampling_and_schedule.json").read_text())


def test_segment_views_equal_the_original():
    assert {case["view"] for case in CASES["ssv2"]} == {0, 1, 2}
    for case in CASES["ssv2"]:
        indices = segment_indices(case["num_video_frames"], case["num_frames"], view=case["view"])
        assert indices.tolist() == case["indices"], case


def test_training_draws_cover_each_segment_including_both_ends():
    rng = np.random.default_rng(0)
    draws = np.stack([segment_indices(17, 8, rng=rng) for _ in range(300)])
    for i in range(8):  # segment i extends from frame 2 i to frame 2 i + 2
        assert set(draws[:, i]) == {2 * i, 2 * i + 1, 2 * i + 2}
    for length in (1, 3, 8, 100):
        drawn = segment_indices(length, 8, rng=rng)
        assert (np.diff(drawn) >= 0).all()
        assert drawn[0] >= 0
        assert drawn[-1] < length


def test_motion_clips_are_sampled_symmetrically_in_time():
    """Asymmetric sampling would select different frames of a clip and of its reversal."""
    middle = segment_indices(17, 8, view=0)
    np.testing.assert_array_equal(16 - middle[::-1], middle)


def test_dense_views_equal_the_original():
    assert len(CASES["kinetics"]) == 160
    for case in CASES["kinetics"]:
        indices = dense_stride_indices(
            case["num_video_frames"],
            case["num_frames"],
            sampling_rate=case["sampling_rate"],
            fps=case["fps"],
            view=case["view"],
            num_views=case["num_views"],
        )
        assert indices.tolist() == case["indices"], case


def test_dense_stride_rounds_as_the_original():
    cases = json.loads((goldens.FOLDER / "data/dense_sampling_multiview.json").read_text())
    assert len(cases) == 500
    for case in cases:
        indices = dense_stride_indices(
            case["length"],
            16,
            sampling_rate=16,
            fps=case["fps"],
            view=case["view"],
            num_views=case["num_views"],
        )
        assert indices.tolist() == case["indices"], case


def test_uniform_10s_equals_the_original_for_videos_that_are_not_dropped():
    """The original drops videos shorter than 10 s, even if all sampled frames exist."""
    dropped = []
    for case in CASES["stam"]:
        length, t, fps = case["num_video_frames"], case["num_frames"], case["fps"]
        indices = uniform_10s_indices(length, t, fps=fps)
        padded = is_padded("uniform_10s", length, t, sampling_rate=0, fps=fps)
        if case["indices"] is None:
            dropped.append(length)
            assert indices.tolist() == [
                min(i, length - 1) for i in uniform_10s_indices(300, t, fps=fps)
            ]
            assert not in_released_subset(length, t, fps=fps)
            assert padded == (length == 90)
        else:
            assert indices.tolist() == case["indices"], case
            assert not padded
            assert in_released_subset(length, t, fps=fps)
    assert sorted(dropped) == [90] * 4 + [299] * 4


def test_released_subset_assumes_30_frames_per_second_if_the_rate_is_unknown():
    assert in_released_subset(300, 16, fps=None)
    assert not in_released_subset(299, 16, fps=None)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_training_draws_are_random_and_in_range(sampling):
    rng = np.random.default_rng(0)
    for length in (1, 3, 100, 700):
        draws = [
            make_indices(sampling, length, 8, sampling_rate=16, fps=25.0, rng=rng)
            for _ in range(50)
        ]
        for indices in draws:
            assert indices.shape == (8,)
            assert (np.diff(indices) >= 0).all()
            assert indices[0] >= 0
            assert indices[-1] < length
        assert length < 700 or len({tuple(indices) for indices in draws}) > 10


def test_views_of_a_long_video_are_evenly_spaced():
    for sampling in ("dense_stride", "uniform_10s"):
        firsts = [
            make_indices(sampling, 1000, 8, sampling_rate=4, fps=30.0, view=(v, 4))[0]
            for v in range(4)
        ]
        assert firsts[0] == 0
        assert np.ptp(np.diff(firsts)) <= 1
        assert firsts[1] > 100


def test_unknown_sampling_is_refused():
    names = "'segments', 'dense_stride', 'uniform_10s'"
    with pytest.raises(ValueError, match=f"sampling='sparse': must be one of {names}"):
        make_indices("sparse", 10, 8, sampling_rate=1, fps=None)


def test_sampling_by_time_is_uniform_with_a_variable_frame_rate():
    times = np.concatenate([np.arange(50) / 10, 5 + np.arange(150) / 30])  # 10 s, 200 frames
    even = np.arange(8) * 25  # at 20 frames per second
    indices = frames_at_times(even, times, fps=20.0)
    np.testing.assert_allclose(times[indices], even / 20, atol=0.1)
    constant = np.arange(200) / 20
    np.testing.assert_array_equal(frames_at_times(even, constant, fps=20.0), even)


@pytest.mark.parametrize(("count", "seconds", "padded"), [(100, 10.0, False), (150, 3.0, True)])
def test_padding_by_time_depends_on_duration(count, seconds, padded):
    """A clip needs 128 frames, 4.3 s. Sampling by frame number gives the opposite results."""
    times = np.linspace(0, seconds, count)
    reader = types.SimpleNamespace(
        num_frames=count,
        fps=30.0,
        times=times,
        get_frames=lambda indices: np.zeros((len(indices), 8, 8, 3), np.uint8),
    )
    record = types.SimpleNamespace(open=lambda: contextlib.nullcontext(reader))
    for by_time in (False, True):
        spec = ClipSpec(
            num_frames=8, crop=8, short_side=8, sampling="dense_stride", by_time=by_time
        )
        views = load_eval_views(record, spec)
        assert views["padded"] == (padded if by_time else not padded)
        if by_time:
            assert padded == (np.diff(times[views["indices"][0]])[-1] == 0)


class ExtremeGenerator:
    """Random generator whose uniform draws are always the lower or always the upper bound."""

    def __init__(self, upper: bool):
        self._upper = upper

    def uniform(self, low, high):
        return high if self._upper else low


@pytest.mark.parametrize("sampling", ["dense_stride", "uniform_10s"])
def test_training_clips_start_anywhere_in_the_video(sampling):
    options = {"sampling_rate": 16, "fps": 30.0}
    start = make_indices(sampling, 700, 8, **options)
    assert start[0] == 0
    earliest, latest = (
        make_indices(sampling, 700, 8, **options, rng=ExtremeGenerator(upper))
        for upper in (False, True)
    )
    assert earliest.tolist() == start.tolist()
    assert latest[-1] == 699
    np.testing.assert_allclose(np.diff(latest), np.diff(start), atol=1)
    short = make_indices(sampling, 50, 8, **options, rng=ExtremeGenerator(True))
    assert short.tolist() == make_indices(sampling, 50, 8, **options).tolist()


def test_views_of_uniform_10s_start_at_equal_distances():
    num_remaining = 999 - uniform_10s_indices(1000, 8, fps=25.0)[-1]
    firsts = [uniform_10s_indices(1000, 8, fps=25.0, view=v, num_views=5)[0] for v in range(5)]
    assert firsts == [num_remaining * v // 5 for v in range(5)]


def test_the_default_view_is_the_first():
    for sampling in SAMPLINGS:
        options = {"sampling_rate": 4, "fps": 25.0}
        first = make_indices(sampling, 400, 8, **options, view=(0, 1))
        assert make_indices(sampling, 400, 8, **options).tolist() == first.tolist()
        assert first.dtype.kind == "i"
    views = [
        make_indices("segments", 17, 8, sampling_rate=1, fps=None, view=(v, 3)) for v in range(3)
    ]
    expected = [segment_indices(17, 8, view=v) for v in range(3)]
    np.testing.assert_array_equal(views, expected)
    np.testing.assert_array_equal(segment_indices(17, 8), expected[0])
    assert dense_stride_indices(400, 8, sampling_rate=4, fps=30.0)[0] == 0


def test_only_segments_have_a_limited_number_of_views():
    assert {name: max_views(name) for name in SAMPLINGS} == {
        "segments": 3,
        "dense_stride": None,
        "uniform_10s": None,
    }


def test_clips_of_one_or_two_frames_are_taken_at_the_ends_of_the_window():
    assert dense_stride_indices(
        100, 1, sampling_rate=16, fps=30.0, view=1, num_views=2
    ).tolist() == [42]
    assert dense_stride_indices(100, 2, sampling_rate=16, fps=30.0).tolist() == [0, 31]


@pytest.mark.parametrize(
    ("sampling", "fps", "needed"),
    [
        ("segments", 30.0, 8),
        ("dense_stride", 30.0, 128),
        ("dense_stride", 15.0, 64),
        ("dense_stride", None, 128),
        ("uniform_10s", 30.0, 263),  # the last sampled index is ⌊7 · 37.5⌋ = 262
        ("uniform_10s", None, 263),
        ("uniform_10s", 15.0, 132),
    ],
)
def test_a_video_with_one_frame_too_few_is_padded(sampling, fps, needed):
    for length in (needed - 1, needed):
        padded = is_padded(sampling, length, 8, sampling_rate=16, fps=fps)
        assert padded == (length < needed)


def test_unknown_frame_rate_counts_as_30():
    for sampling in ("dense_stride", "uniform_10s"):
        unknown, known = (
            make_indices(sampling, 900, 8, sampling_rate=16, fps=fps) for fps in (None, 30.0)
        )
        assert unknown.tolist() == known.tolist()


def test_sampling_by_time_selects_the_frames_that_are_shown():
    times = np.array([3.0, 3.5, 5.0])
    # The middles of the requested frames are at 0.5 s (before the first frame, which is returned),
    # 3.5 s (the start of frame 1), 4.5 s and 9.5 s.
    indices = frames_at_times(np.array([0, 3, 4, 9]), times, fps=1.0)
    assert indices.tolist() == [0, 1, 1, 2]
