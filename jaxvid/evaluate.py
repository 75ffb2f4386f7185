"""Evaluation: every listed video is counted once, by the sum of its views' logits."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxvid import checkpoint, metrics, model_folder, report, sharding, steps
from jaxvid.data.pipeline import make_eval_iter, make_spec, split_batch
from jaxvid.data.sources import Record, open_folder
from jaxvid.errors import InputError
from jaxvid.metrics import log
from jaxvid.models import Params, abstract_model, make_model_config


def check_protocol(config, mesh) -> None:
    """Refuses views, sizes or a batch that cannot be evaluated, before anything else is done.

    Args:
        config: A whole config.
        mesh: Cuts the batches.

    Raises:
        InputError: Names the field and what is possible.
    """
    sharding.check_batch_size("eval.batch_size", config.eval.batch_size, mesh)
    make_spec(config, num_clips=config.eval.num_clips, num_crops=config.eval.num_crops)
    if config.eval.every_epochs <= 0:
        raise InputError(f"eval.every_epochs={config.eval.every_epochs}: must be above 0")


def preprocessing(config) -> dict:
    """How a clip is made for a config's model: what `predict` must do as training did."""
    return {
        "sampling": config.data.sampling,
        "sampling_rate": config.data.sampling_rate,
        "num_frames": config.model.num_frames,
        "short_side": config.eval.short_side,
        "resize": config.data.resize,
        "crop": config.model.image_size,
        "mean": config.data.mean,
        "std": config.data.std,
    }


def make_eval_step(config, graphdef, mesh) -> Callable[[Params, dict], dict]:
    """The jitted `steps.eval_step` of a config."""
    step = functools.partial(
        steps.eval_step, graphdef=graphdef, mean=config.data.mean, std=config.data.std
    )
    return jax.jit(step, out_shardings=sharding.replicated(mesh))


def evaluate_params(
    params: Params, records: Sequence[Record], config, *, eval_step: Callable, mesh
) -> tuple[dict[str, np.ndarray], list[dict]]:
    """Runs the network over all records.

    Returns:
        The sums of `steps.eval_step` over all records that can be decoded, with `padded`, the
        number of those that are too short for their clips; and `{"id", "label", "error"}` of each
        that cannot.
    """
    shard = sharding.rows_of_process(mesh, config.eval.batch_size)
    batches = make_eval_iter(
        records,
        spec=make_spec(config, num_clips=config.eval.num_clips, num_crops=config.eval.num_crops),
        batch_size=config.eval.batch_size // shard[1],
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        shard=shard,
    )
    progress = metrics.Progress(len(records), unit="video", title="evaluating", lines=True)
    results = []  # the sums so far on the host, and the newest steps' on the device
    failed, padded = [], 0
    try:
        for batch in batches:
            padded += int(batch["padded"].sum())
            batch, ids, errors = split_batch(batch)
            for id_, label, error in zip(ids, batch["label"], errors, strict=True):
                if error:
                    failed.append({"id": id_, "label": int(label), "error": error})
                    log.warning("counts as wrong: %s", error)
            results.append(eval_step(params, sharding.to_global(batch, mesh)))
            if len(results) == 3:  # fetch the older step, leave the newest running
                results = [metrics.sum_metrics(results[:2]), results[2]]
            progress.advance(min(config.eval.batch_size, len(records) - progress.done))
        # Processes that share their rows tell the same.
        told = {part: what for part, *what in sharding.gather([shard[0], padded, failed])}
        failed = [video for _, videos in told.values() for video in videos]
        sums = {**metrics.sum_metrics(results), "padded": sum(count for count, _ in told.values())}
    finally:
        progress.close()
        batches.close()
    if not np.isfinite(sums["loss"]):
        raise InputError("the network gives logits that are not finite: its weights are damaged")
    if sums["count"] + len(failed) != len(records):
        raise RuntimeError(
            f"{sums['count']} videos counted and {len(failed)} failed, but {len(records)} listed"
        )
    return sums, failed


def per_class(sums: dict, failed: list[dict], labels: Sequence) -> dict:
    """Top-1 accuracy in percent of every class that has videos; those that failed are wrong."""
    correct, listed = np.diag(sums["confusion"]), sums["confusion"].sum(axis=1)
    listed = listed + np.bincount([video["label"] for video in failed], minlength=len(listed))
    return {
        label: 100 * float(hits / count)
        for label, hits, count in zip(labels, correct, listed, strict=True)
        if count
    }


def make_report(sums: dict, failed: list[dict], config, *, checkpoint: str) -> dict:
    """What goes into `eval.json`: percentages, the protocol they were measured by, and of what.

    Videos that failed count as wrong; the loss is that of the others.
    """
    evaluated = int(sums["count"])
    count = evaluated + len(failed)
    accuracies = per_class(sums, failed, range(len(sums["confusion"])))
    return {
        "top1": 100 * int(sums["top1"]) / count,
        "top5": 100 * int(sums["top5"]) / count,
        "mean_class_accuracy": float(np.mean([*accuracies.values()])),
        "loss": float(sums["loss"]) / max(evaluated, 1),
        "num_videos": count,
        "num_evaluated": evaluated,
        "num_padded": int(sums["padded"]),
        "num_failed": len(failed),
        "failed": failed,
        "protocol": {
            "num_clips": config.eval.num_clips,
            "num_crops": config.eval.num_crops,
            "num_frames": config.model.num_frames,
            "image_size": config.model.image_size,
            "short_side": config.eval.short_side,
            "resize": config.data.resize,
            "sampling": config.data.sampling,
            "score": "sum of logits over the views",
        },
        "data": config.data.folder,
        "checkpoint": checkpoint,
    }


def save_report(workdir: Path, result: dict, sums: dict, labels: list[str]) -> None:
    """Writes `eval.json` and `confusion.png` (on the first process)."""
    if jax.process_index():
        return
    result = {**result, "confusion": sums["confusion"].tolist(), "labels": labels}
    partial = workdir / ".eval.json.partial"
    partial.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(workdir / "eval.json")
    report.draw_confusion(sums["confusion"], labels, workdir / "confusion.png")


def evaluate(config, workdir: str | Path) -> dict:
    """Evaluates a model folder (`init_from`) or else the newest checkpoint of the workdir.

    Args:
        config: A locked config.
        workdir: Gets `eval.json` and `confusion.png`.

    Returns:
        What `eval.json` holds.

    Raises:
        InputError: There is nothing to evaluate, or it does not fit the config.
    """
    workdir = Path(workdir)
    sharding.use_compilation_cache()
    mesh = sharding.make_mesh(config.mesh)
    check_protocol(config, mesh)
    checkpoint.check_writable(workdir, need_bytes=10**6)
    metrics.setup_logging(workdir)

    model_config = make_model_config(**config.model)
    graphdef, abstract_params = abstract_model(model_config)
    abstract_params = sharding.with_sharding(abstract_params, mesh)
    if config.init_from:
        source = config.init_from
        model_folder.check_same_model(source, model_config)
        _check_preprocessing(source, config)
        params = model_folder.load_params(source, abstract_params)
    else:
        step = checkpoint.newest_step(workdir)
        differences = [
            text
            for name, text in checkpoint.compare_config(workdir, config).items()
            if name.startswith(("model.", "data.mean", "data.std"))
        ]
        if differences:
            raise InputError(f"{workdir} holds another model: {'; '.join(differences)}")
        source = str(workdir / "checkpoints" / str(step))
        params = checkpoint.restore_params(workdir, step, abstract_params)
    log.info("evaluating %s", source)

    data = open_folder(config.data, config.model.num_classes, ("val",))
    eval_step = make_eval_step(config, graphdef, mesh)
    sums, failed = evaluate_params(
        params, data.records["val"], config, eval_step=eval_step, mesh=mesh
    )
    result = make_report(sums, failed, config, checkpoint=source)
    result["weights_sha256"] = model_folder.fingerprint(params)
    save_report(workdir, result, sums, data.labels)
    log.info(summary(result))
    return result


def summary(result: dict) -> str:
    """One line with the headline numbers and how they were measured."""
    protocol = result["protocol"]
    counts = [
        f"{result[name]} {name.removeprefix('num_')}"
        for name in ("num_padded", "num_failed")
        if result[name]
    ]
    sizes = [f"{protocol['num_frames']} frames", f"{protocol['image_size']} px", *counts]
    return (
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % on {result['num_videos']} "
        f"videos (clips × crops: {protocol['num_clips']} × {protocol['num_crops']}, "
        f"{', '.join(sizes)})"
    )


def _check_preprocessing(folder: str, config) -> None:
    """Refuses to evaluate a model folder on clips that are made otherwise than it is used to."""
    expected = model_folder.load_card(folder)["preprocessing"] or {}
    found = preprocessing(config)
    differences = [
        f"{name} is {expected[name]!r} there, {found[name]!r} in the config"
        for name in ("sampling", "sampling_rate", "mean", "std")
        if name in expected and expected[name] != found[name]
    ]
    if differences:
        raise InputError(f"{folder} wants its clips made otherwise: {'; '.join(differences)}")
