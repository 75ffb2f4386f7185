"""Training and evaluation on four hosts whose network, machine or process fails (marked `full`).

Each host is a network namespace with its own link and name, see `network.py`.
"""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxvid.errors import InputError
from tests.distributed.network import Network, network, reason_unavailable, slowed
from tests.distributed.test_processes import (
    FIRST_CHECKPOINT,
    LAST_STEP,
    ROOT,
    check_same,
    read_output,
    running_processes,
)
from tests.outputs import check_same_outputs, measured

END_SECONDS = 60  # maximum time from a failure to the end of all processes
TIMEOUT_SECONDS = 300  # for a run on a busy machine
pytestmark = [pytest.mark.full, pytest.mark.timeout(4 * TIMEOUT_SECONDS)]
FOUR_HOSTS = {"processes": 4, "devices": 1, "mesh": (2, 2)}  # pairs of hosts share the weights
TWO_HOSTS = {"processes": 2, "devices": 1, "mesh": (1, 2)}
NUM_EVAL_BATCHES = 6

# A run that writes the ids of each batch to `PREFIX.train.PROCESS` or `PREFIX.eval.PROCESS`, and
# then pauses, so that failures happen between its first and its last batch.
RECORDING = f"""
import json, runpy, sys, time

sys.path.insert(0, {str(ROOT)!r})
import jax
from jaxvid.evaluation import loop as evaluation
from jaxvid.training import loop as training

prefix = sys.argv.pop(1)

def recorded(split_batch, name):
    def split_and_record(batch):
        parts = split_batch(batch)
        with open(f"{{prefix}}.{{name}}.{{jax.process_index()}}", "a") as file:
            file.write(json.dumps(parts[1]) + chr(10))
        time.sleep(0.3)
        return parts
    return split_and_record

training.split_batch = recorded(training.split_batch, "train")
evaluation.split_batch = recorded(evaluation.split_batch, "eval")
runpy.run_path({str(ROOT / "main.py")!r}, run_name="__main__")
"""


@pytest.fixture
def hosts() -> Iterator[Network]:
    """Yield a network of four hosts."""
    if reason := reason_unavailable():
        pytest.skip(reason)
    with network(4) as net:
        yield net


@contextlib.contextmanager
def running(
    net: Network, workdir: Path, start: str, *, mode: str = "train", **options
) -> Iterator[list[subprocess.Popen]]:
    """Start a run on several hosts; kill its processes at the end.

    Args:
        net: The hosts.
        workdir: The run's folder.
        start: Name of this start of the run, part of the names of the files of its batches.
        mode: Mode of `main.py`.
        **options: As in `running_processes`.
    """
    program = ("-c", RECORDING, f"{workdir}.{start}", f"--mode={mode}")
    with running_processes(workdir, program=program, network=net, **options) as runs:
        yield runs


def finish(net: Network, workdir: Path, start: str, **options) -> None:
    """Run until the end; check that all processes succeed."""
    with running(net, workdir, start, **options) as runs:
        codes = [run.wait(timeout=TIMEOUT_SECONDS) for run in runs]
    assert codes == [0] * len(codes), read_output(workdir)


def read_batches(workdir: Path, start: str, name: str) -> list[list[str]]:
    """Return the ids of each global batch: those of all processes, in the order of the rows."""
    paths = sorted(workdir.parent.glob(f"{workdir.name}.{start}.{name}.*"))
    parts = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    return [sum(part, []) for part in zip(*parts, strict=False)]


def wait_for_batch(
    runs: list[subprocess.Popen], workdir: Path, name: str, number: int, start: str = "first"
) -> None:
    """Wait until all processes of a start of the run have drawn a number of batches."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(read_batches(workdir, start, name)) < number:
        assert time.monotonic() < deadline, read_output(workdir)
        assert {run.poll() for run in runs} == {None}, read_output(workdir)
        time.sleep(0.05)


def wait_for_end(runs: list[subprocess.Popen], label: str) -> list[int]:
    """Wait until all processes have ended, for at most `END_SECONDS`; return their exit codes."""
    start = time.monotonic()
    codes = [run.wait(timeout=END_SECONDS - (time.monotonic() - start)) for run in runs]
    print(f"{label}: all processes ended after {time.monotonic() - start:.1f} s")
    return codes


def error_line(workdir: Path, process: int) -> str:
    """Return the only error line of a process; check that it has no traceback or stack dump."""
    output = read_output(workdir, process)
    assert not re.search(r"Traceback|Fatal Python|\*\*\* |core dumped|F\d{4} ", output), output
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def finished(motion_folder, tmp_path_factory) -> Path:
    """Return the workdir of an uninterrupted run on four hosts."""
    if reason := reason_unavailable():
        pytest.skip(reason)
    workdir = tmp_path_factory.mktemp("finished") / "w"
    with network(4) as net:
        finish(net, workdir, "first", **FOUR_HOSTS, data__folder=motion_folder)
    assert len(read_batches(workdir, "first", "train")) == LAST_STEP
    return workdir


@pytest.fixture(scope="module")
def evaluation(motion_folder, finished, tmp_path_factory) -> tuple[dict, dict]:
    """Return the options of an evaluation on four hosts, and its `eval.json` if uninterrupted."""
    options = {"data__folder": motion_folder, "init_from": finished / "model", "mode": "eval"}
    options["eval__batch_size"] = 24 // NUM_EVAL_BATCHES
    workdir = tmp_path_factory.mktemp("evaluation") / "w"
    with network(4) as net:
        finish(net, workdir, "first", **FOUR_HOSTS, **options)
    return options, read_report(workdir)


def read_report(workdir: Path) -> dict:
    return measured(json.loads((workdir / "eval.json").read_text()))


def fail(event: str, host: int, net: Network, runs: list[subprocess.Popen]) -> None:
    """Let a host fail: its link goes down, or its process is killed."""
    if event == "link":
        net.set_link(host, "down")
    else:
        runs[host].kill()


def check_end(event: str, host: int, runs: list[subprocess.Popen], workdir: Path) -> None:
    """Check that all processes end in time, each with one line that names a host.

    The lines name the host that failed. A host that lost its own link names process 0, or itself if
    it runs process 0.
    """
    codes = wait_for_end(runs, f"{event} {host}")
    num_aborted = 0
    for process, code in enumerate(codes):
        if event == "kill" and process == host:
            assert code == -signal.SIGKILL
            continue
        if event == "kill" and code == -signal.SIGABRT:  # by Gloo; see docs/scaling.md
            num_aborted += 1
            assert "gloo::EnforceNotMet" in read_output(workdir, process)
            continue
        assert code == InputError.EXIT_CODE, read_output(workdir, process)
        named = 0 if process == host else host
        assert error_line(workdir, process).startswith(
            f"error: process {named} on node{named}: "
        ), read_output(workdir, process)
    assert num_aborted <= 1


FAILURES = [("link", 3), ("link", 0), ("kill", 2), ("kill", 0)]


@pytest.mark.parametrize(("event", "host"), FAILURES)
def test_training_ends_and_continues_on_four_hosts(
    event, host, hosts, motion_folder, finished, tmp_path
):
    workdir, options = tmp_path / "w", {"data__folder": motion_folder}
    with running(hosts, workdir, "first", **FOUR_HOSTS, **options) as runs:
        wait_for_batch(runs, workdir, "train", FIRST_CHECKPOINT + 4)
        fail(event, host, hosts, runs)
        check_end(event, host, runs, workdir)
    hosts.set_link(host, "up")
    finish(hosts, workdir, "second", **FOUR_HOSTS, **options)
    check_batches(workdir, finished)
    check_same_outputs(workdir, finished)


def check_batches(workdir: Path, expected: Path) -> None:
    """Check that a run that was continued at its first checkpoint drew the expected batches."""
    batches = read_batches(expected, "first", "train")
    first = read_batches(workdir, "first", "train")
    assert first == batches[: len(first)]
    assert read_batches(workdir, "second", "train") == batches[FIRST_CHECKPOINT:]
    assert f"step {FIRST_CHECKPOINT} of {LAST_STEP}, continued" in read_output(workdir)


def test_training_continues_on_two_hosts_and_a_suspended_host_returns_later(
    hosts, motion_folder, finished, tmp_path
):
    """The coordinator of the restarted run has the same address as that of the first run."""
    workdir, options = tmp_path / "w", {"data__folder": motion_folder}
    with running(hosts, workdir, "first", **FOUR_HOSTS, **options) as runs:
        wait_for_batch(runs, workdir, "train", FIRST_CHECKPOINT + 4)
        runs[3].send_signal(signal.SIGSTOP)
        codes = wait_for_end(runs[:3], "SIGSTOP 3")
        assert codes == [InputError.EXIT_CODE] * 3, read_output(workdir)
        for process in range(3):
            assert error_line(workdir, process).startswith("error: process 3 on node3: ")
        with running(hosts, workdir, "second", **TWO_HOSTS, **options) as restarted:
            wait_for_batch(restarted, workdir, "train", 2, start="second")
            runs[3].send_signal(signal.SIGCONT)
            assert wait_for_end(runs[3:], "SIGCONT 3") == [InputError.EXIT_CODE]
            codes = [run.wait(timeout=TIMEOUT_SECONDS) for run in restarted]
    assert error_line(workdir, 3).startswith("error: process 0 on node0: connection lost")
    assert codes == [0, 0], read_output(workdir)
    check_batches(workdir, finished)
    check_same(workdir, finished)


def test_a_signal_to_one_host_saves_and_stops_training_on_all(
    hosts, motion_folder, finished, tmp_path
):
    workdir, options = tmp_path / "w", {"data__folder": motion_folder}
    with running(hosts, workdir, "first", **FOUR_HOSTS, **options) as runs:
        wait_for_batch(runs, workdir, "train", 5)
        runs[2].send_signal(signal.SIGTERM)
        codes = wait_for_end(runs, "SIGTERM 2")
    assert codes == [128 + signal.SIGTERM] * 4, read_output(workdir)
    step = int(re.search(r"stopped and saved at step (\d+)", read_output(workdir))[1])
    finish(hosts, workdir, "second", **FOUR_HOSTS, **options)
    batches = read_batches(finished, "first", "train")
    assert read_batches(workdir, "second", "train") == batches[step:]
    shutil.rmtree(workdir / "checkpoints" / str(step), ignore_errors=True)
    check_same_outputs(workdir, finished)


def test_a_short_outage_and_a_slow_link_do_not_end_training(
    hosts, motion_folder, finished, tmp_path
):
    workdir = tmp_path / "w"
    with running(hosts, workdir, "first", **FOUR_HOSTS, data__folder=motion_folder) as runs:
        wait_for_batch(runs, workdir, "train", 5)
        hosts.limit_rate(1, "10mbit")
        hosts.set_link(3, "down")
        time.sleep(8)
        hosts.set_link(3, "up")
        codes = [run.wait(timeout=TIMEOUT_SECONDS) for run in runs]
    assert codes == [0] * 4, read_output(workdir)
    check_same_outputs(workdir, finished)


def test_a_slow_host_is_named_and_does_not_end_training(hosts, motion_folder, finished, tmp_path):
    workdir, deadline = tmp_path / "w", time.monotonic() + TIMEOUT_SECONDS
    with running(hosts, workdir, "first", **FOUR_HOSTS, data__folder=motion_folder) as runs:
        wait_for_batch(runs, workdir, "train", 2)
        with slowed(runs[2], share=0.1, period=5.0):
            while " is slow: " not in read_output(workdir):
                assert time.monotonic() < deadline, read_output(workdir)
                assert {run.poll() for run in runs} == {None}, read_output(workdir)
                time.sleep(0.5)
        codes = [run.wait(timeout=TIMEOUT_SECONDS) for run in runs]
    assert codes == [0] * 4, read_output(workdir)
    [line] = [line for line in read_output(workdir).splitlines() if " is slow: " in line]
    assert line.startswith("process 2 on node2 is slow: the others waited for it for ")
    check_same_outputs(workdir, finished)


@pytest.mark.parametrize(
    ("event", "host", "again"),
    [("link", 3, FOUR_HOSTS), ("link", 0, TWO_HOSTS), ("kill", 2, TWO_HOSTS)],
)
def test_evaluation_ends_and_continues(event, host, again, hosts, evaluation, tmp_path):
    workdir, (options, expected) = tmp_path / "w", evaluation
    with running(hosts, workdir, "first", **FOUR_HOSTS, **options) as runs:
        wait_for_batch(runs, workdir, "eval", 3)
        fail(event, host, hosts, runs)
        check_end(event, host, runs, workdir)
    hosts.set_link(host, "up")
    finish(hosts, workdir, "second", **again, **options)
    check_evaluation(workdir, expected, rounding=again is TWO_HOSTS)


def check_evaluation(workdir: Path, expected: dict, *, rounding: bool = False) -> None:
    """Check that an evaluation was continued after a batch, and that its results are the same.

    On two hosts, each computes twice as many clips at a time, and rounds differently.
    """
    assert re.search(r"(4|8|12|16) of 24 videos were evaluated before", read_output(workdir))
    assert len(read_batches(workdir, "second", "eval")) < NUM_EVAL_BATCHES
    report, expected = read_report(workdir), dict(expected)
    for name in ("loss", "calibration_error") if rounding else ():
        assert report.pop(name) == pytest.approx(expected.pop(name), rel=1e-6)
    assert report == expected


@pytest.mark.parametrize("host", [0, 2])
def test_a_signal_to_one_host_stops_evaluation_on_all(host, hosts, evaluation, tmp_path):
    workdir, (options, expected) = tmp_path / "w", evaluation
    with running(hosts, workdir, "first", **FOUR_HOSTS, **options) as runs:
        wait_for_batch(runs, workdir, "eval", 3)
        runs[host].send_signal(signal.SIGTERM)
        codes = wait_for_end(runs, f"SIGTERM {host}")
    assert codes == [128 + signal.SIGTERM] * 4, read_output(workdir, host)
    assert "terminated" in read_output(workdir, host)
    for process in {0, 1, 2, 3} - {host}:
        assert error_line(workdir, process).startswith(
            f"error: process {host} on node{host}: received SIGTERM; "
        )
    finish(hosts, workdir, "second", **FOUR_HOSTS, **options)
    check_evaluation(workdir, expected)
