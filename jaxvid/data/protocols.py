"""The interface between data sources and the rest of jaxvid: `VideoRecord` and `VideoReader`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, Self

import numpy as np


class VideoReader(Protocol):
    """An open video: a context manager that returns frames by index. One thread uses it at a time.

    `VideoFile` and `JpegFrames` are the readers of jaxvid.
    """

    @property
    def num_frames(self) -> int:
        """Number of frames, at least 1."""

    @property
    def fps(self) -> float | None:
        """Frames per second; None: unknown. Clips then assume 30."""

    @property
    def times(self) -> np.ndarray | None:
        """Seconds from the first frame to each, `(num_frames,)` float64, non-decreasing.

        None if the frame rate is constant or the times are unknown. Used with `data.by_time`.
        """

    def get_frames(self, indices: Iterable[int]) -> np.ndarray:
        """Decode frames.

        Args:
            indices: Frame numbers below `num_frames`, in any order, with repetitions.

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
    """A labelled video that is not open. Worker processes need records that can be pickled.

    `Record`, `H5Record`, `PackedVideo`, `TfdsVideo` and `LostVideo` are the records of jaxvid.
    """

    @property
    def id(self) -> str:
        """Name of the video, unique in its split, in `eval_videos.csv` and in messages."""

    @property
    def label(self) -> int:
        """Index of the class; `NO_LABEL` in lists without labels."""

    @property
    def path(self) -> Path | None:
        """The file that holds the video; None: none does.

        It is never opened through this attribute. Its size and modification time decide whether an
        interrupted evaluation may be continued, and `data.skip_broken` leaves the video out of
        training if the file is missing.
        """

    def open(self) -> VideoReader:
        """Open the video.

        Raises:
            DecodeError: It cannot be opened. Training skips it, evaluation counts it as wrong.
        """
