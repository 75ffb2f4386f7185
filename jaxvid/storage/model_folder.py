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

from jaxvid import atomic, files
from jaxvid.distributed import collectives, process_group
from jaxvid.errors import InputError, memory_problem, one_line
from jaxvid.models import (
    ModelConfig,
    Params,
    abstract_model,
    make_model_config,
    merge_params,
    split_params,
    transfer,
)
from jaxvid.storage.model_card import (
    CARD_NAME,
    FORMAT_VERSION,
    RATE_FIELDS,
    load_card,
    make_card,
    model_differences,
)

MAX_FILES = 10_000  # in `params`; Orbax writes about ten for each process of a run
# Fields whose change surgery makes up for.
SIZE_FIELDS = ("num_classes", "num_frames", "image_size", "temporal_embedding_frames")


def save_model_folder(folder: str | Path, params: Params, card: dict) -> None:
    """Writes a model folder: `model.json` and `params/`. It appears complete or not at all.

    Args:
        folder: An existing model folder is replaced, and stays as it is if this fails.
        params: The weights.
        card: `name`, `config` (the model's), `preprocessing`, `labels` (or None), `provenance`.

    Raises:
        InputError: The folder holds something that is not a model folder, or cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    collectives.raise_on_all_processes(
        _check_place, folder, sum(leaf.nbytes for leaf in params.values())
    )
    partial, is_first = atomic.staging_dir(folder), not jax.process_index()
    if is_first:
        atomic.recover(folder, CARD_NAME)
    collectives.barrier(f"saving {folder}")
    try:
        # A few arrays at a time: the default copies all of them first.
        handler = ocp.StandardCheckpointHandler(save_concurrent_gb=0.1)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(partial / "params", params)
        if is_first:
            written = {"files": files.file_sizes(partial / "params")}
            written["checksums"] = files.checksums(partial / "params")
            card = {"format_version": FORMAT_VERSION, **card, **written}
            text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
            (partial / CARD_NAME).write_text(text, encoding="utf-8")
            atomic.commit(folder, CARD_NAME)
    except jax.errors.JaxRuntimeError:  # the device's, not the disk's
        raise
    except (OSError, ValueError, RuntimeError, ExceptionGroup) as error:  # Orbax has all of them
        if memory_problem(error):
            raise
        raise InputError(
            f"{folder} cannot be written ({_reason(error)}); make room or name another"
        ) from None
    finally:
        process_group.publish(sys.exception())  # others may wait in Orbax, and not come
        if is_first:
            atomic.recover(folder, CARD_NAME)
    collectives.barrier(f"saved {folder}")


def _check_place(folder: Path, need_bytes: int) -> None:
    """Refuses what cannot be replaced, and a full disk before Orbax meets it with much noise."""
    if folder.exists() and not (folder / CARD_NAME).is_file():
        raise InputError(f"{folder} exists and is not a model folder; name another one")
    files.check_room(folder, need_bytes)


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
    path = Path(os.path.abspath(atomic.resolve(folder, CARD_NAME) / "params"))  # as Orbax needs it
    # Check sizes first: TensorStore's error for a truncated file is unreadable.
    sizes = files.scan_sizes(path, max_files=MAX_FILES)
    files.check_files(path, card["files"], sizes, "are missing or of another size")
    need_bytes = sum(4 * math.prod(leaf.shape) for leaf in abstract_params.values())
    if (total := sum(sizes.values())) > 2 * need_bytes + 10**8:  # before all of it is read
        raise InputError(
            f"{path} has {total / 1e6:.0f} MB of files for weights of {need_bytes / 1e6:.0f} MB; "
            "export the model again"
        )
    if "checksums" in card:  # older folders have none
        files.check_files(path, card["checksums"], files.checksums(path), "have changed")
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
    fit = transfer.plan_transfer(found, fresh)
    differences = model_differences(
        dataclasses.asdict(source), model_config, RATE_FIELDS + SIZE_FIELDS
    )
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
    params = transfer.transfer_params(fit, load_params(folder, target), fresh)
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
        InputError: The folder is not a model folder, or is damaged.
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


def fingerprint(params: Params) -> str:
    """SHA-256 over names, shapes and values of the weights, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(params):
        array = collectives.to_host(params[name])
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
