"""The step that lists the kernels of a training step and of a forward pass by share of time."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu.context import NOT_RUN, Context
from benchmarks.turns import Workload

STEPS = 5  # traced steps
TOP = 20  # kernels that are listed by name
# Group → pattern of the names of its kernels; the first match counts.
GROUPS = {
    "attention": r"flash|fmha|sdpa|attention|softmax.*gemm",
    "matmul": r"gemm|nvjet|cutlass|cublas|wgmma|matmul|xmma|(^|_)dot|conv(?!ert)",
    "copies": r"memcpy|memset|copy|transpose|concatenate|slice|gather|scatter|pad(_|$)",
    "elementwise and reductions": r"fusion|reduce|loop|wrapped|norm|softmax|elementwise|triton"
    r"|add|multiply|subtract|divide|exp|tanh|erf|select|convert|broadcast|rng|threefry|compare",
}


def kernels(ctx: Context) -> None:
    """Trace a training step and a forward pass of the model for comparisons of options."""
    for train in (True, False):
        work = ctx.size.workload(-1, train)
        if ctx.seconds_left() > 0:
            report_kernels(ctx, work)
        else:
            ctx.add("kernel groups", {"step": work.title, "note": NOT_RUN})


def report_kernels(ctx: Context, work: Workload) -> None:
    """Trace some steps, and add the groups of kernels and the longest kernels to the tables."""
    import jax

    from benchmarks.forward import make_jax
    from benchmarks.trace import busy_time, read_trace

    program = make_jax(work)
    program.run(2)
    with tempfile.TemporaryDirectory(dir=ctx.work) as folder:
        with jax.profiler.trace(folder):
            program.run(STEPS)
        events = read_trace(Path(folder)).devices[0]
    if not events:
        raise RuntimeError("the trace has no events of the device")
    first, last = min(e.start for e in events), max(e.end for e in events)
    idle = 1 - busy_time(events) / (last - first)
    title = f"{work.title}, {work.model}, {work.batch} clips"
    names, groups = sum_times((e.name, e.end - e.start) for e in events)
    total = sum(groups.values())
    for group, time in sorted(groups.items(), key=lambda item: -item[1]):
        row = {"step": title, "group": group, "share (%)": 100 * time / total}
        ctx.add("kernel groups", row | {"ms per step": time / STEPS / 1e6})
    span = (last - first) / STEPS / 1e6
    row = {"step": title, "group": "(device idle)", "share (%)": None, "ms per step": idle * span}
    ctx.add("kernel groups", row)
    longest = sorted(names.items(), key=lambda item: -item[1][0])[:TOP]
    for name, (time, count) in longest:
        row = {"kernel": name[:90], "group": group_of(name), "share (%)": 100 * time / total}
        row |= {"ms per step": time / STEPS / 1e6, "calls per step": count / STEPS}
        ctx.add(f"longest kernels, {work.title}", row)


def sum_times(
    events: Iterable[tuple[str, float]],
) -> tuple[dict[str, tuple[float, int]], dict[str, float]]:
    """Sum the times of events.

    Args:
        events: Name and duration of each event.

    Returns:
        Name → total duration and number of events; and group → total duration.
    """
    names: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    groups: dict[str, float] = defaultdict(float)
    for name, duration in events:
        time, count = names[name]
        names[name] = time + duration, count + 1
        groups[group_of(name)] += duration
    return dict(names), dict(groups)


def group_of(name: str) -> str:
    """Return the group of a kernel, `other` if no pattern matches its name."""
    for group, pattern in GROUPS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return group
    return "other"
