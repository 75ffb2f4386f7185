"""Memory use stays constant; no process and no shared memory remains (marked `full`)."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxvid.data.clips.clip import ClipSpec
from jaxvid.data.pipeline import make_train_iter
from jaxvid.data.video_order import VideoOrder

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = Path("/dev/shm")


class NoiseRecord:
    """A video that repeats one generated frame of noise, so that nothing is decoded."""

    label = 0
    path = None
    num_frames = 32
    fps = 30.0

    def __init__(self, seed: int):
        self.id = str(seed)
        self._seed = seed

    @contextlib.contextmanager
    def open(self):
        yield self

    def get_frames(self, indices) -> np.ndarray:
        frame = np.random.default_rng(self._seed).integers(0, 255, (256, 256, 3), np.uint8)
        return np.stack([frame] * len(indices))


def descendants(pid: int) -> list[int]:
    """Return the ids of all running descendants of a process."""
    files = Path(f"/proc/{pid}/task").glob("*/children")  # one file per thread
    children = [int(child) for file in files for child in file.read_text().split()]
    return children + [pid_below for child in children for pid_below in descendants(child)]


def proportional_bytes(pid: int) -> int:
    """Return a process's proportional set size: shared pages are divided among their users."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_memory_is_constant_over_2000_batches(num_workers):
    before = {*SHARED_MEMORY.iterdir()}
    spec = ClipSpec(num_frames=16, crop=224, short_side=256, train_short_side=(256, 256))
    batches = make_train_iter(
        [NoiseRecord(i) for i in range(100)],
        spec=spec,
        batch_size=2,
        order=VideoOrder(seed=0),
        num_threads=2,
        num_workers=num_workers,
    )
    used = []
    for step in range(2000):
        assert next(batches)["video"].shape == (2, 16, 224, 224, 3)
        if step % 100 == 99:
            used.append(sum(map(proportional_bytes, [os.getpid(), *descendants(os.getpid())])))
    batches.close()
    # Compare the minimum of each half, because the number of buffered batches varies.
    assert min(used[10:]) <= min(used[:10]) + 30e6, [round(value / 1e6) for value in used]
    del batches
    gc.collect()  # the named semaphores exist until the iterator is deleted
    time.sleep(2)
    assert {*SHARED_MEMORY.iterdir()} <= before


@pytest.mark.full
@pytest.mark.timeout(300)
def test_interrupted_training_leaves_no_process_and_no_shared_memory(motion_folder, tmp_path):
    before = {*SHARED_MEMORY.iterdir()}
    command = [sys.executable, "main.py", "--config", "configs/motion.py", "--workdir", tmp_path]
    options = [f"--config.data.folder={motion_folder}", "--config.data.source=folder"]
    options += ["--config.data.num_workers=2", "--config.num_epochs=1000"]
    run = subprocess.Popen([*command, *options], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in run.stderr:
        if "first step" in line:
            break
    workers = descendants(run.pid)
    assert len(workers) >= 2
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=120)
    assert run.returncode == 130
    time.sleep(2)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert {*SHARED_MEMORY.iterdir()} <= before
