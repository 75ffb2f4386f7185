"""Says what videos show: python -m jaxvid.predict FILE|FOLDER|PATTERN... --model FOLDER.

Of a folder, all videos below it; a quoted pattern (`'clips/**/*.mp4'`) is expanded here. With
--window and --stride: what is seen when in one long video.

Clips are made as the model was tested, and as many of them: of a trained model as its evaluation
made them, of a converted one as the released protocol does (XViT: 3 crops of a clip, on
Something-Something of 2 clips; STAM: one). That is --mode eval's answer for the same video; --clips
and --crops ask for fewer, which is faster, or for more.

The exit status is the number of inputs that failed, at most 99: each of them is a line
`failed: ...` on stderr, whose last line is `N of M failed`, and the others are predicted all the
same. As in every program here, 2 is also the status of unusable input as a whole (a bad model
folder or option, nothing to predict): then the last line is `error: ...`, and no more is predicted.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
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

from jaxvid.atomic import check_output, write_file
from jaxvid.data import folder_scan
from jaxvid.data.folder_scan import Skipped
from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.errors import InputError, printable
from jaxvid.inference.class_timeline import KINDS
from jaxvid.inference.classifier import Classifier

MAX_STATUS = 99
STDOUT = "-"
BATCH_CLIPS = 8  # views of all videos of a batch, where nothing else is asked for


def expand(inputs: Sequence[str], skipped: Skipped | None = None) -> tuple[list[str], list[dict]]:
    """Finds the videos that are meant.

    Args:
        inputs: Files, taken whatever their names; folders, of which all videos below are taken,
            sorted; patterns as `glob` knows them, `**` included. What exists is no pattern.
        skipped: Counts what is in the folders and is not taken.

    Returns:
        The videos, each once; and `{"video", "error"}` of each input that has none or cannot be
        read.
    """
    videos, failures = {}, []
    for name in inputs:
        is_pattern = glob.has_magic(name) and not os.path.lexists(name)
        found = sorted(glob.glob(name, recursive=True)) if is_pattern else [name]
        if not found:
            failures.append({"video": name, "error": f"{name}: nothing matches this pattern"})
        for path in found:
            files, errors = list_videos(path, skipped) if os.path.isdir(path) else ([path], [])
            videos |= dict.fromkeys(files)
            failures += [{"video": path, "error": printable(error)} for error in errors]
    return list(videos), failures


def list_videos(folder: str, skipped: Skipped | None = None) -> tuple[list[str], list[str]]:
    """The videos below a folder, sorted, and what cannot be read there, a line each."""
    unread, files = [], []
    skipped = Skipped() if skipped is None else skipped
    for root, folders, names in os.walk(folder, onerror=unread.append):
        folders.sort()
        paths = {name: os.path.join(root, name) for name in names}
        for name in folders:
            if os.path.islink(os.path.join(root, name)):  # not followed: links may form a loop
                skipped.add(folder_scan.LINKED_FOLDER)
        entries = ((name, functools.partial(os.path.isfile, path)) for name, path in paths.items())
        files += [paths[name] for name in folder_scan.pick_videos(entries, skipped)]
    errors = [f"{error.filename}: cannot be read ({error.strerror})" for error in unread]
    if not files and not errors:
        errors.append(f"{folder}: no video in it ({', '.join(folder_scan.VIDEO_SUFFIXES)})")
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
    """Classifies videos with the network of a model folder, in their order.

    Args:
        videos: Files.
        folder: The model folder.
        top_k: How many classes to name.
        batch_size: Videos that are computed together; None: as many as have 8 views in all, but at
            least one and no more than there are.
        num_clips: Clips of a video; None: as many as the model was tested with.
        num_crops: Crops of a clip; None: likewise.
        dtype: Of the computation, `float32` or `bfloat16`.

    Yields:
        What `classifier.Prediction.to_json` gives, for each video.

    Raises:
        InputError: The model folder is unusable, or a number impossible.
    """
    size = 1 if batch_size is None else batch_size
    views = {"num_clips": num_clips, "num_crops": num_crops}
    classifier = Classifier(folder, batch_size=size, dtype=dtype, **views)
    if batch_size is None:
        views = classifier.spec.num_clips * classifier.spec.num_crops
        classifier.batch_size = max(1, min(BATCH_CLIPS // views, len(videos)))
    for prediction in classifier.stream(videos, top_k):
        yield prediction.to_json()


def show(text: str) -> None:
    """Prints a line on stdout. What is no UTF-8 in a file's name is escaped, as JSON does it."""
    print(text.encode("utf-8", "backslashreplace").decode(), flush=True)


def print_result(result: dict, *, as_json: bool) -> None:
    """Prints a video's result: what failed on stderr, unless all is JSON."""
    if as_json:
        show(json.dumps(result, ensure_ascii=False))
    elif "error" not in result:
        padded = ", shorter than its clip: frames repeat" if result["padded"] else ""
        show(f"{printable(result['video'])}  ({result['seconds']:.3f} s{padded})")
        for entry in result["top"]:
            show(f"  {100 * entry['probability']:5.1f} %  {entry['label']}")
    if "error" in result:
        print(f"failed: {result['error']}", file=sys.stderr, flush=True)


def run(videos: Sequence[str], args: argparse.Namespace) -> Iterator[dict]:
    """What the command line asks for: the videos' results, or that of one video's windows.

    Yields:
        As `predict`; of windows nothing but an error: they are printed or written here.

    Raises:
        InputError: An option or the model folder is unusable.
    """
    if args.window is None:
        options = {"num_clips": args.clips, "num_crops": args.crops}
        options |= {"top_k": args.top_k, "batch_size": args.batch_size, "dtype": args.dtype}
        yield from predict(videos, args.model, **options)
        return
    [video] = videos
    size = 1 if args.batch_size is None else args.batch_size
    classifier = Classifier(args.model, batch_size=size, num_crops=args.crops, dtype=args.dtype)
    try:
        timeline = classifier.windows(video, args.window, args.stride)
    except DecodeError as error:
        yield {"video": video, "error": str(error)}
        return
    if args.output:
        for path in timeline.save(args.output, args.top_k):
            show(str(path))
        return
    for row in timeline.rows(args.top_k):
        if args.json:
            show(json.dumps({"video": video, **row}, ensure_ascii=False))
            continue
        top = ", ".join(f"{e['label']} {100 * e['probability']:.1f} %" for e in row["top"])
        show(f"{row['start']:9.2f} to {row['end']:9.2f} s  {top}")


def check_options(args: argparse.Namespace, num_videos: int) -> None:
    """Refuses options that do not go together, and files that cannot be written.

    Raises:
        InputError: Says which, and what would.
    """
    writes_json = args.json not in (None, STDOUT)
    if writes_json and not args.json.endswith(".json"):
        raise InputError(
            f"--json {args.json}: the file to write must end in .json; to print JSON, put --json "
            "last or before another option"
        )
    if args.top_k < 1:
        raise InputError(f"--top_k={args.top_k}: must be at least 1")
    if args.window is None:
        for name in ("stride", "output"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name} needs --window SECONDS")
        if writes_json:
            check_output("--json", Path(args.json))
        return
    if args.stride is None:
        raise InputError("--window needs --stride SECONDS, from one window's start to the next")
    if num_videos != 1:
        raise InputError(f"--window takes one video, not {num_videos}; call it once for each")
    if args.clips is not None:
        raise InputError("--clips does not go with --window: every window is one clip")
    if writes_json:
        raise InputError(f"--json {args.json} does not go with --window; give --output PREFIX")
    for kind in KINDS if args.output else ():
        check_output("--output", Path(f"{args.output}.{kind}"))


def make_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxvid.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="video files, folders, quoted patterns")
    add("--model", required=True, metavar="FOLDER", help="a model folder")
    add("--top_k", type=int, default=5, help="classes to name (default 5)")
    add("--json", nargs="?", const=STDOUT, metavar="OUT", help="print one JSON object a line, "
        "or write a list of them to OUT.json")  # fmt: skip
    add("--clips", type=int, help="clips of a video, whose logits are summed (default: as many "
        "as the model was tested with)")  # fmt: skip
    add("--crops", type=int, help="crops of a clip, 1 or 3 (default: likewise)")
    add("--batch_size", type=int, help="videos that are computed together (default: as many as "
        "have 8 clips times crops in all, at least 1), or windows (default 1)")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the computation (default float32, as in evaluation)")  # fmt: skip
    add("--window", type=float, metavar="SECONDS", help="classify windows of one video")
    add("--stride", type=float, metavar="SECONDS", help="from one window's start to the next; of "
        "a STAM, moved a little so that windows share frames, which is then told")  # fmt: skip
    add("--output", metavar="PREFIX", help="write windows to PREFIX.csv, .json and .png")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = make_parser().parse_args(argv)
    results, skipped = [], Skipped()
    try:
        videos, failures = expand(args.inputs, skipped)
        if left_out := str(skipped):
            print(f"skipped in folders: {left_out}", file=sys.stderr)
        if not videos:
            raise InputError("; ".join(failure["error"] for failure in failures))
        check_options(args, len(videos))
        for result in itertools.chain(run(videos, args), failures):
            print_result(result, as_json=args.json == STDOUT)
            results.append(result)
        if args.json not in (None, STDOUT):
            lines = ",\n".join(json.dumps(result, ensure_ascii=False) for result in results)
            data = f"[\n{lines}\n]\n".encode("utf-8", "backslashreplace")
            write_file(Path(args.json), data)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE
    if failed := sum("error" in result for result in results):
        print(f"{failed} of {len(failures) + len(videos)} failed", file=sys.stderr)
    return min(failed, MAX_STATUS)
