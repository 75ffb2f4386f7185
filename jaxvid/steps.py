"""The pure functions that run on the device: init_state, train_step, eval_step."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxvid import mixing
from jaxvid.models import Params, build_model, merge_params, split_params


def init_state(model_config, optimizer: optax.GradientTransformation, *, seed: int) -> dict:
    """A fresh training state.

    Args:
        model_config: The network's config.
        optimizer: Gives the optimiser's part of the state.
        seed: Seed of the weights.

    Returns:
        `{"params", "opt_state", "step"}`, a tree of arrays.
    """
    _, params = split_params(build_model(model_config, nnx.Rngs(seed)))
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}


def normalize(video: jax.Array, mean: float, std: float) -> jax.Array:
    """uint8 pixels → float32 `(video / 255 - mean) / std`, of the same shape."""
    return (video.astype(jnp.float32) / 255 - mean) / std


def cross_entropy(logits: jax.Array, labels: jax.Array, *, smoothing: float) -> jax.Array:
    """Label-smoothed cross-entropy of each clip: `(1-ε)·nll + ε·mean(-log p)`.

    Args:
        logits: `(b, num_classes)`.
        labels: `(b,)` integers.
        smoothing: ε, the share of the loss that goes to the uniform distribution.

    Returns:
        `(b,)` losses, in nats.
    """
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return (1 - smoothing) * nll - smoothing * log_p.mean(axis=-1)


def train_step(
    state: dict,
    batch: dict[str, jax.Array],
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    mean: float,
    std: float,
    label_smoothing: float,
    seed: int,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    erase: float = 0.0,
) -> tuple[dict, dict[str, jax.Array]]:
    """One optimiser step on a batch.

    Args:
        state: As `init_state` gives it.
        batch: `video` `(b, t, h, w, c)` uint8, `label` `(b,)` and `mask` `(b,)`; clips whose mask
            is False count nowhere.
        graphdef: The network's structure.
        optimizer: The one that made `state`.
        mean: Subtracted from pixels in [0, 1].
        std: Divides them.
        label_smoothing: ε of the loss.
        seed: With the step number it gives the key of all that is random.
        mixup: α of mixup; 0: off.
        cutmix: α of cutmix; 0: off. One of the two is used.
        erase: Probability that a box of a clip is erased.

    Returns:
        The new state, and sums over the batch: `loss`, `top1`, `count`; and `grad_norm`.
    """
    key = jax.random.fold_in(jax.random.key(seed), state["step"])
    key, erase_key, mix_key = jax.random.split(key, 3) if erase or mixup or cutmix else (key,) * 3
    label, mask = batch["label"], batch["mask"]
    video = normalize(batch["video"], mean, std)
    if erase:
        video = mixing.erase(video, erase_key, erase)
    other, share = jnp.arange(len(label)), 1.0
    if mixup:
        video, other, share = mixing.mixup(video, mix_key, mixup)
    elif cutmix:
        video, other, share = mixing.cutmix(video, mix_key, cutmix)
    mask = mask & mask[other]  # a clip mixed with one that is missing is missing too
    count = jnp.maximum(mask.sum(), 1)

    def loss_fn(params: Params) -> tuple[jax.Array, jax.Array]:
        logits = merge_params(graphdef, params)(video, key=key)
        losses = cross_entropy(logits, label, smoothing=label_smoothing)
        if mixup or cutmix:
            others = cross_entropy(logits, label[other], smoothing=label_smoothing)
            losses = share * losses + (1 - share) * others
        return jnp.where(mask, losses, 0).sum() / count, logits

    (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    new_state = {
        "params": optax.apply_updates(state["params"], updates),
        "opt_state": opt_state,
        "step": state["step"] + 1,
    }
    metrics = {
        "loss": loss * count,
        "top1": ((logits.argmax(-1) == label) & mask).sum(),
        "count": mask.sum(),
        "grad_norm": optax.tree.norm(grads),
    }
    return new_state, metrics


def eval_step(
    params: Params, batch: dict[str, jax.Array], *, graphdef: nnx.GraphDef, mean: float, std: float
) -> dict[str, jax.Array]:
    """Classifies a batch of videos, each by the sum of its views' logits.

    Args:
        params: The network's weights.
        batch: `video` `(b, v, t, h, w, c)` uint8, `label` `(b,)` and `mask` `(b,)`; videos whose
            mask is False count nowhere.
        graphdef: The network's structure.
        mean: Subtracted from pixels in [0, 1].
        std: Divides them.

    Returns:
        Sums over the batch: `loss` (of the mean of the views' logits), `top1`, `top5` (k = the
        number of classes where there are fewer than 5), `count`, and `confusion` `(num_classes,
        num_classes)`, whose rows are labels and whose columns are predictions.
    """
    b, v, *clip = batch["video"].shape
    video = normalize(batch["video"].reshape(b * v, *clip), mean, std)
    scores = merge_params(graphdef, params)(video).reshape(b, v, -1).sum(axis=1)  # (b classes)
    label, mask = batch["label"], batch["mask"]
    num_classes = scores.shape[-1]
    _, top = jax.lax.top_k(scores, min(5, num_classes))  # (b 5)
    hits = (top == label[:, None]) & mask[:, None]
    losses = cross_entropy(scores / v, label, smoothing=0.0)
    confusion = jnp.zeros((num_classes, num_classes), jnp.int32)
    confusion = confusion.at[label, top[:, 0]].add(mask.astype(jnp.int32))
    return {
        "loss": jnp.where(mask, losses, 0).sum(),
        "top1": hits[:, 0].sum(),
        "top5": hits.sum(),
        "count": mask.sum(),
        "confusion": confusion,
    }
