"""Training: one function, top to bottom."""

import functools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import jax

from jaxvid import checkpoint, metrics, optim, report, sharding, steps
from jaxvid.data.pipeline import make_spec, make_train_iter, split_batch
from jaxvid.data.sources import open_folder
from jaxvid.errors import InputError
from jaxvid.evaluate import (
    check_protocol,
    evaluate_params,
    make_eval_step,
    make_report,
    preprocessing,
    save_report,
    summary,
)
from jaxvid.metrics import log
from jaxvid.models import abstract_model, make_model_config

# What may differ between a run and its continuation: how it runs, not what it computes.
FREE_FIELDS = (
    *("mesh.", "eval.", "checkpoint_", "log_steps"),
    *("data.num_threads", "data.max_failed_share", "data.missing"),
)


def train(config, workdir: str | Path, *, stop_step: int | None = None) -> dict | None:
    """Trains, or continues training, and evaluates.

    Args:
        config: A locked config.
        workdir: The run's folder. If it holds checkpoints of this config, the newest is continued,
            to the same bits as if the run had never stopped.
        stop_step: Saves and returns at this step; the next call continues.

    Returns:
        What `eval.json` holds; None if the run stopped before its end.

    Raises:
        InputError: The config, the data or the workdir is unusable; or the loss is not finite.
        SystemExit: SIGINT or SIGTERM came, and the state was saved; code 128 + signal number.
    """
    workdir, began = Path(workdir), time.monotonic()

    # ------------------------------------------------------------------ devices, folders
    sharding.use_compilation_cache()
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size("batch_size", config.batch_size, mesh)
    check_protocol(config, mesh)
    _check_numbers(config)
    _check_same_run(config, workdir)
    model_config = make_model_config(**config.model)
    graphdef, abstract_params = abstract_model(model_config)
    weight_bytes = sum(math.prod(leaf.shape) * 4 for leaf in abstract_params.values())
    # Weights and two moments a checkpoint, one more checkpoint while the oldest is still there.
    need_bytes = weight_bytes * (3 * (config.checkpoint_keep + 1) + 2) + 10**6
    checkpoint.check_writable(workdir, need_bytes)

    # ------------------------------------------------------------------ data
    data = open_folder(config.data, config.model.num_classes, ("train", "val"))
    train_iter = make_train_iter(
        data.records["train"],
        spec=make_spec(config),
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        shard=(jax.process_index(), jax.process_count()),
    )
    steps_per_epoch = len(data.records["train"]) / config.batch_size
    total_steps = max(1, round(config.num_epochs * steps_per_epoch))
    eval_steps = max(1, round(config.eval.every_epochs * steps_per_epoch))
    checkpoint_steps = max(1, round(config.checkpoint_every_epochs * steps_per_epoch))

    # ------------------------------------------------------------------ state
    schedule = optim.make_schedule(
        config.optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    optimizer = optim.make_optimizer(config.optimizer, schedule)
    init = functools.partial(steps.init_state, model_config, optimizer, seed=config.seed)
    abstract_state = sharding.with_sharding(jax.eval_shape(init), mesh)
    state_sharding = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    manager = checkpoint.make_manager(workdir, keep=config.checkpoint_keep)
    if manager.latest_step() is not None:
        state = checkpoint.restore_checkpoint(manager, abstract_state, train_iter)
    else:
        state = jax.jit(init, out_shardings=state_sharding)()
        if config.init_from:
            checkpoint.check_same_model(config.init_from, model_config)
            state["params"] = checkpoint.load_params(config.init_from, abstract_state["params"])
    step = start_step = int(state["step"])
    metrics.setup_logging(workdir)
    _save_config(config, workdir)

    # ------------------------------------------------------------------ compiled steps
    train_step = jax.jit(
        functools.partial(
            steps.train_step,
            graphdef=graphdef,
            optimizer=optimizer,
            mean=config.data.mean,
            std=config.data.std,
            label_smoothing=config.label_smoothing,
            mixup=config.mixup,
            cutmix=config.cutmix,
            erase=config.erase,
            seed=config.seed,
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
    pending: list[dict] = []  # metrics still on the device
    result = None

    def flush() -> None:
        """Fetches and writes what is pending; too short a window is only checked."""
        if not pending:
            return
        sums, count = metrics.sum_metrics(pending), len(pending)
        scalars = {
            "train/loss": float(sums["loss"] / sums["count"]),
            "train/top1": float(100 * sums["top1"] / sums["count"]),
            "train/grad_norm": float(sums["grad_norm"] / count),
            "learning_rate": float(schedule(step - 1)),
            "clips_per_second": progress.rate(),
        }
        pending.clear()
        if not math.isfinite(scalars["train/loss"] + scalars["train/grad_norm"]):
            raise InputError(
                f"the loss or its gradient is not finite at step {step} (learning rate "
                f"{scalars['learning_rate']:.3g}); lower optimizer.learning_rate; "
                f"the newest checkpoint is of step {manager.latest_step() or 0}"
            )
        if 2 * count < config.log_steps and step != total_steps:
            return
        writer.write(step, scalars)
        line = f"loss {scalars['train/loss']:.3f}, top-1 {scalars['train/top1']:.1f} %"
        progress.advance(0, line)
        log.debug(
            "step %d/%d: %s, %.0f clips/s, %s left",
            step,
            total_steps,
            line,
            progress.rate(),
            progress.time_left(),
        )

    with _Signals() as signals:
        try:
            while True:
                stopping = signals.received is not None or step == stop_step
                at_end = step == total_steps
                is_new = step > start_step
                if is_new and (stopping or at_end or step % checkpoint_steps == 0):
                    flush()
                    # The iterator is saved with the state and only advanced afterwards: the next
                    # draw is then the one that a continued run makes too.
                    checkpoint.save_checkpoint(manager, state, train_iter)
                if at_end or (is_new and step % eval_steps == 0 and signals.received is None):
                    flush()
                    sums, failed = evaluate_params(
                        state["params"], data.records["val"], config, eval_step=eval_step, mesh=mesh
                    )
                    result = make_report(sums, failed, config, checkpoint=f"step {step}")
                    if is_new:  # or an earlier run has written it
                        scalars = {f"val/{k}": result[k] for k in ("top1", "top5", "loss")}
                        writer.write(step, scalars)
                    log.info("step %d: validation %s", step, summary(result))
                if at_end or stopping:
                    break
                batch, ids, errors = split_batch(next(train_iter))
                skipped.note(ids, errors)
                state, step_metrics = train_step(state, sharding.to_global(batch, mesh))
                step += 1
                if step == start_step + 1:
                    jax.block_until_ready(state)
                    log.info("first step %.1f s after the start", time.monotonic() - began)
                pending.append(step_metrics)
                progress.advance(config.batch_size)
                if step % config.log_steps == 0:
                    flush()
            manager.wait_until_finished()
        finally:
            progress.close()
            writer.close()
            train_iter.close()
            manager.close()

    if not at_end:
        log.info("stopped and saved at step %d; the same command continues from there", step)
        if signals.received is not None:
            raise SystemExit(128 + signals.received)
        return None

    # ------------------------------------------------------------------ what stays
    model_folder = workdir / "model"
    result["checkpoint"] = str(workdir / "checkpoints" / str(step))
    result["weights_sha256"] = checkpoint.fingerprint(state["params"])
    card = checkpoint.make_card(
        model_config,
        preprocessing=preprocessing(config),
        labels=data.labels,
        provenance={"workdir": str(workdir), "step": step, "top1": result["top1"]},
    )
    checkpoint.save_model_folder(model_folder, state["params"], card)
    save_report(workdir, result, sums, data.labels)
    if not jax.process_index():
        report.draw_curves(workdir / "metrics.jsonl", workdir / "curves.png")
    log.info(
        "%s. Pictures: %s, %s. The model is in %s; try it on a clip of your own:\n"
        "  %s -m jaxvid.predict CLIP.mp4 --model %s",
        summary(result),
        workdir / "curves.png",
        workdir / "confusion.png",
        model_folder,
        min(sys.executable, os.path.relpath(sys.executable), key=len),
        model_folder,
    )
    return result


class _Signals:
    """Notes SIGINT and SIGTERM, so that the loop can save and stop; a second one acts at once."""

    received: int | None = None

    def __enter__(self) -> "_Signals":
        try:
            self._before = {
                number: signal.signal(number, self._note)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # not the main thread: whoever called handles signals
            self._before = {}
        return self

    def _note(self, number: int, _) -> None:
        log.info("%s: saving, then stopping", signal.Signals(number).name)
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *_) -> None:
        self._restore()


def _check_numbers(config) -> None:
    for name in ("num_epochs", "log_steps", "checkpoint_keep", "checkpoint_every_epochs"):
        if config[name] <= 0:
            raise InputError(f"{name}={config[name]}: must be above 0")


def _check_same_run(config, workdir: Path) -> None:
    """Refuses a workdir whose checkpoints were made with another config, and says what differs."""
    if checkpoint.find_steps(workdir) and (
        differences := [
            text
            for name, text in checkpoint.compare_config(workdir, config).items()
            if not name.startswith(FREE_FIELDS)
        ]
    ):
        raise InputError(
            f"{workdir} holds a run with another config ({'; '.join(differences)}); "
            "choose another --workdir or delete this one"
        )


def _save_config(config, workdir: Path) -> None:
    if not jax.process_index():
        partial = workdir / ".config.json.partial"
        partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        partial.replace(workdir / "config.json")
