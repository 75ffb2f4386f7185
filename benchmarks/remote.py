"""Compare training input from an S3 server on this machine with input from the local disk.

python benchmarks/remote.py                   video files and a pack, 48 videos of 340×256, 10 s
python benchmarks/remote.py --latency_ms 20   every request takes at least 20 ms

It needs s3fs. The server (`benchmarks/object_server.py`) is a process of its own, which uses the
same CPU cores. In every round, the same epoch is loaded from the local disk, from the server with
an empty cache (cold), and from the server with the blocks of these clips in the cache (warm). The
first batches, which are not read ahead, are not measured. The benchmark prints clips per second of
wall time, the median of the paired ratios to the local disk, and the CPU time per clip of the
process that trains and of the server. For the pack, it also reads the blocks of the clips into an
empty cache without decoding (read only). If all CPU time of the server is that of these cores, the
ratio of a cold cache cannot be higher than the printed limit.
"""

import argparse
import concurrent.futures
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
from absl import flags

from benchmarks import resources
from benchmarks.data import TRAIN_SPECS, write_video
from benchmarks.object_server import BUCKET
from jaxvid.data import read_ahead
from jaxvid.data.clips.clip import clip_frames
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.pipeline import describe_decoding, make_train_iter
from jaxvid.data.prepare import prepare
from jaxvid.data.sources import DatasetConfig, open_dataset
from jaxvid.data.video_order import VideoOrder

GOALS = {"warm": 0.8, "cold": 0.5}
SPEC = TRAIN_SPECS["multi-scale crop, flip"]


def make_folder(folder: Path, num_videos: int, num_different: int) -> None:
    """Write videos, of which some are copies, and their list."""
    folder.mkdir()
    for i in range(num_videos):
        path = folder / f"{i}.mp4"
        if i < num_different:
            write_video(path, 340, 256, seed=i)
        else:
            shutil.copy(folder / f"{i % num_different}.mp4", path)
    (folder / "labels.txt").write_text("only\n")
    (folder / "train.csv").write_text("".join(f"{i}.mp4 0\n" for i in range(num_videos)))


class Meter:
    """Measures the rate and the CPU times of the work on clips, from its creation on."""

    def __init__(self, server: int):
        """Start to measure; `server` is the process id of the server."""
        self._process, self._server = server, resources.measure(server).cpu_seconds
        self._wall, self._client = time.perf_counter(), time.process_time()

    def per_clip(self, num_clips: int) -> np.ndarray:
        """Return clips per second, and the CPU times per clip of both processes in ms: `(3,)`."""
        seconds, client = time.perf_counter() - self._wall, time.process_time() - self._client
        server = resources.measure(self._process).cpu_seconds - self._server
        return np.array([num_clips / seconds, 1e3 * client / num_clips, 1e3 * server / num_clips])


def measure(folder: str, source: str, cache: Path, args: argparse.Namespace) -> np.ndarray:
    """Load the batches of the epochs; opening the data set and the first batches are not measured.

    Returns:
        `(3,)`, as `Meter.per_clip`.
    """
    data = DatasetConfig(source=source, folder=folder, cache_dir=str(cache))
    records = open_dataset(data, 1, ("train",)).records["train"]
    iterator = make_train_iter(
        records,
        spec=SPEC,
        batch_size=args.batch,
        order=VideoOrder(seed=0),
        num_threads=args.threads,
        num_workers=args.workers,
    )
    num_skipped = (args.threads + 1) * max(1, args.workers)  # batches that are not read ahead
    for _ in range(num_skipped):
        next(iterator)
    num_batches = args.epochs * len(records) // args.batch - num_skipped
    meter = Meter(args.server)
    for _ in range(num_batches):
        next(iterator)
    result = meter.per_clip(num_batches * args.batch)
    iterator.close()
    wait_for_threads()
    return result


def measure_reading(address: str, cache: Path, args: argparse.Namespace) -> np.ndarray:
    """Read what a clip of each video of a pack needs into the cache, without decoding.

    Returns:
        `(3,)`, as `Meter.per_clip`.
    """
    data = DatasetConfig(source="pack", folder=address, cache_dir=str(cache))
    records = open_dataset(data, 1, ("train",)).records["train"]

    def read(i: int) -> None:
        with records[i].open() as video:
            video.fetch(clip_frames(video, SPEC, np.random.default_rng(i)))

    first = len(records) // 4  # their requests connect to the server
    with concurrent.futures.ThreadPoolExecutor(read_ahead.THREADS) as pool:
        list(pool.map(read, range(first)))
        meter = Meter(args.server)
        list(pool.map(read, range(first, len(records))))
        return meter.per_clip(len(records) - first)


def wait_for_threads() -> None:
    """Wait until no thread loads clips: Grain's threads finish the batches that they have begun."""
    idle_checks = 0
    while idle_checks < 20:
        time.sleep(0.01)
        idle_checks = 0 if describe_decoding() else idle_checks + 1
    concurrent.futures.wait(read_ahead.cancel())


def compare(source: str, local: Path, args: argparse.Namespace, cache: Path) -> None:
    """Measure one source in alternating rounds, and print the rates and ratios."""
    address = f"s3://{BUCKET}/{local.name}"
    folders = {"local": str(local), "cold": address, "warm": address}
    measured = {name: [] for name in (*folders, "read only")}
    for i in range(args.rounds):
        shutil.rmtree(cache, ignore_errors=True)
        for name in ("local", "cold", "warm") if i % 2 else ("cold", "warm", "local"):
            measured[name].append(measure(folders[name], source, cache, args))
        if source == "pack":
            shutil.rmtree(cache, ignore_errors=True)
            measured["read only"].append(measure_reading(address, cache, args))
    size = sum(path.stat().st_size for path in local.rglob("*") if path.is_file())
    print(f"\n{source}: {size / 1e6:.1f} MB")
    medians = {name: np.median(values, axis=0) for name, values in measured.items() if values}
    for name, (rate, client, server) in medians.items():
        line = f"{name:9} {rate:7.1f} clips/s, CPU time per clip {client:5.1f} ms"
        line += "" if name == "local" else f" + {server:4.1f} ms of the server"
        if name in GOALS:
            pairs = zip(measured[name], measured["local"], strict=True)
            ratios = [values[0] / local[0] for values, local in pairs]
            line += f"   {statistics.median(ratios):.2f} × local"
            line += f" ({min(ratios):.2f} to {max(ratios):.2f}; goal {GOALS[name]})"
        print(line, flush=True)
    if "read only" in medians:
        decoding = medians["local"][1]
        print(f"limit of cold: {decoding / (decoding + sum(medians['read only'][1:])):.2f} × local")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--videos", type=int, default=48, help="number of videos")
    parser.add_argument("--different", type=int, default=4, help="number of different videos")
    parser.add_argument("--batch", type=int, default=4, help="clips per batch")
    parser.add_argument("--epochs", type=int, default=1, help="epochs per round")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--threads", type=int, default=2, help="data.num_threads")
    parser.add_argument("--workers", type=int, default=0, help="data.num_workers")
    parser.add_argument("--latency_ms", type=float, default=0, help="delay of every request")
    args = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # worker processes need it
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}  # it ends when stdin is closed
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name) / BUCKET
        folder.mkdir()
        make_folder(folder / "videos", args.videos, args.different)
        prepare([folder / "videos"], folder / "pack", Settings(), workers=2)
        command = [sys.executable, "-m", "benchmarks.object_server", folder, args.latency_ms / 1e3]
        with subprocess.Popen([*map(str, command)], cwd=ROOT, text=True, **pipes) as server:
            endpoint, args.server = server.stdout.readline().strip(), server.pid
            os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
            os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
            print(f"{args.videos} videos, {args.threads} threads, {args.workers} workers")
            compare("folder", folder / "videos", args, Path(name) / "cache")
            compare("pack", folder / "pack", args, Path(name) / "cache")


if __name__ == "__main__":
    main()
