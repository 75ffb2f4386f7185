"""A failure in one of two processes ends both within a minute, with one error line each."""

import contextlib
import os
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
from tests.distributed.test_processes import ROOT, read_output, started

LIMIT = 60  # seconds from the failure to the end of the last process
SECONDS = 400  # timeout of two processes that compile on a busy machine
pytestmark = pytest.mark.timeout(2 * SECONDS)

# The program of both processes. Process `who` fails with `failure` at the phase `when`.
FAILING = f"""
import os, resource, runpy, signal, sys, time
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})
when, failure, who, stamp = sys.argv.pop(1).split(",")
from jaxvid.distributed import collectives, process_group
from jaxvid.evaluation import loop
from jaxvid.storage import model_card, model_folder
from jaxvid.training import checkpoint, run_config

def note():
    Path(stamp).write_text(str(time.time()))

def fail(config=None):
    note()
    if failure == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
    elif failure == "elsewhere":
        os.chdir(Path(stamp).parent / "elsewhere")
        load = model_card.load_card
        noting_load = lambda folder: (note(), load(folder))[1]
        model_card.load_card = model_folder.load_card = noting_load
    elif failure == "fields":
        config["optimizer"]["extra"] = 1
        del config["optimizer"]["name"]
    elif failure == "defect":
        raise ZeroDivisionError("a defect")
    else:
        os.kill(os.getpid(), getattr(signal, failure))

def failing(function, call):
    calls = []
    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and process_group.current().index == int(who):
            fail(*args[:1])
        return function(*args, **kwargs)
    return wrapped

if when == "config":
    run_config.check_same_everywhere = failing(run_config.check_same_everywhere, 1)
elif when == "training":
    collectives.any_process = failing(collectives.any_process, 4)
elif when == "evaluation":
    split = loop.split_batch
    loop.split_batch = failing(loop.split_batch, 2)
elif when == "checkpoint":
    checkpoint.save_checkpoint = failing(checkpoint.save_checkpoint, 1)
elif when == "model":
    model_folder.save_model_folder = failing(model_folder.save_model_folder, 1)
runpy.run_path({str(ROOT / "main.py")!r}, run_name="__main__")
"""
OPTIONS = {"processes": 2, "devices": 2, "mesh": (1, 4)}  # weights are sharded over both


def lines(workdir: Path, process: int) -> list[str]:
    """Return the output of a process without the log and the output of C++ libraries."""
    log = re.compile(r"^(\[Gloo\]|[IWEF]\d{4} |\S+: .*parameters)")
    return [line for line in read_output(workdir, process).splitlines() if not log.match(line)]


def fail(workdir: Path, when: str, failure: str, who: int, **options) -> list[int]:
    """Run two processes of which one fails; check that both end in time, and return their codes."""
    stamp = workdir.parent / "stamp"
    program = ("-c", FAILING, f"{when},{failure},{who},{stamp}")
    with started(workdir, **OPTIONS | options, program=program) as runs:
        other = runs[1 - who]
        code = other.wait(timeout=SECONDS)
        took = time.time() - float(stamp.read_text())
        if failure == "SIGSTOP":
            runs[who].send_signal(signal.SIGCONT)
        runs[who].wait(timeout=LIMIT)
        print(f"{when} {failure} {who}: the other ended after {took:.1f} s")
        assert took < LIMIT
        assert code == InputError.EXIT_CODE, read_output(workdir, 1 - who)
        return [run.returncode for run in runs]


EXCHANGING = """
import sys
from jaxvid.distributed import collectives, process_group, setup
from jaxvid.errors import InputError

process_group.LOST_SECONDS = 10.0
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


SAVING = """
import resource, sys
from pathlib import Path

import jax, numpy as np
from absl import logging
from jaxvid import cli
from jaxvid.distributed import process_group, setup
from jaxvid.training import checkpoint
from jaxvid.errors import InputError

class Position:
    def get_state(self):
        return {}

logging.set_verbosity(logging.FATAL)
cli.hide_unfinished_saves()
try:
    setup.init_processes(sys.argv[1], 2, int(sys.argv[2]))
    with process_group.failing_together():
        mesh = jax.make_mesh((2,), ("fsdp",))
        half = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        data = np.random.default_rng(0).random((200, 1000))
        weights = jax.make_array_from_callback(data.shape, half, lambda index: data[index])
        manager = checkpoint.make_manager(Path(sys.argv[3]), keep=2)
        if sys.argv[2] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        state = {"step": np.int32(1), "weights": weights}
        checkpoint.save_checkpoint(manager, state, {"data": Position()})
        checkpoint.finish_saving(manager)
except InputError as error:
    print(f"error: {error}", flush=True)
    sys.exit(error.EXIT_CODE)
"""


RESTORING = """
import sys
from pathlib import Path

import jax, numpy as np
from jaxvid.distributed import process_group, setup, sharding
from jaxvid.training import checkpoint
from jaxvid.errors import InputError

def damaged(*args):
    raise ValueError("damaged")

class Position:
    def get_state(self):
        return {}

    def set_state(self, state):
        pass

checkpoint.RESTORE_SECONDS = 3.0
try:
    setup.init_processes(sys.argv[1], 2, int(sys.argv[2]))
    with process_group.failing_together():
        workdir, resumables = Path(sys.argv[3]), {"data": Position()}
        mesh = jax.make_mesh((2,), ("fsdp",))
        half = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        data = np.arange(4, dtype=np.float32)
        weights = jax.make_array_from_callback((4,), half, lambda index: data[index])
        step = jax.device_put(np.int32(1), sharding.replicated(mesh))
        state = {"step": step, "weights": weights}
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
def pair(program: str, *arguments: object) -> Iterator[list[subprocess.Popen]]:
    """Start a program `COORDINATOR PROCESS ...` in two processes, with pipes for their outputs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
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
        (0, "lost connection; it was killed or cannot be reached"),
        (1, "no heartbeat for 10 s; it was killed or hangs"),
    ],
)
def test_a_killed_process_ends_the_other_with_one_line(killed, cause):
    with pair(EXCHANGING) as runs:
        assert [run.stdout.readline() for run in runs] == ["['0', '1']\n"] * 2
        begun = time.monotonic()
        runs[killed].kill()
        output, _ = runs[1 - killed].communicate(timeout=SECONDS)
    assert output == f"error: process {killed}: {cause}\n"
    assert runs[1 - killed].returncode == InputError.EXIT_CODE
    assert time.monotonic() - begun < LIMIT


def test_a_failed_save_in_one_process_ends_both(tmp_path):
    """In Orbax, the failing process waits at a barrier that the other process does not reach."""
    with pair(SAVING, tmp_path) as runs:
        outputs = [run.communicate(timeout=SECONDS)[0] for run in runs]
    assert [run.returncode for run in runs] == [InputError.EXIT_CODE] * 2
    for output, start in zip(outputs, ("error: process 1: ", "error: "), strict=True):
        [line] = [line for line in output.splitlines() if "[Gloo]" not in line]
        assert line.startswith(f"{start}a checkpoint cannot be written to {tmp_path}")


@pytest.mark.full
def test_a_failed_restore_in_one_process_ends_both(tmp_path):
    """The other process restores the checkpoint, or waits for the failed one inside Orbax."""
    begun = time.monotonic()
    with pair(RESTORING, tmp_path) as runs:
        outputs = [run.communicate(timeout=SECONDS)[0] for run in runs]
    assert time.monotonic() - begun < LIMIT
    assert [run.returncode for run in runs] == [InputError.EXIT_CODE] * 2
    for output, start in zip(outputs, ("error: process 1: ", "error: "), strict=True):
        [line] = [line for line in output.splitlines() if line.startswith("error: ")]
        assert line.startswith(start)
        assert "cannot be restored" in line
        assert "Traceback" not in output


@pytest.mark.full
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("failure", ["SIGKILL", "SIGSTOP", "defect"])
@pytest.mark.parametrize("when", ["training", "evaluation"])
def test_a_failed_process_ends_the_other(when, failure, who, motion_folder, tmp_path):
    workdir = tmp_path / "w"
    codes = fail(workdir, when, failure, who, data__folder=motion_folder)
    expected = {"SIGKILL": -signal.SIGKILL, "SIGSTOP": InputError.EXIT_CODE, "defect": 1}
    assert codes[who] == expected[failure], read_output(workdir, who)
    *_, line = lines(workdir, 1 - who)
    assert line.startswith(f"error: process {who}: ")
    assert read_output(workdir, 1 - who).count("error: ") == 1
    assert "Traceback" not in read_output(workdir, 1 - who)
    if failure == "defect":
        assert "ZeroDivisionError: a defect; see the traceback in its output" in line
        assert read_output(workdir, who).count("Traceback") == 1
        assert read_output(workdir, who).rstrip().endswith("ZeroDivisionError: a defect")


@pytest.mark.full
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("when", ["checkpoint", "model"])
def test_a_full_disk_of_one_process_ends_both(when, who, motion_folder, tmp_path):
    workdir = tmp_path / "w"
    codes = fail(
        workdir, when, "full", who, data__folder=motion_folder, checkpoint_every_epochs=1.0
    )
    assert codes == [InputError.EXIT_CODE] * 2
    for process in (0, 1):
        *_, line = lines(workdir, process)
        assert read_output(workdir, process).count("error: ") == 1, read_output(workdir, process)
        assert "Traceback" not in read_output(workdir, process)
        assert "cannot be written" in line
        assert line.startswith("error: " if process == who else f"error: process {who}: ")


@pytest.mark.full
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("field", ["init_from", "distill__teacher"])
def test_a_model_folder_missing_in_one_process_ends_both(
    field, who, motion_folder, tmp_path, folders
):
    (tmp_path / "elsewhere").mkdir()
    network = jaxvid.create_model("xvit_tiny", width=16, depth=1, head="mean")
    preprocessing = load_card(folders / "xvit")["preprocessing"]
    jaxvid.save_model(network, tmp_path / "model", preprocessing=preprocessing, labels=list(LABELS))
    # Process `who` resolves this relative path in another folder.
    workdir, path = tmp_path / "w", os.path.relpath(tmp_path / "model", ROOT)
    codes = fail(workdir, "config", "elsewhere", who, data__folder=motion_folder, **{field: path})
    assert codes == [InputError.EXIT_CODE] * 2
    for process in (0, 1):
        *_, line = lines(workdir, process)
        assert "does not exist" in line
        assert read_output(workdir, process).count("error: ") == 1, read_output(workdir, process)


@pytest.mark.full
@pytest.mark.parametrize("who", [0, 1])
def test_different_config_fields_end_both(who, motion_folder, tmp_path):
    workdir = tmp_path / "w"
    codes = fail(workdir, "config", "fields", who, data__folder=motion_folder)
    assert codes == [InputError.EXIT_CODE] * 2
    for process in (0, 1):
        *_, line = lines(workdir, process)
        extra = ["missing", "1"] if who else ["1", "missing"]
        assert (
            f"optimizer.extra is {extra[0]} in process 0, {extra[1]} in process 1; "
            "optimizer.name is "
        ) in line
        assert line.endswith("; start all with the same flags")


@pytest.mark.full
@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_does_not_join_is_named(who, motion_folder, tmp_path):
    workdir, begun = tmp_path / "w", time.monotonic()
    flags = (["--join_seconds=15"],) * 2
    with started(workdir, **OPTIONS, flags=flags, data__folder=motion_folder) as runs:
        runs[who].kill()
        assert runs[1 - who].wait(timeout=SECONDS) == InputError.EXIT_CODE
    print(f"start {who}: the other ended after {time.monotonic() - begun:.1f} s")
    *_, line = lines(workdir, 1 - who)
    assert line.startswith(f"error: process {who} ")
    assert " did not join within 15 s; " in line


@pytest.mark.full
@pytest.mark.parametrize("who", [0, 1])
def test_a_config_file_missing_in_one_process_ends_both(who, motion_folder, tmp_path):
    workdir, begun = tmp_path / "w", time.monotonic()
    flags: tuple[list[str], list[str]] = ([], [])
    flags[who].append("--config=nowhere.py")
    with started(workdir, **OPTIONS, flags=flags, data__folder=motion_folder) as runs:
        assert [run.wait(timeout=SECONDS) for run in runs] == [InputError.EXIT_CODE] * 2
    assert time.monotonic() - begun < LIMIT
    for process in (0, 1):
        line, *_ = lines(workdir, process)
        source = "" if process == who else f"process {who}: "
        assert line.startswith(f"error: {source}--config: nowhere.py does not exist")
