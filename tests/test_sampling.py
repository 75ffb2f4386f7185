"""Frame indices equal the original programs', exactly."""

import json

import numpy as np

from jaxvid.data.sampling import NUM_CLIPS, segment_indices
from tests import goldens


def test_segment_views_equal_the_original():
    cases = json.loads((goldens.FOLDER / "data/sampling_and_schedule.json").read_text())["ssv2"]
    assert {case["view"] for case in cases} == {0, 1, 2}
    assert len(NUM_CLIPS) == 3
    for case in cases:
        indices = segment_indices(case["num_video_frames"], case["num_frames"], view=case["view"])
        assert indices.tolist() == case["indices"], case


def test_training_draws_cover_each_segment_with_both_ends():
    rng = np.random.default_rng(0)
    draws = np.stack([segment_indices(17, 8, rng=rng) for _ in range(300)])  # segments of 2 frames
    for i in range(8):
        assert set(draws[:, i]) == {2 * i, 2 * i + 1, 2 * i + 2}
    for length in (1, 3, 8, 100):
        drawn = segment_indices(length, 8, rng=rng)
        assert (np.diff(drawn) >= 0).all()
        assert drawn[0] >= 0
        assert drawn[-1] < length


def test_the_demo_clips_are_sampled_symmetrically_in_time():
    """Or the set of sampled frames would tell a clip from its reversal."""
    middle = segment_indices(17, 8, view=0)
    np.testing.assert_array_equal(16 - middle[::-1], middle)
