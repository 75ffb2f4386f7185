"""The command `jaxvid serve`: options, address, signals and the end of the server."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxvid import parsers, serve
from jaxvid.errors import InputError
from tests.serving.running_server import WAIT_SECONDS, make_fake_model
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]
# Runs the command with a model that needs no compilation. A batch waits until a file `go` exists.
PROGRAM = """
import os, sys, time
from jaxvid import entry_point

def main():
    from jaxvid import serve
    from jaxvid.serving import model_loading
    from tests.serving.running_server import FakeEngine, make_fake_model

    run = FakeEngine.run

    def run_later(*args):
        while not os.path.exists("go"):
            time.sleep(0.02)
        return run(*args)

    FakeEngine.run = run_later
    FakeEngine.warm_up = lambda engine, *key: engine.warm.add(key)
    model_loading.load_models = lambda *_: [make_fake_model()]
    return serve.main(sys.argv[1:])

if __name__ == "__main__":
    sys.modules["program"] = sys.modules["__main__"]
    entry_point.run("program")
"""


def options(*arguments: str):
    return serve.check_options(parsers.serve().parse_args(["--model", "m", *arguments]))


def test_settings(monkeypatch):
    monkeypatch.setenv("JAXVID_TOKEN", "from-environment")
    settings = options(
        "--max_upload=1.5", "--deadline=5", "--public_host=A.example", "--allow_urls"
    )
    assert settings.token == "from-environment"
    assert settings.public_hosts == ("a.example",)
    assert settings.limits.upload_bytes == 1_500_000
    assert settings.limits.deadline_seconds == 5
    assert settings.allow_urls
    assert settings.batch_sizes == (1, 2, 4, 8)
    assert options("--token=given", "--host=0.0.0.0").token == "given"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_batch=3"], "--max_batch=3: must be a power of 2 up to 256"),
        (["--max_batch=0"], "--max_batch=0: must be a power of 2 up to 256"),
        (["--decoders=0"], "--decoders=0: must be at least 1"),
        (["--port=70000"], "--port=70000: must be 0 to 65535"),
        (["--max_wait=-1"], "--max_wait=-1: must be 0 to 10 seconds"),
        (["--max_wait=nan"], "--max_wait=nan: must be 0 to 10 seconds"),
        (["--max_upload=0"], "--max_upload=0: must be above 0 and at most 1e6 MB"),
        (["--deadline=0"], "--deadline=0: must be above 0 and at most 86400 seconds"),
        (["--host=0.0.0.0"], "--host 0.0.0.0: other machines can reach this address; set a token"),
        (["--host=::"], "--host ::: other machines can reach this address; set a token"),
        (["--host=example.org"], "--host example.org: other machines can reach this address"),
        (["--token=a b"], "--token: must consist of printable ASCII characters without spaces"),
        (["--token=ä"], "--token: must consist of printable ASCII characters without spaces"),
        (["--public_host=https://a.b/"], "--public_host https://a.b/: expected a name"),
    ],
)
def test_bad_options_are_refused(arguments, message, monkeypatch):
    monkeypatch.delenv("JAXVID_TOKEN", raising=False)
    with pytest.raises(InputError) as caught:
        options(*arguments)
    assert str(caught.value).startswith(message)


def test_addresses():
    for host, expected in (("127.0.0.1", "127.0.0.1"), ("localhost", "localhost")):
        with serve.bind(host, 0) as listener:
            url = serve.describe_address(host, listener)
            assert re.fullmatch(rf"http://{re.escape(expected)}:\d+/", url)
    with serve.bind("127.0.0.1", 0) as listener:
        assert serve.describe_address("0.0.0.0", listener).startswith("http://localhost:")
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=rf"--port {port}: is in use; .* --port 0 for any"):
            serve.bind("127.0.0.1", port)
    with pytest.raises(InputError, match="--host no.such.invalid: not an address of this machine"):
        serve.bind("no.such.invalid", 0)
    with pytest.raises(InputError, match="--host 192.0.2.1: Cannot assign requested address"):
        serve.bind("192.0.2.1", 0)


def test_a_port_in_use_is_one_line(folders, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve.main(["--model", str(folders / "xvit"), "--port", str(port)]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"error: --port {port}: is in use")
    assert stderr.count("\n") == 1


def test_a_missing_package_is_one_line(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert serve.main(["--model", str(folders / "xvit"), "--port", "0"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: jaxvid serve needs jaxvid[serve] (")
    assert stderr.endswith("): pip install 'jaxvid[serve]'\n")


def test_damaged_weights_end_the_server_with_one_line(folders, capsys, monkeypatch):
    def fail(program, size):
        raise InputError("the weights are damaged")

    model = make_fake_model()
    model.engine.warm_up = fail
    monkeypatch.setattr("jaxvid.serving.model_loading.load_models", lambda *_: [model])
    assert serve.main(["--model", str(folders / "xvit"), "--port", "0"]) == 2
    stdout, stderr = capsys.readouterr()
    assert re.fullmatch(r"serving fake at http://127\.0\.0\.1:\d+/\n", stdout)
    assert stderr == "error: the weights are damaged\n"


# ------------------------------------------------------------------ signals


@pytest.fixture
def start(tmp_path, folders):
    """Return a function that starts the command with a slow model; it returns process and port."""
    processes = []

    def start():
        (tmp_path / "program.py").write_text(PROGRAM)
        process = subprocess.Popen(
            [sys.executable, "program.py", "--model", str(folders / "xvit"), "--port", "0"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        line = process.stdout.readline()
        match = re.fullmatch(r"serving fake at http://127\.0\.0\.1:(\d+)/\n", line)
        assert match, (line, process.stderr.read() if process.poll() is not None else "")
        return process, int(match[1])

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def send_video(port: int, clips) -> http.client.HTTPConnection:
    """Send a video, and return when it has been received."""
    wait_until(lambda: b"ready" in get(port, "/readyz"), WAIT_SECONDS)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_SECONDS)
    connection.request("POST", "/v1/predict", Path(clips[0]).read_bytes())
    wait_until(lambda: b"requests_in_progress 1.0" in get(port, "/metrics"), WAIT_SECONDS)
    return connection


def get(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read()


def test_requests_in_progress_are_answered_after_a_signal(start, clips, tmp_path):
    process, port = start()
    connection = send_video(port, clips)
    process.send_signal(signal.SIGTERM)
    line = process.stderr.readline()
    assert line == "stopping; requests in progress: 1; a second signal ends them\n"
    with pytest.raises(ConnectionError):  # new connections are soon refused  # noqa: PT012
        for _ in range(1000):
            get(port, "/healthz")
            time.sleep(0.02)
    (tmp_path / "go").touch()
    with contextlib.closing(connection):
        response = connection.getresponse()
        assert response.status == 200
        assert json.loads(response.read())["model"] == "fake"
    stdout, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, stdout, stderr) == (0, "", "")


@pytest.mark.full
def test_a_second_signal_ends_the_server_at_once(start, clips):
    process, port = start()
    connection = send_video(port, clips)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("stopping; requests in progress: 1")
    process.send_signal(signal.SIGINT)
    with (
        contextlib.closing(connection),
        pytest.raises((ConnectionError, http.client.HTTPException)),
    ):
        connection.getresponse()
    process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130


@pytest.mark.full
@pytest.mark.parametrize(
    ("shell", "code", "line"),
    [
        ('exec "$@" > >(exec <&-)', 141, ""),
        ('exec "$@" > /dev/full', 2, "error: stdout: cannot be written (No space left on device);"),
    ],
)
def test_lost_streams_end_the_server_with_at_most_one_error(shell, code, line, tmp_path, folders):
    (tmp_path / "program.py").write_text(PROGRAM)
    arguments = [sys.executable, "program.py", "--model", str(folders / "xvit"), "--port", "0"]
    done = subprocess.run(
        ["bash", "-c", shell, "bash", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=WAIT_SECONDS,
    )
    assert done.returncode == code
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == bool(line)


@pytest.mark.full
def test_the_server_runs_without_standard_streams(tmp_path, folders, clips):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "go").touch()
    with serve.bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    arguments = ["program.py", "--model", str(folders / "xvit"), "--port", str(port)]
    process = subprocess.Popen(
        ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    deadline, status = time.monotonic() + WAIT_SECONDS, b""
    while b"ready" not in status:
        assert time.monotonic() < deadline
        assert process.poll() is None
        with contextlib.suppress(ConnectionError):
            status = get(port, "/readyz")
        time.sleep(0.1)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_SECONDS)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/predict", Path(clips[0]).read_bytes())
        assert connection.getresponse().status == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_SECONDS) == 0
