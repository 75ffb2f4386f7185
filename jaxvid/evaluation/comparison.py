"""Comparison of two evaluations, video by video."""

from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from jaxvid.atomic import write_json
from jaxvid.config import differences, translate
from jaxvid.errors import InputError
from jaxvid.evaluation.metrics import compare_hits

MAX_NAMED = 10  # videos that a comparison names in the log


def check_shared(before: dict, ids: Iterable[str]) -> None:
    """Refuses an evaluation that cannot be compared with another, before it begins.

    Args:
        before: The other, as `read_table` gives it.
        ids: The videos that will be evaluated.

    Raises:
        InputError: They share no video.
    """
    if before["videos"].keys().isdisjoint(ids):
        raise InputError(
            f"{before['path']} shares no video with the data; name an evaluation of the same list"
        )


def compare_tables(before: dict, after: dict, workdir: Path) -> list[str]:
    """Compares two evaluations video by video and writes `WORKDIR/comparison.json`.

    It lists every shared video whose prediction changed: from wrong to right (`gained`), from right
    to wrong (`lost`), and from one wrong class to another (`still_wrong`).

    Args:
        before: As `read_table` gives it.
        after: Likewise, of videos that `check_shared` let pass.
        workdir: Where to write.

    Returns:
        Lines for the log.

    Raises:
        InputError: The file cannot be written.
    """
    shared = [id_ for id_ in after["videos"] if id_ in before["videos"]]
    rows = [[table["videos"][id_] for id_ in shared] for table in (before, after)]
    was, is_now = (np.array([row["correct"] for row in side]) for side in rows)
    predictions, labels = (
        np.array([[row[name] for row in side] for side in rows]) for name in ("prediction", "label")
    )
    changed = predictions[0] != predictions[1]
    found = compare_hits(was, is_now)
    changes = {
        name: [shared[i] for i in np.flatnonzero(which)]
        for name, which in (
            ("gained", ~was & is_now),
            ("lost", was & ~is_now),
            ("still wrong", changed & ~was & ~is_now),
        )
    }
    # Older reports do not name the matrix: there was only one.
    protocols = [
        {"color_matrix": "tagged"} | translate(side["protocol"]) for side in (before, after)
    ]
    changed_protocol = differences(*protocols, there="before", here="now")
    num_relabelled = int((labels[0] != labels[1]).sum())
    found |= {
        "before": before["path"],
        "same_protocol": not changed_protocol,
        "only_before": len(before["videos"]) - len(shared),
        "only_after": len(after["videos"]) - len(shared),
        "relabelled": num_relabelled,
        "still_wrong": len(changes["still wrong"]),
        **{f"{name.replace(' ', '_')}_videos": videos for name, videos in changes.items()},
    }
    if not jax.process_index():
        write_json(workdir / "comparison.json", found)
    verdict = "significant" if found["p_value"] < 0.05 else "not significant"
    lines = [
        f"against {before['path']}: {found['difference']:+.2f} % top-1 on {len(shared)} shared "
        f"videos, {found['gained']} gained, {found['lost']} lost, {found['still_wrong']} wrong "
        f"otherwise; {verdict} "
        f"(McNemar's exact test, p = {found['p_value']:.3g})"
    ]
    if not found["same_protocol"]:
        lines.append(f"their protocols differ: {'; '.join(changed_protocol.values())}")
    if num_relabelled:
        lines.append(f"{num_relabelled} of the shared videos have another label now")
    if len(shared) < max(len(before["videos"]), len(after["videos"])):
        lines.append(f"{found['only_before']} videos only there, {found['only_after']} only here")
    for name, videos in changes.items():
        named = ", ".join(videos[:MAX_NAMED]) + (", …" if len(videos) > MAX_NAMED else "")
        named = named.encode("utf-8", "backslashreplace").decode()
        if videos:
            lines.append(f"{name}: {named} (all in {workdir / 'comparison.json'})")
    return lines
