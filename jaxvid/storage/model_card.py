"""The model card, `model.json`: what it holds, and whether it fits a config or a data set."""

import dataclasses
import json
from pathlib import Path

from jaxvid import atomic
from jaxvid.config import differences, translate
from jaxvid.errors import InputError, one_line, short_repr
from jaxvid.files import read_limited
from jaxvid.models import (
    ModelConfig,
    make_model_config,
)

FORMAT_VERSION = 1
MAX_CARD_BYTES = 32 * 10**6  # 20,000 classes have 1 MB
CARD_NAME = "model.json"  # written last; a folder without it is not a model folder
CARD_KEYS = ("name", "config", "preprocessing", "labels", "provenance", "files")
# Fields of a model's config that change no weight and no use of one.
RATE_FIELDS = ("name", "init", "dropout", "drop_path", "remat", "dtype")


def exists(folder: str | Path) -> bool:
    """Whether a model folder exists, also while or after it was being replaced."""
    return (atomic.resolve(folder, CARD_NAME) / CARD_NAME).exists()


def load_card(folder: str | Path) -> dict:
    """Reads and checks a model folder's `model.json`.

    Returns:
        Its contents: every value has its type, `config` is that of a network that can be built,
        and `labels`, if there are any, has one entry for each class.

    Raises:
        InputError: There is none, or it is not one that this version reads.
    """
    try:
        path = atomic.resolve(folder, CARD_NAME) / CARD_NAME
        data = read_limited(path, MAX_CARD_BYTES)
    except FileNotFoundError:
        raise InputError(
            f"{folder} is not a model folder (no {Path(folder) / CARD_NAME}); name a folder that "
            "training or a converter wrote"
        ) from None
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise InputError(f"{folder} cannot be read ({error.strerror}); name another") from None
    try:
        card = json.loads(data, object_pairs_hook=_unique)
        version = card["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = one_line(error if isinstance(error, ValueError) else repr(error))
        raise InputError(f"{path} cannot be read ({reason}); export the model again") from None
    if version != FORMAT_VERSION:  # before the keys: another version may have others
        raise InputError(
            f"{path} has format version {short_repr(version)}; this jaxvid reads "
            f"{FORMAT_VERSION}: update it"
        )
    if missing := [key for key in CARD_KEYS if key not in card]:
        raise InputError(f"{path} cannot be read (no {missing[0]!r}); export the model again")
    if not isinstance(card["preprocessing"], dict | None):
        raise InputError(
            f"{path} says nothing of preprocessing (expected a dict or null, got "
            f"{short_repr(card['preprocessing'])}); export the model again"
        )
    try:
        _check_card(card)
    except (InputError, TypeError) as error:
        reason = one_line(error, 300)
        raise InputError(f"{path}: {reason}; export the model again") from None
    if card["preprocessing"]:
        card["preprocessing"] = translate(card["preprocessing"])
    return card


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object whose names are all different."""
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"duplicate name {short_repr(name)}")
        values[name] = value
    return values


def _check_card(card: dict) -> None:
    """Refuses values of the wrong type, impossible configs, and a wrong number of labels.

    Raises:
        InputError: Names the field; without the file.
        TypeError: `config` has no name.
    """
    types = {"name": str, "config": dict, "provenance": dict, "files": dict, "checksums": dict}
    for name, expected in types.items():
        if name in card and not isinstance(card[name], expected):
            raise InputError(f"{name} is {short_repr(card[name])}, expected a {expected.__name__}")
    for name in ("files", "checksums"):
        for file, value in card.get(name, {}).items():
            parts = Path(file).parts
            if not parts or ".." in parts or Path(file).is_absolute() or "\0" in file:
                raise InputError(f"{name} names {short_repr(file)}, which is outside params")
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(f"{name} has {short_repr(value)} for {short_repr(file)}")
    if not card["files"]:
        raise InputError("files is empty")
    config, labels = make_model_config(**card["config"]), card["labels"]
    if labels is not None and (not isinstance(labels, list) or len(labels) != config.num_classes):
        found = len(labels) if isinstance(labels, list) else short_repr(labels)
        raise InputError(
            f"labels has {found} entries for num_classes={config.num_classes}; give each class "
            "its name, or write null"
        )
    for label in labels or ():
        if not isinstance(label, str | int):
            raise InputError(f"labels has {short_repr(label)}, expected text")


def make_card(model_config, *, preprocessing, labels, provenance: dict) -> dict:
    """The contents of a `model.json`."""
    return {
        "name": model_config.name,
        "config": dataclasses.asdict(model_config),
        "preprocessing": preprocessing,
        "labels": labels,
        "provenance": provenance,
    }


def check_labels(
    card_labels: list | None, data_labels: list[str] | None, folder: str | Path
) -> None:
    """Refuses a model folder whose classes are not the data's, in the data's order.

    Classes that only have their numbers for names, on either side, are taken as they are. Upper
    case and underscores make no difference.

    Args:
        card_labels: Its `model.json`'s labels; None: it names none.
        data_labels: The data's.
        folder: The model folder, for the message.

    Raises:
        InputError: Names the first difference.
    """
    there, here = ([str(label) for label in labels or ()] for labels in (card_labels, data_labels))
    if any(names == [str(i) for i in range(len(names))] for names in (there, here)):
        return
    if len(there) != len(here):
        raise InputError(
            f"{folder} has {len(there)} classes, the data {len(here)}; name another folder"
        )
    plain = [[name.replace("_", " ").strip().casefold() for name in side] for side in (there, here)]
    if plain[0] == plain[1]:
        return
    first = next(i for i, (a, b) in enumerate(zip(*plain, strict=True)) if a != b)
    way_out = "name a folder of the data's classes, or correct the data's labels.txt"
    if sorted(plain[0]) == sorted(plain[1]):
        way_out = (
            "the names are the same in another order: bring the data's labels.txt, and the numbers "
            "in its lists, into the order in model.json"
        )
    raise InputError(
        f"{folder} has other classes: {first} is {there[first]!r} there, {here[first]!r} in the "
        f"data; {way_out}"
    )


def check_same_model(folder: str | Path, model_config: ModelConfig) -> None:
    """Refuse a model folder whose network differs from a config's.

    Rates and the dtype may differ, as they change no weight.

    Raises:
        InputError: Names every field that differs, with both values.
    """
    found = model_differences(load_card(folder)["config"], model_config, RATE_FIELDS)
    if found:
        raise InputError(f"{folder} holds another network: {'; '.join(found.values())}")


def model_differences(
    card_config: dict, model_config: ModelConfig, ignore: tuple[str, ...]
) -> dict[str, str]:
    """Compare the network of a model folder with that of a config.

    Args:
        card_config: The folder's model config.
        model_config: The other one.
        ignore: Fields that may differ.

    Returns:
        Field → its name and both values.
    """
    # A card has lists where a config has tuples.
    before, after = json.loads(json.dumps([card_config, dataclasses.asdict(model_config)]))
    before = {name: before.get(name) for name in after}
    return differences(before, after, there="in the folder", here="in the config", ignore=ignore)


def best_top1(workdir: Path) -> float:
    """The validation top-1, in percent, of the model in `WORKDIR/best`; -1: there is none.

    Raises:
        InputError: The folder is damaged, or does not say it.
    """
    if not exists(workdir / "best"):
        return -1.0
    top1 = load_card(workdir / "best")["provenance"].get("top1")
    if not isinstance(top1, int | float):
        raise InputError(
            f"{workdir / 'best' / CARD_NAME}: provenance has top1={short_repr(top1)}, expected a "
            "number; delete the folder"
        )
    return top1
