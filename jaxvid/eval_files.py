"""The files of an evaluation: its report, a comparison, and what is not finished."""

import csv
import io
import json
import shutil
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxvid import html_report, report, sharding
from jaxvid.data.sources import Record
from jaxvid.errors import InputError
from jaxvid.files import write_file, write_json
from jaxvid.scoring import Results, compare_hits

COLUMNS = ("id", "label", "prediction", "correct", "top5", "probabilities", "padded", "failed")
MAX_NAMED = 10  # videos that a comparison names in the log


def save_report(
    workdir: Path, result: dict, results: Results, labels: list[str], records: Sequence[Record]
) -> None:
    """Writes `eval.json`, `eval_videos.csv`, `confusion.png`, `eval.html` (on the first process).

    Arguments: `html_report.save_page`, and the folder.

    Raises:
        InputError: One of them cannot be written.
    """
    if jax.process_index():
        return
    confusion = results.confusion()
    result = {
        **result,
        "class_accuracy": {
            label: float(value)
            for label, value in zip(labels, results.per_class(), strict=True)
            if np.isfinite(value)
        },
        "confusion": confusion.tolist(),
        "labels": labels,
    }
    write_table(workdir / "eval_videos.csv", results, labels)
    write_json(workdir / "eval.json", result)
    num_failed = int(results.failed.sum())
    report.draw_confusion(confusion, labels, workdir / "confusion.png", num_failed=num_failed)
    html_report.save_page(workdir / "eval.html", result, results, labels, records)


def write_table(path: Path, results: Results, labels: list[str]) -> None:
    """Writes a line for each video: its label, the best five classes, and what happened to it.

    Args:
        path: A CSV file.
        results: Of an evaluation.
        labels: Names of the classes.

    Raises:
        InputError: It cannot be written.
    """
    top, correct = results.top(5), results.hits(1)
    table = io.StringIO(newline="")
    rows = csv.writer(table)
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
    write_file(path, table.getvalue().encode("utf-8", "surrogateescape"))  # as file names are


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
        with table.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            videos = {
                row["id"]: {**row, "correct": row["correct"] == "1"} for row in csv.DictReader(file)
            }
        if len(videos) != found["num_videos"]:
            raise ValueError(f"{table} has {len(videos)} videos, the report {found['num_videos']}")
        if not isinstance(found["protocol"], dict):
            raise ValueError(f"its protocol is {found['protocol']!r}")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(
            f"{path}: no evaluation can be read from it and {table.name} beside it ({error}); "
            "name an eval.json that --mode eval wrote"
        ) from None
    return {**found, "videos": videos, "path": str(path)}


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
    protocols = [{"color_matrix": "tagged"} | side["protocol"] for side in (before, after)]
    differences = [
        f"{name} was {protocols[0].get(name)!r}, now {protocols[1].get(name)!r}"
        for name in {**protocols[0], **protocols[1]}
        if protocols[0].get(name) != protocols[1].get(name)
    ]
    num_relabelled = int((labels[0] != labels[1]).sum())
    found |= {
        "before": before["path"],
        "same_protocol": not differences,
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
        lines.append(f"their protocols differ: {'; '.join(differences)}")
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
        """The batches that are done, in order; all processes must call it.

        Raises:
            InputError: The folder cannot be written.
        """
        # The first process decides: what it removes, no other may read at that time.
        if not sharding.gather(self._is_same())[0]:
            sharding.in_all(self._begin)
            return []
        parts = []
        while part := self._read(len(parts)):
            parts.append(part)
        # On another machine, files may be seen later.
        self._count = min(sharding.gather(len(parts)))
        return parts[: self._count]

    def _begin(self) -> None:
        if not jax.process_index():
            shutil.rmtree(self._folder, ignore_errors=True)
            if next(self._folder.glob("*.npz"), None):  # it would be taken for one of this key
                raise InputError(f"{self._folder} cannot be removed; delete it")
            write_file(self._folder / "key.json", self._key.encode())

    def _is_same(self) -> bool:
        try:
            return (self._folder / "key.json").read_text(encoding="utf-8") == self._key
        except (OSError, ValueError):  # there is none, or it is damaged
            return False

    def _read(self, number: int) -> dict | None:
        """A batch; None: it is not there, or damaged, and is done again."""
        try:
            # NumPy leaves a damaged file open that it opened itself.
            file = io.BytesIO((self._folder / f"{number}.npz").read_bytes())
            with np.load(file) as arrays:
                return {**arrays, "error": arrays["error"].tolist()}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def add(self, part: dict) -> None:
        """Keeps one more batch (on the first process).

        Raises:
            InputError: It cannot be written.
        """
        path = self._folder / f"{self._count}.npz"
        self._count += 1
        if not jax.process_index():
            file = io.BytesIO()
            np.savez(file, **{**part, "error": np.array(part["error"], str)})
            write_file(path, file.getvalue())

    def remove(self) -> None:
        """Removes what is no longer needed."""
        if not jax.process_index():
            shutil.rmtree(self._folder, ignore_errors=True)
