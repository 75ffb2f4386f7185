"""A weight in a file: shape and dtype are known from the header, values are read on demand."""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

FLOATS = {
    **{name: np.dtype(name) for name in ("float16", "float32", "float64")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight in a file.

    Attributes:
        shape: Shape in the header.
        dtype: Name of the dtype in the header. `read` supports those in `FLOATS`.
        read: Reads the values.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Weight":
        """Return the weight in another layout.

        Args:
            change: A transposition or a reshape.

        Raises:
            ValueError: `change` does not apply to the shape.
        """
        shape = change(np.broadcast_to(np.float32(0), self.shape)).shape
        return Weight(shape, self.dtype, lambda: change(self.read()))


def concatenate(weights: list[Weight]) -> Weight:
    """Concatenate weights along the first axis, without reading them.

    Raises:
        ValueError: The other axes or the dtypes differ.
    """
    if len({(weight.shape[1:], weight.dtype) for weight in weights}) > 1:
        raise ValueError("parts of different shapes")
    shape = (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:])
    read = lambda: np.concatenate([weight.read() for weight in weights])  # noqa: E731
    return Weight(shape, weights[0].dtype, read)
