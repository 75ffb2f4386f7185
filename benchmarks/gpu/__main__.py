"""Measure jaxvid on a GPU: correctness, speed against PyTorch, options, input, memory.

python -m benchmarks.gpu --minutes 8 --output runs/gpu             all steps until the time is over
python -m benchmarks.gpu --only kernels input                      some steps
python -m benchmarks.gpu --list                                    names of the steps
python -m benchmarks.gpu --size tiny --output runs/gpu_tiny        the same code on a CPU

The steps run in the order of their importance, each in a process of its own with a time limit, so
that a failure affects only one step. The output folder has results.json and results.md (rewritten
after each step), plots, and the output of each step in logs/. The results of steps that were run
earlier are kept.
"""

import argparse
import datetime
import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.results import Results
from benchmarks.gpu.runner import Task, clock, run_tasks, step_command
from benchmarks.gpu.sizes import SIZES
from benchmarks.gpu.steps import STEPS


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="time for all steps in minutes (default 8)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu"), help="output folder (default runs/gpu)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="STEP", help="steps to run (default: all)"
    )
    parser.add_argument(
        "--missing",
        action="store_true",
        help="run only steps that failed or were not run",
    )
    parser.add_argument(
        "--size", choices=SIZES, default="full", help="sizes of the measurements (default full)"
    )
    parser.add_argument("--list", action="store_true", help="print the steps and exit")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g}: must be above 0")
    return args


def make_tasks(args: argparse.Namespace, results: Results, work: Path) -> list[Task]:
    """Return the selected steps as tasks."""
    tasks = []
    for step in STEPS:
        if args.only and step.name not in args.only:
            continue
        if args.missing and results.is_done(step.name):
            continue
        size = "" if args.size == "full" else f" --size {args.size}"
        rows = args.output.absolute() / "steps" / f"{step.name}.jsonl"
        tasks.append(
            Task(
                name=step.name,
                title=step.title,
                share=step.share,
                needed=step.needed,
                least=step.least if args.size == "full" else 1.0,
                command=step_command(step.name, args.size, rows, work),
                shown=f"python -m benchmarks.gpu --only {step.name}{size}",
                results=rows,
            )
        )
    return tasks


def make_environment(size: str, work: Path) -> dict[str, str]:
    """Return the environment of the steps: caches of compiled programs that last for one run."""
    caches = {
        "JAX_COMPILATION_CACHE_DIR": "xla",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
    }
    environment = {**os.environ, **{name: str(work / folder) for name, folder in caches.items()}}
    if size == "tiny":  # compile faster, and keep programs that compile fast
        environment.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return environment


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if a step has failed."""
    args = parse_arguments(argv)
    if args.list:
        for step in STEPS:
            print(f"{step.name:14} {step.title}")
        return 0
    start = time.monotonic()
    for folder in ("steps", "logs"):
        (args.output / folder).mkdir(parents=True, exist_ok=True)
    about = {
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *(argv or sys.argv[1:])]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "size": args.size,
        "minutes": args.minutes,
    }
    results, statuses = Results(args.output, about), []

    def save(result: dict, is_complete: bool) -> None:
        results.save(result, is_complete)
        if is_complete:
            statuses.append(result["status"])

    # A SystemExit ends the running step and removes the folder of intermediate files.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        tasks = make_tasks(args, results, Path(work))
        environment = make_environment(args.size, Path(work))
        run_tasks(tasks, 60 * args.minutes, args.output / "logs", environment, save)
    done = statuses.count("done")
    took = clock(time.monotonic() - start)
    print(f"{done} of {len(statuses)} steps done in {took}; see {args.output / 'results.md'}")
    return int("failed" in statuses)


if __name__ == "__main__":
    sys.exit(main())
