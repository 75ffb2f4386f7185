"""Training runs that are repeatedly stopped or killed equal uninterrupted runs (marked `full`)."""

import collections
import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxvid.training import checkpoint
from tests.outputs import check_same_outputs
from tests.xla_flags import FAST_COMPILATION

ROOT = Path(__file__).parents[1]
STEPS = 90
FIELDS = {
    **{"data.source": "folder", "model.width": 16, "model.depth": 1, "batch_size": 16},
    **{"num_epochs": 30.0, "eval.batch_size": 8, "eval.every_epochs": 3.0, "log_steps": 2},
    "checkpoint_every_epochs": 0.67,  # 2 steps
}

# 30 steps. `log_steps` is reduced to a tenth of the run, i.e. windows of 3 steps. Some checkpoints
# and evaluations are within a window.
SHORT_FIELDS = FIELDS | {"num_epochs": 10.0, "eval.every_epochs": 2.67, "log_steps": 50}
NUM_KILLS, NUM_SIGNALS = 100, 200
NUM_PARALLEL = 2  # runs at a time
HANG_SECONDS = 120  # timeout for each phase of a run, and from a signal to the run's end
# Moments of the kills: while a run starts, between its steps, and while it saves a checkpoint or
# the model folder.
MOMENTS = [*["start", "steps", "save", "save"] * 2, "start", "model"]
CRASH_MESSAGES = ("Traceback", "Exception ignored", "Fatal Python error", "terminate called")


def start(workdir: Path, data: Path, fields: dict = FIELDS) -> subprocess.Popen:
    """Start or resume a training run; append its output to `WORKDIR.txt`."""
    command = [sys.executable, "main.py", "--config=configs/motion.py", f"--workdir={workdir}"]
    fields = fields | {"data.folder": data}
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILATION}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with open(f"{workdir}.txt", "a") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )


def read_output(workdir: Path) -> str:
    path = Path(f"{workdir}.txt")
    return path.read_text() if path.exists() else ""


def wait_for(run: subprocess.Popen, condition) -> None:
    """Wait until a condition holds; fail if the run ends first."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert run.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def read_metrics(workdir: Path) -> list[tuple]:
    """Return step, name and value of all losses and accuracies, in the order of `metrics.jsonl`."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        (row["step"], name, value)
        for row in rows
        for name, value in row.items()
        if name.startswith("val/") or name in ("train/loss", "train/top1")
    ]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_randomly_killed_runs_are_bit_identical(motion_folder, tmp_path):
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    assert start(uninterrupted, motion_folder).wait(timeout=300) == 0, read_output(uninterrupted)

    def newest_step() -> int:
        return max(checkpoint.find_steps(killed), default=0)

    rng, reached = np.random.default_rng(0), 0
    for moment in MOMENTS:
        starts = read_output(killed).count("first step")
        run = start(killed, motion_folder)
        try:
            if moment == "start":
                time.sleep(rng.uniform(0, 5))
            elif moment == "steps":
                wait_for(run, lambda: read_output(killed).count("first step") > starts)  # noqa: B023
                time.sleep(rng.uniform(0, 1.5))
            elif moment == "save":
                wait_for(run, lambda: newest_step() > reached)  # noqa: B023
                time.sleep(rng.uniform(0, 0.5))
                wait_for(run, lambda: [*killed.glob("checkpoints/*.orbax-checkpoint-tmp")])
                time.sleep(rng.uniform(0, 0.02))
            else:
                wait_for(run, (killed / ".model.partial").exists)
            assert run.poll() is None, "the run ended before it was killed"
        finally:
            run.kill()
            run.wait()
        minimum = reached + 1 if moment == "save" else reached
        assert newest_step() >= minimum
        reached = newest_step()
    assert reached == STEPS
    assert start(killed, motion_folder).wait(timeout=300) == 0, read_output(killed)

    reports = [json.loads((folder / "eval.json").read_text()) for folder in (uninterrupted, killed)]
    for name in ("weights_sha256", "top1", "loss", "num_videos"):
        assert reports[0][name] == reports[1][name], name
    assert read_metrics(killed) == read_metrics(uninterrupted)
    assert read_metrics(uninterrupted)[-1][0] == STEPS
    # No partial files remain, and no intact checkpoint was set aside as damaged.
    names = [{path.name for path in folder.iterdir()} for folder in (uninterrupted, killed)]
    assert names[0] == names[1]
    assert not [*killed.rglob("*.orbax-checkpoint-tmp")]
    assert checkpoint.find_steps(killed) == checkpoint.find_steps(uninterrupted)
    cards = [
        json.loads((folder / "best" / "model.json").read_text())
        for folder in (uninterrupted, killed)
    ]
    for name in ("top1", "step"):
        assert cards[0]["provenance"][name] == cards[1]["provenance"][name]


def count_loop_starts(workdir: Path) -> int:
    """Return how many times a run, including its resumptions, has reached the training loop."""
    return read_output(workdir).count("M parameters, ")


def wait_for_random_moment(run: subprocess.Popen, workdir: Path, starts: int, rng, seconds) -> None:
    """Wait until a random moment of a run; return early if the run ends first.

    The moment is drawn uniformly from the duration of an uninterrupted run, counted from now, or
    from the duration of its training loop, counted from the start of the loop. Both cases have a
    probability of 1/2.

    Args:
        run: The process of the run.
        workdir: Workdir of the run.
        starts: Result of `count_loop_starts` before this process was started.
        rng: Random generator.
        seconds: Durations of an uninterrupted run: in all, and from the start of its training loop.
    """
    from_loop = rng.integers(2)  # 1: wait for the training loop first
    deadline = time.monotonic() + HANG_SECONDS
    while from_loop and count_loop_starts(workdir) == starts and run.poll() is None:
        assert time.monotonic() < deadline, read_output(workdir)
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(timeout=rng.uniform(0, seconds[from_loop]))


def interrupt_runs(
    folder: Path, data: Path, uninterrupted: Path, signals: list[int], seconds, seed: int
) -> collections.Counter:
    """Interrupt runs at random moments and resume them, until all signals are sent.

    Args:
        folder: Folder of the runs' workdirs.
        data: Folder of the videos.
        uninterrupted: Workdir of an uninterrupted run.
        signals: The signals, in order.
        seconds: Durations, as in `wait_for_random_moment`.
        seed: Seed of the moments.

    Returns:
        Number of signals for each signal name and exit code.
    """
    rng, codes, num_runs = np.random.default_rng(seed), collections.Counter(), 0
    expected = json.loads((uninterrupted / "eval.json").read_text())
    remaining = signals[::-1]
    while remaining:
        workdir, code = folder / str(num_runs), None
        num_runs += 1
        while code != 0:
            starts, expected_codes = count_loop_starts(workdir), {0}
            run = start(workdir, data, SHORT_FIELDS)
            try:
                if remaining:
                    wait_for_random_moment(run, workdir, starts, rng, seconds)
                if remaining and run.poll() is None:
                    number = remaining.pop()
                    expected_codes |= {-number if number == signal.SIGKILL else 128 + number}
                    run.send_signal(number)
                code = run.wait(timeout=HANG_SECONDS)
            finally:
                run.kill()
                run.wait()
            assert code in expected_codes, f"{code}: {read_output(workdir)}"
            if len(expected_codes) > 1:  # a signal was sent
                codes[signal.Signals(number).name, code] += 1
            if (workdir / "eval.json").exists():
                report = json.loads((workdir / "eval.json").read_text())
                assert report["weights_sha256"] == expected["weights_sha256"]
        check_same_outputs(workdir, uninterrupted)
        output = read_output(workdir)
        assert not [message for message in CRASH_MESSAGES if message in output], output
    return codes


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("signals", "count"),
    [((signal.SIGKILL,), NUM_KILLS), ((signal.SIGTERM, signal.SIGINT), NUM_SIGNALS)],
)
def test_randomly_stopped_runs_equal_uninterrupted_runs(motion_folder, tmp_path, signals, count):
    # Only the second run is timed, because its programs are already in the compilation cache.
    for name in ("uninterrupted", "timed"):
        run_start = time.monotonic()
        run = start(tmp_path / name, motion_folder, SHORT_FIELDS)
        wait_for(run, lambda: count_loop_starts(tmp_path / name))  # noqa: B023
        loop_start = time.monotonic()
        assert run.wait(timeout=600) == 0, read_output(tmp_path / name)
        seconds = time.monotonic() - run_start, time.monotonic() - loop_start
    check_same_outputs(tmp_path / "timed", tmp_path / "uninterrupted")
    sequence = [signals[i % len(signals)] for i in range(count)]

    def interrupt(thread: int) -> collections.Counter:
        folder = tmp_path / str(thread)
        folder.mkdir()
        part = sequence[thread * count // NUM_PARALLEL :][: count // NUM_PARALLEL]
        return interrupt_runs(
            folder, motion_folder, tmp_path / "uninterrupted", part, seconds, seed=thread
        )

    with concurrent.futures.ThreadPoolExecutor(NUM_PARALLEL) as pool:
        codes = sum(pool.map(interrupt, range(NUM_PARALLEL)), collections.Counter())
    print(f"{count} signals to runs of {seconds[0]:.1f} s; exit codes: {dict(codes)}")
    assert codes.total() == count
