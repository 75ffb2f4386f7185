"""The order of the training videos: `data.sampler` and `data.repeats`."""

import collections
import dataclasses
import sys
from collections.abc import Sequence
from typing import Self

import grain
import numpy as np
from grain.experimental import WindowShuffleMapDataset

from jaxvid.data.protocols import VideoRecord
from jaxvid.data.records import labels_of
from jaxvid.errors import InputError, check_option

SAMPLERS = ("uniform", "balanced")
MAX_NAMED_CLASSES = 8  # if more classes have videos, the log names only two of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoOrder:
    """In which order, and how often, training videos are drawn.

    Attributes:
        seed: Seed of the order, the frame sampling and the augmentation.
        sampler: `uniform`: every video once per epoch. `balanced`: every class equally often per
            epoch, so that videos of small classes are repeated.
        repeats: Number of clips of each video in a batch, with different augmentation (repeated
            augmentation; Hoffer et al., arXiv:1901.09335). An epoch has as many clips as without
            repeats, as in timm and DeiT, and therefore fewer videos.
        labels: Class of each video for `balanced`; set by `for_videos`.

    Raises:
        InputError: A field has an impossible value.
    """

    seed: int
    sampler: str = "uniform"
    repeats: int = 1
    labels: tuple[int, ...] = ()

    def __post_init__(self):
        check_option("data.sampler", self.sampler, SAMPLERS)
        if self.repeats < 1:
            raise InputError(f"data.repeats={self.repeats}: must be at least 1")

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse a batch size that is not a multiple of `repeats`.

        Raises:
            InputError: It is not.
        """
        if batch_size % self.repeats:
            raise InputError(
                f"data.repeats={self.repeats}: batch_size={batch_size} is not a multiple of it; "
                "change one of the two"
            )

    def for_videos(self, records: Sequence[VideoRecord]) -> Self:
        """Return the order with the fields that depend on the videos."""
        if self.sampler == "uniform":
            return self
        return dataclasses.replace(self, labels=tuple(labels_of(records)))

    def epoch_clips(self, num_videos: int) -> int:
        """Return the number of clips in an epoch.

        It is the number of videos. With `balanced`, it is rounded up to a multiple of the number of
        classes that have videos.
        """
        num_classes = len({*self.labels}) or 1
        return num_classes * -(-num_videos // num_classes)

    def stream(self, records: Sequence[VideoRecord], batch_size: int) -> grain.MapDataset:
        """Return the endless stream of videos, one per clip.

        The video at a position depends only on the seed, and not on earlier positions.

        Args:
            records: Labelled videos, those that `for_videos` was called with.
            batch_size: Clips per batch, over all processes.
        """
        videos = self._distinct(records)
        if self.repeats == 1:
            return videos
        return grain.MapDataset.select_from_datasets([videos], _Repeats(batch_size, self.repeats))

    def _distinct(self, records: Sequence[VideoRecord]) -> grain.MapDataset:
        """Return the endless stream of videos without repeats."""
        if self.sampler == "uniform":
            return grain.MapDataset.source(records).seed(self.seed).shuffle().repeat()
        groups = collections.defaultdict(list)
        for i, label in enumerate(self.labels):
            groups[label].append(i)
        # Each class, and the order within an epoch, has its own seed.
        *seeds, order_seed = np.random.SeedSequence(self.seed).generate_state(len(groups) + 1)
        classes = [
            grain.MapDataset.source(groups[label]).shuffle(seed=int(seed)).repeat()
            for label, seed in zip(sorted(groups), seeds, strict=True)
        ]
        order = WindowShuffleMapDataset(
            grain.MapDataset.mix(classes),  # one video of each class in turn
            window_size=self.epoch_clips(len(records)),
            seed=int(order_seed) // 2,  # Grain adds the epoch; the sum must stay below 2³²
        )
        return order.map(records.__getitem__).seed(self.seed)

    def describe(self, names: Sequence[str], *, num_clips: int, batch_size: int) -> tuple[str, ...]:
        """Describe how often classes and videos are drawn, for the log.

        Args:
            names: Class names.
            num_clips: Clips per epoch, from `epoch_clips`.
            batch_size: Clips per batch, over all processes.

        Returns:
            One line per field that differs from the default.
        """
        lines = [self._describe_classes(names)] if self.sampler == "balanced" else []
        if self.repeats > 1:
            lines.append(
                f"data.repeats={self.repeats}: a batch has {batch_size // self.repeats} videos, "
                f"each {self.repeats} times; an epoch has {num_clips} clips of "
                f"{num_clips / self.repeats:.3g} videos"
            )
        return tuple(lines)

    def _describe_classes(self, names: Sequence[str]) -> str:
        """Describe how often classes and their videos are drawn with `balanced`."""
        counts = collections.Counter(self.labels)
        draws = self.epoch_clips(len(self.labels)) // len(counts)
        rates = [
            f"{names[label]} {draws / count:.3g} ({count} videos)"
            for label, count in sorted(counts.items(), key=lambda item: item[1])
        ]
        if len(rates) > MAX_NAMED_CLASSES:
            rates = [f"from {rates[-1]}", f"to {rates[0]}"]
        empty = len(names) - len(counts)
        note = f"; {empty} of {len(names)} classes have no training video" if empty else ""
        return (
            f"data.sampler=balanced: each class is drawn {draws} times per epoch. Draws per video "
            f"and epoch: {', '.join(rates)}{note}"
        )


class _Repeats(grain.transforms.DatasetSelectionMap):
    """Maps positions of clips to positions in a stream of distinct videos.

    The clips of a video are as far apart in the batch as possible, so that they are on different
    devices and are not mixed with each other by mixup within a device.

    Args:
        batch_size: Clips per batch.
        repeats: Clips of each video in a batch.
    """

    def __init__(self, batch_size: int, repeats: int):
        self._batch_size, self._videos = batch_size, batch_size // repeats

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, row = divmod(index, self._batch_size)
        return 0, batch * self._videos + row % self._videos
