"""The Grain chain: records → decoded, cropped, batched uint8 clips.

Every random choice comes from the generator that Grain derives from (seed, position), so batches do
not depend on the number of threads, workers or restarts. A video that cannot be decoded keeps its
place in its batch, masked, with the reason: nothing is swapped for it.
"""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import grain
import numpy as np

from jaxvid.data import augment, sampling, transforms
from jaxvid.data.decode import DecodeError
from jaxvid.data.jpegs import JpegFrames
from jaxvid.data.sources import Record
from jaxvid.errors import InputError

_loading: dict[int, tuple[str, float]] = {}  # thread → its video, and since when
TEXT_BYTES = 512  # of a video's id, and of the reason why it failed, in a batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """How clips are made out of videos.

    Attributes:
        num_frames: Frames a clip.
        crop: Height and width of a clip in pixels.
        short_side: Evaluation: the frames' shorter side in pixels before cropping.
        sampling: Which frames: `segments`, `dense` or `rate` (`sampling.make_indices`).
        sampling_rate: Of `dense`.
        by_time: Videos with a variable frame rate are sampled by time, not by frame number.
        resize: `antialiased` (Pillow's bilinear) or `bilinear` (torch's, without).
        num_clips: Evaluation: clips of a video.
        num_crops: Evaluation: crops of a clip, 1 or 3.
        train_crop: `random` (a random place after a random short side) or `multiscale` (XViT on
            Kinetics).
        train_short_side: Lowest and highest short side of `random` crops.
        flip: Probability that a training clip is mirrored.
        augment: ``, `autoaugment` (v0) or `randaugment`, on whole frames before the crop.
        randaugment_layers: Operations of `randaugment`.
        randaugment_magnitude: Its strength, 0 to 10.
    """

    num_frames: int
    crop: int
    short_side: int
    sampling: str = "segments"
    sampling_rate: int = 16
    by_time: bool = False
    resize: str = "antialiased"
    num_clips: int = 1
    num_crops: int = 1
    train_crop: str = "random"
    train_short_side: tuple[int, int] = (0, 0)
    flip: float = 0.0
    augment: str = ""
    randaugment_layers: int = 2
    randaugment_magnitude: int = 9

    def __post_init__(self):
        options = {
            "sampling": sampling.SAMPLINGS,
            "resize": ("antialiased", "bilinear"),
            "num_crops": transforms.NUM_CROPS,
            "train_crop": ("random", "multiscale"),
            "augment": ("", "autoaugment", "randaugment"),
        }
        for name, valid in options.items():
            if getattr(self, name) not in valid:
                known = ", ".join(repr(option) for option in valid)
                raise InputError(f"{name}={getattr(self, name)!r}: there are {known}")
        most = sampling.max_views(self.sampling) or self.num_clips
        if not 1 <= self.num_clips <= most:
            raise InputError(
                f"num_clips={self.num_clips}: sampling={self.sampling!r} gives 1 to {max(most, 1)}"
            )
        for low in (self.short_side, self.train_short_side[0] or self.crop):
            if low < self.crop:
                raise InputError(f"short_side={low} is below the crop of {self.crop} px; raise it")


def make_spec(config, *, num_clips: int = 1, num_crops: int = 1) -> ClipSpec:
    """The clips of a config.

    Raises:
        InputError: A field of `data` or `eval` has an impossible value.
    """
    data = config.data
    low = data.short_side
    return ClipSpec(
        num_frames=config.model.num_frames,
        crop=config.model.image_size,
        short_side=config.eval.short_side,
        sampling=data.sampling,
        sampling_rate=data.sampling_rate,
        by_time=data.by_time,
        resize=data.resize,
        num_clips=num_clips,
        num_crops=num_crops,
        train_crop=data.train_crop,
        train_short_side=(low, max(low, data.short_side_max)),
        flip=data.flip,
        augment=data.augment,
        randaugment_layers=data.randaugment_layers,
        randaugment_magnitude=data.randaugment_magnitude,
    )


def load_train_clip(
    record: Record, rng: np.random.Generator, spec: ClipSpec
) -> dict[str, np.ndarray]:
    """Decodes and augments one training clip.

    Returns:
        `video` `(t, crop, crop, c)` uint8; `indices` `(t,)`, its frames; `padded`, whether the
        video is too short for it.

    Raises:
        DecodeError: The video cannot be decoded.
    """
    with record.open() as reader:
        indices = _indices(reader, spec, rng=rng)
        frames = reader.get_frames(indices)
        padded = _is_padded(reader, spec)
    if spec.augment == "autoaugment":
        frames = augment.autoaugment(frames, rng)
    elif spec.augment == "randaugment":
        layers, magnitude = spec.randaugment_layers, spec.randaugment_magnitude
        frames = augment.randaugment(frames, rng, num_layers=layers, magnitude=magnitude)
    if spec.train_crop == "multiscale":
        frames = transforms.multi_scale_crop(frames, spec.crop, rng)
    else:
        low, high = spec.train_short_side
        frames = _resize(frames, int(rng.integers(low, high, endpoint=True)), spec)
        frames = transforms.random_crop(frames, spec.crop, rng)
    if spec.flip:
        frames = transforms.random_flip(frames, rng, spec.flip)
    return {
        "video": np.ascontiguousarray(frames),
        "indices": indices.astype(np.int32),
        "padded": np.bool_(padded),
    }


def load_eval_views(video: Record | str | Path, spec: ClipSpec) -> dict[str, np.ndarray]:
    """Decodes a video once and cuts all its evaluation views.

    Returns:
        `video` `(v, t, crop, crop, c)` uint8, `v = num_clips · num_crops`, the crops of a clip
        adjacent; `indices` `(num_clips, t)`; `padded`, whether it is too short for its clips.

    Raises:
        DecodeError: The video cannot be decoded.
    """
    record = Record(Path(video), 0) if isinstance(video, str | Path) else video
    with record.open() as reader:
        indices = np.stack([_indices(reader, spec, view=view) for view in range(spec.num_clips)])
        sizes = (spec.num_clips, spec.num_crops, spec.num_frames, spec.crop, spec.crop, 3)
        views = np.empty(sizes, np.uint8)
        for place, frame in _iter_frames(reader, indices.reshape(-1)):
            clip, t = divmod(place, spec.num_frames)
            frame = _resize(frame[None], spec.short_side, spec)
            for number, crop in enumerate(transforms.eval_crops(frame, spec.crop, spec.num_crops)):
                views[clip, number, t] = crop[0]
        padded = _is_padded(reader, spec)
    views = views.reshape(-1, *views.shape[2:])  # (v t h w c)
    return {"video": views, "indices": indices.astype(np.int32), "padded": np.bool_(padded)}


def _iter_frames(reader, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Places in `indices` and their frames `(h, w, c)`, decoded one by one where that is cheap."""
    if isinstance(reader, JpegFrames):
        return reader.iter_frames(indices)
    return enumerate(reader.get_frames(indices))


def _resize(frames: np.ndarray, short_side: int, spec: ClipSpec) -> np.ndarray:
    if spec.resize == "bilinear":
        return transforms.resize_bilinear(frames, short_side)
    return transforms.resize_short_side(frames, short_side)


def _indices(reader, spec: ClipSpec, **draw) -> np.ndarray:
    """The frames of a clip; `draw`: `rng` or `view`."""
    length, times = _length(reader, spec)
    indices = sampling.make_indices(
        spec.sampling,
        length,
        spec.num_frames,
        sampling_rate=spec.sampling_rate,
        fps=reader.fps,
        num_views=spec.num_clips,
        **draw,
    )
    return indices if times is None else sampling.frames_at_times(indices, times, reader.fps)


def _length(reader, spec: ClipSpec) -> tuple[int, np.ndarray | None]:
    """Frames to sample from, and when each is shown; None: they are sampled by their number."""
    if not spec.by_time or reader.times is None or not reader.fps:
        return reader.num_frames, None
    # As many as a constant rate would have.
    return max(1, round(reader.times[-1] * reader.fps) + 1), reader.times


def _is_padded(reader, spec: ClipSpec) -> bool:
    length, _ = _length(reader, spec)
    rates = {"sampling_rate": spec.sampling_rate, "fps": reader.fps}
    return sampling.is_padded(spec.sampling, length, spec.num_frames, **rates)


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
        An iterator over what `make_train_iter` gives, with `video` `(b, v, t, h, w, c)`; what fills
        the last batch has an empty `id`.
    """
    count = -(-len(records) // (batch_size * shard[1])) * batch_size * shard[1]
    views, t, size = spec.num_clips * spec.num_crops, spec.num_frames, spec.crop
    zeros = {
        "video": np.zeros((views, t, size, size, 3), np.uint8),
        "indices": np.zeros((spec.num_clips, t), np.int32),
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


def describe_loading() -> str:
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
    ids, errors = (
        [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in batch[name]]
        for name in ("id", "error")
    )
    return arrays, ids, errors


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
    return iter(iter_dataset)


def _outlive_signals(*_) -> None:
    """Makes a worker end with its parent alone.

    Ctrl-C and cluster managers signal every process of a group; the run needs its workers to save.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()
