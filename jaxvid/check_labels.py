"""Check the order of a model's class names: the command `jaxvid check-labels`."""

if __name__ == "__main__":  # before the imports below, which take seconds
    from jaxvid import entry_point

    entry_point.run("jaxvid.check_labels")

import argparse
import collections
import contextlib
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxvid import parsers
from jaxvid.atomic import check_output, output_path, write_file
from jaxvid.data.class_names import (
    PUBLIC_DATASETS,
    class_names,
    names_classes,
    read_class_names,
)
from jaxvid.data.gather import gather
from jaxvid.data.kinetics_ssv2 import is_kinetics
from jaxvid.data.records import Record, VideoFiles
from jaxvid.data.video_lists import read_list, read_names
from jaxvid.errors import InputError, printable
from jaxvid.evaluation.class_order import NameIndex, Verdict, compare_orders, known_orders
from jaxvid.inference.classifier import Classifier
from jaxvid.models import family_of, make_model_config
from jaxvid.progress import Progress
from jaxvid.storage import model_card
from jaxvid.weights.resolve import resolve_model

OTHER_ORDER = 3  # exit code if another order fits better
UNDECIDED = 4  # exit code if nothing can be concluded
SPLITS = ("val", "test", "train")  # the first of them that the videos have is used


def read_videos(path: Path) -> tuple[VideoFiles, list[str]]:
    """Return labelled videos, and the class names that their labels are indices of.

    Args:
        path: Class folders, a data folder, or a list.

    Raises:
        InputError: There are no videos, or the classes have no names.
    """
    is_list = not os.path.isdir(path) and path.suffix != ".json" and not is_kinetics(path)
    if is_list and not names_classes(path.parent):
        names = read_names([path])
        records = read_list(path, None, labels=names, missing="keep")
    else:
        splits, names = gather([path])
        records = next(splits[split] for split in (*SPLITS, *splits) if split in splits)
    if all(name.isdecimal() for name in names):
        raise InputError(
            f"{path}: the classes have numbers instead of names; write path,class name in each "
            "line, or add labels.txt"
        )
    return records, names


def select_videos(records: Sequence[Record], count: int) -> list[Record]:
    """Return at most `count` videos, with as many classes as possible."""
    ranks, seen = [], collections.Counter()
    for record in records:
        ranks.append(seen[record.label])
        seen[record.label] += 1
    order = sorted(range(len(records)), key=lambda i: ranks[i])  # the sort is stable
    return [records[i] for i in sorted(order[:count])]


def find_labels(
    records: Sequence[Record], video_names: Sequence[str], names: Sequence[str], source: Path
) -> np.ndarray:
    """Return the class index of each video in the model's names.

    Raises:
        InputError: A class of the videos is not a class of the model, or the list is multi-label.
    """
    if several := [record.id for record in records if isinstance(record.label, tuple)]:
        raise InputError(
            f"{source}: {several[0]} has several classes; choose a list with one class per video"
        )
    index, labels = NameIndex(names), {}
    for label in {record.label for record in records}:
        name = video_names[label]
        labels[label] = index.find(name)
        if labels[label] is None:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else "choose videos of its classes"
            raise InputError(f"{source}: {name!r} is not a class of the model; {hint}")
    return np.array([labels[record.label] for record in records])


def model_names(
    card: dict[str, Any], folder: str, others: dict[str, list[str]]
) -> tuple[list[str], bool]:
    """Return a model's class names, and whether they are those of its model card.

    Without names in the card, those of the first --labels file are used, or those of the public
    data set with the same number of classes.

    Raises:
        InputError: There are no such names.
    """
    if card["labels"] is not None:
        return [str(label) for label in card["labels"]], True
    count = card["config"]["num_classes"]
    public = [class_names(dataset) for dataset in PUBLIC_DATASETS]
    candidates = [*others.values(), *(names for names in public if len(names) == count)]
    if not candidates:
        raise InputError(
            f"{folder}: the model card has no class names; pass {count} names with --labels FILE"
        )
    return list(candidates[0]), False


def expected_top1(card: dict[str, Any]) -> float | None:
    """Return the top-1 accuracy of a model in percent, or None if it is not known.

    It is that of the training run, or the published one of a converted checkpoint.
    """
    config, provenance = make_model_config(**card["config"]), card["provenance"]
    top1, family = provenance.get("top1"), family_of(config)
    if isinstance(top1, int | float):
        return float(top1)
    released = family.released_classes.get(config.name)
    if released is None or provenance.get("kind") != family.name:
        return None
    return released.top1 if config.num_classes == len(class_names(released.dataset)) else None


def classify(classifier: Classifier, records: Sequence[Record]) -> tuple[np.ndarray, list[str]]:
    """Return the index of the highest output for each video, -1 after an error; and the errors."""
    outputs, errors = [], []
    with contextlib.closing(Progress(len(records), title="classifying", unit="video")) as progress:
        for prediction in classifier.stream([record.path for record in records], top_k=1):
            outputs.append(-1 if prediction.error else prediction.indices[0])
            errors += [prediction.error] * bool(prediction.error)
            progress.advance(1)
    return np.array(outputs), errors


def run(args: argparse.Namespace) -> int:
    """Compare the orders, print the result and write the best order; return the exit code.

    Raises:
        InputError: An option, the model folder or the videos are unusable.
    """
    if args.max_videos < 1:
        raise InputError(f"--max_videos={args.max_videos}: must be at least 1")
    if args.output:
        if not args.output.endswith(".txt"):
            raise InputError(f"--output {args.output}: the file name must end in .txt")
        check_output("--output", output_path(args.output))
    folder = resolve_model(args.model)
    card = model_card.load_card(folder)
    num_classes = card["config"]["num_classes"]
    others = {str(path): read_class_names(path, num_classes) for path in args.labels}
    names, is_stored = model_names(card, folder, others)
    orders = known_orders(names, stored=is_stored, others=others)
    records, video_names = read_videos(args.videos)
    records = select_videos(records, args.max_videos)
    labels = find_labels(records, video_names, names, args.videos)

    classifier = Classifier(folder, num_clips=args.clips, num_crops=args.crops)
    outputs, errors = classify(classifier, records)
    for error in errors:
        print(f"failed: {printable(error)}", file=sys.stderr)
    is_decoded = outputs >= 0
    if not is_decoded.any():
        raise InputError(f"{args.videos}: no video can be decoded; choose other videos")
    labels, outputs = labels[is_decoded], outputs[is_decoded]
    print(f"{args.model}: {len(names)} classes; names: {_describe_source(card)}")
    failed = f", {len(errors)} not decoded and left out" if errors else ""
    print(f"{args.videos}: {len(labels)} videos of {len({*labels})} classes{failed}\n")
    top1 = expected_top1(card) if args.expected_top1 is None else args.expected_top1
    verdict = compare_orders(orders, outputs, labels, names, top1)
    print("\n".join(verdict.lines))
    _apply(verdict, names, args.output)
    if verdict.is_plausible:
        return 0
    return UNDECIDED if verdict.best is None else OTHER_ORDER


def _describe_source(card: dict[str, Any]) -> str:
    if card["labels"] is None:
        return "none in the model card"
    return card["labels_source"] or "from the training data or unknown"


def _apply(verdict: Verdict, names: Sequence[str], output: str | None) -> None:
    """Write the names in the best order, and print how to apply it."""
    if verdict.best is None:
        if output:
            print(f"{output} is not written")
        return
    if output:
        text = "".join(f"{names[c]}\n" for c in verdict.best.classes)
        write_file(output_path(output), text.encode())
        print(f"{output}: the class names in this order")
    if not verdict.is_plausible:
        file = output or "the file that --output FILE.txt writes"
        print(f"To apply the order, convert the weights again with --labels and {file}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        return run(parsers.check_labels().parse_args(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE
