"""Steps that compare speeds: PyTorch, options of the model and of XLA, dtypes.

Each case compares sides that do the same work. They run in processes of their own, and take turns.
"""

import functools
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu.context import NOT_RUN, Context
from benchmarks.turns import Program, Side, SideError, Workload
from jaxvid.errors import memory_problem
from jaxvid.models.implementation import CHOICES

# Options of PyTorch (`benchmarks.forward.TorchOptions`).
TORCH_OPTIONS = {
    "pytorch, reduce-overhead": {"mode": "reduce-overhead"},
    "pytorch, flash attention": {"mode": "default", "attention": "flash_attention"},
    "pytorch, cuDNN attention": {"mode": "default", "attention": "cudnn_attention"},
    "pytorch, channels_last": {"mode": "default", "channels_last": True},
    "pytorch, eager": {"mode": "eager"},
    "pytorch, max-autotune": {"mode": "max-autotune"},  # last: compilation may take minutes
}
XLA_FLAGS = (
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_enable_command_buffer=",
    "--xla_disable_hlo_passes=rematerialization",
    "--xla_gpu_autotune_level=0",
    "--xla_gpu_enable_latency_hiding_scheduler=true",
)
RESERVED_SECONDS = 10.0  # for the turns, after all sides have been prepared


class Variant(NamedTuple):
    """A side of a comparison.

    Attributes:
        program: `jaxvid` or `pytorch`.
        options: Fields of the model's config, or of `benchmarks.forward.TorchOptions`.
        environment: Environment variables of the process.
    """

    program: str
    options: Mapping[str, Any] = {}
    environment: Mapping[str, str] = {}


class Case(NamedTuple):
    """A comparison of several variants of the same work; the first is the reference."""

    work: Workload
    variants: dict[str, Variant]


class Times(NamedTuple):
    """Measurements of the sides of a case.

    Attributes:
        seconds: Side → seconds per step in each turn.
        peak_bytes: Side → peak memory.
        ready: Side → time until the first step was done, in seconds.
        notes: Side → the reason why it was not measured, or was measured alone.
        matmul_peak: Multiply-adds per second; None if no side runs JAX.
        clip_work: Multiply-adds of a clip's forward pass; None if all sides have failed.
    """

    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int]
    ready: dict[str, float]
    notes: dict[str, str]
    matmul_peak: float | None
    clip_work: int | None


# ------------------------------------------------------------------ in the process of a side


def make_program(variant: Variant, work: Workload) -> Program:
    """Return the program of a variant."""
    from benchmarks import forward

    if variant.program == "jaxvid":
        return forward.make_jax(work, **variant.options)
    return forward.make_torch(work, forward.TorchOptions(**variant.options))


def measure_peak(dtype: str, n: int) -> float:
    """Return the matmul peak; see `benchmarks.peak.matmul_peak`."""
    from benchmarks.peak import matmul_peak

    return matmul_peak(dtype, n)


def multiply_adds(work: Workload) -> int:
    """Return the multiply-adds of a clip's forward pass, attention included."""
    from benchmarks import cost
    from jaxvid.models import make_model_config

    return cost.multiply_adds(make_model_config(work.model, **dict(work.fields)))


# ------------------------------------------------------------------ one case


def measure(ctx: Context, case: Case) -> Times:
    """Measure the sides of a case in turns. Sides that fail are left out.

    If not all sides fit into the memory at once, those that did not fit are measured alone at the
    end, if there is time.
    """
    start = time.monotonic()
    times = Times({}, {}, {}, {}, None, None)
    times = _measure_together(ctx, case, list(case.variants), times)
    expected = time.monotonic() - start
    if len(case.variants) > 1:
        for name, note in [*times.notes.items()]:
            if memory_problem(RuntimeError(note)) and ctx.seconds_left() > expected:
                del times.notes[name]
                times.seconds.pop(name, None)
                times = _measure_together(ctx, case, [name], times)
                times.notes.setdefault(name, "measured alone, for lack of memory")
    return times


def _measure_together(ctx: Context, case: Case, names: list[str], times: Times) -> Times:
    """Measure some sides in turns and add the results to `times`."""
    sides = {name: _make_side(case, name) for name in names}
    try:
        _prepare(ctx, case, sides, times)
        for name in times.notes.keys() & sides.keys():
            sides.pop(name).close()
        _take_turns(ctx, sides, times)
        peak, clip_work = times.matmul_peak, times.clip_work
        for name, side in sides.items():
            try:
                clip_work = clip_work or side.call(multiply_adds, case.work)
                times.peak_bytes[name] = side.peak_bytes()
                if peak is None and case.variants[name].program == "jaxvid":
                    peak = side.call(measure_peak, case.work.dtype, ctx.size.matrix)
            except SideError as error:
                times.notes[name] = str(error)
    finally:
        for side in sides.values():
            side.close()
    return times._replace(matmul_peak=peak, clip_work=clip_work)


def _make_side(case: Case, name: str) -> Side:
    variant = case.variants[name]
    make = functools.partial(make_program, variant, case.work)
    return Side(make, variant.environment)


def _prepare(ctx: Context, case: Case, sides: dict[str, Side], times: Times) -> None:
    """Build the programs of all sides at the same time; give up those that take too long."""
    platforms = {}
    starting = {name: side.start() for name, side in sides.items()}
    for name, side in sides.items():
        try:
            timeout = max(0.0, ctx.seconds_left() - RESERVED_SECONDS)
            platforms[name], _, times.ready[name] = side.finish(starting[name], timeout)
        except SideError as error:
            times.notes[name] = str(error)
    if len({*platforms.values()}) > 1:
        raise SideError(f"{case.work.model}: the sides use different devices: {platforms}")


def _take_turns(ctx: Context, sides: dict[str, Side], times: Times) -> None:
    """Run the sides in turns until the number of rounds is reached or the time is over."""
    counts = {}
    for done in range(ctx.size.rounds + 1):
        if done > 1 and ctx.seconds_left() < 0:
            break
        for name, side in sides.items():
            if name in times.notes:
                continue
            try:
                seconds = side.seconds(counts.get(name, 1))
            except SideError as error:
                times.notes[name] = str(error)
                continue
            if done:  # the first round is a warm-up
                times.seconds.setdefault(name, []).append(seconds)
            else:
                counts[name] = max(1, min(50, round(ctx.size.turn_seconds / seconds)))


# ------------------------------------------------------------------ tables


def run_cases(ctx: Context, table: str, cases: list[Case]) -> None:
    """Measure cases one after the other, and add one row per side to a table.

    A case is not started if it would take longer than the time that is left. This is estimated from
    the previous case.
    """
    expected = 0.0
    for case in cases[: ctx.size.cases]:
        work = case.work
        if ctx.seconds_left() < expected:
            for name in case.variants:
                row = _first_columns(work, name)
                ctx.add(table, {**row, "note": NOT_RUN})
            continue
        start = time.monotonic()
        times = measure(ctx, case)
        expected = 1.2 * (time.monotonic() - start)
        for name in case.variants:
            ctx.add(table, _make_row(ctx, case, name, times))


def _first_columns(work: Workload, name: str) -> dict[str, Any]:
    return {
        "model": work.model,
        "step": work.title,
        "batch": work.batch,
        "dtype": work.dtype,
        "side": name,
    }


def _make_row(ctx: Context, case: Case, name: str, times: Times) -> dict[str, Any]:
    """Return the row of a side."""
    work, row = case.work, _first_columns(case.work, name)
    if name not in times.seconds:
        message = times.notes.get(name, NOT_RUN)
        title = f"{work.model}, {work.title}, {name}"
        note = message if message == NOT_RUN else ctx.fail(title, message)
        return {**row, "note": note, "command": _command(case, name)}
    seconds = np.array(times.seconds[name])
    clips = work.batch / np.median(seconds)
    row |= {
        "ms per step": 1e3 * np.median(seconds),
        "lowest (ms)": 1e3 * seconds.min(),
        "highest (ms)": 1e3 * seconds.max(),
        "clips/s": clips,
    }
    if times.clip_work:
        rate = clips * times.clip_work * (3 if work.train else 1)  # multiply-adds per second
        row["TFLOP/s"] = 2 * rate / 1e12
        if times.matmul_peak:
            row["of the peak (%)"] = 100 * rate / times.matmul_peak
            row["matmul peak (TFLOP/s)"] = 2 * times.matmul_peak / 1e12
    reference = next(iter(case.variants))
    if reference in times.seconds:
        pairs = min(len(seconds), len(times.seconds[reference]))
        ratios = seconds[:pairs] / np.array(times.seconds[reference])[:pairs]
        row |= {
            "time / first side": np.median(ratios),
            "lowest ratio": ratios.min(),
            "highest ratio": ratios.max(),
        }
    if name in times.peak_bytes:
        row["peak memory (GB)"] = times.peak_bytes[name] / 1e9
    row |= {"ready after (s)": times.ready[name], "note": times.notes.get(name, "")}
    return {**row, "command": _command(case, name)}


def _command(case: Case, name: str) -> str:
    """Return the command of `benchmarks/forward.py` that measures a row, if there is one."""
    variant, against = case.variants[name], {"default": "pytorch", "none": "unshifted"}
    if variant.environment or variant.options.keys() - {"mode", "shift"}:
        return ""
    other = against.get(next(iter(variant.options.values()), ""), "")
    if variant.options and not other:
        return ""
    return f"{case.work.command} --against {other}" if other else case.work.command


# ------------------------------------------------------------------ steps


def against_pytorch(ctx: Context, *, model: int, train: bool) -> None:
    """Compare jaxvid with compiled PyTorch at several batch sizes."""
    variants = {"jaxvid": Variant("jaxvid"), "pytorch": Variant("pytorch", {"mode": "default"})}
    size = ctx.size
    works = [size.workload(model, train, batch=batch) for batch in size.batches]
    run_cases(ctx, "speed", [Case(work, variants) for work in works])


def choice(ctx: Context, *, field: str) -> None:
    """Compare the values of a field of the model's config with the preset's value, one by one.

    Two sides fit into the memory at the same time, more may not.
    """
    size, cases = ctx.size, []
    for train in (True, False) if field != "remat" else (True,):
        for model in (-1, 0):
            work = size.workload(model, train)
            for value in CHOICES[field]:
                if value == "auto":
                    continue
                variants = {"preset": Variant("jaxvid")}
                variants[f"{field}={value}"] = Variant("jaxvid", {field: value})
                cases.append(Case(work, variants))
    run_cases(ctx, field, cases)


def shift(ctx: Context) -> None:
    """Compare XViT with and without its temporal shift."""
    variants = {"unshifted": Variant("jaxvid", {"shift": "none"}), "shifted": Variant("jaxvid")}
    works = [ctx.size.workload(-1, train) for train in (False, True)]
    run_cases(ctx, "temporal shift", [Case(work, variants) for work in works])


def torch_options(ctx: Context) -> None:
    """Compare jaxvid with options of PyTorch, one by one."""
    cases = []
    for name, options in TORCH_OPTIONS.items():
        for train in (False, True):
            work = ctx.size.workload(-1, train)
            variants = {"jaxvid": Variant("jaxvid"), name: Variant("pytorch", options)}
            cases.append(Case(work, variants))
    run_cases(ctx, "options of PyTorch", cases)


def xla_flags(ctx: Context) -> None:
    """Compare flags of XLA with its defaults, one by one, in training."""
    work, cases = ctx.size.workload(-1, True), []
    for flag in XLA_FLAGS:
        environment = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
        variants = {"default": Variant("jaxvid"), flag: Variant("jaxvid", {}, environment)}
        cases.append(Case(work, variants))
    run_cases(ctx, "flags of XLA", cases)


def dtypes(ctx: Context) -> None:
    """Compare with compiled PyTorch in TensorFloat-32 and float32."""
    variants = {"jaxvid": Variant("jaxvid"), "pytorch": Variant("pytorch", {"mode": "default"})}
    works = [
        ctx.size.workload(-1, train, dtype=dtype)
        for dtype in ("tfloat32", "float32")
        for train in (False, True)
    ]
    run_cases(ctx, "dtypes", [Case(work, variants) for work in works])
