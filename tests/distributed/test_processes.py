"""Several processes compute the same results as one, and they stop and fail together."""

import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxvid
from jaxvid.distributed import collectives, setup
from jaxvid.errors import InputError
from jaxvid.models import split_params
from jaxvid.training import checkpoint, run_config, run_metadata
from tests import coloured_videos
from tests.distributed.network import Network
from tests.xla_flags import fake_devices

ROOT = Path(__file__).parents[2]
# 49 videos in batches of 16 are 3 steps per epoch. The mean head, SGD and XLA's lowest optimization
# level compile fast. Adam would amplify gradients that are only rounding noise, because it divides
# gradients by their magnitude.
FIELDS = {
    **{"data.source": "folder", "data.short_side": 72, "model.width": 16, "model.depth": 1},
    **{"model.head": "mean", "batch_size": 16, "num_epochs": 8.0, "log_steps": 2},
    **{"eval.batch_size": 8, "eval.every_epochs": 4.0, "checkpoint_every_epochs": 4.0},
    **{"optimizer.name": "sgd", "optimizer.learning_rate": 0.05, "optimizer.warmup_epochs": 0.67},
}
FIRST_CHECKPOINT, LAST_STEP = 12, 24  # steps
TIMEOUT_SECONDS = 150  # for one command


@contextlib.contextmanager
def running_processes(
    workdir: Path,
    *,
    processes: int,
    devices: int,
    mesh: tuple[int, int],
    process_fields=({},) * 4,
    process_flags=((),) * 4,
    program=("main.py",),
    network: Network | None = None,
    **fields,
) -> Iterator[list[subprocess.Popen]]:
    """Start a run of one or more processes; kill them at the end.

    Args:
        workdir: The run's folder. The output of process I is written to `WORKDIR.I.txt`.
        processes: Number of processes.
        devices: Devices per process.
        mesh: Sizes of the mesh axes 'data' and 'fsdp'.
        process_fields: Config fields of each process.
        process_flags: Additional flags of each process.
        program: Arguments of the Python interpreter, to which the flags are appended.
        network: Hosts on which the processes run, one on each; None: all run on this machine.
        **fields: Config fields of all processes, with `__` in place of dots.

    Yields:
        The processes.
    """
    with socket.socket() as server:  # finds a free port
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    coordinator = f"{network.address(0)}:9876" if network else f"localhost:{port}"
    fields = FIELDS | {name.replace("__", "."): value for name, value in fields.items()}
    fields |= {"mesh.data": mesh[0], "mesh.fsdp": mesh[1]}
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    environment |= {"XLA_FLAGS": fake_devices(devices), "PYTHONPATH": str(ROOT)}
    runs = []
    try:
        for process in range(processes):
            command = [sys.executable, *program, "--config=configs/motion.py"]
            command += [f"--workdir={workdir}"]
            for name, value in (fields | process_fields[process]).items():
                command.append(f"--config.{name}={value}")
            if processes > 1:
                command += [f"--coordinator={coordinator}", f"--num_processes={processes}"]
                command += [f"--process_id={process}"]
            command += process_flags[process]
            if network:
                command = network.command(process, command)
            with open(f"{workdir}.{process}.txt", "w") as output:
                runs.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        yield runs
    finally:
        for run in runs:
            run.kill()
            run.wait()


def wait_for_exit_codes(runs: list[subprocess.Popen]) -> list[int]:
    return [run.wait(timeout=TIMEOUT_SECONDS) for run in runs]


def read_output(workdir: Path, process: int = 0) -> str:
    return Path(f"{workdir}.{process}.txt").read_text()


def train(workdir: Path, **options) -> None:
    """Train with the options of `running_processes`; check that all processes succeed."""
    with running_processes(workdir, **options) as runs:
        assert wait_for_exit_codes(runs) == [0] * len(runs), read_output(workdir)


def copy_first_half(workdir: Path, copy: Path) -> Path:
    """Copy a finished run without its last checkpoint and final outputs, for a resumed run."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / str(LAST_STEP))
    shutil.rmtree(copy / "model")
    (copy / "eval.json").unlink()
    return copy


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def load_weights(workdir: Path) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, split_params(jaxvid.load_model(workdir / "model"))[1])


def check_same(workdir: Path, expected: Path) -> None:
    """Check that two runs have equal results, apart from rounding.

    Gradients are summed over the devices in different orders. The tolerance of 1e-5 is 80 times the
    float32 epsilon of 1.2e-7.
    """
    rows, expected_rows = (read_jsonl(folder / "metrics.jsonl") for folder in (workdir, expected))
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    for row, expected_row in zip(rows, expected_rows, strict=True):
        for name in ("train/loss", "val/loss", "train/grad_norm"):
            assert row.get(name, 0) == pytest.approx(expected_row.get(name, 0), rel=1e-5), row
    params, expected_params = load_weights(workdir), load_weights(expected)
    assert params.keys() == expected_params.keys()
    for name, array in params.items():
        difference = np.linalg.norm(array - expected_params[name])
        assert difference <= 1e-5 * max(1, np.linalg.norm(array)), name
    report, expected_report = (
        json.loads((folder / "eval.json").read_text()) for folder in (workdir, expected)
    )
    for name in ("num_videos", "num_evaluated", "num_failed", "num_padded", "failed", "top1"):
        assert report[name] == expected_report[name], name


@pytest.fixture(scope="module")
def data(motion_folder, tmp_path_factory):
    """Return a folder with lists of the motion clips and one broken video in each split."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "labels.txt").write_text((motion_folder / "labels.txt").read_text())
    for split, name in (("train", "broken.mp4"), ("val", "val_broken.mp4")):
        (folder / name).write_text(f"not a video of {split}")
        lines = (motion_folder / f"{split}.csv").read_text().splitlines()
        lines = [f"{motion_folder}/{line}" for line in lines]
        # The second process loads rows 4 to 7 of an evaluation batch.
        lines.insert(5, f"{name} 0")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def one_process_workdir(data, tmp_path_factory):
    """The workdir of a finished run with one process."""
    workdir = tmp_path_factory.mktemp("runs") / "one"
    train(workdir, processes=1, devices=4, mesh=(2, 2), data__folder=data)
    return workdir


def test_run_of_two_processes_equals_one_process_and_is_resumed_by_one(
    one_process_workdir, data, tmp_path
):
    two_workdir = tmp_path / "two"
    train(two_workdir, processes=2, devices=2, mesh=(2, 2), data__folder=data)
    check_same(two_workdir, one_process_workdir)

    # Two processes write the same files as one process, without duplicate entries.
    assert sorted(path.name for path in two_workdir.iterdir()) == sorted(
        path.name for path in one_process_workdir.iterdir()
    )
    [skipped] = read_jsonl(two_workdir / "skipped.jsonl")
    assert skipped["id"].endswith("broken.mp4")
    report = json.loads((two_workdir / "eval.json").read_text())
    assert (report["num_videos"], report["num_evaluated"]) == (25, 24)
    assert [video["label"] for video in report["failed"]] == [0]
    log = (two_workdir / "log.txt").read_text()
    assert log.count("counts as wrong: ") == 1  # although there are two evaluations
    assert log.count("skipped: ") == 1
    [start] = read_jsonl(two_workdir / "starts.jsonl")
    assert start["processes"] == 2
    assert checkpoint.find_steps(two_workdir) == [FIRST_CHECKPOINT, LAST_STEP]
    recorded = json.loads((two_workdir / "checkpoints.json").read_text())
    assert recorded.keys() == {str(FIRST_CHECKPOINT), str(LAST_STEP)}

    # One process resumes the run, with one device or with four.
    options = {"processes": 1, "data__folder": data}
    resumed = [
        copy_first_half(two_workdir, tmp_path / name) for name in ("one_device", "four_devices")
    ]
    with (
        running_processes(resumed[0], devices=1, mesh=(1, 1), **options) as first,
        running_processes(resumed[1], devices=4, mesh=(1, 4), **options) as second,
    ):
        assert wait_for_exit_codes(first + second) == [0, 0], read_output(resumed[0])
    for workdir in resumed:
        assert f"step {FIRST_CHECKPOINT} of {LAST_STEP}, continued" in read_output(workdir)
        check_same(workdir, one_process_workdir)


# Evaluates a stub network. With the argument "stop", process 0 exits before its third batch.
EVALUATING = """
import os, runpy, sys, jax
from jaxvid import evaluate
from jaxvid.evaluation import loop
from jaxvid.storage import model_folder
from tests import coloured_videos

loop.abstract_model = model_folder.abstract_model = coloured_videos.abstract_stub
make_step = evaluate.make_eval_step

def make_exiting_step(*args):
    step, calls = make_step(*args), []

    def exiting_step(params, batch):
        calls.append(1)
        if len(calls) == 3 and not jax.process_index():
            os._exit(9)
        return step(params, batch)

    return exiting_step

if sys.argv.pop(1) == "stop":
    evaluate.make_eval_step = make_exiting_step
runpy.run_path("main.py", run_name="__main__")
"""


def test_two_processes_evaluate_each_video_once_and_resume_after_one_exits(tmp_path):
    """The last of the batches of 8 has 4 of the 20 videos, none of them for the second process."""
    folder, workdir = tmp_path / "data", tmp_path / "w"
    folder.mkdir()
    coloured_videos.make_coloured_videos(folder)
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy)
    sizes = {"num_classes": 4, "image_size": 32, "width": 16, "depth": 1, "head": "mean"}
    coloured_videos.save_stub(tmp_path / "stub", name="xvit_tiny", **sizes)
    options = {"processes": 2, "devices": 2, "mesh": (2, 2), "init_from": tmp_path / "stub"}
    options |= {f"model__{name}": value for name, value in sizes.items()}
    options |= {"data__mean": 0.0, "data__std": 1.0, "eval__short_side": 32}
    # Each process has its own copy of the videos and its own number of threads.
    options["process_fields"] = (
        {"data.folder": folder},
        {"data.folder": copy, "data.num_threads": 1},
    )
    with running_processes(
        workdir, **options, program=("-c", EVALUATING, "stop", "--mode=eval")
    ) as runs:
        assert runs[0].wait(timeout=TIMEOUT_SECONDS) == 9, read_output(workdir)
    assert not (workdir / "eval.json").exists()
    with running_processes(
        workdir, **options, program=("-c", EVALUATING, "go", "--mode=eval")
    ) as runs:
        assert wait_for_exit_codes(runs) == [0, 0], read_output(workdir)
    assert "8 of 20 videos were evaluated before" in read_output(workdir)
    assert not (workdir / ".unfinished_eval").exists()
    coloured_videos.check_outputs(workdir)


def test_a_signal_to_one_process_stops_both_and_they_resume(one_process_workdir, data, tmp_path):
    """The two processes first resume a run of one process, with its weights sharded over both."""
    workdir = copy_first_half(one_process_workdir, tmp_path / "w")
    options = {"processes": 2, "devices": 2, "mesh": (1, 4), "data__folder": data}
    with running_processes(workdir, **options) as runs:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while f"step {FIRST_CHECKPOINT} of {LAST_STEP}, continued" not in read_output(workdir):
            assert time.monotonic() < deadline
            assert [run.poll() for run in runs] == [None, None], read_output(workdir)
            time.sleep(0.05)
        time.sleep(0.5)  # until the signal handlers are installed and the first step is compiled
        runs[1].send_signal(signal.SIGTERM)
        assert wait_for_exit_codes(runs) == [128 + signal.SIGTERM] * 2, read_output(workdir)
    step = max(checkpoint.find_steps(workdir))
    assert FIRST_CHECKPOINT < step < LAST_STEP
    assert f"stopped and saved at step {step}" in read_output(workdir)
    train(workdir, **options)
    assert f"step {step} of {LAST_STEP}, continued" in read_output(workdir)
    check_same(workdir, one_process_workdir)


def test_invalid_input_in_one_process_ends_all_with_one_line_each(data, tmp_path):
    options = {"processes": 2, "devices": 2, "mesh": (2, 2)}
    options["process_fields"] = ({}, {"data.folder": tmp_path / "nowhere"})
    with running_processes(tmp_path / "w", **options, data__folder=data) as runs:
        assert wait_for_exit_codes(runs) == [InputError.EXIT_CODE] * 2
    errors = [
        [line for line in read_output(tmp_path / "w", process).splitlines() if "Gloo" not in line]
        for process in (0, 1)
    ]
    [[first], [second]] = errors
    assert first.startswith(f"error: process 1 on {platform.node()}: ")
    assert second.startswith("error: ")
    assert "nowhere does not exist" in first
    assert first.endswith(second.removeprefix("error: "))


def stub_gather(monkeypatch, *values) -> None:
    """Let `collectives.gather` return this process's value, followed by `values`."""
    monkeypatch.setattr(collectives, "gather", lambda value: [value, *values])


def test_processes_with_different_configs_or_videos_are_refused(config, monkeypatch, tmp_path):
    other = config.copy_and_resolve_references().unlock()
    other.data.folder = "elsewhere"  # these two fields may differ
    other.data.num_threads = 7
    stub_gather(monkeypatch, other.to_dict())
    run_config.check_same_everywhere(config.to_dict())
    other.model.width = 32
    stub_gather(monkeypatch, config.to_dict(), other.to_dict())
    with pytest.raises(InputError, match="model.width: 16 in process 0, 32 in process 2; start"):
        run_config.check_same_everywhere(config.to_dict())
    metadata = {"data": {"train": {"videos": 3, "sha256": "a"}}}
    stub_gather(monkeypatch, {"train": {"videos": 3, "sha256": "b"}})
    with pytest.raises(InputError, match="process 1: its videos or labels differ"):
        run_metadata.record_start(tmp_path, metadata)
    assert not list(tmp_path.iterdir())


def test_processes_with_different_config_fields_are_refused(config, monkeypatch):
    other = config.copy_and_resolve_references().unlock()
    other.data.extra = 7
    del other["mixup_alpha"]
    stub_gather(monkeypatch, other.to_dict())
    with pytest.raises(InputError) as error_info:
        run_config.check_same_everywhere(config.to_dict())
    assert str(error_info.value) == (
        "data.extra: missing in process 0, 7 in process 1; "
        f"mixup_alpha: {config.mixup_alpha} in process 0, missing in process 1; "
        "start all with the same flags"
    )


def test_a_checkpoint_damaged_in_one_process_is_refused_in_all(monkeypatch, tmp_path):
    stub_gather(monkeypatch, [False, "1 of 3 files are missing or changed: d/0"])
    with pytest.raises(ValueError, match="1 of 3 files are missing"):
        checkpoint.check_files_on_all_processes(tmp_path, 3)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SLURM_STEP = SLURM | {"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_STEP_NUM_TASKS": "4"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    # expected: number of processes, JAX's detection method and visible devices, or None if the
    # process runs alone
    ("environment", "expected"),
    [
        ({}, None),
        # A batch script or a shell in an allocation.
        (SLURM, None),
        (SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, None),
        (SLURM_STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, (4, "slurm", "all")),
        (SLURM_STEP | {"SLURM_STEP_TASKS_PER_NODE": "4"}, (4, "slurm", "unset")),
        (SLURM_STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, (4, "slurm", "unset")),
        (MPI, (4, "mpi4py", "unset")),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, (4, "mpi4py", "all")),
        (MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"}, (4, "ompi", "unset")),
        ({**SLURM_STEP, **MPI, "SLURM_STEP_NUM_TASKS": "2"}, (4, "mpi4py", "unset")),
        ({"PMI_SIZE": "3", "MPI_LOCALNRANKS": "3"}, (3, "mpi4py", "unset")),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "h"}, None),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "1"}, (None, "k8s", "all")),
        (
            SLURM_STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "JAX_LOCAL_DEVICE_IDS": "2,3"},
            (4, "slurm", "2,3"),
        ),
    ],
)
def test_launchers_are_recognized(environment, expected, monkeypatch):
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_", "PMI", "MPI_", "KUBERNETES_", "JOB_", "JAX_LOCAL")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls, options = [], {}

    def initialize(coordinator, num_processes, process_id, *, cluster_detection_method, **_):
        assert (coordinator, process_id) == (None, None)
        calls.append((num_processes, cluster_detection_method))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", options.__setitem__)
    setup.init_processes(None, 1, None)
    assert not calls
    setup.init_processes()
    calls = [(*call, options.get("jax_cuda_visible_devices", "unset")) for call in calls]
    assert calls == ([expected] if expected else [])


def test_explicit_arguments_disable_launcher_detection(monkeypatch):
    """JAX's detection of SLURM would restrict each process to one device."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: calls.append(options))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    for name, value in SLURM_STEP.items():
        monkeypatch.setenv(name, value)
    setup.init_processes("host:1", 2, 1)
    assert [options["cluster_detection_method"] for options in calls] == ["deactivate"]


def test_missing_packages_of_a_launcher_are_named(monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setenv("PMI_SIZE", "2")

    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    message = r"PMI_SIZE is set, which needs the package mpi4py\); set --coordinator.*alone"
    with pytest.raises(InputError, match=message):
        setup.init_processes()


def test_a_long_wait_for_the_other_processes_is_logged(monkeypatch, capfd):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(setup, "LOG_SECONDS", 0.01)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: time.sleep(0.5))
    setup.init_processes("host:1", 2, 1)
    assert "waiting for the other processes (--num_processes is set)" in capfd.readouterr().err
