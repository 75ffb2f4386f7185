"""Model folders: a network's weights with all that is needed to use them.

`model.json` has its name, config, preprocessing, labels (or null), provenance and the sizes and
CRC-32 of the files in `params/`, which Orbax wrote. Converters and training write such folders,
everything loads them.
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxvid import folders, processes, sharding
from jaxvid.errors import InputError, memory_problem, one_line, short_repr
from jaxvid.files import read_limited
from jaxvid.models import (
    ModelConfig,
    Params,
    abstract_model,
    make_model_config,
    merge_params,
    split_params,
    surgery,
)

FORMAT_VERSION = 1
MAX_CARD_BYTES = 32 * 10**6  # 20,000 classes have 1 MB
MAX_FILES = 10_000  # in `params`; Orbax writes about ten for each process of a run
MARK = "model.json"  # without it, a folder is no model folder; the last file to be written
CARD_KEYS = ("name", "config", "preprocessing", "labels", "provenance", "files")
# Fields of a model's config that change no weight and no use of one.
RATE_FIELDS = ("name", "init", "dropout", "drop_path", "remat", "dtype")
# Fields whose change surgery makes up for.
SIZE_FIELDS = ("num_classes", "num_frames", "image_size", "temporal_embedding_frames")


def save_model_folder(folder: str | Path, params: Params, card: dict) -> None:
    """Writes a model folder: `model.json` and `params/`. It appears complete or not at all.

    Args:
        folder: An existing model folder is replaced, and stays as it is if this fails.
        params: The weights.
        card: `name`, `config` (the model's), `preprocessing`, `labels` (or None), `provenance`.

    Raises:
        InputError: The folder holds something that is no model folder, or cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    sharding.in_all(_check_place, folder, sum(leaf.nbytes for leaf in params.values()))
    partial, is_first = folders.partial(folder), not jax.process_index()
    if is_first:
        folders.tidy(folder, MARK)
    sharding.wait_for_all(f"saving {folder}")
    try:
        # A few arrays at a time: the default copies all of them first.
        handler = ocp.StandardCheckpointHandler(save_concurrent_gb=0.1)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(partial / "params", params)
        if is_first:
            files = {"files": folders.file_sizes(partial / "params")}
            files["checksums"] = folders.checksums(partial / "params")
            card = {"format_version": FORMAT_VERSION, **card, **files}
            text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
            (partial / MARK).write_text(text, encoding="utf-8")
            folders.swap_in(folder, MARK)
    except jax.errors.JaxRuntimeError:  # the device's, not the disk's
        raise
    except (OSError, ValueError, RuntimeError, ExceptionGroup) as error:  # Orbax has all of them
        if memory_problem(error):
            raise
        raise InputError(
            f"{folder} cannot be written ({_reason(error)}); make room or name another"
        ) from None
    finally:
        processes.publish(sys.exception())  # others may wait in Orbax, and not come
        if is_first:
            folders.tidy(folder, MARK)
    sharding.wait_for_all(f"saved {folder}")


def _check_place(folder: Path, need_bytes: int) -> None:
    """Refuses what cannot be replaced, and a full disk before Orbax meets it with much noise."""
    if folder.exists() and not (folder / MARK).is_file():
        raise InputError(f"{folder} exists and is no model folder; name another one")
    folders.check_room(folder, need_bytes)


def is_there(folder: str | Path) -> bool:
    """Whether a model folder exists, also while or after it was being replaced."""
    return (folders.whole(folder, MARK) / MARK).exists()


def load_card(folder: str | Path) -> dict:
    """Reads and checks a model folder's `model.json`.

    Returns:
        Its contents: every value has its type, `config` is that of a network that can be built,
        and `labels`, if there are any, has one entry for each class.

    Raises:
        InputError: There is none, or it is not one that this version reads.
    """
    try:
        path = folders.whole(folder, MARK) / MARK
        data = read_limited(path, MAX_CARD_BYTES)
    except FileNotFoundError:
        raise InputError(
            f"{folder} is no model folder: {Path(folder) / MARK} does not exist; name a folder "
            "that training or a converter wrote"
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


def check_same_model(folder: str | Path, model_config) -> None:
    """Refuses a model folder whose network differs from a config's, and says where.

    Rates and dtype may differ: they change no weight.
    """
    differences = _differences(load_card(folder)["config"], model_config, RATE_FIELDS)
    if differences:
        raise InputError(f"{folder} holds another network: {'; '.join(differences.values())}")


def _differences(there: dict, model_config: ModelConfig, free: tuple[str, ...]) -> dict[str, str]:
    """Field → how a folder's config differs from a model's, but for the free ones."""
    # A card has lists where a config has tuples.
    there, here = json.loads(json.dumps([there, dataclasses.asdict(model_config)]))
    return {
        name: f"{name} is {there.get(name)!r} there, {value!r} here"
        for name, value in here.items()
        if name not in free and there.get(name) != value
    }


def load_params(folder: str | Path, abstract_params: Params) -> Params:
    """Reads a model folder's weights.

    Args:
        folder: The model folder.
        abstract_params: Shapes, dtypes and, if wanted, shardings that the weights must have.

    Raises:
        InputError: The files are damaged; or weights are missing, left over, or of another shape,
            and all are named.
    """
    card = load_card(folder)
    path = Path(os.path.abspath(folders.whole(folder, MARK) / "params"))  # as Orbax needs it
    # Check sizes first: TensorStore's error for a truncated file is unreadable.
    sizes = folders.scan_sizes(path, max_files=MAX_FILES)
    folders.check_files(path, card["files"], sizes, "are missing or of another size")
    need_bytes = sum(4 * math.prod(leaf.shape) for leaf in abstract_params.values())
    if (total := sum(sizes.values())) > 2 * need_bytes + 10**8:  # before all of it is read
        raise InputError(
            f"{path} has {total / 1e6:.0f} MB of files for weights of {need_bytes / 1e6:.0f} MB; "
            "export the model again"
        )
    if "checksums" in card:  # older folders have none
        folders.check_files(path, card["checksums"], folders.checksums(path), "have changed")
    try:
        return _restore(path, abstract_params)
    except (InputError, jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:  # Orbax raises bare ones
        if memory_problem(error):
            raise
        raise InputError(
            f"{path} cannot be read ({_reason(error)}); copy or export the model again"
        ) from None


def _restore(path: Path, abstract_params: Params) -> Params:
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.metadata(path).item_metadata.tree
        problems = [
            f"{name}: {_shape(found.get(name))} in the folder, {_shape(abstract_params.get(name))} "
            "in the model"
            for name in sorted({*found, *abstract_params})
            if _shape(found.get(name)) != _shape(abstract_params.get(name))
        ]
        if problems:
            raise InputError(f"{path} does not fit the model: {'; '.join(problems)}")
        return checkpointer.restore(path, abstract_params)


def load_init(
    folder: str | Path, model_config: ModelConfig, fresh: Params
) -> tuple[Params, list[str]]:
    """The weights of a model folder as the start of a model that may differ from it.

    Other classes, frames or resolution, a temporal part more or less: see
    `surgery.plan_fit`. At its peak, one copy of the weights beside `fresh`.

    Args:
        folder: The model folder.
        model_config: The wanted model's config.
        fresh: The wanted model's newly initialised weights.

    Returns:
        Weights of the names, shapes and shardings of `fresh`; and what was loaded, resized,
        reinitialised or left unused, and which options differ, as lines for a log.

    Raises:
        InputError: The folder is damaged, or the weights would not fit or would mean something
            else; every reason is named.
    """
    source = make_model_config(**load_card(folder)["config"])
    kinds = [type(config).__name__.removesuffix("Config") for config in (source, model_config)]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"{folder} holds {source.name}, of the family {kinds[0]}; {model_config.name} is of "
            f"{kinds[1]}, which its weights do not fit: name a folder of that family"
        )
    found = abstract_model(source)[1]
    fit = surgery.plan_fit(found, fresh)
    differences = _differences(dataclasses.asdict(source), model_config, RATE_FIELDS + SIZE_FIELDS)
    # No shape tells how many heads share a kernel, but each would get parts of several.
    unfit = {"heads"} & differences.keys()
    if "aggregate.cls_token" in fit.loaded:
        unfit |= {"temporal_heads"} & differences.keys()
    if unfit or fit.problems:
        raise InputError(
            f"{folder} cannot start this {model_config.name}: "
            f"{'; '.join([*differences.values(), *fit.problems])}; "
            "take its values with --config.model.NAME=VALUE or name another folder"
        )
    # What changes is read into host memory: its new shape alone knows its place on the devices.
    target = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in found.items()}
    target |= {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in fresh.items()
        if name in fit.loaded
    }
    params = surgery.fit_params(fit, load_params(folder, target), fresh)
    return params, [*fit.describe(), *(f"differs: {text}" for text in differences.values())]


def load_model(folder: str | Path, *, dtype: str | None = None):
    """Loads a model folder.

    Args:
        folder: Written by training, by a converter or by `save_model`.
        dtype: Of the computation, `float32` or `bfloat16`; None: from the model card.

    Returns:
        The network, ready for evaluation: `model(video)` takes a normalised float clip
        `(b t h w c)` to logits `(b, num_classes)`.

    Raises:
        InputError: The folder is no model folder, or is damaged.
    """
    card = load_card(folder)
    fields = card["config"] | ({"dtype": dtype} if dtype else {})
    graphdef, abstract_params = abstract_model(make_model_config(**fields))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for name, leaf in abstract_params.items()
    }
    return merge_params(graphdef, load_params(folder, target))


def save_model(
    model, folder: str | Path, *, preprocessing: dict | None = None, labels: list | None = None
) -> None:
    """Writes a network as a model folder.

    Args:
        model: A network of this project.
        folder: Where to; an existing model folder is replaced.
        preprocessing: How clips are made for it, as in a trained model's `model.json`.
        labels: Names of the classes, in order.
    """
    save_model_folder(
        folder,
        split_params(model)[1],
        make_card(model.config, preprocessing=preprocessing, labels=labels, provenance={}),
    )


def best_top1(workdir: Path) -> float:
    """The validation top-1, in percent, of the model in `WORKDIR/best`; -1: there is none.

    Raises:
        InputError: The folder is damaged, or does not say it.
    """
    if not is_there(workdir / "best"):
        return -1.0
    top1 = load_card(workdir / "best")["provenance"].get("top1")
    if not isinstance(top1, int | float):
        raise InputError(
            f"{workdir / 'best' / MARK}: provenance has top1={short_repr(top1)}, expected a "
            "number; delete the folder"
        )
    return top1


def fingerprint(params: Params) -> str:
    """SHA-256 over names, shapes and values of the weights, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(params):
        array = sharding.to_host(params[name])
        digest.update(f"{name}{array.shape}{array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, of several errors that of the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    line = one_line(getattr(error, "strerror", None) or error, sys.maxsize)
    return line if len(line) <= 200 else f"...{line[-160:]}"  # TensorStore has the cause last


def _shape(leaf) -> str:
    return "absent" if leaf is None else str(tuple(leaf.shape))
