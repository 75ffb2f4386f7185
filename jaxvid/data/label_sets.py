"""Labels of multi-label data, in which a video has any number of classes."""

import dataclasses
from collections.abc import Iterable
from typing import Self

import numpy as np

SEPARATOR = ";"


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """The classes of a video. `np.asarray` returns it as a multi-hot array.

    Attributes:
        classes: Class indices, sorted.
        num_classes: Number of classes of the data.
    """

    classes: tuple[int, ...]
    num_classes: int

    @classmethod
    def make(cls, label: "Label", num_classes: int) -> Self:
        """Return the set of the classes of a label."""
        return cls(classes_of(label), num_classes)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """Return the multi-hot array, `(num_classes,)`."""
        array = np.zeros(self.num_classes, dtype)
        array[[*self.classes]] = 1
        return array

    def __str__(self) -> str:
        return SEPARATOR.join(map(str, self.classes))


# The label of a record: a class index; several class indices in a multi-label list; or these as a
# `LabelSet` once the data set is opened for multi-label training or evaluation.
Label = int | tuple[int, ...] | LabelSet


def classes_of(label: Label) -> tuple[int, ...]:
    """Return the class indices of a label."""
    if isinstance(label, LabelSet):
        return label.classes
    return label if isinstance(label, tuple) else (label,)


def count_classes(labels: Iterable[Label], num_classes: int) -> np.ndarray:
    """Return the number of videos of each class, `(num_classes,)`."""
    classes = [index for label in labels for index in classes_of(label)]
    return np.bincount(np.array(classes, int), minlength=num_classes)


def to_json(label: Label) -> int | list[int]:
    """Return a label as JSON stores it: a class index, or a list of them if it is a set."""
    return int(label) if isinstance(label, int | np.integer) else [*classes_of(label)]
