"""Write the output files of an evaluation; `comparison.read_table` reads them."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxvid.atomic import write_file, write_json
from jaxvid.data.sources import Record
from jaxvid.evaluation import html_report, plots
from jaxvid.evaluation.metrics import Results

COLUMNS = ("id", "label", "prediction", "correct", "top5", "probabilities", "padded", "failed")


def save_report(
    workdir: Path, result: dict, results: Results, labels: list[str], records: Sequence[Record]
) -> None:
    """Write `eval.json`, `eval_videos.csv`, `confusion.png` and `eval.html` on process 0.

    In multi-label data, there is no confusion matrix.

    Args:
        workdir: Output directory.
        result: The result of `summary.make_report`, with `weights_sha256`.
        results: The per-video results.
        labels: Class names.
        records: The videos of `results`, in the same order.

    Raises:
        InputError: A file cannot be written.
    """
    if jax.process_index():
        return
    per_class = {
        label: float(value)
        for label, value in zip(labels, results.per_class(), strict=True)
        if np.isfinite(value)
    }
    if results.multi_label:
        result = {**result, "per_class_ap": per_class, "labels": labels}
    else:
        confusion = results.confusion()
        plots.draw_confusion(
            confusion, labels, workdir / "confusion.png", num_failed=int(results.failed.sum())
        )
        result = {
            **result,
            "class_accuracy": per_class,
            "confusion": confusion.tolist(),
            "labels": labels,
        }
    write_table(workdir / "eval_videos.csv", results, labels)
    write_json(workdir / "eval.json", result)
    data = html_report.page_data(result, results, labels, records)
    html_report.save_page(workdir / "eval.html", data)


def write_table(path: Path, results: Results, labels: list[str]) -> None:
    """Write one CSV row per video, with the columns `COLUMNS`.

    `top5` and `probabilities` are JSON lists of the five best classes and their probabilities;
    `failed` is the decode error or empty. If decoding failed, the lists and `prediction` are empty.
    In multi-label data, `label` is a JSON list too.

    Args:
        path: CSV file.
        results: The per-video results.
        labels: Class names.

    Raises:
        InputError: The file cannot be written.
    """
    top, correct = results.top(5), results.hits(1)
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(COLUMNS)
    for i, id_ in enumerate(results.ids):
        best = [] if results.errors[i] else top[i].tolist()
        probabilities = [round(float(results.probabilities[i, c]), 6) for c in best]
        names = [labels[c] for c in best]
        writer.writerow(
            [
                id_,
                _label_text(results.label(i), labels),
                names[0] if names else "",
                int(correct[i]),
                json.dumps(names, ensure_ascii=False),
                json.dumps(probabilities),
                int(results.padded[i]),
                results.errors[i],
            ]
        )
    # Ids are file names, whose bytes need not be UTF-8.
    write_file(path, table.getvalue().encode("utf-8", "surrogateescape"))


def _label_text(label: int | list[int], names: list[str]) -> str:
    if isinstance(label, int):
        return names[label]
    return json.dumps([names[index] for index in label], ensure_ascii=False)
