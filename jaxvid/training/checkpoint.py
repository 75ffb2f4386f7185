"""Training checkpoints: the training state, the data iterator and the open log window."""

import contextlib
import dataclasses
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import jax
import orbax.checkpoint as ocp

from jaxvid.config import CHOSEN
from jaxvid.distributed import collectives, exits, process_group
from jaxvid.errors import InputError, one_line
from jaxvid.logs import log
from jaxvid.models import Params
from jaxvid.remote_lock import LostLockError
from jaxvid.storage import older_shapes
from jaxvid.training.checkpoint_files import (
    check_files,
    check_files_on_all_processes,
    find_steps,
    move_aside,
    upload,
    write_checksums,
)

RESTORE_SECONDS = 30.0  # time that a process that cannot restore waits for the others


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """When checkpoints are saved, and how many are kept.

    Attributes:
        every_epochs: Epochs between two checkpoints; `CHOSEN`: not known yet.
        keep: Number of newest checkpoints to keep.

    Raises:
        InputError: A field has an impossible value.
    """

    every_epochs: float
    keep: int

    def __post_init__(self):
        for name in ("keep", "every_epochs"):
            value = getattr(self, name)
            if value <= 0 and (name, value) != ("every_epochs", CHOSEN):
                raise InputError(f"checkpoint_{name}={value}: must be above 0")


class Resumable(Protocol):
    """A part of a checkpoint that is stored as JSON, for example a Grain iterator."""

    def get_state(self) -> dict:
        """Return the current state."""

    def set_state(self, state: dict) -> None:
        """Continue from a saved state."""


class CheckpointManager(ocp.CheckpointManager):
    """Orbax's checkpoint manager, which also writes checksums of each complete checkpoint.

    If a save fails in this process, the error is published to the other processes at once. Orbax
    raises it only after a barrier that the other processes never reach.
    """

    _checksum_thread: threading.Thread | None = None
    _lost_lock: LostLockError | None = None

    def _wait_for_checkpointers(self) -> None:  # overrides a private method of orbax 0.12
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            process_group.publish(_not_written(self, error))
            raise

    def write_checksums_in_background(self) -> None:
        """Start a thread that waits for the save and writes the checksums of its files.

        If the checksums were written only at the next save, a run that is killed before that save
        would leave a checkpoint without checksums.

        `join_checksum_thread` and `close` join the thread. It is not a daemon thread, because such
        a thread would keep running while the interpreter shuts down, and could start JAX's backends
        again after their teardown.
        """
        self.join_checksum_thread()
        self._checksum_thread = threading.Thread(target=self._write_checksums)
        self._checksum_thread.start()

    def _write_checksums(self) -> None:
        with contextlib.suppress(Exception):  # raised again by the main thread's wait
            self.wait_until_finished()
            write_checksums(Path(self.directory).parent)
            try:
                upload(Path(self.directory).parent)
            except LostLockError as error:
                self._lost_lock = error

    def check_lock(self) -> None:
        """End the run if another run had taken over its workdir when a checkpoint was uploaded.

        Raises:
            LostLockError: Another run has.
        """
        if self._lost_lock is not None:
            raise self._lost_lock

    def join_checksum_thread(self) -> None:
        """Wait until the checksums of the last save are written."""
        if self._checksum_thread is not None:
            self._checksum_thread.join()
            self._checksum_thread = None

    def close(self) -> None:
        """Wait for the last save and its checksums, and stop all threads."""
        try:
            super().close()
        finally:
            self.join_checksum_thread()

    def close_quietly(self) -> None:
        """Close the manager and ignore exceptions, so that the one that ends the run propagates."""
        with contextlib.suppress(Exception):
            self.close()


@contextlib.contextmanager
def failures_published() -> Iterator[None]:
    """Publish an exception to the other processes before a manager's close waits for them."""
    try:
        yield
    except BaseException as error:
        process_group.publish(error)
        raise


def make_manager(workdir: Path, *, keep: int) -> CheckpointManager:
    """Make the manager of `WORKDIR/checkpoints/STEP/`; saves run in the background.

    Args:
        workdir: The run's folder.
        keep: Number of newest checkpoints to keep.
    """
    return CheckpointManager(
        (workdir / "checkpoints").resolve(),
        options=ocp.CheckpointManagerOptions(max_to_keep=keep),
    )


def save_checkpoint(
    manager: CheckpointManager, state: dict, resumables: dict[str, Resumable]
) -> None:
    """Save a checkpoint of the state's step. Call it before the next batch is drawn.

    Args:
        manager: Made by `make_manager`.
        state: The training state.
        resumables: The data iterator as `data`, and the open log window as `log`.

    Raises:
        InputError: This checkpoint, or the previous one, cannot be written.
    """
    items = {name: ocp.args.JsonSave(part.get_state()) for name, part in resumables.items()}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), **items)
    finish_saving(manager)
    with _errors_as_input_errors(manager):
        manager.save(int(state["step"]), args=args)
    if not jax.process_index():
        manager.write_checksums_in_background()


def finish_saving(manager: CheckpointManager) -> None:
    """Wait for the last checkpoint and write the checksums of its files.

    Raises:
        InputError: The checkpoint cannot be written, or another run has taken over the workdir.
    """
    with _errors_as_input_errors(manager):
        manager.wait_until_finished()
        manager.join_checksum_thread()
        manager.check_lock()
        if not jax.process_index():
            write_checksums(Path(manager.directory).parent)


@contextlib.contextmanager
def _errors_as_input_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_written(manager, error) from None


def _not_written(manager: ocp.CheckpointManager, error: Exception) -> Exception:
    """Return the InputError for a failed save; keep InputErrors and errors of JAX's runtime."""
    if isinstance(error, jax.errors.JaxRuntimeError | InputError):
        return error
    steps = ", ".join(map(str, find_steps(Path(manager.directory).parent))) or "none"
    refusal = InputError(
        f"a checkpoint cannot be written to {manager.directory} ({one_line(error)}); "
        f"steps of complete checkpoints: {steps}; free disk space, then run the same command to "
        "resume"
    )
    refusal.__context__ = error
    return refusal


def restore_newest(
    workdir: Path, abstract_state: dict, resumables: dict[str, Resumable], *, keep: int
) -> tuple[CheckpointManager, dict | None]:
    """Restore the newest intact checkpoint.

    Damaged checkpoints are named in the log and moved to `WORKDIR/damaged`, never deleted.

    Args:
        workdir: The run's folder.
        abstract_state: Shapes, dtypes and shardings of the state.
        resumables: As for `save_checkpoint`. Each is set to its saved state.
        keep: Number of newest checkpoints to keep from now on.

    Returns:
        The manager; and the state, or None if there is no checkpoint.

    Raises:
        InputError: All checkpoints are damaged; the newest one is intact, but cannot be restored;
            or the processes find different checkpoints.
    """
    damaged = []
    # If checkpoints/ was deleted, the run starts from the beginning. If it exists and is empty, an
    # earlier start may have moved its checkpoints to damaged/.
    emptied = (workdir / "checkpoints").is_dir() and not find_steps(workdir)
    moved_before = [*(workdir / "damaged").glob("*")] if emptied else []
    while True:
        manager = make_manager(workdir, keep=keep)
        is_intact = False
        step = manager.latest_step()
        newest_steps = collectives.gather(step)
        if any(newest != step for newest in newest_steps):
            manager.close()
            raise InputError(
                f"{workdir}: the step of the newest checkpoint differs between processes "
                f"({newest_steps}); give all processes the same --workdir"
            )
        if step is None:
            break
        try:
            is_intact = check_files_on_all_processes(workdir, step)
            state = _restore_on_all_processes(manager, step, abstract_state, resumables)
            return manager, state
        except Exception as error:  # Orbax raises plain Exceptions
            if not _may_be_damage(error):
                raise
            reason = one_line(error)
        manager.close()
        if is_intact:
            raise InputError(
                f"{workdir}: the checkpoint of step {step} is intact, but cannot be restored "
                f"({reason}); resume with the package versions in starts.jsonl, or choose "
                "another --workdir"
            )
        damaged.append(move_aside(workdir, step))
        log.warning(
            "the checkpoint of step %d is damaged (%s); it was moved to %s, and the previous "
            "checkpoint is used",
            step,
            reason,
            damaged[-1],
        )
    if damaged := damaged or moved_before:
        manager.close()
        raise InputError(
            f"{workdir}: every checkpoint is damaged ({', '.join(map(str, damaged))}); restore "
            "one, delete WORKDIR/damaged to train from the beginning, or choose another --workdir"
        )
    return manager, None


def _restore_on_all_processes(
    manager: CheckpointManager,
    step: int,
    abstract_state: dict,
    resumables: dict[str, Resumable],
) -> dict:
    """Restore a checkpoint on all processes, so that either all resume from it or none does.

    Raises:
        ValueError: A process cannot restore it.
        InputError: This process cannot restore it, but another process can.
    """
    state, failure = None, None
    try:
        state = _restore(manager, step, abstract_state, resumables)
    except Exception as error:  # Orbax raises plain Exceptions
        if not _may_be_damage(error):
            raise
        failure = error
    reason = failure and one_line(failure.__cause__ or failure)
    try:
        # Another process may wait for this one inside Orbax.
        reasons = collectives.gather(reason, RESTORE_SECONDS if reason else math.inf)
    except TimeoutError:
        raise InputError(
            f"{manager.directory}/{step}: this process cannot restore it ({reason}), but another "
            "process can; give all processes the same files"
        ) from None
    if reasons := [*filter(None, reasons)]:
        raise ValueError(reasons[0])
    return state


def _may_be_damage(error: Exception) -> bool:
    """Return whether a damaged checkpoint may be the cause of an error.

    Errors about memory, invalid input or the failure of another process have a different cause.
    """
    if isinstance(error, MemoryError | InputError | jax.errors.JaxRuntimeError):
        return False
    return jax.process_count() == 1 or not exits.is_of_runtime(error)


def _restore(
    manager: CheckpointManager,
    step: int,
    abstract_state: dict,
    resumables: dict[str, Resumable],
) -> dict:
    folder = Path(manager.directory) / str(step)
    # Older checkpoints have no log window. The window then starts empty.
    names = [name for name in resumables if name != "log" or (folder / name).exists()]
    items = {name: ocp.args.JsonRestore() for name in names}
    stored = _read_shapes(folder / "state")
    target = older_shapes.match_file(abstract_state, stored["params"])
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target), **items)
    restored = manager.restore(step, args=args)
    for name in names:
        resumables[name].set_state(restored[name])
    return older_shapes.to_current(restored.state, abstract_state)


def _read_shapes(path: Path) -> dict:
    """Return the tree of a saved state; its leaves have the shapes of the arrays."""
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        return handler.metadata(path).tree


def restore_params(workdir: Path, step: int, abstract_params: Params) -> Params:
    """Restore only the weights of a training checkpoint, for evaluation.

    Args:
        workdir: The run's folder.
        step: The step of the checkpoint.
        abstract_params: Shapes, dtypes and shardings of the weights.

    Returns:
        The moving average of the weights if the checkpoint has one, else the weights.

    Raises:
        InputError: The checkpoint is damaged.
    """
    try:
        check_files(workdir, step)
    except ValueError as error:
        raise InputError(
            f"{workdir}: the checkpoint of step {step} is damaged ({error}); resume the training, "
            "which goes back to the previous checkpoint, or evaluate "
            f"--config.init_from={workdir / 'best'}"
        ) from None
    path = (workdir / "checkpoints" / str(step) / "state").resolve()
    stored = _read_shapes(path)
    name = "ema" if "ema" in stored else "params"
    item = {name: older_shapes.match_file(abstract_params, stored[name])}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        restored = checkpointer.restore(
            path,
            args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True),
        )
    return older_shapes.to_current(restored[name], abstract_params)


def newest_step(workdir: Path) -> int:
    """Return the step of a run's newest complete checkpoint.

    Raises:
        InputError: There is no complete checkpoint.
    """
    if not (steps := find_steps(workdir)):
        raise InputError(
            f"{workdir} contains no checkpoint; choose the --workdir of a training run, "
            "or set --config.init_from to a model folder"
        )
    return max(steps)
