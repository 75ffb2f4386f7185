"""Run one step of the benchmark: the program that `benchmarks.gpu` starts for each step."""

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

from benchmarks.gpu.context import Context
from benchmarks.gpu.sizes import SIZES
from benchmarks.gpu.steps import STEPS


def end_with_parent(parent: int) -> None:
    """Kill this process group when the parent process has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Run the command line; return 1 if a measurement failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", help="name of the step")
    parser.add_argument("--size", required=True, choices=SIZES, help="sizes of the measurements")
    parser.add_argument("--results", required=True, type=Path, help="file of the results")
    parser.add_argument("--work", required=True, type=Path, help="folder of intermediate files")
    parser.add_argument("--seconds", required=True, type=float, help="time limit in seconds")
    args = parser.parse_args()
    if os.getpgid(0) == os.getpid():  # `benchmarks.gpu` starts each step in a group of its own
        end_with_parent(os.getppid())
    ctx = Context(SIZES[args.size], args.results, args.work, args.seconds)
    step = next(step for step in STEPS if step.name == args.step)
    step.load()(ctx)
    for failure in ctx.failures:
        print(f"error: {failure}", file=sys.stderr)
    return bool(ctx.failures)


if __name__ == "__main__":
    sys.exit(main())
