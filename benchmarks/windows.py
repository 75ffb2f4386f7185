"""Compare overlapping windows that share frames with windows that are classified separately.

python benchmarks/windows.py                                  a ViT-Ti/16 STAM-16, 75 % overlap
python benchmarks/windows.py --model stam_16 --windows 8 --rounds 1          the full ViT-B/16
python benchmarks/windows.py --model stam_tiny                                          quick

A STAM with random weights classifies windows of 10 s of a synthetic video in three ways, in
alternating runs:
`shared`: `Classifier.windows` decodes each frame once and computes its features once.
`alone`: Each window is decoded and classified separately. The video stays open, and a thread
decodes ahead.
`apart`: As `alone`, but the video is opened again for each window, as by `predict` for each file.

For `n` windows that overlap by 75 %, `alone` computes `4n / (n + 3)` times as many frames as
`shared`, always less than 4 times as many. The times are printed for the computation alone (not for
`apart`) and including the decoding.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import av
import numpy as np

import jaxvid
from jaxvid.data.clips import transforms
from jaxvid.data.clips.clip import ClipSpec
from jaxvid.data.formats.video_reader import VideoFile
from jaxvid.inference.sliding_windows import plan_windows, prefetch, read_frames
from jaxvid.inference.window_classification import score_windows
from jaxvid.models import ModelConfig

WINDOW, FPS = 10.0, 30  # window length in seconds, frame rate in frames per second
# ViT-Ti/16 with a small aggregator.
TI = {"width": 192, "heads": 3, "temporal_heads": 3, "temporal_mlp": 512, "temporal_depth": 2}


def write_video(path: Path, seconds: float) -> None:
    """Write a video of a noisy drifting pattern, 340 × 256, with x264's defaults."""
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 256, (32, 43, 3), np.uint8).repeat(8, 0).repeat(8, 1)[:, :340]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        for i in range(round(seconds * FPS)):
            noise = rng.integers(0, 8, pattern.shape, np.uint8)
            frame = np.roll(pattern, (i, 2 * i), (0, 1)) // 8 * 7 + noise
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_model(folder: Path, preset: str) -> ModelConfig:
    """Write a STAM with random weights; return its config.

    Args:
        folder: Model folder.
        preset: A STAM preset; empty: stam_16 as a ViT-Ti/16.
    """
    model = jaxvid.create_model(preset or "stam_16", **({} if preset else TI))
    config = model.config
    preprocessing = {
        "sampling": "uniform_10s",
        "num_frames": config.num_frames,
        "crop": config.image_size,
        "short_side": config.image_size * 8 // 7,
        "mean": 0.0,
        "std": 1.0,
    }
    jaxvid.save_model(model, folder, preprocessing=preprocessing)
    return config


def read_windows(reader: VideoFile, indices: np.ndarray, spec: ClipSpec) -> Iterator[np.ndarray]:
    """Decode the views `(1, v, t, h, w, c)` of each window separately."""
    for row in indices:
        frames = transforms.resize_short_side(reader.get_frames(row), spec.short_side)
        yield np.stack(transforms.eval_crops(frames, spec.crop, spec.num_crops))[None]


def read_apart(path: Path, indices: np.ndarray, spec: ClipSpec) -> Iterator[np.ndarray]:
    """Decode the views `(1, v, t, h, w, c)` of each window from a newly opened video."""
    for row in indices:
        with VideoFile(path, max_seconds=3600) as reader:
            yield from read_windows(reader, row[None], spec)


def score_alone(classifier: jaxvid.Classifier, views: Iterator[np.ndarray]) -> np.ndarray:
    """Classify windows one by one; return their logits `(windows, num_classes)`."""
    return np.concatenate([classifier.scores(view) for view in views])


def time_in_turns(title: str, sides: dict[str, Callable], rounds: int) -> dict:
    """Run the sides in turn; print their shortest wall and CPU times and ratios; return results."""
    seconds, results = {name: [] for name in sides}, {}
    for _ in range(rounds):
        for name, run in sides.items():
            start = np.array([time.perf_counter(), time.process_time()])
            results[name] = run()
            end = np.array([time.perf_counter(), time.process_time()])
            seconds[name].append(end - start)
    shortest = {name: np.min(values, axis=0) for name, values in seconds.items()}
    times = ", ".join(f"{name} {wall:.2f} ({cpu:.2f}) s" for name, (wall, cpu) in shortest.items())
    print(f"{title}, wall (CPU) time: {times}")
    for name in [*sides][1:]:
        wall, cpu = shortest[name] / shortest["shared"]
        print(f"    sharing is {wall:.2f} ({cpu:.2f}) × as fast as {name}")
    return results


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="", help="a STAM preset; empty: stam_16 as a ViT-Ti/16")
    parser.add_argument("--windows", type=int, default=40, help="number of windows")
    parser.add_argument(
        "--overlap", type=float, default=0.75, help="overlap of consecutive windows, 0 to 1"
    )
    parser.add_argument("--rounds", type=int, default=2, help="runs per way; the fastest counts")
    args = parser.parse_args()
    stride = WINDOW * (1 - args.overlap)

    with tempfile.TemporaryDirectory() as folder:
        config = write_model(Path(folder) / "model", args.model)
        video = Path(folder) / "video.mp4"
        write_video(video, WINDOW + (args.windows - 1) * stride)
        classifier = jaxvid.Classifier(Path(folder) / "model")
        spec = classifier.spec
        with VideoFile(video, max_seconds=3600) as reader:
            options = {"align": True, "name": str(video)}
            indices = plan_windows(reader, spec, WINDOW, stride, **options).indices
            needed = np.unique(indices)
            chunks = list(read_frames(reader, needed, spec, spec.num_frames))
            views = list(read_windows(reader, indices, spec))

            def score_ahead(views: Iterator[np.ndarray]) -> np.ndarray:
                with contextlib.closing(prefetch(views)) as ahead:
                    return score_alone(classifier, ahead)

            # Compile both programs before timing.
            classifier.scores(views[0])
            score_windows(classifier.network, indices[:1], iter(chunks[:1]), 1)
            print(
                f"{config.name}, width {config.width}, {config.num_frames} frames of "
                f"{config.image_size} px: {len(indices)} windows of {WINDOW:g} s every {stride:g} s"
            )
            ratio = indices.size / len(needed)
            print(
                f"frames to compute: {len(needed)} with sharing, {indices.size} without: "
                f"{ratio:.2f} × as many"
            )
            logits = time_in_turns(
                "compute",
                {
                    "shared": lambda: score_windows(classifier.network, indices, iter(chunks), 1),
                    "alone": lambda: score_alone(classifier, iter(views)),
                },
                args.rounds,
            )
            difference = np.abs(logits["shared"] - logits["alone"]).max()
            print(
                f"logits between {logits['alone'].min():.2f} and {logits['alone'].max():.2f} ",
                end="",
            )
            print(f"differ by {difference:.1e} at most")
            time_in_turns(
                "decode + compute",
                {
                    "shared": lambda: classifier.windows(video, WINDOW, stride),
                    "alone": lambda: score_ahead(read_windows(reader, indices, spec)),
                    "apart": lambda: score_ahead(read_apart(video, indices, spec)),
                },
                args.rounds,
            )


if __name__ == "__main__":
    main()
