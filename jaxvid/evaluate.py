"""Evaluation: every listed video is counted once, by the sum of its views' logits."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxvid import (
    checkpoint,
    metrics,
    model_folder,
    provenance,
    run_config,
    scoring,
    sharding,
    steps,
    workdir_lock,
)
from jaxvid.data.clips import make_spec
from jaxvid.data.pipeline import make_eval_iter, split_batch
from jaxvid.data.sources import Record, open_folder
from jaxvid.errors import InputError
from jaxvid.eval_files import (
    Unfinished,
    check_shared,
    compare_tables,
    read_table,
    save_report,
)
from jaxvid.loading import (
    check_preprocessing,
    default_color_matrix,
    preprocessing,
    resolve_color_matrix,
)
from jaxvid.metrics import log
from jaxvid.models import Params, abstract_model, make_model_config
from jaxvid.scoring import Results

SCORES = {
    "logits": "sum of logits over the views",
    "probabilities": "mean of probabilities over the views",
}
# How clips are made, beside the network's own sizes: it decides what an accuracy is worth.
CLIP_FIELDS = (
    *("data.sampling", "data.sampling_rate", "data.by_time", "data.resize", "data.color_matrix"),
    "eval.short_side",
)
DTYPES = ("float32", "bfloat16")


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
    if config.eval.score not in SCORES:
        known = " and ".join(map(repr, SCORES))
        raise InputError(f"eval.score={config.eval.score!r}: there are {known}")
    if config.eval.dtype not in DTYPES:
        known = " and ".join(map(repr, DTYPES))
        raise InputError(f"eval.dtype={config.eval.dtype!r}: there are {known}")
    if config.eval.every_epochs <= 0:
        raise InputError(f"eval.every_epochs={config.eval.every_epochs}: must be above 0")


def abstract_eval_model(config) -> tuple[nnx.GraphDef, Params]:
    """`abstract_model` of a config's network as evaluation runs it: in `eval.dtype`."""
    return abstract_model(make_model_config(**{**config.model, "dtype": config.eval.dtype}))


def make_eval_step(config, graphdef, mesh) -> Callable[[Params, dict], dict]:
    """The jitted `steps.eval_step` of a config."""
    step = functools.partial(
        steps.eval_step,
        graphdef=graphdef,
        mean=config.data.mean,
        std=config.data.std,
        score=config.eval.score,
    )
    return jax.jit(step, out_shardings=sharding.replicated(mesh))


def evaluate_params(
    params: Params,
    records: Sequence[Record],
    config,
    *,
    eval_step: Callable,
    mesh,
    unfinished: Unfinished | None = None,
) -> Results:
    """Runs the network over all records.

    Args:
        params: The weights.
        records: Labelled videos.
        config: A whole config.
        eval_step: As `make_eval_step` gives it.
        mesh: Cuts the batches.
        unfinished: Where to keep what is done, and to take from what an earlier run did.

    Raises:
        InputError: The network's logits are not finite.
    """
    parts, began = unfinished.load() if unfinished else [], time.monotonic()
    start = sum(len(part["padded"]) for part in parts)
    if start:
        log.info("%d of %d videos were evaluated before", start, len(records))
    shard = sharding.rows_of_process(mesh, config.eval.batch_size)
    batches = make_eval_iter(
        records[start:],
        spec=make_spec(config, num_clips=config.eval.num_clips, num_crops=config.eval.num_crops),
        batch_size=config.eval.batch_size // shard[1],
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        shard=shard,
    )
    progress = metrics.Progress(
        len(records), done=start, unit="video", title="evaluating", lines=True
    )
    running: list[tuple] = []  # batches that the device may still compute
    hits = sum(int(part["hit"].sum()) for part in parts)

    def read() -> None:
        """Fetches the oldest running batch."""
        nonlocal start, hits, began
        outputs, *host = running.pop(0)
        count = min(config.eval.batch_size, len(records) - start)
        # Every process has all scores; what it knows of its own videos it tells the others.
        told = dict(sharding.gather([shard[0], host]))
        label, padded, released, error = (
            sum((told[i][k] for i in sorted(told)), [])[:count] for k in range(4)
        )
        part = {name: np.asarray(array)[:count] for name, array in outputs.items()}
        part |= {"label": np.array(label), "padded": np.array(padded), "error": error}
        part["released"] = np.array(released)
        good = np.array([not error for error in part["error"]])
        if not np.isfinite(part["scores"][good]).all():
            raise InputError(
                "the network gives logits that are not finite: its weights are damaged"
            )
        for name in ("scores", "probabilities"):
            part[name] = np.where(good[:, None], part[name], 0)
        for error in filter(None, part["error"]):
            log.warning("counts as wrong: %s", error)
        part["hit"] = good & (part["scores"].argmax(axis=1) == part["label"])
        part["seconds"], began = time.monotonic() - began, time.monotonic()
        parts.append(part)
        if unfinished:
            sharding.in_all(unfinished.add, part)
        start, hits = start + count, hits + int(part["hit"].sum())
        progress.advance(count, f"top-1 {100 * hits / start:.2f} %")

    try:
        for batch in batches:
            arrays, _, errors = split_batch(batch)
            outputs = eval_step(params, sharding.to_global({"video": arrays["video"]}, mesh))
            host = [batch[name].tolist() for name in ("label", "padded", "released")]
            running.append((outputs, *host, errors))
            if len(running) == 2:  # the device computes the newest meanwhile
                read()
        while running:
            read()
    finally:
        progress.close()
        batches.close()
    if start != len(records):
        raise RuntimeError(f"{start} videos were evaluated, {len(records)} are listed")
    return Results(
        ids=[record.id for record in records],
        labels=np.concatenate([part["label"] for part in parts]),
        scores=np.concatenate([part["scores"] for part in parts]),
        probabilities=np.concatenate([part["probabilities"] for part in parts]),
        padded=np.concatenate([part["padded"] for part in parts]),
        released=np.concatenate([part["released"] for part in parts]),
        errors=[error for part in parts for error in part["error"]],
        seconds=float(sum(part["seconds"] for part in parts)),
    )


def make_report(results: Results, config, *, checkpoint: str) -> dict:
    """What goes into `eval.json`: percentages, the protocol they were measured by, and of what.

    Videos that failed count as wrong, except in `released_subset`; the loss and the calibration are
    those of the others, None where there are none. Seconds are those of all runs of an evaluation
    that was interrupted.
    """
    hits, good = results.hits(1), ~results.failed
    confidences = results.probabilities.max(axis=1)
    _, calibration_error = scoring.reliability(confidences[good], hits[good])
    losses, views = results.losses(), config.eval.num_clips * config.eval.num_crops
    return {
        "top1": scoring.accuracy(hits),
        "top1_interval": [*scoring.confidence_interval(hits)],
        "top5": scoring.accuracy(results.hits(5)),
        "mean_class_accuracy": float(np.nanmean(results.per_class())),
        "calibration_error": None if math.isnan(calibration_error) else calibration_error,
        "loss": float(losses[good].mean()) if good.any() else None,
        "num_videos": len(hits),
        "num_evaluated": int(good.sum()),
        "num_padded": int(results.padded.sum()),
        "num_failed": int((~good).sum()),
        "failed": [
            {"id": results.ids[i], "label": int(results.labels[i]), "error": results.errors[i]}
            for i in np.flatnonzero(~good)
        ],
        "released_subset": released_subset(results) if config.data.sampling == "rate" else None,
        "protocol": {
            "num_clips": config.eval.num_clips,
            "num_crops": config.eval.num_crops,
            "num_frames": config.model.num_frames,
            "image_size": config.model.image_size,
            "short_side": config.eval.short_side,
            "resize": config.data.resize,
            "sampling": config.data.sampling,
            "sampling_rate": config.data.sampling_rate,
            "by_time": config.data.by_time,
            "color_matrix": make_spec(config).color_matrix,
            "dtype": config.eval.dtype,
            "score": SCORES[config.eval.score],
        },
        "seconds": results.seconds,
        "clips_per_second": len(hits) * views / results.seconds,
        "data": config.data.folder,
        "checkpoint": checkpoint,
    }


def released_subset(results: Results) -> dict:
    """Accuracies on the videos that STAM's released evaluation keeps, for published figures.

    Returns:
        `num_videos`; `top1` and `top5` in percent, None if there are no such videos.
    """
    kept = results.released & ~results.failed
    return {
        "num_videos": int(kept.sum()),
        **{
            f"top{k}": scoring.accuracy(results.hits(k)[kept]) if kept.any() else None
            for k in (1, 5)
        },
    }


@workdir_lock.exclusive
def evaluate(config, workdir: str | Path, *, compare_with: str | Path | None = None) -> dict:
    """Evaluates a model folder (`init_from`) or else the newest checkpoint of the workdir.

    Interrupted, it goes on where it was when the same command is run again.

    Args:
        config: A locked config.
        workdir: Gets `eval.json`, `eval_videos.csv`, `eval.html` and `confusion.png`.
        compare_with: Another `eval.json`: says which videos changed, and whether that is more than
            chance.

    Returns:
        What `eval.json` holds.

    Raises:
        InputError: There is nothing to evaluate, it does not fit the config or the data, or another
            run uses the workdir.
    """
    workdir = Path(workdir)
    sharding.use_compilation_cache()
    mesh = sharding.make_mesh(config.mesh)
    check_protocol(config, mesh)
    before = sharding.in_all(read_table, compare_with) if compare_with else None
    sharding.in_all(checkpoint.check_writable, workdir, 10**6)
    metrics.setup_logging(workdir)

    model_config = make_model_config(**config.model)
    graphdef, abstract_params = abstract_eval_model(config)
    abstract_params = sharding.with_sharding(abstract_params, mesh)
    if config.init_from:
        source = named = config.init_from
        model_folder.check_same_model(source, model_config)
        check_preprocessing(source, config)
        card = model_folder.load_card(source)
        params = model_folder.load_params(source, abstract_params)
        expected = {"color_matrix": default_color_matrix(card)} | (card["preprocessing"] or {})
        config = resolve_color_matrix(config, expected)
        found = preprocessing(config)
        changed = {
            field: f"{field} was {expected[name]!r}, now {found[name]!r}"
            for field, name in ((field, field.partition(".")[2]) for field in CLIP_FIELDS)
            if name in expected and expected[name] != found[name]
        }
    else:
        step = checkpoint.newest_step(workdir)
        changed = run_config.compare_config(workdir, config)
        if other := [
            text
            for name, text in changed.items()
            if name.startswith(("model.", "data.mean", "data.std")) and name != "model.dtype"
        ]:
            raise InputError(f"{workdir} holds another model: {'; '.join(other)}")
        named = workdir / "best"  # a checkpoint does not name its classes
        card = model_folder.load_card(named) if model_folder.is_there(named) else None
        if config.data.color_matrix == "auto" and card:
            changed.pop("data.color_matrix", None)
            config = resolve_color_matrix(config, card["preprocessing"] or {})
        source = str(workdir / "checkpoints" / str(step))
        params = checkpoint.restore_params(workdir, step, abstract_params)
    log.info("evaluating %s", source)
    if config.data.sampling != "dense":  # others have no rate
        changed.pop("data.sampling_rate", None)
    if told := "; ".join(text for name, text in changed.items() if name in CLIP_FIELDS):
        log.warning("clips are not made as the model's preprocessing says: %s", told)

    data = sharding.in_all(open_folder, config.data, config.model.num_classes, ("val",))
    for line in data.notes:
        log.info("%s", line)
    records = data.records["val"]
    videos = provenance.describe_videos(records)
    provenance.check_same_videos(videos)
    if card:
        sharding.in_all(model_folder.check_labels, card["labels"], data.labels, named)
    if before is not None:
        check_shared(before, (record.id for record in records))
    weights_sha256 = model_folder.fingerprint(params)
    unfinished = Unfinished(
        workdir / ".unfinished_eval",
        {
            "weights": weights_sha256,
            "videos": videos,
            # Processes may have copies of their own.
            "files": sorted({*sharding.gather(provenance.fingerprint_files(records))}),
            "model": config.model.to_dict(),
            "data": {
                name: value
                for name, value in config.data.to_dict().items()
                if f"data.{name}" not in run_config.OWN_FIELDS
            },
            "eval": config.eval.to_dict(),
        },
    )
    eval_step = make_eval_step(config, graphdef, mesh)
    results = evaluate_params(
        params, records, config, eval_step=eval_step, mesh=mesh, unfinished=unfinished
    )
    result = make_report(results, config, checkpoint=source)
    result["weights_sha256"] = weights_sha256
    sharding.in_all(save_report, workdir, result, results, data.labels, records)
    unfinished.remove()
    log.info("%s. The report is %s", summary(result), workdir / "eval.html")
    if before is not None:
        after = sharding.in_all(read_table, workdir / "eval.json")
        for line in sharding.in_all(compare_tables, before, after, workdir):
            log.info("%s", line)
    return result


def summary(result: dict) -> str:
    """One line with the headline numbers and how they were measured."""
    protocol = result["protocol"]
    counts = [
        f"{result[name]} {name.removeprefix('num_')}"
        for name in ("num_padded", "num_failed")
        if result[name]
    ]
    subset = result["released_subset"]
    if subset and 0 < subset["num_videos"] < result["num_videos"]:
        counts.append(f"top-1 {subset['top1']:.2f} % on the {subset['num_videos']} that the "
                      "released evaluation keeps")  # fmt: skip
    low, high = result["top1_interval"]
    sizes = [f"{protocol['num_frames']} frames", f"{protocol['image_size']} px", *counts]
    return (
        f"top-1 {result['top1']:.2f} % (95 %: {low:.2f} to {high:.2f}), "
        f"top-5 {result['top5']:.2f} % on {result['num_videos']} videos (clips × crops: "
        f"{protocol['num_clips']} × {protocol['num_crops']}, {', '.join(sizes)})"
    )
