"""Evaluation: every listed video is counted once, by the sum of its views' logits."""

import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxvid import (
    checkpoint,
    html_report,
    metrics,
    model_folder,
    provenance,
    report,
    scoring,
    sharding,
    steps,
)
from jaxvid.data.pipeline import make_eval_iter, make_spec, split_batch
from jaxvid.data.sources import Record, open_folder
from jaxvid.errors import InputError
from jaxvid.eval_files import Unfinished, compare_tables, read_table, write_table
from jaxvid.metrics import log
from jaxvid.models import Params, abstract_model, make_model_config
from jaxvid.scoring import Results

SCORES = {
    "logits": "sum of logits over the views",
    "probabilities": "mean of probabilities over the views",
}


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
    parts = unfinished.load() if unfinished else []
    start = sum(len(part["padded"]) for part in parts)
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
        nonlocal start, hits
        outputs, *host = running.pop(0)
        count = min(config.eval.batch_size, len(records) - start)
        # Every process has all scores; what it knows of its own videos it tells the others.
        told = dict(sharding.gather([shard[0], host]))
        label, padded, error = (
            sum((told[i][k] for i in sorted(told)), [])[:count] for k in range(3)
        )
        part = {name: np.asarray(array)[:count] for name, array in outputs.items()}
        part |= {"label": np.array(label), "padded": np.array(padded), "error": error}
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
        parts.append(part)
        if unfinished:
            unfinished.add(part)
        start, hits = start + count, hits + int(part["hit"].sum())
        progress.advance(count, f"top-1 {100 * hits / start:.2f} %")

    try:
        for batch in batches:
            arrays, _, errors = split_batch(batch)
            outputs = eval_step(params, sharding.to_global({"video": arrays["video"]}, mesh))
            running.append((outputs, batch["label"].tolist(), batch["padded"].tolist(), errors))
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
        errors=[error for part in parts for error in part["error"]],
    )


def make_report(results: Results, config, *, checkpoint: str) -> dict:
    """What goes into `eval.json`: percentages, the protocol they were measured by, and of what.

    Videos that failed count as wrong; the loss and the calibration are those of the others.
    """
    hits, good = results.hits(1), ~results.failed
    confidences = results.probabilities.max(axis=1)
    _, calibration_error = scoring.reliability(confidences[good], hits[good])
    losses = results.losses()
    return {
        "top1": scoring.accuracy(hits),
        "top1_interval": [*scoring.confidence_interval(hits)],
        "top5": scoring.accuracy(results.hits(5)),
        "mean_class_accuracy": float(np.nanmean(results.per_class())),
        "calibration_error": calibration_error,
        "loss": float(losses[good].mean()) if good.any() else None,
        "num_videos": len(hits),
        "num_evaluated": int(good.sum()),
        "num_padded": int(results.padded.sum()),
        "num_failed": int((~good).sum()),
        "failed": [
            {"id": results.ids[i], "label": int(results.labels[i]), "error": results.errors[i]}
            for i in np.flatnonzero(~good)
        ],
        "protocol": {
            "num_clips": config.eval.num_clips,
            "num_crops": config.eval.num_crops,
            "num_frames": config.model.num_frames,
            "image_size": config.model.image_size,
            "short_side": config.eval.short_side,
            "resize": config.data.resize,
            "sampling": config.data.sampling,
            "sampling_rate": config.data.sampling_rate,
            "score": SCORES[config.eval.score],
        },
        "data": config.data.folder,
        "checkpoint": checkpoint,
    }


def save_report(
    workdir: Path, result: dict, results: Results, labels: list[str], records: Sequence[Record]
) -> None:
    """Writes `eval.json`, `eval_videos.csv`, `confusion.png`, `eval.html` (on the first process).

    Arguments: `html_report.save_page`, and the folder.
    """
    if jax.process_index():
        return
    confusion = results.confusion()
    accuracies = results.per_class()
    result = {
        **result,
        "class_accuracy": {
            label: float(value)
            for label, value in zip(labels, accuracies, strict=True)
            if np.isfinite(value)
        },
        "confusion": confusion.tolist(),
        "labels": labels,
    }
    write_table(workdir / "eval_videos.csv", results, labels)
    partial = workdir / ".eval.json.partial"
    partial.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(workdir / "eval.json")
    report.draw_confusion(confusion, labels, workdir / "confusion.png")
    html_report.save_page(workdir / "eval.html", result, results, labels, records)


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
        InputError: There is nothing to evaluate, or it does not fit the config.
    """
    workdir, began = Path(workdir), time.monotonic()
    sharding.use_compilation_cache()
    mesh = sharding.make_mesh(config.mesh)
    check_protocol(config, mesh)
    before = read_table(compare_with) if compare_with else None
    sharding.in_all(checkpoint.check_writable, workdir, 10**6)
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

    data = sharding.in_all(open_folder, config.data, config.model.num_classes, ("val",))
    records = data.records["val"]
    weights_sha256 = model_folder.fingerprint(params)
    unfinished = Unfinished(
        workdir / ".unfinished_eval",
        {
            "weights": weights_sha256,
            "videos": provenance.fingerprint(records),
            "model": config.model.to_dict(),
            "data": config.data.to_dict(),
            "eval": config.eval.to_dict(),
        },
    )
    eval_step = make_eval_step(config, graphdef, mesh)
    results = evaluate_params(
        params, records, config, eval_step=eval_step, mesh=mesh, unfinished=unfinished
    )
    result = make_report(results, config, checkpoint=source)
    seconds = time.monotonic() - began
    result |= {"weights_sha256": weights_sha256, "seconds": seconds}
    result["clips_per_second"] = (
        len(records) * config.eval.num_clips * config.eval.num_crops / seconds
    )
    save_report(workdir, result, results, data.labels, records)
    unfinished.remove()
    log.info("%s. The report is %s", summary(result), workdir / "eval.html")
    if before is not None:
        sharding.wait_for_all("eval.json")
        for line in compare_tables(before, read_table(workdir / "eval.json"), workdir):
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
    low, high = result["top1_interval"]
    sizes = [f"{protocol['num_frames']} frames", f"{protocol['image_size']} px", *counts]
    return (
        f"top-1 {result['top1']:.2f} % (95 %: {low:.2f} to {high:.2f}), "
        f"top-5 {result['top5']:.2f} % on {result['num_videos']} videos (clips × crops: "
        f"{protocol['num_clips']} × {protocol['num_crops']}, {', '.join(sizes)})"
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
