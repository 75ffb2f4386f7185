"""Training: one function, top to bottom."""

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

from jaxvid import (
    checkpoint,
    metrics,
    model_folder,
    optim,
    processes,
    provenance,
    report,
    run_config,
    sharding,
    steps,
    watch,
    workdir_lock,
)
from jaxvid.data.clips import make_spec
from jaxvid.data.pipeline import describe_loading, make_train_iter, split_batch
from jaxvid.data.sources import open_folder
from jaxvid.distill import load_teacher
from jaxvid.errors import InputError
from jaxvid.evaluate import (
    check_protocol,
    evaluate_params,
    make_eval_step,
    make_report,
    save_report,
    summary,
)
from jaxvid.loading import preprocessing
from jaxvid.metrics import log
from jaxvid.models import abstract_model, make_model_config

STEPS_AHEAD = 2  # how far Python runs ahead of the device


@workdir_lock.exclusive
def train(
    config,
    workdir: str | Path,
    *,
    stop_step: int | None = None,
    profile_steps: tuple[int, int] | None = None,
) -> dict | None:
    """Trains, or continues training, and evaluates.

    Args:
        config: A locked config.
        workdir: The run's folder. If it holds checkpoints of this config, the newest is continued,
            to the same bits as if the run had never stopped.
        stop_step: Saves and returns at this step; the next call continues.
        profile_steps: Writes a trace of the steps between the two to `WORKDIR/profile`.

    Returns:
        What `eval.json` holds; None if the run stopped before its end.

    Raises:
        InputError: The config, the data or the workdir is unusable; another run uses the workdir;
            or the loss is not finite.
        SystemExit: SIGINT or SIGTERM came, here or to another process of the run, and the state was
            saved; code 128 + signal number.
    """
    workdir, began = Path(workdir), time.monotonic()

    # ------------------------------------------------------------------ devices, folders
    sharding.use_compilation_cache()
    mesh = sharding.make_mesh(config.mesh)
    run_config.check_config(config, mesh)
    check_protocol(config, mesh)
    run_config.check_same_run(config, workdir)
    model_config = make_model_config(**config.model)
    graphdef, abstract_params = abstract_model(model_config)
    weight_bytes = sum(math.prod(leaf.shape) * 4 for leaf in abstract_params.values())

    # ------------------------------------------------------------------ data
    data = sharding.in_all(open_folder, config.data, config.model.num_classes, ("train", "val"))
    shard = sharding.rows_of_process(mesh, config.batch_size)
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
        mixup=config.mixup,
        cutmix=config.cutmix,
        erase=config.erase,
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
    sharding.in_all(checkpoint.check_writable, workdir, need_bytes)
    metrics.setup_logging(workdir)
    manager, state = checkpoint.restore_newest(
        workdir, abstract_state, train_iter, keep=config.checkpoint_keep
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
    if profile_steps and not step <= profile_steps[0] < profile_steps[1] <= total_steps:
        manager.close()
        raise InputError(
            f"profile of the steps {profile_steps[0]} to {profile_steps[1]}: the run goes from "
            f"{step} to {total_steps}"
        )
    provenance.note_start(workdir, provenance.describe_run(mesh, data.records))
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
    eval_step = make_eval_step(config, graphdef, mesh)

    log.info(
        "%s: %.2f M parameters, %d training and %d validation videos, mesh %s",
        model_config.name,
        weight_bytes / 4e6,
        len(data.records["train"]),
        len(data.records["val"]),
        ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
    )
    for line in (*loaded, optim.describe_rate(config.optimizer, config.batch_size)):
        log.info("%s", line)
    if step == total_steps:
        log.info("trained before, all %d steps; evaluating again", step)
    else:
        log.info("step %d of %d%s", step, total_steps, ", continued" if step else "")

    # ------------------------------------------------------------------ loop
    writer = metrics.MetricWriter(workdir, step)
    skipped = metrics.SkippedVideos(
        workdir, num_videos=len(data.records["train"]), max_share=config.data.max_failed_share
    )
    progress = metrics.Progress(
        total_steps * config.batch_size,
        done=step * config.batch_size,
        unit="clip",
        title="training",
    )
    stalls, late = watch.Stalls(config.data.stall_seconds), watch.LateMetrics()
    failures: list[list[str]] = []  # ids and reasons of videos since the last flush
    # As the first process reads them: another may see an older file.
    best, evaluated = sharding.gather(
        [model_folder.best_top1(workdir), metrics.last_evaluation(workdir)]
    )[0]
    saved, result = step, None

    def save_model(folder: Path, result: dict) -> None:
        card = model_folder.make_card(
            model_config,
            preprocessing=preprocessing(config),
            labels=data.labels,
            provenance={"workdir": str(workdir), "step": step, "top1": result["top1"]},
        )
        model_folder.save_model_folder(folder, steps.best_params(state), card)

    def flush() -> None:
        """Reads and writes what is late; too short a window is only checked."""
        skipped.note(sum(sharding.gather(failures), []))
        failures.clear()
        late.read()
        sums, count = late.take()
        if 2 * count < config.log_steps and step != total_steps or not count:
            return
        scalars = {
            "train/loss": float(sums["loss"] / sums["count"]) if sums["count"] else None,
            "train/top1": float(100 * sums["top1"] / sums["count"]) if sums["count"] else None,
            "train/grad_norm": float(sums["grad_norm"] / count),
            "learning_rate": float(schedule(step - 1)),
            "clips_per_second": progress.rate(),
            "input_wait_share": stalls.share("input"),
        }
        writer.write(step, scalars)
        line = "no video of these steps can be decoded"
        if sums["count"]:
            line = f"loss {scalars['train/loss']:.3f}, top-1 {scalars['train/top1']:.1f} %"
        progress.advance(0, line)
        log.debug(
            "step %d/%d: %s, %.0f clips/s, %s left",
            *(step, total_steps, line, progress.rate(), progress.time_left()),
        )

    with watch.Signals() as signals:
        try:
            while True:
                # Several processes must stop at the same step: they learn of it by the metrics.
                alone = jax.process_count() == 1 and signals.received is not None
                stopping = alone or late.stop or step == stop_step
                at_end = step == total_steps
                evaluates = at_end or (step % eval_steps == 0 and step not in (0, evaluated))
                saves = stopping or evaluates or step % checkpoint_steps == 0
                if saves and step != saved:
                    flush()
                    # The iterator is saved with the state and only advanced afterwards: the next
                    # draw is then the one that a continued run makes too.
                    with stalls.stage("the checkpoint"):
                        checkpoint.save_checkpoint(manager, state, train_iter)
                    saved = step
                if evaluates and not (alone or late.stop):
                    with signals.end_at_once():
                        results = evaluate_params(
                            steps.best_params(state),
                            data.records["val"],
                            config,
                            eval_step=eval_step,
                            mesh=mesh,
                        )
                    result = make_report(results, config, checkpoint=f"step {step}")
                    if result["top1"] > best:
                        best = result["top1"]
                        save_model(workdir / "best", result)
                    if step != evaluated:  # once its row stands, it is not done again
                        evaluated = step
                        scalars = {f"val/{k}": result[k] for k in ("top1", "top5", "loss")}
                        writer.write(step, scalars)
                        writer.write_classes(step, data.labels, results.per_class())
                        if not jax.process_index():
                            report.draw_curves(workdir / "metrics.jsonl", workdir / "curves.png")
                    log.info("step %d: validation %s", step, summary(result))
                    stalls.share("input")  # from here on: not of the evaluation's time
                if at_end or stopping or late.stop:
                    break
                if profile_steps and step == profile_steps[0]:
                    jax.profiler.start_trace(workdir / "profile")
                with stalls.stage("input", describe_loading):
                    batch, ids, errors = split_batch(next(train_iter))
                failures += [[id_, error] for id_, error in zip(ids, errors, strict=True) if error]
                if step == start_step:
                    writer.write_clips(step, batch["video"][:4])
                state, step_metrics = train_step(
                    state, sharding.to_global(batch, mesh), teacher_params
                )
                stop = sharding.any_process(signals.received is not None, mesh)
                step += 1
                late.add(step, {**step_metrics, "stop": stop}, ids)
                with stalls.stage("the device"):
                    late.read(STEPS_AHEAD)
                if step == start_step + 1:
                    jax.block_until_ready(state)
                    log.info("first step %.1f s after the start", time.monotonic() - began)
                if profile_steps and step == profile_steps[1]:
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                    log.info(
                        "a trace of the steps %d to %d is in %s/profile", *profile_steps, workdir
                    )
                progress.advance(config.batch_size)
                if step % config.log_steps == 0:
                    flush()
            checkpoint.finish_saving(manager)
        except watch.NotFiniteError as error:
            ids = sum(sharding.gather(error.ids), [])
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
            processes.publish(sys.exception())  # the manager's close waits for the others
            progress.close()
            writer.close()
            stalls.close()
            train_iter.close()
            with contextlib.suppress(Exception):  # what ends the run is told already
                manager.close()

    if not at_end:
        log.info("stopped and saved at step %d; the same command continues from there", step)
        if stop_step != step:
            raise SystemExit(128 + (signals.received or signal.SIGTERM))
        return None

    # ------------------------------------------------------------------ what stays
    folder = workdir / "model"
    result["checkpoint"] = str(workdir / "checkpoints" / str(step))
    result["weights_sha256"] = model_folder.fingerprint(steps.best_params(state))
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
