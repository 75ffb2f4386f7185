"""Command lines of all programs with tiny inputs, for tests of signals and exit codes."""

import csv
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
from PIL import Image

import jaxvid
from convert import flax_to_torch
from jaxvid.evaluation.outputs import COLUMNS
from jaxvid.storage.feature_file import FeatureTable, load_features, save_features

ROOT = Path(__file__).parents[1]
MAIN = [
    "main.py",
    "--config=configs/motion.py",
    "--workdir={out}/run",
    "--config.data.source=folder",
    "--config.data.folder={data}",
    "--config.model.width=16",
    "--config.model.depth=1",
    "--config.batch_size=16",
    "--config.eval.batch_size=8",
    "--config.num_epochs=1.0",
]


@dataclasses.dataclass(frozen=True)
class Program:
    """A program and its outputs.

    Attributes:
        arguments: Arguments of the Python interpreter. `{out}` stands for the output folder,
            `{data}` for the data folder, `{model}` for a model folder, `{pth}` for a PyTorch
            checkpoint, `{evaluation}` for the folder of an evaluation and `{features}` for a file
            of features.
        outputs: Patterns of files and folders below `{out}` that are written atomically.
        logs: Pattern of the lines that the program may write to stderr before the line that reports
            an error or a signal.
    """

    arguments: list[str]
    outputs: tuple[str, ...] = ()
    logs: str = r"(reading|packing): .* videos, .*|compiling .*…|compiled in .*"


PROGRAMS = {
    "train": Program(MAIN, ("run/config.json",), ".*"),
    "eval": Program(
        [*MAIN, "--mode=eval", "--config.init_from={model}", "--config.model.width=64",
         "--config.model.depth=3"],
        ("run/eval.json", "run/confusion.png"),
        ".*",
    ),
    "compare": Program(
        ["-m", "jaxvid.compare", "{evaluation}", "{evaluation}", "--output={out}"],
        ("comparison.json",),
    ),
    "schedule": Program([*MAIN, "--mode=schedule"], ("run/schedule.png",)),
    "predict": Program(
        ["-m", "jaxvid.predict", "{data}/val", "--model={model}", "--json={out}/out.json"],
        ("out.json",),
    ),
    "features": Program(
        ["-m", "jaxvid.features", "{data}", "--split=val", "--model={model}",
         "--output={out}/out.npz"],
        ("out.npz",),
        r".*: list, 24 videos, 8 classes|compiling .*…|compiled in .*|extracting: .*",
    ),
    "visualize": Program(
        ["-m", "jaxvid.visualize", "{data}/val/00000.mp4", "--model={model}",
         "--output={out}/out.mp4"],
        ("out.mp4",),
    ),
    "export": Program(
        ["-m", "jaxvid.export", "--model={model}", "--output={out}/out.stablehlo"],
        ("out.stablehlo.json",),
    ),
    "probe": Program(
        ["-m", "jaxvid.probe", "{features}", "--val_share=0.5", "--json={out}/out.json"],
        ("out.json",),
        "fitting: .*",
    ),
    "check": Program(
        ["-m", "jaxvid.data.check", "{data}", "--json={out}/out.json"],
        ("out.json",),
        "reading: .*|.* parts are complete|continuing the interrupted check in .*",
    ),
    "prepare": Program(
        ["-m", "jaxvid.data.prepare", "--input", "{data}", "--output={out}/pack"],
        ("pack/report.json",),
        r"packing: .* videos, .*|.* parts are complete",
    ),
    "browse": Program(
        ["-m", "jaxvid.data.browse", "--config=configs/motion.py", "--config.data.source=folder",
         "--config.data.folder={data}", "--output={out}/out.png"],
        ("out.png",),
    ),
    "torch_to_flax": Program(
        ["convert/torch_to_flax.py", "--model=xvit_tiny", "--input={pth}", "--output={out}/model",
         "--check"],
        ("model",),
    ),
    "flax_to_torch": Program(
        ["convert/flax_to_torch.py", "--input={model}", "--output={out}/out.pth"], ("out.pth",)
    ),
    "download": Program(
        ["-m", "jaxvid.download", "{pth}", "--preset=xvit_tiny"],
        ("cache/weights/*/xvit_tiny",),
        r".*: SHA-256 \w+, converted to .*",
    ),
}  # fmt: skip
# `jaxvid serve` does not end by itself; tests/test_serve.py tests its signals and streams.
if importlib.util.find_spec("sklearn") is None:  # an optional package
    del PROGRAMS["probe"]


def make_inputs(folder: Path, data: Path) -> dict[str, Path]:
    """Write the inputs of the programs: a model folder, its PyTorch checkpoint, and results.

    Args:
        folder: Folder of the inputs.
        data: Folder of motion clips.

    Returns:
        The values of `{data}`, `{model}`, `{pth}`, `{evaluation}` and `{features}`.
    """
    preprocessing = {"num_frames": 8, "short_side": 72, "crop": 64, "mean": 0.5, "std": 0.5}
    preprocessing["sampling"] = "segments"
    labels = (data / "labels.txt").read_text().split("\n")[:8]
    model = jaxvid.create_model("xvit_tiny", num_classes=8)
    jaxvid.save_model(model, folder / "model", preprocessing=preprocessing, labels=labels)
    arguments = ["--input", str(folder / "model"), "--output", str(folder / "in.pth")]
    assert flax_to_torch.main(arguments) == 0
    evaluation = write_evaluation(folder / "evaluation", {"a.mp4": ("up", "up")})
    table = FeatureTable(
        features=np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32),
        ids=[str(i) for i in range(40)],
        labels=np.arange(40, dtype=np.int32) % 8,
        label_names=labels,
        padded=np.zeros(40, bool),
        starts=None,
        ends=None,
        about={"format_version": 1, "model": "xvit_tiny", "layer": "video"},
    )
    save_features(folder / "features.npz", table)
    inputs = {"data": data, "model": folder / "model", "pth": folder / "in.pth"}
    return {**inputs, "evaluation": evaluation, "features": folder / "features.npz"}


def write_evaluation(folder: Path, predictions: dict[str, tuple[str, str]], **report) -> Path:
    """Write the `eval.json` and `eval_videos.csv` of an evaluation; return the folder.

    Args:
        folder: The folder.
        predictions: Video → its label and its predicted class.
        **report: Fields that replace those of `eval.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"num_videos": len(predictions), "protocol": {"num_clips": 1}} | report
    (folder / "eval.json").write_text(json.dumps(contents))
    with (folder / "eval_videos.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for video, (label, best) in predictions.items():
            table.writerow(
                [video, label, best, int(label == best), json.dumps([best]), "[1]", 0, ""]
            )
    return folder


def start(
    name: str, out: Path, inputs: dict[str, Path], shell: str = 'exec "$@"', **options
) -> subprocess.Popen:
    """Start a program in a process group of its own.

    Args:
        name: Name of the program, a key of `PROGRAMS`.
        out: Folder for its outputs.
        inputs: The result of `make_inputs`.
        shell: Bash script that runs the program's command `"$@"`, e.g. `ulimit -v 1000; exec "$@"`.
        **options: Options of `Popen`. By default, stderr is a pipe and stdout is discarded.
    """
    arguments = [text.format(out=out, **inputs) for text in PROGRAMS[name].arguments]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment["JAXVID_CACHE"] = str(out / "cache")
    defaults = {"cwd": ROOT, "env": environment, "start_new_session": True} | streams
    command = ["bash", "-c", shell, "bash", sys.executable, *arguments]
    return subprocess.Popen(command, **(defaults | options))


def check_outputs(name: str, out: Path) -> None:
    """Fail if an output exists but is incomplete."""
    for path in (path for output in PROGRAMS[name].outputs for path in out.glob(output)):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".mp4":
            with av.open(str(path)) as video:
                assert sum(1 for _ in video.decode(video=0)) == 8
        elif path.suffix == ".npz":
            load_features(path)
        elif path.suffix == ".pth":
            import torch

            torch.load(path, weights_only=True)
        else:
            jaxvid.load_model(path)


def list_files(out: Path) -> set[str]:
    """List the files below a folder, except TensorBoard events and weights, whose names vary."""
    return {
        str(path.relative_to(out))
        for path in out.rglob("*")
        if path.is_file() and "events" not in path.name and "params/" not in str(path)
    }
