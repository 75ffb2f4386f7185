"""The steps that need videos: input pipeline, memory plan, time until the first step."""

import dataclasses
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from benchmarks.gpu.context import NOT_RUN, ROOT, Context
from benchmarks.gpu.demo import FIRST_STEP, last_line
from benchmarks.turns import Side, SideError

TURN_SECONDS = 20.0  # about the time of a turn of all sides, the start of training included


def train_command(ctx: Context, *arguments: str, program: str = "benchmarks/train.py") -> list[str]:
    """Return the command of a program that trains the model for comparisons of options."""
    config = ctx.size.configs[ctx.size.models[-1]]
    fields = {**step_fields(ctx), "data.num_threads": ctx.threads}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, program, "--config", config, *overrides, *arguments]


def step_fields(ctx: Context) -> dict[str, Any]:
    """Return the config fields of a training step that is measured."""
    return {"batch_size": ctx.size.batch, "model.dtype": ctx.size.dtype, **ctx.size.fields}


def load_config(path: str, fields: dict[str, Any]) -> Any:
    """Return the config of `FILE.py` or `FILE.py:VARIANT` with some fields replaced."""
    file, _, variant = path.partition(":")
    get_config = runpy.run_path(str(ROOT / file))["get_config"]
    config = (get_config(variant) if variant else get_config()).unlock()
    config.update_from_flattened_dict(fields)
    return config.lock()


def shown(command: list[str]) -> str:
    """Return a command as one would type it."""
    return shlex.join(["python", *command[1:]])


# ------------------------------------------------------------------ input


def feed(ctx: Context) -> None:
    """Compare training from packs and from video files with training on one repeated batch."""
    make_pack(ctx)
    for source, share in (("pack", 0.5), ("folder", 1.0))[: ctx.size.cases]:
        left = ctx.seconds_left()
        if left < 0:
            ctx.add("input", {"source": source, "note": NOT_RUN})
            continue
        turns = max(1, min(3, int(share * left / TURN_SECONDS)))
        arguments = [f"--turns={turns}", f"--steps={ctx.size.input_steps}"]
        command = train_command(ctx, "--input=synthetic", f"--input={source}", *arguments)
        json_file = ctx.work / f"input_{source}.json"
        files = [f"--clips={ctx.work / 'clips'}", f"--json={json_file}"]
        done = subprocess.run(command + files, cwd=ROOT, capture_output=True, text=True)
        print(done.stdout, done.stderr, flush=True)
        if done.returncode:
            note = ctx.fail(source, f"exit code {done.returncode}: {last_line(done.stderr)}")
            ctx.add("input", {"source": source, "note": note, "command": shown(command)})
            continue
        for row in json.loads(json_file.read_text()):
            label = {"source": source, "threads": ctx.threads}
            ctx.add("input", {**label, **row, "command": shown(command)})


# ------------------------------------------------------------------ memory


def memory(ctx: Context) -> None:
    """Compare the planned memory of a training step with the measured peak."""
    for model in ctx.size.models[: -ctx.size.cases - 1 : -1]:
        if ctx.seconds_left() < 0:
            ctx.add("memory", {"model": model, "note": NOT_RUN})
            continue
        side = Side()
        try:
            row = side.call(measure_memory, ctx.size.configs[model], step_fields(ctx))
        except SideError as error:
            row = {"note": ctx.fail(model, str(error))}
        finally:
            side.close()
        ctx.add("memory", {"model": model, "batch": ctx.size.batch, **row})


def measure_memory(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the planned parts of a training step's memory and the measured peak, in GB."""
    import jax
    import numpy as np

    from benchmarks.forward import peak_memory
    from jaxvid import plan
    from jaxvid.distributed import sharding
    from jaxvid.experiment import resolve
    from jaxvid.storage.preprocessing import clip_shape
    from jaxvid.training.initial_state import make_initial_state

    experiment = resolve(load_config(path, fields))
    batch_size = experiment.batch_size
    parts = plan.measure(experiment, batch_size)
    program, mesh = plan.make_program(experiment, batch_size)
    state, _ = make_initial_state(program, experiment.model, seed=0)
    shape = clip_shape(experiment.train_clips, batch_size)
    batch = {
        "video": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
        "label": np.zeros(batch_size, np.int32),
        "mask": np.ones(batch_size, bool),
    }
    for _ in range(2):
        state, _ = program.train_step(state, sharding.to_global_arrays(batch, mesh))
    jax.block_until_ready(state)
    row = {f"{name} (GB)": size / 1e9 for name, size in dataclasses.asdict(parts).items()}
    return {**row, "planned (GB)": parts.total / 1e9, "measured (GB)": peak_memory() / 1e9}


# ------------------------------------------------------------------ first step


def startup(ctx: Context) -> None:
    """Measure the time until the first training step, without and with a compilation cache."""
    make_pack(ctx)
    cache = ctx.work / "startup_cache"
    shutil.rmtree(cache, ignore_errors=True)
    for start in ("cold", "warm"):
        workdir = ctx.work / "startup"
        shutil.rmtree(workdir, ignore_errors=True)
        arguments = ["--config.data.source=pack", "--config.num_epochs=100.0"]
        command = train_command(ctx, *arguments, program="main.py")
        files = [f"--config.data.folder={ctx.work / 'clips' / 'pack'}", f"--workdir={workdir}"]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
        whole, reported = first_step(command + files, environment)
        ctx.add(
            "first step",
            {
                "start": start,
                "from the start of Python (s)": whole,
                "from the start of training (s)": reported,
                "command": shown(command),
            },
        )


def make_pack(ctx: Context) -> None:
    """Make the clips of `benchmarks/train.py`, unless a step has made them already."""
    from benchmarks import train

    config = load_config(ctx.size.configs[ctx.size.models[-1]], {})
    train.make_clips(ctx.work / "clips", config)


def first_step(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Start training and kill it after the first step.

    Returns:
        Seconds from the start of the process to the first step, as measured and as logged.
    """
    start, lines = time.monotonic(), []
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE
    )
    try:
        for line in process.stderr:
            print(line, end="", flush=True)
            lines.append(line)
            if match := FIRST_STEP.search(line):
                return time.monotonic() - start, float(match[1])
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    raise RuntimeError(f"main.py ended before the first step: {last_line(''.join(lines))}")
