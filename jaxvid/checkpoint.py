"""Training checkpoints: the state and the data iterator of every so many steps."""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp

from jaxvid import folders, processes, sharding
from jaxvid.errors import InputError, one_line
from jaxvid.files import write_file
from jaxvid.metrics import log
from jaxvid.models import Params

_noting = threading.Lock()


def check_writable(workdir: Path, need_bytes: int) -> None:
    """Makes sure, before any work is done, that its results can be kept.

    Args:
        workdir: Folder to make and write to.
        need_bytes: What checkpoints and model folders will take, those of an earlier start
            included.

    Raises:
        InputError: The folder cannot be written or its disk has less room than that.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe{jax.process_index()}"
        probe.write_bytes(bytes(4096))
        probe.unlink()
        need_bytes -= sum(
            sum(folders.file_sizes(workdir / name).values())
            for name in ("checkpoints", "best", "model")
        )
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


class _Manager(ocp.CheckpointManager):
    """Orbax's manager; it tells the other processes at once that a save failed in this one.

    Orbax raises the error only after a barrier to which the others do not come. It overrides a
    private method of orbax-checkpoint 0.12.
    """

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            processes.publish(_not_written(self, error))
            raise


def make_manager(workdir: Path, *, keep: int) -> ocp.CheckpointManager:
    """The manager of `WORKDIR/checkpoints/STEP/`; saves run in the background.

    Args:
        workdir: The run's folder.
        keep: How many of the newest checkpoints stay.
    """
    return _Manager(
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
    position = ocp.args.JsonSave(data_iter.get_state())
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=position)
    finish_saving(manager)
    with _told_if_not_written(manager):
        manager.save(int(state["step"]), args=args)
    if not jax.process_index():
        threading.Thread(target=_note_when_saved, args=(manager,), daemon=True).start()


def finish_saving(manager: ocp.CheckpointManager) -> None:
    """Waits for the last checkpoint, and notes what its files hold.

    Raises:
        InputError: It cannot be written.
    """
    with _told_if_not_written(manager):
        manager.wait_until_finished()
        if not jax.process_index():
            _note_files(Path(manager.directory).parent)


@contextlib.contextmanager
def _told_if_not_written(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_written(manager, error) from None


def _not_written(manager: ocp.CheckpointManager, error: Exception) -> Exception:
    """Return the InputError for a save that failed; the runtime's own errors stay as they are."""
    if isinstance(error, jax.errors.JaxRuntimeError | InputError):
        return error
    steps = ", ".join(map(str, find_steps(Path(manager.directory).parent))) or "none"
    refusal = InputError(
        f"a checkpoint cannot be written to {manager.directory} ({one_line(error, 200)}); "
        f"whole ones there are of the steps: {steps}; make room, then the same command continues"
    )
    refusal.__context__ = error
    return refusal


def _note_when_saved(manager: ocp.CheckpointManager) -> None:
    """Notes a checkpoint's files as soon as it is whole: the run may be killed before the next."""
    with contextlib.suppress(Exception):  # what went wrong is told when the save is waited for
        while manager.is_saving_in_progress():
            time.sleep(0.2)
        _note_files(Path(manager.directory).parent)


def _note_files(workdir: Path) -> None:
    """Keeps the checksums of all checkpoints' files in `WORKDIR/checkpoints.json`.

    What reads a checkpoint finds damage late, or not at all; these find it before.
    """
    with _noting:
        noted = _noted_files(workdir)
        steps = {str(step): workdir / "checkpoints" / str(step) for step in find_steps(workdir)}
        if steps.keys() != noted.keys():
            noted = {
                step: noted.get(step) or folders.checksums(folder) for step, folder in steps.items()
            }
            write_file(workdir / "checkpoints.json", json.dumps(noted).encode())


def _noted_files(workdir: Path) -> dict[str, dict[str, int]]:
    try:
        return json.loads((workdir / "checkpoints.json").read_text())
    except (FileNotFoundError, ValueError):  # nothing is known then
        return {}


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
        InputError: There are checkpoints, and all are damaged; or the newest is whole and still
            cannot be restored.
    """
    damaged = []
    while True:
        manager, is_whole = make_manager(workdir, keep=keep), False
        step = manager.latest_step()
        if step is None:
            break
        try:
            is_whole = _check_files_in_all(workdir, step)
            return manager, _restore(manager, step, abstract_state, data_iter)
        except (jax.errors.JaxRuntimeError, MemoryError, processes.PeerError):
            raise  # not the checkpoint's fault
        except Exception as error:  # Orbax raises bare ones
            cause = error.__cause__ or error
            reason = one_line(cause, 200)
        manager.close()
        if is_whole:
            raise InputError(
                f"{workdir}: the checkpoint of step {step} is whole, but cannot be restored "
                f"({reason}); continue it with the versions in starts.jsonl, or begin in "
                "another --workdir"
            )
        damaged.append(_move_aside(workdir, step))
        log.warning(
            "the checkpoint of step %d is damaged (%s); it was moved to %s, and the one before it "
            "is used",
            *(step, reason, damaged[-1]),
        )
    if damaged:
        manager.close()
        raise InputError(
            f"{workdir}: every checkpoint is damaged ({', '.join(map(str, damaged))}); restore "
            "one, or choose another --workdir"
        )
    return manager, None


def _check_files(workdir: Path, step: int) -> bool:
    """Whether a checkpoint's files are known to be as they were written; False: nothing is noted.

    Raises:
        ValueError: Some are not.
    """
    expected = _noted_files(workdir).get(str(step))
    if expected is None:  # the run was killed before it could note them
        return False
    found = folders.checksums(workdir / "checkpoints" / str(step))
    if wrong := [name for name, checksum in expected.items() if found.get(name) != checksum]:
        raise ValueError(
            f"{len(wrong)} of {len(expected)} files are missing or changed: {wrong[0]}"
        )
    return True


def _check_files_in_all(workdir: Path, step: int) -> bool:
    """Check a checkpoint's files in all processes, so that all restore it or none does.

    Returns:
        Whether all processes know its files to be as they were written.

    Raises:
        ValueError: In some process, they are not.
    """
    is_whole, reason = False, None
    try:
        is_whole = _check_files(workdir, step)
    except (ValueError, OSError) as error:
        reason = one_line(error, 200)
    found = sharding.gather([is_whole, reason])
    for _, reason in found:
        if reason is not None:
            raise ValueError(reason)
    return all(is_whole for is_whole, _ in found)


def _restore(manager, step: int, abstract_state: dict, data_iter) -> dict:
    args = ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
    )
    restored = manager.restore(step, args=args)
    data_iter.set_state(restored.data)
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

    Raises:
        InputError: The checkpoint is damaged.
    """
    try:
        _check_files(workdir, step)
    except ValueError as error:
        raise InputError(
            f"{workdir}: the checkpoint of step {step} is damaged ({error}); train on, which goes "
            f"back to the one before it, or evaluate --config.init_from={workdir / 'best'}"
        ) from None
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


def find_steps(workdir: Path) -> list[int]:
    """The steps of a run's complete checkpoints, in order."""
    folder = workdir / "checkpoints"
    return sorted(ocp.utils.checkpoint_steps(folder.resolve())) if folder.is_dir() else []


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
