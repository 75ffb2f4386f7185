"""Attention rollout: how much attention each patch and each frame receives."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from jaxvid.data.clips.clip import (
    ClipSpec,
    cut_eval_crops,
    load_eval_views,
    resize_eval_frames,
)
from jaxvid.data.formats.video_reader import VideoFile
from jaxvid.distributed import setup
from jaxvid.errors import InputError
from jaxvid.models import Params, family_of, merge_params, split_params
from jaxvid.storage.preprocessing import load_model_and_preprocessing, normalize
from jaxvid.weights.resolve import resolve_model

TOP_K = 3  # number of classes in AttentionRollout.top


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionRollout:
    """A clip with the attention that its patches and frames receive, and its predicted classes.

    Attributes:
        name: File name of the video.
        frames: Uncropped, upright frames `(t, h, w, c)` uint8.
        indices: Frame numbers in the video `(t,)`.
        times: Time of each frame in seconds `(t,)`, relative to the video's first frame; None if
            unknown.
        crop_box: Edges of the network's crop: top, left, bottom, right, relative to the frame's
            height and width.
        patch_attention: Attention that each patch receives `(t, rows, columns)`. The patches of a
            frame sum to 1.
        frame_attention: Attention that each frame receives `(t,)`. The frames sum to 1.
        top: The most likely classes and their probabilities, in descending order.
        notes: Explanations that are shown below the frames, one sentence each.
    """

    name: str
    frames: np.ndarray
    indices: np.ndarray
    times: np.ndarray | None
    crop_box: tuple[float, float, float, float]
    patch_attention: np.ndarray
    frame_attention: np.ndarray
    top: list[tuple[str, float]]
    notes: list[str]


def roll_out(weights: jax.Array) -> jax.Array:
    """Compute the attention rollout of the class token (arXiv:2005.00928, section 3).

    Each block's attention is averaged over its heads, and then averaged with the identity matrix,
    which represents the residual connection. The matrices of all blocks are multiplied; only the
    class token's row is computed.

    Args:
        weights: Attention weights `(blocks, ..., k, n, m)`, m ≥ n. Rows are queries; token 0 is the
            class token. Keys after the n-th are summary tokens: they are dropped, and the rows are
            renormalised.

    Returns:
        `(..., n - 1)`: the share of attention that each of the other tokens receives. The shares
        sum to 1.
    """
    n = weights.shape[-2]
    weights = weights.mean(axis=-3)[..., :n]  # (blocks ... n n)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    row = jnp.zeros(weights.shape[1:-1]).at[..., 0].set(1)  # (... n)
    for block in weights[::-1]:
        row = 0.5 * row + 0.5 * jnp.einsum("...i,...ij->...j", row, block, precision="highest")
    total = row[..., 1:].sum(axis=-1, keepdims=True)
    # A class token that attends only to itself has a total of 0.
    return jnp.where(total > 0, row[..., 1:] / total, 1 / (n - 1))


def find_crop_box(height: int, width: int, spec: ClipSpec) -> tuple[float, float, float, float]:
    """Locate the centre crop in a frame by cropping an array of coordinates as in evaluation.

    Returns:
        Top, left, bottom, right, relative to the height and width.
    """
    blank = np.zeros((1, height, width, 3), np.uint8)
    _, h, w, _ = resize_eval_frames(blank, spec).shape
    coordinates = np.stack(np.mgrid[:h, :w], axis=-1)[None]  # (1 h w 2)
    [crop] = cut_eval_crops(coordinates, dataclasses.replace(spec, num_crops=1))
    top, left = crop[0, 0, 0]
    return top / h, left / w, (top + spec.crop) / h, (left + spec.crop) / w


def compute_rollout(
    video: str | Path, folder: str | Path, *, clip: int = 0, num_clips: int = 3
) -> AttentionRollout:
    """Compute the attention rollout of a model on the centre crop of a clip.

    Args:
        video: Video file.
        folder: Model folder, or another name of a model; see `resolve_model`.
        clip: Index of the clip. Clip 0 is the first one that `jaxvid.predict` classifies.
        num_clips: Number of clips, which are spread over the video as in evaluation.

    Raises:
        InputError: The model folder or the video is unusable, or `clip` is out of range.
    """
    if not 0 <= clip < num_clips:
        raise InputError(f"--clip={clip}: must be 0 to {num_clips - 1} (--num_clips={num_clips})")
    setup.use_compilation_cache()
    # Compute in float32, as evaluation does.
    folder = resolve_model(folder)
    card, model, preprocessing = load_model_and_preprocessing(folder, "float32")
    labels = card["labels"]
    # Clip 0 is the same for any num_clips. If it is requested, decode no other clips.
    spec = dataclasses.replace(preprocessing.spec, num_clips=num_clips if clip else 1, num_crops=1)
    views = load_eval_views(video, spec)
    indices = views["indices"][clip]
    frames, times = _read_frames(video, indices, spec)

    graphdef, params = split_params(model)

    @jax.jit
    def run(params: Params, clip: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = merge_params(graphdef, params)
        attention = {name: roll_out(a[0]) for name, a in model.attention(clip).items()}
        return model(clip)[0], attention

    view = views["video"][clip : clip + 1]
    view = normalize(view, preprocessing.mean, preprocessing.std)
    # The logits are checked, because XLA's softmax on CPU turns NaN into finite numbers.
    logits, attention = jax.device_get(run(params, view))
    if not np.isfinite(logits).all():
        raise InputError(
            f"{folder}: the logits for {video} are not finite, so the weights are damaged; retrain "
            "or reconvert the model"
        )
    probabilities = scipy.special.softmax(logits)
    side = spec.crop // model.config.patch_size
    patch_attention = attention["spatial"].reshape(-1, side, side)
    t = len(patch_attention)
    frame_attention = attention.get("temporal", np.full(t, 1 / t))
    if "temporal" in attention:
        bars = "attention to each frame; the line marks a uniform share"
    else:
        bars = "this network averages its frames, so that all have the same weight"
    peak = f"{patch_attention.max() * side**2:.1f} times a uniform share"
    notes = [f"Bars: {bars}.", f"Heat: attention rollout; the strongest patch receives {peak}."]
    if family_of(model.config).mixes_frames(model.config):
        notes.append("This network's attention mixes frames: the heat is approximate in time.")
    return AttentionRollout(
        name=Path(video).name,
        frames=frames,
        indices=indices,
        times=times,
        crop_box=find_crop_box(*frames.shape[1:3], spec),
        patch_attention=patch_attention,
        frame_attention=frame_attention,
        top=[(labels[i], float(probabilities[i])) for i in np.argsort(-probabilities)[:TOP_K]],
        notes=notes,
    )


def _read_frames(
    video: str | Path, indices: np.ndarray, spec: ClipSpec
) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode uncropped frames `(t, h, w, c)`; return them and their times in seconds `(t,)`.

    The times are None if neither timestamps nor a frame rate are known.
    """
    with VideoFile(video) as reader:
        reader.color_matrix = spec.color_matrix
        frames, times = reader.get_frames(indices), reader.times
        if times is None and reader.fps:
            times = np.arange(reader.num_frames) / reader.fps
    return frames, None if times is None else times[indices]
