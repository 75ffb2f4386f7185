"""Chromium and a server. Every test checks the console and the requests of its pages."""

import re
import shutil
from pathlib import Path

import av
import numpy as np
import pytest

from jaxvid.data.synthetic_motion import write_clip
from jaxvid.serving.limits import Settings
from jaxvid.serving.model_loading import load_models
from tests.serving.running_server import RunningServer, running

DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {
    "viewport": {"width": 360, "height": 740},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
TIMEOUT_MS = 30_000  # long, as the machine may be busy


@pytest.fixture(scope="session")
def playwright():
    """Yield a running Playwright."""
    from playwright.sync_api import expect, sync_playwright  # only `make test-browser` installs it

    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as api:
        yield api


def read_frames(path: Path) -> np.ndarray:
    """Return the frames of a video, `(t, h, w, c)`."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="session")
def long_video(clips, tmp_path_factory) -> Path:
    """Return the path of a video of 9 s, longer than a clip: eight scenes."""
    path = tmp_path_factory.mktemp("videos") / "eight scenes.mp4"
    write_clip(path, np.concatenate([read_frames(clip) for clip in clips[:8]]))
    return path


@pytest.fixture(scope="session")
def server(folders) -> RunningServer:
    """Yield a server of two untrained models, `xvit` and `stam`."""
    models = load_models([str(folders / name) for name in ("xvit", "stam")], "float32")
    with running(models, Settings(max_batch=2)) as server:
        yield server


@pytest.fixture(scope="session")
def browser(playwright, long_video, tmp_path_factory):
    """Yield a Chromium without a window, whose webcam shows `long_video`."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs chromium")
    recording = tmp_path_factory.mktemp("webcam") / "webcam.y4m"
    with av.open(str(recording), "w", format="yuv4mpegpipe") as container:
        stream = container.add_stream("wrapped_avframe", rate=15)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        for picture in read_frames(long_video):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(128, 96, "yuv420p")))
    browser = playwright.chromium.launch(
        executable_path=path,
        args=[
            "--use-fake-device-for-media-stream",
            f"--use-file-for-fake-video-capture={recording}",
        ],
    )
    yield browser
    browser.close()


def watch(page, site: str, errors: str, problems: list[str]) -> None:
    """Record console messages, uncaught exceptions and requests that a page should not make.

    Args:
        page: The page.
        site: The start of the URLs that the page may request, besides `data:` and `blob:`.
        errors: Regular expression of console messages that are expected.
        problems: The list to which a line is added for each.
    """

    def log(message):
        if message.type in ("error", "warning") and not re.search(errors, message.text):
            problems.append(f"console {message.type}: {message.text}")

    def request(request):
        if not request.url.startswith((site, "data:", "blob:")):
            problems.append(f"request: {request.url}")

    page.on("console", log)
    page.on("request", request)
    page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog}"), dialog.dismiss()))


@pytest.fixture
def open_page(browser):
    """Yield a function that opens a URL in a new browser context.

    Afterwards, fail if a page logged an error, raised an exception, or sent a request to another
    site.
    """
    contexts, problems = [], []

    def open_(url: str, *, site: str = "", errors: str = r"(?!)", **options):
        """Open a URL and return the page.

        Args:
            url: The URL.
            site: The start of the URLs that the page may request; by default, `url`.
            errors: Regular expression of console messages that are expected; by default, none.
            options: Options of the browser context, e.g. `color_scheme`; by default, `DESKTOP`.
        """
        context = browser.new_context(**(DESKTOP | options))
        contexts.append(context)
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        watch(page, site or url.partition("#")[0], errors, problems)
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not problems
