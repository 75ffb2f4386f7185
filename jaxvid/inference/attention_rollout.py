"""Attention rollout: how much each patch contributes to the prediction."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.data.clips.clip import (
    ClipSpec,
    cut_eval_crops,
    load_eval_views,
    resize_eval_frames,
)
from jaxvid.data.formats.video_reader import VideoFile
from jaxvid.distributed import setup
from jaxvid.errors import InputError
from jaxvid.models.xvit import XViT
from jaxvid.storage import eval_step
from jaxvid.storage.preprocessing import load_model_and_preprocessing

TOP_K = 3  # classes that are named


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """A clip, what the network makes of it and where it looks.

    Attributes:
        name: The video's.
        frames: `(t, h, w, c)` uint8, whole and upright.
        indices: `(t,)`, their numbers in the video.
        times: `(t,)`, seconds from the video's first frame; None: unknown.
        box: The network's crop: top, left, bottom, right as shares of the frame's height and width.
        heat: `(t, rows, columns)`: attention to the patches, of each frame 1 in all.
        weights: `(t,)`: attention to the frames, 1 in all.
        top: The likeliest classes with their probabilities, likeliest first.
        notes: What a reader should know, a sentence each.
    """

    name: str
    frames: np.ndarray
    indices: np.ndarray
    times: np.ndarray | None
    box: tuple[float, float, float, float]
    heat: np.ndarray
    weights: np.ndarray
    top: list[tuple[str, float]]
    notes: list[str]


def roll_out(weights: jax.Array) -> jax.Array:
    """Rolls attention out from the class token over all blocks (arXiv:2005.00928, section 3).

    Heads are averaged, half of each token is its own (the residual connection), and the matrices
    of the blocks are multiplied; of the product, only the class token's row is computed.

    Args:
        weights: `(blocks, ..., k, n, m)`; rows are queries, token 0 is the class token. Keys beyond
            the n-th are no tokens of this frame: they are left out and the rows renormalised.

    Returns:
        `(..., n - 1)`: shares of the tokens but the class token, 1 in all.
    """
    n = weights.shape[-2]
    weights = weights.mean(axis=-3)[..., :n]  # (blocks ... n n)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    row = jnp.zeros(weights.shape[1:-1]).at[..., 0].set(1)  # (... n)
    for block in weights[::-1]:
        row = 0.5 * row + 0.5 * jnp.einsum("...i,...ij->...j", row, block)
    total = row[..., 1:].sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, row[..., 1:] / total, 1 / (n - 1))  # 0: it sees itself alone


def find_crop(height: int, width: int, spec: ClipSpec) -> tuple[float, float, float, float]:
    """Locate the centre crop in a frame, as `Look.box`, by applying evaluation's transforms."""
    blank = np.zeros((1, height, width, 3), np.uint8)
    _, h, w, _ = resize_eval_frames(blank, spec).shape
    places = np.stack(np.mgrid[:h, :w], axis=-1)[None]  # (1 h w 2)
    [crop] = cut_eval_crops(places, dataclasses.replace(spec, num_crops=1))
    top, left = crop[0, 0, 0]
    return top / h, left / w, (top + spec.crop) / h, (left + spec.crop) / w


def look_at(video: str | Path, folder: str | Path, *, clip: int = 0, num_clips: int = 3) -> Look:
    """Runs the network of a model folder on the centre crop of a clip.

    Args:
        video: A file.
        folder: The model folder.
        clip: Which clip of the video, from 0; 0 is the first that `jaxvid.predict` looks at.
        num_clips: Of how many, spread over the video as in evaluation.

    Raises:
        InputError: The model folder or the video is unusable, or there is no such clip.
    """
    if not 0 <= clip < num_clips:
        raise InputError(f"--clip={clip}: there are 0 to {num_clips - 1} (--num_clips={num_clips})")
    setup.use_compilation_cache()
    # Evaluation computes in float32, too.
    card, model, preprocessing = load_model_and_preprocessing(folder, "float32")
    labels = card["labels"]
    # Clip 0 is the same whatever their number, and the others need not be decoded.
    spec = dataclasses.replace(preprocessing.spec, num_clips=num_clips if clip else 1, num_crops=1)
    views = load_eval_views(video, spec)
    indices = views["indices"][clip]
    with VideoFile(video) as reader:
        reader.color_matrix = spec.color_matrix
        frames, times = reader.get_frames(indices), reader.times
        if times is None and reader.fps:
            times = np.arange(reader.num_frames) / reader.fps

    @jax.jit
    def run(clip):
        attention = {name: roll_out(a[0]) for name, a in model.attention(clip).items()}
        return jax.nn.softmax(model(clip))[0], attention

    view = views["video"][clip : clip + 1]
    view = eval_step.normalize(view, preprocessing.mean, preprocessing.std)
    probabilities, attention = jax.device_get(run(view))
    if not np.isfinite(probabilities).all():
        raise InputError(f"{folder}: logits that are not finite for {video}; train it again")
    side = spec.crop // model.config.patch_size
    heat = attention["spatial"].reshape(-1, side, side)
    weights = attention.get("temporal", np.full(len(heat), 1 / len(heat)))
    bars = "attention to each frame; the line is an even share"
    if "temporal" not in attention:
        bars = "this network averages its frames, each weighs the same"
    most = f"{heat.max() * side**2:.1f} times an even share"
    notes = [f"Bars: {bars}.", f"Heat: attention rollout; the strongest patch gets {most}."]
    if isinstance(model, XViT) and (model.config.shift != "none" or model.config.summary_tokens):
        notes.append("Frames mix in this network's attention: the heat is approximate in time.")
    return Look(
        name=Path(video).name,
        frames=frames,
        indices=indices,
        times=None if times is None else times[indices],
        box=find_crop(*frames.shape[1:3], spec),
        heat=heat,
        weights=weights,
        top=[(labels[i], float(probabilities[i])) for i in np.argsort(-probabilities)[:TOP_K]],
        notes=notes,
    )
