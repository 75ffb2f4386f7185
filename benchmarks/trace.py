"""Device events in traces of `jax.profiler`."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.profiler import ProfileData

CONTROL_FLOW = ("while", "call", "conditional")  # HLO operations whose events contain others


class Event(NamedTuple):
    """An event of a trace; times are in nanoseconds."""

    name: str
    start: float
    end: float


class Trace(NamedTuple):
    """The events of a trace.

    Attributes:
        host: Events of the host's threads.
        devices: For each device, its events: kernels and copies on a GPU, HLO operations on a CPU.
        programs: For each device, the times at which it is busy: the same events on a GPU, the
            execution of whole programs on a CPU.
    """

    host: list[Event]
    devices: list[list[Event]]
    programs: list[list[Event]]


def read_trace(folder: Path) -> Trace:
    """Read the only trace in a folder."""
    (path,) = folder.glob("**/*.xplane.pb")
    planes = {plane.name: plane for plane in ProfileData.from_file(str(path)).planes}
    events = [event for line in planes["/host:CPU"].lines for event in line.events]
    host = [Event(event.name, event.start_ns, event.end_ns) for event in events]
    devices = [
        [
            Event(e.name, e.start_ns, e.end_ns)
            for line in plane.lines
            if line.name.startswith("Stream")
            for e in line.events
        ]
        for name, plane in planes.items()
        if name.startswith("/device:GPU")
    ]
    if devices:
        return Trace(host, devices, devices)
    # No GPU. On a CPU, each operation also has an event whose name begins with `end: `.
    operations = [
        event
        for event, raw in zip(host, events, strict=True)
        if not event.name.startswith(("end: ", *CONTROL_FLOW))
        and any(name == "hlo_op" for name, _ in raw.stats)
    ]
    programs = [event for event in host if event.name.startswith("ThunkExecutor::Execute")]
    return Trace(host, [operations], [programs])


def busy_time(events: list[Event], start: float = -np.inf, end: float = np.inf) -> float:
    """Return the time in nanoseconds between `start` and `end` that at least one event covers."""
    spans = np.array(sorted((event.start, event.end) for event in events))
    starts, ends = np.clip(spans, start, end).T
    ends = np.maximum.accumulate(ends)
    idle = np.maximum(starts[1:] - ends[:-1], 0).sum()
    return float(ends[-1] - starts[0] - idle)
