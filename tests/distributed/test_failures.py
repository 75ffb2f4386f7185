"""A failure in one of two processes ends the other within a minute, with one error line."""

import contextlib
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxvid
from jaxvid.data.synthetic_motion import LABELS
from jaxvid.errors import InputError
from jaxvid.storage.model_card import load_card
from tests.distributed.test_processes import ROOT, read_output, running_processes

END_SECONDS = 60  # maximum time from a failure to the end of the other process
HOST = platform.node()
TIMEOUT_SECONDS = 400  # for two processes that compile on a busy machine
pytestmark = pytest.mark.timeout(2 * TIMEOUT_SECONDS)

# The program of both processes. Process number `failing` fails with `failure` in the given phase,
# and writes the time of the failure to the file `stamp`.
FAILING = f"""
import os, resource, runpy, signal, sys, time
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})
phase, failure, failing, stamp = sys.argv.pop(1).split(",")
from jaxvid.distributed import collectives, process_group
from jaxvid.evaluation import loop
from jaxvid.storage import model_card, model_folder
from jaxvid.training import checkpoint, run_config

def record_time():
    Path(stamp).write_text(str(time.time()))

def fail(config=None):
    record_time()
    if failure == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
    elif failure == "other directory":
        os.chdir(Path(stamp).parent / "other")
        load = model_card.load_card
        def load_and_record_time(folder):
            record_time()
            return load(folder)
        model_card.load_card = model_folder.load_card = load_and_record_time
    elif failure == "fields":
        config["optimizer"]["extra"] = 1
        del config["optimizer"]["name"]
    elif failure == "defect":
        raise ZeroDivisionError("a defect")
    else:
        os.kill(os.getpid(), getattr(signal, failure))

def fail_at(function, call):
    # Wrap a function so that call number `call` fails in process `failing`.
    calls = []
    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and process_group.current().index == int(failing):
            fail(*args[:1])
        return function(*args, **kwargs)
    return wrapped

if phase == "config":
    run_config.check_same_everywhere = fail_at(run_config.check_same_everywhere, 1)
elif phase == "training":
    collectives.any_process = fail_at(collectives.any_process, 4)
elif phase == "evaluation":
    loop.split_batch = fail_at(loop.split_batch, 2)
elif phase == "checkpoint":
    checkpoint.save_checkpoint = fail_at(checkpoint.save_checkpoint, 1)
elif phase == "model":
    model_folder.save_model_folder = fail_at(model_folder.save_model_folder, 1)
runpy.run_path({str(ROOT / "main.py")!r}, run_name="__main__")
"""
OPTIONS = {"processes": 2, "devices": 2, "mesh": (1, 4)}  # both processes hold parts of the weights


def lines(workdir: Path, process: int) -> list[str]:
    """Return the output lines of a process, except logs of C++ libraries and the model size."""
    log = re.compile(r"^(\[Gloo\]|[IWEF]\d{4} |\S+: .*parameters)")
    return [line for line in read_output(workdir, process).splitlines() if not log.match(line)]


def run_failing(workdir: Path, phase: str, failure: str, failing: int, **options) -> list[int]:
    """Run two processes of which one fails; check that the other ends in time with an error.

    Return both exit codes.
    """
    stamp = workdir.parent / "stamp"
    program = ("-c", FAILING, f"{phase},{failure},{failing},{stamp}")
    with running_processes(workdir, **OPTIONS | options, program=program) as runs:
        other = runs[1 - failing]
        code = other.wait(timeout=TIMEOUT_SECONDS)
        seconds = time.time() - float(stamp.read_text())
        if failure == "SIGSTOP":
            runs[failing].send_signal(signal.SIGCONT)
        runs[failing].wait(timeout=END_SECONDS)
        print(f"{phase} {failure} {failing}: the other ended after {seconds:.1f} s")
        assert seconds < END_SECONDS
        assert code == InputError.EXIT_CODE, read_output(workdir, 1 - failing)
        return [run.returncode for run in runs]


# Two processes exchange values until one is killed.
EXCHANGING = """
import sys
from jaxvid.distributed import collectives, process_group, setup
from jaxvid.errors import InputError

process_group.LOST_SECONDS, process_group.GRACE_SECONDS = 4.0, 1.0
try:
    setup.init_processes(sys.argv[1], 2, int(sys.argv[2]))
    with process_group.failing_together():
        print(collectives.gather(sys.argv[2]), flush=True)
        while True:
            collectives.barrier("again")
except InputError as error:
    print(f"error: {error}")
    sys.exit(error.EXIT_CODE)
"""

# After two processes have finished, process 0 is gone before process 1 exits.
FINISHING = """
import os, sys, time
from jaxvid.distributed import collectives, process_group, setup

setup.init_processes(sys.argv[1], 2, int(sys.argv[2]))
with process_group.failing_together():
    collectives.gather(sys.argv[2])
if sys.argv[2] == "0":
    os._exit(0)
time.sleep(1)
"""

# Two processes save a checkpoint; files of process 1 are limited to 8000 bytes.
SAVING = """
import resource, sys
from pathlib import Path

import jax, numpy as np
from absl import logging
from jaxvid import cli
from jaxvid.distributed import process_group, setup
from jaxvid.training import checkpoint
from jaxvid.errors import InputError

class DataIterator:
    def get_state(self):
        return {}

process_group.GRACE_SECONDS = 1.0
logging.set_verbosity(logging.FATAL)
cli.hide_unfinished_saves()
try:
    setup.init_processes(sys.argv[1], 2, int(sys.argv[2]))
    with process_group.failing_together():
        mesh = jax.make_mesh((2,), ("fsdp",))
        row_sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        data = np.random.default_rng(0).random((200, 1000))
        weights = jax.make_array_from_callback(data.shape, row_sharding, data.__getitem__)
        manager = checkpoint.make_manager(Path(sys.argv[3]), keep=2)
        if sys.argv[2] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        state = {"step": np.int32(1), "weights": weights}
        checkpoint.save_checkpoint(manager, state, {"data": DataIterator()})
        checkpoint.finish_saving(manager)
except InputError as error:
    print(f"error: {error}", flush=True)
    sys.exit(error.EXIT_CODE)
"""

# Two processes restore a checkpoint; restoring fails in process 1.
RESTORING = """
import sys
from pathlib import Path

import jax, numpy as np
from jaxvid.distributed import process_group, setup, sharding
from jaxvid.training import checkpoint
from jaxvid.errors import InputError

def damaged(*args):
    raise ValueError("damaged")

class DataIterator:
    def get_state(self):
        return {}

    def set_state(self, state):
        pass

checkpoint.RESTORE_SECONDS = 3.0
try:
    setup.init_processes(sys.argv[1], 2, int(sys.argv[2]))
    with process_group.failing_together():
        workdir, resumables = Path(sys.argv[3]), {"data": DataIterator()}
        mesh = jax.make_mesh((2,), ("fsdp",))
        row_sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        data = np.arange(4, dtype=np.float32)
        weights = jax.make_array_from_callback((4,), row_sharding, data.__getitem__)
        step = jax.device_put(np.int32(1), sharding.replicated(mesh))
        state = {"step": step, "params": {"a.kernel": weights}}
        with checkpoint.make_manager(workdir, keep=2) as manager:
            checkpoint.save_checkpoint(manager, state, resumables)
            checkpoint.finish_saving(manager)
        if sys.argv[2] == "1":
            checkpoint._restore = damaged
        checkpoint.restore_newest(workdir, state, resumables, keep=2)
except InputError as error:
    print(f"error: {error}", flush=True)
    sys.exit(error.EXIT_CODE)
"""


@contextlib.contextmanager
def two_processes(program: str, *arguments: object) -> Iterator[list[subprocess.Popen]]:
    """Run a program in two processes; kill them at the end.

    Its arguments are the coordinator's address, the process index and `arguments`. One pipe per
    process receives stdout and stderr.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:  # finds a free port
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, coordinator, str(process), *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in (0, 1)
    ]
    try:
        yield runs
    finally:
        for run in runs:
            run.kill()
            run.communicate()


@pytest.mark.parametrize(
    ("killed", "cause"),
    [
        (0, "connection lost; the process was killed or is unreachable"),
        (
            1,
            "no heartbeat for 4 s; the process was killed or hangs, or the network is down",
        ),
    ],
)
def test_a_killed_process_ends_the_other_with_one_line(killed, cause):
    with two_processes(EXCHANGING) as runs:
        assert [run.stdout.readline() for run in runs] == ["['0', '1']\n"] * 2
        start = time.monotonic()
        runs[killed].kill()
        output, _ = runs[1 - killed].communicate(timeout=TIMEOUT_SECONDS)
    assert output == f"error: process {killed} on {HOST}: {cause}\n"
    assert runs[1 - killed].returncode == InputError.EXIT_CODE
    assert time.monotonic() - start < END_SECONDS


def test_a_process_exits_although_process_0_is_gone():
    """JAX's exit handler would wait for process 0 forever."""
    with two_processes(FINISHING) as runs:
        outputs = [run.communicate(timeout=END_SECONDS)[0] for run in runs]
    assert outputs == ["", ""]
    assert [run.returncode for run in runs] == [0, 0]


def test_a_failed_save_in_one_process_ends_both(tmp_path):
    """With Orbax alone, the failing process waits at a barrier that the other never reaches."""
    with two_processes(SAVING, tmp_path) as runs:
        outputs = [run.communicate(timeout=TIMEOUT_SECONDS)[0] for run in runs]
    assert [run.returncode for run in runs] == [InputError.EXIT_CODE] * 2
    for output, prefix in zip(outputs, (f"error: process 1 on {HOST}: ", "error: "), strict=True):
        [line] = [line for line in output.splitlines() if "[Gloo]" not in line]
        assert line.startswith(f"{prefix}a checkpoint cannot be written to {tmp_path}")


@pytest.mark.full
def test_a_failed_restore_in_one_process_ends_both(tmp_path):
    """The other process succeeds, or waits inside Orbax for the process that failed."""
    start = time.monotonic()
    with two_processes(RESTORING, tmp_path) as runs:
        outputs = [run.communicate(timeout=TIMEOUT_SECONDS)[0] for run in runs]
    assert time.monotonic() - start < END_SECONDS
    assert [run.returncode for run in runs] == [InputError.EXIT_CODE] * 2
    for output, prefix in zip(outputs, (f"error: process 1 on {HOST}: ", "error: "), strict=True):
        [line] = [line for line in output.splitlines() if line.startswith("error: ")]
        assert line.startswith(prefix)
        assert "this process cannot restore it" in line
        assert "Traceback" not in output


@pytest.mark.full
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("failure", ["SIGKILL", "SIGSTOP", "defect"])
@pytest.mark.parametrize("phase", ["training", "evaluation"])
def test_a_failed_process_ends_the_other(phase, failure, failing, motion_folder, tmp_path):
    workdir = tmp_path / "w"
    codes = run_failing(workdir, phase, failure, failing, data__folder=motion_folder)
    expected = {"SIGKILL": -signal.SIGKILL, "SIGSTOP": InputError.EXIT_CODE, "defect": 1}
    assert codes[failing] == expected[failure], read_output(workdir, failing)
    *_, line = lines(workdir, 1 - failing)
    assert line.startswith(f"error: process {failing} on {HOST}: ")
    assert read_output(workdir, 1 - failing).count("error: ") == 1
    assert "Traceback" not in read_output(workdir, 1 - failing)
    if failure == "defect":
        assert "ZeroDivisionError: a defect; see the traceback in its output" in line
        assert read_output(workdir, failing).count("Traceback") == 1
        assert read_output(workdir, failing).rstrip().endswith("ZeroDivisionError: a defect")


@pytest.mark.full
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("phase", ["checkpoint", "model"])
def test_a_full_disk_in_one_process_ends_both(phase, failing, motion_folder, tmp_path):
    workdir = tmp_path / "w"
    options = {"data__folder": motion_folder, "checkpoint_every_epochs": 1.0}
    codes = run_failing(workdir, phase, "full", failing, **options)
    assert codes == [InputError.EXIT_CODE] * 2
    for process in (0, 1):
        *_, line = lines(workdir, process)
        assert read_output(workdir, process).count("error: ") == 1, read_output(workdir, process)
        assert "Traceback" not in read_output(workdir, process)
        assert "cannot be written" in line
        assert line.startswith(
            "error: " if process == failing else f"error: process {failing} on {HOST}: "
        )


@pytest.mark.full
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("field", ["init_from", "distill__teacher"])
def test_a_model_folder_missing_in_one_process_ends_both(
    field, failing, motion_folder, tmp_path, folders
):
    (tmp_path / "other").mkdir()
    network = jaxvid.create_model("xvit_tiny", width=16, depth=1, head="mean")
    preprocessing = load_card(folders / "xvit")["preprocessing"]
    jaxvid.save_model(network, tmp_path / "model", preprocessing=preprocessing, labels=list(LABELS))
    # The failing process resolves this relative path in another working directory.
    workdir, path = tmp_path / "w", os.path.relpath(tmp_path / "model", ROOT)
    options = {"data__folder": motion_folder, field: path}
    codes = run_failing(workdir, "config", "other directory", failing, **options)
    assert codes == [InputError.EXIT_CODE] * 2
    for process in (0, 1):
        *_, line = lines(workdir, process)
        assert "does not exist" in line
        assert read_output(workdir, process).count("error: ") == 1, read_output(workdir, process)


@pytest.mark.full
@pytest.mark.parametrize("failing", [0, 1])
def test_different_config_fields_end_both(failing, motion_folder, tmp_path):
    workdir = tmp_path / "w"
    codes = run_failing(workdir, "config", "fields", failing, data__folder=motion_folder)
    assert codes == [InputError.EXIT_CODE] * 2
    for process in (0, 1):
        *_, line = lines(workdir, process)
        extra = ["missing", "1"] if failing else ["1", "missing"]
        assert (
            f"optimizer.extra: {extra[0]} in process 0, {extra[1]} in process 1; optimizer.name: "
        ) in line
        assert line.endswith("; start all with the same flags")


@pytest.mark.full
@pytest.mark.parametrize("absent", [0, 1])
def test_a_process_that_does_not_join_is_named(absent, motion_folder, tmp_path):
    workdir, start = tmp_path / "w", time.monotonic()
    flags = (["--join_seconds=15"],) * 2
    with running_processes(
        workdir, **OPTIONS, process_flags=flags, data__folder=motion_folder
    ) as runs:
        runs[absent].kill()
        assert runs[1 - absent].wait(timeout=TIMEOUT_SECONDS) == InputError.EXIT_CODE
    print(f"start {absent}: the other ended after {time.monotonic() - start:.1f} s")
    *_, line = lines(workdir, 1 - absent)
    assert line.startswith(f"error: process {absent} ")
    assert " did not join within 15 s; " in line


@pytest.mark.full
@pytest.mark.parametrize("failing", [0, 1])
def test_a_config_file_missing_in_one_process_ends_both(failing, motion_folder, tmp_path):
    workdir, start = tmp_path / "w", time.monotonic()
    flags: tuple[list[str], list[str]] = ([], [])
    flags[failing].append("--config=nowhere.py")
    with running_processes(
        workdir, **OPTIONS, process_flags=flags, data__folder=motion_folder
    ) as runs:
        assert [run.wait(timeout=TIMEOUT_SECONDS) for run in runs] == [InputError.EXIT_CODE] * 2
    assert time.monotonic() - start < END_SECONDS
    for process in (0, 1):
        line, *_ = lines(workdir, process)
        source = "" if process == failing else f"process {failing} on {HOST}: "
        assert line.startswith(f"error: {source}--config: nowhere.py does not exist")
