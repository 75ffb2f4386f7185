"""The training program: one function, in execution order."""

import contextlib
import functools
import math
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxvid import logs
from jaxvid.data.clips.clip import make_spec
from jaxvid.data.pipeline import describe_decoding, make_train_iter, split_batch, stored_id
from jaxvid.data.sources import open_dataset
from jaxvid.distributed import collectives, process_group, setup, sharding
from jaxvid.errors import InputError
from jaxvid.evaluation.loop import abstract_eval_model, evaluate_params, make_eval_step
from jaxvid.evaluation.metrics import Results
from jaxvid.evaluation.protocol import check_protocol
from jaxvid.evaluation.results import save_report
from jaxvid.evaluation.summary import make_report, summary
from jaxvid.logs import log
from jaxvid.models import abstract_model, make_model_config
from jaxvid.storage import model_card, model_folder, workdir_lock
from jaxvid.storage.preprocessing import make_preprocessing
from jaxvid.training import (
    checkpoint,
    metric_window,
    metric_writer,
    optim,
    plots,
    profiler,
    run_config,
    run_metadata,
    skipped_videos,
    steps,
    training_videos,
    watchdog,
)
from jaxvid.training.distillation import load_teacher
from jaxvid.training.signals import StopSignals

STEPS_AHEAD = 2  # how far Python runs ahead of the device


@workdir_lock.exclusive
def train(
    config,
    workdir: str | Path,
    *,
    stop_step: int | None = None,
    profile_steps: tuple[int, int] | None = None,
) -> dict | None:
    """Train or continue training, then evaluate.

    Args:
        config: A locked config.
        workdir: The run's folder. If it holds checkpoints of this config, the newest is continued.
            The result is bit-identical to that of an uninterrupted run.
        stop_step: Save and return at this step; the next call continues.
        profile_steps: First step of a trace in `WORKDIR/profile`, and the step before which it
            ends. Steps that an earlier start has done are left out.

    Returns:
        The contents of `eval.json`; None if the run stopped at `stop_step` before its end.

    Raises:
        InputError: The config, the data or the workdir is unusable; another run uses the workdir;
            or the loss is not finite.
        SystemExit: SIGINT or SIGTERM was received, here or by another process of the run, and the
            state was saved; the code is 128 + the signal's number. Once the final evaluation is
            done, the run finishes instead.
    """
    workdir, began = Path(workdir), time.monotonic()

    # ------------------------------------------------------------------ devices, folders
    setup.use_compilation_cache()
    mesh = sharding.make_mesh(config.mesh)
    run_config.check_config(config, mesh)
    check_protocol(config, mesh)
    run_config.check_same_run(config, workdir)
    model_config = make_model_config(**config.model)
    graphdef, abstract_params = abstract_model(model_config)
    weight_bytes = sum(math.prod(leaf.shape) * 4 for leaf in abstract_params.values())

    # ------------------------------------------------------------------ data
    data = collectives.raise_on_all_processes(
        open_dataset, config.data, config.model.num_classes, ("train", "val")
    )
    data, lost = collectives.raise_on_all_processes(training_videos.align, workdir, data)
    shard = sharding.batch_shard(mesh, config.batch_size)
    train_iter = make_train_iter(
        data.records["train"],
        spec=make_spec(config),
        batch_size=config.batch_size // shard[1],
        seed=config.seed,
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        shard=shard,
    )
    steps_per_epoch = len(data.records["train"]) / config.batch_size
    total_steps = max(1, round(config.num_epochs * steps_per_epoch))
    eval_steps = max(1, round(config.eval.every_epochs * steps_per_epoch))
    checkpoint_steps = max(1, round(config.checkpoint_every_epochs * steps_per_epoch))
    log_steps = metric_window.window_steps(config.log_steps, total_steps)

    # ------------------------------------------------------------------ state
    schedule = optim.make_schedule(
        config.optimizer,
        batch_size=config.batch_size,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
    )
    optimizer = optim.make_optimizer(config.optimizer, schedule)
    recipe = steps.Recipe(
        seed=config.seed,
        mean=config.data.mean,
        std=config.data.std,
        label_smoothing=config.label_smoothing,
        mixup_alpha=config.mixup_alpha,
        cutmix_alpha=config.cutmix_alpha,
        erase_prob=config.erase_prob,
        accumulate_steps=config.accumulate_steps,
        ema_decay=config.ema_decay,
        frozen=optim.frozen_names(config.optimizer, abstract_params),
    )
    teacher, teacher_params = load_teacher(config, data.labels, mesh)
    init = functools.partial(steps.init_state, model_config, optimizer, recipe, seed=config.seed)
    abstract_state = sharding.with_sharding(jax.eval_shape(init), mesh)
    state_sharding = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    state_bytes = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(abstract_state))
    # One more checkpoint while the oldest is still there, two model folders, one while it is saved.
    need_bytes = state_bytes * (config.checkpoint_keep + 1) + 3 * weight_bytes + 10**6
    collectives.raise_on_all_processes(checkpoint.check_writable, workdir, need_bytes)
    logs.setup_logging(workdir)
    late = metric_window.MetricWindow()
    resumables = {"data": train_iter, "log": late}
    manager, state = checkpoint.restore_newest(
        workdir, abstract_state, resumables, keep=config.checkpoint_keep
    )
    loaded = []
    if state is None:
        state = jax.jit(init, out_shardings=state_sharding)()
        if config.init_from:
            found = model_folder.load_init(config.init_from, model_config, state["params"])
            state["params"], loaded = found
            if config.ema_decay:
                state["ema"] = jax.tree.map(jnp.copy, state["params"])
    step = start_step = int(state["step"])
    trace = profiler.ProfilerTrace(
        profile_steps, workdir / "profile", start=step, total=total_steps
    )
    checkpoint.tidy_outputs(workdir)
    left_out = {"missing or broken": len(data.left_out), "no longer listed": len(lost)}
    run_metadata.record_start(workdir, run_metadata.describe_run(mesh, data.records, left_out))
    collectives.raise_on_all_processes(training_videos.save, workdir, data)
    run_config.save_config(config, workdir)

    # ------------------------------------------------------------------ compiled steps
    train_step = jax.jit(
        functools.partial(
            steps.train_step,
            graphdef=graphdef,
            optimizer=optimizer,
            recipe=recipe,
            teacher=teacher,
        ),
        donate_argnums=0,
        out_shardings=(state_sharding, sharding.replicated(mesh)),
    )
    eval_step = make_eval_step(config, abstract_eval_model(config)[0], mesh)

    log.info(
        "%s: %.2f M parameters, %d training and %d validation videos, mesh %s",
        model_config.name,
        weight_bytes / 4e6,
        len(data.records["train"]),
        len(data.records["val"]),
        ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
    )
    for line in (*data.notes, *loaded, optim.describe_rate(config.optimizer, config.batch_size)):
        log.info("%s", line)
    if step == total_steps:
        log.info("trained before, all %d steps; evaluating again", step)
    else:
        log.info("step %d of %d%s", step, total_steps, ", continued" if step else "")

    # ------------------------------------------------------------------ loop
    writer = metric_writer.MetricWriter(workdir, step)
    skipped = skipped_videos.SkippedVideos(
        workdir,
        num_videos=len(data.records["train"]),
        max_share=1.0 if config.data.skip_broken else config.data.max_failed_share,
        lost=[*map(stored_id, lost)],
    )
    progress = logs.RunProgress(
        total_steps * config.batch_size,
        done=step * config.batch_size,
        unit="clip",
        title="training",
    )
    failures: list[list[str]] = []  # ids and reasons of videos since the last `read_metrics`
    # As the first process reads them: another may see an older file.
    best, evaluated = collectives.gather(
        [model_card.best_top1(workdir), metric_writer.last_evaluation(workdir)]
    )[0]
    saved, results, result = step, None, None
    stalls, signals = watchdog.Watchdog(config.data.stall_seconds), StopSignals()

    def save_model(folder: Path, result: dict) -> None:
        card = model_card.make_card(
            model_config,
            preprocessing=make_preprocessing(config),
            labels=data.labels,
            provenance={"workdir": str(workdir), "step": step, "top1": result["top1"]},
        )
        model_folder.save_model_folder(folder, steps.eval_params(state), card)

    def read_metrics() -> None:
        """Read the metrics of all steps so far; all processes call it at the same steps."""
        skipped.note(sum(collectives.gather(failures), []))
        failures.clear()
        late.read()

    def write_row() -> None:
        """Write the log window to metrics.jsonl and begin the next one."""
        row = metric_window.training_row(*late.take()) | {
            "learning_rate": float(schedule(step - 1)),
            "clips_per_second": progress.rate(),
            "input_wait_share": stalls.share("input"),
        }
        writer.write(step, row)
        line = metric_window.describe_row(row)
        progress.advance(0, line)
        log.debug(
            "step %d/%d: %s, %.0f clips/s, %s left",
            *(step, total_steps, line, progress.rate(), progress.time_left()),
        )

    def evaluate() -> tuple[Results, dict]:
        """Evaluate the weights, write the row of this step and keep them if they are the best."""
        nonlocal best, evaluated
        with signals.end_at_once():
            results = evaluate_params(
                steps.eval_params(state),
                data.records["val"],
                config,
                eval_step=signals.checked(eval_step),
                mesh=mesh,
            )
        result = make_report(results, config, checkpoint=f"step {step}")
        if result["top1"] > best:
            best = result["top1"]
            with stalls.stage("the checkpoint"):  # without one, the model is an earlier run's
                checkpoint.finish_saving(manager)
            save_model(workdir / "best", result)
        if step != evaluated:  # an evaluation that is repeated has its row already
            evaluated = step
            writer.write(step, {f"val/{k}": result[k] for k in ("top1", "top5", "loss")})
            writer.write_classes(step, data.labels, results.per_class())
        if not jax.process_index():
            plots.draw_curves(workdir / "metrics.jsonl", workdir / "curves.png")
        log.info("step %d: validation %s", step, summary(result))
        stalls.share("input")  # the next share leaves out the time of the evaluation
        return results, result

    with signals:
        try:
            while True:
                at_end = step == total_steps
                evaluates = at_end or (step % eval_steps == 0 and step not in (0, evaluated))
                saves = evaluates or step == stop_step or step % checkpoint_steps == 0
                signalled = signals.stops_alone
                if saves or signalled or late.stop:
                    read_metrics()
                # The only place that decides whether a signal stops the run. Several processes
                # must stop at the same step: they learn of a signal from the metrics.
                stopped = signalled or late.stop
                if (saves or stopped) and step != saved:
                    # The iterator is saved with the state and only advanced afterwards: the next
                    # draw is then the one that a continued run makes too.
                    with stalls.stage("the checkpoint"):
                        checkpoint.save_checkpoint(manager, state, resumables)
                    saved = step
                if evaluates and not stopped:
                    results, result = evaluate()
                if stopped or at_end or step == stop_step:
                    break
                trace.before(step)
                with stalls.stage("input", describe_decoding):
                    batch, ids, errors = split_batch(next(train_iter))
                failures += [[id_, error] for id_, error in zip(ids, errors, strict=True) if error]
                if step == start_step:
                    writer.write_clips(step, batch["video"][:4])
                state, step_metrics = train_step(
                    state, sharding.to_global_arrays(batch, mesh), teacher_params
                )
                stop = collectives.any_process(signals.received is not None, mesh)
                step += 1
                late.add(step, {**step_metrics, "stop": stop}, ids)
                with stalls.stage("the device"):
                    late.read(STEPS_AHEAD)
                if step == start_step + 1:
                    jax.block_until_ready(state)
                    log.info("first step %.1f s after the start", time.monotonic() - began)
                trace.after(step, state)
                progress.advance(config.batch_size)
                if step % log_steps == 0 or step == total_steps:
                    read_metrics()
                    write_row()
            checkpoint.finish_saving(manager)
        except SystemExit:  # the save before an evaluation may still run, and fail
            if jax.process_count() == 1:
                checkpoint.finish_saving(manager)
            raise
        except metric_window.NonFiniteLossError as error:
            ids = sum(collectives.gather(error.ids), [])
            videos = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
            newest = manager.latest_step()
            raise InputError(
                f"the loss or its gradient is not finite at step {error.step} (learning rate "
                f"{float(schedule(error.step - 1)):.3g}; videos {videos}); the newest checkpoint "
                f"is {'none' if newest is None else f'of step {newest}'}; begin in another "
                "--workdir with a lower optimizer.learning_rate"
                + (f" and --config.init_from={workdir / 'best'}" if best >= 0 else "")
            ) from None
        finally:
            process_group.publish(sys.exception())  # the manager's close waits for the others
            progress.close()
            writer.close()
            stalls.close()
            train_iter.close()
            with contextlib.suppress(Exception):  # the exception that ends the run propagates
                manager.close()
            trace.close()
        if stopped or not at_end:
            log.info("stopped and saved at step %d; the same command continues from there", step)
        if stopped:
            raise SystemExit(128 + (signals.received or signal.SIGTERM))
        if not at_end:
            return None

        # -------------------------------------------------------------- outputs
        # A signal does not interrupt them: the evaluation is done, and this ends the run.
        signals.finish_run()
        if message := skipped.summary():
            log.info("%s", message)
        folder = workdir / "model"
        result["checkpoint"] = str(workdir / "checkpoints" / str(step))
        result["weights_sha256"] = model_folder.fingerprint(steps.eval_params(state))
        save_model(folder, result)
        save_report(workdir, result, results, data.labels, data.records["val"])
    log.info(
        "%s. The report is %s, the model in %s; try it on a clip of your own:\n"
        "  %s -m jaxvid.predict CLIP.mp4 --model %s",
        summary(result),
        workdir / "eval.html",
        folder,
        min(sys.executable, os.path.relpath(sys.executable), key=len),
        folder,
    )
    return result
