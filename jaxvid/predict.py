"""Classify video files: the command `jaxvid predict`."""

if __name__ == "__main__":  # before the slow imports below
    from jaxvid import entry_point

    entry_point.run("jaxvid.predict")

import argparse
import functools
import glob
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxvid import parsers
from jaxvid.atomic import check_output, output_path, write_file
from jaxvid.data import folder_scan
from jaxvid.data.folder_scan import Skipped
from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.errors import InputError, printable
from jaxvid.inference.class_timeline import KINDS
from jaxvid.inference.classifier import Classifier

MAX_EXIT_CODE = 99
DEFAULT_BATCH_VIEWS = 8  # views per batch, summed over its videos


def expand(inputs: Sequence[str], skipped: Skipped | None = None) -> tuple[list[str], list[dict]]:
    """Return the video files that the inputs on the command line stand for.

    Args:
        inputs: Files, with any suffix; folders, which stand for all videos below them, sorted; and
            patterns in the syntax of `glob`, including `**`. An existing path is not a pattern.
        skipped: Counter of the files and subfolders that are skipped in folders.

    Returns:
        The videos without duplicates, and `{"video", "error"}` for each input without videos and
        for each folder that cannot be read.
    """
    videos, failures = {}, []
    for name in inputs:
        is_pattern = glob.has_magic(name) and not os.path.lexists(name)
        matches = sorted(glob.glob(name, recursive=True)) if is_pattern else [name]
        if not matches:
            failures.append({"video": name, "error": f"{name}: no file matches this pattern"})
        for path in matches:
            files, errors = list_videos(path, skipped) if os.path.isdir(path) else ([path], [])
            videos |= dict.fromkeys(files)
            failures += [{"video": path, "error": printable(error)} for error in errors]
    return list(videos), failures


def list_videos(folder: str, skipped: Skipped | None = None) -> tuple[list[str], list[str]]:
    """List the videos below a folder.

    Args:
        folder: The folder.
        skipped: Counter of the files and subfolders that are skipped.

    Returns:
        The videos, sorted within each folder; and one error message per folder that cannot be read.
        If all folders can be read but contain no videos, one error message says so.
    """
    unreadable, files = [], []
    skipped = Skipped() if skipped is None else skipped
    for root, folders, names in os.walk(folder, onerror=unreadable.append):
        folders.sort()
        paths = {name: os.path.join(root, name) for name in names}
        for name in folders:
            if os.path.islink(os.path.join(root, name)):  # not followed, as links may form a loop
                skipped.add(folder_scan.LINKED_FOLDER)
        entries = ((name, functools.partial(os.path.isfile, path)) for name, path in paths.items())
        files += [paths[name] for name in folder_scan.pick_videos(entries, skipped)]
    errors = [f"{error.filename}: cannot be read ({error.strerror})" for error in unreadable]
    if not files and not errors:
        errors.append(f"{folder}: contains no videos ({', '.join(folder_scan.VIDEO_SUFFIXES)})")
    return files, errors


def predict(
    videos: Sequence[str | Path],
    folder: str | Path,
    *,
    top_k: int = 5,
    batch_size: int | None = None,
    num_clips: int | None = None,
    num_crops: int | None = None,
    dtype: str = "float32",
) -> Iterator[dict]:
    """Classify videos with a model folder.

    Args:
        videos: Video files.
        folder: Model folder, or another name of a model; see `resolve_model`.
        top_k: Number of classes to return.
        batch_size: Videos per batch; None: 8 divided by the number of views per video, but at least
            1 and at most the number of videos.
        num_clips: Clips per video; None: from the model card.
        num_crops: Crops per clip, 1 or 3; None: from the model card.
        dtype: Compute dtype, one of `precision.DTYPES`.

    Yields:
        `Prediction.to_json()` of each video, in order.

    Raises:
        InputError: The model folder is unusable, or a value is out of range.
    """
    classifier = Classifier(
        folder,
        batch_size=1 if batch_size is None else batch_size,
        num_clips=num_clips,
        num_crops=num_crops,
        dtype=dtype,
    )
    if batch_size is None:
        num_views = classifier.spec.num_clips * classifier.spec.num_crops
        classifier.batch_size = max(1, min(DEFAULT_BATCH_VIEWS // num_views, len(videos)))
    for prediction in classifier.stream(videos, top_k):
        yield prediction.to_json()


def print_line(text: str) -> None:
    """Print a line to stdout; escape bytes of file names that are not UTF-8, as JSON does."""
    print(text.encode("utf-8", "backslashreplace").decode(), flush=True)


def print_result(result: dict, *, as_json: bool) -> None:
    """Print a result. A failure goes to stderr, and with `as_json` also to stdout."""
    if as_json:
        print_line(json.dumps(result, ensure_ascii=False))
    elif "error" not in result:
        padded = ", too short for a clip: frames are repeated" if result["padded"] else ""
        print_line(f"{printable(result['video'])}  ({result['seconds']:.3f} s{padded})")
        for entry in result["top"]:
            print_line(f"  {100 * entry['probability']:5.1f} %  {entry['label']}")
    if "error" in result:
        print(f"failed: {result['error']}", file=sys.stderr, flush=True)


def run(videos: Sequence[str], args: argparse.Namespace) -> Iterator[dict]:
    """Classify whole videos, or sliding windows of one video if `--window` is given.

    Yields:
        The result of each video, from `predict`. The results of windows are not yielded but printed
        or written; only a decode error is yielded.

    Raises:
        InputError: An option or the model folder is unusable.
    """
    if args.window is None:
        options = {"num_clips": args.clips, "num_crops": args.crops}
        options |= {"top_k": args.top_k, "batch_size": args.batch_size, "dtype": args.dtype}
        yield from predict(videos, args.model, **options)
        return
    if error := _classify_windows(videos[0], args):
        yield {"video": videos[0], "error": error}


def _classify_windows(video: str, args: argparse.Namespace) -> str:
    """Classify sliding windows and write or print them; return the decode error or ""."""
    size = 1 if args.batch_size is None else args.batch_size
    classifier = Classifier(args.model, batch_size=size, num_crops=args.crops, dtype=args.dtype)
    try:
        timeline = classifier.windows(video, args.window, args.stride)
    except DecodeError as error:
        return str(error)
    if args.output:
        for path in timeline.save(args.output, args.top_k):
            print_line(str(path))
        return ""
    for row in timeline.rows(args.top_k):
        if args.json:
            print_line(json.dumps({"video": video, **row}, ensure_ascii=False))
            continue
        top = ", ".join(f"{e['label']} {100 * e['probability']:.1f} %" for e in row["top"])
        print_line(f"{row['start']:9.2f} to {row['end']:9.2f} s  {top}")
    return ""


def check_options(args: argparse.Namespace, num_videos: int) -> None:
    """Refuse invalid or conflicting options, and output files that cannot be written.

    Args:
        args: The parsed command line.
        num_videos: Number of videos to classify.

    Raises:
        InputError: The message names the option.
    """
    writes_json = args.json not in (None, parsers.STDOUT)
    if writes_json and not args.json.endswith(".json"):
        raise InputError(
            f"--json {args.json}: the output file must end in .json; to print JSON instead, put "
            "--json last or before another option"
        )
    if args.top_k < 1:
        raise InputError(f"--top_k={args.top_k}: must be at least 1")
    if args.window is None:
        for name in ("stride", "output"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name} needs --window SECONDS")
        if writes_json:
            check_output("--json", output_path(args.json))
        return
    if args.stride is None:
        raise InputError("--window needs --stride SECONDS, the time between the starts of windows")
    if num_videos != 1:
        raise InputError(f"--window: expected one video, got {num_videos}; run once per video")
    if args.clips is not None:
        raise InputError("--clips cannot be combined with --window: every window is one clip")
    if writes_json:
        raise InputError(
            f"--json {args.json} cannot be combined with --window; use --output PREFIX"
        )
    for kind in KINDS if args.output else ():
        check_output("--output", output_path(f"{args.output}.{kind}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parsers.predict().parse_args(argv)
    results, skipped = [], Skipped()
    try:
        videos, failures = expand(args.inputs, skipped)
        if counts := str(skipped):
            print(f"skipped in folders: {counts}", file=sys.stderr)
        if not videos:
            raise InputError("; ".join(failure["error"] for failure in failures))
        check_options(args, len(videos))
        for result in itertools.chain(run(videos, args), failures):
            print_result(result, as_json=args.json == parsers.STDOUT)
            results.append(result)
        if args.json not in (None, parsers.STDOUT):
            lines = ",\n".join(json.dumps(result, ensure_ascii=False) for result in results)
            data = f"[\n{lines}\n]\n".encode("utf-8", "backslashreplace")
            write_file(output_path(args.json), data)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE
    if failed := sum("error" in result for result in results):
        print(f"{failed} of {len(failures) + len(videos)} failed", file=sys.stderr)
    return min(failed, MAX_EXIT_CODE)
