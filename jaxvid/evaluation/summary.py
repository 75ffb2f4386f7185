"""The metrics in `eval.json`, and their one-line summary."""

import math

import numpy as np

from jaxvid.evaluation import metrics
from jaxvid.evaluation.metrics import Results
from jaxvid.evaluation.protocol import EvalProtocol


def make_report(results: Results, protocol: EvalProtocol, *, data: str, checkpoint: str) -> dict:
    """Return the contents of `eval.json`, to which `evaluate` and `save_report` add some fields.

    Failed videos count as wrong, except in `released_subset`, which leaves them out. The loss and
    the calibration error are computed from the decoded videos, and are None if there are none.

    Args:
        results: The results of all videos.
        protocol: The protocol that they were evaluated with.
        data: The folder of the videos.
        checkpoint: Description of the weights: a folder, or the training step.

    Returns:
        Accuracies in percent, counts of videos, `protocol`, and more. `seconds` includes the time
        of interrupted runs of the same evaluation. `clips_per_second` counts every view as a clip.
        In multi-label data, there is also `mAP`, the mean average precision of the classes that
        have videos; `top1` and `top5` are the percentages of videos for which one of the classes
        is among the best one or five; and `mean_class_accuracy` and `calibration_error` are None.
    """
    hits, decoded = results.hits(1), ~results.failed
    confidences = results.probabilities.max(axis=1)
    if results.multi_label:
        calibration_error = math.nan
    else:
        _, calibration_error = metrics.calibration(confidences[decoded], hits[decoded])
    class_mean = float(np.nanmean(results.per_class()))
    losses, views = results.losses(), protocol.preprocessing.num_views
    return {
        **({"mAP": class_mean} if results.multi_label else {}),
        "top1": metrics.accuracy(hits),
        "top1_interval": [*metrics.confidence_interval(hits)],
        "top5": metrics.accuracy(results.hits(5)),
        "mean_class_accuracy": None if results.multi_label else class_mean,
        "calibration_error": None if math.isnan(calibration_error) else calibration_error,
        "loss": float(losses[decoded].mean()) if decoded.any() else None,
        "num_classes": results.num_classes,
        "num_videos": len(hits),
        "num_evaluated": int(decoded.sum()),
        "num_padded": int(results.padded.sum()),
        "num_failed": int((~decoded).sum()),
        "failed": [
            {"id": results.ids[i], "label": results.label(i), "error": results.errors[i]}
            for i in np.flatnonzero(~decoded)
        ],
        "released_subset": released_subset(results)
        if protocol.preprocessing.sampling == "uniform_10s"
        else None,
        "protocol": protocol.to_report(),
        "seconds": results.seconds,
        "clips_per_second": len(hits) * views / results.seconds,
        "data": data,
        "checkpoint": checkpoint,
    }


def released_subset(results: Results) -> dict:
    """Return the accuracies on the videos that STAM's released evaluation counts.

    It drops videos shorter than 10 s; the published figures are accuracies on the other videos.

    Returns:
        `num_videos`; `top1` and `top5` in percent, None if there are no such videos.
    """
    in_subset = results.released & ~results.failed
    return {
        "num_videos": int(in_subset.sum()),
        **{
            f"top{k}": metrics.accuracy(results.hits(k)[in_subset]) if in_subset.any() else None
            for k in (1, 5)
        },
    }


def summary(result: dict) -> str:
    """Return one line with the accuracies and how they were measured."""
    protocol = result["protocol"]
    counts = [
        f"{result[name]} {name.removeprefix('num_')}"
        for name in ("num_padded", "num_failed")
        if result[name]
    ]
    subset = result["released_subset"]
    if subset and 0 < subset["num_videos"] < result["num_videos"]:
        counts.append(
            f"top-1 {subset['top1']:.2f} % on the {subset['num_videos']} videos that the released "
            "evaluation counts"
        )
    low, high = result["top1_interval"]
    sizes = [f"{protocol['num_frames']} frames", f"{protocol['image_size']} px", *counts]
    top5 = f", top-5 {result['top5']:.2f} %" if result["num_classes"] > 5 else ""
    mean = f"mAP {result['mAP']:.2f} %, " if "mAP" in result else ""
    return (
        f"{mean}top-1 {result['top1']:.2f} % (95 %: {low:.2f} to {high:.2f}){top5} "
        f"on {result['num_videos']} videos (clips × crops: "
        f"{protocol['num_clips']} × {protocol['num_crops']}, {', '.join(sizes)})"
    )
