"""Resize embeddings to a different patch grid or number of frames."""

import jax
import jax.numpy as jnp


def resize_pos_embed(pos_embed: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Resize the patch grid of a positional embedding bicubically, as PyTorch does.

    The result equals `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`, with
    a = -0.75, half-pixel centres and no antialiasing. The class token's row is unchanged.

    Args:
        pos_embed: `(1, 1 + s·s, d)`: the class token, then a square grid in row-major order.
        grid: Rows and columns of the new patch grid.

    Returns:
        `(1, 1 + rows·columns, d)`; `pos_embed` itself if the grid does not change.
    """
    _, n, d = pos_embed.shape
    side = round((n - 1) ** 0.5)
    if grid == (side, side):
        return pos_embed
    cls_row, patches = pos_embed[:, :1], pos_embed[:, 1:].reshape(1, side, side, d)
    patches = jax.image.resize(
        patches, (1, *grid, d), jax.image.ResizeMethod.CUBIC_PYTORCH, antialias=False
    )
    return jnp.concatenate([cls_row, patches.reshape(1, -1, d)], axis=1)  # (1 n d)


def resize_time(embed: jax.Array, num_frames: int, *, leading_rows: int) -> jax.Array:
    """Resize the frames' rows of an embedding linearly: half-pixel centres, no antialiasing.

    Positions outside of the centres of the first and last row get a copy of the nearer of the two.
    A single row is therefore copied to all frames.

    Args:
        embed: `(1, leading_rows + t, ...)`.
        num_frames: New number of frames.
        leading_rows: Number of rows before the frames' rows, e.g. 1 for a class token. They are
            unchanged.

    Returns:
        `(1, leading_rows + num_frames, ...)`.
    """
    shape = (1, num_frames, *embed.shape[2:])
    frames = jax.image.resize(embed[:, leading_rows:], shape, "linear", antialias=False)
    return jnp.concatenate([embed[:, :leading_rows], frames], axis=1)
