"""The page of `jaxvid serve` with a webcam, which shows a recorded video."""

import re

import pytest

from tests.browser.checks import check_accessible, check_fits, expect, tab_to
from tests.browser.conftest import DESKTOP, PHONE
from tests.browser.serve_page import HTTP_ERRORS, choose, expect_result, expect_start, top_classes

pytestmark = pytest.mark.browser

RATE = re.compile(r"^\d+\.\d predictions/s, latency \d+ ms$")


@pytest.fixture
def open_with_webcam(open_page, server):
    """Return a function that opens the page in a browser that allows the webcam."""

    def open_(**options):
        page = open_page(f"{server.url}/", permissions=["camera"], **options)
        expect_start(page)
        return page

    return open_


def is_webcam_on(page) -> bool:
    """Return whether the page uses the webcam."""
    return page.evaluate("document.getElementById('preview').srcObject !== null")


def test_recording_is_classified_with_the_keyboard(open_with_webcam, tmp_path):
    page = open_with_webcam()
    tab_to(page, page.get_by_role("button", name="Record from the webcam"))
    page.keyboard.press("Enter")
    stop = page.get_by_role("button", name="Stop")
    expect(stop).to_be_focused()
    expect(page.locator("#camera-text")).to_have_text(re.compile(r"^Recording: [01] s left$"))
    page.keyboard.press("Enter")
    expect_result(page)
    assert not is_webcam_on(page)
    assert len(top_classes(page)) == 5
    expect(page.locator("#facts")).to_have_text(re.compile(r"^\d+ × \d+ px · "))
    with page.expect_download() as download:
        page.get_by_role("link", name="Download recording").press("Enter")
    download.value.save_as(tmp_path / "recording")
    assert (tmp_path / "recording").stat().st_size > 1000


def test_recording_ends_by_itself(open_with_webcam):
    page = open_with_webcam()
    page.get_by_role("button", name="Record from the webcam").click()
    expect_result(page)
    assert not is_webcam_on(page)


@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_live_mode_shows_classes_until_it_is_stopped(open_with_webcam, device):
    page = open_with_webcam(color_scheme="dark", **device)
    live = page.get_by_role("button", name="Live webcam")
    live.press("Enter")
    expect(page.locator("#rate")).to_have_text(RATE)
    bars = page.get_by_role("list", name="Classes in the last seconds").get_by_role("listitem")
    expect(bars).to_have_count(5)
    check_fits(page)
    check_accessible(page)
    page.get_by_role("button", name="Stop").press("Enter")
    expect(page.locator("#camera")).to_be_hidden()
    expect(live).to_be_focused()
    assert not is_webcam_on(page)


def test_live_mode_of_another_model(open_with_webcam):
    page = open_with_webcam()
    page.get_by_role("button", name="Live webcam").click()
    expect(page.locator("#rate")).to_have_text(RATE)
    choice = page.locator("#live-model")
    expect(choice.get_by_label("xvit")).to_be_checked()
    with page.expect_response(re.compile(r"/v1/frames\?.*model=stam")) as response:
        choice.get_by_label("stam").press("Space")
    assert response.value.status == 200
    expect(choice.get_by_label("stam")).to_be_checked()
    expect(choice.get_by_label("stam")).to_be_focused()
    bars = page.get_by_role("list", name="Classes in the last seconds").get_by_role("listitem")
    expect(bars).to_have_count(5)
    expect(page.get_by_role("alert")).to_be_empty()


def test_choosing_a_file_ends_live_mode(open_with_webcam, clips):
    page = open_with_webcam()
    page.get_by_role("button", name="Live webcam").click()
    expect(page.locator("#rate")).to_have_text(RATE)
    choose(page, clips[0])
    expect_result(page)
    assert not is_webcam_on(page)
    expect(page.get_by_role("alert")).to_be_empty()


def test_live_mode_goes_on_when_the_server_is_busy(open_with_webcam):
    page = open_with_webcam(errors=HTTP_ERRORS)
    error = {"error": {"status": 429, "message": "the server is busy; try again in 1 s"}}
    page.route("**/v1/frames*", lambda route: route.fulfill(status=429, json=error), times=1)
    page.get_by_role("button", name="Live webcam").click()
    expect(page.locator("#rate")).to_have_text(RATE)
    expect(page.get_by_role("alert")).to_be_empty()


def test_live_mode_ends_with_the_servers_error(open_with_webcam):
    page = open_with_webcam(errors=HTTP_ERRORS)
    page.get_by_role("button", name="Live webcam").click()
    expect(page.locator("#rate")).to_have_text(RATE)
    page.route("**/v1/frames*", lambda route: route.abort())
    expect(page.get_by_role("alert")).to_contain_text("The server does not respond.")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    assert not is_webcam_on(page)


def test_double_click_opens_the_webcam_once(open_page, server):
    page = open_page("about:blank", site=server.url, permissions=["camera"])
    page.add_init_script("""
      const open = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
      window.streams = [];
      navigator.mediaDevices.getUserMedia = async (options) => {
        const stream = await open(options);
        window.streams.push(stream);
        return stream;
      };
    """)
    page.goto(f"{server.url}/")
    page.get_by_role("button", name="Live webcam").dblclick()
    expect(page.locator("#rate")).to_have_text(RATE)
    page.get_by_role("button", name="Stop").click()
    assert page.evaluate("streams.map((stream) => stream.active)") == [False]


def test_refused_webcam_is_explained(open_page, server):
    page = open_page(f"{server.url}/")
    page.get_by_role("button", name="Live webcam").click()
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The webcam cannot be used")
    expect(alert).to_contain_text("allow it in the browser's address bar")
    expect(page.get_by_role("button", name="Live webcam")).to_be_enabled()
