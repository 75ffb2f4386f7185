"""Hostile requests are answered in time, and affect neither the server nor other requests."""

import asyncio
import os
import time
from pathlib import Path

from jaxvid.serving.limits import Limits, Settings
from tests.serving.hostile import Attacks, run_load
from tests.serving.processes import decoder_processes
from tests.serving.running_server import WAIT_SECONDS, make_fake_model, running

LIMITS = Limits(
    upload_bytes=2_000_000,
    upload_seconds=2.0,
    stall_seconds=1.0,
    header_seconds=1.0,
    decode_seconds=10.0,
    deadline_seconds=20.0,
)


def test_hostile_requests_affect_no_other_request(clips, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("DECODERS_OF", mark := f"<{os.getpid()} hostile>")
    videos = [Path(clip).read_bytes() for clip in clips[:4]]
    attacks = Attacks(videos, LIMITS, tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with running([make_fake_model()], Settings(limits=LIMITS)) as server:
        load = run_load(
            server.port, attacks, videos, num_requests=200, every=2, num_clients=32, seed=1
        )
        report = asyncio.run(load)
        text = server.request("GET", "/metrics")[2].decode()
    assert not report.failures, "\n".join(report.failures)
    assert report.counts["normal", 200] == 100
    assert {kind for kind, _ in report.counts} == {"normal", *attacks.names}
    assert "jaxvid_requests_in_progress 0.0" in text
    assert 'status="500"' not in text
    assert not decoder_processes(mark)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    assert capfd.readouterr().err == ""


def wait_until(condition) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
