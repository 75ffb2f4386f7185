"""Batches of whole videos, or of sliding windows of videos, for feature extraction."""

import collections
import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np

from jaxvid.data.check import MAX_SECONDS
from jaxvid.data.clips.clip import ClipSpec
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.data.pipeline import make_eval_iter, split_batch
from jaxvid.data.protocols import VideoRecord
from jaxvid.data.records import Record, Selection
from jaxvid.distributed import collectives
from jaxvid.inference.sliding_windows import (
    gather_clips,
    plan_windows,
    prefetch_chain,
    read_frames,
)
from jaxvid.storage.preprocessing import clip_shape

NO_VIDEO = -1  # index of the video in rows that pad a batch
WINDOWS_AHEAD = 4  # windows of a video that are decoded before they are needed
# The columns of a batch: one list each, with one entry per row.
Rows = dict[str, list]
Batches = Iterator[tuple[np.ndarray, Rows]]


def _row(video: int, *, error: str = "", **columns: float | bool) -> dict[str, Any]:
    """Return a row of a batch. By default, it is the last row of its video.

    Args:
        video: Index of the video, or `NO_VIDEO` for padding.
        error: The decode error, or empty.
        **columns: Values of `start`, `end`, `padded` and `last`.
    """
    defaults = {"start": 0.0, "end": 0.0, "padded": False, "last": True}
    return {"video": video, "error": error, **defaults, **columns}


def _to_columns(rows: Sequence[dict[str, Any]]) -> Rows:
    return {name: [row[name] for row in rows] for name in _row(NO_VIDEO)}


def video_batches(
    records: Sequence[VideoRecord],
    spec: ClipSpec,
    *,
    todo: dict[int, int],
    batch_size: int,
    shard: tuple[int, int],
) -> Batches:
    """Yield this process's part of each batch of whole videos.

    Args:
        records: All videos.
        spec: Sampling, sizes and views.
        todo: The keys are the indices of the videos to load.
        batch_size: Videos per batch of this process.
        shard: `(index, count)` as in `make_eval_iter`.

    Yields:
        Pixels `(b, v, t, h, w, c)` and the rows.
    """
    videos = list(todo)
    if not videos:
        return
    batches = make_eval_iter(
        Selection(records, videos),
        spec=spec,
        batch_size=batch_size,
        num_threads=os.cpu_count(),
        shard=shard,
    )
    index, count = shard
    with contextlib.closing(batches):
        for number, batch in enumerate(batches):
            first = (number * count + index) * batch_size
            numbers = videos[first : first + batch_size]
            numbers += [NO_VIDEO] * (batch_size - len(numbers))
            _, _, errors = split_batch(batch)
            columns = zip(numbers, errors, batch["padded"].tolist(), strict=True)
            rows = [_row(video, error=error, padded=padded) for video, error, padded in columns]
            yield batch["video"], _to_columns(rows)


def window_batches(
    records: Sequence[Record],
    spec: ClipSpec,
    *,
    window: float,
    stride: float,
    todo: dict[int, int],
    batch_size: int,
    shard: tuple[int, int],
) -> Batches:
    """Yield this process's part of each batch of windows. All processes must call it.

    A process loads every `count`-th video. All processes yield the same number of batches.

    Args:
        records: All videos.
        spec: Sampling, sizes and crops. A window has one clip.
        window: Length of a window in seconds.
        stride: Time between the starts of consecutive windows in seconds.
        todo: Index of each video to load → number of windows to skip at its start.
        batch_size: Windows per batch of this process.
        shard: `(index, count)`: this is process `index` of `count`.

    Yields:
        Pixels `(b, m, t, h, w, c)` and the rows.
    """
    index, count = shard
    times = {"window": window, "stride": stride}
    streams = (
        _load_windows(i, records[i], spec, skip=skip, **times)
        for i, skip in todo.items()
        if i % count == index
    )
    windows = prefetch_chain(streams, num_threads=os.cpu_count(), ahead=WINDOWS_AHEAD)
    with contextlib.closing(windows):
        while True:
            batch = list(itertools.islice(windows, batch_size))
            if not any(collectives.gather(bool(batch))):
                return
            video = np.zeros((batch_size, *clip_shape(spec, spec.num_crops)), spec.eval_dtype)
            for row, (clip, _) in enumerate(batch):
                if clip is not None:
                    video[row] = clip
            rows = [row for _, row in batch] + [_row(NO_VIDEO)] * (batch_size - len(batch))
            yield video, _to_columns(rows)


def _load_windows(
    video: int, record: Record, spec: ClipSpec, *, window: float, stride: float, skip: int
) -> Iterator[tuple[np.ndarray | None, dict[str, Any]]]:
    """Decode the windows of a video in one pass.

    Args:
        video: Index of the video.
        record: The video.
        spec: As in `window_batches`.
        window: As in `window_batches`.
        stride: As in `window_batches`.
        skip: Number of windows at the start of the video that are not needed.

    Yields:
        The clip of each window `(m, t, h, w, c)` and its row. After a decode error, the clip is
        None, and the row is the last one.
    """
    cv2.setNumThreads(0)  # videos are already decoded in parallel
    try:
        with VideoFile(record.path, max_seconds=MAX_SECONDS) as reader:
            plan = plan_windows(reader, spec, window, stride, align=False, name=record.id)
            indices = plan.indices[skip:]
            frames = read_frames(reader, np.unique(indices), spec, spec.num_frames)
            for i, clip in enumerate(gather_clips(indices, frames), skip):
                is_last = i == len(plan.indices) - 1
                if is_last:
                    collections.deque(frames, maxlen=0)  # damage may be reported only at its end
                columns = {"start": float(plan.starts[i]), "end": float(plan.ends[i])}
                yield clip, _row(video, padded=bool(plan.padded[i]), last=is_last, **columns)
    except DecodeError as error:
        yield None, _row(video, error=str(error))
