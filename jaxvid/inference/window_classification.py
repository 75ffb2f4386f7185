"""Classification of sliding windows of a long video."""

import collections
import contextlib
import itertools
import sys
from collections.abc import Iterator

import cv2
import numpy as np

from jaxvid.data.check import MAX_SECONDS
from jaxvid.data.clips.clip import ClipSpec
from jaxvid.inference.class_timeline import ClassTimeline
from jaxvid.inference.compiled_network import CompiledNetwork
from jaxvid.inference.inputs import VideoInput
from jaxvid.inference.sliding_windows import gather_clips, plan_windows, prefetch, read_frames
from jaxvid.progress import Progress


def classify_windows(
    network: CompiledNetwork,
    video: VideoInput,
    *,
    spec: ClipSpec,
    labels: list[str],
    window: float,
    stride: float,
    batch_size: int,
) -> ClassTimeline:
    """Classify sliding windows of a video; see `Classifier.windows`.

    Args:
        network: The network.
        video: The video.
        spec: Sampling, resize and crops of a window. A window has one clip.
        labels: Class names.
        window: Length of a window in seconds.
        stride: Time between the starts of consecutive windows in seconds.
        batch_size: Windows per batch.

    Raises:
        DecodeError: The video cannot be decoded, or has neither frame rate nor timestamps.
        InputError: `window` or `stride` is not above 0, the frame rate of an array is unknown, or
            the logits are not finite.
    """
    cv2.setNumThreads(0)  # decoding and classification already run in parallel
    align = network.shares_frames
    with video, video.open(MAX_SECONDS) as reader:
        plan = plan_windows(reader, spec, window, stride, align=align, name=video.id)
        if abs(plan.stride - stride) > 1e-6 * stride:
            reason = "so that windows share frames" if align else "the duration of one frame"
            message = f"stride: {plan.stride:g} s instead of {stride:g} s, {reason}"
            print(message, file=sys.stderr, flush=True)
        needed = np.unique(plan.indices)
        size = min(batch_size * spec.num_frames, len(needed))
        # The decoding thread must end before the reader is closed.
        frames = prefetch(read_frames(reader, needed, spec, size))
        with contextlib.closing(frames):
            scores = score_windows(network, plan.indices, frames, batch_size)
    return ClassTimeline(
        video=video.id,
        labels=labels,
        starts=plan.starts,
        ends=plan.ends,
        padded=plan.padded,
        stride=plan.stride,
        probabilities=network.probabilities(scores, spec.num_crops),
    )


def score_windows(
    network: CompiledNetwork,
    indices: np.ndarray,
    frames: Iterator[tuple[np.ndarray, np.ndarray]],
    batch_size: int,
) -> np.ndarray:
    """Classify windows as their frames arrive; return their logits, summed over the crops.

    Args:
        network: The network.
        indices: Frame numbers of each window `(windows, t)`.
        frames: The frames of all windows, from `sliding_windows.read_frames`.
        batch_size: Windows per batch.

    Returns:
        `(windows, num_classes)` float32: logits, summed over the crops.

    Raises:
        DecodeError: A frame is damaged.
        InputError: The logits are not finite, because the weights are damaged.
    """
    classify = network.score_features if network.shares_frames else network.score
    items = _frame_features(network, frames) if network.shares_frames else frames
    clips = gather_clips(indices, items)  # (m t ...) per window
    progress = Progress(len(indices), title="classifying", unit="window")
    scores = []
    with contextlib.closing(progress):
        while batch := list(itertools.islice(clips, batch_size)):
            scores.append(network.run(classify, np.stack(batch), batch_size))
            progress.advance(len(batch))
    collections.deque(items, maxlen=0)  # `read_frames` may report damage only at its end
    return np.concatenate(scores)


def _frame_features(
    network: CompiledNetwork, chunks: Iterator[tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Compute the features of frames.

    Args:
        network: The network.
        chunks: Frame numbers `(i,)` and crops of the frames `(j, m, h, w, c)`, from `read_frames`.

    Yields:
        For each chunk, the same frame numbers and the features `(j, m, d)` of its crops.
    """
    for numbers, crops in chunks:
        video = crops.swapaxes(0, 1)  # (m j h w c)
        features = network.apply(network.frame_features, video)  # (m j d)
        yield numbers, features.swapaxes(0, 1)
