"""Memory and time of opening large data sets.

python benchmarks/scale.py pack --folder FOLDER --videos 240000 --frames 300 --workers 2
python benchmarks/scale.py list --folder FOLDER --videos 400000

`pack` writes a pack of tiny frames with one frame per record (23 GB with these options), and a
small pack with the same number of files. From each pack, it reads 16 training clips per file in
random order, and prints the resident and the private memory of each process of the pipeline. The
difference between the packs is the cost of the size.

`list` writes a tree of 1-byte files, and opens it as a list, as class folders and as an official
Kinetics list. It prints the seconds of `open_dataset`, and its peak memory above that of the
imports.

Each measurement runs in a process of its own. Only missing files are written, so that the command
can be repeated.
"""

import argparse
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import cv2
import numpy as np
from absl import flags

from jaxvid.data.clips.clip import ClipSpec
from jaxvid.data.formats import pack_index, pack_writer, record_offsets, tfds_api
from jaxvid.data.pipeline import make_train_iter
from jaxvid.data.sources import DatasetConfig, open_dataset
from jaxvid.data.video_order import VideoOrder

NUM_CLASSES = 100  # below 128, so that all labels have the same length when serialized
NUM_FILES = 256  # of a pack
SPEC = ClipSpec(num_frames=16, crop=16, short_side=16, train_short_side=(16, 16))
LISTS = ("list", "class_folders", "kinetics")
LABELS = [*map("class {:03d}".format, range(NUM_CLASSES))]


# ------------------------------------------------------------------ packs


def write_pack(folder: Path, num_videos: int, num_frames: int) -> None:
    """Write the missing files of a pack, in which all frames are equal."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    size = -(-num_videos // NUM_FILES)
    parts = [range(i, min(i + size, num_videos)) for i in range(0, num_videos, size)]
    layouts = {}  # number of videos → rows of the offsets; files of this length differ in content
    for number, part in enumerate(parts):
        path = folder / pack_writer.array_record_name("train", number, len(parts))
        rows_path = folder / f"{number:05d}.offsets"
        if rows_path.exists():
            continue
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        checksums = []
        for record in make_records(part, num_frames):
            writer.write(record)
            checksums.append(zlib.crc32(record))
        writer.close()
        if len(part) not in layouts:
            layouts[len(part)] = record_offsets.find_offsets(path)
        rows = layouts[len(part)].copy()
        rows["crc32"] = checksums
        rows_path.write_bytes(rows.tobytes())
    files = sorted(folder.glob("*.offsets"))
    record_offsets.join_offsets(files, record_offsets.offsets_path(folder, "train"))
    rows = ((f"{i:08d}", i % NUM_CLASSES, num_frames, 30.0, 0) for i in range(num_videos))
    table = pack_index.format_table(pack_index.list_videos(rows, 1))
    pack_index.table_path(folder, "train").write_text(table)
    lengths = {"train": [len(part) * num_frames for part in parts]}
    tfds_api.write_metadata(folder, LABELS, lengths, {"train": 1})


def make_records(videos: range, num_frames: int) -> Iterator[bytes]:
    """Yield the records of videos, which are assembled from parts: serializing them takes long.

    The features in a record are sorted by name. Those that depend on the frame come before the
    picture, those that depend on the video after it.
    """
    picture = cv2.imencode(".png", np.zeros((16, 16, 3), np.uint8))[1].tobytes()

    def serialize(numbers: list[tuple[int, int]]) -> Iterator[bytes]:
        examples = (
            {"frames": [picture], "first": frame, "num_frames": num_frames, "fps": 30.0,
             "label": video % NUM_CLASSES, "id": f"{video:08d}", "times": b""}
            for video, frame in numbers
        )  # fmt: skip
        return tfds_api.serialize_examples(examples, LABELS)

    frames = [*serialize([(videos[0], frame) for frame in range(num_frames)])]
    length = len(frames[0]) - frames[0].index(picture) - len(picture)  # after the picture
    starts = [record[:-length] for record in frames]
    for record in serialize([(video, 0) for video in videos]):
        end = record[-length:]
        yield from (start + end for start in starts)


def measure_pack(folder: str, workers: int) -> None:
    """Open a pack, read clips and print the memory of the processes."""
    flags.FLAGS.mark_as_parsed()
    memory = {"imports": read_memory(os.getpid())}
    start = time.perf_counter()
    config = DatasetConfig(source="pack", folder=folder)
    dataset = open_dataset(config, NUM_CLASSES, ("train",))
    seconds = time.perf_counter() - start
    memory["open"] = read_memory(os.getpid())
    records = dataset.records["train"]
    batches = make_train_iter(
        records,
        spec=SPEC, batch_size=16, order=VideoOrder(seed=0), num_threads=2, num_workers=workers,
    )  # fmt: skip
    start, count = time.perf_counter(), 16 * NUM_FILES
    for _ in range(count // 16):
        assert next(batches)["mask"].all()
    rate = count / (time.perf_counter() - start)
    memory["clips"] = read_memory(os.getpid())
    print(f"{len(records)} videos: opened in {seconds:.2f} s, {rate:.0f} clips/s")
    for name, (resident, private) in memory.items():
        print(f"  main process, after {name:8} {resident:8.1f} MB, private {private:8.1f} MB")
    for number, child in enumerate(find_children(os.getpid())):
        resident, private = read_memory(child)
        print(f"  child process {number:12} {resident:8.1f} MB, private {private:8.1f} MB")
    batches.close()


def read_memory(process: int) -> tuple[float, float]:
    """Return the resident memory of a process, and the part that it does not share, in MB."""
    values = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes, *_ = line.split()
        values[name] = int(kilobytes) * 1024 / 1e6
    return values["Rss:"], values["Private_Clean:"] + values["Private_Dirty:"]


def find_children(process: int) -> list[int]:
    """Return the ids of the processes that a process has started."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return sorted(int(i) for task in tasks for i in (task / "children").read_text().split())


# ------------------------------------------------------------------ lists


def write_list(folder: Path, num_videos: int) -> None:
    """Write files `videos/CLASS/VIDEO.mp4` of one byte, and two lists of them."""
    names = [f"{i:011d}_000001_000011.mp4" for i in range(num_videos)]
    for i, label in enumerate(LABELS):
        videos = folder / "videos" / label
        videos.mkdir(parents=True, exist_ok=True)
        existing = {*os.listdir(videos)}
        for name in names[i::NUM_CLASSES]:
            if name not in existing:
                with open(videos / name, "wb", buffering=0) as file:
                    file.write(b"x")
    for kind in ("list", "kinetics"):
        (folder / kind).mkdir(exist_ok=True)
        with open(folder / kind / "train.csv", "w") as file:
            file.write("path,label\n" if kind == "list" else KINETICS)
            for i, name in enumerate(names):
                label = LABELS[i % NUM_CLASSES]
                line = f"{label},{name[:11]},1,11,train"
                file.write(f"{f'{label}/{name},{label}' if kind == 'list' else line}\n")


KINETICS = "label,youtube_id,time_start,time_end,split\n"


def measure_list(folder: str, kind: str) -> None:
    """Open a list and print the time and the peak of the memory."""
    videos = os.path.join(folder, "videos")
    if kind == "class_folders":
        config = DatasetConfig(source=kind, folder=videos)
    else:
        config = DatasetConfig(source="folder", folder=os.path.join(folder, kind), prefix=videos)
    before, _ = read_memory(os.getpid())
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start, cpu_start = time.perf_counter(), time.process_time()
    dataset = open_dataset(config, NUM_CLASSES, ("train",))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    after, _ = read_memory(os.getpid())
    print(
        f"{kind:14} {len(dataset.records['train'])} videos: {seconds:.2f} s "
        f"({cpu_seconds:.2f} s of CPU time), peak {peak - before:.0f} MB, "
        f"afterwards {after - before:.0f} MB"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("kind", choices=("pack", "list"), help="what to measure")
    add("--folder", required=True, help="folder of the data, on a disk with enough space")
    add("--videos", type=int, default=2560, help="number of videos (default: 2560)")
    add("--frames", type=int, default=32, help="frames per video of the pack (default: 32)")
    add("--workers", type=int, default=2, help="worker processes (default: 2)")
    add("--measure", nargs=2, help=argparse.SUPPRESS)  # folder, and workers or the kind of list
    args = parser.parse_args()
    if args.measure:
        path, argument = args.measure
        measure_pack(path, int(argument)) if args.kind == "pack" else measure_list(path, argument)
        return
    folder, runs = Path(args.folder), []
    if args.kind == "list":
        write_list(folder, args.videos)
        runs = [(folder, kind) for kind in LISTS]
    else:
        sizes = {"small": (NUM_FILES, SPEC.num_frames), "large": (args.videos, args.frames)}
        for name, size in sizes.items():
            write_pack(folder / name, *size)
        runs = [(folder / name, str(n)) for n in (0, args.workers) for name in sizes]
    for run in runs:
        command = [sys.executable, __file__, args.kind, "--folder", str(folder), "--measure"]
        subprocess.run([*command, *map(str, run)], check=True)


if __name__ == "__main__":
    main()
