"""Reader of frames that are already in memory."""

from collections.abc import Iterable, Iterator

import numpy as np


class FrameArray:
    """Frames in memory. It implements the protocol `VideoReader`.

    Args:
        frames: `(t, h, w, c)` uint8, RGB.
        fps: Frames per second, or None if unknown.

    Attributes:
        num_frames: Number of frames.
        fps: Frames per second, or None if unknown.
        times: None: the frame rate is constant.
    """

    times = None

    def __init__(self, frames: np.ndarray, fps: float | None = None):
        self._frames, self.num_frames, self.fps = frames, len(frames), fps

    def get_frames(self, indices: Iterable[int]) -> np.ndarray:
        """Return the frames `(t, h, w, c)` with these numbers.

        Raises:
            IndexError: A frame number is out of range.
        """
        return self._frames[np.fromiter(indices, int)]

    def iter_frames(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """Yield the frames `(h, w, c)` with these numbers.

        Raises:
            IndexError: A frame number is out of range.
        """
        for i in indices:
            yield self._frames[i]

    def __enter__(self) -> "FrameArray":
        return self

    def __exit__(self, *_) -> None:
        pass
