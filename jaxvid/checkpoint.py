"""What goes to disk: training checkpoints (state and data iterator) and model folders."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxvid import sharding
from jaxvid.errors import InputError
from jaxvid.metrics import log
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
CARD_KEYS = ("name", "config", "preprocessing", "labels", "provenance", "files")
# Fields of a model's config that change no weight and no use of one.
RATE_FIELDS = ("name", "init", "dropout", "drop_path", "remat", "dtype")
# Fields whose change surgery makes up for.
SIZE_FIELDS = ("num_classes", "num_frames", "image_size", "temporal_embedding_frames")


def check_writable(workdir: Path, need_bytes: int) -> None:
    """Makes sure, before any work is done, that its results can be kept.

    Args:
        workdir: Folder to make and write to.
        need_bytes: What checkpoints and the model folder will take.

    Raises:
        InputError: The folder cannot be written or its disk has less room than that.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe{jax.process_index()}"
        probe.write_bytes(bytes(4096))
        probe.unlink()
        free = shutil.disk_usage(workdir).free
    except OSError as error:
        raise InputError(
            f"{workdir}: cannot be written to ({error.strerror}); choose another --workdir"
        ) from None
    if free < need_bytes:
        raise InputError(
            f"{workdir}: {free / 1e6:.0f} MB free, but checkpoints need {need_bytes / 1e6:.0f} MB; "
            "make room or choose another --workdir"
        )


def make_manager(workdir: Path, *, keep: int) -> ocp.CheckpointManager:
    """The manager of `WORKDIR/checkpoints/STEP/`; saves run in the background.

    Args:
        workdir: The run's folder.
        keep: How many of the newest checkpoints stay.
    """
    return ocp.CheckpointManager(
        (workdir / "checkpoints").resolve(),
        options=ocp.CheckpointManagerOptions(max_to_keep=keep),
        item_names=("state", "data"),
    )


def save_checkpoint(
    manager: ocp.CheckpointManager, state: dict, data_iter: grain.DatasetIterator
) -> None:
    """Saves state and iterator under the state's step. Call it before the next draw.

    Raises:
        InputError: It, or the one before, cannot be written.
    """
    position = {"checksum": int(_checksum(state)), "iterator": data_iter.get_state()}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position))
    with _told_if_not_written(manager):
        manager.save(int(state["step"]), args=args)


def finish_saving(manager: ocp.CheckpointManager) -> None:
    """Waits for the last checkpoint.

    Raises:
        InputError: It cannot be written.
    """
    with _told_if_not_written(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def _told_if_not_written(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = next(filter(None, map(str.strip, str(error).splitlines())), repr(error))
        steps = ", ".join(map(str, find_steps(Path(manager.directory).parent))) or "none"
        raise InputError(
            f"a checkpoint cannot be written to {manager.directory} ({reason[:200]}); whole ones "
            f"there are of the steps: {steps}; make room, then the same command continues"
        ) from None


@jax.jit
def _checksum(state: dict) -> jax.Array:
    """A number that changes with any bit of the state; the same on any devices."""
    total = jnp.zeros((), jnp.uint32)
    for i, leaf in enumerate(jax.tree.leaves(state)):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        total += jnp.uint32(2 * i + 1) * bits.sum(dtype=jnp.uint32)
    return total


def restore_newest(
    workdir: Path, abstract_state: dict, data_iter: grain.DatasetIterator, *, keep: int
) -> tuple[ocp.CheckpointManager, dict | None]:
    """Restores the newest checkpoint that is whole.

    A damaged one is named in the log and moved to `WORKDIR/damaged`, never deleted.

    Args:
        workdir: The run's folder.
        abstract_state: Shapes, dtypes and shardings of the state.
        data_iter: Is set to where it was.
        keep: How many of the newest checkpoints stay, from now on.

    Returns:
        The manager; and the state, None where there is no checkpoint yet.

    Raises:
        InputError: There are checkpoints, and all are damaged.
    """
    damaged = []
    while True:
        manager = make_manager(workdir, keep=keep)
        step = manager.latest_step()
        if step is None:
            break
        try:
            return manager, _restore(manager, step, abstract_state, data_iter)
        except (ValueError, OSError, KeyError, TypeError) as error:
            reason = next(filter(None, map(str.strip, str(error).splitlines())), repr(error))
        manager.close()
        damaged.append(_move_aside(workdir, step))
        log.warning(
            "the checkpoint of step %d is damaged (%s); it was moved to %s, and the one before it "
            "is used",
            *(step, reason[:200], damaged[-1]),
        )
    if damaged:
        manager.close()
        raise InputError(
            f"{workdir}: every checkpoint is damaged ({', '.join(map(str, damaged))}); restore "
            "one, or choose another --workdir"
        )
    return manager, None


def _restore(manager, step: int, abstract_state: dict, data_iter) -> dict:
    args = ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
    )
    restored = manager.restore(step, args=args)
    if int(_checksum(restored.state)) != restored.data["checksum"]:
        raise ValueError("its checksum is another")
    data_iter.set_state(restored.data["iterator"])
    return restored.state


def _move_aside(workdir: Path, step: int) -> Path:
    place = workdir / "damaged" / f"{step}"
    while place.exists():
        place = place.with_name(f"{place.name}_again")
    sharding.wait_for_all(f"damaged {step}")
    if not jax.process_index():
        place.parent.mkdir(exist_ok=True)
        (workdir / "checkpoints" / str(step)).rename(place)
    sharding.wait_for_all(f"moved {step}")
    return place


def restore_params(workdir: Path, step: int, abstract_params: Params) -> Params:
    """Restores the weights alone out of a training checkpoint, for evaluation.

    Args:
        workdir: The run's folder.
        step: Which checkpoint.
        abstract_params: Shapes, dtypes and shardings of the weights.

    Returns:
        The weights' average where the run keeps one, or else the weights.
    """
    path = (workdir / "checkpoints" / str(step) / "state").resolve()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        name = "ema" if "ema" in checkpointer.metadata(path).item_metadata.tree else "params"
        item = {name: abstract_params}
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        restored = checkpointer.restore(
            path,
            args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True),
        )
    return restored[name]


def save_model_folder(folder: str | Path, params: Params, card: dict) -> None:
    """Writes a model folder: `model.json` and `params/`. It appears complete or not at all.

    Args:
        folder: An existing model folder is replaced.
        params: The weights.
        card: `name`, `config` (the model's), `preprocessing`, `labels` (or None), `provenance`.

    Raises:
        InputError: The folder holds something that is no model folder.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder / "model.json").is_file():
        raise InputError(f"{folder} exists and is no model folder; name another one")
    partial = folder.parent / f".{folder.name}.partial"
    is_first = not jax.process_index()
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
    sharding.wait_for_all(f"saving {folder}")
    try:
        # A few arrays at a time: the default copies all of them first.
        handler = ocp.StandardCheckpointHandler(save_concurrent_gb=0.1)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(partial / "params", params)
        if not is_first:
            return
        card = {"format_version": FORMAT_VERSION, **card, "files": _file_sizes(partial / "params")}
        text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
        (partial / "model.json").write_text(text, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); name another") from None
    finally:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        sharding.wait_for_all(f"saved {folder}")


def load_card(folder: str | Path) -> dict:
    """Reads a model folder's `model.json`.

    Raises:
        InputError: There is none, or it is not one that this version reads.
    """
    path = Path(folder) / "model.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        version = card["format_version"]
        if missing := [key for key in CARD_KEYS if key not in card]:
            raise KeyError(*missing)
    except FileNotFoundError:
        raise InputError(
            f"{folder} is no model folder: {path} does not exist; name a folder that training or "
            "a converter wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error!r}); export the model again") from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version}; this jaxvid reads {FORMAT_VERSION}: update it"
        )
    return card


def compare_config(workdir: Path, config) -> dict[str, str]:
    """How a config differs from the one that a run was started with.

    Args:
        workdir: The run's folder; without `config.json` nothing differs.
        config: A ConfigDict.

    Returns:
        Field (`model.width`) → "model.width was 64, now 32".

    Raises:
        InputError: `config.json` is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        return {}
    try:
        before = _flatten(json.loads(path.read_text()))
    except ValueError:
        raise InputError(f"{path} is damaged; choose another --workdir") from None
    now = _flatten(json.loads(json.dumps(config.to_dict())))
    return {
        name: f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    }


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat


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


def best_top1(workdir: Path) -> float:
    """The validation top-1, in percent, of the model in `WORKDIR/best`; -1: there is none."""
    if not (workdir / "best" / "model.json").exists():
        return -1.0
    return load_card(workdir / "best")["provenance"]["top1"]


def find_steps(workdir: Path) -> list[int]:
    """The steps of a run's complete checkpoints."""
    folder = workdir / "checkpoints"
    return ocp.utils.checkpoint_steps(folder.resolve()) if folder.is_dir() else []


def newest_step(workdir: Path) -> int:
    """The newest complete checkpoint of a run.

    Raises:
        InputError: There is none.
    """
    if not (steps := find_steps(workdir)):
        raise InputError(
            f"{workdir} holds no checkpoint; name a --workdir that was trained in, "
            "or a model folder with --config.init_from"
        )
    return max(steps)


def load_params(folder: str | Path, abstract_params: Params) -> Params:
    """Reads a model folder's weights.

    Args:
        folder: The model folder.
        abstract_params: Shapes, dtypes and, if wanted, shardings that the weights must have.

    Raises:
        InputError: Weights are missing, left over, or of another shape; all are named.
    """
    path = (Path(folder) / "params").resolve()
    # Before TensorStore meets what is not there: a copy that was cut short is told by its sizes.
    expected, found = load_card(folder)["files"], _file_sizes(path)
    if wrong := [name for name, size in expected.items() if found.get(name) != size]:
        raise InputError(
            f"{path} is damaged: {len(wrong)} of {len(expected)} files are missing or of another "
            f"size ({wrong[0]}); copy or export the model again"
        )
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
    card = load_card(folder)
    try:
        source = make_model_config(**card["config"])
    except (InputError, TypeError) as error:
        raise InputError(
            f"{Path(folder) / 'model.json'}: {error}; export the model again"
        ) from None
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


def _file_sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _shape(leaf) -> str:
    return "absent" if leaf is None else str(tuple(leaf.shape))


def load_model(folder: str | Path):
    """Loads a model folder.

    Args:
        folder: Written by training, by a converter or by `save_model`.

    Returns:
        The network, ready for evaluation: `model(video)` takes a normalised float clip
        `(b t h w c)` to logits `(b, num_classes)`.

    Raises:
        InputError: The folder is no model folder, or is damaged.
    """
    card = load_card(folder)
    graphdef, abstract_params = abstract_model(make_model_config(**card["config"]))
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


def make_card(model_config, *, preprocessing, labels, provenance: dict) -> dict:
    """The contents of a `model.json`."""
    return {
        "name": model_config.name,
        "config": dataclasses.asdict(model_config),
        "preprocessing": preprocessing,
        "labels": labels,
        "provenance": provenance,
    }


def fingerprint(params: Params) -> str:
    """SHA-256 over names, shapes and values of the weights, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(params):
        array = sharding.to_host(params[name])
        digest.update(f"{name}{array.shape}{array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()
