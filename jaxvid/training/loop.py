"""The training loop: when it saves, evaluates and stops, and what one step does."""

import dataclasses
import enum
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from jaxvid.data.pipeline import describe_decoding, split_batch
from jaxvid.distributed import collectives, sharding
from jaxvid.errors import InputError
from jaxvid.logs import log
from jaxvid.training import checkpoint
from jaxvid.training.metric_flusher import MetricFlusher
from jaxvid.training.metric_window import NonFiniteLossError, window_steps
from jaxvid.training.metric_writer import MetricWriter
from jaxvid.training.profiler import ProfilerTrace
from jaxvid.training.signals import StopSignals
from jaxvid.training.validation import Validation
from jaxvid.training.watchdog import Watchdog

# Number of newest steps that Python does not wait for. The device already has the batches of these
# steps when it finishes the step before them.
STEPS_AHEAD = 2
TrainStep = Callable[[dict, dict[str, jax.Array]], tuple[dict, dict[str, jax.Array]]]


class StopReason(enum.Enum):
    """Why the training loop returned."""

    FINISHED = enum.auto()  # all steps are done and evaluated
    STOP_STEP = enum.auto()  # the caller's `stop_step` was reached
    SIGNAL = enum.auto()  # SIGINT or SIGTERM was received


class BatchIterator(Protocol):
    """An endless iterator over training batches, as returned by `pipeline.make_train_iter`."""

    def __next__(self) -> dict[str, Any]:
        """Return the next batch."""

    def get_state(self) -> dict:
        """Return the position in the stream of batches, for a checkpoint."""

    def set_state(self, state: dict) -> None:
        """Continue from a saved position."""

    def close(self) -> None:
        """Stop the threads and processes that load videos."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Milestones:
    """Training steps at which the loop evaluates, saves, logs and stops.

    Attributes:
        total: Steps of the whole run.
        evaluate: Steps between two evaluations.
        checkpoint: Steps between two checkpoints.
        log: Steps per row of `metrics.jsonl`.
        stop: Save and return at this step; None: train to the end.
        steps_per_epoch: Steps per epoch; may be fractional.
    """

    total: int
    evaluate: int
    checkpoint: int
    log: int
    stop: int | None
    steps_per_epoch: float


def make_milestones(
    steps_per_epoch: float,
    *,
    num_epochs: float,
    eval_epochs: float,
    checkpoint_epochs: float,
    log_steps: int,
    stop_step: int | None,
) -> Milestones:
    """Make the milestones of a run; convert epochs to steps."""
    total, evaluate, save = (
        max(1, round(epochs * steps_per_epoch))
        for epochs in (num_epochs, eval_epochs, checkpoint_epochs)
    )
    return Milestones(
        total=total,
        evaluate=evaluate,
        checkpoint=save,
        log=window_steps(log_steps, total),
        stop=stop_step,
        steps_per_epoch=steps_per_epoch,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """The objects that the training loop uses.

    Attributes:
        workdir: The run's folder.
        milestones: Steps at which the loop evaluates, saves, logs and stops.
        batches: The training batches of this process.
        train_step: The jitted training step; it donates the state.
        mesh: The device mesh, over which batches are sharded.
        manager: Saves checkpoints.
        resumables: Parts of a checkpoint apart from the state: data iterator and log window.
        metrics: Reads and writes the metrics of the steps.
        validation: Evaluates the weights.
        writer: Writes the first clips to TensorBoard.
        signals: Receives SIGINT and SIGTERM.
        stalls: Logs stages that block.
        trace: The profiler's trace.
        began: `time.monotonic` at the start of `train`, in seconds.
    """

    workdir: Path
    milestones: Milestones
    batches: BatchIterator
    train_step: TrainStep
    mesh: Mesh
    manager: checkpoint.CheckpointManager
    resumables: dict[str, checkpoint.Resumable]
    metrics: MetricFlusher
    validation: Validation
    writer: MetricWriter
    signals: StopSignals
    stalls: Watchdog
    trace: ProfilerTrace
    began: float


def run_loop(loop: Loop, state: dict) -> tuple[dict, StopReason]:
    """Train until all steps are done, `stop_step` is reached or a signal is received.

    Args:
        loop: The objects that the loop uses.
        state: The initial or restored training state; it is donated.

    Returns:
        The training state, which has been saved; and why the loop ended.

    Raises:
        InputError: The loss is not finite, too many videos cannot be decoded, an output cannot be
            written, or another run has taken over the workdir.
        SystemExit: A signal was received during an evaluation; the state was saved before the
            evaluation.
    """
    try:
        state, reason = _train(loop, state)
        checkpoint.finish_saving(loop.manager)
    except SystemExit:  # the save before the evaluation may still be running, and may fail
        if jax.process_count() == 1:
            checkpoint.finish_saving(loop.manager)
        raise
    except NonFiniteLossError as error:
        raise _describe_non_finite(loop, error) from None
    return state, reason


def _train(loop: Loop, state: dict) -> tuple[dict, StopReason]:
    milestones, metrics, validation = loop.milestones, loop.metrics, loop.validation
    start = saved = step = int(state["step"])
    while True:
        at_end = step == milestones.total
        evaluates = at_end or (
            step % milestones.evaluate == 0 and step not in (0, validation.evaluated)
        )
        saves = evaluates or step == milestones.stop or step % milestones.checkpoint == 0
        signalled = loop.signals.stops_alone
        if saves or signalled or metrics.window.stop:
            metrics.read()
        # Except during an evaluation, this alone decides whether a signal stops the run. Several
        # processes learn of the signal from the metrics, so that all stop at the same step.
        stopped = signalled or metrics.window.stop
        if (saves or stopped) and step != saved:
            # The iterator is saved with the state, before the next batch is drawn, so that a
            # resumed run draws the same batch.
            with loop.stalls.stage("the checkpoint"):
                checkpoint.save_checkpoint(loop.manager, state, loop.resumables)
            saved = step
        if evaluates and not stopped:
            validation.run(state, step)
        if stopped:
            return state, StopReason.SIGNAL
        if at_end:
            return state, StopReason.FINISHED
        if step == milestones.stop:
            return state, StopReason.STOP_STEP
        loop.manager.check_lock()
        state = _do_step(loop, state, step, is_first=step == start)
        step += 1
        if step % milestones.log == 0 or step == milestones.total:
            metrics.read()
            metrics.write_row(step)


def _do_step(loop: Loop, state: dict, step: int, *, is_first: bool) -> dict:
    """Draw a batch and update the state on it; return the new state.

    Args:
        loop: The objects that the loop uses.
        state: The training state, which is donated.
        step: The state's step.
        is_first: Whether this is the first step since the program started.
    """
    loop.trace.before(step)
    with loop.stalls.stage("input", describe_decoding):
        batch, ids, errors = split_batch(next(loop.batches))
    if is_first:
        loop.writer.write_clips(step, batch["video"][:4])
    state, metrics = loop.train_step(state, sharding.to_global_arrays(batch, loop.mesh))
    stop = collectives.any_process(loop.signals.received is not None, loop.mesh)
    step += 1
    loop.metrics.add(step, {**metrics, "stop": stop}, ids, errors)
    with loop.stalls.stage("the device"):
        loop.metrics.window.read(STEPS_AHEAD)
    if is_first:
        jax.block_until_ready(state)
        log.info("the first step was done %.1f s after the start", time.monotonic() - loop.began)
    loop.trace.after(step, state)
    loop.metrics.advance()
    return state


def _describe_non_finite(loop: Loop, error: NonFiniteLossError) -> InputError:
    """Return the InputError for a loss that is not finite. All processes must call it."""
    ids = sum(collectives.gather(error.ids), [])
    videos = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    newest = loop.manager.latest_step()
    return InputError(
        f"the loss or its gradient is not finite at step {error.step} (learning rate "
        f"{loop.metrics.learning_rate(error.step):.3g}; videos {videos}); the newest checkpoint "
        f"is {'none' if newest is None else f'of step {newest}'}; start in another "
        "--workdir with a lower optimizer.learning_rate"
        + (f" and --config.init_from={loop.workdir / 'best'}" if loop.validation.best >= 0 else "")
    )
