"""`prepare` and `check` on runners of Apache Beam, which `make test-beam` installs."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from jaxvid.data.beam import BeamRunner, make_runner
from jaxvid.data.check import check
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.prepare import prepare
from jaxvid.errors import InputError
from tests.data.packs import read_pack

SETTINGS = Settings(clips_per_file=5, short_side=32)
PROCESSES = "--direct_num_workers=2 --direct_running_mode=multi_processing"
STARTED = 120  # seconds until a part is expected to be finished


@pytest.fixture(scope="module")
def beam():
    return pytest.importorskip("apache_beam", reason="apache-beam (make test-beam)")


@pytest.fixture(scope="module")
def folder(motion_folder, tmp_path_factory):
    """The motion clips, of which one is empty and one is missing."""
    copy = tmp_path_factory.mktemp("beam") / "motion"
    for path in motion_folder.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(motion_folder)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(motion_folder)).write_bytes(path.read_bytes())
    (copy / "train" / "00003.mp4").write_bytes(b"")
    (copy / "val" / "00002.mp4").unlink()
    return copy


@pytest.fixture(scope="module")
def local(folder, tmp_path_factory):
    """The pack that threads of one process write, and its report."""
    output = tmp_path_factory.mktemp("local") / "pack"
    report = prepare([folder], output, SETTINGS, workers=1)
    return read_pack(output), report


def without_times(report):
    return {name: value for name, value in report.items() if name != "seconds"}


def command(folder, output, *options):
    """Return a command of `prepare` with `SETTINGS`."""
    settings = ("--clips_per_file=5", "--short_side=32", "--workers=1")
    paths = ("--input", folder, "--output", output)
    return [sys.executable, "-m", "jaxvid.data.prepare", *paths, *settings, *options]


def wait_for_a_part(process, output):
    """Wait until one part is finished; return the names of the finished parts."""
    deadline = time.monotonic() + STARTED
    while time.monotonic() < deadline and process.poll() is None:
        finished = {path.name for path in output.glob(".parts/[tv]*-?????.json")}
        if finished:
            return finished
        time.sleep(0.01)
    raise AssertionError(f"no part was finished; exit code {process.poll()}")


def test_workers_need_only_the_data_part():
    script = (
        "import sys; sys.modules |= dict.fromkeys(('jax', 'flax', 'orbax', 'optax', 'grain'))\n"
        "from jaxvid.data import check, pack_parts, part_results"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_options_are_checked():
    assert make_runner(None, "") is None
    assert make_runner("DirectRunner", "--a 'b c'") == BeamRunner("DirectRunner", ("--a", "b c"))
    with pytest.raises(InputError, match="--runner='Direct': must be one of 'DirectRunner'"):
        make_runner("Direct", "")
    with pytest.raises(InputError, match="--beam_args 'x: No closing quotation"):
        make_runner("DirectRunner", "'x")
    with pytest.raises(InputError, match="--beam_args needs --runner NAME"):
        make_runner(None, "--x")


def test_invalid_options_of_beam_are_refused(beam, capfd):
    with pytest.raises(InputError, match="--direct_num_workers: invalid int value: 'x'; correct"):
        make_runner("DirectRunner", "--direct_num_workers=x").make_pipeline()
    with pytest.raises(InputError, match="Beam has no option direct_num; correct it"):
        make_runner("DirectRunner", "--direct_num=2").make_pipeline()
    assert "usage" not in capfd.readouterr().err


def test_a_pack_equals_that_of_one_process(beam, folder, local, tmp_path):
    runner = make_runner("DirectRunner", PROCESSES)
    report = prepare([folder], tmp_path / "pack", SETTINGS, workers=runner)
    assert read_pack(tmp_path / "pack") == local[0]
    assert without_times(report) == without_times(local[1])
    assert [row["id"] for row in report["broken"]] == ["train/00003.mp4", "val/00002.mp4"]
    assert not [*(tmp_path / "pack").rglob("*.partial")]


def test_a_check_equals_that_of_one_process(beam, folder, tmp_path):
    runner = make_runner("DirectRunner", "")
    report = check([folder], runner, state=tmp_path / "state")
    assert without_times(report) == without_times(check([folder], 1))


def test_the_tfds_builder_uses_the_runner(beam, folder, local, tmp_path):
    import tensorflow_datasets as tfds
    from apache_beam.options.pipeline_options import PipelineOptions

    from jaxvid.data.tfds_builder import PackBuilder

    class MotionVideos(PackBuilder, skip_registration=True):
        VERSION = "1.0.0"
        INPUTS = (str(folder),)
        SETTINGS = SETTINGS

    config = tfds.download.DownloadConfig(
        beam_runner="DirectRunner", beam_options=PipelineOptions(PROCESSES.split())
    )
    MotionVideos(data_dir=tmp_path).download_and_prepare(download_config=config)
    built = read_pack(tmp_path / "motion_videos" / "1.0.0")
    assert {name: data for name, data in built.items() if name != "dataset_info.json"} == {
        name: data for name, data in local[0].items() if name != "dataset_info.json"
    }


def test_a_killed_pipeline_continues(beam, folder, local, tmp_path):
    output = tmp_path / "pack"
    arguments = command(folder, output, "--runner=DirectRunner", f"--beam_args={PROCESSES}")
    process = subprocess.Popen(arguments, start_new_session=True, stderr=subprocess.DEVNULL)
    finished = wait_for_a_part(process, output)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {name: (output / ".parts" / name).stat().st_mtime_ns for name in finished}
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 3, result.stderr  # two videos are broken
    assert "parts are complete" in result.stderr
    assert {name: (output / ".parts" / name).stat().st_mtime_ns for name in finished} == before
    assert read_pack(output) == local[0]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def start(stack, module, *arguments):
    """Start a server in a process group of its own, which is killed when the stack is closed."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        # The pool starts its workers with the command `python`.
        env=os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def stop():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    stack.callback(stop)
    return process


def wait_for_port(port):
    deadline = time.monotonic() + STARTED
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")


def start_cluster(stack):
    """Start a job server and a pool of workers, as the runners of Flink and Spark use them.

    Returns:
        The options of the runner, and the process of the pool.
    """
    job_port, pool_port = free_port(), free_port()
    start(
        stack,
        "apache_beam.runners.portability.local_job_service_main",
        *("--port", str(job_port)),
    )
    pool = start(
        stack,
        "apache_beam.runners.worker.worker_pool_main",
        *("--service_port", str(pool_port)),
    )
    wait_for_port(job_port)
    wait_for_port(pool_port)
    options = (
        f"--job_endpoint=localhost:{job_port} --environment_type=EXTERNAL "
        f"--environment_config=localhost:{pool_port}"
    )
    return options, pool


@pytest.mark.full
def test_a_lost_worker_does_not_change_the_pack(beam, folder, local, tmp_path):
    output = tmp_path / "pack"
    with contextlib.ExitStack() as stack:
        options, workers = start_cluster(stack)
        arguments = command(folder, output, "--runner=PortableRunner", f"--beam_args={options}")
        process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)  # the job server does not notice the loss
        finished = wait_for_a_part(process, output)
        os.killpg(workers.pid, signal.SIGKILL)
        before = {name: (output / ".parts" / name).stat().st_mtime_ns for name in finished}
    with contextlib.ExitStack() as stack:
        options, _ = start_cluster(stack)
        arguments = command(folder, output, "--runner=PortableRunner", f"--beam_args={options}")
        result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 3, result.stderr
    assert {name: (output / ".parts" / name).stat().st_mtime_ns for name in finished} == before
    assert read_pack(output) == local[0]
    assert json.loads((output / "report.json").read_text())["complete"]
