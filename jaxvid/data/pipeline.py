"""Data loading with Grain: from video records to batches of decoded and cropped clips.

All random choices for a clip come from the generator that Grain derives from the seed and the
position in the stream. Therefore batches do not depend on the number of threads, workers or
restarts. A video that cannot be decoded is masked in its batch, which also contains the reason. It
is not replaced by another video.
"""

import dataclasses
import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import grain
import numpy as np

from jaxvid import entry_point
from jaxvid.data.clips.clip import ClipSpec, load_eval_views, load_train_clip
from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.data.protocols import VideoRecord
from jaxvid.data.read_ahead import is_read_ahead, read_ahead, wait
from jaxvid.data.records import Record
from jaxvid.data.video_order import VideoOrder

# Thread id → id of the video that the thread is decoding, and when it started (`time.monotonic`).
_loading: dict[int, tuple[str, float]] = {}
CLOSE_SECONDS = 5.0  # time that workers have to stop
TEXT_BYTES = 512  # size of each id and decode error in a batch; longer texts are truncated


class _Thread(threading.local):
    """State of a decoding thread."""

    def __init__(self):
        # Philox as in Grain. Setting its state is 10 times as fast as a new generator per clip.
        self.generator = np.random.Generator(np.random.Philox(0))


_thread = _Thread()

Batch = dict[str, np.ndarray]
Loader = Callable[[np.ndarray], Batch]  # loads an example; writes its `video` to the argument


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Numbers of threads and processes that decode videos.

    Attributes:
        num_threads: Decoding threads per worker process, or of this process without workers.
        num_workers: Worker processes; 0: threads of this process decode.
    """

    num_threads: int = 2
    num_workers: int = 0


def make_train_iter(
    records: Sequence[VideoRecord],
    *,
    spec: ClipSpec,
    batch_size: int,
    order: VideoOrder,
    num_threads: int,
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Return an endless, reshuffled, checkpointable iterator of training batches.

    Args:
        records: Labelled videos.
        spec: Sampling, sizes and augmentation of the clips.
        batch_size: Clips per batch of this process.
        order: Order of the videos, and the seed of frame sampling and augmentation.
        num_threads: See `LoaderConfig`.
        num_workers: See `LoaderConfig`.
        shard: `(index, count)`: this process loads part `index` of the `count` equal parts of each
            global batch.

    Returns:
        An iterator of dicts of `video` `(b, t, h, w, c)` uint8; `label` `(b,)` int32, in
        multi-label data multi-hot `(b, num_classes)`; `mask` `(b,)` bool, whether the video could
        be decoded; `indices` `(b, t)` int32, the frame numbers; `padded` `(b,)` bool, whether the
        video is so short that frames are repeated; `id` and `error` `(b, TEXT_BYTES)` uint8, texts
        padded with zeros. If a video cannot be decoded, `video`, `indices` and `padded` are zero,
        and `error` is the reason. Otherwise, `error` is empty.
    """
    zeros = {"indices": np.zeros(spec.num_frames, np.int32)}

    def make_loader(record: VideoRecord, rng: np.random.Generator) -> Loader:
        # The state, because Grain reuses the generator for the next clip.
        load = functools.partial(_load_train_clip, record, rng.bit_generator.state, spec)
        return functools.partial(_load_example, record, load, zeros)

    stream = order.stream(records, batch_size * shard[1])
    load_batch = functools.partial(_load_batch, shape=spec.clip_shape, dtype=np.uint8)
    dataset = stream.random_map(make_loader).batch(batch_size, batch_fn=load_batch)
    prefetch = None
    if is_read_ahead(records):
        # It has the seed of `random_map(make_loader)`, so that the same frames are drawn.
        ahead = stream.random_map(lambda record, rng: read_ahead(record, spec, rng))
        prefetch = ahead.__getitem__
    return _to_iter(dataset, batch_size, shard, num_threads, num_workers, prefetch)


def _load_train_clip(
    record: VideoRecord, state: dict[str, Any], spec: ClipSpec, out: np.ndarray
) -> Batch:
    """Load a training clip with a generator in the state `state`."""
    generator = _thread.generator
    generator.bit_generator.state = state
    return load_train_clip(record, generator, spec, out)


def make_eval_iter(
    records: Sequence[VideoRecord],
    *,
    spec: ClipSpec,
    batch_size: int,
    num_threads: int,
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Return an iterator of evaluation batches, in which every video occurs once, in order.

    All shards have the same number of batches. To this end, the last batches are padded with
    entries whose `mask` is False and whose `id` is empty. Arguments: `make_train_iter`.

    Returns:
        An iterator of batches as in `make_train_iter`, except that `video` is `(b, v, t, h, w, c)`
        of `spec.eval_dtype` and `indices` is `(b, num_clips, t)`. In addition, `released` `(b,)`
        bool is whether STAM's released evaluation counts the video.
    """
    count = -(-len(records) // (batch_size * shard[1])) * batch_size * shard[1]
    # Only the labels of `Record`s may be multi-hot. Reading those of others may read the videos.
    has_records = len(records) > 0 and isinstance(records[0], Record)
    label = np.asarray(records[0].label if has_records else 0, np.int32)
    zeros = {
        "indices": np.zeros((spec.num_clips, spec.num_frames), np.int32),
        "released": np.bool_(False),
        "label": np.zeros_like(label),
    }

    def make_loader(index: int) -> Loader:
        if index >= len(records):
            return functools.partial(_load_example, None, None, zeros)
        record = records[index]
        return functools.partial(
            _load_example, record, functools.partial(load_eval_views, record, spec), zeros
        )

    def prefetch(index: int) -> None:
        if index < len(records):
            read_ahead(records[index], spec)

    load_batch = functools.partial(_load_batch, shape=spec.views_shape, dtype=spec.eval_dtype)
    dataset = grain.MapDataset.range(count).map(make_loader).batch(batch_size, batch_fn=load_batch)
    is_ahead = is_read_ahead(records)
    return _to_iter(
        dataset, batch_size, shard, num_threads, num_workers, prefetch if is_ahead else None
    )


def _load_batch(
    loaders: Sequence[Loader], *, shape: tuple[int, ...], dtype: type[np.unsignedinteger]
) -> Batch:
    """Load the examples of a batch; clips and views are written directly into the batch.

    Args:
        loaders: Functions that load the examples.
        shape: Shape of `video` of an example.
        dtype: Data type of `video`.
    """
    video = np.empty((len(loaders), *shape), dtype)
    rows = [load(out) for load, out in zip(loaders, video, strict=True)]
    others = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "video"}
    return {"video": video, **others}


def _load_example(
    record: VideoRecord | None, load: Loader | None, zeros: Batch, out: np.ndarray
) -> Batch:
    """Load an example of a batch: the clip or views of a video, and the other fields.

    Args:
        record: The video, or None for padding.
        load: Function that loads the clip or views, or None for padding.
        zeros: Values of the loaded fields except `video` and `padded`, for padding and for a video
            that cannot be decoded. `label` is required for padding.
        out: Array that receives the clip or views.
    """
    example, error = None, ""
    cv2.setNumThreads(0)  # clips are already processed in parallel
    if record is not None:
        thread = threading.get_ident()
        _loading[thread] = (record.id, time.monotonic())
        try:
            wait(record)
            example = load(out)
        except DecodeError as failure:
            error = str(failure)
        finally:
            del _loading[thread]
    if example is None:
        out[...] = 0
        example = {**zeros, "padded": np.bool_(False)}
    return {
        **example,
        "label": zeros["label"] if record is None else np.asarray(record.label, np.int32),
        "mask": np.bool_(record is not None and not error),
        "id": _text(record.id if record is not None else ""),
        "error": _text(error),
    }


def describe_decoding() -> str:
    """Describe the videos that this process is decoding, longest-running first, for stall warnings.

    Videos that worker processes decode are not included.
    """
    videos = sorted(_loading.copy().values(), key=lambda entry: entry[1])
    now = time.monotonic()
    return "; ".join(f"reading {id_} for {now - start:.0f} s" for id_, start in videos)


def _text(text: str) -> np.ndarray:
    """Return a string as an array that can be batched and shared between processes."""
    encoded = text.encode(errors="surrogateescape")  # ids may be file names that are not UTF-8
    # Truncate long texts at the start: the end of a path is more specific.
    return np.frombuffer(encoded[-TEXT_BYTES:].ljust(TEXT_BYTES, b"\0"), np.uint8)


def split_batch(batch: Batch) -> tuple[Batch, list[str], list[str]]:
    """Split a batch into the arrays for the device, the ids, and the decode errors.

    The error of a video without a decode error is an empty text.
    """
    arrays = {name: batch[name] for name in ("video", "label", "mask")}
    ids = [_read_id(row) for row in batch["id"]]
    errors = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in batch["error"]]
    return arrays, ids, errors


def _read_id(row: np.ndarray) -> str:
    return row.tobytes().rstrip(b"\0").decode(errors="surrogateescape")


def stored_id(id_: str) -> str:
    """Return an id as `split_batch` returns it, truncated to its last `TEXT_BYTES` bytes."""
    return _read_id(_text(id_))


def _to_iter(
    dataset: grain.MapDataset,
    batch_size: int,
    shard: tuple[int, int],
    num_threads: int,
    num_workers: int,
    prefetch: Callable[[int], None] | None = None,
) -> "grain.DatasetIterator | _WorkerIterator":
    """Select this process's part of each global batch, and return an iterator.

    `dataset` contains the parts of all processes, `batch_size` examples each. Its random choices
    depend on positions in the global stream, and therefore not on the number of processes. Batching
    comes before the workers, so that the number of workers does not change the batches either.

    `prefetch` is called with the position of an example in the global stream some time before the
    example is loaded, if its video is remote; see `read_ahead`.
    """
    index, count = shard
    dataset = dataset[index::count]
    if prefetch is not None:
        # Threads load whole batches: the next ones are being loaded already.
        distance = (num_threads + 1) * max(1, num_workers)

        def read_next(number: int, batch: Batch) -> Batch:
            first = ((number + distance) * count + index) * batch_size
            for position in range(first, first + batch_size):
                prefetch(position)
            return batch

        dataset = dataset.map_with_index(read_next)
    # Grain's default buffer would hold 500 batches.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 2)
    iter_dataset = dataset.to_iter_dataset(options)
    if num_workers:
        iter_dataset = iter_dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1),
            worker_init_fn=_outlive_signals,
        )
        return _WorkerIterator(iter(iter_dataset))
    return iter(iter_dataset)


class _WorkerIterator:
    """A Grain iterator whose workers start at the first `next`, with signals blocked."""

    def __init__(self, iterator: grain.DatasetIterator):
        self._iterator, self._started = iterator, False

    def __iter__(self) -> "_WorkerIterator":
        return self

    def __next__(self) -> Batch:
        if self._started:
            return next(self._iterator)
        self._started = True
        with entry_point.signals_blocked():
            return next(self._iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)

    def close(self) -> None:
        """Stop the workers, and kill them if they do not stop.

        Grain waits without limit for a worker that hangs, e.g. because a network drive does not
        respond.
        """
        closing = threading.Thread(target=self._iterator.close, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        if closing.is_alive():
            for child in multiprocessing.active_children():
                if child.name.startswith("grain"):
                    child.kill()
            closing.join(CLOSE_SECONDS)


def _outlive_signals(*_: object) -> None:
    """Make a worker process ignore signals and exit only when its parent has ended.

    Ctrl-C and cluster managers signal every process of a group, but the run needs its workers until
    it has saved its state.
    """
    entry_point.ignore_signals()

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()
