"""A model folder with all that using it needs, checked against each other."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxvid import model_folder
from jaxvid.data.pipeline import ClipSpec
from jaxvid.errors import InputError
from jaxvid.models import make_model_config


def open_model(folder: str | Path) -> tuple[dict, nnx.Module, ClipSpec]:
    """Loads a model folder and how its clips are made.

    Args:
        folder: Written by training, by a converter or by `save_model`.

    Returns:
        Its `model.json`, with `labels` always a list; the network; the clips, with `num_clips` and
        `num_crops` as in its preprocessing, 1 where that says nothing.

    Raises:
        InputError: A part is missing, damaged, from a newer version, or does not fit another.
    """
    card, path = model_folder.load_card(folder), Path(folder) / "model.json"
    how = card["preprocessing"]
    try:
        config = make_model_config(**card["config"])
        if not how:
            raise InputError("it says nothing of preprocessing")
        if missing := sorted({"mean", "std"} - {*how}):
            raise InputError(f"preprocessing has no {missing[0]}")
        spec = ClipSpec(**{name: how[name] for name in how if name not in ("mean", "std")})
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: {error}; export the model again") from None
    labels = card["labels"]
    if labels is None:
        labels = [str(i) for i in range(config.num_classes)]
    if not isinstance(labels, list) or len(labels) != config.num_classes:
        found = len(labels) if isinstance(labels, list) else repr(labels)
        raise InputError(
            f"{path}: labels has {found} entries for num_classes={config.num_classes}; "
            "give each class its name, or write null"
        )
    model = model_folder.load_model(folder)
    try:
        jax.eval_shape(model, jax.ShapeDtypeStruct(clip_shape(spec, 1), np.float32))
    except ValueError as error:
        raise InputError(
            f"{path}: preprocessing does not fit the network ({error}); export the model again"
        ) from None
    return {**card, "labels": [str(label) for label in labels]}, model, spec


def clip_shape(spec: ClipSpec, *leading: int) -> tuple[int, ...]:
    """The shape of clips: `(*leading, t, h, w, c)`."""
    return (*leading, spec.num_frames, spec.crop, spec.crop, 3)
