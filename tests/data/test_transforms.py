"""Resizing, cropping and flipping of clips."""

import cv2
import numpy as np
import pytest
from PIL import Image

from jaxvid.data.clips.clip import ClipSpec
from jaxvid.data.clips.transforms import (
    FRACTIONS,
    NUM_CROPS,
    draw_multi_scale_crop,
    draw_random_crop,
    eval_crops,
    mirror,
    multi_scale_sizes,
    resize,
    resize_bilinear,
    resize_short_side,
    to_uint8,
)
from tests.goldens import FOLDER

GOLDENS = ["40x60_to_32", "60x40_to_32", "37x53_to_32", "32x32_to_32", "48x85_to_24"]


def frames(height: int, width: int) -> np.ndarray:
    """Return two frames; the channels of a pixel are its row, its column and the frame number."""
    t, y, x = np.mgrid[:2, :height, :width]
    return np.stack([y, x, t], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (32, 32), (33, 200), (9, 13)])
def test_resize_keeps_the_aspect_ratio_and_equals_pillow(height, width):
    clip = frames(height, width)
    resized = resize_short_side(clip, 24)
    assert min(resized.shape[1:3]) == 24
    assert abs(resized.shape[2] / resized.shape[1] - width / height) < 0.05 * width / height
    size = resized.shape[2], resized.shape[1]
    expected = Image.fromarray(clip[1]).resize(size, Image.Resampling.BILINEAR)
    exact = resize_short_side(clip, 24, exact=True)
    np.testing.assert_array_equal(exact[1], np.asarray(expected))
    enlarged = min(height, width) < 24
    np.testing.assert_allclose(resized[1].astype(int), np.asarray(expected), atol=int(enlarged))


@pytest.mark.parametrize("resize_to", [resize_short_side, resize_bilinear])
def test_resize_to_the_same_size_is_the_identity(resize_to):
    clip = frames(24, 50)
    assert resize_to(clip, 24) is clip


def test_all_goldens_are_tested():
    with np.load(FOLDER / "data" / "spatial_crops.npz") as arrays:
        assert sorted({name.rsplit("_", 1)[0] for name in arrays}) == sorted(GOLDENS)


@pytest.mark.parametrize("name", GOLDENS)
def test_three_crops_equal_the_original(name):
    """The tolerance is one grey level if crops are rounded to uint8, otherwise 0.003 levels."""
    with np.load(FOLDER / "data" / "spatial_crops.npz") as arrays:
        seed = int(arrays[f"{name}_seed"])
        expected = [arrays[f"{name}_crop{i}"] for i in range(3)]
    source, size = name.split("_to_")
    h, w = (int(side) for side in source.split("x"))
    clip = np.random.RandomState(seed).randint(0, 256, (4, h, w, 3)).astype(np.uint8)
    for exact, white, tolerance in ((False, 255, 1), (True, 255 * FRACTIONS, 0.003)):
        crops = eval_crops(resize_bilinear(clip, int(size), exact=exact), int(size), 3)
        assert len(crops) == 3
        for crop, golden in zip(crops, expected, strict=True):
            assert crop.dtype == (np.uint16 if exact else np.uint8)
            # The original crops are normalised with mean 0.5 and std 0.5, so a grey level is 2/255.
            atol = tolerance * 2 / 255
            np.testing.assert_allclose((crop / white - 0.5) / 0.5, golden, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("source", "expected"),
    [((11, 13), (24, 28)), ((13, 11), (28, 24)), ((240, 427), (24, 42)), ((50, 30), (40, 24))],
)
def test_bilinear_resize_floors_the_longer_side(source, expected):
    assert resize_bilinear(frames(*source), 24).shape == (2, *expected, 3)


def test_random_crops_reach_every_edge():
    clip, rng = frames(10, 12), np.random.default_rng(0)
    corners = set()
    for _ in range(300):
        crop = clip[0, *draw_random_crop(10, 12, 8, rng)]
        assert crop.shape == (8, 8, 3)
        corners.add(tuple(crop[0, 0, :2]))
    assert corners == {(y, x) for y in range(3) for x in range(5)}


@pytest.mark.parametrize("width", [1, 7, 64, 224])
def test_frames_are_mirrored_in_place(width):
    rng = np.random.default_rng(0)
    padded = rng.integers(0, 256, (5, width + 2, 3), np.uint8)
    frame = padded[:, 1:-1]  # not contiguous, as a crop
    expected, edges = frame[:, ::-1].copy(), padded[:, [0, -1]].copy()
    mirror(frame)
    np.testing.assert_array_equal(frame, expected)
    np.testing.assert_array_equal(padded[:, [0, -1]], edges)


def test_multi_scale_sizes_are_at_most_one_step_apart():
    sides = [256, 224, 192, 168]
    expected = [(a, b) for i, a in enumerate(sides) for b in sides[max(0, i - 1) : i + 2]]
    assert multi_scale_sizes(256, 224) == expected
    assert len(set(expected)) == 10


@pytest.mark.parametrize(
    ("short_side", "sides"),
    [
        (258, {258, 224, 193, 170}),  # 225 becomes 224
        (299, {299, 261, 224, 197}),
        (301, {301, 263, 224, 198}),
        (302, {302, 264, 224, 199}),  # 226 becomes 224
        (303, {303, 265, 227, 199}),  # 227 differs by more than 2 pixels
        (225, {224, 196, 168, 148}),
        (223, {223, 195, 167, 147}),  # frames are too small for 224
    ],
)
def test_multi_scale_sizes_close_to_the_crop_become_the_crop(short_side, sides):
    assert {side for pair in multi_scale_sizes(short_side, 224) for side in pair} == sides


def test_multi_scale_sizes_of_frames_as_small_as_the_crop():
    # The sides are 10, 8, 7 and 6 pixels; 8 differs from the crop by 2 pixels and becomes 10.
    expected = {10, 7, 6}
    assert {side for pair in multi_scale_sizes(10, 10) for side in pair} == expected


def test_multi_scale_crops_start_at_13_positions():
    clip, rng = frames(40, 56), np.random.default_rng(0)
    corners = {}
    for _ in range(3000):
        rows, columns = draw_multi_scale_crop(40, 56, 26, rng)
        if (rows.stop - rows.start, columns.stop - columns.start) == (26, 26):
            corner = tuple(int(i) for i in clip[0, rows.start, columns.start, :2])
            corners[corner] = corners.get(corner, 0) + 1
    down, right = (40 - 26) // 4, (56 - 26) // 4
    positions = [(0, 0), (0, 4), (4, 0), (4, 4), (0, 2), (2, 0), (4, 2), (2, 4), (2, 2)]
    positions += [(1, 1), (1, 3), (3, 1), (3, 3)]
    assert sorted(corners) == sorted((y * down, x * right) for y, x in positions)
    assert min(corners.values()) > 5  # mean: 3000 / (10 sizes · 13 positions) = 23


@pytest.mark.parametrize(("height", "width"), [(40, 56), (56, 40), (9, 12), (33, 35)])
def test_multi_scale_crops_equal_resizing_with_pillow(height, width):
    """A crop is bit-identical to Pillow's if its height or width shrinks.

    Otherwise it is enlarged by OpenCV and may differ from Pillow's by one grey level. Some of the
    frames are smaller than the result of 32 × 32 pixels.
    """
    clip = np.random.default_rng(1).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    candidates = []
    for crop_h, crop_w in multi_scale_sizes(min(height, width), 32):
        for y in range(5):
            for x in range(5):
                top, left = (height - crop_h) // 4 * y, (width - crop_w) // 4 * x
                part = Image.fromarray(clip[1, top : top + crop_h, left : left + crop_w])
                expected = np.asarray(part.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
                candidates.append((expected, int(crop_h <= 32 and crop_w <= 32)))
    rng = np.random.default_rng(0)
    for _ in range(10):
        window = draw_multi_scale_crop(height, width, 32, rng)
        crop = resize(clip[:, *window], 32, 32, out=np.zeros((2, 32, 32, 3), np.uint8))
        assert crop.shape == (2, 32, 32, 3)
        assert any(np.abs(crop[1] - expected).max() <= atol for expected, atol in candidates)


def test_resize_takes_height_then_width():
    assert resize(frames(10, 20), 5, 7).shape == (2, 5, 7, 3)


@pytest.mark.parametrize("size", [(40, 60), (33, 60), (40, 56)])
def test_frames_are_enlarged_by_opencv_unless_exact(size):
    clip = np.random.default_rng(0).integers(0, 256, (2, 33, 56, 3), np.uint8)
    height, width = size
    enlarged = [cv2.resize(frame, (width, height)) for frame in clip]
    np.testing.assert_array_equal(resize(clip, height, width), enlarged)
    by_pillow = [
        np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
        for frame in clip
    ]
    assert (np.stack(by_pillow) != np.stack(enlarged)).any()
    np.testing.assert_array_equal(resize(clip, height, width, exact=True), by_pillow)
    short = resize_short_side(clip, 40)
    np.testing.assert_array_equal(short, resize(clip, 40, short.shape[2]))
    assert (short != resize_short_side(clip, 40, exact=True)).any()


def test_evaluation_supports_one_or_three_crops():
    assert set(NUM_CROPS) == {1, 3}
    for num_crops in NUM_CROPS:
        assert len(eval_crops(frames(9, 13), 8, num_crops)) == num_crops


def test_eval_crops_are_the_centre_or_the_centre_and_both_ends():
    def corners(clip, num_crops, rounding="up"):
        crops = eval_crops(clip, 8, num_crops, rounding=rounding)
        assert all(crop.shape == (2, 8, 8, 3) for crop in crops)
        return [tuple(int(i) for i in crop[0, 0, 0, :2]) for crop in crops]

    assert corners(frames(8, 13), 1) == [(0, 3)]  # half a pixel is rounded up
    assert corners(frames(8, 13), 1, "even") == [(0, 2)]
    assert corners(frames(8, 15), 1, "even") == [(0, 4)]
    assert corners(frames(8, 13), 3) == [(0, 0), (0, 3), (0, 5)]
    assert corners(frames(8, 13), 3, "even") == [(0, 0), (0, 2), (0, 5)]
    assert corners(frames(12, 8), 3) == [(0, 0), (2, 0), (4, 0)]
    assert corners(frames(8, 8), 3) == [(0, 0)] * 3
    np.testing.assert_array_equal(eval_crops(frames(9, 13), 8, 1)[0], frames(9, 13)[:, 1:, 3:11])


@pytest.mark.parametrize("resize_to", [resize_short_side, resize_bilinear])
def test_small_frames_are_enlarged_to_the_crop(resize_to):
    for crop in eval_crops(resize_to(frames(5, 9), 8), 8, 3):
        assert crop.shape == (2, 8, 8, 3)


def test_frames_smaller_than_the_crop_are_refused():
    with pytest.raises(ValueError, match="9 × 5 pixels"):
        eval_crops(frames(5, 9), 8, 1)


def test_uint16_pixels_are_rounded_to_uint8():
    frames = np.array([0, 127, 129, 255 * FRACTIONS - 129, 255 * FRACTIONS], np.uint16)
    rounded = to_uint8(frames)
    assert rounded.dtype == np.uint8
    assert rounded.tolist() == [0, 0, 1, 254, 255]
    assert to_uint8(rounded) is rounded


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["down", "Left", "right"], "'Left' look like 'right'"),
        (["from right to left", "from left to right"], "look like 'from left to right'"),
        (["left", "up"], ""),
        (["bright", "blight"], ""),
    ],
)
def test_mirroring_of_classes_that_differ_in_left_and_right_is_warned_of(labels, expected):
    spec = ClipSpec(num_frames=8, short_side=72, crop=64, flip_prob=0.5)
    lines = spec.describe_mirroring(labels)
    assert len(lines) == bool(expected)
    assert expected in "".join(lines)
    assert ClipSpec(num_frames=8, short_side=72, crop=64).describe_mirroring(labels) == ()
