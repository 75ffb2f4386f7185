"""Throughput and latency of `jaxvid serve`, compared with the loop `Classifier.stream`.

    python benchmarks/serve.py --model runs/motion/model        the demo's network and clips
    python benchmarks/serve.py --video_seconds 10 --requests 64         a ViT-Ti/16, 340×256 px

The servers and the loop classify the same videos, in alternating runs. The loop uses batches of 1
or 8 videos, whichever is faster. The clients run on the same machine, and share its CPU time with
the server. A ratio is that of two consecutive runs. The median over the rounds is printed, with the
range.

`minimal_server.py` serves the same network with the same libraries, but without protection. It
shows the minimum cost of HTTP and of decoding in other processes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from benchmarks.http_load import Answer, send_all, serving
from benchmarks.resources import measure
from benchmarks.windows import write_model, write_video
from jaxvid.data.synthetic_motion import make_motion

NUM_CLIPS = 64  # generated if no videos are given
PREDICT = "/v1/predict"
NUM_EMPTY = 4096  # requests without a video
NUM_TRIALS = 3  # runs per batch size
TRIAL_VIDEOS = 64  # per run


class Run(NamedTuple):
    """Times of a run.

    Attributes:
        videos_per_second: Throughput.
        cpu_ms: CPU time per video in milliseconds, of the server or of the loop.
        client_ms: CPU time per video in milliseconds, of the clients.
        latencies: Seconds of each request.
    """

    videos_per_second: float
    cpu_ms: float
    client_ms: float = 0.0
    latencies: Sequence[float] = ()


class Server(NamedTuple):
    """A running server: the id of its process, and its port."""

    process: int
    port: int

    def run(
        self, bodies: Sequence[bytes], num_clients: int, method: str = "POST", path: str = PREDICT
    ) -> Run:
        """Send requests with a number of clients that each send one request at a time."""
        check = check_prediction if path == PREDICT else check_status
        cpu, own = measure(self.process).cpu_seconds, time.process_time()
        start = time.perf_counter()
        sending = send_all(self.port, path, bodies, num_clients, check, method=method)
        seconds = asyncio.run(sending)
        wall = time.perf_counter() - start
        return Run(
            len(bodies) / wall,
            1000 * (measure(self.process).cpu_seconds - cpu) / len(bodies),
            1000 * (time.process_time() - own) / len(bodies),
            seconds,
        )


def check_status(answer: Answer) -> None:
    """Raise a RuntimeError if a request failed."""
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {answer.body[:300]!r}")


def check_prediction(answer: Answer) -> None:
    """Raise a RuntimeError if a video was not classified."""
    check_status(answer)
    if not json.loads(answer.body)["top"]:
        raise RuntimeError(f"no classes: {answer.body[:300]!r}")


class Loop:
    """A loop over `Classifier.stream` in a separate process.

    Args:
        model: Model folder.
    """

    def __init__(self, model: str):
        """Start the process."""
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_load, initargs=(model,))

    def run(self, paths: Sequence[str], batch_size: int) -> Run:
        """Classify videos in batches."""
        return self._pool.submit(_classify, paths, batch_size).result()

    def find_fastest(self, paths: Sequence[str], batch_sizes: Sequence[int]) -> int:
        """Return the batch size with the highest throughput, the median of `NUM_TRIALS` runs."""
        for size in batch_sizes:  # compile first
            self.run(paths[:1], size)
        trials = [[self.run(paths, size) for size in batch_sizes] for _ in range(NUM_TRIALS)]
        speeds = [median(runs, "videos_per_second") for runs in zip(*trials, strict=True)]
        return batch_sizes[int(np.argmax(speeds))]

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _load(model: str) -> None:
    global _classifier
    import jaxvid

    _classifier = jaxvid.Classifier(model)


def _classify(paths: Sequence[str], batch_size: int) -> Run:
    _classifier.batch_size = batch_size
    start, cpu = time.perf_counter(), time.process_time()
    predictions = list(_classifier.stream(paths))
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    if errors := [prediction.error for prediction in predictions if prediction.error]:
        raise RuntimeError(errors[0])
    return Run(len(paths) / wall, 1000 * cpu / len(paths))


def describe_ratio(values: Sequence[float], references: Sequence[float]) -> str:
    """Return the median ratio of paired values, and its range."""
    ratios = np.divide(values, references)
    return f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"


def median(runs: Sequence[Run], field: str) -> float:
    """Return the median of a field."""
    return float(np.median([getattr(run, field) for run in runs]))


def make_videos(folder: Path, video_seconds: float) -> list[str]:
    """Write videos, and return their paths.

    Args:
        folder: Folder of the files.
        video_seconds: Duration of a video of 340×256 pixels; 0: clips of the demo.
    """
    if video_seconds:
        write_video(folder / "video.mp4", video_seconds)
        return [str(folder / "video.mp4")]
    make_motion(folder / "motion", num_train=8, num_val=NUM_CLIPS, seed=0)
    return sorted(map(str, folder.glob("motion/val/*.mp4")))


def compare(args: argparse.Namespace, paths: Sequence[str], servers: Sequence[Server]) -> None:
    """Print the throughput of the servers and of the loop.

    Args:
        args: The parsed command line.
        paths: The videos.
        servers: The server with dynamic batching, the server with batches of one view, and the
            minimal server.
    """
    bodies = [Path(path).read_bytes() for path in paths]
    loop, num_clients, runs = Loop(args.model), args.clients[-1], ([], [], [], [])
    batch_size = loop.find_fastest(paths[:TRIAL_VIDEOS], (1, args.max_batch or 8))
    for _ in range(args.rounds):
        runs[0].append(servers[0].run(bodies, num_clients))
        runs[1].append(loop.run(paths, batch_size))
        runs[2].append(servers[1].run(bodies, num_clients))
        runs[3].append(servers[2].run(bodies, num_clients))
    loop.close()
    dynamic, offline, single, minimal = runs
    speeds = [[run.videos_per_second for run in side] for side in runs]
    print(f"saturation, {num_clients} clients, {len(paths)} videos, {args.rounds} rounds:")
    print(
        f"    server / offline loop in batches of {batch_size}: "
        f"{describe_ratio(speeds[0], speeds[1])}; "
        f"{np.median(speeds[0]):.1f} and {np.median(speeds[1]):.1f} videos/s"
    )
    print(
        f"    dynamic batching / batches of 1: {describe_ratio(speeds[0], speeds[2])}; "
        f"{np.median(speeds[2]):.1f} videos/s with batches of 1"
    )
    print(
        f"    server / server without protection: {describe_ratio(speeds[0], speeds[3])}; "
        f"{np.median(speeds[3]):.1f} videos/s without protection"
    )
    print(
        f"    CPU time per video: server {median(dynamic, 'cpu_ms'):.2f} ms, its clients "
        f"{median(dynamic, 'client_ms'):.2f} ms, offline loop {median(offline, 'cpu_ms'):.2f} ms, "
        f"server with batches of 1 {median(single, 'cpu_ms'):.2f} ms, "
        f"server without protection {median(minimal, 'cpu_ms'):.2f} ms"
    )
    empty = servers[0].run([b""] * NUM_EMPTY, num_clients, "GET", "/healthz")
    print(f"    CPU time of a request without a video (/healthz): server {empty.cpu_ms:.2f} ms")


def measure_latency(args: argparse.Namespace, paths: Sequence[str], server: Server) -> None:
    """Print the latency for several numbers of clients."""
    bodies = [Path(path).read_bytes() for path in paths]
    for num_clients in args.clients:
        run = server.run(bodies, num_clients)
        p50, p95, p99 = np.percentile(run.latencies, (50, 95, 99)) * 1000
        print(
            f"{num_clients} clients: {run.videos_per_second:.1f} requests/s, "
            f"p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms"
        )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", default="", help="model folder (default: stam_16 as a ViT-Ti/16, not trained)"
    )
    parser.add_argument("--videos", nargs="+", default=[], help="video files (default: generated)")
    parser.add_argument(
        "--video_seconds",
        type=float,
        default=0.0,
        help="duration of generated 340×256 px videos; 0: the demo's 72 px clips of 1.1 s",
    )
    parser.add_argument("--requests", type=int, default=512, help="videos per run (default: 512)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="runs of each server and of the loop (default: 5)"
    )
    parser.add_argument(
        "--max_batch", type=int, help="maximum views per batch (default: chosen by the server)"
    )
    parser.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=[1, 8, 64],
        help="numbers of concurrent clients, ascending (default: 1 8 64)",
    )
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} CPUs, load average before the start {load:.1f}", flush=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not args.model:
            args.model = str(folder / "model")
            write_model(Path(args.model), "")
        paths = args.videos or make_videos(folder, args.video_seconds)
        paths = list(itertools.islice(itertools.cycle(paths), args.requests))
        command = [sys.executable, "-m", "jaxvid", "serve", "--model", args.model, "--port=0"]
        size = [f"--max_batch={args.max_batch}"] if args.max_batch else []
        minimal = [sys.executable, str(Path(__file__).with_name("minimal_server.py")), args.model]
        commands = [*command, *size], [*command, "--max_batch=1"], [*minimal, *size]
        servers = [Server(*stack.enter_context(serving(command))) for command in commands]
        for server in servers:
            server.run([Path(path).read_bytes() for path in paths[:16]], 4)
        compare(args, paths, servers)
        measure_latency(args, paths, servers[0])


if __name__ == "__main__":
    main()
