"""The order of the training videos: the values of `data.sampler`."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Self

import grain
import numpy as np
from grain.experimental import WindowShuffleMapDataset

from jaxvid.data.protocols import VideoRecord
from jaxvid.errors import check_option

SAMPLERS = ("uniform", "balanced")
MAX_NAMED_CLASSES = 8  # if more classes have videos, the log names only two of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoOrder:
    """In which order, and how often, training videos are drawn.

    Attributes:
        seed: Seed of the order, the frame sampling and the augmentation.
        sampler: `uniform`: every video once per epoch. `balanced`: every class equally often per
            epoch, so that videos of small classes are repeated.
        labels: Class of each video for `balanced`; set by `for_videos`.

    Raises:
        InputError: There is no such sampler.
    """

    seed: int
    sampler: str = "uniform"
    labels: tuple[int, ...] = ()

    def __post_init__(self):
        check_option("data.sampler", self.sampler, SAMPLERS)

    def for_videos(self, records: Sequence[VideoRecord]) -> Self:
        """Return the order with the fields that depend on the videos."""
        if self.sampler == "uniform":
            return self
        return dataclasses.replace(self, labels=tuple(record.label for record in records))

    def epoch_clips(self, num_videos: int) -> int:
        """Return the number of clips in an epoch.

        It is the number of videos. With `balanced`, it is rounded up to a multiple of the number of
        classes that have videos.
        """
        num_classes = len({*self.labels}) or 1
        return num_classes * -(-num_videos // num_classes)

    def stream(self, records: Sequence[VideoRecord]) -> grain.MapDataset:
        """Return the endless stream of videos.

        The video at a position depends only on the seed, and not on earlier positions.

        Args:
            records: Labelled videos, those that `for_videos` was called with.
        """
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

    def describe(self, names: Sequence[str]) -> tuple[str, ...]:
        """Describe how often classes and their videos are drawn, for the log.

        Args:
            names: Class names.

        Returns:
            One line; none with `uniform`.
        """
        if self.sampler == "uniform":
            return ()
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
            f"and epoch: {', '.join(rates)}{note}",
        )
