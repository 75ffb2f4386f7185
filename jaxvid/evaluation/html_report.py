"""The evaluation report: one self-contained HTML page, `WORKDIR/eval.html`.

The numbers are inserted as JSON into the template `html_report.html`, whose script draws them. The
script inserts names only as text nodes and attribute values, so that no name can become markup.
"""

import base64
import dataclasses
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jaxvid.atomic import write_file
from jaxvid.data.clips.clip import ViewSpec
from jaxvid.data.clips.description import describe_views
from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.data.sources import Record
from jaxvid.evaluation import metrics
from jaxvid.evaluation.metrics import Results
from jaxvid.html import embed_json

TEMPLATE = Path(__file__).with_name("html_report.html")
MAX_MISTAKES = 12
MAX_FAILED = 200  # failed videos on the page; eval.json lists all
MAX_POINTS = 400  # per curve
THUMBNAIL_PX = 200
# Fields of `eval.json` that the page shows.
SHOWN = (
    "top1",
    "top1_interval",
    "top5",
    "mean_class_accuracy",
    "calibration_error",
    "loss",
    "num_videos",
    "num_evaluated",
    "num_padded",
    "num_failed",
    "released_subset",
    "data",
    "checkpoint",
    "weights_sha256",
    "seconds",
    "clips_per_second",
)
CURVES = ("train/loss", "val/loss", "train/top1", "val/top1", "val/mAP", "learning_rate")


def save_page(path: Path, data: dict) -> None:
    """Write the page to an HTML file, with learning curves if its folder has a `metrics.jsonl`.

    Args:
        path: The file.
        data: The result of `page_data`.

    Raises:
        InputError: The file cannot be written.
    """
    page = make_page({**data, "curves": read_curves(path.with_name("metrics.jsonl"))})
    write_file(path, page.encode())


def make_page(data: dict) -> str:
    """Return the page: the template with the data filled in.

    Args:
        data: The result of `page_data`, with `curves`.
    """
    name, value = ("top-1", data["top1"]) if "mAP" not in data else ("mAP", data["mAP"])
    title = f"{name} {value:.2f} % on {data['num_videos']} videos"
    parts = {"{{title}}": title, "{{data}}": embed_json(data)}
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(title|data)\}\}", lambda match: parts[match[0]], template)


def page_data(result: dict, results: Results, labels: list[str], records: Sequence[Record]) -> dict:
    """Return the page's data, whose size does not grow with the number of videos.

    Args:
        result: The contents of `eval.json`, with `weights_sha256`.
        results: The per-video results.
        labels: Class names.
        records: The videos of `results`, in the same order.

    Returns:
        The fields named in `SHOWN`, and:
        - `protocol`: lines of text; `failed`: the first failed videos.
        - `labels`, and per class: the numbers of videos (`count`), of correct predictions
          (`correct`) and of failed videos (`failed_of_class`).
        - `average_precision` of each class in percent in multi-label data, otherwise None.
        - `confusion`: the non-zero counts, flattened as label, prediction, count, label, ...
        - `near`: an order of the classes, from `metrics.order_by_confusion`.
        - `bins`: the reliability diagram; `mistakes`: the result of `find_mistakes`.
    """
    hits, failed = results.hits(1), results.failed
    data = {
        **{name: result[name] for name in SHOWN},
        "protocol": describe_protocol(result["protocol"]),
        "failed": result["failed"][:MAX_FAILED],
        "labels": labels,
        "count": results.count_labels(np.ones(len(hits), bool)).tolist(),
        "correct": results.count_labels(hits).tolist(),
        "failed_of_class": results.count_labels(failed).tolist(),
        "mistakes": find_mistakes(results, records),
    }
    if results.multi_label:
        return {
            **data,
            "mAP": result["mAP"],
            "average_precision": [_nan_to_none(value) for value in results.per_class().tolist()],
            "confusion": [],
            "near": [],
            "bins": [],
        }
    confusion = results.confusion()
    cells = np.argwhere(confusion)  # (n 2)
    bins, _ = metrics.calibration(results.probabilities.max(axis=1)[~failed], hits[~failed])
    return {
        **data,
        "average_precision": None,
        "confusion": np.column_stack([cells, confusion[tuple(cells.T)]]).ravel().tolist(),
        "near": metrics.order_by_confusion(confusion).tolist(),
        "bins": [[_nan_to_none(round(float(value), 4)) for value in row] for row in bins],
    }


def describe_protocol(protocol: dict) -> list[str]:
    """Describe the protocol in an `eval.json`, one line per topic."""
    fields = {**protocol, "crop": protocol["image_size"]}
    views = ViewSpec(**{field.name: fields[field.name] for field in dataclasses.fields(ViewSpec)})
    score = f"video score: {protocol['score']}, computed in {protocol['dtype']}"
    return [*describe_views(views), score]


def find_mistakes(results: Results, records: Sequence[Record]) -> list[dict]:
    """Return the wrong predictions with the highest confidence, most confident first.

    Args:
        results: The per-video results.
        records: The videos of `results`, in the same order.

    Returns:
        For each: `id`, `label`, `prediction`, `confidence` in percent, and `image`, a JPEG file in
        base64, or an empty string if the frame cannot be decoded.
    """
    prediction = results.top(1)[:, 0]
    confidence = results.probabilities[np.arange(len(prediction)), prediction]
    wrong = np.flatnonzero(~results.hits(1) & ~results.failed)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")[:MAX_MISTAKES]]
    return [
        {
            "id": results.ids[i],
            "label": results.label(i),
            "prediction": int(prediction[i]),
            "confidence": round(100 * float(confidence[i]), 2),
            "image": base64.b64encode(draw_thumbnail(records[i])).decode(),
        }
        for i in worst
    ]


def draw_thumbnail(record: Record) -> bytes:
    """Return the middle frame of a video as a small JPEG file; empty if it cannot be decoded."""
    try:
        with record.open() as reader:
            [frame] = reader.get_frames(np.array([reader.num_frames // 2]))  # (h w c)
    except DecodeError:  # the page shows a message instead
        return b""
    picture, file = Image.fromarray(frame), io.BytesIO()
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    picture.save(file, "jpeg", quality=80)
    return file.getvalue()


def read_curves(path: Path) -> dict[str, list[list[float]]] | None:
    """Read the learning curves from a `metrics.jsonl`.

    Returns:
        Name from `CURVES` → steps and values, averaged to at most `MAX_POINTS` points; or None if
        the file is missing or has no values.
    """
    if not path.is_file():
        return None
    points: dict[str, list[tuple[float, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # an incomplete last line: the run was killed while it wrote
            continue
        for name in CURVES:
            # The loss is null or nan if no video could be decoded.
            if row.get(name) is not None and math.isfinite(row[name]):
                points.setdefault(name, []).append((row["step"], row[name]))
    return {name: _downsample(np.array(pairs)) for name, pairs in points.items()} or None


def _downsample(points: np.ndarray) -> list[list[float]]:
    """Average neighbouring points `(n, 2)` to at most `MAX_POINTS`; return steps and values."""
    parts = np.array_split(points, min(len(points), MAX_POINTS))
    means = np.array([part.mean(axis=0) for part in parts])  # (n 2)
    return [[float(f"{value:.6g}") for value in column] for column in means.T]


def _nan_to_none(value: float) -> float | None:
    """Replace a non-finite number by None, as JSON has no nan."""
    return value if math.isfinite(value) else None
