"""The pure functions that run on the device: init_state, train_step, eval_step."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxvid.models import Params, build_model, merge_params, split_params
from jaxvid.storage.eval_step import normalize
from jaxvid.training import batch_augmentation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a training step does to clips, labels and weights, beside the optimiser's part.

    Attributes:
        seed: With the step number it gives the key of all that is random.
        mean: Subtracted from pixels in [0, 1].
        std: Divides them.
        label_smoothing: ε of the loss.
        mixup_alpha: alpha of mixup; 0: off.
        cutmix_alpha: alpha of cutmix; 0: off. One of the two is used.
        erase_prob: Probability that a box of a clip is erased.
        accumulate_steps: Parts of the batch that are computed one after the other.
        ema_decay: Of the average of the weights; 0: none is kept.
        frozen: Names of weights that stay as they are and get no gradient.
    """

    seed: int
    mean: float = 0.5
    std: float = 0.5
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    erase_prob: float = 0.0
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    frozen: frozenset[str] = frozenset()

    def trainable(self, params: Params) -> Params:
        """Those of the weights that learn."""
        return {name: leaf for name, leaf in params.items() if name not in self.frozen}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A network whose logits are imitated (Hinton et al., arXiv:1503.02531).

    Attributes:
        graphdef: Its structure; its weights are an argument of the step.
        mean: What it wants subtracted from pixels in [0, 1].
        std: What it wants them divided by.
        weight: Of its part of the loss; the labels have the rest.
        temperature: T divides both networks' logits; the divergence is multiplied by T².
    """

    graphdef: nnx.GraphDef
    mean: float
    std: float
    weight: float
    temperature: float


def init_state(
    model_config, optimizer: optax.GradientTransformation, recipe: Recipe, *, seed: int
) -> dict:
    """A fresh training state.

    Args:
        model_config: The network's config.
        optimizer: Gives the optimiser's part of the state.
        recipe: Says which weights learn, and whether an average is kept.
        seed: Seed of the weights.

    Returns:
        `{"params", "opt_state", "step"}`, and `"ema"` where there is an average: a tree of arrays.
    """
    _, params = split_params(build_model(model_config, nnx.Rngs(seed)))
    opt_state = optimizer.init(recipe.trainable(params))
    state = {"params": params, "opt_state": opt_state, "step": jnp.zeros((), jnp.int32)}
    return {**state, "ema": params} if recipe.ema_decay else state


def eval_params(state: dict) -> Params:
    """The weights that are evaluated and kept: the average where there is one."""
    return state.get("ema", state["params"])


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


def divergence(logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """`T² · KL(teacher / T ‖ student / T)` of each clip.

    Args:
        logits: The student's, `(b, num_classes)`.
        teacher_logits: Likewise.
        temperature: T.

    Returns:
        `(b,)`, in nats; its gradient does not shrink with T.
    """
    log_p = jax.nn.log_softmax(logits / temperature)
    log_q = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    return temperature**2 * (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1)


def train_step(
    state: dict,
    batch: dict[str, jax.Array],
    teacher_params: Params | None = None,
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    teacher: Teacher | None = None,
) -> tuple[dict, dict[str, jax.Array]]:
    """One optimiser step on a batch.

    Args:
        state: As `init_state` gives it.
        batch: `video` `(b, t, h, w, c)` uint8, `label` `(b,)` and `mask` `(b,)`; clips whose mask
            is False count nowhere.
        teacher_params: The teacher's weights; given with `teacher`.
        graphdef: The network's structure.
        optimizer: The one that made `state`.
        recipe: What is done to clips, labels and weights.
        teacher: Whose logits are imitated; None: nobody's.

    Returns:
        The new state, and sums over the batch: `loss`, `top1`, `count`; and `grad_norm`.
    """
    key = jax.random.fold_in(jax.random.key(recipe.seed), state["step"])
    key, clips = _mix(batch, key, recipe)
    count = jnp.maximum(clips["mask"].sum(), 1)
    fixed = {name: state["params"][name] for name in recipe.frozen}

    def loss_fn(params: Params, part: dict, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        video, label, smoothing = part["video"], part["label"], recipe.label_smoothing
        logits = merge_params(graphdef, {**fixed, **params})(video, key=key)
        losses = cross_entropy(logits, label, smoothing=smoothing)
        if recipe.mixup_alpha or recipe.cutmix_alpha:
            others = cross_entropy(logits, part["other"], smoothing=smoothing)
            losses = part["share"] * losses + (1 - part["share"]) * others
        if teacher is not None:
            video = ((video * recipe.std + recipe.mean) - teacher.mean) / teacher.std
            wanted = jax.lax.stop_gradient(merge_params(teacher.graphdef, teacher_params)(video))
            imitation = divergence(logits, wanted, teacher.temperature)
            losses = (1 - teacher.weight) * losses + teacher.weight * imitation
        top1 = ((logits.argmax(-1) == label) & part["mask"]).sum()
        return jnp.where(part["mask"], losses, 0).sum() / count, top1

    params = recipe.trainable(state["params"])
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, top1), grads = _accumulate(grad_fn, params, clips, key, recipe.accumulate_steps)
    updates, opt_state = optimizer.update(grads, state["opt_state"], params)
    new_state = {
        "params": {**fixed, **optax.apply_updates(params, updates)},
        "opt_state": opt_state,
        "step": state["step"] + 1,
    }
    if recipe.ema_decay:
        # Young averages follow faster, or they would keep the initial weights for long.
        step = new_state["step"].astype(jnp.float32)
        keep = jnp.minimum(recipe.ema_decay, (1 + step) / (10 + step))
        new_state["ema"] = {
            name: keep * state["ema"][name] + (1 - keep) * leaf
            for name, leaf in new_state["params"].items()
        }
    metrics = {
        "loss": loss * count,
        "top1": top1,
        "count": clips["mask"].sum(),
        "grad_norm": optax.tree.norm(grads),
    }
    return new_state, metrics


def _mix(batch: dict, key: jax.Array, recipe: Recipe) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Normalises, erases and mixes the clips of a batch.

    Returns:
        The key for what comes after it; and arrays with an entry a clip: `video`, `label`, `mask`
        and, where clips are mixed, `other` (the partner's label) and `share` (of the clip itself).
    """
    random = recipe.erase_prob or recipe.mixup_alpha or recipe.cutmix_alpha
    key, erase_key, mix_key = jax.random.split(key, 3) if random else (key,) * 3
    label, mask = batch["label"], batch["mask"]
    video = normalize(batch["video"], recipe.mean, recipe.std)
    if recipe.erase_prob:
        video = batch_augmentation.erase(video, erase_key, recipe.erase_prob)
    if not (recipe.mixup_alpha or recipe.cutmix_alpha):
        return key, {"video": video, "label": label, "mask": mask}
    if recipe.mixup_alpha:
        video, other, share = batch_augmentation.mixup(video, mix_key, recipe.mixup_alpha)
    else:
        video, other, share = batch_augmentation.cutmix(video, mix_key, recipe.cutmix_alpha)
    return key, {
        "video": video,
        "label": label,
        "mask": mask & mask[other],  # a clip mixed with one that is missing is missing too
        "other": label[other],
        "share": jnp.full(label.shape, share),
    }


def _accumulate(grad_fn, params: Params, clips: dict, key: jax.Array, num_parts: int):
    """The sums over `num_parts` parts of a batch of what `grad_fn` gives for each.

    Every part takes its clips from all over the batch, so that all devices have a share of it.
    """
    if num_parts == 1:
        return grad_fn(params, clips, key)
    parts = {
        name: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1)  # (parts b/parts ...)
        for name, x in clips.items()
    }

    def add(total, part_and_key):
        return jax.tree.map(jnp.add, total, grad_fn(params, *part_and_key)), None

    keys = jax.random.split(key, num_parts)
    first = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], parts), keys[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    return jax.lax.scan(add, zeros, (parts, keys))[0]
