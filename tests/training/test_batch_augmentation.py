"""Random erasing, mixup and CutMix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.training.batch_augmentation import cutmix, erase, mixup

B, T, H, W = 8, 2, 32, 40
ALPHA = 0.4

# Each compiles once for all tests: they all use clips of one shape.
erase_jit = jax.jit(erase)
mix_jit = {mix: jax.jit(mix, static_argnums=2) for mix in (mixup, cutmix)}


def numbered() -> np.ndarray:
    """Clips whose values are all different from each other, and none of them zero."""
    return np.arange(1, B * T * H * W * 3 + 1, dtype=np.float32).reshape(B, T, H, W, 3) / 1e5


@pytest.fixture(scope="module")
def erased() -> np.ndarray:
    """Where 2048 clips were erased, with probability 1: `(b, t, h, w, c)`."""
    keys = jax.random.split(jax.random.key(0), 2048 // B)
    return np.concatenate([np.asarray(erase_jit(numbered(), key, 1.0)) == 0 for key in keys])


def test_erased_boxes_are_the_same_in_all_frames_and_channels(erased):
    assert (erased == erased[:, :1, :, :, :1]).all()
    boxes = erased[:, 0, :, :, 0]
    rows, columns = boxes.any(axis=2), boxes.any(axis=1)
    assert (boxes == rows[:, :, None] & columns[:, None, :]).all()
    for edge in (rows, columns):  # in one piece
        assert (np.abs(np.diff(np.pad(edge, ((0, 0), (1, 1))).astype(int))).sum(axis=1) == 2).all()


def test_erased_boxes_have_the_requested_sizes_and_aspects(erased):
    boxes = erased[:, 0, :, :, 0]
    heights, widths = boxes.any(axis=2).sum(axis=1), boxes.any(axis=1).sum(axis=1)
    share = heights * widths / (H * W)
    # Sides are rounded to pixels, and the shortest have 3.
    assert 0.02 * 5 / 6 < share.min() < 0.03
    assert 0.3 < share.max() < 0.35
    assert 0.15 < share.mean() < 0.19  # uniform: 0.177, and what does not fit is large
    log_aspect = np.log(heights / widths)
    assert np.abs(log_aspect).max() < np.log(1 / 0.3) + 0.25
    assert abs(log_aspect.mean()) < 0.12  # σ = 0.7 over √2048 is 0.015; a wider frame shifts it
    assert 0.55 < log_aspect.std() < 0.75  # uniform: 2·ln(1/0.3)/√12 = 0.695
    # Size and shape are drawn apart; what does not fit is large, and rather high than wide.
    assert abs(np.corrcoef(share, log_aspect)[0, 1]) < 0.2
    rows, columns = boxes.any(axis=2).mean(axis=0), boxes.any(axis=1).mean(axis=0)
    assert min(rows[0], rows[-1], columns[0], columns[-1]) > 0.01  # every edge is reached
    # No end is preferred. Four standard deviations: 4·√(2·¼/2048) = 0.06.
    np.testing.assert_allclose(rows, rows[::-1], atol=0.06)
    np.testing.assert_allclose(columns, columns[::-1], atol=0.06)


def test_erasing_has_its_probability():
    video, count = numbered(), 0
    for key in jax.random.split(jax.random.key(1), 100):
        result = np.asarray(erase_jit(video, key, 0.3))
        assert ((result == 0) | (result == video)).all()
        count += (result == 0).any(axis=(1, 2, 3, 4)).sum()
    assert abs(count / 800 - 0.3) < 0.065  # four standard deviations
    np.testing.assert_array_equal(erase_jit(video, jax.random.key(1), 0.0), video)


def test_erasing_skips_boxes_that_do_not_fit():
    video = numbered()
    whole = erase(video, jax.random.key(0), 1.0, area=(1.0, 1.0), aspect=(1.0, 1.0))  # 36 × 36
    np.testing.assert_array_equal(whole, video)
    frame = erase(video, jax.random.key(0), 1.0, area=(1.0, 1.0), aspect=(H / W, H / W))
    np.testing.assert_array_equal(frame, np.zeros_like(video))  # it just fits


def test_erasing_takes_the_first_box_that_fits_in_each_clip():
    """Of boxes that cover 0.9 of the frame one in ten fits, so that about a third has none."""
    large = jax.jit(functools.partial(erase, area=(0.9, 0.9)))  # happens in half of the clips
    shares = []
    for key in jax.random.split(jax.random.key(2), 60):
        gone = np.asarray(large(numbered(), key))[:, 0, :, :, 0] == 0
        shares += gone.mean(axis=(1, 2)).tolist()
    shares = np.array(shares)
    assert 0.22 < (shares > 0).mean() < 0.45
    # A box that sticks out of the frame would cover less.
    np.testing.assert_allclose(shares[shares > 0], 0.9, atol=0.03)


def test_erased_boxes_lie_anywhere_inside_the_frame():
    """Boxes of a quarter of the frame and its shape: all have half of its sides."""
    quarter = jax.jit(functools.partial(erase, area=(0.25, 0.25), aspect=(H / W, H / W)))
    corners = set()
    for key in jax.random.split(jax.random.key(8), 60):
        for gone in np.asarray(quarter(numbered(), key))[:, 0, :, :, 0] == 0:
            if gone.any():
                assert (gone.any(axis=1).sum(), gone.any(axis=0).sum()) == (H // 2, W // 2)
                corners.add((int(gone.any(axis=1).argmax()), int(gone.any(axis=0).argmax())))
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


@pytest.mark.parametrize("function", [erase, lambda *x: mixup(*x, ALPHA), lambda *x: cutmix(*x, 1)])
def test_the_dtype_is_kept(function):
    video = jax.ShapeDtypeStruct((B, T, H, W, 3), jnp.bfloat16)
    result = jax.tree.leaves(jax.eval_shape(function, video, jax.random.key(0)))[0]
    assert (result.dtype, result.shape) == (video.dtype, video.shape)


def test_mixup_is_the_weighted_sum_of_the_partners():
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


def test_cutmix_lambda_is_the_share_of_own_pixels():
    video = numbered()
    lams, shares = [], np.zeros((H, W))
    for key in jax.random.split(jax.random.key(0), 200):
        mixed, permutation, lam = (np.asarray(x) for x in mix_jit[cutmix](video, key, ALPHA))
        own = mixed == video
        assert (own | (mixed == video[permutation])).all()
        own = own[permutation != np.arange(B)]
        assert (own == own[:1, :1, :, :, :1]).all()  # the same box everywhere
        np.testing.assert_allclose(lam, own.mean(), atol=1e-6)
        box = ~own[0, 0, :, :, 0]
        assert (box == box.any(axis=1)[:, None] & box.any(axis=0)[None]).all()
        lams.append(float(lam))
        shares += box
    # λ's mean is ½ before the edges cut boxes off, which can only raise it.
    assert 0.5 < np.mean(lams) < 0.75
    assert max(lams) > 0.99
    assert min(lams) < 0.3
    assert shares[[0, 0, -1, -1], [0, -1, 0, -1]].min() > 0  # every corner is reached


@pytest.mark.parametrize(
    ("draws", "rows", "columns"),
    [
        ((0.5, 0.5), range(9, 24), range(11, 30)),  # centred on (16, 20)
        ((0.0, 0.999), range(0, 8), range(30, 40)),  # on (0, 39): cut off at the edges
        ((0.999, 0.25), range(24, 32), range(1, 20)),
    ],
)
def test_cutmix_boxes_are_centred_on_their_draw_and_cut_off_at_the_edges(
    draws, rows, columns, monkeypatch
):
    monkeypatch.setattr(jax.random, "beta", lambda *_: jnp.float32(1 - 0.48**2))  # 15 × 19 pixels
    monkeypatch.setattr(jax.random, "uniform", lambda *_: jnp.float32(draws))
    monkeypatch.setattr(jax.random, "permutation", lambda *_: jnp.arange(B)[::-1])
    video = numbered()
    mixed, permutation, lam = cutmix(video, jax.random.key(0), ALPHA)
    expected = video.copy()
    box = np.s_[:, :, rows.start : rows.stop, columns.start : columns.stop]
    expected[box] = video[::-1][box]
    np.testing.assert_array_equal(mixed, expected)
    np.testing.assert_array_equal(permutation, np.arange(B)[::-1])
    assert float(lam) == pytest.approx(1 - len(rows) * len(columns) / (H * W))
