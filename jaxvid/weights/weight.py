"""A weight in a file, whose shape and dtype are known before its values are read."""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

FLOATS = {  # name of a supported dtype → dtype
    **{name: np.dtype(name) for name in ("float16", "float32", "float64")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight in a file.

    Attributes:
        shape: Shape in the header of the file.
        dtype: Name of the dtype in the header. Call `read` only if it is in `FLOATS`.
        read: Function that reads and returns the values.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Weight":
        """Return the weight with a changed layout, without reading it.

        Args:
            change: A transposition or a reshape.

        Raises:
            ValueError, IndexError: `change` cannot be applied to the shape.
        """
        shape = change(np.broadcast_to(np.float32(0), self.shape)).shape
        return Weight(shape, self.dtype, lambda: change(self.read()))


def concatenate(weights: list[Weight]) -> Weight:
    """Concatenate weights along the first axis, without reading them.

    Raises:
        ValueError: The other axes or the dtypes differ.
        IndexError: A weight has no axes.
    """
    if len({(weight.shape[1:], weight.dtype) for weight in weights}) > 1:
        raise ValueError("the parts have different shapes or dtypes")
    shape = (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:])
    read = lambda: np.concatenate([weight.read() for weight in weights])  # noqa: E731
    return Weight(shape, weights[0].dtype, read)
