"""Hostile requests are answered in time, and affect neither the server nor other requests."""

import asyncio
import dataclasses
import json
import os
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.http_load import make_request, serving
from benchmarks.resources import Resources, measure
from jaxvid.serving.limits import Limits, Settings
from tests.serving.hostile import Attack, Attacks, attack_server, run_load
from tests.serving.processes import MARK, decoder_processes
from tests.serving.running_server import WAIT_SECONDS, make_fake_model, running
from tests.waiting import wait_until

LIMITS = Limits(
    upload_bytes=2_000_000,
    upload_seconds=2.0,
    stall_seconds=1.0,
    header_seconds=1.0,
    decode_seconds=10.0,
    deadline_seconds=20.0,
)


def test_hostile_requests_affect_no_other_request(clips, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv(MARK, mark := f"<{os.getpid()} hostile>")
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
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, WAIT_SECONDS)
    assert capfd.readouterr().err == ""


def test_a_client_that_does_not_read_is_disconnected():
    limits = dataclasses.replace(LIMITS, stall_seconds=0.2)
    request = make_request("/openapi.json", b"", "GET")
    with (
        running([make_fake_model()], Settings(limits=limits)) as server,
        socket.create_connection(("127.0.0.1", server.port)) as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(WAIT_SECONDS)
        with pytest.raises(ConnectionError):
            client.sendall(request * 100_000)
        assert server.get("/healthz") == {"status": "ok"}


def test_overload_is_refused_with_a_time_to_retry(clips):
    video = Path(clips[0]).read_bytes()
    limits = dataclasses.replace(LIMITS, queue_length=2)
    attack = Attack(data=[make_request("/v1/predict", video)], statuses=set(), seconds=20.0)

    async def overload(port):
        return await asyncio.gather(*(attack_server(port, attack) for _ in range(24)))

    with running([make_fake_model()], Settings(limits=limits, num_decoders=1)) as server:
        answers = asyncio.run(overload(server.port))
        assert server.request("POST", "/v1/predict", video)[0] == 200
    assert {answer.status for answer in answers} == {200, 429}
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status == 429)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_ten_thousand_requests_leave_no_trace(folders, clips, tmp_path):
    """A tenth of the requests is hostile; memory, files, threads and processes stay constant."""
    before, after = run_in_process(folders / "xvit", clips, tmp_path, num_requests=10_000)
    print(before, after, sep="\n")
    assert (after.files, after.processes) == (before.files, before.processes)
    assert after.threads <= before.threads
    assert after.megabytes < 1.05 * before.megabytes + 20
    assert after.other_megabytes < 1.2 * before.other_megabytes + 50


def run_in_process(
    model: Path, clips: Sequence[str], folder: Path, *, num_requests: int
) -> tuple[Resources, Resources]:
    """Send requests to a server in another process, and check the answers.

    Args:
        model: Model folder.
        clips: Paths of valid videos.
        folder: Folder for temporary files.
        num_requests: Number of requests; the first fifth is sent before the first measurement.

    Returns:
        The resources of the server before and after the other requests.
    """
    videos = [Path(clip).read_bytes() for clip in clips]
    attacks, measured = Attacks(videos, LIMITS, folder), []
    limits = json.dumps(dataclasses.asdict(LIMITS))
    command = [sys.executable, "-m", "tests.serving.limited_server", str(model), limits]
    with serving(command) as (process, port):
        for part, size in enumerate([num_requests // 5, num_requests - num_requests // 5]):
            load = run_load(
                port, attacks, videos, num_requests=size, every=10, num_clients=32, seed=part
            )
            report = asyncio.run(load)
            print(f"{size} requests, slowest {report.slowest}", sorted(report.counts.items()))
            assert not report.failures, "\n".join(report.failures)
            wait_until(lambda: get_metric(port, "requests_in_progress") == 0, WAIT_SECONDS)
            time.sleep(2 * LIMITS.header_seconds)  # the server closes idle connections
            measured.append(measure(process))
    return tuple(measured)


def get_metric(port: int, name: str) -> float:
    """Return the value of a metric of a server."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    return float(re.search(f"^jaxvid_{name} (.*)$", text, re.MULTILINE)[1])
