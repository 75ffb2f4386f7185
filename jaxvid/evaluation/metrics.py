"""Numbers out of an evaluation's scores, on the host: exact, each video counted once."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

NUM_BINS = 15  # of the calibration error
NUM_RESAMPLES = 2000  # of the bootstrap


@dataclasses.dataclass
class Results:
    """What an evaluation found for each of `n` videos.

    Attributes:
        ids: Their ids.
        labels: `(n,)` integers.
        scores: `(n, num_classes)` float32: what the classes are ranked by; zeros where it failed.
        probabilities: `(n, num_classes)` float32: rows sum to 1; zeros where it failed.
        padded: `(n,)` booleans: too short for its clips.
        released: `(n,)` booleans: counted by the released evaluation of `uniform_10s`.
        errors: `(n,)` strings: why it could not be decoded; empty: it could.
        seconds: Wall time; of an interrupted evaluation that of all its runs.
    """

    ids: list[str]
    labels: np.ndarray
    scores: np.ndarray
    probabilities: np.ndarray
    padded: np.ndarray
    released: np.ndarray
    errors: list[str]
    seconds: float

    @property
    def failed(self) -> np.ndarray:
        """`(n,)` booleans: which videos could not be decoded. They count as wrong."""
        return np.array([bool(error) for error in self.errors], bool)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.scores.shape[1]

    def top(self, k: int) -> np.ndarray:
        """`(n, min(k, num_classes))`: the best classes, the best first; -1 where it failed."""
        order = np.argsort(-self.scores, axis=1, kind="stable")[:, :k]
        return np.where(self.failed[:, None], -1, order)

    def hits(self, k: int) -> np.ndarray:
        """`(n,)` booleans: whether the label is among the best `k`."""
        return (self.top(k) == self.labels[:, None]).any(axis=1)

    def confusion(self) -> np.ndarray:
        """`(num_classes, num_classes)` counts of those that did not fail: labels × predictions."""
        counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        good = ~self.failed
        np.add.at(counts, (self.labels[good], self.top(1)[good, 0]), 1)
        return counts

    def per_class(self) -> np.ndarray:
        """`(num_classes,)` top-1 accuracies in percent; nan for classes without videos."""
        count = np.bincount(self.labels, minlength=self.num_classes)
        correct = np.bincount(self.labels[self.hits(1)], minlength=self.num_classes)
        with np.errstate(invalid="ignore"):
            return 100 * correct / count

    def losses(self) -> np.ndarray:
        """`(n,)` nats: minus the logarithm of the label's probability; nan where it failed."""
        own = self.probabilities[np.arange(len(self.labels)), self.labels].astype(np.float64)
        return np.where(self.failed, np.nan, -np.log(np.maximum(own, 1e-38)))


def accuracy(hits: np.ndarray) -> float:
    """Percent of True."""
    return 100 * int(hits.sum()) / len(hits)


def confidence_interval(hits: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """A 95 % bootstrap interval of an accuracy: videos drawn again with replacement.

    Where all or none are right, every resample is the same; then it is the exact interval (Clopper
    and Pearson, 1934), which for 5 right of 5 begins at 47.8 %.

    Args:
        hits: `(n,)` booleans, a video each.
        seed: Of the draws.

    Returns:
        The 2.5th and 97.5th percentile, in percent.
    """
    if hits.all() or not hits.any():
        bound = 100 * 0.025 ** (1 / len(hits))  # so few videos say no more
        return (bound, 100.0) if hits.all() else (0.0, 100 - bound)
    # The number of hits in a resample of n videos is binomial.
    draws = np.random.default_rng(seed).binomial(len(hits), hits.mean(), NUM_RESAMPLES)
    low, high = np.percentile(100 * draws / len(hits), [2.5, 97.5])
    return float(low), float(high)


def calibration(confidences: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, float]:
    """How far confidence and accuracy lie apart (Guo et al., arXiv:1706.04599, section 2).

    Args:
        confidences: `(n,)` probabilities of the predictions.
        hits: `(n,)` booleans.

    Returns:
        `(bins, 3)`: mean confidence, accuracy and count of 15 equal bins, nan where empty; and the
        expected calibration error in percent.
    """
    if not len(hits):
        return np.full((NUM_BINS, 3), np.nan), math.nan
    place = np.minimum((confidences * NUM_BINS).astype(int), NUM_BINS - 1)
    count = np.bincount(place, minlength=NUM_BINS)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(place, confidences, NUM_BINS) / count
        correct = np.bincount(place, hits, NUM_BINS) / count
    error = np.nansum(count * np.abs(confidence - correct)) / len(hits)
    return np.stack([confidence, correct, count], axis=1), float(100 * error)


def compare_hits(before: np.ndarray, after: np.ndarray) -> dict:
    """Whether two models differ on the same videos: McNemar's exact test.

    Args:
        before: `(n,)` booleans, one model's hits.
        after: `(n,)` booleans, the other's on the same videos.

    Returns:
        `gained` and `lost` videos, the difference of top-1 in percent, and `p_value`: how likely so
        uneven a split of the changes is when the models are equally good.
    """
    gained, lost = int((~before & after).sum()), int((before & ~after).sum())
    changed, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(changed, i) for i in range(fewer + 1))
    return {
        "num_videos": len(before),
        "gained": gained,
        "lost": lost,
        "difference": 100 * (gained - lost) / len(before),
        "p_value": min(1.0, 2 * tail / 2**changed) if changed else 1.0,
    }


def order_by_confusion(confusion: Sequence) -> np.ndarray:
    """An order of the classes that puts those which are taken for each other side by side.

    Greedy: the next class is the one that is confused most with those placed last.

    Args:
        confusion: `(c, c)` counts.

    Returns:
        `(c,)` class numbers.
    """
    counts = np.asarray(confusion, float)
    alike = counts + counts.T
    np.fill_diagonal(alike, 0)
    left = np.ones(len(alike), bool)
    order = [int(alike.sum(axis=1).argmax())]
    left[order[0]] = False
    near = alike[order[0]].copy()
    while left.any():
        best = int(np.where(left, near, -1).argmax())
        order.append(best)
        left[best] = False
        near = 0.5 * near + alike[best]
    return np.array(order)
