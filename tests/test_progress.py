"""Progress is a bar on a terminal and complete lines elsewhere."""

import io
import sys
import time

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
