"""Uncropped frames of a clip, and the position of the network's crop in them."""

import dataclasses
from typing import Any

import numpy as np

from jaxvid.data.clips.clip import (
    ClipSpec,
    cut_eval_crops,
    resize_eval_frames,
    set_color_matrix,
)
from jaxvid.data.protocols import VideoReader, VideoRecord


def find_crop_box(height: int, width: int, spec: ClipSpec) -> tuple[float, float, float, float]:
    """Locate the centre crop in a frame by cropping an array of coordinates as in evaluation.

    Returns:
        Top, left, bottom, right, relative to the height and width.
    """
    blank = np.zeros((1, height, width, 3), np.uint8)
    _, h, w, _ = resize_eval_frames(blank, spec).shape
    coordinates = np.stack(np.mgrid[:h, :w], axis=-1)[None]  # (1 h w 2)
    [crop] = cut_eval_crops(coordinates, dataclasses.replace(spec, num_crops=1))
    top, left = crop[0, 0, 0]
    return top / h, left / w, (top + spec.crop) / h, (left + spec.crop) / w


def frame_times(reader: VideoReader) -> np.ndarray | None:
    """Return the time of each frame of a video in seconds; None if unknown."""
    if reader.times is None and reader.fps:
        return np.arange(reader.num_frames) / reader.fps
    return reader.times


def read_clip(video: VideoRecord, indices: np.ndarray, spec: ClipSpec) -> dict[str, Any]:
    """Decode the uncropped frames of a clip.

    Args:
        video: The video.
        indices: Frame numbers `(t,)`.
        spec: Defines the conversion to RGB.

    Returns:
        The fields `name`, `frames`, `indices` and `times` of `AttentionRollout`.

    Raises:
        DecodeError: The video cannot be decoded.
    """
    with video.open() as reader:
        set_color_matrix(reader, spec)
        frames, times = reader.get_frames(indices), frame_times(reader)
    times = None if times is None else times[indices]
    name = video.path.name if video.path else video.id
    return {"name": name, "frames": frames, "indices": indices, "times": times}
