"""The contents of eval.json, and the one-line summary."""

import math

import numpy as np

from jaxvid.data.clips.clip import make_spec
from jaxvid.evaluation import metrics
from jaxvid.evaluation.metrics import Results
from jaxvid.evaluation.protocol import SCORES


def make_report(results: Results, config, *, checkpoint: str) -> dict:
    """What goes into `eval.json`: percentages, the protocol they were measured by, and of what.

    Videos that failed count as wrong, except in `released_subset`; the loss and the calibration are
    those of the others, None where there are none. Seconds are those of all runs of an evaluation
    that was interrupted.
    """
    hits, good = results.hits(1), ~results.failed
    confidences = results.probabilities.max(axis=1)
    _, calibration_error = metrics.calibration(confidences[good], hits[good])
    losses, views = results.losses(), config.eval.num_clips * config.eval.num_crops
    return {
        "top1": metrics.accuracy(hits),
        "top1_interval": [*metrics.confidence_interval(hits)],
        "top5": metrics.accuracy(results.hits(5)),
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
        "released_subset": released_subset(results)
        if config.data.sampling == "uniform_10s"
        else None,
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
            f"top{k}": metrics.accuracy(results.hits(k)[kept]) if kept.any() else None
            for k in (1, 5)
        },
    }


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
