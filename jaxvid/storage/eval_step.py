"""The evaluation step, and the loop that runs it or another step on batches."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxvid.distributed import sharding
from jaxvid.models import Params, merge_params
from jaxvid.storage.activation import ACTIVATIONS
from jaxvid.storage.onnx_network import OnnxNetwork
from jaxvid.storage.preprocessing import Channels, normalize

# Number of batches that the device computes while the host collects the results of earlier ones.
BATCHES_AHEAD = 1


def run_ahead(
    step: Callable[[Params, dict[str, jax.Array]], Any],
    params: Params,
    batches: Iterable[tuple[np.ndarray, Any]],
    mesh: Mesh,
) -> Iterator[tuple[Any, Any]]:
    """Run a step on batches. The device computes the next batch while the caller uses the last one.

    Args:
        step: Jitted function of the weights and a batch with the key `video`.
        params: The weights.
        batches: Pairs of this process's part of `video`, whose first axis is the batch axis, and
            metadata.
        mesh: Batches are sharded over it.

    Yields:
        Pairs of the outputs of the step, which the device may still be computing, and the metadata.
    """
    pending = collections.deque()
    for video, metadata in batches:
        arrays = sharding.to_global_arrays({"video": video}, mesh)
        pending.append((step(params, arrays), metadata))
        if len(pending) > BATCHES_AHEAD:
            yield pending.popleft()
    yield from pending


def eval_step(
    params: Params,
    batch: dict[str, jax.Array],
    *,
    graphdef: nnx.GraphDef,
    mean: Channels,
    std: Channels,
    score: str,
    activation: str = "softmax",
) -> dict[str, jax.Array]:
    """Classify a batch of videos from all their views.

    Args:
        params: The network's weights.
        batch: `video`, `(b, v, t, h, w, c)` in uint8 or uint16; see `normalize`.
        graphdef: The network's structure.
        mean: Mean that is subtracted from pixels in [0, 1].
        std: Divisor of the pixels after the mean is subtracted.
        score: `logits`: classes are ranked by their logits, summed over the views, as in the
            released protocol. `probabilities`: by their probabilities, averaged over the views.
        activation: Function from logits to probabilities, a key of `ACTIVATIONS`.

    Returns:
        `scores` and `probabilities`, both `(b, num_classes)` float32. Classes are ranked by their
        scores. The probabilities are the activation of the mean logits if `score="logits"`,
        otherwise the mean over the views of the activation of their logits.
    """
    b, v, *clip = batch["video"].shape
    video = normalize(batch["video"].reshape(b * v, *clip), mean, std)
    logits = merge_params(graphdef, params)(video).reshape(b, v, -1)  # (b v classes)
    return combine_views(logits, score=score, activation=activation)


def onnx_eval_step(
    batch: dict[str, jax.Array], *, network: OnnxNetwork, score: str, activation: str
) -> dict[str, jax.Array]:
    """Classify a batch of videos with an ONNX network; see `eval_step`."""
    video = np.asarray(batch["video"])  # (b v t h w c)
    logits = network(video.reshape(-1, *video.shape[2:]))
    logits = jnp.asarray(logits).reshape(*video.shape[:2], -1)  # (b v classes)
    return combine_views(logits, score=score, activation=activation)


def combine_views(logits: jax.Array, *, score: str, activation: str) -> dict[str, jax.Array]:
    """Combine the logits `(b, v, num_classes)` of the views; see `eval_step`."""
    activate = ACTIVATIONS[activation]
    if score == "probabilities":
        probabilities = activate(logits).mean(axis=1)
        return {"scores": probabilities, "probabilities": probabilities}
    return {
        "scores": logits.sum(axis=1),
        "probabilities": activate(logits.mean(axis=1)),
    }
