"""Comparison of two evaluations, video by video. This module does not import JAX."""

import csv
import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxvid import remote
from jaxvid.atomic import write_json
from jaxvid.config import differences, translate
from jaxvid.errors import InputError, one_line, printable, with_addresses
from jaxvid.evaluation.metrics import accuracy, compare_hits

FILE = "comparison.json"
MAX_NAMED = 10  # maximum number of videos that the log lists per kind of change
MAX_CLASSES = 10  # maximum number of classes in the printed table
SIGNIFICANCE_LEVEL = 0.05


def read_table(report: str | Path) -> dict:
    """Read an `eval.json` and the `eval_videos.csv` in the same folder.

    Args:
        report: The `eval.json`, or its folder; or the address of one of them.

    Returns:
        The contents of `eval.json`, with `path` and `videos` (id → row of the table). `correct` and
        `top5_correct` of a row are booleans. `labels` is None if the file has no class names.

    Raises:
        InputError: A file is missing or damaged.
    """
    path = _find_report(report)
    table = path.with_name("eval_videos.csv")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        with table.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = list(csv.DictReader(file))
        if not isinstance(contents["protocol"], dict):
            raise ValueError(f"protocol: expected a dict, got {contents['protocol']!r}")
        multi_label = contents["protocol"].get("activation") == "sigmoid"
        videos = {row["id"]: _parse_row(row, multi_label) for row in rows}
        if len(videos) != contents["num_videos"]:
            raise ValueError(
                f"{table.name} has {len(videos)} videos, {path.name} has {contents['num_videos']}"
            )
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename}: not found; choose the eval.json of a finished evaluation, with the "
            "eval_videos.csv in the same folder"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(
            f"{path}: this file or {table.name} in its folder is damaged ({one_line(error)}); "
            "choose another evaluation"
        ) from None
    return {"labels": None} | contents | {"videos": videos, "path": with_addresses(str(path))}


def _find_report(report: str | Path) -> Path:
    """Return the path of an `eval.json`. A remote one is copied, with its table beside it."""
    if not remote.is_remote(report):
        path = Path(report)
        return path / "eval.json" if path.is_dir() else path
    address = remote.to_address(report)
    address = address if address.endswith(".json") else f"{address}/eval.json"
    remote.complete_copy(f"{address.rpartition('/')[0]}/eval_videos.csv")
    return remote.complete_copy(address)


def _parse_row(row: dict[str, str], multi_label: bool) -> dict[str, str | bool]:
    classes = json.loads(row["label"]) if multi_label else [row["label"]]
    top5_correct = not {*classes}.isdisjoint(json.loads(row["top5"]))
    return {**row, "correct": row["correct"] == "1", "top5_correct": top5_correct}


def check_shared(
    before: dict, ids: Iterable[str], labels: Collection[str] | None, *, name: str = "the data"
) -> None:
    """Refuse to compare evaluations that share no video or have different classes.

    Some class names may differ, because spelling mistakes are corrected between evaluations.

    Args:
        before: The evaluation to compare with, from `read_table`.
        ids: Ids of the videos of the other evaluation.
        labels: Class names of the other evaluation; None: unknown, not checked.
        name: Name of the other evaluation, for the message.

    Raises:
        InputError: No video or no class name is shared, or the number of classes differs.
    """
    if before["videos"].keys().isdisjoint(ids):
        raise InputError(
            f"{before['path']} shares no video with {name}; choose an evaluation of the same list"
        )
    if labels is None or before["labels"] is None:
        return
    counts = len(before["labels"]), len(labels)
    if counts[0] != counts[1]:
        problem = f"has {counts[0]} classes, {name} has {counts[1]}"
    elif {*labels}.isdisjoint(before["labels"]):
        problem = f"shares no class name with {name}"
    else:
        return
    raise InputError(f"{before['path']} {problem}; choose an evaluation of the same classes")


def compare_tables(before: dict, after: dict) -> dict:
    """Compare two evaluations video by video.

    Args:
        before: The first evaluation, from `read_table`.
        after: The second evaluation. It must share a video with the first (see `check_shared`).

    Returns:
        The contents of `comparison.json`: the result of `metrics.compare_hits`, and

        - `before` and `after`: the `eval.json` of the two evaluations.
        - `accuracies`: `top1`, `top5` and `mean_class_accuracy` on the shared videos, each a pair
          of percentages: before and after. In multi-label data `top1` and `top5`, and, if all
          videos are shared, `mAP`.
        - `classes`: per class with shared videos, `num_videos` and the accuracies `before` and
          `after` in percent. In multi-label data, the average precisions if all videos are shared.
        - `gained_videos`, `lost_videos` and `still_wrong_videos`: ids of the shared videos whose
          prediction changed from wrong to right, from right to wrong, and from one wrong class to
          another; `still_wrong`: the number of the latter.
        - `only_before`, `only_after`: numbers of videos that are not shared; `relabelled`: number
          of shared videos with different labels.
        - `same_protocol`, and `protocol_changes`: a message per field that differs.

    Raises:
        InputError: Only one of the evaluations is of multi-label data.
    """
    if ("mAP" in before) != ("mAP" in after):
        raise InputError(
            f"{before['path']} and {after['path']}: only one of them is of multi-label data; "
            "choose two evaluations of the same data"
        )
    shared = [id_ for id_ in after["videos"] if id_ in before["videos"]]
    rows = [[table["videos"][id_] for id_ in shared] for table in (before, after)]
    was_right, is_right = hits = _column(rows, "correct")
    predictions, labels = _column(rows, "prediction"), _column(rows, "label")
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
    protocol_changes = differences(*protocols, there="before", here="after")
    only_before, only_after = (len(table["videos"]) - len(shared) for table in (before, after))
    if "mAP" not in after:
        classes = _compare_accuracies(labels[1], hits)
        sides = ([row[side] for row in classes.values()] for side in ("before", "after"))
        means = {"mean_class_accuracy": [float(np.mean(side)) for side in sides]}
    elif only_before or only_after:
        classes, means = {}, {}  # the average precisions in the reports are those of other videos
    else:
        classes, means = _compare_precisions(before, after), {"mAP": [before["mAP"], after["mAP"]]}
    return compare_hits(was_right, is_right) | {
        "before": before["path"],
        "after": after["path"],
        "accuracies": {
            "top1": [accuracy(side) for side in hits],
            "top5": [accuracy(side) for side in _column(rows, "top5_correct")],
            **means,
        },
        "same_protocol": not protocol_changes,
        "protocol_changes": list(protocol_changes.values()),
        "only_before": only_before,
        "only_after": only_after,
        "relabelled": int((labels[0] != labels[1]).sum()),
        "still_wrong": len(changes["still_wrong"]),
        "classes": classes,
        **{f"{name}_videos": videos for name, videos in changes.items()},
    }


def _compare_accuracies(labels: np.ndarray, hits: np.ndarray) -> dict[str, dict]:
    """Return the number of videos and the two accuracies of each class, in percent."""
    return {
        str(label): {
            "num_videos": int(mask.sum()),
            "before": accuracy(hits[0][mask]),
            "after": accuracy(hits[1][mask]),
        }
        for label in np.unique(labels)
        for mask in [labels == label]
    }


def _compare_precisions(before: dict, after: dict) -> dict[str, dict]:
    """Return the number of videos and the average precisions of each class, in percent."""
    counts = Counter(name for row in after["videos"].values() for name in json.loads(row["label"]))
    return {
        name: {"num_videos": counts[name], "before": before["per_class_ap"][name], "after": value}
        for name, value in after["per_class_ap"].items()
        if value is not None and before["per_class_ap"].get(name) is not None
    }


def _column(rows: Sequence[Sequence[dict]], name: str) -> np.ndarray:
    """Return a column of two tables, `(2, n)`."""
    return np.array([[row[name] for row in side] for side in rows])


def save_comparison(folder: Path, comparison: dict) -> Path:
    """Write `comparison.json` in a folder; return its path.

    Raises:
        InputError: The file cannot be written.
    """
    return write_json(folder / FILE, comparison)


def describe(comparison: dict) -> list[str]:
    """Return a description of a comparison, one line per topic.

    Args:
        comparison: The result of `compare_tables`.
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
    if comparison["protocol_changes"]:
        lines.append(f"the protocols differ: {'; '.join(comparison['protocol_changes'])}")
    if comparison["relabelled"]:
        lines.append(f"labels differ for {comparison['relabelled']} of the shared videos")
    only_before, only_after = comparison["only_before"], comparison["only_after"]
    if only_before or only_after:
        lines.append(
            f"videos not shared: {only_before} only in {comparison['before']}, "
            f"{only_after} only in {comparison['after']}"
        )
    for name in ("gained", "lost", "still_wrong"):
        videos = comparison[f"{name}_videos"]
        if videos:
            names = ", ".join(map(printable, videos[:MAX_NAMED]))
            more = f" and {len(videos) - MAX_NAMED} more" if len(videos) > MAX_NAMED else ""
            lines.append(f"{name.replace('_', ' ')}: {names}{more}")
    return lines


def format_tables(comparison: dict) -> str:
    """Return two tables of accuracies in percent: overall, and of the classes that changed most.

    Args:
        comparison: The result of `compare_tables`.
    """
    names = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class accuracy"}
    names["mAP"] = "mAP"
    overall = [
        (names[name], comparison["num_videos"], *pair)
        for name, pair in comparison["accuracies"].items()
    ]
    classes = [(printable(name), *row.values()) for name, row in comparison["classes"].items()]
    changed = [row for row in classes if row[2] != row[3]]
    changed.sort(key=lambda row: -abs(row[3] - row[2]))
    shown = changed[:MAX_CLASSES]
    width = max(len(name) for name, *_ in overall + shown)

    def format_rows(title: str, rows: Sequence[tuple[str, int, float, float]]) -> list[str]:
        lines = [f"{title:{width}}  videos  before   after  difference"]
        for name, count, *pair in rows:
            before, after = (f"{value:6.2f}" for value in pair)
            change = f"{pair[1] - pair[0]:+10.2f}"
            lines.append(f"{name:{width}}  {count:6}  {before}  {after}  {change}")
        return lines

    lines = format_rows("accuracy in %", overall)
    if shown:
        lines += ["", *format_rows("class", shown)]
    if more := len(changed) - len(shown):
        lines.append(f"and {more} more classes")
    return "\n".join(lines)
