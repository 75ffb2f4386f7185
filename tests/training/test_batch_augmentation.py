"""Random erasing, mixup and CutMix on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.training.batch_augmentation import (
    cutmix,
    draw_boxes,
    draw_permutation,
    erase,
    mixup,
    permute,
)

B, T, H, W = 8, 2, 32, 40
ALPHA = 0.4


# Compiled once: all tests use clips of the same shape.
def erase_clips(video, key, probability, **options):
    """Draw boxes and erase them."""
    b, _, h, w, _ = video.shape
    return erase(video, draw_boxes((b, h, w), key, probability, **options))


def mix_clips(video, key, alpha, *, mix):
    """Mix the clips of a batch that is a single group."""
    return mix(video, key, alpha, groups=1, partners=lambda permutation: video[permutation])


erase_jit = jax.jit(erase_clips)
mix_jit = {
    mix: jax.jit(functools.partial(mix_clips, mix=mix), static_argnums=2) for mix in (mixup, cutmix)
}


def numbered() -> np.ndarray:
    """Return clips with unique, non-zero values."""
    return np.arange(1, B * T * H * W * 3 + 1, dtype=np.float32).reshape(B, T, H, W, 3) / 1e5


@pytest.fixture(scope="module")
def erased() -> np.ndarray:
    """Return the mask `(2048, t, h, w, c)` of erased pixels, with an erasing probability of 1."""
    keys = jax.random.split(jax.random.key(0), 2048 // B)
    return np.concatenate([np.asarray(erase_jit(numbered(), key, 1.0)) == 0 for key in keys])


def test_erased_boxes_are_the_same_in_all_frames_and_channels(erased):
    assert (erased == erased[:, :1, :, :, :1]).all()
    boxes = erased[:, 0, :, :, 0]
    rows, columns = boxes.any(axis=2), boxes.any(axis=1)
    assert (boxes == rows[:, :, None] & columns[:, None, :]).all()
    for mask in (rows, columns):  # each clip has a single run of erased rows or columns
        assert (np.abs(np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(int))).sum(axis=1) == 2).all()


def test_erased_boxes_have_the_requested_sizes_and_aspect_ratios(erased):
    boxes = erased[:, 0, :, :, 0]
    heights, widths = boxes.any(axis=2).sum(axis=1), boxes.any(axis=1).sum(axis=1)
    share = heights * widths / (H * W)
    # The tolerances allow for the rounding of sides to pixels. The shortest sides have 3 pixels.
    assert 0.02 * 5 / 6 < share.min() < 0.03
    assert 0.3 < share.max() < 0.35
    # A uniform distribution has the mean 0.177. It is lower here, as some large boxes do not fit.
    assert 0.15 < share.mean() < 0.19
    log_aspect = np.log(heights / widths)
    assert np.abs(log_aspect).max() < np.log(1 / 0.3) + 0.25
    # The standard error is 0.7/√2048 = 0.015, but the frame is not square, which shifts the mean.
    assert abs(log_aspect.mean()) < 0.12
    assert 0.55 < log_aspect.std() < 0.75  # of a uniform distribution: 2·ln(1/0.3)/√12 = 0.695
    # Area and aspect ratio are drawn independently. A slight correlation remains, because large
    # boxes that are too high or too wide are rejected, and the frame is not square.
    assert abs(np.corrcoef(share, log_aspect)[0, 1]) < 0.2
    rows, columns = boxes.any(axis=2).mean(axis=0), boxes.any(axis=1).mean(axis=0)
    assert min(rows[0], rows[-1], columns[0], columns[-1]) > 0.01  # every edge is reached
    # The positions are distributed symmetrically. The tolerance is four standard deviations:
    # 4·√(2·¼/2048) = 0.06.
    np.testing.assert_allclose(rows, rows[::-1], atol=0.06)
    np.testing.assert_allclose(columns, columns[::-1], atol=0.06)


def test_clips_are_erased_with_the_given_probability():
    video, count = numbered(), 0
    for key in jax.random.split(jax.random.key(1), 100):
        result = np.asarray(erase_jit(video, key, 0.3))
        assert ((result == 0) | (result == video)).all()
        count += (result == 0).any(axis=(1, 2, 3, 4)).sum()
    assert abs(count / 800 - 0.3) < 0.065  # four standard deviations
    np.testing.assert_array_equal(erase_jit(video, jax.random.key(1), 0.0), video)


def test_erasing_skips_boxes_that_do_not_fit():
    video = numbered()
    # The boxes have 36 × 36 pixels, but the frame is only 32 pixels high.
    unchanged = erase_clips(video, jax.random.key(0), 1.0, area=(1.0, 1.0), aspect=(1.0, 1.0))
    np.testing.assert_array_equal(unchanged, video)
    full_frame = erase_clips(video, jax.random.key(0), 1.0, area=(1.0, 1.0), aspect=(H / W, H / W))
    np.testing.assert_array_equal(full_frame, np.zeros_like(video))


def test_erasing_takes_the_first_box_that_fits_in_each_clip():
    """Boxes have 0.9 of the frame's area, and about one in nine fits into the frame.

    Half of the clips are selected. For 0.69 of these, at least one of ten boxes fits, so that 0.35
    of all clips are erased.
    """
    large = jax.jit(functools.partial(erase_clips, probability=0.5, area=(0.9, 0.9)))
    shares = []
    for key in jax.random.split(jax.random.key(2), 60):
        boxes = np.asarray(large(numbered(), key))[:, 0, :, :, 0] == 0
        shares += boxes.mean(axis=(1, 2)).tolist()
    shares = np.array(shares)
    assert 0.22 < (shares > 0).mean() < 0.45
    # A box that sticks out of the frame would cover less.
    np.testing.assert_allclose(shares[shares > 0], 0.9, atol=0.03)


def test_erased_boxes_lie_anywhere_inside_the_frame():
    """Boxes of a quarter of the frame's area and the same aspect ratio have half its sides."""
    options = {"area": (0.25, 0.25), "aspect": (H / W, H / W)}
    quarter = jax.jit(functools.partial(erase_clips, probability=0.5, **options))
    corners = set()
    for key in jax.random.split(jax.random.key(8), 60):
        for box in np.asarray(quarter(numbered(), key))[:, 0, :, :, 0] == 0:
            if box.any():
                assert (box.any(axis=1).sum(), box.any(axis=0).sum()) == (H // 2, W // 2)
                corners.add((int(box.any(axis=1).argmax()), int(box.any(axis=0).argmax())))
    assert {top for top, _ in corners} == set(range(H // 2 + 1))
    assert {left for _, left in corners} == set(range(W // 2 + 1))


def test_erasing_depends_on_its_key():
    first, again, other = (erase_jit(numbered(), jax.random.key(seed), 1.0) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_alpha_zero_changes_nothing(mix):
    mixed, permutation, lam = mix_jit[mix](numbered(), jax.random.key(0), 0.0)
    np.testing.assert_array_equal(mixed, numbered())
    np.testing.assert_array_equal(permutation, np.arange(B))
    assert lam == 1


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_mixing_depends_on_its_key(mix):
    first, again, other = (mix_jit[mix](numbered(), jax.random.key(i), ALPHA) for i in (0, 0, 1))
    for x, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(x, same)
    assert sorted(first[1].tolist()) == list(range(B))
    assert (first[1] != other[1]).any()
    assert first[2] != other[2]
    partners = {int(mix_jit[mix](numbered(), jax.random.key(i), ALPHA)[1][0]) for i in range(12)}
    assert max(partners) >= B // 2


@pytest.mark.parametrize(
    "function",
    [
        lambda *x: erase_clips(*x, 0.5),
        lambda *x: mix_clips(*x, ALPHA, mix=mixup),
        lambda *x: mix_clips(*x, 1, mix=cutmix),
    ],
)
def test_the_dtype_and_shape_are_preserved(function):
    video = jax.ShapeDtypeStruct((B, T, H, W, 3), jnp.bfloat16)
    result = jax.tree.leaves(jax.eval_shape(function, video, jax.random.key(0)))[0]
    assert (result.dtype, result.shape) == (video.dtype, video.shape)


def test_mixup_is_the_weighted_sum_of_each_clip_and_its_partner():
    video = numbered()
    mixed, permutation, lam = mix_jit[mixup](video, jax.random.key(5), ALPHA)
    assert 0.01 < lam < 0.99
    expected = lam * video + (1 - lam) * video[permutation]
    np.testing.assert_allclose(mixed, expected, rtol=1e-6)


def test_mixup_lambda_follows_the_beta_distribution():
    keys = jax.random.split(jax.random.key(0), 1000)
    lam = np.array([mix_jit[mixup](numbered(), key, ALPHA)[2] for key in keys])
    assert abs(lam.mean() - 0.5) < 0.05  # σ / √1000 = 0.012
    assert abs(lam.var() - 1 / (4 * (2 * ALPHA + 1))) < 0.015
    assert 0 <= lam.min() < 0.01
    assert 0.99 < lam.max() <= 1


def test_cutmix_lambda_is_the_share_of_unchanged_pixels():
    video = numbered()
    lams, coverage = [], np.zeros((H, W))
    for key in jax.random.split(jax.random.key(0), 200):
        mixed, permutation, lam = (np.asarray(x) for x in mix_jit[cutmix](video, key, ALPHA))
        unchanged = mixed == video
        assert (unchanged | (mixed == video[permutation])).all()
        unchanged = unchanged[permutation != np.arange(B)]  # leave out clips mixed with themselves
        # The box is the same in all clips, frames and channels.
        assert (unchanged == unchanged[:1, :1, :, :, :1]).all()
        np.testing.assert_allclose(lam, unchanged.mean(), atol=1e-6)
        box = ~unchanged[0, 0, :, :, 0]
        assert (box == box.any(axis=1)[:, None] & box.any(axis=0)[None]).all()
        lams.append(float(lam))
        coverage += box
    # The mean of λ is ½ before boxes are cut off at the edges, which can only increase λ.
    assert 0.5 < np.mean(lams) < 0.75
    assert max(lams) > 0.99
    assert min(lams) < 0.3
    assert coverage[[0, 0, -1, -1], [0, -1, 0, -1]].min() > 0  # every corner is reached


@pytest.mark.parametrize(
    ("draws", "rows", "columns"),
    [
        ((0.5, 0.5), range(9, 24), range(11, 30)),  # centred on (16, 20)
        ((0.0, 0.999), range(0, 8), range(30, 40)),  # centred on (0, 39): cut off at the edges
        ((0.999, 0.25), range(24, 32), range(1, 20)),
    ],
)
def test_cutmix_boxes_are_centred_on_their_draw_and_cut_off_at_the_edges(
    draws, rows, columns, monkeypatch
):
    monkeypatch.setattr(jax.random, "beta", lambda *_: jnp.float32(1 - 0.48**2))  # box of 15 × 19
    monkeypatch.setattr(jax.random, "uniform", lambda *_: jnp.float32(draws))
    monkeypatch.setattr(jax.random, "permutation", lambda *_: jnp.arange(B)[::-1])
    video = numbered()
    mixed, permutation, lam = mix_clips(video, jax.random.key(0), ALPHA, mix=cutmix)
    expected = video.copy()
    box = np.s_[:, :, rows.start : rows.stop, columns.start : columns.stop]
    expected[box] = video[::-1][box]
    np.testing.assert_array_equal(mixed, expected)
    np.testing.assert_array_equal(permutation, np.arange(B)[::-1])
    assert float(lam) == pytest.approx(1 - len(rows) * len(columns) / (H * W))


def test_permutations_stay_within_groups():
    for groups in (1, 2, 4):
        permutations = np.array(
            [draw_permutation(jax.random.key(seed), 8, groups) for seed in range(20)]
        )
        assert (np.sort(permutations) == np.arange(8)).all()
        assert (permutations * groups // 8 == np.arange(8) * groups // 8).all()
        assert len(np.unique(permutations, axis=0)) > 5
        if groups > 1:  # every group has a permutation of its own
            first, second = permutations[:, : 8 // groups], permutations[:, 8 // groups :]
            assert (first != second[:, : 8 // groups] - 8 // groups).any()
        x = np.random.default_rng(0).integers(0, 255, (8, 3), np.uint8)
        for permutation in permutations:
            np.testing.assert_array_equal(permute(x, permutation, groups), x[permutation])


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_clips_are_mixed_with_partners_of_their_group(mix):
    video = numbered()
    mixed, permutation, lam = mix(
        video,
        jax.random.key(5),
        ALPHA,
        groups=B // 2,
        partners=lambda permutation: -video[permutation],
    )
    np.testing.assert_array_equal(permutation // 2, np.arange(B) // 2)
    assert (permutation != np.arange(B)).any()
    if mix is mixup:
        np.testing.assert_allclose(mixed, lam * video - (1 - lam) * video[permutation], rtol=1e-5)
    else:
        assert ((mixed == video) | (mixed == -video[permutation])).all()
        assert (np.asarray(mixed) < 0).mean() == pytest.approx(1 - float(lam))
