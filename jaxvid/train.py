"""Training: one function, top to bottom."""

import functools
import json
import math
import signal
import time
from pathlib import Path

import jax

from jaxvid import checkpoint, metrics, optim, report, sharding, steps
from jaxvid.data.pipeline import make_train_iter
from jaxvid.data.sources import open_folder
from jaxvid.errors import InputError
from jaxvid.evaluate import (
    check_protocol,
    evaluate_params,
    make_eval_step,
    make_report,
    save_report,
    summary,
)
from jaxvid.metrics import log
from jaxvid.models import abstract_model, make_model_config

# What may differ between a run and its continuation: how it runs, not what it computes.
FREE_FIELDS = ("mesh.", "eval.", "checkpoint_", "log_steps", "data.num_threads", "data.num_workers")


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
    check_protocol(config.eval, mesh)
    _check_same_run(config, workdir)
    model_config = make_model_config(**config.model)
    graphdef, abstract_params = abstract_model(model_config)
    weight_bytes = sum(math.prod(leaf.shape) * 4 for leaf in abstract_params.values())
    # Weights and two moments a checkpoint, one more checkpoint while the oldest is still there.
    need_bytes = weight_bytes * (3 * (config.checkpoint_keep + 1) + 2) + 10**6
    checkpoint.check_writable(workdir, need_bytes)

    # ------------------------------------------------------------------ data
    data = open_folder(config.data, config.model.num_classes)
    train_iter = make_train_iter(
        data.train,
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        num_frames=config.model.num_frames,
        short_side=config.data.short_side,
        crop=config.model.image_size,
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        shard=(jax.process_index(), jax.process_count()),
    )
    total_steps = max(1, round(config.num_epochs * len(data.train) / config.batch_size))

    def every(epochs: float) -> int:
        return max(1, round(epochs * len(data.train) / config.batch_size))

    # ------------------------------------------------------------------ state
    schedule = optim.make_schedule(config.optimizer, total_steps)
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
            seed=config.seed,
        ),
        donate_argnums=0,
        out_shardings=(state_sharding, sharding.replicated(mesh)),
    )
    eval_step = make_eval_step(config, graphdef, mesh)

    log.info(
        "%s: %.2f M parameters, %d training and %d validation videos, %d devices %s",
        model_config.name,
        weight_bytes / 4e6,
        len(data.train),
        len(data.val),
        jax.device_count(),
        dict(mesh.shape),
    )
    log.info("step %d of %d%s", step, total_steps, ", continued" if step else "")

    # ------------------------------------------------------------------ loop
    writer = metrics.MetricWriter(workdir, step)
    progress = metrics.Progress(
        total_steps * config.batch_size,
        done=step * config.batch_size,
        unit="clip",
        title="training",
    )
    pending: list[dict] = []  # metrics still on the device
    result = None

    def flush() -> None:
        if not pending:
            return
        sums = metrics.sum_metrics(pending)
        scalars = {
            "train/loss": float(sums["loss"] / sums["count"]),
            "train/top1": float(100 * sums["top1"] / sums["count"]),
            "train/grad_norm": float(sums["grad_norm"] / len(pending)),
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
                if at_end or (step > start_step and step % every(config.eval.every_epochs) == 0):
                    flush()
                    sums = evaluate_params(
                        state["params"], data.val, config, eval_step=eval_step, mesh=mesh
                    )
                    result = make_report(sums, config, checkpoint=f"step {step}")
                    if step > start_step:  # or an earlier run has written it
                        scalars = {f"val/{k}": result[k] for k in ("top1", "top5", "loss")}
                        writer.write(step, scalars)
                    log.info("step %d: validation %s", step, summary(result))
                due = step % every(config.checkpoint_every_epochs) == 0
                if step > start_step and (stopping or at_end or due):
                    flush()
                    # The iterator is saved with the state and only advanced afterwards: the next
                    # draw is then the one that a continued run makes too.
                    checkpoint.save_checkpoint(manager, state, train_iter)
                if at_end or stopping:
                    break
                batch = sharding.to_global(next(train_iter), mesh)
                state, step_metrics = train_step(state, batch)
                step += 1
                if step == start_step + 1:
                    jax.block_until_ready(state)
                    log.info("first step after %.1f s", time.monotonic() - began)
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
        preprocessing=_preprocessing(config),
        labels=data.labels,
        provenance={"workdir": str(workdir), "step": step, "top1": result["top1"]},
    )
    checkpoint.save_model_folder(model_folder, state["params"], card)
    save_report(workdir, result, sums, data.labels)
    if not jax.process_index():
        report.draw_curves(workdir / "metrics.jsonl", workdir / "curves.png")
    log.info(
        "%s. Pictures: %s, %s. The model is in %s; try it on a clip of your own:\n"
        "  python -m jaxvid.predict CLIP.mp4 --model %s",
        summary(result),
        workdir / "curves.png",
        workdir / "confusion.png",
        model_folder,
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


def _preprocessing(config) -> dict:
    """How a clip is made for this model: what `predict` must do as training did."""
    return {
        "sampling": "segments",
        "num_frames": config.model.num_frames,
        "short_side": config.data.short_side,
        "crop": config.model.image_size,
        "mean": config.data.mean,
        "std": config.data.std,
    }


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _as_json(config) -> dict:
    return json.loads(json.dumps(config.to_dict()))


def _check_same_run(config, workdir: Path) -> None:
    """Refuses a workdir whose checkpoints were made with another config, and says what differs."""
    path = workdir / "config.json"
    if not path.exists() or not checkpoint.find_steps(workdir):
        return
    try:
        before = _flat(json.loads(path.read_text()))
    except ValueError:
        raise InputError(f"{path} is damaged; choose another --workdir") from None
    now = _flat(_as_json(config))
    differences = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name) and not name.startswith(FREE_FIELDS)
    ]
    if differences:
        raise InputError(
            f"{workdir} holds a run with another config ({'; '.join(differences)}); "
            "choose another --workdir or delete this one"
        )


def _save_config(config, workdir: Path) -> None:
    if not jax.process_index():
        partial = workdir / ".config.json.partial"
        partial.write_text(json.dumps(_as_json(config), indent=2) + "\n")
        partial.replace(workdir / "config.json")
