"""The files of an evaluation: its report, a comparison, and what is not finished."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxvid.atomic import write_file, write_json
from jaxvid.data.sources import Record
from jaxvid.errors import InputError
from jaxvid.evaluation import html_report, plots
from jaxvid.evaluation.metrics import Results

COLUMNS = ("id", "label", "prediction", "correct", "top5", "probabilities", "padded", "failed")


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
    plots.draw_confusion(confusion, labels, workdir / "confusion.png", num_failed=num_failed)
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
