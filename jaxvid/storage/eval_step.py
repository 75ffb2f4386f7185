"""The evaluation step."""

import jax
from flax import nnx

from jaxvid.models import Params, merge_params
from jaxvid.storage.preprocessing import Channels, normalize


def eval_step(
    params: Params,
    batch: dict[str, jax.Array],
    *,
    graphdef: nnx.GraphDef,
    mean: Channels,
    std: Channels,
    score: str,
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

    Returns:
        `scores` and `probabilities`, both `(b, num_classes)` float32. Classes are ranked by their
        scores. The probabilities are the softmax of the mean logits if `score="logits"`, otherwise
        the mean over the views of the softmax of their logits.
    """
    b, v, *clip = batch["video"].shape
    video = normalize(batch["video"].reshape(b * v, *clip), mean, std)
    logits = merge_params(graphdef, params)(video).reshape(b, v, -1)  # (b v classes)
    if score == "probabilities":
        probabilities = jax.nn.softmax(logits).mean(axis=1)
        return {"scores": probabilities, "probabilities": probabilities}
    return {
        "scores": logits.sum(axis=1),
        "probabilities": jax.nn.softmax(logits.mean(axis=1)),
    }
