"""AutoAugment, RandAugment and their operations, compared with Pillow."""

from collections import Counter

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from jaxvid.data.clips import autoaugment, image_ops

LINEAR, CUBIC = cv2.INTER_LINEAR, cv2.INTER_CUBIC
PILLOW_FILTERS = {LINEAR: Image.Resampling.BILINEAR, CUBIC: Image.Resampling.BICUBIC}
SIZES = [(61, 83), (40, 33), (7, 5)]  # height and width
VALUE_OPERATIONS = ["autocontrast", "equalize", "invert", "posterize", "solarize", "solarize_add"]
BLEND_OPERATIONS = ["brightness", "color", "contrast", "sharpness"]
GEOMETRIC_OPERATIONS = ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"]
NAMES = VALUE_OPERATIONS + BLEND_OPERATIONS + GEOMETRIC_OPERATIONS


def make_frames(height: int, width: int, num_frames: int = 3) -> np.ndarray:
    """Return frames `(t, h, w, c)` uint8 of waves and noise, each with a different brightness."""
    rng = np.random.default_rng(height)
    t, y, x, c = np.mgrid[:num_frames, :height, :width, :3]
    waves = 110 + 20 * t + (60 - 15 * t) * np.sin(x / (9 + 5 * c) + y / (13 + 3 * c) + t + c)
    return (waves + rng.normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8)


def apply_per_frame(clip: np.ndarray, function) -> np.ndarray:
    """Apply a function of a Pillow image to each frame; return the frames as ints."""
    return np.stack([np.asarray(function(Image.fromarray(frame))) for frame in clip]).astype(int)


def table(function):
    """Return a function that maps every value of a Pillow image by `function`."""
    return lambda image: image.point([function(value) for value in range(256)] * 3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("function", "reference"),
    [
        (image_ops.invert, ImageOps.invert),
        (image_ops.autocontrast, ImageOps.autocontrast),
        (image_ops.equalize, ImageOps.equalize),
        *(
            (lambda x, n=n: image_ops.solarize(x, n), lambda x, n=n: ImageOps.solarize(x, n))
            for n in (0, 76, 128, 256)
        ),
        *(
            (
                lambda x, n=n: image_ops.solarize_add(x, n),
                table(lambda value, n=n: min(value + n, 255) if value < 128 else value),
            )
            for n in (0, 33, 110, 200)
        ),
        *(
            (lambda x, n=n: image_ops.posterize(x, n), lambda x, n=n: ImageOps.posterize(x, n))
            for n in range(1, 9)
        ),
        (lambda x: image_ops.posterize(x, 0), table(lambda value: 0)),
        *(
            (
                lambda x, function=function, factor=factor: function(x, factor),
                lambda x, reference=reference, factor=factor: reference(x).enhance(factor),
            )
            for function, reference in [
                (image_ops.brightness, ImageEnhance.Brightness),
                (image_ops.contrast, ImageEnhance.Contrast),
            ]
            for factor in (0.0, 0.1, 0.46, 1.0, 1.18, 1.9)
        ),
    ],
)
def test_value_operations_equal_pillow(size, function, reference):
    clip = make_frames(*size)
    before = clip.copy()
    np.testing.assert_array_equal(function(clip), apply_per_frame(clip, reference))
    np.testing.assert_array_equal(clip, before)


@pytest.mark.parametrize("factor", [level / 10 * 1.8 + 0.1 for level in range(11)])
@pytest.mark.parametrize("name", ["color", "sharpness"])
def test_blends_equal_pillow_within_one_level(name, factor):
    rng, reference = np.random.default_rng(0), getattr(ImageEnhance, name.title())
    for clip in (make_frames(61, 83), rng.integers(0, 256, (3, 61, 83, 3), np.uint8)):
        expected = apply_per_frame(clip, lambda image: reference(image).enhance(factor))
        difference = np.abs(getattr(image_ops, name)(clip, factor) - expected)
        # With factor 1.18, some exact results are integers. In float32, Pillow may compute slightly
        # less and truncate to the next lower level.
        assert difference.max() <= (1 if factor == pytest.approx(1.18) else 0)
        assert (difference > 0).mean() < 0.001


@pytest.mark.parametrize("values", [[90], [7, 8], [0, 255], [0, 0, 0, 200], range(256)])
@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_histograms_with_few_values_equal_pillow(name, values):
    clip = np.resize(np.array(values, np.uint8), (2, 23, 29, 3))
    expected = apply_per_frame(clip, getattr(ImageOps, name))
    np.testing.assert_array_equal(getattr(image_ops, name)(clip), expected)


def test_equalize_excludes_only_the_highest_value():
    """510 of the 511 pixels are below the highest value, so the step is 510 // 255 = 2 pixels."""
    clip = np.repeat(np.arange(511, dtype=np.uint8)[:, None] % 190, 3, axis=1)
    clip = clip.reshape(1, 7, 73, 3)
    clip[0, 3, 5] = 200
    expected = apply_per_frame(clip, ImageOps.equalize)
    np.testing.assert_array_equal(image_ops.equalize(clip), expected)


def affine(matrix):
    """Return a function of image, argument and interpolation that calls Pillow's `transform`.

    `matrix` returns the coefficients for the argument, the width and the height.
    """
    return lambda image, argument, interpolation: image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix(argument, *image.size),
        resample=PILLOW_FILTERS[interpolation],
        fillcolor=(128, 128, 128),
    )


GEOMETRIC = {
    "shear_x": affine(lambda v, w, h: (1, v, 0, 0, 1, 0)),
    "shear_y": affine(lambda v, w, h: (1, 0, 0, v, 1, 0)),
    "translate_x": affine(lambda v, w, h: (1, 0, v * w, 0, 1, 0)),
    "translate_y": affine(lambda v, w, h: (1, 0, 0, 0, 1, v * h)),
    "rotate": lambda image, v, interpolation: image.rotate(
        v, resample=PILLOW_FILTERS[interpolation], fillcolor=(128, 128, 128)
    ),
}


@pytest.mark.parametrize("size", [(61, 83), (80, 57)])
@pytest.mark.parametrize("interpolation", [LINEAR, CUBIC])
@pytest.mark.parametrize("fraction", [-1.0, -0.37, 0.0, 0.2, 0.9])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_are_close_to_pillow(name, fraction, interpolation, size):
    argument = fraction * {"rotate": 30, "translate_x": 0.45, "translate_y": 0.45}.get(name, 0.3)
    noise = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    for clip in (make_frames(*size), noise):
        actual = getattr(image_ops, name)(clip, argument, interpolation)
        expected = apply_per_frame(
            clip, lambda image: GEOMETRIC[name](image, argument, interpolation)
        )
        difference = np.abs(actual - expected)
        if name == "rotate" and interpolation == CUBIC:
            # The kernels differ, see image_ops.py. Noise differs too much for a bound.
            assert clip is noise or (difference > 2).mean() < 0.01
        else:
            assert difference.max() <= 1
        # The same pixels are filled with grey, so the positions agree to a fraction of a pixel.
        np.testing.assert_array_equal(
            (actual == 128).all(axis=(0, 3)), (expected == 128).all(axis=(0, 3))
        )
        if name != "rotate" and interpolation == CUBIC:
            assert (difference > 0).mean() < 0.01  # the kernel is that of Pillow


def test_policies_match_the_published_ones():
    assert len(autoaugment.AUTOAUGMENT_V0) == 25
    operations = [operation for policy in autoaugment.AUTOAUGMENT_V0 for operation in policy]
    assert len(operations) == 50
    assert round(sum(probability for _, probability, _ in operations), 6) == 29.8
    assert sum(level for _, _, level in operations) == 240
    assert all(probability in np.arange(6) / 5 for _, probability, _ in operations)
    assert all(level in range(11) for _, _, level in operations)
    assert Counter(name for name, _, _ in operations) == {
        "equalize": 12,
        "color": 9,
        "solarize": 8,
        "rotate": 7,
        "shear_y": 4,
        "shear_x": 2,
        "solarize_add": 2,
        "posterize": 2,
        "autocontrast": 2,
        "translate_y": 1,
        "invert": 1,
    }


@pytest.fixture
def calls(monkeypatch) -> list:
    """Replace the operations by stubs; return the list of their calls, (name, arguments)."""
    calls = []

    def make_stub(name):
        def record_call(frames, *arguments):
            calls.append((name, arguments))
            return frames

        return record_call

    operations = {
        name: (make_stub(name), level_to_arguments)
        for name, (_, level_to_arguments) in autoaugment.OPERATIONS.items()
    }
    monkeypatch.setattr(autoaugment, "OPERATIONS", operations)
    return calls


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [
        ("autocontrast", 7, {()}),
        ("equalize", 3, {()}),
        ("invert", 9, {()}),
        ("posterize", 0, {(0,)}),
        ("posterize", 6, {(2,)}),
        ("posterize", 10, {(4,)}),
        ("solarize", 3, {(76,)}),
        ("solarize", 10, {(256,)}),
        ("solarize_add", 3, {(33,)}),
        ("solarize_add", 7, {(77,)}),
        ("solarize_add", 10, {(110,)}),
        ("color", 0, {(0.1,)}),
        ("brightness", 5, {(1.0,)}),
        ("contrast", 10, {(1.9,)}),
        ("sharpness", 9, {(1.72,)}),
        ("rotate", 8, {(s * 24.0, i) for s in (-1, 1) for i in (LINEAR, CUBIC)}),
        ("shear_x", 9, {(s * 0.27, i) for s in (-1, 1) for i in (LINEAR, CUBIC)}),
        ("shear_y", 10, {(s * 0.3, i) for s in (-1, 1) for i in (LINEAR, CUBIC)}),
        ("translate_x", 10, {(s * 0.45, i) for s in (-1, 1) for i in (LINEAR, CUBIC)}),
        ("translate_y", 2, {(s * 0.09, i) for s in (-1, 1) for i in (LINEAR, CUBIC)}),
    ],
)
def test_levels_map_to_arguments(calls, name, level, expected):
    rng = np.random.default_rng(0)
    for _ in range(40):
        autoaugment.apply_operation(np.zeros((1, 4, 4, 3), np.uint8), name, level, rng)
    assert {called_name for called_name, _ in calls} == {name}
    arguments = {tuple(round(x, 9) for x in arguments) for _, arguments in calls}
    assert arguments == {tuple(round(x, 9) for x in arguments) for arguments in expected}


def test_autoaugment_applies_its_operations_with_their_probabilities(calls):
    rng, count = np.random.default_rng(0), 5000
    for _ in range(count):
        autoaugment.autoaugment(np.zeros((1, 4, 4, 3), np.uint8), rng)
    expected = Counter()
    for policy in autoaugment.AUTOAUGMENT_V0:
        for name, probability, _ in policy:
            expected[name] += probability / 25
    counts = Counter(name for name, _ in calls)
    assert set(counts) == {name for name in expected if expected[name]}
    for name, frequency in expected.items():
        assert abs(counts[name] / count - frequency) < 0.027  # four standard deviations
    assert abs(len(calls) / count - 29.8 / 25) < 0.04  # four standard deviations


def test_randaugment_applies_every_operation_equally_often(calls):
    rng = np.random.default_rng(0)
    for _ in range(1000):
        autoaugment.randaugment(np.zeros((1, 4, 4, 3), np.uint8), rng, num_layers=3, magnitude=9)
    counts = Counter(name for name, _ in calls)
    assert sorted(counts) == sorted(NAMES)
    assert max(abs(n - 200) for n in counts.values()) < 56  # four standard deviations
    assert {arguments for name, arguments in calls if name == "posterize"} == {(3,)}


def test_randaugment_magnitude_is_validated():
    for magnitude in (11, 10.01, -0.01):
        with pytest.raises(ValueError, match=f"randaugment_magnitude={magnitude}: must be 0 to 10"):
            autoaugment.randaugment(
                make_frames(5, 5), np.random.default_rng(0), num_layers=1, magnitude=magnitude
            )
    for magnitude in (0, 0.5, 10):
        autoaugment.randaugment(
            make_frames(5, 5), np.random.default_rng(0), num_layers=1, magnitude=magnitude
        )


AUGMENTATIONS = {
    "autoaugment": autoaugment.autoaugment,
    "randaugment": lambda x, rng: autoaugment.randaugment(x, rng, num_layers=2, magnitude=9),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_all_frames_of_a_clip_are_augmented_identically(name):
    clip = np.repeat(make_frames(24, 31, 1), 4, axis=0)
    before, changed = clip.copy(), 0
    for seed in range(50):
        result = AUGMENTATIONS[name](clip, np.random.default_rng(seed))
        assert (result.shape, result.dtype) == (clip.shape, np.uint8)
        assert (result == result[:1]).all()
        changed += (result != clip).any()
    assert changed > 25
    np.testing.assert_array_equal(clip, before)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_depends_on_the_seed(name):
    clip = make_frames(24, 31)
    runs = [
        [AUGMENTATIONS[name](clip, np.random.default_rng(s)) for s in range(8)] for _ in range(2)
    ]
    np.testing.assert_array_equal(*runs)
    assert len({result.tobytes() for result in runs[0]}) > 4


@pytest.mark.parametrize("name", NAMES)
def test_operations_accept_array_views(name):
    """Arrays of cropped, mirrored or transposed clips are not contiguous."""
    mirrored = make_frames(30, 41)[:, 3:27, 4:35][:, :, ::-1]
    for clip in (mirrored, mirrored.swapaxes(1, 2)):
        for level in (2, 9):
            actual, expected = (
                autoaugment.apply_operation(x, name, level, np.random.default_rng(0))
                for x in (clip, np.ascontiguousarray(clip))
            )
            np.testing.assert_array_equal(actual, expected)
