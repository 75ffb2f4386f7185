"""Synthetic data set of H.264 clips whose class depends only on their motion.

    python -m jaxvid.data.synthetic_motion --output data/motion

There are eight classes in four pairs. Each scene is written as two clips, one of each class of a
pair: played forwards and backwards. The two clips have the same set of frames, so a model without
temporal information reaches at most 50 % accuracy.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

import av
import numpy as np

from jaxvid.errors import InputError
from jaxvid.progress import Progress

LABELS = ("left", "right", "up", "down", "growing", "shrinking", "clockwise", "counter-clockwise")
SIZE = 72  # height and width of a clip in pixels
NUM_FRAMES = 17  # 8 · 2 + 1: divisible into eight segments with bounds two frames apart
FPS = 15
SHAPES = ("disc", "square", "triangle", "star", "bar", "cross")
TEXTURES = ("stripes", "halves", "spot")


def render_scene(rng: np.random.Generator, pair: int) -> np.ndarray:
    """Render a scene: a bright textured shape moving over a dark textured background.

    Args:
        rng: Draws shape, texture, colours, start, speed and noise.
        pair: Index of the pair of classes. The scene has the label `2 * pair` if it is played
            forwards, and `2 * pair + 1` if it is played backwards.

    Returns:
        `(t, h, w, c)` uint8, RGB.
    """
    # (t 1 1); 0 in the middle of the clip
    time = np.linspace(-1, 1, NUM_FRAMES, dtype=np.float32)[:, None, None]
    centre = SIZE / 2 + rng.uniform(-4, 4, 2)
    x, y = (np.full_like(time, c) for c in centre)
    angle = np.full_like(time, rng.uniform(0, 2 * np.pi))
    radius = np.full_like(time, rng.uniform(10, 15))  # pixels
    if LABELS[2 * pair] in ("left", "up"):
        along = -rng.uniform(12, 21) * time  # pixels from the centre, in both directions
        across = rng.uniform(-12, 12)
        x, y = (x + along, y + across) if LABELS[2 * pair] == "left" else (x + across, y + along)
    elif LABELS[2 * pair] == "growing":
        radius = rng.uniform(12, 18) * np.exp(rng.uniform(0.35, 0.6) * time)
    else:  # the y axis points down, so an increasing angle is a clockwise rotation
        radius = radius + rng.uniform(7, 12)
        angle = angle + np.deg2rad(rng.uniform(60, 110)) * time

    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5
    dx, dy = columns - x, rows - y  # (t h w)
    u = (dx * np.cos(angle) + dy * np.sin(angle)) / radius
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / radius
    inside = np.clip((1 - _distance(rng, u, v)) * radius + 0.5, 0, 1)[..., None]  # (t h w 1)
    bright, dim = (rng.uniform(*bounds, 3).astype(np.float32) for bounds in ((160, 255), (70, 130)))
    shape = dim + _texture(rng, u, v)[..., None] * (bright - dim)  # (t h w c)
    background = _background(rng)
    frames = background + inside * (shape - background)
    frames += rng.uniform(1, 5) * rng.standard_normal(frames.shape, np.float32)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def _distance(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Evaluate a function that is below 1 inside a random shape and above 1 outside of it.

    `u` and `v` are coordinates relative to the centre of the shape, in units of its radius.
    """
    kind = rng.choice(SHAPES)
    if kind == "disc":
        return np.hypot(u, v)
    if kind == "square":
        return np.maximum(abs(u), abs(v)) / 0.85
    if kind == "triangle":
        return np.maximum(np.maximum(0.87 * u - 0.5 * v, -0.87 * u - 0.5 * v), v) / 0.55
    if kind == "star":
        return np.hypot(u, v) / (0.75 + 0.25 * np.cos(5 * np.arctan2(v, u)))
    if kind == "bar":
        return np.maximum(abs(u), abs(v) / 0.45)
    return np.maximum(np.minimum(abs(u), abs(v)) / 0.35, np.maximum(abs(u), abs(v)))


def _texture(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Evaluate a random texture with values in [0, 1]. `u` and `v`: see `_distance`."""
    kind = rng.choice(TEXTURES)
    if kind == "stripes":
        return 0.5 + 0.5 * np.sin(rng.uniform(2, 4) * u + rng.uniform(0, 2 * np.pi))
    if kind == "halves":
        return 0.5 + 0.5 * np.tanh(4 * u)
    return np.exp(-3 * ((u - 0.5) ** 2 + v**2))


def _background(rng: np.random.Generator) -> np.ndarray:
    """Return a dark random texture `(h, w, c)`."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32) / SIZE
    waves = np.zeros((SIZE, SIZE, 1), np.float32)
    for _ in range(4):
        fx, fy, phase = rng.uniform(-25, 25), rng.uniform(-25, 25), rng.uniform(0, 2 * np.pi)
        waves += np.sin(fx * columns + fy * rows + phase)[..., None] / 4
    color, contrast = rng.uniform(20, 60, 3), rng.uniform(5, 25, 3)
    return (color + waves * contrast).astype(np.float32)


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Write `(t, h, w, c)` uint8 frames as an H.264 .mp4 file.

    All frame types have the same quantizer. Otherwise the quality of a frame would depend on its
    position in the clip.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # clips are already written in parallel
        stream.options = {
            "preset": "superfast",
            "qp": "20",
            "x264-params": "ipratio=1:pbratio=1",
        }
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_pair(folder: Path, split: str, scene: int, seed: int) -> None:
    """Write a scene of a split as two clips, forwards and backwards."""
    rng = np.random.default_rng([seed, ("train", "val").index(split), scene])
    frames = render_scene(rng, pair=scene % 4)
    write_clip(folder / split / f"{2 * scene:05d}.mp4", frames)
    write_clip(folder / split / f"{2 * scene + 1:05d}.mp4", frames[::-1])


def make_motion(folder: str | Path, *, num_train: int, num_val: int, seed: int) -> None:
    """Write the data set into `folder` atomically, unless it is already complete.

    Args:
        folder: Folder for `train/`, `val/`, `train.csv`, `val.csv` (`path label`), `labels.txt` and
            `motion.json` (the settings).
        num_train: Number of training clips, a multiple of 8.
        num_val: Number of validation clips, a multiple of 8. Their scenes differ
            from those of the training clips.
        seed: Seed of all clips.

    Raises:
        InputError: The folder contains something else or cannot be written, or a number is not a
            positive multiple of 8.
    """
    folder = Path(folder)
    settings = {"num_train": num_train, "num_val": num_val, "seed": seed, "version": 1}
    for name in ("num_train", "num_val"):
        if settings[name] <= 0 or settings[name] % len(LABELS):
            raise InputError(
                f"{name}={settings[name]}: must be a positive multiple of {len(LABELS)}, "
                "so that the classes are equally frequent; change data.motion."
                f"{name} (jaxvid.data.synthetic_motion: {name.replace('num_', '--')})"
            )
    if folder.exists():
        _check_same(folder, settings)
        return
    try:
        _make_locked(folder, settings)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder"
        ) from None


def _make_locked(folder: Path, settings: dict) -> None:
    """Write the data set while holding a lock, unless another run has just written it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Concurrent runs wait for the lock instead of writing the data set twice. The kernel releases
    # the lock if its holder dies.
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            _check_same(folder, settings)
            return
        partial = folder.parent / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _write_all(partial, settings)
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        os.unlink(lock.name)


def _check_same(folder: Path, settings: dict) -> None:
    """Raise an InputError unless a folder contains the motion clips of these settings."""
    try:
        existing = json.loads((folder / "motion.json").read_text())
    except (OSError, ValueError):
        existing = None
    if existing != settings:
        contents = f"motion clips with {existing}" if existing else "no motion clips"
        raise InputError(
            f"{folder}: contains {contents}, expected motion clips with {settings}; "
            "delete it or choose another folder"
        )


def _write_all(folder: Path, settings: dict) -> None:
    """Write the clips, lists, class names and settings."""
    scenes = [
        (split, scene)
        for split in ("train", "val")
        for scene in range(settings[f"num_{split}"] // 2)
    ]
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
    progress = Progress(2 * len(scenes), title="writing clips", unit="clip")
    with (
        contextlib.closing(progress),
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        jobs = [
            pool.submit(_write_pair, folder, split, scene, settings["seed"])
            for split, scene in scenes
        ]
        try:
            for job in concurrent.futures.as_completed(jobs):
                job.result()
                progress.advance(2)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for split in ("train", "val"):
        # Scene i belongs to pair i % 4. Clip 2 i plays it forwards, and clip 2 i + 1 backwards.
        lines = [
            f"{split}/{clip:05d}.mp4 {2 * (clip // 2 % 4) + clip % 2}\n"
            for clip in range(settings[f"num_{split}"])
        ]
        (folder / f"{split}.csv").write_text("".join(lines))
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    (folder / "motion.json").write_text(json.dumps(settings))


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder of the data set")
    parser.add_argument(
        "--train", type=int, default=4000, help="number of training clips, a multiple of 8"
    )
    parser.add_argument(
        "--val", type=int, default=512, help="number of validation clips, a multiple of 8"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all clips")
    args = parser.parse_args()
    try:
        make_motion(args.output, num_train=args.train, num_val=args.val, seed=args.seed)
    except InputError as error:
        parser.exit(InputError.EXIT_CODE, f"error: {error}\n")


if __name__ == "__main__":
    main()
