"""The steps that train the demo and compare a resumed run with an uninterrupted one."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import ROOT, Context

CONFIG = "configs/motion.py"
FIRST_STEP = re.compile(r"the first step was done ([\d.]+) s after the start")


def demo(ctx: Context) -> None:
    """Train and evaluate the demo with the command line."""
    workdir = ctx.work / "demo"
    shutil.rmtree(workdir, ignore_errors=True)
    command = [
        *(sys.executable, "main.py", "--config", CONFIG, "--workdir", str(workdir)),
        f"--config.data.folder={ctx.work / 'motion'}",
        f"--config.data.num_threads={ctx.threads}",
        *ctx.size.demo,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(f"main.py: exit code {done.returncode}: {last_line(done.stderr)}")
    report = json.loads((workdir / "eval.json").read_text())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    first = FIRST_STEP.search((workdir / "log.txt").read_text())
    row = {
        "top-1 (%)": report["top1"],
        "videos": report["num_videos"],
        "steps": rows[-1]["step"],
        "first step after (s)": float(first[1]) if first else None,
        "command": f"python main.py --config {CONFIG} --workdir runs/motion",
    }
    ctx.add("demo", row)


def last_line(text: str) -> str:
    """Return the last line of a text that is not empty."""
    return (text.strip().splitlines() or [""])[-1]


# ------------------------------------------------------------------ resume


def resume(ctx: Context) -> None:
    """Compare deterministic runs: uninterrupted, and interrupted and resumed in a new process.

    If they differ, the interrupted run is repeated with the autotuning results of the
    uninterrupted run. If it is then bit-identical, autotuning causes the difference.
    """
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # two runs share the GPU
    overrides = {
        **ctx.size.resume,
        "deterministic": True,
        "data.folder": str(ctx.work / "resume_clips"),
        "data.num_threads": ctx.threads,
    }
    folders = {name: ctx.work / "resume" / name for name in ("whole", "resumed", "same_autotuning")}
    shutil.rmtree(ctx.work / "resume", ignore_errors=True)
    make_clips(overrides)
    with ThreadPoolExecutor() as threads:  # each waits for processes
        whole = threads.submit(run_parts, overrides, folders["whole"], (None,))
        resumed = threads.submit(run_parts, overrides, folders["resumed"], (ctx.size.stop, None))
        expected = whole.result()
        result = resumed.result()
    if report_resumed(ctx, "own autotuning", expected, result):
        return
    cache = "xla_cache"
    if (folders["whole"] / cache).exists():
        shutil.copytree(folders["whole"] / cache, folders["same_autotuning"] / cache)
    result = run_parts(overrides, folders["same_autotuning"], (ctx.size.stop, None))
    report_resumed(ctx, "autotuning results of the uninterrupted run", expected, result)


def make_clips(overrides: dict[str, Any]) -> None:
    """Write the clips in advance, so that several runs do not wait for each other."""
    from jaxvid.data.synthetic_motion import make_motion

    counts = {n: overrides[f"data.motion.{n}"] for n in ("num_train", "num_val")}
    make_motion(overrides["data.folder"], **counts, seed=0)


def run_parts(overrides: dict[str, Any], workdir: Path, stops: tuple[int | None, ...]) -> dict:
    """Train in one process per entry of `stops`; return the report of the last one.

    Args:
        overrides: Fields of the demo's config.
        workdir: The run's folder.
        stops: Step at which each process saves and ends; None: the end of the run.
    """
    spawn = multiprocessing.get_context("spawn")
    for stop in stops:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            report = pool.submit(train_part, overrides, workdir, stop).result()
    return report


def train_part(overrides: dict[str, Any], workdir: Path, stop: int | None) -> dict | None:
    """Train the demo until a step; return the report if the run has ended."""
    from absl import flags

    from configs import motion
    from jaxvid.train import train

    flags.FLAGS.mark_as_parsed()  # Grain reads them
    config = motion.get_config().unlock()
    config.update_from_flattened_dict(overrides)
    return train(config.lock(), workdir, stop_step=stop)


def report_resumed(ctx: Context, title: str, expected: dict, report: dict) -> bool:
    """Report the weights and the accuracy of two runs; return whether the weights are equal."""
    key = "weights_sha256"
    same = report[key] == expected[key]
    ctx.add(
        "resume",
        {
            "resumed run": title,
            "bit-identical weights": same,
            "top-1, uninterrupted (%)": expected["top1"],
            "top-1, resumed (%)": report["top1"],
        },
    )
    if not same:
        ctx.failures.append(f"{title}: the weights of the resumed run differ")
    return same
