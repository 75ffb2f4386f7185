"""The workdir lock admits one run at a time and is released when its process ends."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from jaxvid.distributed import process_group
from jaxvid.errors import InputError
from jaxvid.evaluate import evaluate
from jaxvid.locks import LockedError, locked
from jaxvid.storage.workdir_lock import exclusive
from jaxvid.train import train
from tests.distributed.test_processes import ROOT, read_output, running_processes

HOLD_LOCK = """
import sys, time
from pathlib import Path
from jaxvid.locks import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    """A workdir that is locked by another process, and that process."""
    workdir = tmp_path / "w"
    workdir.mkdir()
    (workdir / "log.txt").write_text("a run\n")
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    command = [sys.executable, "-c", HOLD_LOCK, workdir / ".lock"]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        yield workdir, holder
    finally:
        holder.kill()
        holder.communicate()


def contents(folder) -> dict:
    """Return the content and modification time of each file in a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_second_run_is_refused_and_changes_nothing(held, config):
    workdir, holder = held
    before = contents(workdir)
    for program in (train, evaluate):
        with pytest.raises(InputError) as error_info:
            program(config, workdir)
        assert f"{workdir}: in use by another run (process {holder.pid} on " in str(
            error_info.value
        )
        assert "\n" not in str(error_info.value)
    assert contents(workdir) == before


def test_lock_of_a_killed_run_is_released(held):
    workdir, holder = held
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (workdir / ".lock").exists()
    with locked(workdir / ".lock") as is_held:
        assert is_held
        assert (workdir / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(LockedError), locked(workdir / ".lock"):
            pass
    assert {path.name for path in workdir.iterdir()} == {"log.txt", "checkpoints"}


def test_lock_file_that_is_deleted_before_locking_is_created_again(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def delete_and_lock(file, operation):
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", delete_and_lock)
    with locked(tmp_path / ".lock"), pytest.raises(LockedError), locked(tmp_path / ".lock"):
        pass
    assert len(calls) == 3  # two of the first `locked`, one of the second


@exclusive
def program(config, workdir, *, value=0):
    return value, sorted(path.name for path in workdir.iterdir())


@exclusive
def refusing(config, workdir):
    raise InputError("no")


def test_file_systems_without_locks_are_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert program(None, tmp_path, value=3) == (3, [".lock"])
    assert capsys.readouterr().err == (
        f"{tmp_path}: its file system does not support locks; start only one run at a time\n"
    )
    assert not list(tmp_path.iterdir())


def test_refused_run_leaves_no_new_workdir(tmp_path):
    with pytest.raises(InputError, match="no"):
        refusing(None, tmp_path / "a" / "w")
    assert not (tmp_path / "a" / "w").exists()


def test_only_process_0_holds_the_lock(tmp_path, monkeypatch):
    class SecondProcess:
        index = 1

        def exchange(self, value, seconds):
            return [None, value]

    with locked(tmp_path / ".lock"):
        monkeypatch.setattr(process_group, "current", SecondProcess)
        assert program(None, tmp_path, value=1)[0] == 1


@pytest.mark.full
def test_second_command_is_refused(motion_folder, tmp_path):
    options = {"processes": 1, "devices": 1, "mesh": (1, 1), "data__folder": motion_folder}
    workdir = tmp_path / "w"
    with running_processes(workdir, **options, num_epochs=1000.0) as [run]:
        while "first step" not in read_output(workdir):
            assert run.poll() is None, read_output(workdir)
        for mode in ("train", "eval"):
            command = [sys.executable, "main.py", "--config=configs/motion.py", f"--mode={mode}"]
            done = subprocess.run(
                [*command, f"--workdir={workdir}"], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == InputError.EXIT_CODE
            [line] = done.stderr.splitlines()
            expected = f"error: {workdir}: in use by another run (process {run.pid} on "
            assert line.startswith(expected)
        run.send_signal(signal.SIGTERM)
        assert run.wait() == 128 + signal.SIGTERM
    assert not (workdir / ".lock").exists()
    # Only the first run has logged this line.
    assert (workdir / "log.txt").read_text().count("parameters, 48 training") == 1
