"""Tasks that a decoder process runs on an uploaded video; see `decoder_pool.DecoderPool`.

A task is a function whose first argument is the `UploadedVideo`. It returns one message or yields
several. A message is a dict, whose values are NumPy arrays or values that JSON can represent. This
module must not import JAX.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np

from jaxvid.data.clips.clip import ClipSpec, load_eval_views
from jaxvid.data.formats.jpeg_reader import JpegFrames
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.data.records import NO_LABEL
from jaxvid.errors import InputError
from jaxvid.inference.sliding_windows import max_held_frames, plan_windows, read_frames
from jaxvid.serving import video_frames
from jaxvid.serving.limits import Limits

Message = dict[str, Any]  # names and NumPy arrays or JSON values

cv2.setNumThreads(0)  # videos are decoded in parallel, not frames


@dataclasses.dataclass(frozen=True)
class UploadedVideo:
    """The video of a request. It implements the protocol `VideoRecord`.

    Attributes:
        file: Name of the file in this process.
        limits: Limits of the size and the duration of the video.
        max_seconds: Limit of the wall time of opening and decoding together.
        id: Name of the video in error messages.
    """

    file: str
    limits: Limits
    max_seconds: float
    id: str = "video"

    label = NO_LABEL
    path = None

    def open(self) -> VideoFile:
        """Open the video.

        Raises:
            DecodeError: The file is not a video, or exceeds a limit.
        """
        options = {"max_seconds": self.max_seconds, "max_pixels": self.limits.pixels}
        reader = VideoFile(self.file, name=self.id, **options)
        seconds, limit = _duration(reader), self.limits.video_seconds
        if seconds > limit:
            reader.close()
            raise DecodeError(
                f"{self.id}: lasts {seconds:.0f} s, more than the limit of {limit:g} s; send a part"
            )
        return reader


def _duration(reader: VideoFile) -> float:
    """Return the duration of a video in seconds; 0 if it has neither times nor a frame rate."""
    at_fps = reader.num_frames / reader.fps if reader.fps else 0.0
    return at_fps if reader.times is None else max(at_fps, float(reader.times[-1]))


Task = Callable[..., Message | Iterator[Message]]


def views(video: UploadedVideo, spec: ClipSpec) -> Message:
    """Return the evaluation views of a video, the result of `load_eval_views`.

    Raises:
        DecodeError: The video cannot be decoded.
    """
    return load_eval_views(video, spec)


def windows(
    video: UploadedVideo,
    spec: ClipSpec,
    window: float,
    stride: float,
    *,
    align: bool,
    chunk: int,
) -> Iterator[Message]:
    """Yield the sliding windows of a video.

    The first message is the plan, with the fields of a `WindowPlan`. The following messages are the
    chunks of `read_frames`: the frame numbers `numbers` and the crops `crops` of all frames that
    the windows need.

    Args:
        video: The video.
        spec: Sampling, resize and crops of a window. A window has one clip.
        window: Length of a window in seconds.
        stride: Time between the starts of consecutive windows in seconds.
        align: Adjust the stride so that windows share frames; see `plan_windows`.
        chunk: Frames per message; see `read_frames`.

    Raises:
        DecodeError: The video cannot be decoded, or has neither frame rate nor timestamps.
        InputError: `window` or `stride` is not above 0, or the windows are too many or share too
            many frames.
    """
    with video.open() as reader:
        # `plan_windows` refuses a stride of 0 and increases a stride below the distance of frames.
        hop, limit = max(stride, 1 / reader.fps if reader.fps else 0.0), video.limits.windows
        if stride > 0 and _duration(reader) / hop > limit:
            raise InputError(
                f"stride={stride:g}: gives more than {limit} windows; use a longer stride"
            )
        plan = plan_windows(reader, spec, window, stride, align=align, name=video.id)
        # Windows that share features of frames need much less memory.
        if not align and held_bytes(plan.indices, spec) > video.limits.timeline_bytes:
            raise InputError(
                f"window={window:g}: the frames that windows share need more than "
                f"{video.limits.timeline_bytes / 1e9:g} GB of memory; use a shorter window or a "
                "longer stride"
            )
        yield dataclasses.asdict(plan)
        needed = np.unique(plan.indices)
        for numbers, crops in read_frames(reader, needed, spec, chunk):
            yield {"numbers": numbers, "crops": crops}


def held_bytes(indices: np.ndarray, spec: ClipSpec) -> int:
    """Return the size of the frames of a timeline that are held in memory at the same time.

    Args:
        indices: Frame numbers `(windows, t)`.
        spec: Sizes and number of the crops.
    """
    frame_bytes = spec.num_crops * spec.crop**2 * 3 * np.dtype(spec.eval_dtype).itemsize
    return max_held_frames(indices) * frame_bytes


def frames(video: UploadedVideo, spec: ClipSpec) -> Iterator[Message]:
    """Yield the result of `load_eval_views`, and that of `describe_clip` for the first clip."""
    loaded = load_eval_views(video, spec)
    yield loaded
    with video.open() as reader:
        yield video_frames.describe_clip(reader, loaded["indices"][0], spec)


def live_clip(video: UploadedVideo, spec: ClipSpec, parts: Sequence[tuple[int, int]]) -> Message:
    """Return the clip of JPEG images; see `make_live_clip`.

    Args:
        video: A file that contains the images.
        spec: Resize and crop.
        parts: Start and size in bytes of each image.
    """
    with open(video.file, "rb") as file:

        def read(numbers: Sequence[int]) -> Iterator[bytes]:
            for start, size in map(parts.__getitem__, numbers):
                yield os.pread(file.fileno(), size, start)

        reader = JpegFrames(video.id, len(parts), None, read)
        reader.max_pixels = limit = video.limits.pixels
        try:
            return video_frames.make_live_clip(reader, spec)
        except DecodeError:
            raise DecodeError(
                f"{video.id}: expected JPEG images of one size, with at most {limit} pixels"
            ) from None
