"""Classify videos: the command `jaxvid predict`."""

if __name__ == "__main__":  # before the slow imports below
    from jaxvid import entry_point

    entry_point.run("jaxvid.predict")

import argparse
import csv
import glob
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxvid import parsers, remote
from jaxvid.atomic import check_output, is_same_file, output_path, replacing, write_file
from jaxvid.block_cache import address_of
from jaxvid.data.folder_scan import VIDEO_SUFFIXES, Skipped, list_videos
from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.errors import InputError, printable
from jaxvid.inference.inputs import Source, VideoInput, is_url, is_web_address
from jaxvid.inference.results import PREDICTION_COLUMNS, describe_class, prediction_rows
from jaxvid.model_path import check_model_path

if TYPE_CHECKING:
    from jaxvid.inference.annotated_video import Classes
    from jaxvid.inference.class_timeline import ClassTimeline

# Modules that need JAX or Matplotlib are imported in functions, after the command line was checked,
# so that a wrong model folder or option is reported at once.

STDIN = "-"  # input that stands for the standard input
SOME_FAILED = 3  # exit code
DEFAULT_BATCH_VIEWS = 8  # views per batch, summed over its videos


def expand(inputs: Sequence[str], skipped: Skipped | None = None) -> tuple[list[str], list[dict]]:
    """Return the videos that the inputs on the command line stand for.

    Args:
        inputs: Files, with any suffix; URLs; `-`; folders, which stand for all videos below them,
            sorted; and patterns in the syntax of `glob`, including `**`. An existing path is not a
            pattern.
        skipped: Counter of the files and subfolders that are skipped in folders.

    Returns:
        The videos without duplicates, and `{"video", "error"}` for each input without videos and
        for each folder that cannot be read.
    """
    videos, failures = {}, []
    for name in inputs:
        is_pattern = glob.has_magic(name) and not os.path.lexists(name) and not is_url(name)
        matches = sorted(glob.glob(name, recursive=True)) if is_pattern else [name]
        if not matches:
            failures.append({"video": name, "error": f"{name}: no file matches this pattern"})
        for path in matches:
            folder = _copy_folder(path)
            files, errors = list_videos(folder, skipped) if os.path.isdir(folder) else ([path], [])
            videos |= dict.fromkeys(address_of(file) or file for file in files)
            failures += [{"video": path, "error": printable(error)} for error in errors]
    return list(videos), failures


def _copy_folder(name: str) -> str:
    """Return the path of the copy of a folder in an object store; return other inputs unchanged."""
    is_store = remote.is_remote(name) and not is_web_address(name)
    is_folder = is_store and not name.lower().endswith(VIDEO_SUFFIXES)
    return str(remote.local_path(name)) if is_folder else name


def predict(
    videos: Sequence[Source | VideoInput],
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
        videos: The videos; see `Classifier`.
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
    from jaxvid.inference.classifier import Classifier

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


def csv_lines(result: dict) -> str:
    """Return the rows of a result as CSV, without the header."""
    table = io.StringIO()
    writer = csv.DictWriter(table, PREDICTION_COLUMNS, lineterminator="\n")
    writer.writerows(prediction_rows(result))
    return table.getvalue()


def print_result(result: dict, output_format: str) -> None:
    """Print a result as `text`, `json` or `csv`. A failure is also printed on stderr."""
    if output_format == "json":
        print_line(json.dumps(result, ensure_ascii=False))
    elif output_format == "csv":
        print_line(csv_lines(result).removesuffix("\n"))
    elif "top" in result:
        padded = ", too short for a clip: frames are repeated" if result["padded"] else ""
        print_line(f"{printable(result['video'])}  ({result['seconds']:.3f} s{padded})")
        for entry in result["top"]:
            print_line(describe_class(entry["label"], entry["probability"]))
    if "error" in result:
        print(f"failed: {result['error']}", file=sys.stderr, flush=True)


def write_results(results: Sequence[dict], args: argparse.Namespace) -> None:
    """Write the results to the files of `--json` and `--csv`, if they are given.

    Raises:
        InputError: A file cannot be written.
    """
    if args.json not in (None, parsers.STDOUT):
        counts = json.dumps(count_failures(results))[1:-1]
        lines = ",\n".join(json.dumps(result, ensure_ascii=False) for result in results)
        _write_text(args.json, f'{{{counts}, "videos": [\n{lines}\n]}}\n')
    if args.csv not in (None, parsers.STDOUT):
        header = ",".join(PREDICTION_COLUMNS)
        _write_text(args.csv, f"{header}\n{''.join(map(csv_lines, results))}")


def _write_text(file: str, text: str) -> None:
    write_file(output_path(file), text.encode("utf-8", "backslashreplace"))


def count_failures(results: Sequence[dict]) -> dict[str, int]:
    """Return the number of results with an error, and of all results."""
    return {"failed": sum("error" in result for result in results), "total": len(results)}


def run(videos: Sequence[VideoInput], args: argparse.Namespace) -> Iterator[dict]:
    """Classify whole videos, or sliding windows of one video if `--window` is given.

    Yields:
        The result of each video, from `Prediction.to_json`. The results of windows are not yielded
        but printed or written; only a decode error is yielded.

    Raises:
        InputError: An option or the model folder is unusable.
    """
    if args.window is not None:
        yield from _classify_windows(videos[0], args)
        return
    options = {"num_clips": args.clips, "num_crops": args.crops}
    options |= {"top_k": args.top_k, "batch_size": args.batch_size, "dtype": args.dtype}
    if not args.output:
        yield from predict(videos, args.model, **options)
        return
    with videos[0] as video:  # a download is kept until the classes are drawn
        [result] = predict([video], args.model, **options)
        if "error" not in result:
            top = [(entry["label"], entry["probability"]) for entry in result["top"]]
            result |= _annotate(video, top, args.output)
        yield result


def _classify_windows(video: VideoInput, args: argparse.Namespace) -> Iterator[dict]:
    """Classify sliding windows and write or print them; yield a decode error."""
    from jaxvid.inference.classifier import Classifier

    size = 1 if args.batch_size is None else args.batch_size
    classifier = Classifier(args.model, batch_size=size, num_crops=args.crops, dtype=args.dtype)
    with video:
        try:
            timeline = classifier.windows(video, args.window, args.stride)
        except DecodeError as error:
            yield {"video": video.id, "error": str(error)}
            return
        if args.output and not is_annotated(args.output):
            for path in timeline.save(args.output, args.top_k):
                print_line(str(path))
            return
        _print_timeline(timeline, args)
        if args.output and (failure := _annotate(video, timeline, args.output)):
            yield {"video": video.id, **failure}


def _print_timeline(timeline: "ClassTimeline", args: argparse.Namespace) -> None:
    """Print the windows as text, JSON or CSV."""
    if args.csv:
        print_line(timeline.to_csv(args.top_k).removesuffix("\n"))
        return
    lines = timeline.lines(args.top_k)
    for line, row in zip(lines, timeline.rows(args.top_k), strict=True):
        json_row = {"video": timeline.video, **row}
        print_line(json.dumps(json_row, ensure_ascii=False) if args.json else line)


def is_annotated(output: str) -> bool:
    """Return whether the value of `--output` is an annotated video and not a prefix."""
    return output.lower().endswith(".mp4")


def _annotate(video: VideoInput, classes: "Classes", output: str) -> dict[str, str]:
    """Write the annotated video; return `{"error"}` if a frame cannot be decoded, otherwise `{}`.

    Raises:
        InputError: The file cannot be written.
    """
    from jaxvid.inference.annotated_video import write_annotated

    try:
        with replacing(output_path(output)) as partial:
            write_annotated(video, classes, partial)
    except DecodeError as error:
        return {"error": f"{output}: not written, because a frame is damaged; {error}"}
    return {}


def check_options(args: argparse.Namespace, num_videos: int) -> None:
    """Refuse invalid or conflicting options, and output files that cannot be written.

    Args:
        args: The parsed command line.
        num_videos: Number of videos to classify.

    Raises:
        InputError: The message names the option.
    """
    files = {name: getattr(args, name) for name in ("json", "csv")}
    files = {name: file for name, file in files.items() if file not in (None, parsers.STDOUT)}
    for name, file in files.items():
        if not file.endswith(f".{name}"):
            raise InputError(
                f"--{name} {file}: the output file must end in .{name}; to print {name.upper()} "
                f"instead, put --{name} last or before another option"
            )
    if args.json == args.csv == parsers.STDOUT:
        raise InputError("--json and --csv: only one can be printed; write the other to a FILE")
    if args.top_k < 1:
        raise InputError(f"--top_k={args.top_k}: must be at least 1")
    if args.output and is_annotated(args.output):
        if num_videos != 1:
            raise InputError(
                f"--output {args.output}: expected one video, got {num_videos}; run once per video"
            )
        check_output("--output", output_path(args.output))
    if args.window is not None:
        _check_window_options(args, num_videos, files)
        return
    if args.stride is not None:
        raise InputError("--stride needs --window SECONDS")
    if args.output and not is_annotated(args.output):
        raise InputError(
            f"--output {args.output}: needs --window SECONDS, unless the file name ends in .mp4"
        )
    for name, file in files.items():
        check_output(f"--{name}", output_path(file))


def _check_window_options(args: argparse.Namespace, num_videos: int, files: dict[str, str]) -> None:
    """Refuse options that do not fit `--window`; see `check_options`.

    Args:
        args: The parsed command line.
        num_videos: Number of videos to classify.
        files: The files of `--json` and `--csv` that are given.
    """
    if args.stride is None:
        raise InputError("--window needs --stride SECONDS, the time between the starts of windows")
    if num_videos != 1:
        raise InputError(f"--window: expected one video, got {num_videos}; run once per video")
    if args.clips is not None:
        raise InputError("--clips cannot be combined with --window: every window is one clip")
    for name, file in files.items():
        raise InputError(f"--{name} {file} cannot be combined with --window; use --output PREFIX")
    if args.output and not is_annotated(args.output):
        for kind in parsers.TIMELINE_KINDS:
            check_output("--output", output_path(f"{args.output}.{kind}"))


def _make_input(name: str) -> VideoInput:
    """Return a video of the command line.

    Raises:
        InputError: The standard input is a terminal, or the URL has an unsupported scheme.
    """
    if name != STDIN:
        return VideoInput(name)
    if sys.stdin.isatty():
        raise InputError("-: the standard input is a terminal; pipe a video into this command")
    return VideoInput(sys.stdin.buffer)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parsers.predict().parse_args(argv)
    results, skipped = [], Skipped()
    printed = "json" if args.json == parsers.STDOUT else "text"
    if args.csv == parsers.STDOUT and args.window is None:  # windows have a table of their own
        printed = "csv"
    try:
        names, failures = expand(args.inputs, skipped)
        if counts := str(skipped):
            print(f"skipped in folders: {counts}", file=sys.stderr)
        if not names:
            raise InputError("; ".join(failure["error"] for failure in failures))
        check_options(args, len(names))
        check_model_path(args.model)
        videos = [_make_input(name) for name in names]
        if args.output and is_same_file(args.output, names[0]):
            raise InputError(f"--output {args.output}: is the video itself; choose another file")
        if printed == "csv":
            print_line(",".join(PREDICTION_COLUMNS))
        for result in itertools.chain(run(videos, args), failures):
            print_result(result, printed)
            results.append(result)
        write_results(results, args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE
    counts = count_failures(results)
    if not counts["failed"]:
        if args.output and is_annotated(args.output):
            print(f"annotated video: {printable(args.output)}", file=sys.stderr)
        return 0
    if printed == "json":
        print_line(json.dumps(counts))
    total = len(failures) + len(names)
    print(f"{counts['failed']} of {total} failed", file=sys.stderr)
    return SOME_FAILED
