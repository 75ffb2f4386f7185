"""A model folder with all that using it needs, checked against each other.

Its `preprocessing` says how clips were made when it was tested, views included: what training
writes, what a converter writes of the released protocol, and what prediction does by default.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from jaxvid.config import differences
from jaxvid.data.clips.clip import ClipSpec, make_spec
from jaxvid.errors import InputError, short_repr
from jaxvid.storage import model_card, model_folder

# All that a model folder's `preprocessing` says: fields of ClipSpec, and what pixels in [0, 1] are
# normalised by.
CLIP_FIELDS = (
    *("num_frames", "crop", "short_side", "sampling", "sampling_rate", "by_time", "resize"),
    *("color_matrix", "num_clips", "num_crops"),
)
PIXEL_FIELDS = ("mean", "std")


def make_preprocessing(config) -> dict:
    """How clips are made when a config's model is evaluated: a value of each of the fields."""
    views = {name: config.eval[name] for name in ("num_clips", "num_crops")}
    spec = make_spec(config, **views)
    clip = {name: getattr(spec, name) for name in CLIP_FIELDS}
    return clip | {name: config.data[name] for name in PIXEL_FIELDS}


def read_preprocessing(card: dict, path: Path) -> dict:
    """What a `model.json` says of preprocessing, complete.

    Args:
        card: What is in the file.
        path: The file, for messages.

    Returns:
        A value of each of the fields; of one that an older folder lacks, `ClipSpec`'s default.

    Raises:
        InputError: It says nothing, lacks what has no default, has a field that there is not, or
            an impossible value.
    """
    how = card["preprocessing"]
    if not how or not isinstance(how, dict):
        raise InputError(f"{path} says nothing of preprocessing; export it again")
    fields = (*CLIP_FIELDS, *PIXEL_FIELDS)
    values = {
        field.name: field.default
        for field in dataclasses.fields(ClipSpec)
        if field.name in CLIP_FIELDS and field.default is not dataclasses.MISSING
    }
    values |= {"color_matrix": default_color_matrix(card)} | how
    problems = [f"has no {name}" for name in fields if name not in values]
    for name, value in how.items():
        if name not in fields:
            problems.append(f"has {short_repr(name)}, which this jaxvid does not know")
        elif not _is_possible(name, value):
            problems.append(f"has {name}={short_repr(value)}, which it cannot be")
    if problems:
        raise InputError(f"{path}: preprocessing {problems[0]}; export the model again")
    return {name: values[name] for name in fields}


def _is_possible(name: str, value) -> bool:
    """Whether it is of a field's type, and above 0 where it must be."""
    if name == "by_time":
        return isinstance(value, bool)
    if name in ("sampling", "resize", "color_matrix"):
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if name in PIXEL_FIELDS:  # of pixels in [0, 1], in float32; NaN fails too
        return 1e-6 <= value <= 1e6 if name == "std" else abs(value) <= 1e6
    return isinstance(value, int) and value > 0


def resolve_color_matrix(config: ConfigDict, preprocessing: dict) -> ConfigDict:
    """Replace `data.color_matrix="auto"` in a config by the value in a model card."""
    if config.data.color_matrix != "auto":
        return config
    config = config.copy_and_resolve_references().unlock()
    config.data.color_matrix = preprocessing.get("color_matrix", "tagged")
    return config.lock()


def default_color_matrix(card: dict) -> str:
    """Return the matrix of a model folder that is older than its field `color_matrix`."""
    return "bt601" if (card["provenance"] or {}).get("kind") == "stam" else "tagged"


def check_preprocessing(folder: str | Path, config) -> None:
    """Refuses to evaluate a model folder on clips that are made otherwise than it was trained for.

    Sizes and views may be others than it was tested with.

    Raises:
        InputError: Names every difference.
    """
    expected = model_card.load_card(folder)["preprocessing"] or {}
    found = make_preprocessing(config)
    names = ["sampling", *PIXEL_FIELDS] + ["sampling_rate"] * (found["sampling"] == "dense_stride")
    names = [name for name in names if name in expected]
    changed = differences(
        {name: expected[name] for name in names},
        {name: found[name] for name in names},
        there="in the model card",
        here="in the config",
    )
    if changed:
        raise InputError(
            f"{folder} was trained with other preprocessing: {'; '.join(changed.values())}"
        )


def load_model_and_spec(
    folder: str | Path, dtype: str | None = None
) -> tuple[dict, nnx.Module, ClipSpec]:
    """Loads a model folder and how its clips are made.

    Args:
        folder: Written by training, by a converter or by `save_model`.
        dtype: Of the computation, `float32` or `bfloat16`; None: from the model card.

    Returns:
        Its `model.json`, with `labels` always a list and `preprocessing` complete; the network; how
        its clips are made, with the views that it was tested with.

    Raises:
        InputError: A part is missing, damaged, from a newer version, or does not fit another.
    """
    card, path = model_card.load_card(folder), Path(folder) / "model.json"
    how = read_preprocessing(card, path)
    try:
        spec = ClipSpec(**{name: how[name] for name in CLIP_FIELDS})
    except InputError as error:
        raise InputError(f"{path}: {error}; export the model again") from None
    model = model_folder.load_model(folder, dtype=dtype)
    labels = card["labels"]
    if labels is None:
        labels = [str(i) for i in range(model.config.num_classes)]
    try:
        jax.eval_shape(model, jax.ShapeDtypeStruct(clip_shape(spec, 1), np.float32))
    except ValueError as error:
        raise InputError(
            f"{path}: preprocessing does not fit the network ({error}); export the model again"
        ) from None
    card |= {"labels": [str(label) for label in labels], "preprocessing": how}
    return card, model, spec


def clip_shape(spec: ClipSpec, *leading: int) -> tuple[int, ...]:
    """The shape of clips: `(*leading, t, h, w, c)`."""
    return (*leading, spec.num_frames, spec.crop, spec.crop, 3)
