"""Probes: classifiers that are fitted to the features of a frozen network.

The linear probe is a logistic regression. The k-NN probe compares features by cosine similarity and
weights the neighbours as in Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination", arXiv:1805.01978, section 3.4.
"""

import dataclasses
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxvid.evaluation import metrics

TEMPERATURE = 0.07  # a neighbour with the cosine similarity s has the weight exp(s / TEMPERATURE)
REGULARISATIONS = tuple(10.0**e for e in range(-4, 3))  # candidates for C of the linear probe
DEFAULT_REGULARISATION = 1.0  # C if no class has two training videos, so that none can be held out
HELD_OUT_SHARE = 0.2  # share of the training videos on which C is chosen
MAX_ITERATIONS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeData:
    """Labelled features of `n` videos or windows.

    Attributes:
        features: `(n, d)`.
        labels: `(n,)` class indices; -1 for classes that the training data does not have.
        ids: Ids of the videos, `n` texts. The windows of a video have the same id.
    """

    features: np.ndarray
    labels: np.ndarray
    ids: Sequence[str]

    def select(self, mask: np.ndarray) -> "ProbeData":
        """Return the rows of `(n,)` booleans."""
        ids = [id_ for id_, is_selected in zip(self.ids, mask, strict=True) if is_selected]
        return ProbeData(features=self.features[mask], labels=self.labels[mask], ids=ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Accuracy of a probe on the validation videos.

    Attributes:
        name: Description of the probe, e.g. `k-NN, k = 20`.
        top1_hits: `(videos,)` booleans.
        top5_hits: `(videos,)` booleans, or None if the probe does not rank five classes.
        note: A line about the fit, or empty.
    """

    name: str
    top1_hits: np.ndarray
    top5_hits: np.ndarray | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return `probe`, `top1`, `top1_interval`, `top5` and `top5_interval`, in percent."""
        values = {"probe": self.name}
        for name, hits in (("top1", self.top1_hits), ("top5", self.top5_hits)):
            known = hits is not None
            values[name] = metrics.accuracy(hits) if known else None
            values[f"{name}_interval"] = [*metrics.confidence_interval(hits)] if known else None
        return values


def hold_out(data: ProbeData, share: float) -> np.ndarray:
    """Choose videos of each class by the SHA-256 of their ids.

    Args:
        data: Labelled features.
        share: Share of the videos of each class. At least one video of each class is chosen and one
            is not, except that no video of a class with one video is chosen.

    Returns:
        `(n,)` booleans: the row belongs to a chosen video.
    """
    label_of = dict(zip(data.ids, data.labels.tolist(), strict=True))
    videos = {}
    for id_ in sorted(label_of, key=lambda id_: hashlib.sha256(id_.encode()).digest()):
        videos.setdefault(label_of[id_], []).append(id_)
    chosen = set()
    for ids in videos.values():
        count = min(max(1, round(share * len(ids))), len(ids) - 1)
        chosen.update(ids[:count])
    return np.array([id_ in chosen for id_ in data.ids])


def probe(
    train: ProbeData, val: ProbeData, num_classes: int, neighbours: Sequence[int]
) -> Iterator[ProbeResult]:
    """Fit the probes to the training data and evaluate them on the validation data.

    Args:
        train: Training data, with at least two classes.
        val: Validation data.
        num_classes: Number of classes.
        neighbours: The values of k. Each must be at most the number of training rows.

    Yields:
        The result of the linear probe, then that of each k-NN probe.
    """
    labels = _labels_of_videos(val)
    scores, name, note = _linear_scores(train, val, num_classes)
    yield _to_result(name, _average_videos(scores, val), labels, note=note)
    for k, scores in _neighbour_scores(train, val, num_classes, neighbours):
        averaged = _average_videos(scores, val)
        yield _to_result(f"k-NN, k = {k}", averaged, labels, has_top5=k >= 5)


def _to_result(
    name: str, scores: np.ndarray, labels: np.ndarray, *, has_top5: bool = True, note: str = ""
) -> ProbeResult:
    """Rank the classes by their scores `(videos, num_classes)`; ties go to the lower index.

    A class with the score 0 is never a hit: it is not among the neighbours.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    hits = (order == labels[:, None]) & (np.take_along_axis(scores, order, axis=1) > 0)
    has_top5 &= scores.shape[1] > 5
    top5 = hits.any(axis=1) if has_top5 else None
    return ProbeResult(name=name, top1_hits=hits[:, 0], top5_hits=top5, note=note)


# ------------------------------------------------------------------ videos


def _labels_of_videos(data: ProbeData) -> np.ndarray:
    """Return the label of each video, in the order of `_average_videos`."""
    _, first = np.unique(np.array(data.ids), return_index=True)
    return data.labels[first]


def _average_videos(scores: np.ndarray, data: ProbeData) -> np.ndarray:
    """Average the scores `(n, num_classes)` over the windows of each video."""
    _, videos, counts = np.unique(np.array(data.ids), return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), scores.shape[1]))
    np.add.at(sums, videos, scores)
    return sums / counts[:, None]


# ------------------------------------------------------------------ linear probe


def _linear_scores(
    train: ProbeData, val: ProbeData, num_classes: int
) -> tuple[np.ndarray, str, str]:
    """Return the probabilities `(n, num_classes)` of the linear probe, its name, and a note."""
    is_held_out = hold_out(train, HELD_OUT_SHARE)
    regularisation, note = DEFAULT_REGULARISATION, "no class has two training videos to choose C"
    if is_held_out.any():
        held_out, rest = train.select(is_held_out), train.select(~is_held_out)
        labels, accuracies = _labels_of_videos(held_out), []
        for c in REGULARISATIONS:
            scores, _ = _fit_linear(rest, held_out, num_classes, c)
            hits = _to_result("", _average_videos(scores, held_out), labels).top1_hits
            accuracies.append(hits.mean())
        regularisation, note = REGULARISATIONS[int(np.argmax(accuracies))], ""
    scores, has_converged = _fit_linear(train, val, num_classes, regularisation)
    if not has_converged:
        note = f"the linear probe has not converged in {MAX_ITERATIONS} iterations"
    return scores, f"linear, C = {regularisation:g}", note


def _fit_linear(
    train: ProbeData, val: ProbeData, num_classes: int, regularisation: float
) -> tuple[np.ndarray, bool]:
    """Fit a logistic regression on standardised features.

    Returns:
        The probabilities of `val`, `(n, num_classes)`; and whether the fit has converged.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.features)
    classifier = LogisticRegression(C=regularisation, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # returned instead
        classifier.fit(scaler.transform(train.features), train.labels)
    scores = np.zeros((len(val.features), num_classes))
    scores[:, classifier.classes_] = classifier.predict_proba(scaler.transform(val.features))
    return scores, bool(classifier.n_iter_.max() < MAX_ITERATIONS)


# ------------------------------------------------------------------ k-NN probe


def _neighbour_scores(
    train: ProbeData, val: ProbeData, num_classes: int, neighbours: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each k and the share of each class in the weights of the neighbours `(n, classes)`."""
    if not neighbours:
        return
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=max(neighbours), metric="cosine", algorithm="brute")
    distances, indices = search.fit(train.features).kneighbors(val.features)  # (n, k)
    rows = np.arange(len(indices))[:, None]
    for k in neighbours:
        # The weights are divided by that of the nearest neighbour, so that none is too large.
        weights = np.exp((distances[:, :1] - distances[:, :k]) / TEMPERATURE)
        scores = np.zeros((len(indices), num_classes))
        np.add.at(scores, (rows, train.labels[indices[:, :k]]), weights)
        yield k, scores / scores.sum(axis=1, keepdims=True)
