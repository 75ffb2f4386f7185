"""The files of an evaluation: the table of its videos, a comparison, and what is not finished."""

import csv
import json
import shutil
from pathlib import Path

import jax
import numpy as np

from jaxvid import sharding
from jaxvid.errors import InputError
from jaxvid.scoring import Results, compare_hits

COLUMNS = ("id", "label", "prediction", "correct", "top5", "probabilities", "padded", "failed")
MAX_NAMED = 10  # videos that a comparison names in the log


def write_table(path: Path, results: Results, labels: list[str]) -> None:
    """Writes a line for each video: its label, the best five classes, and what happened to it.

    Args:
        path: A CSV file.
        results: Of an evaluation.
        labels: Names of the classes.
    """
    top, correct = results.top(5), results.hits(1)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for i, id_ in enumerate(results.ids):
            best = [] if results.errors[i] else top[i].tolist()
            probabilities = [round(float(results.probabilities[i, c]), 6) for c in best]
            names = [labels[c] for c in best]
            rows.writerow(
                [
                    id_,
                    labels[results.labels[i]],
                    names[0] if names else "",
                    int(correct[i]),
                    json.dumps(names, ensure_ascii=False),
                    json.dumps(probabilities),
                    int(results.padded[i]),
                    results.errors[i],
                ]
            )
    partial.replace(path)


def read_table(report: str | Path) -> dict:
    """Reads an `eval.json` and the table of videos beside it.

    Returns:
        The report, with `videos`: id → its row, and `path`.

    Raises:
        InputError: One of the two is missing or damaged.
    """
    path = Path(report)
    table = path.with_name("eval_videos.csv")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        with table.open(encoding="utf-8", newline="") as file:
            videos = {
                row["id"]: {**row, "correct": row["correct"] == "1"} for row in csv.DictReader(file)
            }
        if len(videos) != found["num_videos"]:
            raise ValueError(f"{table} has {len(videos)} videos, the report {found['num_videos']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: no evaluation can be read from it and {table.name} beside it ({error}); "
            "name an eval.json that --mode eval wrote"
        ) from None
    return {**found, "videos": videos, "path": str(path)}


def compare_tables(before: dict, after: dict, workdir: Path) -> list[str]:
    """Compares two evaluations video by video and writes `WORKDIR/comparison.json`.

    Args:
        before: As `read_table` gives it.
        after: Likewise.
        workdir: Where to write.

    Returns:
        Lines for the log.

    Raises:
        InputError: They share no video.
    """
    shared = [id_ for id_ in after["videos"] if id_ in before["videos"]]
    if not shared:
        raise InputError(f"{before['path']} and {after['path']} share no video; nothing to compare")
    hits = [
        np.array([table["videos"][id_]["correct"] for id_ in shared]) for table in (before, after)
    ]
    found = compare_hits(*hits)
    changes = {
        name: [shared[i] for i in np.flatnonzero(which)]
        for name, which in (("gained", ~hits[0] & hits[1]), ("lost", hits[0] & ~hits[1]))
    }
    found |= {
        "before": before["path"],
        "same_protocol": before["protocol"] == after["protocol"],
        "only_before": len(before["videos"]) - len(shared),
        "only_after": len(after["videos"]) - len(shared),
        "gained_videos": changes["gained"],
        "lost_videos": changes["lost"],
    }
    if not jax.process_index():
        text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
        (workdir / "comparison.json").write_text(text, encoding="utf-8")
    verdict = "significant" if found["p_value"] < 0.05 else "not significant"
    lines = [
        f"against {before['path']}: {found['difference']:+.2f} % top-1 on {len(shared)} shared "
        f"videos, {found['gained']} gained, {found['lost']} lost; {verdict} "
        f"(McNemar's exact test, p = {found['p_value']:.3g})"
    ]
    if not found["same_protocol"]:
        lines.append(f"their protocols differ: {before['protocol']} and {after['protocol']}")
    if len(shared) < max(len(before["videos"]), len(after["videos"])):
        lines.append(f"{found['only_before']} videos only there, {found['only_after']} only here")
    for name, videos in changes.items():
        named = ", ".join(videos[:MAX_NAMED]) + (", …" if len(videos) > MAX_NAMED else "")
        if videos:
            lines.append(f"{name}: {named} (all in {workdir / 'comparison.json'})")
    return lines


class Unfinished:
    """Keeps the batches of an evaluation, so that it goes on where it was interrupted.

    Args:
        folder: Where to.
        key: What the batches depend on; those of another key are dropped.
    """

    def __init__(self, folder: Path, key: dict):
        self._folder, self._key = folder, json.dumps(key, sort_keys=True, default=str)
        self._count = 0

    def load(self) -> list[dict]:
        """The batches that are done, in order."""
        parts, key = [], self._folder / "key.json"
        if key.exists() and key.read_text() == self._key:
            while (path := self._folder / f"{len(parts)}.npz").exists():
                with np.load(path) as arrays:
                    parts.append(dict(arrays))
                parts[-1]["error"] = parts[-1]["error"].tolist()
        elif not jax.process_index():
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            key.write_text(self._key)
        # On another machine, files may be seen later.
        self._count = min(sharding.gather(len(parts)))
        return parts[: self._count]

    def add(self, part: dict) -> None:
        """Keeps one more batch (on the first process)."""
        path = self._folder / f"{self._count}.npz"
        self._count += 1
        if not jax.process_index():
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.savez(file, **{**part, "error": np.array(part["error"], str)})
            partial.replace(path)

    def remove(self) -> None:
        """Removes what is no longer needed."""
        if not jax.process_index():
            shutil.rmtree(self._folder, ignore_errors=True)
