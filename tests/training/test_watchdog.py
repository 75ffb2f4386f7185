"""The watchdog, metric window, stop signals and profiler trace of a training run."""

import gc
import json
import signal
import time

import jax
import numpy as np
import pytest

from jaxvid.data import fingerprints
from jaxvid.distributed import sharding
from jaxvid.errors import InputError
from jaxvid.training import run_metadata
from jaxvid.training.metric_window import MetricWindow, NonFiniteLossError
from jaxvid.training.profiler import ProfilerTrace
from jaxvid.training.signals import StopSignals
from jaxvid.training.watchdog import Watchdog


def test_a_stall_is_logged_with_its_cause_and_again_after_twice_the_time(lines):
    watchdog = Watchdog(0.1)
    with watchdog.stage("input", lambda: "reading a.mp4"):
        time.sleep(0.5)
    with watchdog.stage("the device"):
        time.sleep(0.01)
    watchdog.close()
    assert 1 <= len(lines) <= 3
    assert all(line.startswith("waiting for input for ") for line in lines)
    assert lines[0].endswith("reading a.mp4")
    assert 0.4 < watchdog.waited["input"] < 5
    assert watchdog.waited["the device"] >= 0.01
    assert 0.5 < watchdog.share("input") < 1
    assert watchdog.share("input") == 0  # no time since the last call


def step_metrics(loss=1.0, stop=False):
    """Return the metrics of a training step on four clips."""
    return {
        "loss": np.float32(loss),
        "grad_norm": np.float32(1.0),
        "count": np.int32(4),
        "stop": np.bool_(stop),
    }


def test_metrics_are_read_in_order_and_summed_once():
    window = MetricWindow()
    for step in range(1, 6):
        window.add(step, step_metrics(loss=step, stop=step == 4), [])
        window.read(leave=2)
    assert not window.stop  # steps 4 and 5 are not read yet
    total, count = window.take()
    assert (total["loss"], total["count"], count) == (1 + 2 + 3, 12, 3)
    window.read()
    assert window.stop
    assert window.take()[0]["loss"] == 4 + 5
    assert window.take() == ({}, 0)


def test_restored_sums_are_bit_identical():
    losses = np.random.default_rng(0).uniform(0, 3, 20)
    uninterrupted = MetricWindow()
    for step, loss in enumerate(losses, 1):
        uninterrupted.add(step, step_metrics(loss), [])
    uninterrupted.read()
    expected = uninterrupted.take()
    for split in range(len(losses)):
        state = {"steps": 0, "sums": {}}
        for part in (losses[:split], losses[split:]):
            window = MetricWindow()
            window.set_state(json.loads(json.dumps(state)))
            for step, loss in enumerate(part, 1):
                window.add(step, step_metrics(loss), [])
            window.read()
            state = window.get_state()
        assert window.take() == expected
        assert window.get_state() == {"steps": 0, "sums": {}}


def test_a_non_finite_loss_names_its_step_and_videos():
    window = MetricWindow()
    window.add(1, step_metrics(), ["a.mp4"])
    window.add(2, step_metrics(loss=np.nan), ["b.mp4"])
    window.read(leave=1)
    with pytest.raises(NonFiniteLossError) as error:
        window.read()
    assert (error.value.step, error.value.ids) == (2, ["b.mp4"])


class Video:
    """A stub of a video record."""

    label = 0

    def __init__(self, id_):
        self.id = id_


def test_starts_are_recorded_and_different_training_videos_are_refused(tmp_path):
    mesh = sharding.make_mesh(sharding.MeshShape())
    videos = {"train": [Video("a"), Video("b")], "val": [Video("c")]}
    for _ in range(2):
        run_metadata.record_start(tmp_path, run_metadata.describe_run(mesh, videos))
    first, second = map(json.loads, (tmp_path / "starts.jsonl").read_text().splitlines())
    assert first["data"] == second["data"]
    assert first["data"]["train"]["videos"] == 2
    assert first["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert {"jax", "flax", "grain"} <= first["packages"].keys()
    assert first["devices"] == "8 × cpu"
    other = {**videos, "train": [Video("a"), Video("x")]}
    assert fingerprints.fingerprint(other["train"]) != fingerprints.fingerprint(videos["train"])
    with pytest.raises(InputError, match="was started with 2 training videos"):
        run_metadata.record_start(tmp_path, run_metadata.describe_run(mesh, other))
    changed = {**videos, "val": [Video("d")]}  # has no effect on training
    run_metadata.record_start(tmp_path, run_metadata.describe_run(mesh, changed))
    assert len((tmp_path / "starts.jsonl").read_text().splitlines()) == 3


def test_a_signal_is_recorded_or_ends_an_evaluation_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before  # so a second one acts at once
        with pytest.raises(SystemExit) as stop, signals.end_at_once():
            pytest.fail("a signal was received before")
        assert stop.value.code == 128 + signal.SIGTERM
    with StopSignals() as signals:
        with pytest.raises(SystemExit) as stop, signals.end_at_once():
            signal.raise_signal(signal.SIGINT)
        assert stop.value.code == 128 + signal.SIGINT


def test_a_signal_during_a_finalizer_acts_at_the_next_check():
    def signal_once(phase, _):
        if phase == "start" and not raised:
            raised.append(True)
            signal.raise_signal(signal.SIGTERM)

    raised: list[bool] = []
    calls: list[int] = []
    gc.callbacks.append(signal_once)
    try:
        with StopSignals() as signals, signals.end_at_once():
            # If the handler raised here, Python would drop the exception, and pytest would fail.
            gc.collect()
            assert signals.received == signal.SIGTERM
            with pytest.raises(SystemExit) as stop:
                signals.checked(calls.append)(1)
    finally:
        gc.callbacks.remove(signal_once)
    assert stop.value.code == 128 + signal.SIGTERM
    assert not calls


def test_handlers_not_installed_by_python_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        signals._before[signal.SIGTERM] = None  # `signal.signal` returns None for such a handler
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("start", "traced"),
    [(0, ["start 3", "stop 5"]), (4, ["start 4", "stop 5"]), (5, []), (9, [])],
)
def test_a_trace_covers_the_remaining_steps(start, traced, tmp_path, monkeypatch, lines):
    events = []
    step = start
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: events.append(f"start {step}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append(f"stop {step}"))
    trace = ProfilerTrace((3, 5), tmp_path, start=start, total=10)
    while step < 10:
        trace.before(step)
        step += 1
        trace.after(step, {})
    trace.close()
    assert events == traced
    message = (
        f"a trace of the steps {max(3, start)} to 5 is in"
        if traced
        else "no trace: the steps 3 to 5"
    )
    assert [message in line for line in lines] == [True]


def test_a_run_that_stops_during_a_trace_closes_it(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", events.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    trace = ProfilerTrace((3, 5), tmp_path, start=0, total=10)
    trace.before(3)
    trace.close()
    trace.close()
    assert events == [tmp_path, "stop"]
    with pytest.raises(InputError, match="steps 3 to 11: expected START < STOP <= 10, the"):
        ProfilerTrace((3, 11), tmp_path, start=0, total=10)
