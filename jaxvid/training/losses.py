"""The losses of the labels and of a teacher, and weights for classes of different sizes."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvid.data.label_sets import count_classes
from jaxvid.data.protocols import VideoRecord
from jaxvid.errors import InputError, check_option
from jaxvid.storage.activation import ACTIVATIONS

CLASS_WEIGHTS = ("none", "balanced")
MAX_NAMED_CLASSES = 8  # if there are more classes, the log names only two of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss of the labels.

    Attributes:
        name: `softmax`: cross-entropy, for videos with one class. `sigmoid`: binary cross-entropy
            of each class, for multi-label data.
        class_weights: Weights of the classes: `none`; `balanced`, inversely proportional to the
            number of training videos; or numbers above 0, separated by commas.

    Raises:
        InputError: A field has an impossible value.
    """

    name: str = "softmax"
    class_weights: str = "none"

    def __post_init__(self):
        check_option("loss.name", self.name, ACTIVATIONS)
        self._listed_weights()

    @property
    def multi_label(self) -> bool:
        """Whether videos have any number of classes."""
        return self.name == "sigmoid"

    def _listed_weights(self) -> tuple[float, ...]:
        """Return the weights that `class_weights` lists; none for the names in `CLASS_WEIGHTS`."""
        if self.class_weights in CLASS_WEIGHTS:
            return ()
        try:
            weights = tuple(map(float, self.class_weights.strip("[]() ").split(",")))
        except ValueError:
            weights = ()
        if not weights or not all(0 < weight < np.inf for weight in weights):
            raise InputError(
                f"loss.class_weights={self.class_weights!r}: must be none, balanced or a number "
                "above 0 for each class, separated by commas"
            )
        return weights

    def weights(self, records: Sequence[VideoRecord], num_classes: int) -> tuple[float, ...]:
        """Return the weight of each class; none if all classes have the same weight.

        Args:
            records: The training videos.
            num_classes: The number of classes.

        Returns:
            With `balanced`, the weight of a class with n of N labels is N / (C · n), where C is the
            number of classes that have videos, as in scikit-learn's `compute_class_weight`. Classes
            without videos have the weight 1.

        Raises:
            InputError: The list of weights does not have one number per class.
        """
        if self.class_weights == "balanced":
            counts = count_classes((record.label for record in records), num_classes)
            share = counts * (counts > 0).sum() / counts.sum()
            return tuple(1 / x if x else 1.0 for x in share.tolist())
        weights = self._listed_weights()
        if weights and len(weights) != num_classes:
            raise InputError(
                f"loss.class_weights={self.class_weights!r} has {len(weights)} numbers, expected "
                f"one for each of the {num_classes} classes"
            )
        return weights


def describe_weights(weights: tuple[float, ...], names: Sequence[str]) -> tuple[str, ...]:
    """Describe the class weights for the log: one line, or none without weights."""
    if not weights:
        return ()
    listed = [f"{names[i]} {weights[i]:.3g}" for i in np.argsort(weights)]
    if len(listed) > MAX_NAMED_CLASSES:
        listed = [f"from {listed[0]}", f"to {listed[-1]}"]
    return (f"class weights of the loss: {', '.join(listed)}",)


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    smoothing: float,
    class_weights: tuple[float, ...] = (),
) -> jax.Array:
    """Return the cross-entropy of each clip with smoothed labels.

    Args:
        logits: `(b, num_classes)`.
        labels: `(b,)` integers.
        smoothing: ε; labels become `(1-ε)·one_hot + ε/num_classes`.
        class_weights: Weight of each class's term, as in PyTorch's `CrossEntropyLoss`; empty: 1.

    Returns:
        `(b,)` losses, in nats.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    if class_weights:
        targets *= jnp.array(class_weights)[None]
    return optax.softmax_cross_entropy(logits, targets)


def binary_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    smoothing: float,
    class_weights: tuple[float, ...] = (),
) -> jax.Array:
    """Return the binary cross-entropy of each clip, averaged over the classes.

    Args:
        logits: `(b, num_classes)`.
        labels: Multi-hot `(b, num_classes)`.
        smoothing: ε; labels become `(1-ε)·labels + ε/num_classes`, as in timm.
        class_weights: Weight of each class's term, as in PyTorch's `BCEWithLogitsLoss`; empty: 1.

    Returns:
        `(b,)` losses, in nats.
    """
    targets = optax.smooth_labels(labels.astype(logits.dtype), smoothing)
    losses = optax.sigmoid_binary_cross_entropy(logits, targets)  # (b num_classes)
    if class_weights:
        losses *= jnp.array(class_weights)[None]
    return losses.mean(axis=-1)


def total_weight(clips: dict[str, jax.Array], class_weights: tuple[float, ...]) -> jax.Array:
    """Return the sum of the weights of a batch's labels.

    The mean of a batch's cross-entropy is divided by it, as in PyTorch's `CrossEntropyLoss`.

    Args:
        clips: `label` and `mask` `(b,)`; if clips are mixed, also `partner_label` and
            `label_weight`, which is the weight of `label` in the mixture.
        class_weights: Weight of each class.
    """
    weights = jnp.array(class_weights)
    per_clip = weights[clips["label"]]
    if "partner_label" in clips:
        share = clips["label_weight"]
        per_clip = share * per_clip + (1 - share) * weights[clips["partner_label"]]
    return jnp.where(clips["mask"], per_clip, 0).sum()


def distillation_loss(
    logits: jax.Array, teacher_logits: jax.Array, temperature: float
) -> jax.Array:
    """Return the distillation loss `T² · KL(teacher / T ‖ student / T)` of each clip.

    Args:
        logits: The student's logits `(b, num_classes)`.
        teacher_logits: The teacher's logits `(b, num_classes)`.
        temperature: T.

    Returns:
        `(b,)` losses, in nats; the factor T² keeps the size of the gradient independent of T.
    """
    log_student = jax.nn.log_softmax(logits / temperature)
    log_teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)
