"""The evaluation protocol: preprocessing, views, and how the scores of views are combined."""

import dataclasses
from typing import Any

from jaxvid.config import CHOSEN
from jaxvid.errors import InputError, check_option
from jaxvid.models.precision import DTYPES
from jaxvid.storage.activation import ACTIVATIONS
from jaxvid.storage.preprocessing import Preprocessing

SCORES = {
    "logits": "sum of logits over the views",
    "probabilities": "mean of probabilities over the views",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalProtocol:
    """How a model is evaluated.

    Attributes:
        preprocessing: Preprocessing of clips, including the numbers of clips and crops per video.
        score: Score that classes are ranked by, one of `SCORES`.
        activation: Function from logits to probabilities, a key of `ACTIVATIONS`. With `sigmoid`,
            the data is multi-label.
        dtype: Compute dtype, one of `precision.DTYPES`; independent of the model's.
        batch_size: Videos per step, over all devices and processes.
        every_epochs: Epochs of training between two evaluations; `CHOSEN`: not known yet.

    Raises:
        InputError: A field has an impossible value.
    """

    preprocessing: Preprocessing
    score: str = "logits"
    activation: str = "softmax"
    dtype: str = "float32"
    batch_size: int = 16
    every_epochs: float = 1.0

    def __post_init__(self):
        check_option("eval.score", self.score, SCORES)
        check_option("activation", self.activation, ACTIVATIONS)
        check_option("eval.dtype", self.dtype, DTYPES)
        if self.every_epochs <= 0 and self.every_epochs != CHOSEN:
            raise InputError(f"eval.every_epochs={self.every_epochs}: must be above 0")

    @property
    def multi_label(self) -> bool:
        """Whether videos have any number of classes."""
        return self.activation == "sigmoid"

    def to_report(self) -> dict[str, Any]:
        """Return the `protocol` of `eval.json`: what accuracies depend on, except mean and std."""
        fields = self.preprocessing.to_json()
        del fields["mean"], fields["std"]  # they are properties of the weights
        fields["image_size"] = fields.pop("crop")
        fields |= {"dtype": self.dtype, "score": SCORES[self.score]}
        # Reports of single-label data have no `activation`, as before there was multi-label data.
        return fields | ({"activation": self.activation} if self.multi_label else {})
