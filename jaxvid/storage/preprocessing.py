"""Preprocessing of a model's clips, shared by all programs, and the normalisation of pixels.

Training and the converters write the preprocessing to the model card. Prediction, visualisation and
export use it. Evaluation takes the preprocessing from the config and compares it with the card.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxvid.config import differences
from jaxvid.data.clips.clip import ClipSpec, ViewSpec
from jaxvid.data.clips.transforms import FRACTIONS
from jaxvid.errors import InputError, short_repr
from jaxvid.models import FAMILIES, Params, make_model_config, merge_params, split_params
from jaxvid.storage import model_card, model_folder

# A value for all colour channels, or one each for red, green and blue.
Channels = float | tuple[float, float, float]

# Names of channel statistics, for `mean` and `std`.
STATISTICS = {
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing(ViewSpec):
    """How clips are made and normalised when a model is evaluated: `preprocessing` in `model.json`.

    If a field is missing in an older model folder, its default value is used. The default of
    `color_matrix` is then that of `default_color_matrix`.

    Attributes:
        mean: Mean that is subtracted from pixels in [0, 1]. The argument is a number, three numbers
            (red, green and blue) or a key of `STATISTICS`. Three equal numbers become one.
        std: Divisor of the pixels after the mean is subtracted; the argument is like `mean`.

    Raises:
        InputError: A field has an invalid value.
    """

    mean: Channels
    std: Channels

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, _read_channels(name, getattr(self, name)))
        _ = self.spec  # the constructor of ClipSpec checks the values

    @property
    def spec(self) -> ClipSpec:
        """Specification of the clips, without the normalisation."""
        fields = self.to_json()
        del fields["mean"], fields["std"]
        return ClipSpec(**fields)

    @property
    def num_views(self) -> int:
        """Views per video: clips times crops."""
        return self.num_clips * self.num_crops

    def with_views(self, num_clips: int | None, num_crops: int | None) -> "Preprocessing":
        """Return the preprocessing with other numbers of clips and crops; None: unchanged.

        Raises:
            InputError: A number is out of range.
        """
        views = {"num_clips": num_clips, "num_crops": num_crops}
        changed = {name: value for name, value in views.items() if value is not None}
        return dataclasses.replace(self, **changed)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as they are stored in `model.json`."""
        return {name: _to_json(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Make the preprocessing from the fields in a `model.json`.

        Raises:
            InputError: A required field is missing, a field is unknown, or a value is invalid.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name, field in fields.items():
            if name not in values and field.default is dataclasses.MISSING:
                raise InputError(f"preprocessing has no {name}")
        for name, value in values.items():
            shown = short_repr(name if name not in fields else value)
            if name not in fields:
                raise InputError(f"preprocessing has the unknown field {shown}")
            if not _is_valid(fields[name], value):
                raise InputError(f"preprocessing has {name}={shown}, which is invalid")
        return cls(**values)


def _is_valid(field: dataclasses.Field, value: object) -> bool:
    """Return whether a JSON value has the type of a field and, if a number, is in range."""
    if field.type == Channels:
        return _is_channels(field.name, value)
    if field.type in (bool, str):
        return isinstance(value, field.type)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) and value > 0


def _to_json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _is_channels(name: str, value: object) -> bool:
    """Return whether a value is a valid `mean` or `std` (`name`)."""
    if isinstance(value, str):
        return value in STATISTICS
    values = value if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3 or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in values
    ):
        return False
    # Pixels are normalised in float32. NaN fails both comparisons.
    return all(1e-6 <= v <= 1e6 if name == "std" else abs(v) <= 1e6 for v in values)


def _read_channels(name: str, value: object) -> Channels:
    """Return `mean` or `std` (`name`) as one number, or as three numbers if they differ.

    Raises:
        InputError: The value is not a number, three numbers or a key of `STATISTICS`, or is out of
            range.
    """
    if not _is_channels(name, value):
        kind = "positive number" if name == "std" else "number"
        known = " or ".join(map(repr, STATISTICS))
        raise InputError(
            f"{name}={short_repr(value)}: must be a {kind}, three {kind}s for red, green and blue, "
            f"e.g. 0.5,0.4,0.4, or {known}"
        )
    if isinstance(value, str):
        return STATISTICS[value][name]
    if not isinstance(value, list | tuple):
        return value
    return float(value[0]) if len({*value}) == 1 else tuple(map(float, value))


def read_preprocessing(card: dict[str, Any], path: Path) -> Preprocessing:
    """Read the preprocessing of a model card.

    Args:
        card: The contents of `model.json`.
        path: The file, for messages.

    Raises:
        InputError: The preprocessing is missing or incomplete, or has an invalid value or an
            unknown field.
    """
    values = card["preprocessing"]
    if not values or not isinstance(values, dict):
        raise InputError(f"{path}: preprocessing is missing; export the model again")
    try:
        return Preprocessing.from_json({"color_matrix": default_color_matrix(card)} | values)
    except InputError as error:
        raise InputError(f"{path}: {error}; export the model again") from None


def default_color_matrix(card: dict) -> str:
    """Return the color matrix to use for a model card without the field `color_matrix`.

    For weights converted from PyTorch, it is the color matrix of the original code. For
    other models, it is `tagged`.
    """
    kind = (card["provenance"] or {}).get("kind")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        return "tagged"
    return family.released_preprocessing(make_model_config(**card["config"]))["color_matrix"]


def check_preprocessing(
    card: dict[str, Any], folder: str | Path, preprocessing: Preprocessing
) -> None:
    """Refuse to evaluate a model with preprocessing that differs from its model card.

    Only `sampling`, `mean` and `std` are compared, and `sampling_rate` for `dense_stride` sampling.

    Args:
        card: The model card, from `load_card`.
        folder: The model folder or exported file, for the message.
        preprocessing: The preprocessing.

    Raises:
        InputError: The message names every difference.
    """
    expected = dict(card["preprocessing"] or {})
    for name in {"mean", "std"} & {*expected}:
        if _is_channels(name, expected[name]):  # three equal numbers are the same as one
            expected[name] = _to_json(_read_channels(name, expected[name]))
    actual = preprocessing.to_json()
    names = ["sampling", "mean", "std"]
    names += ["sampling_rate"] * (preprocessing.sampling == "dense_stride")
    names = [name for name in names if name in expected]
    changed = differences(
        {name: expected[name] for name in names},
        {name: actual[name] for name in names},
        there="in the model card",
        here="in the config",
    )
    if changed:
        raise InputError(
            f"{folder} was trained with different preprocessing: {'; '.join(changed.values())}; "
            "use the values of the model card"
        )


def load_model_and_preprocessing(
    folder: str | Path, dtype: str | None = None
) -> tuple[dict[str, Any], nnx.Module, Preprocessing]:
    """Load a model folder and the preprocessing of its clips.

    Args:
        folder: The model folder, written by training, by a converter or by `save_model`.
        dtype: Compute dtype, one of `precision.DTYPES`, or None for that of the model card.

    Returns:
        The contents of the folder's `model.json`, with `labels` always a list and `preprocessing`
        complete; the network; and the preprocessing, with the views that the model was evaluated
        with.

    Raises:
        InputError: The folder is incomplete, damaged or of a different version, or its
            preprocessing does not fit the network.
    """
    card, path = model_card.load_card(folder), Path(folder) / "model.json"
    preprocessing = read_preprocessing(card, path)
    model = model_folder.load_model(folder, dtype=dtype)
    labels = card["labels"]
    if labels is None:
        labels = [str(i) for i in range(model.config.num_classes)]
    check_fit(*split_params(model), preprocessing, path)
    card |= {
        "labels": [str(label) for label in labels],
        "preprocessing": preprocessing.to_json(),
    }
    return card, model, preprocessing


def check_fit(
    graphdef: nnx.GraphDef, params: Params, preprocessing: Preprocessing, path: Path
) -> None:
    """Refuse preprocessing whose clips have a shape that the network does not accept.

    Args:
        graphdef: The network's structure.
        params: The weights, or their shapes.
        preprocessing: The preprocessing.
        path: The model card, for the message.

    Raises:
        InputError: The clips do not fit the network.
    """
    clip = jax.ShapeDtypeStruct(clip_shape(preprocessing.spec, 1), np.float32)
    try:
        jax.eval_shape(lambda params, clip: merge_params(graphdef, params)(clip), params, clip)
    except ValueError as error:
        raise InputError(
            f"{path}: preprocessing does not fit the network ({error}); export the model again"
        ) from None


def clip_shape(spec: ClipSpec, *leading: int) -> tuple[int, ...]:
    """Return the shape `(*leading, t, h, w, c)` of clips; `leading` are the leading axes."""
    return (*leading, spec.num_frames, spec.crop, spec.crop, 3)


def normalize(video: jax.Array, mean: Channels, std: Channels) -> jax.Array:
    """Normalise pixels: return `(pixel / 255 - mean) / std` in float32, with the same shape.

    Args:
        video: Pixels `(..., c)` as uint8, or as uint16 in units of 1 / `transforms.FRACTIONS`.
        mean: Mean that is subtracted from pixels in [0, 1].
        std: Divisor of the pixels after the mean is subtracted.
    """
    white = 255 * FRACTIONS if video.dtype == jnp.uint16 else 255
    pixels = video.astype(jnp.float32) / white
    return (pixels - _expand(mean, video.ndim)) / _expand(std, video.ndim)


def renormalize(
    video: jax.Array, mean: Channels, std: Channels, new_mean: Channels, new_std: Channels
) -> jax.Array:
    """Replace the normalisation of a video `(..., c)` by another one.

    Args:
        video: Pixels normalised with `mean` and `std`.
        mean: Mean that was subtracted.
        std: Divisor that was used.
        new_mean: Mean to subtract.
        new_std: Divisor to use.
    """
    mean, std, new_mean, new_std = (
        _expand(value, video.ndim) for value in (mean, std, new_mean, new_std)
    )
    return ((video * std + mean) - new_mean) / new_std


def _expand(value: Channels, ndim: int) -> float | np.ndarray:
    """Return a number unchanged, and three numbers as an array `(1, ..., 1, c)` of `ndim` axes."""
    if not isinstance(value, list | tuple):
        return value
    return np.array(value, np.float32).reshape(*[1] * (ndim - 1), len(value))
