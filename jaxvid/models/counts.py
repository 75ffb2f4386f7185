"""Parameter and multiply-add counts of the layers that families are built from."""


def linear_params(fan_in: int, fan_out: int, *, bias: bool = True) -> int:
    """Return the number of parameters of a Linear layer."""
    return fan_in * fan_out + bias * fan_out


def block_params(width: int, hidden: int, *, qkv_bias: bool = True) -> int:
    """Return the number of parameters of a transformer block, including its two norms."""
    attention = linear_params(width, 3 * width, bias=qkv_bias) + linear_params(width, width)
    return attention + linear_params(width, hidden) + linear_params(hidden, width) + 4 * width


def block_multiply_adds(
    num_tokens: int, width: int, hidden: int, *, attention: bool, num_keys: int | None = None
) -> int:
    """Return the multiply-adds of the matrix products in a transformer block.

    Args:
        num_tokens: Number of tokens that the block computes.
        width: Token width.
        hidden: Hidden width of the MLP.
        attention: Whether to count the attention products, q·kᵀ and weights·v, too.
        num_keys: Number of keys that each token attends to; None: `num_tokens`.
    """
    count = num_tokens * (4 * width * width + 2 * width * hidden)
    num_keys = num_tokens if num_keys is None else num_keys
    return count + attention * 2 * num_tokens * num_keys * width
