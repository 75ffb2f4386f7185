"""Runs the steps one after the other, each in a process with a time limit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.context import NOT_RUN, ROOT

POLL_SECONDS = 0.1
LINE_SECONDS = 15.0  # time between two progress lines of a step
ERROR_LINES = 12  # last lines of the log of a failed step


class Task(NamedTuple):
    """A step to run.

    Attributes:
        name: Name of the step.
        title: What is measured.
        share: Weight in the distribution of the time.
        needed: Minimum time limit in seconds, if this much time is left.
        least: The step is not started if fewer seconds are left.
        command: Function of the time limit in seconds that returns the command.
        shown: The command that repeats the step.
        results: File of the step's rows: one JSON object `{"table", "row"}` per line.
    """

    name: str
    title: str
    share: float
    needed: float
    least: float
    command: Callable[[float], list[str]]
    shown: str
    results: Path


def limit_of(tasks: Sequence[Task], seconds_left: float) -> float:
    """Return the time limit of the first task, 0 if it cannot be started.

    The remaining time is divided among all tasks in proportion to their shares. The first task gets
    at least `needed` seconds, if this much time is left.
    """
    task = tasks[0]
    if seconds_left < task.least:
        return 0.0
    share = seconds_left * task.share / sum(t.share for t in tasks)
    return min(seconds_left, max(task.needed, share))


def run_tasks(
    tasks: Sequence[Task],
    seconds: float,
    logs: Path,
    environment: dict[str, str],
    save: Callable[[dict[str, Any], bool], None],
) -> None:
    """Run tasks until the time is over.

    Args:
        tasks: The tasks, in the order of their importance.
        seconds: Time for all tasks.
        logs: Folder of the logs; `NAME.log` has the output of a task.
        environment: Environment variables of the processes.
        save: Called with the result of a task, and whether the task has ended: also called while it
            runs, when it has new rows.
    """
    end = time.monotonic() + seconds
    for index, task in enumerate(tasks):
        left = end - time.monotonic()
        limit = limit_of(tasks[index:], left)
        number = f"[{index + 1}/{len(tasks)}] {task.name}"
        result = {"name": task.name, "title": task.title, "command": task.shown, "tables": {}}
        if not limit:
            result |= {"status": "not run", "error": "no time left"}
            print(f"{number}: not run: no time left", flush=True)
            save(result, True)
            continue
        print(f"{number}: {task.title}; at most {clock(limit)} of {clock(left)} left", flush=True)
        result = run_task(task, limit, logs / f"{task.name}.log", environment, result, save)
        count = sum(map(len, result["tables"].values()))
        line = f"{result['status']} after {clock(result['seconds'])}, {count} rows"
        last = result.get("error", "").splitlines()[-1:]
        print(f"{number}: {': '.join([line, *last])}", flush=True)
        save(result, True)


def run_task(
    task: Task,
    limit: float,
    log: Path,
    environment: dict[str, str],
    result: dict[str, Any],
    save: Callable[[dict[str, Any], bool], None],
) -> dict[str, Any]:
    """Run a task in a process group of its own, which is killed at the time limit.

    Returns:
        The result: `result` with `seconds`, `limit`, `tables`, `status` and, if the task failed,
        `error`. The status is `done`, `shortened` (a row was not measured for lack of time),
        `stopped` (at the limit) or `failed`.
    """
    task.results.unlink(missing_ok=True)
    start = shown = time.monotonic()
    result |= {"status": "running", "limit": limit}
    with log.open("wb") as output:
        process = subprocess.Popen(
            task.command(limit),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    try:
        while process.poll() is None and time.monotonic() - start < limit:
            time.sleep(POLL_SECONDS)
            tables = read_tables(task.results)
            if tables != result["tables"]:
                result["tables"] = tables
                save(result, False)
            if time.monotonic() - shown > LINE_SECONDS:
                shown = time.monotonic()
                rows = sum(map(len, tables.values()))
                print(f"  {clock(shown - start)} of {clock(limit)}, {rows} rows", flush=True)
    finally:  # also if this process is interrupted
        status = process.poll()
        kill_group(process)
    result |= {"seconds": time.monotonic() - start, "tables": read_tables(task.results)}
    if status == 0:
        notes = [str(row.get("note")) for rows in result["tables"].values() for row in rows]
        is_shortened = any(note.startswith(NOT_RUN) for note in notes)
        return result | {"status": "shortened" if is_shortened else "done"}
    if status is None:
        return result | {"status": "stopped", "error": f"stopped at its limit, {clock(limit)}"}
    reason = f"exit code {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
    return result | {"status": "failed", "error": "\n".join([*last_lines(log), reason])}


def kill_group(process: subprocess.Popen) -> None:
    """Kill all processes of the group of a process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_tables(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the rows of a step: table → rows. An incomplete line is ignored."""
    tables: dict[str, list] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                entry = json.loads(line)
                tables.setdefault(entry["table"], []).append(entry["row"])
    return tables


def last_lines(log: Path) -> list[str]:
    """Return the last lines of a log that are not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line[:300] for line in lines if line.strip()][-ERROR_LINES:]


def clock(seconds: float) -> str:
    """Format a duration as minutes and seconds."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02}"


def step_command(name: str, size: str, results: Path, work: Path) -> Callable[[float], list[str]]:
    """Return the function that makes the command of a step."""

    def command(limit: float) -> list[str]:
        options = ["--size", size, "--results", str(results), "--work", str(work)]
        program = [sys.executable, "-m", "benchmarks.gpu.run_step", name]
        return [*program, *options, "--seconds", f"{limit:.1f}"]

    return command
