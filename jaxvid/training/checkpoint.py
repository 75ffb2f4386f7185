"""Training checkpoints: the training state, the data iterator and the open log window."""

import contextlib
import json
import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import jax
import orbax.checkpoint as ocp

from jaxvid import atomic, files
from jaxvid.atomic import write_file
from jaxvid.distributed import collectives, exits, process_group
from jaxvid.errors import InputError, one_line
from jaxvid.logs import log
from jaxvid.models import Params
from jaxvid.storage import model_card

_noting = threading.Lock()
RESTORE_SECONDS = 30.0  # how long a process that cannot restore waits for the others
# Outputs that a run only has once it has saved a checkpoint.
LATE_OUTPUTS = (
    *("best", "model", "eval.json", "eval_videos.csv", "eval.html", "comparison.json"),
    *("confusion.png", "checkpoints.json"),
)
OUTPUTS = (
    *("metrics.jsonl", "tensorboard", "curves.png", "profile", "skipped.jsonl"),
    *("config.json", "starts.jsonl", "training_videos.json.gz", *LATE_OUTPUTS),
)


class Resumable(Protocol):
    """What a checkpoint keeps as JSON beside the training state: a Grain iterator, for example."""

    def get_state(self) -> dict:
        """Return the current state."""

    def set_state(self, state: dict) -> None:
        """Continue from a state."""


class CheckpointManager(ocp.CheckpointManager):
    """Orbax's manager; it also writes the checksums of each checkpoint once it is complete.

    A save that fails in this process is published to the others at once: Orbax raises the error
    only after a barrier that the others never reach.
    """

    _noter: threading.Thread | None = None

    def _wait_for_checkpointers(self) -> None:  # private; as of orbax-checkpoint 0.12
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            process_group.publish(_not_written(self, error))
            raise

    def note_when_saved(self) -> None:
        """Write the checksums in the background, as the run may be killed before the next save.

        The thread is joined by `join_noter` and `close`. A daemon thread would go on while the
        interpreter shuts down, and start JAX's backends again after they were torn down.
        """
        self.join_noter()
        self._noter = threading.Thread(target=self._note, name="checksums")
        self._noter.start()

    def _note(self) -> None:
        with contextlib.suppress(Exception):  # raised again by the main thread's wait
            self.wait_until_finished()
            _note_files(Path(self.directory).parent)

    def join_noter(self) -> None:
        """Wait for the checksums of the last save."""
        if self._noter is not None:
            self._noter.join()
            self._noter = None

    def close(self) -> None:
        """Wait for the last save and its checksums, and stop all threads."""
        try:
            super().close()
        finally:
            self.join_noter()


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
            sum(files.file_sizes(workdir / name).values())
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


def make_manager(workdir: Path, *, keep: int) -> CheckpointManager:
    """Make the manager of `WORKDIR/checkpoints/STEP/`; saves run in the background.

    Args:
        workdir: The run's folder.
        keep: How many of the newest checkpoints stay.
    """
    return CheckpointManager(
        (workdir / "checkpoints").resolve(),
        options=ocp.CheckpointManagerOptions(max_to_keep=keep),
        item_names=("state", "data", "log"),
    )


def save_checkpoint(
    manager: CheckpointManager, state: dict, resumables: dict[str, Resumable]
) -> None:
    """Save under the state's step. Call it before the next batch is drawn.

    Args:
        manager: As `make_manager` gives it.
        state: The training state.
        resumables: `data`, the data iterator, and `log`, the open log window.

    Raises:
        InputError: This checkpoint, or the previous one, cannot be written.
    """
    items = {name: ocp.args.JsonSave(part.get_state()) for name, part in resumables.items()}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), **items)
    finish_saving(manager)
    with _told_if_not_written(manager):
        manager.save(int(state["step"]), args=args)
    if not jax.process_index():
        manager.note_when_saved()


def finish_saving(manager: CheckpointManager) -> None:
    """Wait for the last checkpoint and write the checksums of its files.

    Raises:
        InputError: It cannot be written.
    """
    with _told_if_not_written(manager):
        manager.wait_until_finished()
        manager.join_noter()
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


def _note_files(workdir: Path) -> None:
    """Keeps the checksums of all checkpoints' files in `WORKDIR/checkpoints.json`.

    What reads a checkpoint finds damage late, or not at all; these find it before.
    """
    with _noting:
        noted = _noted_files(workdir)
        steps = {str(step): workdir / "checkpoints" / str(step) for step in find_steps(workdir)}
        if steps.keys() != noted.keys():
            noted = {
                step: noted.get(step) or files.checksums(folder) for step, folder in steps.items()
            }
            write_file(workdir / "checkpoints.json", json.dumps(noted).encode())


def _noted_files(workdir: Path) -> dict[str, dict[str, int]]:
    try:
        return json.loads((workdir / "checkpoints.json").read_text())
    except (FileNotFoundError, ValueError):  # nothing is known then
        return {}


def restore_newest(
    workdir: Path, abstract_state: dict, resumables: dict[str, Resumable], *, keep: int
) -> tuple[CheckpointManager, dict | None]:
    """Restore the newest checkpoint that is complete.

    A damaged one is named in the log and moved to `WORKDIR/damaged`, never deleted.

    Args:
        workdir: The run's folder.
        abstract_state: Shapes, dtypes and shardings of the state.
        resumables: As for `save_checkpoint`; each is set to the state that was saved.
        keep: How many of the newest checkpoints stay, from now on.

    Returns:
        The manager; and the state, None where there is no checkpoint yet.

    Raises:
        InputError: There are checkpoints, and all are damaged; or the newest is whole and still
            cannot be restored.
    """
    damaged = []
    # Who deletes checkpoints/ starts from the beginning; an earlier start may have emptied it.
    emptied = (workdir / "checkpoints").is_dir() and not find_steps(workdir)
    moved_before = [*(workdir / "damaged").glob("*")] if emptied else []
    while True:
        manager, is_whole = make_manager(workdir, keep=keep), False
        step = manager.latest_step()
        seen = collectives.gather(step)
        if any(other != step for other in seen):
            manager.close()
            raise InputError(
                f"{workdir}: the processes find different newest checkpoints ({seen}); give all of "
                "them the same --workdir"
            )
        if step is None:
            break
        try:
            is_whole = _check_files_in_all(workdir, step)
            return manager, _restore_in_all(manager, step, abstract_state, resumables)
        except Exception as error:  # Orbax raises bare ones
            if not _may_be_damage(error):
                raise
            reason = one_line(error, 200)
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
    if damaged := damaged or moved_before:
        manager.close()
        raise InputError(
            f"{workdir}: every checkpoint is damaged ({', '.join(map(str, damaged))}); restore "
            "one, delete WORKDIR/damaged to train from the beginning, or choose another --workdir"
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
    found = files.checksums(workdir / "checkpoints" / str(step))
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
    found = collectives.gather([is_whole, reason])
    for _, reason in found:
        if reason is not None:
            raise ValueError(reason)
    return all(is_whole for is_whole, _ in found)


def _restore_in_all(manager, step: int, abstract_state: dict, resumables: dict) -> dict:
    """Restore a checkpoint in all processes, so that all continue from it or none does.

    Raises:
        ValueError: It cannot be restored in some process.
        InputError: It cannot be restored in this process alone.
    """
    state, failure = None, None
    try:
        state = _restore(manager, step, abstract_state, resumables)
    except Exception as error:  # Orbax raises bare ones
        if not _may_be_damage(error):
            raise
        failure = error
    reason = failure and one_line(failure.__cause__ or failure, 200)
    try:
        # Another process may wait for this one inside Orbax.
        reasons = collectives.gather(reason, RESTORE_SECONDS if reason else math.inf)
    except TimeoutError:
        raise InputError(
            f"{manager.directory}/{step}: cannot be restored in this process ({reason}), but in "
            "another; give all processes the same files"
        ) from None
    if reasons := [*filter(None, reasons)]:
        raise ValueError(reasons[0])
    return state


def _may_be_damage(error: Exception) -> bool:
    """Whether a damaged checkpoint may have caused an error, rather than memory or a process."""
    if isinstance(error, MemoryError | InputError | jax.errors.JaxRuntimeError):
        return False
    return jax.process_count() == 1 or not exits.is_of_runtime(error)


def _restore(manager, step: int, abstract_state: dict, resumables: dict[str, Resumable]) -> dict:
    folder = Path(manager.directory) / str(step)
    # Older checkpoints have no log window: theirs starts empty.
    names = [name for name in resumables if name != "log" or (folder / name).exists()]
    items = {name: ocp.args.JsonRestore() for name in names}
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), **items)
    restored = manager.restore(step, args=args)
    for name in names:
        resumables[name].set_state(restored[name])
    return restored.state


def starts_over(workdir: Path) -> bool:
    """Whether the checkpoints of an earlier run were deleted, but not its other outputs."""
    return not find_steps(workdir) and any((workdir / name).exists() for name in LATE_OUTPUTS)


def tidy_outputs(workdir: Path) -> None:
    """Remove what a killed run left half-written; move aside what does not belong to this run.

    If the checkpoints of an earlier run were deleted, its outputs are moved to `WORKDIR/previous`:
    the new run must not add to that run's metrics, nor its models compete with that run's best one.
    A run that was killed before its first checkpoint keeps its files, as it writes the same again.
    All processes call this.

    Args:
        workdir: The run's folder.

    Raises:
        InputError: The outputs cannot be moved.
    """
    collectives.barrier("outputs")  # others may still read weights from `best/`
    collectives.raise_on_all_processes(_tidy_outputs, workdir)


def _tidy_outputs(workdir: Path) -> None:
    if jax.process_index():
        return
    for name in ("best", "model"):
        atomic.recover(workdir / name, model_card.CARD_NAME)
    if not starts_over(workdir):
        return
    target = _free_path(workdir / "previous")
    try:
        target.mkdir()
        for name in OUTPUTS:  # the late ones last: a move that is interrupted is completed later
            if (workdir / name).exists():
                (workdir / name).rename(target / name)
    except OSError as error:
        raise InputError(
            f"{workdir}: the outputs of an earlier run cannot be moved to {target} "
            f"({error.strerror}); choose another --workdir"
        ) from None
    log.info("%s: no checkpoint; the outputs of the earlier run are now in %s", workdir, target)


def _free_path(path: Path) -> Path:
    """Return the path with as many `_again` appended as it takes for nothing to be there."""
    while path.exists():
        path = path.with_name(f"{path.name}_again")
    return path


def _move_aside(workdir: Path, step: int) -> Path:
    place = _free_path(workdir / "damaged" / f"{step}")
    collectives.barrier(f"damaged {step}")
    if not jax.process_index():
        place.parent.mkdir(exist_ok=True)
        (workdir / "checkpoints" / str(step)).rename(place)
    collectives.barrier(f"moved {step}")
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
