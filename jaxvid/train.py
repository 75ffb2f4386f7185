"""The training program: set up, restore, train, write the outputs."""

import contextlib
import dataclasses
import functools
import signal
import time
from collections.abc import Callable
from pathlib import Path

import optax
from jax.sharding import Mesh

from jaxvid import logs, progress
from jaxvid.data.pipeline import make_train_iter, stored_id
from jaxvid.data.sources import VideoDataset, open_dataset
from jaxvid.distributed import collectives, setup, sharding
from jaxvid.errors import with_addresses
from jaxvid.evaluation.loop import evaluate_params, make_eval_step
from jaxvid.evaluation.outputs import save_report
from jaxvid.evaluation.summary import make_report, summary
from jaxvid.experiment import (
    Config,
    Experiment,
    check_batch_sizes,
    choose_model_dtype,
    choose_schedule,
    resolve,
)
from jaxvid.logs import log
from jaxvid.storage import model_card, model_folder, workdir_lock
from jaxvid.training import (
    checkpoint,
    losses,
    metric_window,
    metric_writer,
    optim,
    outputs,
    profiler,
    run_config,
    run_metadata,
    skipped_videos,
    steps,
    training_videos,
    watchdog,
)
from jaxvid.training.distillation import load_teacher
from jaxvid.training.initial_state import make_initial_state
from jaxvid.training.loop import (
    BatchIterator,
    Loop,
    Milestones,
    StopReason,
    make_milestones,
    run_loop,
)
from jaxvid.training.metric_flusher import MetricFlusher
from jaxvid.training.signals import StopSignals
from jaxvid.training.step_program import StepProgram, make_step_program
from jaxvid.training.validation import Validation


@workdir_lock.exclusive
def train(
    config: Config,
    workdir: str | Path,
    *,
    stop_step: int | None = None,
    profile_steps: tuple[int, int] | None = None,
    make_batches: Callable[..., BatchIterator] = make_train_iter,
) -> dict | None:
    """Train a model or resume its training, and evaluate it.

    Args:
        config: A locked config.
        workdir: The run's folder. Training resumes from the newest checkpoint that it contains. The
            result is bit-identical to that of an uninterrupted run.
        stop_step: Save and return at this step; the next call resumes.
        profile_steps: `(start, stop)`: the steps to trace in `WORKDIR/profile`, without `stop`.
            Steps that an earlier start of the run has done are left out.
        make_batches: Like `pipeline.make_train_iter`; benchmarks pass their own function.

    Returns:
        The contents of `eval.json`; None if the run stopped at `stop_step` before its end.

    Raises:
        InputError: The config, the data or the workdir is unusable; another run uses the workdir;
            or the loss is not finite.
        SystemExit: SIGINT or SIGTERM was received, by this or another process of the run, and the
            state was saved. The code is 128 + the signal's number, or 143 in a process that did not
            receive the signal itself. Once the final evaluation is done, the run finishes instead.
    """
    began, workdir = time.monotonic(), Path(workdir)
    run = _set_up(resolve(config, workdir), workdir, stop_step, make_batches)
    with contextlib.ExitStack() as handlers:
        with contextlib.ExitStack() as resources, checkpoint.failures_published():
            state, manager, window, trace = _restore(run, profile_steps, resources)
            loop = _make_loop(run, state, manager, window, trace, began, resources)
            handlers.enter_context(loop.signals)
            state, reason = run_loop(loop, state)
        if reason is not StopReason.FINISHED:
            message = "stopped and saved at step %d; run the same command to resume"
            log.info(message, int(state["step"]))
        if reason is StopReason.SIGNAL:
            raise SystemExit(128 + (loop.signals.received or signal.SIGTERM))
        if reason is StopReason.STOP_STEP:
            return None
        # From now on a signal does not stop the run: only outputs remain to be written.
        loop.signals.finish_run()
        return _write_outputs(run, loop, state)


# ------------------------------------------------------------------ set up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The config and the data of a run, and the objects that are made from them.

    Attributes:
        experiment: The resolved config.
        workdir: The run's folder.
        mesh: The device mesh.
        program: The training step and the shapes of its state.
        data: Training and validation videos.
        lost: Ids of training videos that the first start used and that are missing now.
        batches: The training batches of this process.
        milestones: Steps at which the loop evaluates, saves, logs and stops.
        schedule: Function from the step to the learning rate.
    """

    experiment: Experiment
    workdir: Path
    mesh: Mesh
    program: StepProgram
    data: VideoDataset
    lost: tuple[str, ...]
    batches: BatchIterator
    milestones: Milestones
    schedule: optax.Schedule


def _set_up(
    experiment: Experiment,
    workdir: Path,
    stop_step: int | None,
    make_batches: Callable[..., BatchIterator],
) -> Run:
    """Open the data and make everything that does not depend on checkpoints."""
    setup.prepare_compilation(workdir, deterministic=experiment.deterministic)
    experiment, dtype_notes = choose_model_dtype(experiment)
    mesh = sharding.make_mesh(experiment.mesh)
    check_batch_sizes(experiment, mesh)
    run_config.check_same_run(experiment.fields, workdir)

    data = collectives.raise_on_all_processes(
        open_dataset, experiment.dataset, experiment.model.num_classes, ("train", "val")
    )
    data = collectives.raise_on_all_processes(training_videos.check_overlap, workdir, data)
    data, lost = collectives.raise_on_all_processes(training_videos.align, workdir, data)
    order = experiment.order.for_videos(data.records["train"])
    num_clips = order.epoch_clips(len(data.records["train"]))
    experiment, notes = choose_schedule(experiment, mesh, num_clips)
    notes = dtype_notes + notes
    index, count = sharding.batch_shard(mesh, experiment.batch_size)
    batches = make_batches(
        data.records["train"],
        spec=experiment.train_clips,
        batch_size=experiment.batch_size // count,
        order=order,
        shard=(index, count),
        **dataclasses.asdict(experiment.loader),
    )
    milestones = make_milestones(
        num_clips / experiment.batch_size,
        num_epochs=experiment.num_epochs,
        eval_epochs=experiment.protocol.every_epochs,
        checkpoint_epochs=experiment.checkpoints.every_epochs,
        log_steps=experiment.log_steps,
        stop_step=stop_step,
    )
    schedule = optim.make_schedule(
        experiment.optimizer,
        batch_size=experiment.batch_size,
        total_steps=milestones.total,
        steps_per_epoch=milestones.steps_per_epoch,
    )
    weights = experiment.loss.weights(data.records["train"], experiment.model.num_classes)
    program = make_step_program(
        experiment.model,
        experiment.optimizer,
        dataclasses.replace(experiment.recipe, class_weights=weights),
        schedule=schedule,
        mesh=mesh,
        batch_size=experiment.batch_size,
        teacher=load_teacher(experiment.distill, experiment.model, data.labels, mesh),
    )
    notes += order.describe(data.labels, num_clips=num_clips, batch_size=experiment.batch_size)
    notes += losses.describe_weights(weights, data.labels)
    notes += experiment.train_clips.describe_mirroring(data.labels)
    return Run(
        experiment=experiment,
        workdir=workdir,
        mesh=mesh,
        program=program,
        data=dataclasses.replace(data, notes=(*data.notes, *notes)),
        lost=lost,
        batches=batches,
        milestones=milestones,
        schedule=schedule,
    )


# ------------------------------------------------------------------ restore


def _restore(
    run: Run, profile_steps: tuple[int, int] | None, resources: contextlib.ExitStack
) -> tuple[dict, checkpoint.CheckpointManager, metric_window.MetricWindow, profiler.ProfilerTrace]:
    """Restore the newest checkpoint, or make a fresh state, and record the start of the run.

    Args:
        run: The run.
        profile_steps: As in `train`.
        resources: Exit stack that will close the checkpoint manager, the iterator and the trace.

    Returns:
        The training state, the checkpoint manager, the open log window and the trace.
    """
    workdir, keep = run.workdir, run.experiment.checkpoints.keep
    abstract_state = run.program.abstract_state
    collectives.raise_on_all_processes(
        functools.partial(outputs.check_room, keep=keep), workdir, abstract_state
    )
    logs.setup_logging(workdir)
    window = metric_window.MetricWindow()
    resumables = {"data": run.batches, "log": window}
    manager, state = checkpoint.restore_newest(workdir, abstract_state, resumables, keep=keep)
    resources.callback(manager.close_quietly)
    resources.callback(run.batches.close)
    notes = []
    if state is None:
        state, notes = make_initial_state(
            run.program,
            run.experiment.model,
            seed=run.experiment.recipe.seed,
            init_from=run.experiment.init_from,
            labels=run.data.labels,
        )
    step, total = int(state["step"]), run.milestones.total
    trace = profiler.ProfilerTrace(profile_steps, workdir / "profile", start=step, total=total)
    resources.callback(trace.close)

    outputs.tidy_outputs(workdir)
    left_out = {"missing or broken": len(run.data.left_out), "no longer listed": len(run.lost)}
    metadata = run_metadata.describe_run(run.mesh, run.data.records, left_out)
    run_metadata.record_start(workdir, metadata)
    collectives.raise_on_all_processes(training_videos.save, workdir, run.data)
    run_config.save_config(run.experiment.fields, workdir)
    run_metadata.log_network(
        run.experiment.model.name, abstract_state["params"], run.data.records, run.mesh
    )
    rate = optim.describe_rate(run.experiment.optimizer, run.experiment.batch_size)
    for line in (*run.data.notes, *notes, rate):
        log.info("%s", line)
    if step == total:
        log.info("all %d steps are done already; evaluating again", step)
    else:
        log.info("step %d of %d%s", step, total, ", continued" if step else "")
    return state, manager, window, trace


# ------------------------------------------------------------------ loop


def _make_loop(
    run: Run,
    state: dict,
    manager: checkpoint.CheckpointManager,
    window: metric_window.MetricWindow,
    trace: profiler.ProfilerTrace,
    began: float,
    resources: contextlib.ExitStack,
) -> Loop:
    """Make the loop's objects; `resources` closes the writer, the progress bar and the watchdog."""
    experiment, workdir, step = run.experiment, run.workdir, int(state["step"])
    writer = metric_writer.MetricWriter(workdir, step)
    resources.callback(writer.close)
    skipped = skipped_videos.SkippedVideos(
        workdir,
        num_videos=len(run.data.records["train"]),
        max_share=1.0 if experiment.dataset.skip_broken else experiment.max_failed_share,
        lost=[*map(stored_id, run.lost)],
    )
    bar = logs.RunProgress(
        run.milestones.total * experiment.batch_size,
        done=step * experiment.batch_size,
        unit="clip",
        title="training",
    )
    resources.callback(bar.close)
    stalls, stop_signals = watchdog.Watchdog(experiment.stall_seconds), StopSignals()
    resources.callback(stalls.close)
    return Loop(
        workdir=workdir,
        milestones=run.milestones,
        batches=run.batches,
        train_step=progress.announce_compilation(
            run.program.train_step, "the training step", log.info
        ),
        mesh=run.mesh,
        manager=manager,
        resumables={"data": run.batches, "log": window},
        metrics=MetricFlusher(
            window=window,
            batch_size=experiment.batch_size,
            total_steps=run.milestones.total,
            schedule=run.schedule,
            writer=writer,
            skipped=skipped,
            progress=bar,
            stalls=stalls,
        ),
        validation=_make_validation(run, manager, writer, stop_signals, stalls),
        writer=writer,
        signals=stop_signals,
        stalls=stalls,
        trace=trace,
        began=began,
    )


def _make_validation(
    run: Run,
    manager: checkpoint.CheckpointManager,
    writer: metric_writer.MetricWriter,
    stop_signals: StopSignals,
    stalls: watchdog.Watchdog,
) -> Validation:
    """Make the evaluation during training. All processes must call it."""
    experiment, data = run.experiment, run.data
    eval_step = make_eval_step(experiment.model, experiment.protocol, run.mesh)
    metric = "mAP" if experiment.loss.multi_label else "top1"
    # All processes use the values that process 0 reads: others may still see older files.
    best, evaluated = collectives.gather(
        [model_card.best_score(run.workdir, metric), metric_writer.last_evaluation(run.workdir)]
    )[0]
    return Validation(
        workdir=run.workdir,
        labels=data.labels,
        metric=metric,
        evaluate=functools.partial(
            evaluate_params,
            records=data.records["val"],
            protocol=experiment.protocol,
            eval_step=stop_signals.checked(eval_step),
            loader=experiment.loader,
            mesh=run.mesh,
        ),
        make_report=functools.partial(
            make_report, protocol=experiment.protocol, data=experiment.dataset.location
        ),
        describe=summary,
        make_card=functools.partial(
            model_card.make_card,
            experiment.model,
            preprocessing=experiment.preprocessing.to_json(),
            labels=data.labels,
            activation=experiment.loss.name,
        ),
        manager=manager,
        writer=writer,
        signals=stop_signals,
        stalls=stalls,
        best=best,
        evaluated=evaluated,
    )


# ------------------------------------------------------------------ outputs


def _write_outputs(run: Run, loop: Loop, state: dict) -> dict:
    """Write the final model and the report of its evaluation; return the report."""
    if message := loop.metrics.skipped.summary():
        log.info("%s", message)
    folder, validation = run.workdir / "model", loop.validation
    report, results = validation.report, validation.results
    report["checkpoint"] = with_addresses(f"{run.workdir}/checkpoints/{run.milestones.total}")
    report["weights_sha256"] = model_folder.fingerprint(steps.eval_params(state))
    validation.save_model(folder, state)
    save_report(run.workdir, report, results, run.data.labels, run.data.records["val"])
    log.info(
        "%s. The report is %s, the model is in %s.\n%s",
        summary(report),
        run.workdir / "eval.html",
        folder,
        outputs.describe_use(folder, generated=run.experiment.dataset.source == "motion"),
    )
    return report
