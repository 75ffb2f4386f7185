"""A network whose programs are compiled once per batch shape."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxvid.errors import InputError
from jaxvid.inference.attention_rollout import roll_out
from jaxvid.models import Params, family_of, merge_params, split_params
from jaxvid.progress import compiling
from jaxvid.storage import activation
from jaxvid.storage.preprocessing import Preprocessing, normalize

# A function of the weights and one array. It returns an array or a dict of arrays.
Function = Callable[[Params, jax.Array], Any]


class CompiledNetwork:
    """A network on the first device, with the functions that inference computes.

    The functions `score`, `frame_features`, `score_features`, `embed` and `attend` are not called
    directly, but through `apply` and `run`, which compile them.

    Args:
        model: The network.
        preprocessing: Its mean and std are used to normalise pixels.
        activation_name: Function from logits to probabilities, a key of `activation.ACTIVATIONS`.

    Attributes:
        shares_frames: Whether the features of a frame do not depend on the other frames of a clip.
    """

    def __init__(self, model: nnx.Module, preprocessing: Preprocessing, activation_name: str):
        self.shares_frames = family_of(model.config).shares_frames
        self._graphdef, self._params = split_params(model)
        self._normalize = functools.partial(
            normalize, mean=preprocessing.mean, std=preprocessing.std
        )
        self._activation_name = activation_name
        self._programs = {}  # (function name, shape and dtype of its input) → compiled program

    def probabilities(self, logits: np.ndarray, num_views: int = 1) -> np.ndarray:
        """Map logits `(..., num_classes)`, summed over views, to probabilities, in float64."""
        return activation.probabilities(
            logits.astype(np.float64) / num_views, self._activation_name
        )

    def score(self, params: Params, views: jax.Array) -> jax.Array:
        """Map pixels `(b, v, t, h, w, c)` to logits `(b, num_classes)`, summed over the views."""
        b, v, *clip = views.shape
        video = self._normalize(views.reshape(b * v, *clip))
        return merge_params(self._graphdef, params)(video).reshape(b, v, -1).sum(axis=1)

    def frame_features(self, params: Params, video: jax.Array) -> jax.Array:
        """Map pixels `(b, t, h, w, c)` to the features of each frame `(b, t, d)`."""
        return merge_params(self._graphdef, params).frame_features(self._normalize(video))

    def score_features(self, params: Params, features: jax.Array) -> jax.Array:
        """Map features `(b, v, t, d)` to logits `(b, num_classes)`, summed over the views."""
        model, (b, v, t, d) = merge_params(self._graphdef, params), features.shape
        logits = model.classify(features.reshape(b * v, t, d))
        return logits.reshape(b, v, -1).sum(axis=1)

    def embed(self, params: Params, views: jax.Array) -> dict[str, jax.Array]:
        """Map pixels `(b, v, t, h, w, c)` to features, averaged over the views.

        Returns:
            `frames` `(b, t, d)` and `video` `(b, d)`, float32.
        """
        b, v, *clip = views.shape
        video = self._normalize(views.reshape(b * v, *clip))
        features = merge_params(self._graphdef, params).features(video)
        return {
            name: x.astype(jnp.float32).reshape(b, v, *x.shape[1:]).mean(axis=1)
            for name, x in features.items()
        }

    def attend(self, params: Params, video: jax.Array) -> dict[str, jax.Array]:
        """Map the pixels of one clip `(1, t, h, w, c)` to logits and attention rollouts.

        Returns:
            `logits` `(num_classes,)`, and the rollout of each attention of the network (see
            `attention_rollout.roll_out`).
        """
        model, video = merge_params(self._graphdef, params), self._normalize(video)
        rollouts = {name: roll_out(weights[0]) for name, weights in model.attention(video).items()}
        return {"logits": model(video)[0], **rollouts}

    def compile(
        self, function: Function, shape: tuple[int, ...], dtype: DTypeLike
    ) -> jax.stages.Compiled:
        """Compile a function, once per shape and dtype. A slow compilation is announced."""
        key = (function.__name__, shape, np.dtype(dtype))
        if key not in self._programs:
            lowered = jax.jit(function).lower(self._params, jax.ShapeDtypeStruct(shape, dtype))
            with compiling("the network"):
                self._programs[key] = lowered.compile()
        return self._programs[key]

    def apply(self, function: Function, inputs: np.ndarray) -> Any:
        """Return the result of a function for one batch, as NumPy arrays.

        Raises:
            InputError: A value is not finite.
        """
        program = self.compile(function, inputs.shape, inputs.dtype)
        outputs = jax.device_get(program(self._params, inputs))
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outputs)):
            raise InputError(
                "the outputs of the network are not finite, so the weights are damaged; retrain "
                "or reconvert the model"
            )
        return outputs

    def run(self, function: Function, inputs: np.ndarray, size: int) -> Any:
        """Return the results of a function for inputs that are split into batches.

        Args:
            function: Function whose results have one row per row of its input.
            inputs: Its inputs; the first axis is split.
            size: Rows per batch. The last batch is padded with zeros.

        Raises:
            InputError: A value is not finite.
        """
        outputs = []
        for start in range(0, len(inputs), size):
            batch = inputs[start : start + size]
            padded = np.zeros((size, *batch.shape[1:]), batch.dtype)
            padded[: len(batch)] = batch
            outputs.append(self.apply(function, padded))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(inputs)], *outputs)
