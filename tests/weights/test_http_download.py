"""Downloads continue after an interruption, and their faults are reported in one line."""

import json
import os
import socket
import subprocess
import sys

import pytest

from jaxvid.errors import InputError
from jaxvid.weights import http_download
from jaxvid.weights.http_download import download
from tests.weights.server import serve

DATA = os.urandom(700_000)


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """Do not wait between connections, and ignore the proxies of the environment."""
    monkeypatch.setattr(http_download, "BACKOFF", 0.0)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def fetch(server, path, file="/a.pth"):
    download(f"{server.url}{file}", path, remedy="fetch it by hand")
    assert path.read_bytes() == server.files[file]
    assert os.listdir(path.parent) == [path.name]


def refusal_of(url, path) -> str:
    with pytest.raises(InputError) as error:
        download(url, path, remedy="fetch it by hand")
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert message.endswith("; fetch it by hand")
    assert not path.exists()
    return message


def test_a_file_is_downloaded(tmp_path):
    with serve(files={"/a.pth": DATA}) as server:
        fetch(server, tmp_path / "a.pth")
        assert server.requests == [("/a.pth", "")]


def test_a_lost_connection_is_continued(tmp_path):
    with serve(files={"/a.pth": DATA}, cut_after=300_000) as server:
        fetch(server, tmp_path / "a.pth")
        assert [part for _, part in server.requests] == ["", "bytes=300000-", "bytes=600000-"]


def test_without_a_validator_the_download_starts_again(tmp_path):
    with serve(files={"/a.pth": DATA}, validators=False, cut_after=300_000) as server:
        assert "300000 of 700000 bytes received" in refusal_of(
            f"{server.url}/a.pth", tmp_path / "a.pth"
        )
        assert [part for _, part in server.requests] == [""] * http_download.ATTEMPTS
        server.cut_after = None
        fetch(server, tmp_path / "a.pth")


def test_a_server_that_ignores_ranges_sends_the_whole_file(tmp_path):
    path = tmp_path / "a.pth"
    with serve(files={"/a.pth": DATA}, ranges=False, cut_after=300_000) as server:
        assert "0.3 MB are kept for the next attempt" in refusal_of(f"{server.url}/a.pth", path)
        server.cut_after = None
        fetch(server, path)


def test_parts_of_two_versions_are_not_combined(tmp_path):
    path, url = tmp_path / "a.pth", "/a.pth"
    with serve(files={url: DATA}, ranges=False, cut_after=300_000) as server:
        refusal_of(f"{server.url}{url}", path)
        server.files[url], server.ranges, server.cut_after = os.urandom(500_000), True, None
        fetch(server, path)


def test_a_complete_part_is_not_downloaded_again(tmp_path):
    path = tmp_path / "a.pth"
    with serve(files={"/a.pth": DATA}) as server:
        info = {"url": f"{server.url}/a.pth", "validator": server.etag("/a.pth")}
        (tmp_path / "a.pth.part").write_bytes(DATA)
        (tmp_path / "a.pth.part.json").write_text(json.dumps(info))
        fetch(server, path)
        assert server.requests == [("/a.pth", "bytes=700000-")]


@pytest.mark.parametrize("size", [0, 5, 700_001])
def test_a_damaged_part_is_replaced(tmp_path, size):
    (tmp_path / "a.pth.part").write_bytes(b"x" * size)
    (tmp_path / "a.pth.part.json").write_text("[")
    with serve(files={"/a.pth": DATA}) as server:
        fetch(server, tmp_path / "a.pth")


@pytest.mark.parametrize("status", [403, 404, 410, 500, 503])
def test_error_statuses_are_reported(tmp_path, status):
    with serve(status=status) as server:
        message = refusal_of(f"{server.url}/a.pth", tmp_path / "a.pth")
        assert f"/a.pth cannot be downloaded (the server answered {status} " in message
        assert len(server.requests) == 1
    assert os.listdir(tmp_path) == []


def test_a_slow_server_is_waited_for(tmp_path):
    with serve(files={"/a.pth": DATA}, pause=0.01) as server:
        fetch(server, tmp_path / "a.pth")
        assert len(server.requests) == 1


def test_a_server_that_sends_nothing_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(http_download, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.pth"
        assert "(timed out)" in refusal_of(url, tmp_path / "a.pth")


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:9/a.pth", "http://name.invalid/a.pth", "http://[/a.pth", "http:///a", "x"],
)
def test_unreachable_addresses_are_reported(tmp_path, url):
    assert f"{url} cannot be downloaded (" in refusal_of(url, tmp_path / "a.pth")


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "jaxvid.files.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})
    )
    with (
        serve(files={"/a.pth": DATA}) as server,
        pytest.raises(InputError, match="1 MB needed.*make room"),
    ):
        download(f"{server.url}/a.pth", tmp_path / "a.pth", remedy="")


def test_proxies_of_the_environment_are_used(tmp_path, monkeypatch):
    with serve(files={"http://name.invalid/a.pth": DATA}) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        download("http://name.invalid/a.pth", tmp_path / "a.pth", remedy="")
    assert (tmp_path / "a.pth").read_bytes() == DATA


def test_a_killed_download_is_continued(tmp_path):
    script = (
        "import sys, pathlib; from jaxvid.weights.http_download import download; "
        "download(sys.argv[1], pathlib.Path(sys.argv[2]), remedy='')"
    )
    path = tmp_path / "a.pth"
    with serve(files={"/a.pth": DATA}, pause=0.05) as server:
        arguments = [sys.executable, "-c", script, f"{server.url}/a.pth", str(path)]
        process = subprocess.Popen(arguments)
        part = tmp_path / "a.pth.part"
        while not (part.exists() and part.stat().st_size):
            assert process.poll() is None
            os.sched_yield()
        process.kill()
        process.wait()
        assert not path.exists()
        server.pause = 0.0
        fetch(server, path)
        assert server.requests[-1][1].startswith("bytes=")
