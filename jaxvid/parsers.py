"""Command-line parsers of the programs that need seconds to import.

This module imports only the standard library, so that `--help` and wrong options are fast.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from jaxvid import help_texts

DTYPES = ("float32", "tfloat32", "bfloat16")  # jaxvid.models.precision.DTYPES
LAYERS = ("video", "frames")  # jaxvid.inference.feature_extraction.LAYERS
FORMATS = ("stablehlo", "onnx", "safetensors")  # of an exported model
ENGINES = ("jax", "onnxruntime")  # of `jaxvid serve`
PRECISIONS = ("float32", "float16", "int8")  # of an ONNX file
SHELLS = ("bash", "zsh", "fish")
MODEL_HELP = (
    "model folder, name (see jaxvid models --pretrained), PyTorch checkpoint (file or URL), or "
    "hf://USER/REPO"
)
STDOUT = "-"  # value of `--json` and `--csv` without a file
TIMELINE_KINDS = ("csv", "json", "png")  # suffixes of the files that `ClassTimeline.save` writes


def predict() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid predict`."""
    parser = _make_parser("predict", help_texts.PREDICT)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT",
        help="video file, URL, - (standard input), folder, or quoted pattern")  # fmt: skip
    add("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    add("--top_k", type=int, default=5, help="number of classes to report (default: 5)")
    add("--json", nargs="?", const=STDOUT, metavar="FILE", help="print one JSON object per "
        "line, or write them to FILE, whose suffix must be .json, with the number of failed "
        "inputs")  # fmt: skip
    add("--csv", nargs="?", const=STDOUT, metavar="FILE", help="print a CSV table with one row "
        "per class, or write it to FILE, whose suffix must be .csv")  # fmt: skip
    add("--clips", type=int, help="clips per video, whose logits are averaged (default: from the "
        "model card)")  # fmt: skip
    add("--crops", type=int, help="crops per clip, 1 or 3 (default: from the model card)")
    add("--batch_size", type=int, help="videos per batch (default: 8 divided by clips × crops, at "
        "least 1); with --window, windows per batch (default: 1)")  # fmt: skip
    _add_dtype(parser)
    add("--window", type=float, metavar="SECONDS", help="classify sliding windows of this "
        "length instead of the whole video")  # fmt: skip
    add("--stride", type=float, metavar="SECONDS", help="time between the starts of windows. "
        "For a network that encodes frames separately, it is adjusted so that windows share "
        "frames; the new value is printed")  # fmt: skip
    add("--output", metavar="FILE_OR_PREFIX", help="with the suffix .mp4: write the video with "
        "its classes drawn on it to this file; otherwise, with --window: write the classes of all "
        "windows to PREFIX.csv, PREFIX.json and PREFIX.png instead of printing them")  # fmt: skip
    return parser


def visualize() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid visualize`."""
    parser = _make_parser("visualize", help_texts.VISUALIZE)
    add = parser.add_argument
    add("video", metavar="VIDEO", help="video file or URL")
    add("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    add("--output", required=True, metavar="FILE", help="file to write, with the suffix .png "
        "(contact sheet) or .mp4 (slide show)")  # fmt: skip
    add("--clip", type=int, default=0, help="index of the clip, from 0 (default: 0)")
    add("--num_clips", type=int, default=3, help="number of clips, spread over the video as in "
        "evaluation (default: 3)")  # fmt: skip
    return parser


def serve() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid serve`."""
    parser = _make_parser("serve", help_texts.SERVE)
    add = parser.add_argument
    add("--model", required=True, action="append", dest="models", metavar="MODEL",
        help=f"{MODEL_HELP}, or .onnx file from jaxvid export; may be repeated to compare "
        "models")  # fmt: skip
    add("--host", default="127.0.0.1", help="address to listen on; any other than a loopback "
        "address needs a token (default: 127.0.0.1)")  # fmt: skip
    add("--port", type=int, default=7860, help="TCP port; 0: any free port (default: 7860)")
    add("--token", help="secret that requests must contain; other users of this machine can "
        "see it in the list of processes (default: $JAXVID_TOKEN)")  # fmt: skip
    add("--public_host", action="append", default=[], metavar="NAME", help="name under which "
        "browsers reach the server, e.g. videos.example.org; may be repeated (default: only "
        "localhost and IP addresses)")  # fmt: skip
    add("--allow_urls", action="store_true",
        help="let the server download videos whose URL a request contains")  # fmt: skip
    add("--max_batch", type=int, help="maximum number of views per batch, a power of 2 (default: "
        "the fastest up to 8, measured at the start)")  # fmt: skip
    add("--max_wait", type=float, default=0.005, metavar="SECONDS", help="maximum time that a view "
        "waits for its batch to fill (default: 0.005)")  # fmt: skip
    add("--decoders", type=int, default=os.cpu_count(),
        help="number of decoder processes (default: CPUs)")  # fmt: skip
    add("--max_upload", type=float, default=500.0, metavar="MB",
        help="maximum size of a video in megabytes (default: 500)")  # fmt: skip
    add("--deadline", type=float, default=60.0, metavar="SECONDS", help="maximum time from the end "
        "of an upload to the response (default: 60)")  # fmt: skip
    _add_dtype(parser)
    add("--engine", choices=ENGINES, default=ENGINES[0], help="library that computes "
        "predictions; onnxruntime needs pip install 'jaxvid[onnx]' and computes in float32 on the "
        f"CPU; .onnx files always use it (default: {ENGINES[0]})")  # fmt: skip
    return parser


def export() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid export`."""
    parser = _make_parser("export", help_texts.EXPORT)
    add = parser.add_argument
    add("--model", metavar="MODEL", help=MODEL_HELP)
    add("--output", metavar="FILE",
        help="file to write; its description is written to FILE.json")  # fmt: skip
    add("--check", metavar="FILE", help="check an exported file instead of writing one")
    add("--format", choices=FORMATS, default=FORMATS[0],
        help=f"contents of the file; see above (default: {FORMATS[0]})")  # fmt: skip
    add("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="with --format onnx: type "
        f"of the weights and activations (default: {PRECISIONS[0]})")  # fmt: skip
    add("--calibrate", type=Path, metavar="LIST_OR_FOLDER", help="with --precision int8: videos "
        "like those that will be classified. The ranges of the activations are measured on up to "
        "64 of them")  # fmt: skip
    return parser


def convert() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid convert`."""
    parser = _make_parser("convert", help_texts.CONVERT)
    add = parser.add_argument
    add("--model", required=True, help="a preset; see jaxvid models")
    add("--input", required=True, type=Path, help=".pth, .safetensors or .npz file")
    add("--output", required=True, type=Path, help="model folder that is written")
    add("--labels", metavar="FILE", help="class names in index order: a text file with one name "
        "per line, .json (a list, name to index, or index to name) or an official Kinetics .csv; "
        "none: no names (default: the names of the data set that the preset was released for)",
    )  # fmt: skip
    add("--num_classes", type=int, help="number of classes (default: from the preset)")
    add("--check", action="store_true", help="compare with the PyTorch reference before writing")
    return parser


def convert_to_torch() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid convert-to-torch`."""
    parser = _make_parser(
        "convert-to-torch",
        "Convert a model folder to a .pth file for the original implementation (strict=True).",
    )
    parser.add_argument("--input", required=True, type=Path, help="model folder")
    parser.add_argument("--output", required=True, type=Path, help=".pth file that is written")
    return parser


def prepare() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid prepare`."""
    parser = _make_parser("prepare", help_texts.PREPARE)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="LIST_OR_FOLDER", help="lists or data folders")
    add("--output", required=True, metavar="DIR", help="folder to write the pack to")
    add("--prefix", default="", metavar="DIR", help="folder that paths in lists are relative to "
        "(default: the list's folder)")  # fmt: skip
    add("--val_share", type=float, default=0.0, metavar="SHARE", help="share of the videos that "
        "is used for validation, if they are not divided into splits, e.g. 0.2 (default: 0, "
        "off)")  # fmt: skip
    add("--group", default="", metavar="REGEX", help="with --val_share: videos for whose path this "
        "regular expression has the same match are in the same split (default: each video is "
        "divided by its own path)")  # fmt: skip
    add("--format", default="arrayrecord", help="arrayrecord, or h5 for the XViT program "
        "(default: arrayrecord)")  # fmt: skip
    add("--short_side", type=int, default=256, help="shorter side to which larger frames are "
        "scaled down, in pixels; 0: no scaling (default: 256)")  # fmt: skip
    add("--frames", default="all", help="number of evenly spaced frames per video, or all "
        "(default: all)")  # fmt: skip
    add("--quality", type=int, default=90, help="JPEG quality, 1 to 100 (default: 90)")
    add("--workers", type=int, default=os.cpu_count(), help="number of threads (default: CPUs)")
    add("--shard", default="0/1", help="i/n: index of this job, from 0, and number of jobs "
        "(default: 0/1)")  # fmt: skip
    add("--clips_per_file", type=int, default=0, help="videos per ArrayRecord file; 0: automatic "
        "(default: 0)")  # fmt: skip
    add("--frames_per_record", type=int, default=1, help="number of consecutive frames in a "
        "record of an ArrayRecord file, which are read together (default: 1)")  # fmt: skip
    add("--color_matrix", default="tagged", help="conversion of YUV to RGB: tagged (by the color "
        "matrix that the video file names), or bt601 (always BT.601, for converted STAM weights) "
        "(default: tagged)")  # fmt: skip
    _add_beam(parser)
    return parser


def check() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid check`."""
    parser = _make_parser("check", help_texts.CHECK)
    add = parser.add_argument
    add("input", nargs="+", metavar="LIST_OR_FOLDER", help="lists or data folders")
    add("--prefix", default="", help="folder that paths in lists are relative to (default: the "
        "list's folder)")  # fmt: skip
    add("--json", metavar="OUT", help="write the report to this file")
    add("--workers", type=int, default=os.cpu_count(), help="number of threads (default: CPUs)")
    add("--state", type=Path, metavar="DIR", help="folder for the results of finished parts, with "
        "which the same command continues an interrupted check (default: a folder in the cache, "
        "which is removed when the check has finished)")  # fmt: skip
    _add_beam(parser)
    return parser


def _add_beam(parser: argparse.ArgumentParser) -> None:
    """Add the options of programs whose work Apache Beam can divide among machines."""
    add = parser.add_argument
    add("--runner", metavar="NAME", help="runner of Apache Beam: DirectRunner, FlinkRunner, "
        "SparkRunner, DataflowRunner or PortableRunner (default: threads of this "
        "process)")  # fmt: skip
    add("--beam_args", default="", metavar="'ARG ...'", help="options of the runner, as one quoted "
        "text (default: none)")  # fmt: skip


def check_labels() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid check-labels`."""
    parser = _make_parser("check-labels", help_texts.CHECK_LABELS)
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    add("--videos", required=True, type=Path, metavar="FOLDER_OR_LIST", help="labelled videos")
    add("--labels", type=Path, action="append", default=[], metavar="FILE", help="class names "
        "in another order to compare; may be repeated (default: none)")  # fmt: skip
    add("--output", metavar="FILE", help="write the names in the best order to this .txt file "
        "(default: not written)")  # fmt: skip
    add("--max_videos", type=int, default=500, help="number of videos to classify, over all "
        "classes (default: 500)")  # fmt: skip
    add("--expected_top1", type=float, metavar="PERCENT", help="top-1 accuracy of the "
        "model with the right order (default: published, or from the training run)")  # fmt: skip
    add("--clips", type=int, help="clips per video (default: from the model card)")
    add("--crops", type=int, help="crops per clip, 1 or 3 (default: from the model card)")
    return parser


def compare() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid compare`."""
    parser = _make_parser("compare", help_texts.COMPARE)
    add = parser.add_argument
    add("before", metavar="BEFORE", help="the first evaluation")
    add("after", metavar="AFTER", help="the second evaluation")
    add("--output", metavar="FOLDER", help="write the comparison, with all videos and classes, to "
        "FOLDER/comparison.json (default: not written)")  # fmt: skip
    return parser


def features() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid features`."""
    parser = _make_parser("features", help_texts.FEATURES)
    add = parser.add_argument
    add("input", metavar="INPUT", help="folder, list, pack or video file")
    add("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    add("--output", required=True, metavar="FILE", help="file to write: .npz, .parquet or .zarr")
    add("--layer", choices=LAYERS, default=LAYERS[0], help="video: one vector per clip; frames: "
        f"one vector per frame (default: {LAYERS[0]})")  # fmt: skip
    add("--split", metavar="NAME", help="train, val or test, if the input has splits (default: the "
        "only one)")  # fmt: skip
    add("--prefix", default="", metavar="FOLDER", help="folder that paths in lists are relative to "
        "(default: the list's folder)")  # fmt: skip
    add("--clips", type=int, help="clips per video (default: from the model card)")
    add("--crops", type=int, help="crops per clip, 1 or 3 (default: from the model card)")
    add("--window", type=float, metavar="SECONDS", help="extract features of sliding windows of "
        "this length instead of whole videos")  # fmt: skip
    add("--stride", type=float, metavar="SECONDS", help="time between the starts of windows")
    add("--batch_size", type=int, help="videos or windows per batch, over all devices (default: 8 "
        "per device, divided by clips × crops)")  # fmt: skip
    add("--dtype", choices=DTYPES, default="float32", help="compute dtype (default: float32)")
    add("--coordinator", metavar="HOST:PORT", help="address of process 0, if there are several "
        "processes (default: from Slurm, MPI or Kubernetes)")  # fmt: skip
    add("--num_processes", type=int, help="number of processes (default: from the launcher)")
    add("--process_id", type=int, help="index of this process, from 0 (default: from the "
        "launcher)")  # fmt: skip
    return parser


def probe() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid probe`."""
    parser = _make_parser("probe", help_texts.PROBE)
    add = parser.add_argument
    add("train", type=Path, metavar="TRAIN", help="features of the training videos")
    add("val", type=Path, nargs="?", metavar="VAL", help="features of the validation videos")
    add("--val_share", type=float, metavar="SHARE", help="share of the videos of each class in "
        "TRAIN to validate on, e.g. 0.2, instead of VAL")  # fmt: skip
    add("--k", default="1,5,10,20", metavar="LIST", help="numbers of neighbours, separated by "
        "commas (default: 1,5,10,20)")  # fmt: skip
    add("--json", metavar="FILE", help="also write the results to this .json file")
    return parser


def download() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid download`."""
    parser = _make_parser("download", help_texts.DOWNLOAD)
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--preset", help="preset of a PyTorch checkpoint; see jaxvid models "
        "(default: the released preset that it fits)")  # fmt: skip
    return parser


def models() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid models`."""
    parser = _make_parser("models", help_texts.MODELS)
    parser.add_argument("pattern", nargs="?", default="*", help="e.g. 'xvit*' (default: all)")
    parser.add_argument("--pretrained", action="store_true",
                        help="list only networks whose weights are downloaded by name")  # fmt: skip
    return parser


def completion() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid completion`."""
    parser = _make_parser("completion", help_texts.COMPLETION)
    parser.add_argument("shell", choices=SHELLS)
    return parser


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add the option `--dtype` of programs that can measure which dtype is faster."""
    parser.add_argument("--dtype", choices=(*DTYPES, "auto"), default="float32",
        help="compute dtype; auto: the faster of float32 and bfloat16, measured once per network "
        "and machine (default: float32, as in evaluation)")  # fmt: skip


class _StoreOnce(argparse.Action):
    """Store the value of an argument; refuse an option that is given twice."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._stored_in = None  # the namespace that has the value

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if option_string and self._stored_in is namespace:
            parser.error(f"{option_string} is given twice; give it once")
        self._stored_in = namespace
        setattr(namespace, self.dest, values)


def _make_parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"jaxvid {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.register("action", None, _StoreOnce)  # the default action
    return parser
