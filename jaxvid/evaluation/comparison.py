"""Comparison of two evaluations, video by video."""

from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from jaxvid.atomic import write_json
from jaxvid.config import differences, translate
from jaxvid.errors import InputError, printable
from jaxvid.evaluation.metrics import compare_hits

MAX_NAMED = 10  # maximum number of videos that the log lists per kind of change
SIGNIFICANCE_LEVEL = 0.05


def check_shared(before: dict, ids: Iterable[str]) -> None:
    """Refuse a comparison without shared videos, before anything is evaluated.

    Args:
        before: The evaluation to compare with, from `read_table`.
        ids: Ids of the videos to evaluate.

    Raises:
        InputError: No video is shared.
    """
    if before["videos"].keys().isdisjoint(ids):
        raise InputError(
            f"{before['path']} shares no video with the data; choose an evaluation of the same list"
        )


def compare_tables(before: dict, after: dict, workdir: Path) -> list[str]:
    """Compare two evaluations video by video and write `WORKDIR/comparison.json`.

    The file lists every shared video whose prediction changed: from wrong to right (`gained`), from
    right to wrong (`lost`), and from one wrong class to another (`still_wrong`).

    Args:
        before: The first evaluation, from `read_table`.
        after: The second evaluation. It must share a video with the first (see `check_shared`).
        workdir: Output directory.

    Returns:
        Lines for the log.

    Raises:
        InputError: The file cannot be written.
    """
    shared = [id_ for id_ in after["videos"] if id_ in before["videos"]]
    rows = [[table["videos"][id_] for id_ in shared] for table in (before, after)]
    was_right, is_right = (np.array([row["correct"] for row in side]) for side in rows)
    predictions, labels = (
        np.array([[row[name] for row in side] for side in rows]) for name in ("prediction", "label")
    )
    still_wrong = (predictions[0] != predictions[1]) & ~was_right & ~is_right
    masks = {
        "gained": ~was_right & is_right,
        "lost": was_right & ~is_right,
        "still_wrong": still_wrong,
    }
    changes = {name: [shared[i] for i in np.flatnonzero(mask)] for name, mask in masks.items()}
    # Older reports have no `color_matrix`; they were made with the matrix tagged in each file.
    protocols = [
        {"color_matrix": "tagged"} | translate(side["protocol"]) for side in (before, after)
    ]
    protocol_changes = differences(*protocols, there="before", here="now")
    comparison = compare_hits(was_right, is_right) | {
        "before": before["path"],
        "same_protocol": not protocol_changes,
        "only_before": len(before["videos"]) - len(shared),
        "only_after": len(after["videos"]) - len(shared),
        "relabelled": int((labels[0] != labels[1]).sum()),
        "still_wrong": len(changes["still_wrong"]),
        **{f"{name}_videos": videos for name, videos in changes.items()},
    }
    path = workdir / "comparison.json"
    if not jax.process_index():
        write_json(path, comparison)
    return _describe(comparison, list(protocol_changes.values()), path)


def _describe(comparison: dict, protocol_changes: list[str], path: Path) -> list[str]:
    """Return the log lines of a comparison.

    Args:
        comparison: The contents of `comparison.json`.
        protocol_changes: One entry per field of the protocol that differs.
        path: Path of `comparison.json`.
    """
    significant = comparison["p_value"] < SIGNIFICANCE_LEVEL
    lines = [
        f"compared with {comparison['before']}: top-1 "
        f"{comparison['difference']:+.2f} percentage points on "
        f"{comparison['num_videos']} shared videos ({comparison['gained']} gained, "
        f"{comparison['lost']} lost, {comparison['still_wrong']} still wrong with another "
        f"prediction); {'significant' if significant else 'not significant'} "
        f"(McNemar's exact test, p = {comparison['p_value']:.3g})"
    ]
    if protocol_changes:
        lines.append(f"the protocols differ: {'; '.join(protocol_changes)}")
    if comparison["relabelled"]:
        lines.append(f"labels differ for {comparison['relabelled']} of the shared videos")
    only_before, only_after = comparison["only_before"], comparison["only_after"]
    if only_before or only_after:
        lines.append(
            f"videos not shared: {only_before} only in {comparison['before']}, "
            f"{only_after} only in this evaluation"
        )
    for name in ("gained", "lost", "still_wrong"):
        videos = comparison[f"{name}_videos"]
        if videos:
            names = ", ".join(map(printable, videos[:MAX_NAMED]))
            more = ", …" if len(videos) > MAX_NAMED else ""
            lines.append(f"{name.replace('_', ' ')}: {names}{more} (all in {path})")
    return lines
