"""Crops and resizes of whole clips."""

import numpy as np
import pytest
from PIL import Image

from jaxvid.data.transforms import eval_crops, random_crop, resize_short_side


def frames(height: int, width: int) -> np.ndarray:
    """Two frames whose pixels hold their row, their column and their frame's number."""
    t, y, x = np.mgrid[:2, :height, :width]
    return np.stack([y, x, t], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (32, 32), (33, 200)])
def test_resize_keeps_the_aspect_and_is_pillows(height, width):
    clip = frames(height, width)
    resized = resize_short_side(clip, 24)
    assert min(resized.shape[1:3]) == 24
    assert abs(resized.shape[2] / resized.shape[1] - width / height) < 0.05 * width / height
    size = resized.shape[2], resized.shape[1]
    expected = Image.fromarray(clip[1]).resize(size, Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resized[1], expected)


def test_resize_leaves_the_right_size_alone():
    clip = frames(24, 50)
    assert resize_short_side(clip, 24) is clip


def test_random_crops_take_one_place_a_clip_and_reach_every_edge():
    clip, rng = frames(10, 12), np.random.default_rng(0)
    corners = set()
    for _ in range(300):
        crop = random_crop(clip, 8, rng)
        assert crop.shape == (2, 8, 8, 3)
        np.testing.assert_array_equal(crop[0, :, :, :2], crop[1, :, :, :2])
        corners.add(tuple(crop[0, 0, 0, :2]))
    assert corners == {(y, x) for y in range(3) for x in range(5)}


def test_eval_crops_are_the_centre_or_the_centre_and_both_ends():
    def corners(clip, num_crops):
        crops = eval_crops(clip, 8, num_crops)
        assert all(crop.shape == (2, 8, 8, 3) for crop in crops)
        return [tuple(int(i) for i in crop[0, 0, 0, :2]) for crop in crops]

    assert corners(frames(8, 13), 1) == [(0, 3)]  # half a pixel is rounded up
    assert corners(frames(8, 13), 3) == [(0, 0), (0, 3), (0, 5)]
    assert corners(frames(12, 8), 3) == [(0, 0), (2, 0), (4, 0)]
    assert corners(frames(8, 8), 3) == [(0, 0)] * 3
