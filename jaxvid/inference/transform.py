"""The preprocessing of a model as a function from frames to clips."""

import os
from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx

from jaxvid.data.clips.clip import load_eval_views
from jaxvid.errors import InputError
from jaxvid.inference.classifier import Classifier
from jaxvid.inference.inputs import Source, make_input
from jaxvid.model_path import CARD_NAME
from jaxvid.storage.model_card import card_of, load_card
from jaxvid.storage.preprocessing import Preprocessing, normalize, read_preprocessing
from jaxvid.weights.resolve import resolve_model


def make_transform(
    model: nnx.Module | Classifier | str | os.PathLike,
    *,
    num_clips: int | None = None,
    num_crops: int | None = None,
) -> Callable[..., jax.Array]:
    """Return the preprocessing in a model card as a function from frames to normalised clips.

    Args:
        model: A network from `load_model`, a `Classifier`, or the name of a model; see
            `resolve_model`.
        num_clips: Clips per video; None: from the model card.
        num_crops: Crops per clip, 1 or 3; None: from the model card.

    Returns:
        `transform(frames, fps=None)` samples, resizes, crops and normalises a video. It returns
        clips `(v, t, h, w, c)` float32, one for each of the `num_clips · num_crops` views, so that
        `model(transform(frames)).mean(axis=0)` are the logits of the video. `frames` is an array
        `(t, h, w, 3)` uint8, or any other kind of video that `Classifier` accepts. `fps` is the
        frame rate of an array; None: unknown, sampled as at 30 frames/s.

    Raises:
        InputError: `model` has no preprocessing, or a number is out of range.
    """
    preprocessing = _find_preprocessing(model).with_views(num_clips, num_crops)

    def transform(frames: Source, fps: float | None = None) -> jax.Array:
        with make_input(frames, fps) as video:
            views = load_eval_views(video, preprocessing.spec)["video"]
        return normalize(jax.numpy.asarray(views), preprocessing.mean, preprocessing.std)

    return transform


def _find_preprocessing(model: nnx.Module | Classifier | str | os.PathLike) -> Preprocessing:
    if isinstance(model, Classifier):
        return model.preprocessing
    if isinstance(model, str | os.PathLike):
        folder = resolve_model(model)
        return read_preprocessing(load_card(folder), Path(folder) / CARD_NAME)
    if not isinstance(model, nnx.Module):
        raise InputError(
            f"make_transform: expected a network, Classifier or model folder, got "
            f"{type(model).__name__}"
        )
    card = card_of(model)
    if card is None:
        raise InputError(
            "make_transform: the network does not come from load_model, so that its preprocessing "
            "is unknown; pass its model folder"
        )
    return read_preprocessing(card, Path(CARD_NAME))
