"""Tasks of the decoder processes: generator functions that do not import JAX."""

from collections.abc import Iterator

import cv2
import numpy as np

from jaxvid.data.clips.clip import ClipSpec, load_eval_views
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.data.records import NO_LABEL
from jaxvid.inference.sliding_windows import plan_windows, read_frames
from jaxvid.serving.limits import Limits

NAME = "video"  # in error messages; the names of the client's files are not known


class Upload:
    """An uploaded video. It implements the protocol `VideoRecord`.

    Args:
        path: The file.
        limits: Limits of the video.
    """

    id, label, path = NAME, NO_LABEL, None

    def __init__(self, path: str, limits: Limits):
        self._path, self._limits = path, limits

    def open(self) -> VideoFile:
        """Open the video.

        Raises:
            DecodeError: The file is not a video, or exceeds a limit.
        """
        reader = VideoFile(self._path, name=NAME, max_seconds=self._limits.decode_seconds)
        times, limit = reader.times, self._limits.video_seconds
        if times is not None and times[-1] > limit:
            reader.close()
            raise DecodeError(f"{NAME}: lasts {times[-1]:.0f} s; send at most {limit:g} s")
        return reader


def views(path: str, limits: Limits, spec: ClipSpec) -> Iterator[dict[str, np.ndarray]]:
    """Yield the result of `load_eval_views`."""
    cv2.setNumThreads(0)  # videos are decoded in parallel
    yield load_eval_views(Upload(path, limits), spec)


def windows(
    path: str,
    limits: Limits,
    spec: ClipSpec,
    window: float,
    stride: float,
    *,
    align: bool,
    chunk: int,
) -> Iterator[object]:
    """Yield the `WindowPlan` of a video, and then its frames.

    Args:
        path: The file.
        limits: Limits of the video.
        spec: Sampling, resize and crops of a window. A window has one clip.
        window: Length of a window in seconds.
        stride: Time between the starts of consecutive windows in seconds.
        align: Adjust the stride so that overlapping windows share frames.
        chunk: Frames per item.

    Yields:
        The plan, and then pairs of frame numbers `(i,)` and crops `(chunk, m, h, w, c)`; see
        `read_frames`.
    """
    cv2.setNumThreads(0)
    with Upload(path, limits).open() as reader:
        plan = plan_windows(reader, spec, window, stride, align=align, name=NAME)
        yield plan
        yield from read_frames(reader, np.unique(plan.indices), spec, chunk)
