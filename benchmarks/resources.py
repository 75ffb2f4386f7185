"""Resources of a process and its descendants, from /proc."""

import collections
import contextlib
import dataclasses
import os
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Resources:
    """Resources of a process and its descendants.

    Attributes:
        megabytes: Resident memory of the process.
        other_megabytes: Resident memory of the descendants.
        files: Open files of all processes.
        threads: Threads of all processes.
        processes: Number of processes.
        cpu_seconds: CPU time of the living processes.
    """

    megabytes: float
    other_megabytes: float
    files: int
    threads: int
    processes: int
    cpu_seconds: float


def measure(process: int) -> Resources:
    """Return the resources of a process and its descendants."""
    children = collections.defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            children[int(parent)].append(int(folder.name))
    ids = [process]
    for i in ids:
        ids += children[i]
    values = []
    for i in ids:
        with contextlib.suppress(OSError):  # it has ended
            values.append(_measure_one(Path(f"/proc/{i}")))
    memory, files, threads, seconds = zip(*values, strict=True)
    return Resources(
        megabytes=round(memory[0], 1),
        other_megabytes=round(sum(memory[1:]), 1),
        files=sum(files),
        threads=sum(threads),
        processes=len(values),
        cpu_seconds=round(sum(seconds), 2),
    )


def _measure_one(folder: Path) -> tuple[float, int, int, float]:
    """Return the resident megabytes, open files, threads and CPU seconds of a process."""
    stat = (folder / "stat").read_text().rpartition(")")[2].split()
    megabytes = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    seconds = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    return megabytes, len(os.listdir(folder / "fd")), int(stat[17]), seconds
