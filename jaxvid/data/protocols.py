"""The interface between data sources and the rest of jaxvid: `VideoRecord` and `VideoReader`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from jaxvid.data.label_sets import Label


class VideoReader(Protocol):
    """An open video: a context manager with random access to frames. It is not thread-safe.

    `VideoFile`, `JpegFrames` and `FrameArray` are the readers of jaxvid.
    """

    @property
    def num_frames(self) -> int:
        """Number of frames, at least 1."""

    @property
    def fps(self) -> float | None:
        """Frames per second, or None if unknown; clips are then sampled as at 30 frames/s."""

    @property
    def times(self) -> np.ndarray | None:
        """Time of each frame in seconds, relative to the first frame.

        `(num_frames,)` float64, non-decreasing; None if the times are unknown or, because they are
        not needed, if the frame rate is constant. Training and evaluation use the times only if
        `data.by_time` is set.
        """

    def get_frames(self, indices: Iterable[int]) -> np.ndarray:
        """Decode frames.

        Args:
            indices: Frame numbers below `num_frames`, in any order, possibly repeated.

        Returns:
            `(t, h, w, c)` uint8, RGB, one frame per index.

        Raises:
            DecodeError: A frame cannot be decoded.
        """

    def __enter__(self) -> Self:
        """Return the reader."""

    def __exit__(self, *exception: object) -> None:
        """Close the reader."""


class VideoRecord(Protocol):
    """A labelled video that is not open. It must be picklable if worker processes load the data.

    The records of jaxvid are `Record`, `H5Record`, `PackedVideo`, `TfdsVideo` and `LostVideo`, and
    `VideoInput` for prediction.
    """

    @property
    def id(self) -> str:
        """Name of the video in `eval_videos.csv` and in messages, unique in its split."""

    @property
    def label(self) -> Label:
        """Index of the class; `NO_LABEL` in lists without labels; a set in multi-label data."""

    @property
    def path(self) -> Path | None:
        """The file that contains the video, or None if there is no such file.

        The file is never opened through this attribute. An interrupted evaluation is resumed only
        if the size and modification time of the file are unchanged. `data.skip_broken` leaves the
        video out of training if the file is missing.
        """

    def open(self) -> VideoReader:
        """Open the video.

        Raises:
            DecodeError: The video cannot be opened. Training skips it, evaluation counts it as
                wrong.
        """
