"""Frames of a video for the page, as small JPEG images; imports no JAX."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from jaxvid.data.clips.clip import (
    ClipSpec,
    cut_eval_crops,
    resize_eval_frames,
    set_color_matrix,
)
from jaxvid.data.formats.jpeg_reader import JpegFrames
from jaxvid.data.formats.video_reader import VideoFile
from jaxvid.inference.clip_frames import frame_times

PICTURE_PX = 320  # longer side of an image
PICTURE_QUALITY = 85


def describe_clip(reader: VideoFile, indices: np.ndarray, spec: ClipSpec) -> dict[str, Any]:
    """Describe an open video and the frames of a clip.

    The frames are decoded one at a time, so that only one is in memory.

    Args:
        reader: The video.
        indices: Frame numbers of the clip `(t,)`, non-decreasing.
        spec: Defines the conversion to RGB.

    Returns:
        `info`: size in pixels, number of frames, frames/s and duration in seconds; `frames`:
        `{"index", "time", "image"}` of each frame of the clip, with a data URL. Unknown times are
        None.

    Raises:
        DecodeError: A frame is damaged.
    """
    set_color_matrix(reader, spec)
    times, fps = frame_times(reader), reader.fps
    distinct, pictures, size = np.unique(indices), {}, (0, 0)
    for number, frame in zip(distinct.tolist(), reader.iter_frames(distinct), strict=True):
        pictures[number], size = to_data_url(frame), frame.shape[1::-1]
    info = {"width": size[0], "height": size[1], "frames": reader.num_frames, "fps": fps}
    # The last frame is shown for the duration of an average frame.
    info["seconds"] = None if times is None else float(times[-1]) + (1 / fps if fps else 0)
    return {
        "info": info,
        "frames": [
            {
                "index": number,
                "time": None if times is None else float(times[number]),
                "image": pictures[number],
            }
            for number in indices.tolist()
        ],
    }


def to_data_url(frame: np.ndarray) -> str:
    """Return a frame `(h, w, c)` uint8 as the data URL of a JPEG image, scaled down."""
    picture, file = Image.fromarray(frame), io.BytesIO()
    picture.thumbnail((PICTURE_PX, PICTURE_PX))
    picture.save(file, "jpeg", quality=PICTURE_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def make_live_clip(reader: JpegFrames, spec: ClipSpec) -> dict[str, np.ndarray]:
    """Make one clip of all frames, for live video.

    The frames are taken as they are if there are `spec.num_frames` of them. Otherwise, frames are
    left out or repeated evenly.

    Args:
        reader: Frames of one size, evenly spaced over the duration of a clip.
        spec: Resize and crop. Only the centre crop is made.

    Returns:
        `video` `(1, t, crop, crop, c)` of `spec.eval_dtype`, `indices` `(1, t)` and `padded`, as
        `load_eval_views` returns them.

    Raises:
        DecodeError: A frame cannot be decoded, or the frames differ in size.
    """
    indices = np.rint(np.linspace(0, reader.num_frames - 1, spec.num_frames)).astype(np.int32)
    video = np.empty((1, spec.num_frames, spec.crop, spec.crop, 3), spec.eval_dtype)
    for i, frame in reader.enumerate_frames(indices):
        crops = cut_eval_crops(resize_eval_frames(frame[None], spec), spec)
        video[0, i] = crops[len(crops) // 2][0]
    padded = np.bool_(reader.num_frames < spec.num_frames)
    return {"video": video, "indices": indices[None], "padded": padded}
