"""Random erasing, mixup and CutMix of normalized clips, on the device.

The functions are pure and can be jitted. `alpha`, `area` and `aspect` must be Python numbers, not
traced arrays.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

_ERASE_ATTEMPTS = 10


def draw_boxes(
    shape: tuple[int, int, int],
    key: jax.Array,
    probability: float,
    *,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> jax.Array:
    """Draw a box for some clips, which is erased in all frames (Zhong et al., arXiv:1708.04896).

    Args:
        shape: Number of clips, height and width of their frames, `(b, h, w)`.
        key: Random key for the choice of clips and boxes.
        probability: Probability that a clip is selected for erasing.
        area: Range of a box's area, as a share of the frame's area. It is drawn uniformly.
        aspect: Range of a box's height / width. Its logarithm is drawn uniformly.

    Returns:
        A mask `(b, h, w)` that is True for the pixels in the box of a clip. Ten box sizes are drawn
        for each clip, and the first one that fits into the frame is used. A selected clip has no
        box if none of its ten sizes fits.
    """
    b, h, w = shape
    key_boxes, key_places = jax.random.split(key)
    draws = jax.random.uniform(key_boxes, (2, b, _ERASE_ATTEMPTS))
    pixels = h * w * (area[0] + (area[1] - area[0]) * draws[0])  # (b attempts)
    log_aspect = math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * draws[1]
    heights = jnp.round(jnp.sqrt(pixels * jnp.exp(log_aspect)))
    widths = jnp.round(jnp.sqrt(pixels * jnp.exp(-log_aspect)))
    fits = (heights <= h) & (widths <= w)
    first = fits.argmax(axis=1, keepdims=True)
    height = jnp.take_along_axis(heights, first, axis=1)[:, 0]
    width = jnp.take_along_axis(widths, first, axis=1)[:, 0]  # (b,)
    happens, down, right = jax.random.uniform(key_places, (3, b))
    happens = (happens < probability) & fits.any(axis=1)
    top = jnp.floor(down * (h - height + 1))
    left = jnp.floor(right * (w - width + 1))
    rows = _between(h, top, top + height)[:, :, None]
    columns = _between(w, left, left + width)[:, None, :]
    return rows & columns & happens[:, None, None]


def erase(video: jax.Array, boxes: jax.Array) -> jax.Array:
    """Set the boxes `(b, h, w)` of `draw_boxes` to zero in the clips `(b, t, h, w, c)`."""
    return jnp.where(boxes[:, None, :, :, None], 0, video)


def draw_permutation(key: jax.Array, size: int, groups: int) -> jax.Array:
    """Draw a permutation that exchanges elements only within consecutive groups of equal size.

    Args:
        key: Random key.
        size: Number of elements; a multiple of `groups`.
        groups: Number of groups.

    Returns:
        `(size,)` indices.
    """
    if groups == 1:
        return jax.random.permutation(key, size)
    length = size // groups
    permute = jax.vmap(lambda key: jax.random.permutation(key, length))
    starts = length * jnp.arange(groups)[:, None]
    return (permute(jax.random.split(key, groups)) + starts).reshape(size)


def permute(x: jax.Array, permutation: jax.Array, groups: int) -> jax.Array:
    """Return `x[permutation]` for a permutation of `draw_permutation`.

    If every group is on one device, no data is exchanged between devices.
    """
    length = len(x) // groups
    rows = permutation.reshape(groups, length) % length
    grouped = x.reshape(groups, length, *x.shape[1:])
    return jax.vmap(lambda x, rows: x[rows])(grouped, rows).reshape(x.shape)


def mixup(
    video: jax.Array,
    key: jax.Array,
    alpha: float,
    *,
    groups: int,
    partners: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Blend each clip with another clip of the batch (Zhang et al., arXiv:1710.09412).

    Args:
        video: `(b, t, h, w, c)`, floats.
        key: Random key for the permutation and λ.
        alpha: λ is drawn from Beta(alpha, alpha), once per batch; 0: no mixing.
        groups: Clips are mixed within this number of groups, see `draw_permutation`.
        partners: Function that returns `video[permutation]` for a permutation.

    Returns:
        `λ · video + (1 - λ) · video[permutation]`; the permutation, `(b,)` integers; and λ. The
        loss must be mixed with the same weights: λ for the labels and 1 - λ for
        `labels[permutation]`.
    """
    if not alpha:
        return video, jnp.arange(len(video)), jnp.ones(())
    key_lam, key_permutation = jax.random.split(key)
    lam = jax.random.beta(key_lam, alpha, alpha)
    permutation = draw_permutation(key_permutation, len(video), groups)
    mixed = lam * video + (1 - lam) * partners(permutation)
    return mixed.astype(video.dtype), permutation, lam


def cutmix(
    video: jax.Array,
    key: jax.Array,
    alpha: float,
    *,
    groups: int,
    partners: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Paste a box of another clip into all frames of each clip (Yun et al., arXiv:1905.04899).

    Args:
        video: `(b, t, h, w, c)`.
        key: Random key for the permutation, λ and the position of the box.
        alpha: λ is drawn from Beta(alpha, alpha), once per batch; 0: no mixing.
        groups: As in `mixup`.
        partners: As in `mixup`.

    Returns:
        The clips; the permutation, `(b,)` indices of the clips that the boxes are copied from; and
        λ, the share of pixels that stay unchanged. The box has the frame's aspect ratio and covers
        a share 1 - λ of the frame for the λ that was drawn. It is cut off at the edges of the
        frame, and the returned λ is corrected for that. The loss must be mixed as in `mixup`.
    """
    if not alpha:
        return video, jnp.arange(len(video)), jnp.ones(())
    _, _, h, w, _ = video.shape
    key_lam, key_permutation, key_place = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(key_lam, alpha, alpha))  # of the box, relative to the frame
    permutation = draw_permutation(key_permutation, len(video), groups)
    height, width = jnp.floor(side * h), jnp.floor(side * w)
    down, right = jax.random.uniform(key_place, (2,))  # centre of the box
    top = jnp.floor(down * h) - height // 2
    left = jnp.floor(right * w) - width // 2
    rows, columns = _between(h, top, top + height), _between(w, left, left + width)
    lam = 1 - rows.sum() * columns.sum() / (h * w)
    box = (rows[:, None] & columns[None])[None, None, :, :, None]
    return jnp.where(box, partners(permutation), video), permutation, lam


def _between(size: int, start: jax.Array, stop: jax.Array) -> jax.Array:
    """Return a mask of the pixels in [start, stop).

    Args:
        size: Number of pixels.
        start: First pixel, `()` or `(b,)`.
        stop: The pixel after the last one, with the shape of `start`.

    Returns:
        Booleans, `(size,)` or `(b, size)`.
    """
    pixels = jnp.arange(size)
    if start.ndim:
        pixels, start, stop = pixels[None], start[:, None], stop[:, None]
    return (pixels >= start) & (pixels < stop)
