"""The model card, `model.json`: reading it, and comparing it with a config or a data set."""

import dataclasses
import json
import weakref
from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from jaxvid import atomic
from jaxvid.config import differences, translate
from jaxvid.data.class_names import plain_name
from jaxvid.errors import InputError, one_line, printable, short_repr
from jaxvid.files import read_limited
from jaxvid.model_path import CARD_NAME, describe_wrong_path, exists
from jaxvid.models import ModelConfig, make_model_config
from jaxvid.models.implementation import CHOICES
from jaxvid.storage.activation import ACTIVATIONS

FORMAT_VERSION = 1
MAX_CARD_BYTES = 32 * 10**6  # a card with 20,000 classes has about 1 MB
# Keys that cards of older versions do not have → their values.
ADDED_KEYS = {"labels_source": None, "activation": "softmax"}
CARD_KEYS = ("name", "config", "preprocessing", "labels", "provenance", "files")
# Start of `labels_source` if the order of the class names is not known to be that of the weights.
ASSUMED = "assumed: "
MAX_SOURCE = 300  # characters in `labels_source`
# Fields of a model config that may differ between networks with the same weights.
RATE_FIELDS = ("name", "init", "dropout", "drop_path", "dtype", *CHOICES)

_cards: weakref.WeakKeyDictionary[nnx.Module, dict] = weakref.WeakKeyDictionary()


def remember_card(model: nnx.Module, card: dict) -> None:
    """Remember the model card of a loaded network, for `card_of`."""
    _cards[model] = card


def card_of(model: nnx.Module) -> dict | None:
    """Return the model card that a network was loaded with, or None if it was not loaded."""
    return _cards.get(model)


def load_card(folder: str | Path) -> dict:
    """Read and validate the `model.json` of a model folder.

    Returns:
        The contents of the file. All values have the expected type, `config` is a valid model
        config, and `labels`, unless null, has one entry per class. Keys that are missing
        in older cards have the values in `ADDED_KEYS`. Old names in `preprocessing` are translated;
        its fields are not checked.

    Raises:
        InputError: The file is missing or invalid, or has a different format version.
    """
    try:
        path = atomic.resolve(folder, CARD_NAME) / CARD_NAME
        data = read_limited(path, MAX_CARD_BYTES)
    except FileNotFoundError:
        raise InputError(describe_wrong_path(folder)) from None
    except OSError as error:  # e.g. no permission, or a name that is too long
        raise InputError(
            f"{folder} cannot be read ({error.strerror}); choose another folder"
        ) from None
    try:
        card = json.loads(data, object_pairs_hook=_unique)
        version = card["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = one_line(error if isinstance(error, ValueError) else repr(error))
        raise InputError(f"{path} cannot be read ({reason}); export the model again") from None
    if version != FORMAT_VERSION:  # checked first, because the keys may differ between versions
        raise InputError(
            f"{path} has format version {short_repr(version)}, but this jaxvid reads "
            f"{FORMAT_VERSION}; update jaxvid"
        )
    if missing := [key for key in CARD_KEYS if key not in card]:
        raise InputError(f"{path} cannot be read (no {missing[0]!r}); export the model again")
    if not isinstance(card["preprocessing"], dict | None):
        raise InputError(
            f"{path}: preprocessing is {short_repr(card['preprocessing'])}, expected a dict or "
            "null; export the model again"
        )
    card = ADDED_KEYS | card
    try:
        if isinstance(card["config"], dict):
            card["config"] = translate(card["config"])
        _check_card(card)
    except (InputError, TypeError) as error:
        reason = one_line(error, 300)
        raise InputError(f"{path}: {reason}; export the model again") from None
    if card["preprocessing"]:
        card["preprocessing"] = translate(card["preprocessing"])
    return card


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """Return a JSON object as a dict; refuse duplicate names."""
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"duplicate name {short_repr(name)}")
        values[name] = value
    return values


def _check_card(card: dict) -> None:
    """Refuse values of the wrong type, invalid configs, and a wrong number of labels.

    Raises:
        InputError: The message names the field, but not the file.
        TypeError: `config` has no field `name`.
    """
    types = {"name": str, "config": dict, "provenance": dict, "files": dict, "checksums": dict}
    for name, expected in types.items():
        if name in card and not isinstance(card[name], expected):
            raise InputError(f"{name} is {short_repr(card[name])}, expected a {expected.__name__}")
    for name in ("files", "checksums"):
        for file, value in card.get(name, {}).items():
            parts = Path(file).parts
            if not parts or ".." in parts or Path(file).is_absolute() or "\0" in file:
                raise InputError(f"{name}: {short_repr(file)} is outside params")
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(
                    f"{name} has {short_repr(value)} for {short_repr(file)}, expected an integer "
                    "of at least 0"
                )
    if not card["files"]:
        raise InputError("files is empty")
    check_description(card)


def check_description(card: dict) -> None:
    """Refuse invalid values of fields that a model card shares with descriptions of exported files.

    Raises:
        InputError: The message names the field, but not the file.
        KeyError: A field is missing.
        TypeError: `config` has no field `name`.
    """
    config, labels = make_model_config(**card["config"]), card["labels"]
    if not isinstance(labels, list | None):
        raise InputError(f"labels is {short_repr(labels)}, expected a list or null")
    if labels is not None and len(labels) != config.num_classes:
        raise InputError(
            f"labels has {len(labels)} entries, expected num_classes={config.num_classes} names, "
            "or null"
        )
    for label in labels or ():
        if not isinstance(label, str | int):
            raise InputError(f"labels has {short_repr(label)}, expected a string")
    if card["activation"] not in (*ACTIVATIONS,):
        raise InputError(
            f"activation is {short_repr(card['activation'])}, expected softmax or sigmoid"
        )
    source = card["labels_source"]
    if source is None:
        return
    if not isinstance(source, str) or len(source) > MAX_SOURCE or printable(source) != source:
        raise InputError(
            f"labels_source is {short_repr(source)}, expected one line of at most {MAX_SOURCE} "
            "characters, or null"
        )


def make_card(
    model_config: ModelConfig,
    *,
    preprocessing: dict | None,
    labels: list[str] | None,
    labels_source: str | None = None,
    activation: str = "softmax",
    provenance: dict,
) -> dict:
    """Return the contents of a `model.json` except the format version and the list of files.

    Args:
        model_config: The model config.
        preprocessing: Fields of the preprocessing, or None if it is unknown.
        labels: Class names in the order of the class indices, or None if they are unknown.
        labels_source: Origin of the class names in one line, or None if they are those of the data.
            It starts with `ASSUMED` if their order is not known to be that of the weights.
        activation: Function from logits to probabilities, a key of `ACTIVATIONS`.
        provenance: Origin of the weights, e.g. step and accuracy of a training run.
    """
    config = dataclasses.asdict(model_config)
    return {
        "name": model_config.name,
        # `CHOICES` depend on the machine and are not properties of the weights.
        "config": {name: value for name, value in config.items() if name not in CHOICES},
        "preprocessing": preprocessing,
        "labels": labels,
        "labels_source": labels_source,
        "activation": activation,
        "provenance": provenance,
    }


def describe_assumed_labels(card: dict, folder: str | Path) -> str | None:
    """Return a warning if the order of a model's class names is only assumed, otherwise None.

    Args:
        card: The model card, from `load_card`.
        folder: The model folder, for the message.
    """
    source = card["labels_source"] or ""
    if not source.startswith(ASSUMED):
        return None
    return (
        f"{folder}: the order of the class names is assumed ({source.removeprefix(ASSUMED)}); "
        "check it on a few labelled videos with python -m jaxvid.check_labels"
    )


def check_labels(
    card_labels: list | None, data_labels: list[str] | None, folder: str | Path
) -> None:
    """Refuse a model folder whose classes, or their order, differ from those of the data.

    Args:
        card_labels: Class names in the `model.json`, or None if they are unknown.
        data_labels: Class names of the data, or None if they are unknown.
        folder: The model folder, for the message.

    Raises:
        InputError: The message names the first difference.
    """
    if not (difference := describe_label_difference(card_labels, data_labels)):
        return
    remedy = "choose a folder with the data's classes, or correct the data's labels.txt"
    if sorted(_plain(card_labels)) == sorted(_plain(data_labels)):
        remedy = (
            "the same names are in a different order: reorder the data's labels.txt, and the class "
            "numbers in its lists, to match model.json"
        )
    raise InputError(f"{folder} has different classes: {difference}; {remedy}")


def describe_label_difference(
    card_labels: list | None, data_labels: Sequence[str] | None
) -> str | None:
    """Describe the first difference between the classes of a model and of a data set.

    Case is ignored, and underscores count as spaces. If the model or the data set has no class
    names, or has only class numbers as names, it is unknown whether the classes differ.

    Returns:
        The difference, or None if there is none or it is unknown.
    """
    model_names, data_names = (
        [str(label) for label in labels or ()] for labels in (card_labels, data_labels)
    )
    if any(names == [str(i) for i in range(len(names))] for names in (model_names, data_names)):
        return None
    if len(model_names) != len(data_names):
        return f"{len(model_names)} in the model, {len(data_names)} in the data"
    pairs = zip(_plain(model_names), _plain(data_names), strict=True)
    for i, (model_name, data_name) in enumerate(pairs):
        if model_name != data_name:
            return f"class {i} is {model_names[i]!r} in the model, {data_names[i]!r} in the data"
    return None


def _plain(labels: Sequence) -> list[str]:
    return [plain_name(str(label)) for label in labels]


def check_same_model(card: dict, folder: str | Path, model_config: ModelConfig) -> None:
    """Refuse a model whose network differs from a config.

    Dropout rates, dtype and other fields that change no weight may differ.

    Args:
        card: The model card, from `load_card`.
        folder: The model folder or exported file, for the message.
        model_config: The config.

    Raises:
        InputError: The message names every field that differs, with both values.
    """
    changed = model_differences(card["config"], model_config, RATE_FIELDS)
    if changed:
        remedy = "use its values with --config.model.NAME=VALUE or choose another folder"
        if [*changed] == ["num_classes"]:  # the usual mistake is to evaluate the initial weights
            remedy = "set --config.init_from to a model that was trained on these classes"
        raise InputError(
            f"{folder} contains a different network: {'; '.join(changed.values())}; {remedy}"
        )


def model_differences(
    card_config: dict, model_config: ModelConfig, ignore: tuple[str, ...]
) -> dict[str, str]:
    """Compare the network of a model folder with that of a config.

    Args:
        card_config: The model config in the folder's model card.
        model_config: The model config to compare with.
        ignore: Fields that may differ.

    Returns:
        Field → `field: VALUE in the folder, VALUE in the config`, for each field that differs.
    """
    # JSON turns tuples into lists.
    before, after = json.loads(json.dumps([card_config, dataclasses.asdict(model_config)]))
    before = {name: before.get(name) for name in after}
    return differences(before, after, there="in the folder", here="in the config", ignore=ignore)


def check_activation(card: dict, folder: str | Path, activation: str) -> None:
    """Refuse a model folder whose activation differs from that of the config.

    Args:
        card: The model card, from `load_card`.
        folder: The model folder, for the message.
        activation: The config's `loss.name`.

    Raises:
        InputError: The activations differ.
    """
    if card["activation"] != activation:
        raise InputError(
            f"{folder} was trained with loss.name={card['activation']}, the config has "
            f"{activation}; set --config.loss.name={card['activation']}"
        )


def best_score(workdir: Path, metric: str) -> float:
    """Return the validation score of `WORKDIR/best` in percent, or -1 if there is no such folder.

    Args:
        workdir: The run's folder.
        metric: Name of the score in the folder's provenance: `top1` or `mAP`.

    Raises:
        InputError: The folder is damaged, or its card does not have the score.
    """
    if not exists(workdir / "best"):
        return -1.0
    score = load_card(workdir / "best")["provenance"].get(metric)
    if not isinstance(score, int | float):
        raise InputError(
            f"{workdir / 'best' / CARD_NAME}: provenance has {metric}={short_repr(score)}, "
            "expected a number; delete the folder"
        )
    return score
