"""Command-line parsers of the programs that need seconds to import.

This module imports only the standard library, so that `--help` and wrong options are fast.
"""

import argparse
import os
from pathlib import Path

DTYPES = ("float32", "tfloat32", "bfloat16")  # jaxvid.models.precision.DTYPES
FORMATS = ("stablehlo", "safetensors")  # of an exported model
SHELLS = ("bash", "zsh", "fish")
STDOUT = "-"  # value of `--json` without a file

PREDICT = """Classify video files.

A folder stands for all videos below it. Quote patterns (`'clips/**/*.mp4'`), so that this program
expands them instead of the shell. --window and --stride classify sliding windows of one long video.

Preprocessing and the number of views come from the model card. A trained model has those of its
evaluation during training; a converted model has those of the released protocol. Predictions equal
those of --mode eval with the same settings. --clips and --crops set a different number of views;
fewer views are faster.

The exit code is the number of inputs that failed, at most 99. Each failed input is reported on
stderr as a line `failed: ...`, and the last line of stderr is `N of M failed`. The other inputs are
still classified. As in every program of jaxvid, the exit code is also 2 if the program cannot run,
e.g. because the model folder or an option is bad, or an output cannot be written. The last line of
stderr is then `error: ...`.
"""

VISUALIZE = """Visualise attention.

The output shows the frames of one clip with their attention rollout (Abnar & Zuidema, "Quantifying
Attention Flow in Transformers", ACL 2020, arXiv:2005.00928). A heat map over each frame shows how
much attention its patches receive, and bars show how much attention each frame receives. With the
suffix .png, FILE is a contact sheet; with .mp4, it is a slide show.

Frames are shown uncropped and upright, and darkened outside the network's crop. The colour scale
starts at the uniform share, 1 / (number of patches per frame). It ends at the share of the
strongest patch in the clip, or at twice the uniform share if that is higher. Rollout follows
attention only and ignores values and MLPs: it shows where a network looks, not why it decides.

In some networks (XViT), attention within a frame also reads keys and values of other frames. The
rollout assigns all attention to the frame's own patches, so that the heat map is approximate in
time.
"""

EXPORT = """Export a model folder.

`stablehlo` (default): the network with weights and normalisation as one program, for CPU and CUDA
and any batch size. Running it requires jax and flatbuffers, but not jaxvid.
`safetensors`: only the weights, under the same names as in model folders, with `model.json` as
metadata.
FILE.json describes the contents of FILE and how to load it.
"""

CONVERT = """Convert released PyTorch weights into a model folder.

The file is a checkpoint of an original program, or an image ViT of timm (.pth, .safetensors) or
Google (.npz) whose weights initialise a video model. Every key of the file must be used once or
ignored for a stated reason. Every weight of the model must be filled once or listed as newly
initialised. Otherwise nothing is written.
"""

PREPARE = """Convert videos to a pack, a data set of JPEG frames with fast random access.

If a run is killed, run the same command again to resume it. The pack is bit-identical to that of an
uninterrupted run. With `--shard 0/8` to `--shard 7/8`, eight jobs share the work, and the last job
to finish completes the pack.

Exit codes: 0 success, 2 invalid input, 3 some videos are broken and left out.
"""

CHECK_LABELS = """Check the order of a model's class names on a few labelled videos.

The videos are class folders, a data folder, an official list of Kinetics or Something-Something, or
a list with lines `path,class name`. The accuracy of each known order of the names is printed: as
stored in the model card, alphabetical in several variants, official, and those of --labels. To
apply another order, write it with --output and convert the weights again with --labels.

Exit codes: 0: the stored order is plausible; 2: invalid input; 3: another order fits better, or the
model has no class names; 4: nothing can be concluded, or no known order fits.
"""

COMPLETION = """Print a completion script for a shell.

bash    eval "$(jaxvid completion bash)"            in ~/.bashrc
zsh     eval "$(jaxvid completion zsh)"             in ~/.zshrc
fish    jaxvid completion fish | source             in ~/.config/fish/config.fish

Completed are commands, their options, config names after --config, and files.
"""


def predict() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid predict`."""
    parser = _make_parser("predict", PREDICT)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="video file, folder, or quoted pattern")
    add("--model", required=True, metavar="FOLDER", help="model folder")
    add("--top_k", type=int, default=5, help="number of classes to report (default: 5)")
    add("--json", nargs="?", const=STDOUT, metavar="FILE", help="print one JSON object per "
        "line, or write a list of the objects to FILE, whose suffix must be .json")  # fmt: skip
    add("--clips", type=int, help="clips per video, whose logits are averaged (default: from the "
        "model card)")  # fmt: skip
    add("--crops", type=int, help="crops per clip, 1 or 3 (default: from the model card)")
    add("--batch_size", type=int, help="videos per batch (default: 8 divided by clips × crops, at "
        "least 1); with --window, windows per batch (default: 1)")  # fmt: skip
    add("--dtype", choices=DTYPES, default="float32",
        help="compute dtype (default: float32, as in evaluation)")  # fmt: skip
    add("--window", type=float, metavar="SECONDS", help="classify sliding windows of this "
        "length instead of the whole video")  # fmt: skip
    add("--stride", type=float, metavar="SECONDS", help="time between the starts of windows. "
        "For a network that encodes frames separately, it is adjusted so that windows share "
        "frames; the new value is printed")  # fmt: skip
    add("--output", metavar="PREFIX", help="write the classes of all windows to PREFIX.csv, "
        "PREFIX.json and PREFIX.png instead of printing them")  # fmt: skip
    return parser


def visualize() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid visualize`."""
    parser = _make_parser("visualize", VISUALIZE)
    add = parser.add_argument
    add("video", metavar="VIDEO", help="video file")
    add("--model", required=True, metavar="FOLDER", help="model folder")
    add("--output", required=True, metavar="FILE", help="file to write, with the suffix .png "
        "(contact sheet) or .mp4 (slide show)")  # fmt: skip
    add("--clip", type=int, default=0, help="index of the clip, from 0 (default: 0)")
    add("--num_clips", type=int, default=3, help="number of clips, spread over the video as in "
        "evaluation (default: 3)")  # fmt: skip
    return parser


def export() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid export`."""
    parser = _make_parser("export", EXPORT)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="model folder")
    add("--output", required=True, metavar="FILE",
        help="file to write; its description is written to FILE.json")  # fmt: skip
    add("--format", choices=FORMATS, default=FORMATS[0],
        help=f"contents of the file; see above (default: {FORMATS[0]})")  # fmt: skip
    return parser


def convert() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid convert`."""
    parser = _make_parser("convert", CONVERT)
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
        "Convert a model folder to a .pth file that the original program loads with strict=True.",
    )
    parser.add_argument("--input", required=True, type=Path, help="model folder")
    parser.add_argument("--output", required=True, type=Path, help=".pth file that is written")
    return parser


def prepare() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid prepare`."""
    parser = _make_parser("prepare", PREPARE)
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
    return parser


def check_labels() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid check-labels`."""
    parser = _make_parser("check-labels", CHECK_LABELS)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="model folder")
    add("--videos", required=True, type=Path, metavar="FOLDER_OR_LIST", help="labelled videos")
    add("--labels", type=Path, action="append", default=[], metavar="FILE", help="names in a "
        "further order to compare; may be repeated (default: none)")  # fmt: skip
    add("--output", metavar="FILE", help="write the names in the best order to this .txt file "
        "(default: not written)")  # fmt: skip
    add("--max_videos", type=int, default=500, help="number of videos to classify, over all "
        "classes (default: 500)")  # fmt: skip
    add("--expected_top1", type=float, metavar="PERCENT", help="accuracy that the right order "
        "should have (default: the published one, or that of the training run)")  # fmt: skip
    add("--clips", type=int, help="clips per video (default: from the model card)")
    add("--crops", type=int, help="crops per clip, 1 or 3 (default: from the model card)")
    return parser


def models() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid models`."""
    parser = _make_parser("models", "List the networks that can be created by name.")
    parser.add_argument("pattern", nargs="?", default="*", help="e.g. 'xvit*' (default: all)")
    return parser


def completion() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid completion`."""
    parser = _make_parser("completion", COMPLETION)
    parser.add_argument("shell", choices=SHELLS)
    return parser


def _make_parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"jaxvid {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
