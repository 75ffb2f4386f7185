"""The Grain chain: records → decoded, cropped, batched uint8 clips.

Every random choice comes from the generator that Grain derives from (seed, position), so batches do
not depend on the number of threads, workers or restarts.
"""

from collections.abc import Sequence

import grain
import numpy as np

from jaxvid.data import sampling, transforms
from jaxvid.data.decode import Video
from jaxvid.data.sources import Record


def load_train_clip(
    record: Record, rng: np.random.Generator, *, num_frames: int, short_side: int, crop: int
) -> dict[str, np.ndarray]:
    """Decodes and augments one training clip.

    Returns:
        `video` `(t, crop, crop, c)` uint8 and `label`, an int32.
    """
    with Video(record.path) as video:
        indices = sampling.segment_indices(video.num_frames, num_frames, rng=rng)
        frames = video.get_frames(indices)
    frames = transforms.random_crop(transforms.resize_short_side(frames, short_side), crop, rng)
    return {"video": frames, "label": np.int32(record.label)}


def load_eval_views(
    path, *, num_frames: int, short_side: int, crop: int, num_clips: int, num_crops: int
) -> np.ndarray:
    """Decodes a video once and cuts all its evaluation views.

    Returns:
        `(v, t, crop, crop, c)` uint8, `v = num_clips · num_crops`, the crops of a clip adjacent.
    """
    with Video(path) as video:
        indices = [
            sampling.segment_indices(video.num_frames, num_frames, view=view)
            for view in range(num_clips)
        ]
        frames = video.get_frames(np.concatenate(indices))
    frames = transforms.resize_short_side(frames, short_side)
    crops = transforms.eval_crops(frames, crop, num_crops)
    views = np.stack(crops).reshape(num_crops, num_clips, num_frames, crop, crop, 3)
    return views.swapaxes(0, 1).reshape(-1, num_frames, crop, crop, 3)  # (v t h w c)


def make_train_iter(
    records: Sequence[Record],
    *,
    batch_size: int,
    seed: int,
    num_frames: int,
    short_side: int,
    crop: int,
    num_threads: int,
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """An endless, reshuffled, checkpointable stream of training batches.

    Args:
        records: Labelled videos.
        batch_size: Clips in a batch of this process.
        seed: Decides order, frames and crops.
        num_frames: Frames in a clip.
        short_side: The frames' shorter side in pixels before cropping.
        crop: Height and width of a clip in pixels.
        num_threads: Threads that decode, in each worker.
        num_workers: Worker processes; 0: none, threads alone.
        shard: `(index, count)` of this process among all; shards are disjoint.

    Returns:
        An iterator over `{"video": (b, t, h, w, c) uint8, "label": (b,) int32}`.
    """

    def load(record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return load_train_clip(record, rng, num_frames=num_frames, short_side=short_side, crop=crop)

    dataset = grain.MapDataset.source(records).seed(seed).shuffle().repeat()
    dataset = dataset[shard[0] :: shard[1]].random_map(load).batch(batch_size)
    return _to_iter(dataset, num_threads, num_workers)


def make_eval_iter(
    records: Sequence[Record],
    *,
    batch_size: int,
    num_frames: int,
    short_side: int,
    crop: int,
    num_clips: int,
    num_crops: int,
    num_threads: int,
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Every video once, in order; what fills the last batch is masked.

    All shards give the same number of batches. Arguments as in `make_train_iter`, and the views.

    Returns:
        An iterator over `{"video": (b, v, t, h, w, c) uint8, "label": (b,) int32, "mask": (b,)
        bool}`; the mask is False for padding, whose clips are zeros.
    """
    count = -(-len(records) // (batch_size * shard[1])) * batch_size * shard[1]
    num_views = num_clips * num_crops

    def load(index: int) -> dict[str, np.ndarray]:
        if index >= len(records):
            views = np.zeros((num_views, num_frames, crop, crop, 3), np.uint8)
            return {"video": views, "label": np.int32(0), "mask": np.bool_(False)}
        views = load_eval_views(
            records[index].path,
            num_frames=num_frames,
            short_side=short_side,
            crop=crop,
            num_clips=num_clips,
            num_crops=num_crops,
        )
        label = np.int32(records[index].label)
        return {"video": views, "label": label, "mask": np.bool_(True)}

    dataset = grain.MapDataset.range(count)[shard[0] :: shard[1]].map(load).batch(batch_size)
    return _to_iter(dataset, num_threads, num_workers)


def _to_iter(dataset: grain.MapDataset, num_threads: int, num_workers: int):
    # The batch comes before the workers, so that their number does not change what is in it. The
    # buffer counts batches and is bounded: Grain's default would hold 500 of them.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 2)
    iter_dataset = dataset.to_iter_dataset(options)
    if num_workers:
        iter_dataset = iter_dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
        )
    return iter(iter_dataset)
