"""Results of a classifier: predictions and features, and their conversion to JSON and tables."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxvid.errors import import_or_explain, printable

if TYPE_CHECKING:
    import pandas


class Result:
    """A result that can be converted to a table."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return the rows of the table, each as a dict from column to value."""
        raise NotImplementedError(f"{type(self).__name__}.table_rows")

    def to_dataframe(self) -> "pandas.DataFrame":
        """Return the `table_rows` as a pandas table.

        Raises:
            InputError: The package pandas is not installed.
        """
        pandas = import_or_explain("pandas", "pandas", "to_dataframe needs")
        return pandas.DataFrame(self.table_rows())


def describe_class(label: str, probability: float) -> str:
    """Return a line with the probability and the name of a class."""
    return f"  {100 * probability:5.1f} %  {label}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction(Result):
    """The predicted classes of a video.

    Attributes:
        video: Name of the video: path, URL, name of a file object, or e.g. `<array>`.
        labels: Names of the most likely classes, in descending order of probability.
        indices: Indices of these classes.
        probabilities: Probabilities of these classes. Those of all classes sum to 1, except for a
            multi-label model (`activation` sigmoid in the model card).
        seconds: Wall time in seconds for reading and decoding the video, plus the video's share of
            the time for computing its batch.
        padded: Whether the video is too short for a clip, so that frames are repeated.
        error: Decode error, or an empty string if the video was decoded. After a decode error, only
            `video` and `error` are set.
    """

    video: str
    labels: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    seconds: float = 0.0
    padded: bool = False
    error: str = ""

    def __str__(self) -> str:
        """Return the name of the video, and one line per class."""
        if self.error:
            return f"failed: {self.error}"
        padded = "  (too short for a clip: frames are repeated)" if self.padded else ""
        pairs = zip(self.labels, self.probabilities, strict=True)
        return "\n".join([printable(self.video) + padded, *(describe_class(*p) for p in pairs)])

    def to_json(self) -> dict:
        """Return `{"video", "top": [{"label", "probability"}], "seconds", "padded"}`.

        If decoding failed: `{"video", "error"}`.
        """
        if self.error:
            return {"video": self.video, "error": self.error}
        pairs = zip(self.labels, self.probabilities, strict=True)
        return {
            "video": self.video,
            "top": [{"label": label, "probability": p} for label, p in pairs],
            "seconds": round(self.seconds, 4),
            "padded": self.padded,
        }

    def table_rows(self) -> list[dict[str, Any]]:
        """Return one row per class: `prediction_rows` of this prediction."""
        return prediction_rows(self.to_json())


# Columns of the table of predictions.
PREDICTION_COLUMNS = ("video", "rank", "label", "probability", "error")


def prediction_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per class of a prediction, with the keys `PREDICTION_COLUMNS`.

    Args:
        result: `Prediction.to_json()`. If it has no classes, the only row has None for the class.
    """
    video, error = result["video"], result.get("error", "")
    values = [
        (video, rank, entry["label"], entry["probability"], error)
        for rank, entry in enumerate(result.get("top", ()), 1)
    ]
    values = values or [(video, None, None, None, error)]
    return [dict(zip(PREDICTION_COLUMNS, row, strict=True)) for row in values]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features(Result):
    """Features of a video, averaged over its views.

    Attributes:
        video: Name of the video, as in `Prediction`.
        vector: Feature of the video `(d,)` float32: `model.features(clip)["video"]`.
        frames: Features of the frames of a clip `(t, d)` float32.
        error: As in `Prediction`; `vector` and `frames` are then empty.
    """

    video: str
    vector: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.float32))
    frames: np.ndarray = dataclasses.field(default_factory=lambda: np.empty((0, 0), np.float32))
    error: str = ""

    def __str__(self) -> str:
        """Return the sizes of the features in one line."""
        if self.error:
            return f"failed: {self.error}"
        t, d = self.frames.shape
        return f"{printable(self.video)}  {d} features, averaged from {t} frames per clip"

    def to_json(self) -> dict:
        """Return `{"video", "vector", "frames"}`, or `{"video", "error"}` if decoding failed."""
        if self.error:
            return {"video": self.video, "error": self.error}
        arrays = {"vector": self.vector.tolist(), "frames": self.frames.tolist()}
        return {"video": self.video, **arrays}

    def table_rows(self) -> list[dict[str, Any]]:
        """Return one row with `video`, `error` and the features `f0`, `f1`, … of the video."""
        features = {f"f{i}": value for i, value in enumerate(self.vector.tolist())}
        return [{"video": self.video, "error": self.error, **features}]


class ResultList(Result, list):
    """Results of several videos, in order. They are printed and converted together."""

    def __str__(self) -> str:
        """Return the results, one below the other."""
        return "\n".join(map(str, self))

    def to_json(self) -> list[dict]:
        """Return the `to_json()` of each result."""
        return [result.to_json() for result in self]

    def table_rows(self) -> list[dict[str, Any]]:
        """Return the rows of all results."""
        return [row for result in self for row in result.table_rows()]
