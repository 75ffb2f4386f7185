"""Orders of class names, and how well each explains a network's predictions."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxvid.data.class_names import PUBLIC_DATASETS, class_names
from jaxvid.errors import InputError
from jaxvid.evaluation.metrics import accuracy, compare_hits, confidence_interval

STORED = "as stored"
NUM_RANDOM = 10_000  # random orders that the best order is compared with
CHANCE_LEVEL = 0.01  # significance level of the comparison with random orders
ORDER_LEVEL = 0.05  # significance level of the comparison of two orders
# Percentage points that the accuracy may be below the expected one, because videos differ.
TOLERANCE = 10.0


def without_punctuation(name: str) -> str:
    """Return a name without punctuation; underscores count as spaces."""
    return " ".join(re.sub(r"[^\w\s]", "", name.replace("_", " ")).split())


SORT_KEYS: dict[str, Callable[[str], str]] = {
    "alphabetical": str,
    "alphabetical without punctuation": without_punctuation,
    "alphabetical, ignoring case": str.casefold,
    "alphabetical with underscores for spaces": lambda name: name.replace(" ", "_"),
}


class NameIndex:
    """Look-up of class indices by name: case, punctuation and underscores are ignored.

    If two names are equal under this rule, names must be spelled exactly.

    Args:
        names: The class names.

    Raises:
        InputError: Names are not unique.
    """

    def __init__(self, names: Sequence[str]):
        if len({*names}) < len(names):
            raise InputError("the class names are not unique; pass other names with --labels FILE")
        keys = [without_punctuation(name).casefold() for name in names]
        self._is_exact = len({*keys}) < len(keys)
        self._index = {key: i for i, key in enumerate(names if self._is_exact else keys)}

    def find(self, name: str) -> int | None:
        """Return the index of a class, or None if there is no such class."""
        return self._index.get(name if self._is_exact else without_punctuation(name).casefold())

    def permutation(self, names: Sequence[str]) -> np.ndarray | None:
        """Return the index of each of the names, or None if they are not the same classes."""
        indices = [self.find(name) for name in names]
        is_same = None not in indices and len({*indices}) == len(self._index) == len(indices)
        return np.array(indices) if is_same else None


@dataclasses.dataclass(frozen=True)
class Order:
    """An order of the classes.

    Attributes:
        titles: Descriptions of the order; several if known orders are equal.
        classes: `(num_classes,)` class index of each output of the network.
    """

    titles: tuple[str, ...]
    classes: np.ndarray

    @property
    def title(self) -> str:
        """All descriptions in one line."""
        return " = ".join(self.titles)


def known_orders(
    names: Sequence[str], *, stored: bool, others: Mapping[str, Sequence[str]] | None = None
) -> list[Order]:
    """Return the known orders of a model's classes; equal orders are merged.

    Args:
        names: The class names; `Order.classes` are indices into them.
        stored: Whether the order of `names` is that of the model card. It is then the first order.
        others: Description → names of further orders.

    Raises:
        InputError: Names are not unique, or those of `others` are not the same classes.
    """
    index = NameIndex(names)
    orders = {STORED: np.arange(len(names))} if stored else {}
    for title, key in SORT_KEYS.items():
        orders[title] = np.array(sorted(range(len(names)), key=lambda i: key(names[i])))
    for dataset, title in PUBLIC_DATASETS.items():
        classes = index.permutation(class_names(dataset))
        if classes is not None:
            orders[f"official {title}"] = classes
    for title, other_names in (others or {}).items():
        classes = index.permutation(other_names)
        if classes is None:
            raise InputError(f"{title}: the names are not those of the model; correct them")
        orders[title] = classes
    titles: dict[tuple[int, ...], list[str]] = {}
    for title, classes in orders.items():
        titles.setdefault(tuple(classes.tolist()), []).append(title)
    return [Order(tuple(group), np.array(classes)) for classes, group in titles.items()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Result of the comparison of several orders.

    Attributes:
        best: The order that fits best, or None if nothing can be concluded.
        is_plausible: Whether the stored order is plausible.
        lines: Accuracy of each order, and the conclusion.
    """

    best: Order | None
    is_plausible: bool
    lines: tuple[str, ...]


def compare_orders(
    orders: Sequence[Order],
    outputs: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    expected_top1: float | None = None,
) -> Verdict:
    """Find the order that explains a network's predictions best.

    The best order must be more accurate than random orders (permutation test). It replaces the
    stored order if it is more accurate than the stored order (McNemar's exact test), or if the
    stored order is not more accurate than random orders. The significance levels are divided by
    the number of orders. Random orders keep videos of one class together, so that many videos of
    few classes do not count as independent evidence.

    Args:
        orders: The orders, from `known_orders`.
        outputs: `(n,)` index of the network's highest output for each video.
        labels: `(n,)` class index of each video.
        names: The class names.
        expected_top1: Accuracy in percent that the right order should have, or None if unknown.
    """
    hits = [order.classes[outputs] == labels for order in orders]
    lines = [f"{'top-1':>7}  {'95 % interval':>17}  order of the class names"]
    for order, order_hits in zip(orders, hits, strict=True):
        low, high = confidence_interval(order_hits)
        lines.append(f"{accuracy(order_hits):5.1f} %  {low:5.1f} to {high:5.1f} %  {order.title}")
    top = max(range(len(orders)), key=lambda i: hits[i].sum())  # the first of equal ones
    best, most = orders[top], int(hits[top].sum())
    random_hits = _random_hits(outputs, labels, len(names))
    p_values = [(1 + (random_hits >= h.sum()).sum()) / (1 + NUM_RANDOM) for h in hits]
    lines.append("")
    if (p_value := p_values[top]) * len(orders) >= CHANCE_LEVEL:
        lines.append(
            f"Nothing can be concluded: {100 * p_value:.2g} % of random orders are at least as "
            "accurate as the best order; use more videos of more classes"
        )
        return Verdict(best=None, is_plausible=False, lines=tuple(lines))
    lines += _describe_ties(orders, hits, top)
    if STORED not in orders[0].titles:
        lines.append(f"The model has no class names; the best order is: {best.title}")
        return Verdict(best=best, is_plausible=False, lines=tuple(lines))
    test = compare_hits(hits[0], hits[top])
    is_worse = test["p_value"] * (len(orders) - 1) < ORDER_LEVEL
    is_worse |= p_values[0] * len(orders) >= CHANCE_LEVEL  # the stored order is like a random one
    if most > hits[0].sum() and is_worse:
        lines.append(
            f"The stored order is not plausible; this order fits better: {best.title} "
            f"({test['gained']} more videos are correct, {test['lost']} fewer, "
            f"p={test['p_value']:.2g})"
        )
        return Verdict(best=best, is_plausible=False, lines=tuple(lines))
    if most > hits[0].sum():
        lines.append(
            f"The difference from the best order ({best.title}) is not significant "
            f"(p={test['p_value']:.2g}); classes that would decide: "
            f"{_differing(orders[0], best, names)}"
        )
    if expected_top1 is not None and confidence_interval(hits[0])[1] < expected_top1 - TOLERANCE:
        lines.append(
            f"The stored order is not plausible: its accuracy is far below the expected "
            f"{expected_top1:g} %. No known order fits; the model may use another one"
        )
        return Verdict(best=None, is_plausible=False, lines=tuple(lines))
    lines.append("The stored order is plausible")
    return Verdict(best=orders[0], is_plausible=True, lines=tuple(lines))


def _random_hits(outputs: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the number of hits of each of `NUM_RANDOM` random orders."""
    rng = np.random.default_rng(0)
    orders = (rng.permutation(num_classes) for _ in range(NUM_RANDOM))
    return np.array([np.count_nonzero(order[outputs] == labels) for order in orders])


def _describe_ties(orders: Sequence[Order], hits: Sequence[np.ndarray], top: int) -> list[str]:
    """Return a line that names the orders with exactly the hits of the best order."""
    equal = [
        order.title
        for i, order in enumerate(orders)
        if i != top and np.array_equal(hits[i], hits[top])
    ]
    if not equal:
        return []
    return [f"These videos do not distinguish the best order from: {'; '.join(equal)}"]


def _differing(first: Order, second: Order, names: Sequence[str]) -> str:
    """Return the names of at most five classes whose index differs between two orders."""
    classes = first.classes[first.classes != second.classes]
    more = f" and {len(classes) - 5} more" if len(classes) > 5 else ""
    return ", ".join(names[c] for c in classes[:5]) + more
