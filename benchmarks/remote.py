"""Compare training input from an S3 server on this machine with input from the local disk.

python benchmarks/remote.py                   video files and a pack, 24 videos of 340×256, 10 s
python benchmarks/remote.py --latency_ms 20   every request takes at least 20 ms

It needs s3fs and moto (`make test-remote` installs them into .venv-remote). The server is a process
of its own, which uses the same CPU cores. In every round, the same batches are loaded from the
local disk, from the server with an empty cache (cold), and from the server with a full cache
(warm). The benchmark prints clips per second of wall time, the median of the paired ratios to the
local disk, and the CPU time per clip of the process that trains, without that of the server.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags

from benchmarks.data import TRAIN_SPECS, write_video
from jaxvid import object_store
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.pipeline import make_train_iter
from jaxvid.data.prepare import prepare
from jaxvid.data.sources import DatasetConfig, open_dataset
from jaxvid.data.video_order import VideoOrder

BUCKET = "s3://bucket"
GOALS = {"warm": 0.8, "cold": 0.5}
SERVER = """
import sys, time
from tests.s3_server import serve

latency = float(sys.argv[1])
with serve(slow_share=1.0 if latency else 0.0, slow_seconds=latency) as (endpoint, _):
    print(endpoint, flush=True)
    sys.stdin.read()
"""


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


def measure(folder: str, source: str, cache: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Load the batches of a few epochs; opening the data set is not measured.

    Returns:
        Clips per second, and CPU time of this process per clip in milliseconds, with its threads.
    """
    data = DatasetConfig(source=source, folder=folder, cache_dir=str(cache))
    records = open_dataset(data, 1, ("train",)).records["train"]
    iterator = make_train_iter(
        records,
        spec=TRAIN_SPECS["multi-scale crop, flip"],
        batch_size=args.batch,
        order=VideoOrder(seed=0),
        num_threads=args.threads,
        num_workers=args.workers,
    )
    num_batches = args.epochs * len(records) // args.batch
    num_clips = num_batches * args.batch
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(num_batches):
        next(iterator)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    iterator.close()
    return num_clips / seconds, cpu / num_clips * 1e3


def compare(source: str, local: Path, args: argparse.Namespace, cache: Path) -> None:
    """Measure one source in alternating rounds, and print the rates and ratios."""
    address = f"{BUCKET}/{source}"
    for path in local.rglob("*"):
        if path.is_file():
            object_store.upload(path, f"{address}/{path.relative_to(local)}")
    folders = {"local": str(local), "cold": address, "warm": address}
    measured = {name: [] for name in folders}
    for _ in range(args.rounds):
        shutil.rmtree(cache, ignore_errors=True)
        for name, folder in folders.items():
            measured[name].append(measure(folder, source, cache, args))
    used = sum(path.stat().st_blocks * 512 for path in cache.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in local.rglob("*") if path.is_file())
    print(f"\n{source}: {size / 1e6:.1f} MB, {used / 1e6:.1f} MB in the cache")
    for name, values in measured.items():
        rates, times = zip(*values, strict=True)
        line = f"{name:6} {statistics.median(rates):7.1f} clips/s"
        line += f" {statistics.median(times):6.1f} ms of CPU time per clip"
        if name in GOALS:
            pairs = zip(rates, measured["local"], strict=True)
            ratios = [rate / local for rate, (local, _) in pairs]
            line += f"   {statistics.median(ratios):.2f} × local"
            line += f" ({min(ratios):.2f} to {max(ratios):.2f}; goal {GOALS[name]})"
        print(line, flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--videos", type=int, default=24, help="number of videos")
    parser.add_argument("--different", type=int, default=4, help="number of different videos")
    parser.add_argument("--batch", type=int, default=8, help="clips per batch")
    parser.add_argument("--epochs", type=int, default=2, help="epochs per round")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds")
    parser.add_argument("--threads", type=int, default=2, help="data.num_threads")
    parser.add_argument("--workers", type=int, default=0, help="data.num_workers")
    parser.add_argument("--latency_ms", type=float, default=0, help="delay of every request")
    args = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # worker processes need it
    command = [sys.executable, "-c", SERVER, str(args.latency_ms / 1e3)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}  # it ends when stdin is closed
    with (
        tempfile.TemporaryDirectory() as name,
        subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as server,
    ):
        folder, endpoint = Path(name), server.stdout.readline().strip()
        if not endpoint:
            sys.exit("the server does not start; install s3fs and moto[server]")
        os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
        make_folder(folder / "videos", args.videos, args.different)
        # moto copies the whole object for each range, so files are kept small.
        prepare([folder / "videos"], folder / "pack", Settings(clips_per_file=2), workers=2)
        print(f"{args.videos} videos, {args.threads} threads, {args.workers} workers")
        compare("folder", folder / "videos", args, folder / "cache")
        compare("pack", folder / "pack", args, folder / "cache")


if __name__ == "__main__":
    main()
