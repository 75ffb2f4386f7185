"""`prepare`, `check` and `features` on runners of Apache Beam, which `make test-beam` installs."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from jaxvid.data.beam import BeamRunner, _last_line, make_runner
from jaxvid.data.check import check
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.input_videos import open_input
from jaxvid.data.prepare import prepare
from jaxvid.errors import InputError
from jaxvid.features import FeatureOptions, features
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


def wait_for_a_part(process, output, pattern=".parts/[tv]*-?????.json"):
    """Wait until one part is finished; return the names of the finished parts."""
    deadline = time.monotonic() + STARTED
    while time.monotonic() < deadline and process.poll() is None:
        finished = {path.name for path in output.glob(pattern)}
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


def test_an_error_of_a_java_runner_is_its_last_line_before_the_stack():
    text = (
        "Job aborted\nTraceback (most recent call last):\nInputError: no\n\n\tat org.A(B.scala:1)"
    )
    assert _last_line(Exception(f"{text}\n\t... 1 more")) == "InputError: no"


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


def test_features_equal_those_of_one_process(beam, folder, folders, tmp_path):
    videos = open_input(folder, "val")
    options = FeatureOptions(batch_size=8)
    features(videos, folders / "xvit", tmp_path / "one.npz", options)
    runner = make_runner("DirectRunner", PROCESSES)
    table = features(videos, folders / "xvit", tmp_path / "beam.npz", options, runner)
    assert (tmp_path / "beam.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert [row["id"] for row in table.about["failed"]] == ["val/00002.mp4"]


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


def start(stack, *arguments, **variables):
    """Start a server in a process group of its own, which is killed when the stack is closed."""
    process = subprocess.Popen(
        arguments,
        # The pool starts its workers with the command `python`.
        env=os.environ
        | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
        | variables,
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
        *(sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main"),
        *("--port", str(job_port)),
    )
    pool = start(
        stack,
        *(sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main"),
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


# ------------------------------------------------------------------ Spark


@pytest.fixture
def spark(beam, tmp_path):
    """A Spark cluster of a master and two workers with one core each.

    Yields:
        The options of the runner, and the processes of the workers.
    """
    pyspark = pytest.importorskip("pyspark", reason="pyspark (make test-beam)")
    home, port = os.path.dirname(pyspark.__file__), str(free_port())
    url = f"spark://localhost:{port}"
    # Workers have another working directory, in which `import jaxvid` must find this checkout.
    variables = {"SPARK_HOME": home, "PYTHONPATH": os.getcwd(), "SPARK_LOCAL_IP": "127.0.0.1"}
    with contextlib.ExitStack() as stack:

        def start_class(name, *arguments):
            command = (f"{home}/bin/spark-class", f"org.apache.spark.deploy.{name}")
            options = ("--host", "localhost", "--webui-port", "0")
            return start(stack, *command, *options, *arguments, **variables)

        start_class("master.Master", "--port", port)
        wait_for_port(port)
        workers = [
            start_class(
                "worker.Worker", "--cores", "1", "--memory", "1g", "--work-dir", str(folder), url
            )
            for folder in (tmp_path / "worker0", tmp_path / "worker1")
        ]
        yield ("--runner=PySparkRunner", f"--beam_args=--spark_master_url={url}"), workers


def lose_a_worker(command, workers, output, pattern):
    """Run a command, and kill one of the workers when the first part is finished."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for_a_part(process, output, pattern)
        os.killpg(workers[0].pid, signal.SIGKILL)
        assert process.poll() is None
        return process.communicate()[1], process.returncode


def has_run_tasks(folder):
    """Return whether an executor of the Spark worker with this folder has run tasks of Python."""
    [log] = folder.glob("app-*/*/stderr")
    return "PythonRunner: Times" in log.read_text()


@pytest.mark.full
def test_a_lost_spark_worker_does_not_change_the_pack(spark, folder, local, tmp_path):
    options, workers = spark
    arguments = command(folder, tmp_path / "pack", *options)
    pattern = ".parts/[tv]*-?????.json"
    err, code = lose_a_worker(arguments, workers, tmp_path / "pack", pattern)
    assert code == 3, err  # two videos are broken
    assert read_pack(tmp_path / "pack") == local[0]
    assert has_run_tasks(tmp_path / "worker0")
    assert has_run_tasks(tmp_path / "worker1")


@pytest.mark.full
def test_a_lost_spark_worker_does_not_change_the_features(spark, folder, folders, tmp_path):
    options, workers = spark
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(20):  # eight parts
        for path in (folder / "val").glob("*.mp4"):
            (videos / f"{i}-{path.name}").symlink_to(path)
    (videos / "broken.mp4").write_bytes(b"no video")
    arguments = [sys.executable, "-m", "jaxvid.features", videos, f"--model={folders / 'xvit'}"]
    arguments += ["--batch_size=8"]
    output = tmp_path / "spark.npz"
    spark_command = [*arguments, f"--output={output}", *options]
    err, code = lose_a_worker(spark_command, workers, tmp_path, ".spark.npz.parts/*/*.npz")
    assert code == 3, err
    subprocess.run([*arguments, f"--output={tmp_path / 'one.npz'}"])
    assert output.read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert has_run_tasks(tmp_path / "worker0")
    assert has_run_tasks(tmp_path / "worker1")


@pytest.mark.full
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("local[1]", "--runner='unknown': must be one of"),
        ("nothing", "Spark cannot be started with --spark_master_url=nothing; Java's messages"),
    ],
)
def test_an_error_of_spark_is_one_line(beam, url, message):
    pytest.importorskip("pyspark", reason="pyspark (make test-beam)")
    script = (
        "import functools\n"
        "from jaxvid.data.beam import make_runner, run_on_workers\n"
        f"runner = make_runner('PySparkRunner', '--spark_master_url={url}')\n"
        "run_on_workers(functools.partial(make_runner, options=''), ['unknown'], runner)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    error = result.stderr.splitlines()[-1]
    assert "PySparkRunner failed (" in error
    assert message in error
