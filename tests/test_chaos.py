"""Runs that are stopped or killed repeatedly equal uninterrupted runs (marked `full`)."""

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

ROOT = Path(__file__).parents[1]
STEPS = 90
FIELDS = {
    **{"data.source": "folder", "model.width": 16, "model.depth": 1, "batch_size": 16},
    **{"num_epochs": 30.0, "eval.batch_size": 8, "eval.every_epochs": 3.0, "log_steps": 2},
    "checkpoint_every_epochs": 0.67,  # 2 steps
}

# 30 steps, so that log windows are of 3; checkpoints and evaluations end in the middle of some.
SHORT_FIELDS = FIELDS | {"num_epochs": 10.0, "eval.every_epochs": 2.67, "log_steps": 50}
NUM_KILLS, NUM_SIGNALS = 100, 200
LANES = 2  # runs at a time
HANG_SECONDS = 120  # a run that takes longer from a signal to its end hangs
CRASHES = ("Traceback", "Exception ignored", "Fatal Python error", "terminate called")


def start(workdir: Path, data: Path, fields: dict = FIELDS) -> subprocess.Popen:
    command = [sys.executable, "main.py", "--config=configs/motion.py", f"--workdir={workdir}"]
    fields = fields | {"data.folder": data}
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    flags = "--xla_backend_optimization_level=0"  # compiles twice as fast
    environment = os.environ | {"XLA_FLAGS": flags}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with open(f"{workdir}.txt", "a") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )


def output_of(workdir: Path) -> str:
    path = Path(f"{workdir}.txt")
    return path.read_text() if path.exists() else ""


def wait_for(run: subprocess.Popen, condition) -> None:
    """Return as soon as a condition holds, while the run still goes on."""
    until = time.monotonic() + 120
    while not condition():
        assert run.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.002)


def numbers(workdir: Path) -> list[tuple]:
    """Step, name and value of all losses and accuracies, in the order of `metrics.jsonl`."""
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
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, motion_folder).wait(timeout=300) == 0, output_of(whole)

    def newest() -> int:
        return max(checkpoint.find_steps(killed), default=0)

    rng, reached = np.random.default_rng(0), 0
    for moment in [*(["start", "steps", "save", "save"] * 3)[:9], "model"]:
        started = output_of(killed).count("first step")
        run = start(killed, motion_folder)
        try:
            if moment == "start":
                time.sleep(rng.uniform(0, 5))
            elif moment == "steps":
                wait_for(run, lambda: output_of(killed).count("first step") > started)  # noqa: B023
                time.sleep(rng.uniform(0, 1.5))
            elif moment == "save":
                wait_for(run, lambda: newest() > reached)  # noqa: B023
                time.sleep(rng.uniform(0, 0.5))
                wait_for(run, lambda: [*killed.glob("checkpoints/*.orbax-checkpoint-tmp")])
                time.sleep(rng.uniform(0, 0.02))
            else:
                wait_for(run, (killed / ".model.partial").exists)
            assert run.poll() is None, "the run ended before it was killed"
        finally:
            run.kill()
            run.wait()
        assert newest() >= reached + (moment == "save")
        reached = newest()
    assert reached == STEPS
    assert start(killed, motion_folder).wait(timeout=300) == 0, output_of(killed)

    reports = [json.loads((folder / "eval.json").read_text()) for folder in (whole, killed)]
    for name in ("weights_sha256", "top1", "loss", "num_videos"):
        assert reports[0][name] == reports[1][name], name
    assert numbers(killed) == numbers(whole)
    assert numbers(whole)[-1][0] == STEPS
    # Nothing half-written stays, and nothing whole was set aside as damaged.
    names = [{path.name for path in folder.iterdir()} for folder in (whole, killed)]
    assert names[0] == names[1]
    assert not [*killed.rglob("*.orbax-checkpoint-tmp")]
    assert checkpoint.find_steps(killed) == checkpoint.find_steps(whole)
    bests = [json.loads((folder / "best" / "model.json").read_text()) for folder in (whole, killed)]
    for name in ("top1", "step"):
        assert bests[0]["provenance"][name] == bests[1]["provenance"][name]


def in_loop(workdir: Path) -> int:
    """Return how many starts of a run have reached the training loop."""
    return output_of(workdir).count("M parameters, ")


def wait_for_signal(run: subprocess.Popen, workdir: Path, starts: int, rng, seconds) -> None:
    """Wait until the moment of a signal, or until the run ends before it.

    Args:
        run: The run.
        workdir: Its workdir.
        starts: How many starts had reached the loop before this one.
        rng: One half of the moments is uniform from the start on, the other from the loop on.
        seconds: How long an uninterrupted run takes from the start on and from the loop on.
    """
    from_loop = rng.integers(2)
    until = time.monotonic() + HANG_SECONDS
    while from_loop and in_loop(workdir) == starts and run.poll() is None:
        assert time.monotonic() < until, output_of(workdir)
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(timeout=rng.uniform(0, seconds[from_loop]))


def interrupt_runs(
    folder: Path, data: Path, whole: Path, numbers: list[int], seconds, seed: int
) -> collections.Counter:
    """Interrupt runs at random moments and continue them, until all signals are used.

    Args:
        folder: Of the runs' workdirs.
        data: The videos.
        whole: Workdir of an uninterrupted run.
        numbers: The signals, in order.
        seconds: As for `wait_for_signal`.
        seed: Of the moments.

    Returns:
        Counts of signal name and exit code.
    """
    rng, codes, count = np.random.default_rng(seed), collections.Counter(), 0
    expected = json.loads((whole / "eval.json").read_text())
    numbers = numbers[::-1]
    while numbers:
        workdir, code = folder / str(count), None
        count += 1
        while code != 0:
            starts, ends = in_loop(workdir), {0}
            run = start(workdir, data, SHORT_FIELDS)
            try:
                if numbers:
                    wait_for_signal(run, workdir, starts, rng, seconds)
                if numbers and run.poll() is None:
                    number = numbers.pop()
                    ends |= {-number if number == signal.SIGKILL else 128 + number}
                    run.send_signal(number)
                code = run.wait(timeout=HANG_SECONDS)
            finally:
                run.kill()
                run.wait()
            assert code in ends, f"{code}: {output_of(workdir)}"
            if len(ends) > 1:
                codes[signal.Signals(number).name, code] += 1
            if (workdir / "eval.json").exists():
                report = json.loads((workdir / "eval.json").read_text())
                assert report["weights_sha256"] == expected["weights_sha256"]
        check_same_outputs(workdir, whole)
        assert not [word for word in CRASHES if word in output_of(workdir)], output_of(workdir)
    return codes


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kinds", "count"),
    [((signal.SIGKILL,), NUM_KILLS), ((signal.SIGTERM, signal.SIGINT), NUM_SIGNALS)],
)
def test_randomly_stopped_runs_lose_nothing(motion_folder, tmp_path, kinds, count):
    for name in ("whole", "again"):  # the second run finds the compiled programs in the cache
        began = time.monotonic()
        run = start(tmp_path / name, motion_folder, SHORT_FIELDS)
        wait_for(run, lambda: in_loop(tmp_path / name))  # noqa: B023
        loop = time.monotonic()
        assert run.wait(timeout=600) == 0, output_of(tmp_path / name)
        seconds = time.monotonic() - began, time.monotonic() - loop
    check_same_outputs(tmp_path / "again", tmp_path / "whole")
    numbers = [kinds[i % len(kinds)] for i in range(count)]

    def interrupt(lane: int) -> collections.Counter:
        folder, part = tmp_path / str(lane), numbers[lane * count // LANES :][: count // LANES]
        folder.mkdir()
        return interrupt_runs(folder, motion_folder, tmp_path / "whole", part, seconds, seed=lane)

    with concurrent.futures.ThreadPoolExecutor(LANES) as pool:
        codes = sum(pool.map(interrupt, range(LANES)), collections.Counter())
    print(f"{count} signals to runs of {seconds[0]:.1f} s; exit codes: {dict(codes)}")
    assert codes.total() == count
