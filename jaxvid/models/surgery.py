"""Changes to weights that let a model run where it was not trained: another resolution."""

import jax
import jax.numpy as jnp


def resize_pos_embed(pos_embed: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Resizes the patch grid of a positional embedding bicubically, as PyTorch does.

    `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`: a = -0.75, half-pixel
    centres, no antialiasing. The class token's row is kept.

    Args:
        pos_embed: `(1, 1 + s·s, d)`: the class token, then a square grid in row-major order.
        grid: Rows and columns of the new patch grid.

    Returns:
        `(1, 1 + rows·columns, d)`; `pos_embed` itself where the grid does not change.
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
