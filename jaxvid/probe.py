"""Linear and k-NN accuracy on features of a frozen network: the command `jaxvid probe`."""

if __name__ == "__main__":  # before the slow imports below
    from jaxvid import entry_point

    entry_point.run("jaxvid.probe")

import argparse
import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxvid import parsers
from jaxvid.atomic import check_output, output_path, write_json
from jaxvid.data.records import NO_LABEL
from jaxvid.errors import InputError, import_or_explain, printable
from jaxvid.evaluation.probing import ProbeData, ProbeResult, hold_out, probe
from jaxvid.progress import Progress
from jaxvid.storage.feature_file import FeatureTable, load_features

SAME_FIELDS = ("weights_sha256", "layer")  # must be equal in both files
UNKNOWN_CLASS = -1  # label of validation videos whose class is not in the training data


def parse_neighbours(text: str) -> list[int]:
    """Parse the option `--k`.

    Raises:
        InputError: It is not a list of positive integers.
    """
    if not re.fullmatch(r"[1-9][0-9]{0,6}(,[1-9][0-9]{0,6})*", text):
        raise InputError(f"--k {text}: must be positive numbers separated by commas, e.g. 1,5,20")
    return sorted({int(k) for k in text.split(",")})


def read_data(path: Path) -> tuple[FeatureTable, ProbeData]:
    """Read a file of features; average features of frames over the frames.

    Raises:
        InputError: The file is unreadable, empty, or has videos without labels.
    """
    table = load_features(path)
    unlabelled = int((table.labels == NO_LABEL).sum())
    if unlabelled or not len(table.ids):
        raise InputError(
            f"{path}: {unlabelled} of {len(table.ids)} rows have no label; extract features of "
            "class folders, or of a list with labels"
        )
    features = table.features if table.features.ndim == 2 else table.features.mean(axis=1)
    return table, ProbeData(features=features, labels=table.labels, ids=table.ids)


def check_same_model(train: FeatureTable, val: FeatureTable, args: argparse.Namespace) -> None:
    """Refuse features of different models or layers.

    Raises:
        InputError: The message names the difference.
    """
    for name in SAME_FIELDS:
        if train.about.get(name) != val.about.get(name):
            values = f"{train.about.get(name)} in {args.train}, {val.about.get(name)} in {args.val}"
            raise InputError(f"{name}: {values}; extract both files with the same model and layer")


def align_labels(val: FeatureTable, names: Sequence[str]) -> np.ndarray:
    """Return the labels of the validation rows as indices of the training data's class names."""
    index = {name: i for i, name in enumerate(names)}
    return np.array([index.get(val.label_names[c], UNKNOWN_CLASS) for c in val.labels.tolist()])


def find_shared(train: ProbeData, val: ProbeData) -> int:
    """Return the number of validation rows whose id and features also occur in the training data.

    The ids alone are not compared: files in different folders may have the same name.
    """
    keys = [
        {(id_, row.tobytes()) for id_, row in zip(data.ids, data.features, strict=True)}
        for data in (train, val)
    ]
    return len(keys[0] & keys[1])


def load(args: argparse.Namespace) -> tuple[ProbeData, ProbeData, list[str], list[str]]:
    """Read the files of the command line.

    Returns:
        Training data; validation data; names of the classes; and lines about the data.

    Raises:
        InputError: A file is unusable, the files do not fit each other, or `--val_share` does not
            fit the options.
    """
    if (args.val is None) == (args.val_share is None):
        raise InputError("give either VAL, a second file of features, or --val_share, e.g. 0.2")
    if args.val_share is not None and not 0 < args.val_share < 1:
        raise InputError(f"--val_share={args.val_share:g}: must be above 0 and below 1")
    train_table, train = read_data(args.train)
    names, notes = train_table.label_names, []
    if args.val is None:
        is_val = hold_out(train, args.val_share)
        if not is_val.any():
            raise InputError(f"{args.train}: every class has only one video; give VAL")
        train, val = train.select(~is_val), train.select(is_val)
    else:
        val_table, val = read_data(args.val)
        check_same_model(train_table, val_table, args)
        labels = align_labels(val_table, names)
        labels = np.where(np.isin(labels, train.labels), labels, UNKNOWN_CLASS)
        val = ProbeData(features=val.features, labels=labels, ids=val.ids)
        unknown = len({id_ for id_, c in zip(val.ids, labels, strict=True) if c == UNKNOWN_CLASS})
        if unknown == len({*val.ids}):
            raise InputError(f"{args.val}: none of its classes is in {args.train}")
        if unknown:
            notes.append(
                f"{unknown} of {len({*val.ids})} validation videos count as wrong, because their "
                f"classes are not in {args.train}"
            )
        if shared := find_shared(train, val):
            notes.append(
                f"{shared} of {len(val.ids)} rows of {args.val} are also in {args.train}, so that "
                "the accuracy is too high"
            )
    if len({*train.labels.tolist()}) < 2:
        raise InputError(f"{args.train}: all videos have the same class; at least two are needed")
    about = train_table.about
    layer = "frames, averaged" if train_table.features.ndim == 3 else about["layer"]
    notes.insert(
        0,
        f"{about['model']}, layer {layer}: {train.features.shape[1]} features; "
        f"{len({*train.ids})} training and {len({*val.ids})} validation videos, "
        f"{len({*train.labels.tolist()})} classes",
    )
    return train, val, names, notes


def format_table(results: Sequence[ProbeResult]) -> list[str]:
    """Return the lines of a table of the results."""
    rows = [("probe", "top-1", "95 % interval", "top-5", "95 % interval")]
    for result in results:
        values, cells = result.to_json(), [result.name]
        for name in ("top1", "top5"):
            if values[name] is None:
                cells += ["-", ""]
                continue
            low, high = values[f"{name}_interval"]
            cells += [f"{values[name]:.2f} %", f"{low:.2f} to {high:.2f}"]
        rows.append(tuple(cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def run(args: argparse.Namespace) -> None:
    """Fit the probes, print the table and write the results.

    Raises:
        InputError: An option or a file is unusable, or scikit-learn is not installed.
    """
    neighbours = parse_neighbours(args.k)
    output = args.json and output_path(args.json)
    if output:
        if output.suffix != ".json":
            raise InputError(f"--json {args.json}: the file name must end in .json")
        check_output("--json", output)
    import_or_explain("sklearn", "scikit-learn", "jaxvid probe needs")
    train, val, names, notes = load(args)
    usable = [k for k in neighbours if k <= len(train.ids)]
    if len(usable) < len(neighbours):
        notes.append(f"k above {len(train.ids)}, the number of training rows, is left out")
    for note in notes:
        print(printable(note))
    results = []
    with contextlib.closing(Progress(1 + len(usable), title="fitting", unit="probe")) as bar:
        for result in probe(train, val, len(names), usable):
            results.append(result)
            bar.advance(1)
    print("", *format_table(results), *filter(None, (r.note for r in results)), sep="\n")
    if output:
        report = {"train": str(args.train), "val": args.val and str(args.val)}
        report |= {"val_share": args.val_share, "num_train": len({*train.ids})}
        report |= {"num_val": len({*val.ids}), "num_classes": len({*train.labels.tolist()})}
        write_json(output, report | {"probes": [result.to_json() for result in results]})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 if the input is unusable."""
    try:
        run(parsers.probe().parse_args(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE
    return 0
