"""Model folders: the weights of a network, with everything needed to use them.

`params/` contains the weights, written by Orbax. `model.json` contains the format version, name,
config, preprocessing (or null), labels (or null), provenance, and the size and CRC-32 of each file
in `params/`.

Converters and training write model folders; all programs load them.
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from jaxvid import atomic, files, object_store, remote_folder
from jaxvid.distributed import collectives, process_group, sharding
from jaxvid.errors import InputError, memory_problem, one_line
from jaxvid.models import (
    ModelConfig,
    Params,
    abstract_model,
    family_of,
    make_model_config,
    merge_params,
    split_params,
    transfer,
)
from jaxvid.object_store import is_remote
from jaxvid.storage import older_shapes
from jaxvid.storage.model_card import (
    CARD_NAME,
    FORMAT_VERSION,
    RATE_FIELDS,
    card_of,
    describe_label_difference,
    load_card,
    make_card,
    model_differences,
    remember_card,
)

MAX_FILES = 10_000  # files and folders in `params`; Orbax writes about ten per process
# Fields of a model config that may differ when weights are transferred, in addition to
# `RATE_FIELDS` and the fields of the family's frame embeddings.
SIZE_FIELDS = ("num_classes", "num_frames", "image_size")


def save_model_folder(folder: str | Path, params: Params, card: dict) -> None:
    """Write a model folder, `model.json` and `params/`, atomically.

    In an object store, `model.json` is written last. Only one process can write there.

    Args:
        folder: Folder to write, or its address. An existing model folder is replaced. If writing
            fails, a local folder is kept.
        params: The weights.
        card: The model card, from `model_card.make_card`.

    Raises:
        InputError: The folder exists and is not a model folder, or cannot be written.
    """
    if is_remote(folder):
        _save_remote(str(atomic.output_path(folder)), params, card)
        return
    folder = Path(os.path.realpath(folder))
    collectives.raise_on_all_processes(
        _check_target, folder, sum(leaf.nbytes for leaf in params.values())
    )
    partial, is_first = atomic.staging_dir(folder), not jax.process_index()
    if is_first:
        atomic.recover(folder, CARD_NAME)
    collectives.barrier(f"saving {folder}")
    try:
        # Copy a few arrays at a time; by default, Orbax copies all of them first.
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
    except jax.errors.JaxRuntimeError:  # from the device, not the disk
        raise
    except (OSError, ValueError, RuntimeError, ExceptionGroup) as error:  # all raised by Orbax
        if memory_problem(error):
            raise
        raise InputError(
            f"{folder} cannot be written ({_reason(error)}); make room or choose another folder"
        ) from None
    finally:
        # Other processes may be waiting in Orbax and must learn of the failure.
        process_group.publish(sys.exception())
        if is_first:
            atomic.recover(folder, CARD_NAME)
    collectives.barrier(f"saved {folder}")


def _save_remote(address: str, params: Params, card: dict) -> None:
    """Write a model folder to an address."""
    if process_group.current():
        raise InputError(f"{address}: several processes cannot write it; choose a local folder")
    stored = object_store.find(address)
    if stored and CARD_NAME not in stored:
        raise InputError(f"{address} exists and is not a model folder; choose another one")
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "model"
        save_model_folder(local, params, card)
        remote_folder.replace(address, local, CARD_NAME)


def _check_target(folder: Path, need_bytes: int) -> None:
    """Refuse a target that exists and is not a model folder, or for which the disk is too full.

    Orbax's error for a full disk is unreadable.
    """
    if folder.exists() and not (folder / CARD_NAME).is_file():
        raise InputError(f"{folder} exists and is not a model folder; choose another one")
    files.check_room(folder, need_bytes)


def abstract_sharded_model(config: ModelConfig, mesh: Mesh) -> tuple[nnx.GraphDef, Params]:
    """Return `abstract_model` of a network, with the weights sharded over a mesh."""
    graphdef, abstract_params = abstract_model(config)
    splits = family_of(config).tensor_splits(config)
    return graphdef, sharding.with_sharding(abstract_params, mesh, splits)


def load_params(folder: str | Path, abstract_params: Params) -> Params:
    """Load the weights of a model folder.

    Args:
        folder: The model folder.
        abstract_params: Expected shapes and dtypes, and optional shardings.

    Raises:
        InputError: The folder is not a model folder, or its files are damaged; or weights are
            missing or unexpected, or have wrong shapes: the message then names all of them.
    """
    card = load_card(folder)
    path = Path(os.path.abspath(atomic.resolve(folder, CARD_NAME) / "params"))  # Orbax requires it
    # Check sizes first: TensorStore's error for a truncated file is unreadable.
    sizes = files.scan_sizes(path, max_files=MAX_FILES)
    files.check_files(path, card["files"], sizes, "are missing or have a different size")
    need_bytes = sum(4 * math.prod(leaf.shape) for leaf in abstract_params.values())
    if (total := sum(sizes.values())) > 2 * need_bytes + 10**8:  # checked before the files are read
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
    except Exception as error:  # Orbax raises plain Exception
        if memory_problem(error):
            raise
        raise InputError(
            f"{path} cannot be read ({_reason(error)}); copy or export the model again"
        ) from None


def _restore(path: Path, abstract_params: Params) -> Params:
    """Compare names and shapes of the weights, then restore them with Orbax."""
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata.tree
        target = older_shapes.match_file(abstract_params, stored)
        problems = [
            f"{name}: {_shape(stored.get(name))} in the folder, "
            f"{_shape(abstract_params.get(name))} in the model"
            for name in sorted({*stored, *target})
            if _shape(stored.get(name)) != _shape(target.get(name))
        ]
        if problems:
            raise InputError(f"{path} does not fit the model: {'; '.join(problems)}")
        return older_shapes.to_current(checkpointer.restore(path, target), abstract_params)


def load_init(
    folder: str | Path,
    model_config: ModelConfig,
    fresh: Params,
    labels: Sequence[str] | None = None,
) -> tuple[Params, list[str]]:
    """Load the weights of a model folder into a network that may differ from the folder's.

    Classes, frames, resolution and optional parts may differ: see `transfer.plan_transfer`. Peak
    memory is one copy of the weights in addition to `fresh`.

    Args:
        folder: The model folder.
        model_config: The new network's config.
        fresh: The new network's initial weights.
        labels: Class names of the data. If they differ from the folder's, or are in a different
            order, the class head is reinitialised. If None, they are not compared.

    Returns:
        Weights with the names, shapes and shardings of `fresh`; and log lines that say which
        weights were loaded, resized, reinitialised or unused, and which config fields differ.

    Raises:
        InputError: The folder is damaged, or the networks are incompatible; the message names every
            reason.
    """
    card = load_card(folder)
    source = make_model_config(**card["config"])
    family, source_family = family_of(model_config), family_of(source)
    if source_family is not family:
        raise InputError(
            f"{folder} contains {source.name}, of the family {source_family.title}; "
            f"{model_config.name} is of the family {family.title}; choose a folder of that family"
        )
    source_params = abstract_model(source)[1]
    plan = transfer.plan_transfer(family, source_params, fresh)
    if difference := describe_label_difference(card["labels"], labels):
        transfer.reinitialise_head(family, plan, f"different classes: {difference}")
    sizes = (*SIZE_FIELDS, *(embedding.field for embedding in family.frame_embeddings.values()))
    differences = model_differences(dataclasses.asdict(source), model_config, RATE_FIELDS + sizes)
    # The number of heads does not change the shape of a kernel, but it changes which head each
    # column belongs to.
    incompatible = [
        field
        for field, prefix in family.head_counts.items()
        if field in differences and any(name.startswith(prefix) for name in plan.loaded)
    ]
    if incompatible or plan.problems:
        raise InputError(
            f"{folder} cannot initialise {model_config.name}: "
            f"{'; '.join([*differences.values(), *plan.problems])}; "
            "use its values with --config.model.NAME=VALUE or choose another folder"
        )
    # Weights that are not copied unchanged are read into host memory: the shardings of `fresh` are
    # for their new shapes.
    target = {
        name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in source_params.items()
    }
    target |= {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in fresh.items()
        if name in plan.loaded
    }
    params = transfer.transfer_params(family, plan, load_params(folder, target), fresh)
    return params, [*plan.describe(), *(f"differs: {text}" for text in differences.values())]


def load_model(folder: str | Path, *, dtype: str | None = None) -> nnx.Module:
    """Load a model folder.

    Args:
        folder: The model folder, written by training, by a converter or by `save_model`.
        dtype: Compute dtype, one of `precision.DTYPES`, or None for that of the model card.

    Returns:
        The network in evaluation mode. `model(video)` maps normalised float clips `(b t h w c)` to
        logits `(b, num_classes)`.

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
    model = merge_params(graphdef, load_params(folder, target))
    remember_card(model, card)
    return model


def save_model(
    model: nnx.Module,
    folder: str | Path,
    *,
    preprocessing: dict | None = None,
    labels: list | None = None,
) -> None:
    """Save a network as a model folder.

    A network from `load_model` keeps the function from its logits to probabilities.

    Args:
        model: A network from `create_model` or `load_model`.
        folder: Folder to write, or its address. An existing model folder is replaced.
        preprocessing: Preprocessing of the network's clips, as in the `model.json` of a trained
            model. None: that of the folder that the network was loaded from, otherwise unknown.
        labels: Class names in the order of the class indices, or None if they are unknown. Those
            of a loaded network are not kept, because the classes may have changed in training.

    Raises:
        InputError: The folder exists and is not a model folder, or cannot be written.
    """
    loaded = card_of(model) or {"preprocessing": None, "activation": "softmax"}
    card = make_card(
        model.config,
        preprocessing=loaded["preprocessing"] if preprocessing is None else preprocessing,
        labels=labels,
        activation=loaded["activation"],
        provenance={},
    )
    save_model_folder(folder, split_params(model)[1], card)


def fingerprint(params: Params) -> str:
    """Return the SHA-256 of the names, shapes, dtypes and values of weights, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(params):
        array = collectives.to_host(params[name])
        digest.update(f"{name}{array.shape}{array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    """Return the first line of an error, or of the first error in a group.

    Only the end of a long line is returned.
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    line = one_line(getattr(error, "strerror", None) or error, sys.maxsize)
    return line if len(line) <= 200 else f"...{line[-160:]}"  # TensorStore names the cause last


def _shape(leaf: jax.ShapeDtypeStruct | None) -> str:
    return "absent" if leaf is None else str(tuple(leaf.shape))
