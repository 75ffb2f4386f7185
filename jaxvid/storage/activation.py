"""The function from a network's logits to probabilities: the field `activation` of a model card."""

import functools

import jax
import numpy as np
import scipy.special

# softmax: a video has one class, and the probabilities of all classes sum to 1. sigmoid: a video
# has any number of classes, and each class has a probability of its own.
ACTIVATIONS = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
_ON_HOST = {
    "softmax": functools.partial(scipy.special.softmax, axis=-1),
    "sigmoid": scipy.special.expit,
}


def probabilities(logits: np.ndarray, activation: str) -> np.ndarray:
    """Return the probabilities of logits `(..., num_classes)`, computed on the host.

    Args:
        logits: Logits, in any float type.
        activation: A key of `ACTIVATIONS`.
    """
    return _ON_HOST[activation](logits)
