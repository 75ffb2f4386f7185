"""Engines: the compiled programs of a network, with one interface for all runtimes."""

from typing import Any, Protocol

import numpy as np

from jaxvid.data.clips.clip import ClipSpec
from jaxvid.errors import InputError
from jaxvid.inference.compiled_network import CompiledNetwork
from jaxvid.storage.activation import probabilities
from jaxvid.storage.onnx_network import OnnxNetwork
from jaxvid.storage.preprocessing import clip_shape


class Engine(Protocol):
    """Compiled functions ("programs") of a network.

    A program maps a batch to an array or a dict of arrays. The first axis of all inputs and outputs
    is the batch. Only `score` is required; requests that need a missing program are refused.

    | program | input | output |
    |---|---|---|
    | `score` | pixels of a view `(b, 1, t, h, w, c)` | logits `(b, classes)` |
    | `embed` | pixels of a view `(b, 1, t, h, w, c)` | `video` `(b, d)`, `frames` `(b, t, d)` |
    | `attend` | pixels of a clip `(1, t, h, w, c)` | `logits` and rollouts, `(1, ...)` |
    | `frame_features` | pixels of frames `(b, t, h, w, c)` | `(b, t, d)` |
    | `score_features` | features of a clip `(b, 1, t, d)` | logits `(b, classes)` |

    Attributes:
        programs: Names of the programs.
    """

    programs: tuple[str, ...]

    def warm_up(self, program: str, size: int) -> None:
        """Compile a program for batches of a size, and run it once.

        Raises:
            InputError: The outputs are not finite, because the weights are damaged.
        """

    def run(self, program: str, batch: np.ndarray) -> Any:
        """Return the result of a program. Only sizes that were warmed up are used.

        Raises:
            InputError: The outputs are not finite, because the weights are damaged.
        """

    def probabilities(self, logits: np.ndarray, num_views: int) -> np.ndarray:
        """Map logits `(..., classes)`, summed over views, to probabilities, in float64."""


class JaxEngine:
    """The engine that runs JAX programs.

    Args:
        network: The network.
        spec: Sizes of a clip.
    """

    def __init__(self, network: CompiledNetwork, spec: ClipSpec):
        self._network, self._spec, self._features = network, spec, None
        self.programs = ("score", "embed", "attend")
        if network.shares_frames:
            self.programs += ("frame_features", "score_features")
        self.probabilities = network.probabilities

    def warm_up(self, program: str, size: int) -> None:
        """Compile a program for batches of a size, and run it once."""
        self.run(program, np.zeros((size, *self._item_shape(program)), self._item_dtype(program)))

    def run(self, program: str, batch: np.ndarray) -> Any:
        """Return the result of a program."""
        outputs = self._network.apply(getattr(self._network, program), batch)
        if program == "attend":  # its outputs have no batch axis
            return {name: value[None] for name, value in outputs.items()}
        if program == "frame_features":
            self._features = outputs.shape[1:], outputs.dtype
        return outputs

    def _item_shape(self, program: str) -> tuple[int, ...]:
        """Return the shape of one item of a batch. `frame_features` runs before its consumer."""
        if program == "score_features":
            return (1, *self._features[0])
        leading = () if program in ("attend", "frame_features") else (1,)
        return clip_shape(self._spec, *leading)

    def _item_dtype(self, program: str) -> np.dtype:
        if program == "score_features":
            return self._features[1]
        return np.dtype(self._spec.eval_dtype)


class OnnxEngine:
    """An engine that computes `score` with ONNX Runtime, and the other programs with JAX, if any.

    Clips in uint16 are rounded to uint8 (see `ClipSpec.eval_dtype`).

    Args:
        network: The exported network.
        activation: Function from logits to probabilities, a key of `activation.ACTIVATIONS`.
        other: The engine of the other programs; None: there are no others.
    """

    def __init__(self, network: OnnxNetwork, activation: str, other: JaxEngine | None = None):
        self._network, self._activation, self._other = network, activation, other
        self.programs = other.programs if other else ("score",)

    def warm_up(self, program: str, size: int) -> None:
        """Compile a program for batches of a size, and run it once."""
        if program == "score":
            self.run(program, np.zeros((size, 1, *self._network.clip_shape), np.uint8))
        else:
            self._other.warm_up(program, size)

    def run(self, program: str, batch: np.ndarray) -> Any:
        """Return the result of a program."""
        if program != "score":
            return self._other.run(program, batch)
        logits = self._network(batch[:, 0])
        if not np.isfinite(logits).all():
            raise InputError(
                "the logits are not finite, so the weights are damaged; retrain the "
                "model or export it again"
            )
        return logits

    def probabilities(self, logits: np.ndarray, num_views: int) -> np.ndarray:
        """Map logits `(..., classes)`, summed over views, to probabilities, in float64."""
        return probabilities(logits.astype(np.float64) / num_views, self._activation)
