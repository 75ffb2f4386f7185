"""Hostile checkpoints and model folders are refused in one line, within time and memory limits.

The default suite runs every 8th case in this process. `make test-full` runs all of them in
separate processes, which are killed if they hang.
"""

import concurrent.futures
import contextlib
import io
import multiprocessing
import signal
import time
from pathlib import Path

import pytest

from tests.convert import hostile_checkpoints, hostile_folders
from tests.convert.hostile_checkpoints import MODEL, members, shrink_preset, write_zip

MAX_SECONDS = 2.0  # CPU time, which does not depend on other work on the machine
MAX_MEGABYTES = 1000  # additional memory per case
HANG_SECONDS = 120  # a case that runs longer is killed
DEFAULT_STEP = 8  # the default suite runs every 8th case


def run_checkpoint(name: str, folder: Path) -> tuple[int, str, float]:
    """Convert the checkpoint of a case; return the exit code, stderr and the CPU seconds."""
    from convert import torch_to_flax

    suffix, build, _ = hostile_checkpoints.CASES[name]
    path = folder / f"hostile.{suffix}"
    build(path)
    arguments = ["--model", MODEL, "--output", str(folder / "model")]
    if suffix.startswith("labels"):
        write_zip(folder / "valid.pth", members())
        arguments += ["--input", str(folder / "valid.pth"), "--labels", str(path)]
    else:
        arguments += ["--input", str(path)]
    return capture(torch_to_flax.main, arguments, str(path))


def run_folder(name: str, folder: Path) -> tuple[int, str, float]:
    """Run `predict` with the folder of a case; return the exit code, stderr and the CPU seconds."""
    from jaxvid import predict

    path = folder / "hostile"
    hostile_folders.CASES[name][0](path)
    (folder / "clip.mp4").write_bytes(b"clip")
    return capture(predict.main, [str(folder / "clip.mp4"), "--model", str(path)], str(path))


def capture(main, arguments: list[str], path: str) -> tuple[int, str, float]:
    """Call a program; return the exit code, stderr (with PATH for `path`) and the CPU seconds."""
    out, err, start = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, err.getvalue().replace(path, "PATH"), time.process_time() - start


RUNS = {"checkpoint": run_checkpoint, "folder": run_folder}
CASES = {"checkpoint": hostile_checkpoints.CASES, "folder": hostile_folders.CASES}


def check(kind: str, name: str, code: int, message: str, _: float) -> None:
    """Assert that a case was refused in one line that names the file and the cause."""
    assert code == 2, message
    assert message.startswith("error: "), message
    assert "PATH" in message or "hostile" in message, message
    assert len(message.splitlines()) == 1, message
    assert message.rstrip("\n").isprintable(), message
    assert len(message) < 6000, message
    expected = CASES[kind][name][-1]
    assert any(part in message for part in expected.split("|")), (expected, message)


# ------------------------------------------------------------------ some cases, in this process


@pytest.mark.parametrize("name", list(hostile_checkpoints.CASES)[::DEFAULT_STEP])
def test_a_hostile_checkpoint_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setitem(hostile_checkpoints.PRESETS, MODEL, hostile_checkpoints.PRESETS[MODEL])
    shrink_preset()
    check("checkpoint", name, *run_checkpoint(name, tmp_path))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", list(hostile_folders.CASES)[::DEFAULT_STEP])
def test_a_hostile_model_folder_is_refused_in_one_line(name, tmp_path):
    check("folder", name, *run_folder(name, tmp_path))


# ------------------------------------------------------------------ all cases, in processes


def measure(kind: str, name: str, folder: Path) -> tuple[int, str, float, float]:
    """Run a case; return the exit code, stderr, the CPU seconds and the additional memory in MB."""
    signal.alarm(HANG_SECONDS)  # kills the process after this time
    folder.mkdir()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM, the peak memory
    result = RUNS[kind](name, folder)
    signal.alarm(0)
    return *result, (_status("VmHWM") - before) / 1000


def _status(field: str) -> int:
    """Return a memory field of this process in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def prepare() -> None:
    """Import the modules and run a valid case, so that the imports are not measured."""
    import tempfile

    shrink_preset()
    with tempfile.TemporaryDirectory() as folder:
        write_zip(Path(folder) / "valid.pth", members())
        from convert import torch_to_flax

        arguments = ["--model", MODEL, "--input", f"{folder}/valid.pth"]
        arguments += ["--output", f"{folder}/model"]
        code, message, _ = capture(torch_to_flax.main, arguments, folder)
        assert code == 0, message
        hostile_folders.build_valid(Path(folder) / "valid")
        from jaxvid.storage.preprocessing import load_model_and_preprocessing

        load_model_and_preprocessing(Path(folder) / "valid")


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", list(RUNS))
def test_all_hostile_cases_are_refused_within_time_and_memory_limits(kind, tmp_path):
    failures, slowest, largest = [], (0.0, ""), (0.0, "")
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, spawn, prepare) as pool:
        jobs = {
            name: pool.submit(measure, kind, name, tmp_path / str(index))
            for index, name in enumerate(CASES[kind])
        }
        for name, job in jobs.items():
            try:
                code, message, seconds, megabytes = job.result()
                check(kind, name, code, message, seconds)
            except Exception as error:  # a failed assertion, or a process that was killed
                failures.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
                continue
            slowest, largest = max(slowest, (seconds, name)), max(largest, (megabytes, name))
    print(f"{len(jobs)} cases; slowest {slowest}; most memory {largest}")
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures)
    assert len(jobs) >= {"checkpoint": 126, "folder": 120}[kind]
    assert slowest[0] < MAX_SECONDS
    assert largest[0] < MAX_MEGABYTES
