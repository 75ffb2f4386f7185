"""Comparison of orders of class names with synthetic predictions."""

import numpy as np
import pytest

from jaxvid.data.class_names import class_names
from jaxvid.errors import InputError
from jaxvid.evaluation.class_order import (
    STORED,
    NameIndex,
    compare_orders,
    known_orders,
    without_punctuation,
)

K600 = list(class_names("kinetics600"))


def predict(labels, num_classes: int, share: float, order=None) -> np.ndarray:
    """Return outputs of a network that classifies this share of the videos correctly.

    Args:
        labels: `(n,)` class indices.
        num_classes: Number of classes.
        share: Share of correct predictions.
        order: `(num_classes,)` class index of each output, or None for the identity.
    """
    rng = np.random.default_rng(0)
    wrong = rng.integers(num_classes, size=len(labels))
    classes = np.where(rng.random(len(labels)) < share, labels, wrong)
    return classes if order is None else np.argsort(order)[classes]


def test_equal_orders_are_merged():
    orders = known_orders(K600, stored=True)
    assert [order.titles for order in orders] == [
        (
            STORED,
            "alphabetical",
            "alphabetical, ignoring case",
            "alphabetical with underscores for spaces",
            "official Kinetics-600",
        ),
        ("alphabetical without punctuation",),
    ]
    [first, second] = orders
    assert (first.classes == np.arange(600)).all()
    names = [K600[c] for c in second.classes]
    assert names == sorted(K600, key=without_punctuation)


def test_the_official_order_is_recognised_despite_different_spelling():
    spelled = [name.replace(" ", "_").replace("(", "").upper() for name in reversed(K600)]
    official = known_orders(spelled, stored=True)[-1]
    assert official.title == "official Kinetics-600"
    assert (official.classes == np.arange(600)[::-1]).all()


def test_names_that_differ_in_punctuation_only_must_be_spelled_exactly():
    index = NameIndex(["c", "C++", "d"])
    assert [index.find(name) for name in ("c", "C++", "c++", "d")] == [0, 1, None, 2]
    assert NameIndex(["C++", "d e"]).find("D_E") == 1
    with pytest.raises(InputError, match="class names are not unique"):
        NameIndex(["a", "a"])


def test_the_right_order_is_plausible_with_few_videos():
    labels = np.arange(0, 600, 40)  # 15 videos, one per class
    orders = known_orders(K600, stored=True)
    verdict = compare_orders(orders, predict(labels, 600, 0.8), labels, K600, 84.5)
    assert verdict.is_plausible
    assert verdict.best is orders[0]
    assert verdict.lines[-1] == "The stored order is plausible"
    assert "do not distinguish the best order from: alphabetical without" in verdict.lines[-2]


def test_another_order_that_fits_better_is_found():
    true_order = np.random.default_rng(1).permutation(600)
    others = {"other.txt": [K600[c] for c in true_order]}
    orders = known_orders(K600, stored=True, others=others)
    labels = np.arange(0, 600, 20)
    verdict = compare_orders(orders, predict(labels, 600, 0.8, true_order), labels, K600)
    assert not verdict.is_plausible
    assert verdict.best.title == "other.txt"
    assert "this order fits better: other.txt (" in verdict.lines[-1]


@pytest.mark.parametrize(("per_class", "is_plausible"), [(10, False), (1, True)])
def test_orders_that_differ_in_few_classes(per_class, is_plausible):
    """Only enough videos of the classes whose index differs can refute the stored order."""
    orders = known_orders(K600, stored=True)
    differing = orders[1].classes[orders[1].classes != orders[0].classes]
    labels = np.concatenate([np.arange(0, 600, 10), np.repeat(differing[:2], per_class)])
    outputs = predict(labels, 600, 1.0, orders[1].classes)
    verdict = compare_orders(orders, outputs, labels, K600)
    assert verdict.is_plausible == is_plausible
    if is_plausible:
        assert "is not significant" in verdict.lines[-2]
        assert all(K600[c] in verdict.lines[-2] for c in differing)


@pytest.mark.parametrize("num_classes", [2, 600])
def test_nothing_is_concluded_near_chance(num_classes):
    names = [f"class {i:03d}" for i in range(num_classes)]
    labels = np.arange(40) % num_classes
    # A perfect model of two classes proves little: half of all orders fit perfectly or not at all.
    share = 1.0 if num_classes == 2 else 0.0
    orders = known_orders(names, stored=True)
    verdict = compare_orders(orders, predict(labels, num_classes, share), labels, names)
    assert (verdict.best, verdict.is_plausible) == (None, False)
    assert "Nothing can be concluded" in verdict.lines[-1]


def test_many_videos_of_one_class_are_not_independent_evidence():
    labels = np.zeros(100, int)
    orders = known_orders(K600[:50], stored=True)
    verdict = compare_orders(orders, labels, labels, K600[:50])
    assert "Nothing can be concluded" in verdict.lines[-1]


def test_an_accuracy_far_below_the_expected_one_is_not_plausible():
    """The order of some checkpoints equals the alphabetical one for a part of the classes."""
    true_order = np.arange(600)
    true_order[350:] = np.roll(true_order[350:], 1)
    labels = np.arange(0, 600, 4)
    outputs = predict(labels, 600, 0.85, true_order)
    orders = known_orders(K600, stored=True)
    verdict = compare_orders(orders, outputs, labels, K600, 84.5)
    assert (verdict.best, verdict.is_plausible) == (None, False)
    assert "far below the expected 84.5 %" in verdict.lines[-1]
    assert compare_orders(orders, outputs, labels, K600).is_plausible


def test_a_model_without_names_gets_the_best_order():
    labels = np.arange(0, 600, 40)
    orders = known_orders(K600, stored=False)
    verdict = compare_orders(orders, predict(labels, 600, 0.9), labels, K600)
    assert verdict.best.title.startswith("alphabetical = ")
    assert not verdict.is_plausible


def test_other_classes_are_refused():
    with pytest.raises(InputError, match="other.txt: the names are not those of the model"):
        known_orders(["a", "b"], stored=True, others={"other.txt": ["a", "c"]})
