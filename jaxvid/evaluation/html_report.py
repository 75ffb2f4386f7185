"""An evaluation as one HTML page that opens offline: `WORKDIR/eval.html`.

The page is `html_report.html` with its numbers put in as JSON; what it shows, its script makes of
them. Names are only ever set as text there, so no name can become markup.
"""

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jaxvid.atomic import write_file
from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.data.sources import Record
from jaxvid.evaluation import metrics
from jaxvid.evaluation.metrics import Results

TEMPLATE = Path(__file__).with_name("html_report.html")
MAX_MISTAKES = 12
MAX_FAILED = 200  # that are listed; eval.json lists all
MAX_POINTS = 400  # of a curve
THUMBNAIL_PX = 200
# Numbers of `eval.json` that the page shows.
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
SAMPLINGS = {
    "segments": "one from each of {num_frames} equal parts of the video",
    "dense_stride": "evenly over {num_frames} × {sampling_rate} frames at 30 frames a second",
    "uniform_10s": "evenly over 10 seconds",
}
RESIZES = {"pil_bilinear": "with antialiasing", "torch_bilinear": "without antialiasing"}
MATRICES = {"tagged": "by the matrix that each file names", "bt601": "by BT.601"}
CURVES = ("train/loss", "val/loss", "train/top1", "val/top1", "learning_rate")


def save_page(
    path: Path, result: dict, results: Results, labels: list[str], records: Sequence[Record]
) -> None:
    """Writes the page, with the learning curves of the `metrics.jsonl` beside it, if there is one.

    Args:
        path: The HTML file.
        result: What goes into `eval.json`, with `weights_sha256`.
        results: Of the evaluation.
        labels: Names of the classes.
        records: The videos of `results`, in its order.

    Raises:
        InputError: It cannot be written.
    """
    data = page_data(result, results, labels, records)
    page = make_page({**data, "curves": read_curves(path.with_name("metrics.jsonl"))})
    write_file(path, page.encode())


def make_page(data: dict) -> str:
    """The page of what `page_data` gives, and `curves`."""
    # Within a script element "</script" and "<!--" mean something; as escapes they do not.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    title = f"top-1 {data['top1']:.2f} % on {data['num_videos']} videos"
    parts = {"{{title}}": title, "{{data}}": text}
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(title|data)\}\}", lambda match: parts[match[0]], template)


def page_data(result: dict, results: Results, labels: list[str], records: Sequence[Record]) -> dict:
    """The numbers of the page: nothing a video but its few worst mistakes.

    Arguments: `save_page`.

    Returns:
        What `SHOWN` names; and `protocol` and `failed`; `labels`, and of each class its videos
        (`count`), those predicted right (`correct`) and how many failed; `confusion`, its counts
        that are not 0 as label, prediction, count, label, ...; `near`, an order of the classes;
        `bins` of the reliability diagram; `mistakes`.
    """
    hits, failed = results.hits(1), results.failed
    confusion = results.confusion()
    places = np.argwhere(confusion)  # (n 2)
    bins, _ = metrics.calibration(results.probabilities.max(axis=1)[~failed], hits[~failed])

    def by_class(which: np.ndarray) -> list[int]:
        return np.bincount(results.labels[which], minlength=len(labels)).tolist()

    return {
        **{name: result[name] for name in SHOWN},
        "protocol": describe_protocol(result["protocol"]),
        "failed": result["failed"][:MAX_FAILED],
        "labels": labels,
        "count": by_class(np.ones(len(hits), bool)),
        "correct": by_class(hits),
        "failed_of_class": by_class(failed),
        "confusion": np.column_stack([places, confusion[tuple(places.T)]]).ravel().tolist(),
        "near": metrics.order_by_confusion(confusion).tolist(),
        "bins": [[_finite(round(float(value), 4)) for value in row] for row in bins],
        "mistakes": find_mistakes(results, records),
    }


def describe_protocol(protocol: dict) -> list[str]:
    """The protocol of an `eval.json` in words."""
    clips, crops = protocol["num_clips"], protocol["num_crops"]
    views = f"{clips} {'clip' if clips == 1 else 'clips'} × {crops} "
    size = protocol["image_size"]
    return [
        f"{views}{'crop' if crops == 1 else 'crops'} of each video",
        f"{protocol['num_frames']} frames a clip, "
        + SAMPLINGS[protocol["sampling"]].format(**protocol)
        + (", by the times that they are shown at" if protocol["by_time"] else ""),
        f"{size} × {size} px, cut from a short side of {protocol['short_side']} px, resized "
        + RESIZES[protocol["resize"]]
        + f"; video to RGB: {MATRICES[protocol['color_matrix']]}",
        f"a video's score is the {protocol['score']}, computed in {protocol['dtype']}",
    ]


def find_mistakes(results: Results, records: Sequence[Record]) -> list[dict]:
    """The wrong predictions that the network is surest of, the surest first.

    Arguments: `save_page`.

    Returns:
        Of each its `id`, `label`, `prediction`, `confidence` in percent, and `image`: base64 of a
        JPEG file, empty if the frame cannot be decoded.
    """
    prediction = results.top(1)[:, 0]
    confidence = results.probabilities[np.arange(len(prediction)), prediction]
    wrong = np.flatnonzero(~results.hits(1) & ~results.failed)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")[:MAX_MISTAKES]]
    return [
        {
            "id": results.ids[i],
            "label": int(results.labels[i]),
            "prediction": int(prediction[i]),
            "confidence": round(100 * float(confidence[i]), 2),
            "image": base64.b64encode(draw_thumbnail(records[i])).decode(),
        }
        for i in worst
    ]


def draw_thumbnail(record: Record) -> bytes:
    """The frame in the middle of a video as a small JPEG file; empty if it cannot be decoded."""
    try:
        with record.open() as reader:
            [frame] = reader.get_frames(np.array([reader.num_frames // 2]))  # (h w c)
    except DecodeError:  # the page says so in the picture's place
        return b""
    picture, file = Image.fromarray(frame), io.BytesIO()
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    picture.save(file, "jpeg", quality=80)
    return file.getvalue()


def read_curves(path: Path) -> dict[str, list[list[float]]] | None:
    """The learning curves of a `metrics.jsonl`; None if there is no such file or nothing in it.

    Returns:
        Those of `CURVES` that it has → their steps and values; of long ones each point is the mean
        of several.
    """
    if not path.is_file():
        return None
    points: dict[str, list[tuple[float, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a run that was killed while it wrote
            continue
        for name in CURVES:
            # Where no video could be decoded, there is no loss.
            if row.get(name) is not None and math.isfinite(row[name]):
                points.setdefault(name, []).append((row["step"], row[name]))
    return {name: _thin(np.array(found)) for name, found in points.items()} or None


def _thin(points: np.ndarray) -> list[list[float]]:
    """Steps and values of `(n, 2)` points, or of the means of so many that few are left."""
    parts = np.array_split(points, min(len(points), MAX_POINTS))
    means = np.array([part.mean(axis=0) for part in parts])  # (n 2)
    return [[float(f"{value:.6g}") for value in column] for column in means.T]


def _finite(value):
    """JSON has no nan: None in its place."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
