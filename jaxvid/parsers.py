"""Command-line parsers of the programs that need seconds to import.

This module imports only the standard library, so that `--help` and wrong options are fast.
"""

import argparse
import os
from pathlib import Path
from typing import Any

DTYPES = ("float32", "tfloat32", "bfloat16")  # jaxvid.models.precision.DTYPES
LAYERS = ("video", "frames")  # jaxvid.inference.feature_extraction.LAYERS
FORMATS = ("stablehlo", "safetensors")  # of an exported model
SHELLS = ("bash", "zsh", "fish")
MODEL_HELP = (
    "model folder, name (see jaxvid models --pretrained), PyTorch checkpoint (file or URL), or "
    "hf://USER/REPO"
)
STDOUT = "-"  # value of `--json` and `--csv` without a file
TIMELINE_KINDS = ("csv", "json", "png")  # suffixes of the files that `ClassTimeline.save` writes

PREDICT = """Classify videos.

An input is a file, an http or https URL, `-` (the video is read from the standard input), a folder
(all videos below it) or a quoted pattern (`'clips/**/*.mp4'`), which this program expands instead
of the shell. --window and --stride classify sliding windows of one long video.

Preprocessing and the number of views come from the model card. A trained model has those of its
evaluation during training; a converted model has those of the released protocol. Predictions equal
those of --mode eval with the same settings. --clips and --crops set a different number of views;
fewer views are faster.

Exit codes:
  0  all inputs were classified
  2  nothing was classified, or an output cannot be written, because an option, the model folder or
     the input as a whole is bad; the last line of stderr is `error: ...`
  3  some inputs failed, each with a line `failed: ...` on stderr, whose last line is
     `N of M failed`; the other inputs were classified
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

--videos names class folders, a data folder, an official list of Kinetics or Something-Something, or
a list with lines `path,class name`. The accuracy of the model is printed for each known order of
the names: the order in the model card, alphabetical orders, the official order, and the orders of
the --labels files. To apply another order, write it with --output and convert the weights again
with --labels.

Exit codes: 0: the stored order is plausible; 2: invalid input; 3: another order fits better, or the
model has no class names; 4: nothing can be concluded, or no known order fits.
"""

COMPARE = """Compare two finished evaluations, on the videos that both have.

It prints the overall accuracies, the accuracies of the classes that changed most, and the videos
that became correct or wrong. McNemar's exact test shows whether the difference of the top-1
accuracies is significant (5 % level). BEFORE and AFTER are eval.json files, or the folders that
contain them. The eval_videos.csv in the same folder is also read.
"""

FEATURES = """Extract features of videos: one vector per video or per window, without fine-tuning.

INPUT is a folder of videos, class folders, a data folder, a list, a pack or a video file. Videos in
class folders, lists and packs have labels, which are written with the features. The features are
the input of the network's last layers (--layer video: `features["video"]` in Python; --layer
frames: `features["frames"]`, with one vector per frame of the clip). The features of all clips and
crops of a video are averaged. The numbers of clips and crops come from the model card.

The suffix of FILE is its format: .npz (NumPy), .parquet (needs pyarrow) or .zarr (needs zarr). It
contains the features, ids, labels, names of the classes, and, with --window, the times of the
windows. Videos that cannot be decoded are left out and listed in FILE.

All devices of all processes share the work. Run the same command to continue an interrupted
extraction; the file is then bit-identical to that of an uninterrupted one.

Exit codes: 0: done; 2: invalid input; 3: some videos could not be decoded.
"""

PROBE = """Measure how well features distinguish classes, without training the network.

A linear classifier (logistic regression) and k-nearest-neighbour classifiers are fitted to the
features of TRAIN and evaluated on those of VAL. `jaxvid features` writes both files; the model must
be the same. Without VAL, --val_share holds out a part of TRAIN.

The features of the linear classifier are standardised. Its regularisation C is chosen on a fifth of
the training videos; then it is fitted to all of them. Neighbours are compared by cosine similarity
s and weighted by exp(s / 0.07). The probabilities of the windows of a video are averaged. Features
of frames are averaged over the frames. The same command gives the same result.

It needs the package scikit-learn.
"""

DOWNLOAD = """Download weights, convert them and print the model folder in the cache.

Other programs do the same when --model is the name of a network, a URL or a file; this program does
it in advance, e.g. on a machine that shares its home folder with machines that have no network.

The cache is $JAXVID_CACHE, by default ~/.cache/jaxvid. Files in the folder $JAXVID_WEIGHTS are used
instead of downloading them. An interrupted download continues when the command is run again.
"""

MODELS = """List the networks that can be created by name.

Columns: frames and pixels of a clip, number of classes, parameters, multiply-adds of one view,
published top-1 / top-5 accuracy with the number of clips and crops, and a link to the licence of
the weights that the authors released.
"""

COMPLETION = """Print a completion script for a shell.

bash    eval "$(jaxvid completion bash)"            in ~/.bashrc
zsh     eval "$(jaxvid completion zsh)"             in ~/.zshrc
fish    jaxvid completion fish | source             in ~/.config/fish/config.fish

It completes commands, their options, config names after --config, and files.
"""


def predict() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid predict`."""
    parser = _make_parser("predict", PREDICT)
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
    add("--dtype", choices=DTYPES, default="float32",
        help="compute dtype (default: float32, as in evaluation)")  # fmt: skip
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
    parser = _make_parser("visualize", VISUALIZE)
    add = parser.add_argument
    add("video", metavar="VIDEO", help="video file or URL")
    add("--model", required=True, metavar="MODEL", help=MODEL_HELP)
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
    add("--model", required=True, metavar="MODEL", help=MODEL_HELP)
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
    parser = _make_parser("compare", COMPARE)
    add = parser.add_argument
    add("before", metavar="BEFORE", help="the first evaluation")
    add("after", metavar="AFTER", help="the second evaluation")
    add("--output", metavar="FOLDER", help="write the comparison, with all videos and classes, to "
        "FOLDER/comparison.json (default: not written)")  # fmt: skip
    return parser


def features() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid features`."""
    parser = _make_parser("features", FEATURES)
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
    parser = _make_parser("probe", PROBE)
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
    parser = _make_parser("download", DOWNLOAD)
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--preset", help="preset of a PyTorch checkpoint; see jaxvid models "
        "(default: the released preset that it fits)")  # fmt: skip
    return parser


def models() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid models`."""
    parser = _make_parser("models", MODELS)
    parser.add_argument("pattern", nargs="?", default="*", help="e.g. 'xvit*' (default: all)")
    parser.add_argument("--pretrained", action="store_true",
                        help="list only networks whose weights are downloaded by name")  # fmt: skip
    return parser


def completion() -> argparse.ArgumentParser:
    """Return the parser of `jaxvid completion`."""
    parser = _make_parser("completion", COMPLETION)
    parser.add_argument("shell", choices=SHELLS)
    return parser


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
