"""Conversion of checkpoints in PyTorch's, safetensors' or Google's format to a model folder."""

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxvid.data.class_names import PUBLIC_DATASETS, class_names, read_class_names
from jaxvid.errors import InputError, printable
from jaxvid.models import (
    FAMILIES,
    ModelConfig,
    Params,
    abstract_model,
    create_model,
    family_of,
    make_model_config,
    split_params,
)
from jaxvid.models.family import Family
from jaxvid.models.resize import resize_pos_embed
from jaxvid.storage import model_card
from jaxvid.weights import google_vit, rules
from jaxvid.weights.weight import FLOATS, Weight
from jaxvid.weights.weight_files import open_weights

NO_LABELS = "none"  # value of `labels` that leaves out the class names


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A converted file.

    Attributes:
        kind: The kind of file; see `rules.get_source`.
        config: The model's config.
        params: The model's weights in float32.
        plan: What happened to each key of the file and each weight of the model.
        card: The model card, for `model_folder.save_model_folder`.
    """

    kind: str
    config: ModelConfig
    params: Params
    plan: rules.Plan
    card: dict[str, Any]


def convert_file(
    path: Path, model: str, *, num_classes: int | None = None, labels: str | None = None
) -> Conversion:
    """Convert a file to the weights and the model card of a preset.

    Args:
        path: The file.
        model: The preset's name.
        num_classes: Number of classes; None: that of the preset.
        labels: File of class names, or `NO_LABELS`; None: the names of the data set that the
            preset was released for.

    Raises:
        InputError: The preset is unknown; the file is unusable or does not fit it; or the file of
            class names is unusable.
    """
    make_model_config(model)  # refuses an unknown name before the file is read
    with open_weights(path) as (kind, weights):
        if kind == "google_vit":
            weights = google_vit.to_torch(weights, path)
        config = infer_config(model, kind, weights, num_classes, path)
        names, labels_source = _choose_labels(labels, kind, config)
        params, plan = convert(kind, weights, config, path)
    card = model_card.make_card(
        config,
        preprocessing=family_of(config).released_preprocessing(config),
        labels=names,
        labels_source=labels_source,
        provenance={
            "file": path.name,
            "kind": kind,
            "sha256": sha256(path),
            "zeros": plan.zeros,
            "resized": plan.resized,
            "ignored": plan.ignored,
            "initialised": plan.initialised,
        },
    )
    return Conversion(kind, config, params, plan, card)


def infer_config(
    model: str, kind: str, weights: dict[str, Weight], num_classes: int | None, source: Path
) -> ModelConfig:
    """Return the preset's config, with sizes taken from the file where they may differ.

    Args:
        model: The preset's name.
        kind: The kind of file; see `rules.get_source`.
        weights: The file's weights.
        num_classes: The value of `--num_classes`, or None for that of the preset.
        source: The file, for messages.

    Raises:
        InputError: The preset is unknown; the file contradicts it (the message contains both
            values); or a size in the file is invalid.
    """
    config = make_model_config(model)
    family = family_of(config)
    if rules.get_source(kind).is_image_model:
        return make_model_config(model, num_classes=num_classes or config.num_classes)
    if kind != family.name:
        raise InputError(
            f"{source} holds {kind} weights, but {model} is of the family {family.name}; "
            "choose a preset of the file's family"
        )
    locations = _size_locations(family)
    sizes = _read_sizes(family, weights)
    expected = {
        "num_classes": num_classes or config.num_classes,
        "width": config.width,
        "num_frames": config.num_frames,
    }
    origins = {"num_classes": "--num_classes"} if num_classes else {}
    problems = [
        f"{field} is {sizes[field]} in {locations[field][0]} but {value} in "
        f"{origins.get(field, model)}"
        for field, value in expected.items()
        if field in sizes and sizes[field] != value
    ]
    if problems:
        hint = ""
        if "num_classes" in sizes and sizes["num_classes"] != expected["num_classes"]:
            hint = f"; pass --num_classes {sizes['num_classes']}"
        raise InputError(f"{source} does not fit {model}: {'; '.join(problems)}{hint}")
    try:
        return dataclasses.replace(config, **sizes)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None


def _size_locations(family: Family) -> dict[str, tuple[str, int, int]]:
    """Return config field → key, axis, and number of rows to subtract from the size of the axis."""
    return {
        **{
            embedding.field: (name, 1, embedding.leading_rows)
            for name, embedding in family.frame_embeddings.items()
        },
        "num_classes": (f"{family.class_heads[0]}weight", 0, 0),
        "width": (f"{family.image_prefix}cls_token", 2, 0),
    }


def _read_sizes(family: Family, weights: dict[str, Weight]) -> dict[str, int]:
    """Return the config fields that the shapes of the weights determine."""
    return {
        field: weights[key].shape[axis] - leading_rows
        for field, (key, axis, leading_rows) in _size_locations(family).items()
        if key in weights and len(weights[key].shape) > axis
    }


def infer_preset(path: Path) -> str:
    """Return the released preset whose family, frames and number of classes a checkpoint has.

    Raises:
        InputError: The file is not the checkpoint of a video model, or fits no released preset.
    """
    with open_weights(path) as (kind, weights):
        if kind not in FAMILIES:
            raise InputError(
                f"{path}: expected the checkpoint of a video model, got an image ViT; convert it "
                "with jaxvid convert"
            )
        family = FAMILIES[kind]
        sizes = _read_sizes(family, weights)
    for name in family.released_classes:
        config = dataclasses.asdict(make_model_config(name))
        if all(config[field] == size for field, size in sizes.items()):
            return name
    described = ", ".join(f"{field}={size}" for field, size in sizes.items())
    raise InputError(
        f"{path}: has {family.title} weights with {described}, which fit no released preset; "
        "convert the file with jaxvid convert --model PRESET"
    )


def read_num_classes(path: Path, model: str) -> int | None:
    """Return the number of classes of a checkpoint; None if it has no class head of this preset.

    Raises:
        InputError: The preset is unknown, or the file cannot be read.
    """
    family = family_of(make_model_config(model))
    with open_weights(path) as (_, weights):
        return _read_sizes(family, weights).get("num_classes")


def is_complete(path: Path) -> bool:
    """Return whether every weight of a file can be read and has the right checksum, if it has one.

    It does not matter whether the weights fit a model.
    """
    try:
        with open_weights(path) as (_, weights):
            for weight in weights.values():
                if weight.dtype in FLOATS:
                    weight.read()
    except InputError:
        return False
    return True


def convert(
    kind: str, weights: dict[str, Weight], config: ModelConfig, source: Path
) -> tuple[Params, rules.Plan]:
    """Convert the weights of a file to those of a model.

    Args:
        kind: The kind of file; see `rules.get_source`.
        weights: The file's weights. Only those that the plan uses are read.
        config: The model's config.
        source: The file, for messages.

    Returns:
        The model's weights in float32, and the plan that was carried out.

    Raises:
        InputError: The message names keys that are missing or unknown, or have a wrong shape or
            dtype, and weights with values that are not finite in float32.
    """
    _, abstract_params = abstract_model(config)
    shapes = {key: weight.shape for key, weight in weights.items()}
    plan = rules.make_plan(rules.get_source(kind), shapes, abstract_params, family_of(config))
    params: dict[str, np.ndarray | jax.Array] = {}
    for name, key in plan.used.items():
        weight = weights[key]
        if weight.dtype not in FLOATS:
            is_float = "float" in weight.dtype.lower()  # e.g. float8_e4m3fn
            reason = f"; expected {', '.join(FLOATS)}" if is_float else ", not floating point"
            plan.problems.append(f"{key}: {weight.dtype}{reason}")
            continue
        array, problem = _as_float32(weight.read())
        if problem:
            plan.problems.append(f"{key}: {problem}")
        if weight.dtype == "float64":
            plan.rounded.append(name)
        if plan.problems:
            params.clear()  # not needed: the remaining weights are read only to find all problems
            continue
        array = rules.from_torch(name, array)
        if name in plan.resized:
            side = config.image_size // config.patch_size
            array = resize_pos_embed(jax.numpy.asarray(array), (side, side))
        params[name] = jax.numpy.array(array, np.float32)
    if plan.problems:
        raise InputError(_describe_problems(plan.problems, config, source))
    if plan.initialised:
        fresh = split_params(create_model(**dataclasses.asdict(config)))[1]
        params |= {name: fresh[name] for name in plan.initialised}
    for name in plan.zeros:
        params[name] = jax.numpy.zeros(abstract_params[name].shape, np.float32)
    return {name: params[name] for name in abstract_params}, plan


def _as_float32(array: np.ndarray) -> tuple[np.ndarray, str]:
    """Return values as float32, and the problem with them or an empty string."""
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float32, copy=False)
    if np.isfinite(rounded).all():
        return rounded, ""
    if np.isfinite(array).all():
        return rounded, f"holds values outside float32's range of ±{np.finfo(np.float32).max:.1e}"
    return rounded, "holds NaN or infinite values"


def _describe_problems(problems: list[str], config: ModelConfig, source: Path) -> str:
    """Return at most 30 problems as one line. Equal problems of several blocks are merged."""
    rows = _merge_layers(problems, config)
    more = f"; and {len(rows) - 30} more" * (len(rows) > 30)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{source} does not fit {config.name}, {count}: {'; '.join(rows[:30])}{more}"


def _merge_layers(lines: list[str], config: ModelConfig) -> list[str]:
    """Merge lines that differ only in the index of a layer: `blocks.*.norm1.weight  × 12`."""
    groups: dict[str, list[str]] = {}
    layer_lists = "|".join(family_of(config).layer_lists)
    for line in lines:
        short = re.sub(rf"\b({layer_lists})\.\d+", r"\1.*", line)
        groups.setdefault(short, []).append(line)
    return [
        f"{short}  × {len(group)}" if len(group) > 1 else group[0]
        for short, group in groups.items()
    ]


def describe(plan: rules.Plan, config: ModelConfig) -> str:
    """Return a table of keys and weights. Lines of equal weights of several blocks are merged."""
    lines = [f"{key:56} → {name}" for name, key in plan.used.items()]
    lines += [f"zeros: {name} ({reason})" for name, reason in plan.zeros.items()]
    lines += [f"resized: {name}: {description}" for name, description in plan.resized.items()]
    lines += [f"ignored: {key} ({reason})" for key, reason in plan.ignored.items()]
    lines += [f"newly initialised: {name}" for name in plan.initialised]
    lines += [f"rounded from float64: {name}" for name in plan.rounded]
    return "\n".join(
        [f"{'key in the file':56} → weight in the model", *_merge_layers(lines, config)]
    )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _choose_labels(
    option: str | None, kind: str, config: ModelConfig
) -> tuple[list[str] | None, str | None]:
    """Return the class names and their origin for the model card, or None for both.

    By default, a checkpoint of a released preset has the names of the preset's data set if
    the number of classes is the same. The classes of an image model are not those of the network.

    Args:
        option: A file of class names or `NO_LABELS`; None: the default.
        kind: The kind of weights file; see `rules.get_source`.
        config: The model's config.

    Raises:
        InputError: The file of class names is unusable or has a wrong number of names.
    """
    if option == NO_LABELS:
        return None, None
    if option is not None:
        path = Path(option)
        source = printable(f"file: {path.name}")[: model_card.MAX_SOURCE]
        return read_class_names(path, config.num_classes), source
    released = family_of(config).released_classes.get(config.name)
    if released is None or rules.get_source(kind).is_image_model:
        return None, None
    names = list(class_names(released.dataset))
    if len(names) != config.num_classes:
        return None, None
    title = PUBLIC_DATASETS[released.dataset]
    if released.assumption:
        return names, f"{model_card.ASSUMED}{title} in alphabetical order; {released.assumption}"
    return names, f"{title} in official order"
