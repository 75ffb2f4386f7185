"""The evaluation step, and the normalisation of pixels that training and evaluation share."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxvid.data.clips.transforms import FRACTIONS
from jaxvid.models import Params, merge_params


def normalize(video: jax.Array, mean: float, std: float) -> jax.Array:
    """Normalise pixels to float32 `(grey / 255 - mean) / std`, of the same shape.

    Args:
        video: Grey levels as uint8, or as uint16 in units of 1 / `transforms.FRACTIONS` grey level.
        mean: Subtracted from pixels in [0, 1].
        std: Divides them.
    """
    white = 255 * FRACTIONS if video.dtype == jnp.uint16 else 255
    return (video.astype(jnp.float32) / white - mean) / std


def eval_step(
    params: Params,
    batch: dict[str, jax.Array],
    *,
    graphdef: nnx.GraphDef,
    mean: float,
    std: float,
    score: str,
) -> dict[str, jax.Array]:
    """Classifies a batch of videos by all their views.

    Args:
        params: The network's weights.
        batch: `video` `(b, v, t, h, w, c)` uint8 or uint16, see `normalize`.
        graphdef: The network's structure.
        mean: Subtracted from pixels in [0, 1].
        std: Divides them.
        score: What classes are ranked by: `logits`, their sum over the views (the released
            protocol), or `probabilities`, their mean.

    Returns:
        `scores` and `probabilities`, both `(b, num_classes)` float32: what classes are ranked by;
        and the softmax of the mean logits, or the mean of the views' softmaxes.
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
