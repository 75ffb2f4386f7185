"""Pure functions of training, which are jitted and run on the device."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxvid.distributed import sharding
from jaxvid.errors import InputError, check_option
from jaxvid.models import Params, merge_params
from jaxvid.storage.preprocessing import Channels, normalize, renormalize
from jaxvid.training import batch_augmentation
from jaxvid.training.losses import (
    binary_cross_entropy,
    cross_entropy,
    distillation_loss,
    total_weight,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Options of the training step, except those of the optimizer.

    Attributes:
        seed: Seed of the random numbers; each step folds its number into the key.
        mean: Mean that is subtracted from pixels in [0, 1].
        std: Divisor of the pixels after the mean is subtracted.
        label_smoothing: ε, the weight of the uniform distribution in the smoothed labels.
        mixup_alpha: Parameter of mixup, which draws λ from Beta(alpha, alpha); 0: off.
        cutmix_alpha: The same for CutMix; 0: off. Mixup and CutMix cannot be combined.
        mix_within: What clips are mixed within: `device` (each device's part of the batch, without
            communication) or `batch`.
        frozen: Names of weights that are not trained; set by `for_run`.
        mix_groups: Number of groups within which clips are mixed; set by `for_run`.
        erase_prob: Probability that a box of a clip is erased.
        accumulate_steps: Number of microbatches per batch for gradient accumulation; 1: off.
        multi_label: Whether labels are multi-hot, with the loss `binary_cross_entropy`.
        class_weights: Weight of each class in the loss; empty: none. Set by `train`, as it may
            depend on the data.
        gather: Function that gathers the weights that devices share (`sharding.gather_fsdp`); set
            by `make_step_program`.
        ema_decay: Decay of the exponential moving average of the weights; 0: no average.

    Raises:
        InputError: A field has an impossible value.
    """

    seed: int
    mean: Channels = 0.5
    std: Channels = 0.5
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_within: str = "device"
    frozen: frozenset[str] = frozenset()
    mix_groups: int = 1
    erase_prob: float = 0.0
    accumulate_steps: int = 1
    multi_label: bool = False
    class_weights: tuple[float, ...] = ()
    gather: Callable[[Params], Params] = lambda params: params
    ema_decay: float = 0.0

    def __post_init__(self):
        check_option("mix_within", self.mix_within, ("device", "batch"))
        if self.mixup_alpha and self.cutmix_alpha:
            values = f"mixup_alpha={self.mixup_alpha}, cutmix_alpha={self.cutmix_alpha}"
            raise InputError(f"{values}: only one can be used")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay={self.ema_decay}: must be at least 0 and below 1")

    def for_run(self, mesh: Mesh, batch_size: int, frozen: frozenset[str]) -> "Recipe":
        """Return the recipe with the fields that depend on the network and the mesh.

        If each device has only one clip, a group of `mix_groups` has the clips of several devices.
        """
        groups = mesh.shape["data"] * mesh.shape["fsdp"] if self.mix_within == "device" else 1
        while groups > 1 and (batch_size < 2 * groups or batch_size % groups):
            groups //= 2
        return dataclasses.replace(self, mix_groups=groups, frozen=frozen)

    def trainable(self, params: Params) -> Params:
        """Return the weights that are trained."""
        return {name: leaf for name, leaf in params.items() if name not in self.frozen}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """The teacher of a distillation (Hinton et al., arXiv:1503.02531).

    Attributes:
        graphdef: Structure of the network; its weights are an argument of the step.
        mean: Mean that the teacher's preprocessing subtracts from pixels in [0, 1].
        std: Divisor of the teacher's pixels after the mean is subtracted.
        weight: Weight w of the distillation loss; the loss of the labels has the weight 1 - w.
        temperature: Divisor T of the logits of both networks. The loss is multiplied by T².
    """

    graphdef: nnx.GraphDef
    mean: Channels
    std: Channels
    weight: float
    temperature: float


def init_state(params: Params, optimizer: optax.GradientTransformation, recipe: Recipe) -> dict:
    """Make a training state from initial weights.

    Args:
        params: The weights.
        optimizer: The optimizer, which makes its part of the state.
        recipe: Names the frozen weights, and says whether a moving average is kept.

    Returns:
        A tree of arrays: `{"params", "opt_state", "step"}`, and `"ema"` if a moving average
        is kept.
    """
    opt_state = optimizer.init(recipe.trainable(params))
    state = {"params": params, "opt_state": opt_state, "step": jnp.zeros((), jnp.int32)}
    # A copy, because the training step donates both.
    return {**state, "ema": jax.tree.map(jnp.copy, params)} if recipe.ema_decay else state


def eval_params(state: dict) -> Params:
    """Return the weights to evaluate and export: the moving average if there is one."""
    return state.get("ema", state["params"])


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
    """Update the training state on one batch.

    Args:
        state: Made by `init_state`.
        batch: `video` `(b, t, h, w, c)` uint8, `label` `(b,)` (multi-hot `(b, num_classes)` with
            `recipe.multi_label`) and `mask` `(b,)`; clips whose mask is False are ignored.
        teacher_params: The teacher's weights; required with `teacher`.
        graphdef: The network's structure.
        optimizer: The optimizer that `state` was made with.
        recipe: Options of the step.
        teacher: The teacher of a distillation; None: no distillation.

    Returns:
        The new state; and metrics: `loss`, the number `top1` of correct predictions (with
        `recipe.multi_label`: of clips whose highest logit is one of their classes) and the number
        `count` of clips, all summed over the batch; and `grad_norm`, the norm of the gradient.
    """
    key = jax.random.fold_in(jax.random.key(recipe.seed), state["step"])
    key, clips = _prepare_clips(batch, key, recipe)
    count = jnp.maximum(clips["mask"].sum(), 1)
    fixed = {name: state["params"][name] for name in recipe.frozen}
    if reweighted := recipe.class_weights and not recipe.multi_label:
        # The mean is divided by the sum of the weights in place of `count`.
        weight_scale = count / jnp.maximum(total_weight(clips, recipe.class_weights), 1e-30)

    def loss_fn(params: Params, part: dict, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        video = part["video"]
        logits = merge_params(graphdef, recipe.gather({**fixed, **params}))(video, key=key)
        losses = _label_losses(logits, part, recipe)
        if reweighted:
            losses = weight_scale * losses
        if teacher is not None:
            video = renormalize(video, recipe.mean, recipe.std, teacher.mean, teacher.std)
            targets = jax.lax.stop_gradient(merge_params(teacher.graphdef, teacher_params)(video))
            distillation = distillation_loss(logits, targets, teacher.temperature)
            losses = (1 - teacher.weight) * losses + teacher.weight * distillation
        hits = _hits(logits, part["label"], multi_label=recipe.multi_label)
        top1 = (hits & part["mask"]).sum()
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
        # The decay is lower in early steps, so that the average soon forgets the initial weights.
        step = new_state["step"].astype(jnp.float32)
        decay = jnp.minimum(recipe.ema_decay, (1 + step) / (10 + step))
        new_state["ema"] = optax.incremental_update(new_state["params"], state["ema"], 1 - decay)
    metrics = {
        "loss": loss * count,
        "top1": top1,
        "count": clips["mask"].sum(),
        "grad_norm": optax.tree.norm(grads),
    }
    return new_state, metrics


def _label_losses(logits: jax.Array, clips: dict, recipe: Recipe) -> jax.Array:
    """Return the losses `(b,)` of the clips' labels; of mixed clips, those of both labels."""
    label_losses = functools.partial(
        binary_cross_entropy if recipe.multi_label else cross_entropy,
        logits,
        smoothing=recipe.label_smoothing,
        class_weights=recipe.class_weights,
    )
    losses = label_losses(clips["label"])
    if recipe.mixup_alpha or recipe.cutmix_alpha:
        weight = clips["label_weight"]
        losses = weight * losses + (1 - weight) * label_losses(clips["partner_label"])
    return losses


def _hits(logits: jax.Array, label: jax.Array, *, multi_label: bool) -> jax.Array:
    """Return whether the class with the highest logit is the label, or one of the labels."""
    prediction = logits.argmax(-1)
    if multi_label:
        return jnp.take_along_axis(label, prediction[:, None], axis=1)[:, 0] > 0
    return prediction == label


def jit_train_step(
    abstract_state: dict, mesh: Mesh, teacher_params: Params | None, **options
) -> Callable[[dict, dict[str, jax.Array]], tuple[dict, dict[str, jax.Array]]]:
    """Make the jitted `train_step`; it donates the state.

    Args:
        abstract_state: Shapes, dtypes and shardings of the training state.
        mesh: The device mesh.
        teacher_params: The teacher's weights.
        **options: Keyword arguments of `train_step`.
    """
    state_sharding = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    step = jax.jit(
        functools.partial(train_step, **options),
        donate_argnums=0,
        out_shardings=(state_sharding, sharding.replicated(mesh)),
    )
    return functools.partial(step, teacher_params=teacher_params)


def _prepare_clips(
    batch: dict, key: jax.Array, recipe: Recipe
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Normalize, erase and mix the clips of a batch.

    Returns:
        The key for the network; and arrays with one entry per clip: `video`, `label`, `mask` and,
        if clips are mixed, `partner_label` and `label_weight`, which is λ: the weight of `label`.
    """
    random = recipe.erase_prob or recipe.mixup_alpha or recipe.cutmix_alpha
    if random:
        key, erase_key, mix_key = jax.random.split(key, 3)
    label, mask = batch["label"], batch["mask"]
    b, _, h, w, _ = batch["video"].shape
    boxes = None
    if recipe.erase_prob:
        boxes = batch_augmentation.draw_boxes((b, h, w), erase_key, recipe.erase_prob)

    def prepare(pixels: jax.Array, boxes: jax.Array | None) -> jax.Array:
        video = normalize(pixels, recipe.mean, recipe.std)
        return video if boxes is None else batch_augmentation.erase(video, boxes)

    def prepare_partners(permutation: jax.Array) -> jax.Array:
        """Permute the pixels, which are four times smaller than the prepared clips."""
        permute = functools.partial(
            batch_augmentation.permute, permutation=permutation, groups=recipe.mix_groups
        )
        return prepare(*jax.tree.map(permute, (batch["video"], boxes)))

    video = prepare(batch["video"], boxes)
    if not (recipe.mixup_alpha or recipe.cutmix_alpha):
        return key, {"video": video, "label": label, "mask": mask}
    options = {"groups": recipe.mix_groups, "partners": prepare_partners}
    if recipe.mixup_alpha:
        mixed = batch_augmentation.mixup(video, mix_key, recipe.mixup_alpha, **options)
    else:
        mixed = batch_augmentation.cutmix(video, mix_key, recipe.cutmix_alpha, **options)
    video, partner, weight = mixed
    return key, {
        "video": video,
        "label": label,
        "mask": mask & mask[partner],  # a clip that is mixed with a masked one is masked
        "partner_label": label[partner],
        "label_weight": jnp.full(mask.shape, weight),
    }


def _accumulate(
    grad_fn: Callable, params: Params, clips: dict, key: jax.Array, num_parts: int
) -> tuple:
    """Return the sums of the results of `grad_fn` over `num_parts` microbatches of a batch.

    The clips of each microbatch are spread over the batch, so that every device has some of them.
    """
    if num_parts == 1:
        return grad_fn(params, clips, key)
    parts = {
        name: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1)  # (parts b/parts ...)
        for name, x in clips.items()
    }

    def add(total: tuple, part_and_key: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, grad_fn(params, *part_and_key)), None

    keys = jax.random.split(key, num_parts)
    first = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], parts), keys[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    return jax.lax.scan(add, zeros, (parts, keys))[0]
