"""Progress is a bar on a terminal and complete lines elsewhere."""

import contextlib
import functools
import io
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from jaxvid import logs, progress
from jaxvid.data import check


class Stream(io.StringIO):
    """A stand-in for stderr. `terminal`: whether it is a terminal."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only entry is the time in seconds that `time.monotonic` returns."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_rate_and_remaining_time_exclude_earlier_runs(clock):
    bar = progress.Progress(100, done=20, unit="clip", title="training")
    assert bar.time_left() == "?"
    clock[0] += 4
    bar.advance(40)
    assert (bar.done, bar.rate(), bar.time_left()) == (60, 10.0, "00:04")
    bar.close()


def test_progress_is_logged_in_complete_lines_at_intervals(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(terminal=False))
    bar = progress.Progress(9000, title="writing clips", unit="clip")
    for _ in range(50):  # 25 s
        clock[0] += 0.5
        bar.advance(10, "3 MB")
    bar.close()
    assert sys.stderr.getvalue().splitlines() == [
        "writing clips: 200/9000 clips, 20.0/s, 07:20 left, 3 MB",
        "writing clips: 400/9000 clips, 20.0/s, 07:10 left, 3 MB",
    ]
    assert sys.stderr.getvalue().endswith("\n")


def test_abbreviated_units_have_no_plural(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(terminal=False))
    bar = progress.Progress(400, title="downloading a.pth", unit="MB")
    clock[0] += 10
    bar.advance(100)
    bar.close()
    assert sys.stderr.getvalue() == "downloading a.pth: 100/400 MB, 10.0/s, 00:30 left\n"


def test_bar_on_a_terminal_is_removed_at_the_end(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(terminal=True))
    bar = check.Progress(4, "reading")
    clock[0] += 60
    bar.advance(2_000_000)
    time.sleep(0.15)  # tqdm reads the real clock and draws ten times a second
    bar.advance(-1)  # the size of a missing file
    bar.close()
    shown = sys.stderr.getvalue()
    assert "reading:  50%" in shown
    assert "2/4" in shown
    assert "2.0 MB" in shown
    assert "\n" not in shown
    assert not shown.split("\r")[-2].strip()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_lines_are_logged_on_request(clock, monkeypatch, terminal):
    monkeypatch.setattr(sys, "stderr", Stream(terminal))
    lines = []
    monkeypatch.setattr(logs.log, "debug", lines.append)
    bars = [logs.RunProgress(8, unit="video", title="x", lines=lines) for lines in (False, True)]
    clock[0] += 20
    for bar in bars:
        bar.advance(4)
        bar.close()
    assert lines == ["x: 4/8 videos, 0.2/s, 00:20 left"]
    assert terminal == bool(sys.stderr.getvalue())


def wait_for(condition):
    """Wait until another thread makes a condition true."""
    while not condition():
        time.sleep(0.01)


def test_only_slow_compilations_are_announced(monkeypatch):
    lines = []
    monkeypatch.setattr(progress, "COMPILE_SECONDS", 1000)
    with progress.compiling("the network", lines.append):
        pass
    assert not lines
    monkeypatch.setattr(progress, "COMPILE_SECONDS", 0)
    with progress.compiling("the network", lines.append):
        wait_for(lambda: lines)
    assert lines == ["compiling the network…", "compiled in 0 s"]
    with contextlib.suppress(KeyError), progress.compiling("the network", lines.append):
        wait_for(lambda: len(lines) == 3)
        raise KeyError  # no duration of a failed compilation
    assert lines[2:] == ["compiling the network…"]


def test_a_jitted_function_is_announced_and_compiled_once(monkeypatch):
    @contextlib.contextmanager
    def record(name, _):
        announced.append(name)
        yield

    def count(event, _, fun_name="", **__):
        if event.endswith("backend_compile_duration") and "scale" in fun_name:
            compiled.append(fun_name)

    def scale(x, factor):
        return factor * x

    announced, compiled = [], []
    monkeypatch.setattr(progress, "compiling", record)
    step = functools.partial(jax.jit(scale, donate_argnums=0), factor=2.0)
    step = progress.announce_compilation(step, "the step", print)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for value in (1.0, 3.0):
            assert step(jnp.float32(value)) == 2 * value
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert announced == ["the step"]
    assert len(compiled) == 1
