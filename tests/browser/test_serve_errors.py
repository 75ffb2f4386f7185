"""The page of `jaxvid serve` with broken videos, limits, a token, URLs, and without its server."""

import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import av
import pytest

from jaxvid.serving.limits import Limits, Settings
from tests.browser.checks import check_accessible, check_fits, expect, tab_to
from tests.browser.conftest import PHONE, read_frames
from tests.browser.serve_page import HTTP_ERRORS, choose, expect_result, expect_start
from tests.serving.running_server import make_fake_model, running

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
TOKEN = "a-secret"


@pytest.fixture(scope="module")
def restricted():
    """Yield a server with a token, allowed URLs and a small upload limit."""
    limits = Limits(upload_bytes=20_000)
    with running([make_fake_model()], Settings(token=TOKEN, allow_urls=True, limits=limits)) as it:
        yield it


# ------------------------------------------------------------------ broken videos


@pytest.mark.parametrize("kind", ["text", "empty", "truncated"])
def test_broken_video_is_explained(open_page, server, clips, long_video, tmp_path, kind):
    page = open_page(f"{server.url}/", errors=HTTP_ERRORS)
    video = Path(long_video).read_bytes()
    contents = {"text": b"no video", "empty": b"", "truncated": video[: len(video) // 2]}[kind]
    (tmp_path / "broken.mp4").write_bytes(contents)
    choose(page, tmp_path / "broken.mp4")
    alert = page.get_by_role("alert")
    expect(alert).not_to_be_empty()
    assert not re.search(r"Traceback|/tmp/|/proc/", alert.inner_text())
    expect(page.locator("#status")).to_be_empty()
    expect(page.get_by_role("button", name="Download report")).to_be_disabled()
    check_accessible(page)
    choose(page, clips[0])
    expect_result(page)
    expect(alert).to_be_empty()
    expect(page.get_by_role("button", name="Download report")).to_be_enabled()


def test_video_that_the_browser_cannot_play_is_classified(open_page, server, clips, tmp_path):
    with av.open(str(tmp_path / "old.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=15)
        stream.height, stream.width, stream.pix_fmt = 72, 72, "yuv420p"
        for picture in read_frames(clips[0]):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    page = open_page(f"{server.url}/")
    choose(page, tmp_path / "old.avi")
    expect_result(page)
    expect(page.get_by_text("This browser cannot play the file.")).to_be_visible()
    page.locator("#pictures figure button").first.press("Enter")  # without a player
    expect(page.get_by_role("alert")).to_be_empty()


def test_file_above_the_limit_is_not_sent(open_page, restricted, long_video):
    page = open_page(f"{restricted.url}/#token={TOKEN}")
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    choose(page, long_video)
    expect(page.get_by_role("alert")).to_have_text(
        re.compile(r"^eight scenes\.mp4 has \d+ kB; the server accepts at most 20 kB\.$")
    )
    assert not any("explain" in url for url in requests)


# ------------------------------------------------------------------ token and URLs


def test_token_is_asked_for(open_page, restricted, clips):
    page = open_page(f"{restricted.url}/", errors=HTTP_ERRORS, **PHONE)
    field = page.get_by_label("Token")
    expect(field).to_be_focused()
    expect(page.get_by_role("heading", name="Choose a video")).to_be_hidden()
    check_fits(page)
    check_accessible(page)
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The server refused the token.")
    expect(field).to_be_focused()
    field.fill(TOKEN)
    page.keyboard.press("Enter")
    expect_start(page)
    expect(page.get_by_role("alert")).to_be_empty()
    choose(page, clips[0])
    expect_result(page)
    page.reload()
    expect_start(page)


def test_video_that_is_chosen_before_the_token_is_classified_afterwards(
    open_page, restricted, clips
):
    page = open_page(f"{restricted.url}/", errors=HTTP_ERRORS)
    field = page.get_by_label("Token")
    expect(field).to_be_focused()
    choose(page, clips[0])
    field.fill(TOKEN)
    page.keyboard.press("Enter")
    expect_result(page)


def test_token_in_the_address_is_hidden(open_page, restricted, clips):
    page = open_page(f"{restricted.url}/#token={TOKEN}")
    expect_start(page)
    assert page.url == f"{restricted.url}/"
    page.get_by_role("button", name="growing").click()
    expect_result(page)
    for code in ("#curl", "#python"):
        expect(page.locator(code)).to_contain_text("JAXVID_TOKEN")
        expect(page.locator(code)).not_to_contain_text(TOKEN)


def test_urls_are_offered_only_if_they_are_allowed(open_page, server, restricted):
    page = open_page(f"{server.url}/")
    expect_start(page)
    expect(page.get_by_label("URL of a video")).to_be_hidden()
    page = open_page(f"{restricted.url}/#token={TOKEN}")
    expect_start(page)
    check_accessible(page)
    field = page.get_by_label("URL of a video")
    tab_to(page, field)
    page.keyboard.type("ftp://example.org/video.mp4")
    page.keyboard.press("Enter")
    assert field.evaluate("(input) => !input.checkValidity()")
    expect(page.locator("#status")).to_be_empty()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "169.254.169.254", "[::1]"])
def test_url_of_a_private_address_is_refused(open_page, restricted, host):
    page = open_page(f"{restricted.url}/#token={TOKEN}", errors=HTTP_ERRORS)
    page.get_by_label("URL of a video").fill(f"http://{host}:{restricted.port}/video.mp4")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text(host.strip("[]"))
    expect(page.locator("#player")).to_be_hidden()


# ------------------------------------------------------------------ a server that goes away


def test_busy_server_is_tried_again(open_page, server, clips):
    page = open_page(f"{server.url}/", errors=HTTP_ERRORS)
    error = {"error": {"status": 429, "message": "the server is busy; try again in 1 s"}}
    page.route("**/v1/explain*", lambda route: route.fulfill(status=429, json=error), times=2)
    choose(page, clips[0])
    expect(page.get_by_role("alert")).to_contain_text("the server is busy")
    page.get_by_role("button", name="Try again").press("Enter")
    expect_result(page)
    expect(page.get_by_role("alert")).to_be_empty()


def test_answer_that_ends_early_is_an_error(open_page, server, long_video):
    page = open_page(f"{server.url}/")

    def cut(route):
        response = route.fetch()
        body = response.body()
        route.fulfill(response=response, body=body[: 2 * len(body) // 3])

    page.route("**/v1/explain*", cut)
    choose(page, long_video)
    expect(page.get_by_role("alert")).to_contain_text("The connection to the server was lost.")
    expect(page.get_by_role("heading", name="Frames that the network saw")).to_be_visible()
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


def start_server(model: Path, port: int) -> tuple[subprocess.Popen, str]:
    """Start `jaxvid serve`; return the process and its URL when the model is compiled."""
    arguments = ["serve", "--model", str(model), "--port", str(port), "--max_batch", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxvid", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    url = re.search(r"http://\S+/", process.stdout.readline())[0]
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}readyz"):
                return process, url
        except urllib.error.HTTPError:  # still compiling
            time.sleep(0.05)
    raise AssertionError(f"exit code {process.returncode}")


def test_server_that_is_killed_and_started_again(open_page, folders, clips):
    process, url = start_server(folders / "xvit", 0)
    try:
        page = open_page(url, errors=HTTP_ERRORS)
        expect_start(page)
        process.send_signal(signal.SIGSTOP)  # so that it is killed during the request
        choose(page, clips[0])
        expect(page.locator("#status")).to_have_text("Classifying 00000.mp4…")
        process.kill()
        process.wait()
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text("The server does not respond.")
        check_accessible(page)
        process.stdout.close()
        process, _ = start_server(folders / "xvit", int(re.search(r":(\d+)/", url)[1]))
        page.get_by_role("button", name="Try again").press("Enter")
        expect_result(page)
        expect(alert).to_be_empty()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
