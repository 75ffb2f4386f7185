"""Accuracies, average precision, confusion matrix and calibration from an evaluation's scores."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy

NUM_BINS = 15  # bins of the reliability diagram and of the calibration error


@dataclasses.dataclass
class Results:
    """Scores, probabilities and decode errors of the `n` videos of an evaluation.

    Attributes:
        ids: The videos' ids.
        labels: `(n,)` class indices; in multi-label data multi-hot `(n, num_classes)`.
        scores: `(n, num_classes)` float32; a higher score ranks higher. Zeros if decoding failed.
        probabilities: `(n, num_classes)` float32. Rows sum to 1 (not in multi-label data), or are
            zeros if decoding failed.
        padded: `(n,)` booleans: the video is shorter than its clips, which repeat frames. False if
            decoding failed.
        released: `(n,)` booleans: STAM's released evaluation would count the video, because it
            lasts at least 10 s. False if decoding failed.
        errors: The decode error of each video; an empty string if it was decoded.
        seconds: Wall time in seconds, summed over all runs of an interrupted evaluation.
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
        """`(n,)` booleans: the video could not be decoded. It counts as wrong."""
        return np.array([bool(error) for error in self.errors], bool)

    @property
    def multi_label(self) -> bool:
        """Whether videos have any number of classes."""
        return self.labels.ndim == 2

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.scores.shape[1]

    def label(self, index: int) -> int | list[int]:
        """Return the class index of a video; in multi-label data, the list of its classes."""
        label = self.labels[index]
        return np.flatnonzero(label).tolist() if self.multi_label else int(label)

    def count_labels(self, mask: np.ndarray) -> np.ndarray:
        """Return how many videos of a mask `(n,)` have each class, `(num_classes,)`."""
        labels = self.labels[mask]
        if self.multi_label:
            return np.count_nonzero(labels, axis=0)
        return np.bincount(labels, minlength=self.num_classes)

    def top(self, k: int) -> np.ndarray:
        """Return the `k` best classes, best first, `(n, min(k, num_classes))`; -1: failed video."""
        order = np.argsort(-self.scores, axis=1, kind="stable")[:, :k]
        return np.where(self.failed[:, None], -1, order)

    def hits(self, k: int) -> np.ndarray:
        """Return `(n,)` booleans: the label is among the `k` best classes.

        In multi-label data: one of the video's classes is.
        """
        return hits(self.labels, self.top(k))

    def confusion(self) -> np.ndarray:
        """Return the confusion matrix, without failed videos.

        Returns:
            `(num_classes, num_classes)` counts: rows are labels, columns are predictions.
        """
        counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        decoded = ~self.failed
        np.add.at(counts, (self.labels[decoded], self.top(1)[decoded, 0]), 1)
        return counts

    def per_class(self) -> np.ndarray:
        """Return the top-1 accuracy of each class in percent, `(num_classes,)`.

        In multi-label data, it is the average precision. It is nan for classes without videos.
        """
        if self.multi_label:
            columns = zip(self.labels.T, self.scores.T, strict=True)
            return np.array([average_precision(y, s, self.failed) for y, s in columns])
        hits = self.hits(1)
        count, correct = self.count_labels(np.ones_like(hits)), self.count_labels(hits)
        with np.errstate(invalid="ignore"):
            return 100 * correct / count

    def losses(self) -> np.ndarray:
        """Return the cross-entropy per video in nats, `(n,)`; nan for failed videos.

        In multi-label data, it is the binary cross-entropy, averaged over the classes.
        """
        if self.multi_label:
            p = np.clip(self.probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
            losses = -np.where(self.labels, np.log(p), np.log1p(-p)).mean(axis=1)
            return np.where(self.failed, np.nan, losses)
        own = self.probabilities[np.arange(len(self.labels)), self.labels].astype(np.float64)
        return np.where(self.failed, np.nan, -np.log(np.maximum(own, 1e-38)))


def hits(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return `(n,)` booleans: whether one of the classes is a label of the video.

    Args:
        labels: As in `Results`.
        classes: `(n, k)` class indices; -1: none.
    """
    if labels.ndim == 1:
        return (classes == labels[:, None]).any(axis=1)
    return (np.take_along_axis(labels, classes, axis=1).astype(bool) & (classes >= 0)).any(axis=1)


def average_precision(labels: np.ndarray, scores: np.ndarray, failed: np.ndarray) -> float:
    """Return the average precision of a class in percent; nan if no video has the class.

    It is Σ (R_n − R_{n−1}) · P_n over the thresholds n, as in scikit-learn: P_n and R_n are the
    precision and recall of the videos whose score is at least the n-th largest score. Videos with
    the same score share a threshold. Failed videos are never found, which lowers the recall.

    Args:
        labels: `(n,)`, non-zero for videos that have the class.
        scores: `(n,)`.
        failed: `(n,)` booleans: the video could not be decoded.
    """
    num_positive = np.count_nonzero(labels)
    if not num_positive:
        return math.nan
    scores, positive = scores[~failed], labels[~failed] != 0
    order = np.argsort(-scores, kind="stable")
    is_last = np.diff(scores[order], append=np.nan) != 0  # of the videos with the same score
    found = np.cumsum(positive[order])[is_last]
    precision = found / (1 + np.flatnonzero(is_last))
    return float(100 * (np.diff(found, prepend=0) * precision).sum() / num_positive)


def accuracy(hits: np.ndarray) -> float:
    """Return the percentage of True in `(n,)` booleans."""
    return 100 * int(hits.sum()) / len(hits)


def confidence_interval(hits: np.ndarray) -> tuple[float, float]:
    """Return the exact 95 % confidence interval of an accuracy (Clopper & Pearson, 1934).

    Args:
        hits: `(n,)` booleans, one per video.

    Returns:
        Lower and upper bound, in percent.
    """
    interval = scipy.stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, method="exact")
    return 100 * float(interval.low), 100 * float(interval.high)


def calibration(confidences: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the reliability diagram and the expected calibration error.

    Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, section 2.

    Args:
        confidences: `(n,)` probabilities of the predictions.
        hits: `(n,)` booleans.

    Returns:
        The reliability diagram `(15, 3)`: mean confidence, accuracy (both in [0, 1], nan if the bin
        is empty) and number of videos of each bin; all bins have the same width. And the expected
        calibration error in percent, or nan if there are no videos.
    """
    if not len(hits):
        return np.full((NUM_BINS, 3), np.nan), math.nan
    bins = np.minimum((confidences * NUM_BINS).astype(int), NUM_BINS - 1)
    count = np.bincount(bins, minlength=NUM_BINS)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(bins, confidences, NUM_BINS) / count
        correct = np.bincount(bins, hits, NUM_BINS) / count
    error = np.nansum(count * np.abs(confidence - correct)) / len(hits)
    return np.stack([confidence, correct, count], axis=1), float(100 * error)


def compare_hits(before: np.ndarray, after: np.ndarray) -> dict:
    """Compare the hits of two models on the same videos with McNemar's exact test.

    Args:
        before: `(n,)` booleans, the first model's hits.
        after: `(n,)` booleans, the second model's hits.

    Returns:
        `num_videos`; `gained`, the number of videos that only the second model classifies
        correctly; `lost`, the number that only the first does; `difference`, the second top-1
        accuracy minus the first, in percentage points; and `p_value`, two-sided, for the hypothesis
        that both models are equally accurate.
    """
    gained, lost = int((~before & after).sum()), int((before & ~after).sum())
    changed = gained + lost
    return {
        "num_videos": len(before),
        "gained": gained,
        "lost": lost,
        "difference": 100 * (gained - lost) / len(before),
        "p_value": float(scipy.stats.binomtest(gained, changed, 0.5).pvalue) if changed else 1.0,
    }


def order_by_confusion(confusion: Sequence | np.ndarray) -> np.ndarray:
    """Order the classes so that those often confused with each other are adjacent.

    The algorithm is greedy. It starts with the class that is confused most often, and repeatedly
    appends the class that is confused most often with the classes already in the order. In this
    count, confusions with the last class have weight 1, with the class before it 1/2, then 1/4, ...

    Args:
        confusion: `(num_classes, num_classes)` counts, from `Results.confusion`.

    Returns:
        `(num_classes,)` class indices.
    """
    counts = np.asarray(confusion, float)
    similarity = counts + counts.T
    np.fill_diagonal(similarity, 0)
    remaining = np.ones(len(similarity), bool)
    order = [int(similarity.sum(axis=1).argmax())]
    remaining[order[0]] = False
    weights = similarity[order[0]].copy()
    while remaining.any():
        best = int(np.where(remaining, weights, -1).argmax())
        order.append(best)
        remaining[best] = False
        weights = 0.5 * weights + similarity[best]
    return np.array(order)
