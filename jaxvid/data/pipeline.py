"""The Grain chain: records → decoded, cropped, batched uint8 clips.

Every random choice comes from the generator that Grain derives from (seed, position), so batches do
not depend on the number of threads, workers or restarts. A video that cannot be decoded keeps its
place in its batch, masked, with the reason: nothing is swapped for it.
"""

import dataclasses
import os
import threading
import time
from collections.abc import Sequence

import cv2
import grain
import numpy as np

from jaxvid import entry_point
from jaxvid.data.clips.clip import ClipSpec, load_eval_views, load_train_clip
from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.data.sources import Record

_loading: dict[int, tuple[str, float]] = {}  # thread → its video, and since when
TEXT_BYTES = 512  # of a video's id, and of the reason why it failed, in a batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Threads and processes that decode videos.

    Attributes:
        num_threads: Decoding threads per process, or per worker process.
        num_workers: Worker processes; 0: threads only.
    """

    num_threads: int = 2
    num_workers: int = 0


def make_train_iter(
    records: Sequence[Record],
    *,
    spec: ClipSpec,
    batch_size: int,
    seed: int,
    num_threads: int,
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """An endless, reshuffled, checkpointable stream of training batches.

    Args:
        records: Labelled videos.
        spec: How clips are made.
        batch_size: Clips in a batch of this process.
        seed: Decides order, frames and crops.
        num_threads: Threads that decode, in each worker.
        num_workers: Worker processes; 0: none, threads alone.
        shard: `(index, count)` of this process among all: it makes that part of each batch.

    Returns:
        An iterator over `{"video": (b, t, h, w, c) uint8, "label": (b,) int32, "mask": (b,) bool,
        "padded": (b,) bool, "indices": (b, t) int32, "id": (b, bytes), "error": (b, bytes)}`; the
        mask is False, the video zeros and the error told for what cannot be decoded.
    """
    zeros = {
        "video": np.zeros((spec.num_frames, spec.crop, spec.crop, 3), np.uint8),
        "indices": np.zeros(spec.num_frames, np.int32),
    }

    def load(record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return _example(record, lambda: load_train_clip(record, rng, spec), zeros)

    # Loading comes before the shard, so that a clip's draw is that of its place in the stream:
    # together, the processes make the same batches whatever their number.
    dataset = grain.MapDataset.source(records).seed(seed).shuffle().repeat().random_map(load)
    return _to_iter(_Shard(dataset, batch_size, shard).batch(batch_size), num_threads, num_workers)


def make_eval_iter(
    records: Sequence[Record],
    *,
    spec: ClipSpec,
    batch_size: int,
    num_threads: int,
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Every video once, in order; what fills the last batch is masked.

    All shards give the same number of batches. Arguments as in `make_train_iter`.

    Returns:
        An iterator over what `make_train_iter` gives, with `video` `(b, v, t, h, w, c)` of
        `spec.eval_dtype` and `released` `(b,)` bool, as `load_eval_views`; what fills the last
        batch has an empty `id`.
    """
    count = -(-len(records) // (batch_size * shard[1])) * batch_size * shard[1]
    views, t, size = spec.num_clips * spec.num_crops, spec.num_frames, spec.crop
    zeros = {
        "video": np.zeros((views, t, size, size, 3), spec.eval_dtype),
        "indices": np.zeros((spec.num_clips, t), np.int32),
        "released": np.bool_(False),
    }

    def load(index: int) -> dict[str, np.ndarray]:
        if index >= len(records):
            return _example(None, None, zeros)
        record = records[index]
        return _example(record, lambda: load_eval_views(record, spec), zeros)

    dataset = _Shard(grain.MapDataset.range(count).map(load), batch_size, shard)
    return _to_iter(dataset.batch(batch_size), num_threads, num_workers)


class _Shard(grain.MapDataset):
    """Of every batch of `count · size` examples the `size` that process `index` makes."""

    def __init__(self, parent: grain.MapDataset, size: int, shard: tuple[int, int]):
        super().__init__(parent)
        self._size, (self._index, self._count) = size, shard

    def __len__(self) -> int:
        return len(self._parent) // self._count

    def __getitem__(self, i: int):
        batch, row = divmod(i, self._size)
        return self._parent[(batch * self._count + self._index) * self._size + row]


def _example(record: Record | None, load, zeros: dict) -> dict[str, np.ndarray]:
    """What `load` gives, with all that a batch needs; zeros for no record and for a broken one."""
    example = {**zeros, "padded": np.bool_(False)}
    error = ""
    cv2.setNumThreads(0)  # clips are made in parallel, not the parts of a frame
    if record is not None:
        thread = threading.get_ident()
        _loading[thread] = (record.id, time.monotonic())
        try:
            example = load()
        except DecodeError as failure:
            error = str(failure)
        finally:
            del _loading[thread]
    return {
        **example,
        "label": np.int32(record.label if record is not None else 0),
        "mask": np.bool_(record is not None and not error),
        "id": _text(record.id if record is not None else ""),
        "error": _text(error),
    }


def describe_decoding() -> str:
    """The videos that this process's threads are at, the slowest first: for the log of a stall."""
    found = sorted(_loading.copy().values(), key=lambda entry: entry[1])
    now = time.monotonic()
    return "; ".join(f"reading {id_} for {now - start:.0f} s" for id_, start in found)


def _text(text: str) -> np.ndarray:
    """A string as an array that can be batched and shared between processes."""
    encoded = text.encode(errors="surrogateescape")  # as names of files are
    # The end of a long path tells more.
    return np.frombuffer(encoded[-TEXT_BYTES:].ljust(TEXT_BYTES, b"\0"), np.uint8)


def split_batch(batch: dict) -> tuple[dict, list[str], list[str]]:
    """What the device needs of a batch, and its ids and errors, empty where there is none."""
    arrays = {name: batch[name] for name in ("video", "label", "mask")}
    ids = [_read_id(row) for row in batch["id"]]
    errors = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in batch["error"]]
    return arrays, ids, errors


def _read_id(row: np.ndarray) -> str:
    return row.tobytes().rstrip(b"\0").decode(errors="surrogateescape")


def stored_id(id_: str) -> str:
    """Return an id as `split_batch` gives it: long ones are cut."""
    return _read_id(_text(id_))


def _to_iter(dataset: grain.MapDataset, num_threads: int, num_workers: int):
    # The batch comes before the workers, so that their number does not change what is in it. The
    # buffer counts batches and is bounded: Grain's default would hold 500 of them.
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
    """A Grain iterator whose worker processes start, at the first draw, with signals blocked."""

    def __init__(self, iterator: grain.DatasetIterator):
        self._iterator, self._started = iterator, False

    def __iter__(self) -> "_WorkerIterator":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._started:
            return next(self._iterator)
        self._started = True
        with entry_point.signals_blocked():
            return next(self._iterator)

    def __getattr__(self, name: str):
        return getattr(self._iterator, name)


def _outlive_signals(*_) -> None:
    """Makes a worker end with its parent alone.

    Ctrl-C and cluster managers signal every process of a group; the run needs its workers to save.
    """
    entry_point.ignore_signals()

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()
