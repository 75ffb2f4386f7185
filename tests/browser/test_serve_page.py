"""The page of `jaxvid serve`: choosing a video, and its results."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import jaxvid
from tests.browser.checks import check_accessible, check_fits, check_keyboard, expect, tab_to
from tests.browser.conftest import DESKTOP, PHONE
from tests.browser.serve_page import choose, expect_result, expect_start, top_classes

pytestmark = pytest.mark.browser

# Gives a file to the page as if the user dropped or pasted it.
TRANSFER = """([kind, name, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name));
  const options = {bubbles: true, cancelable: true};
  const event = kind === "paste" ? new ClipboardEvent(kind, {...options, clipboardData: transfer})
    : new DragEvent(kind, {...options, dataTransfer: transfer});
  document.getElementById("drop").dispatchEvent(event);
  return event.defaultPrevented;
}"""


def transfer(page, kind: str, path: Path) -> bool:
    """Drop or paste a file; return whether the page prevented the browser from opening it."""
    return page.evaluate(TRANSFER, [kind, path.name, base64.b64encode(path.read_bytes()).decode()])


@pytest.fixture
def page(open_page, server):
    """Return the page of the server."""
    page = open_page(f"{server.url}/")
    expect_start(page)
    return page


@pytest.fixture
def shown(page, long_video):
    """Return the page with the results of `long_video`."""
    choose(page, long_video)
    expect_result(page)
    return page


# ------------------------------------------------------------------ every device


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_page_is_accessible_and_fits(open_page, server, long_video, scheme, device):
    page = open_page(f"{server.url}/", color_scheme=scheme, **device)
    expect_start(page)
    check_fits(page)
    check_accessible(page)
    choose(page, long_video)
    expect_result(page)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    check_fits(page)
    check_accessible(page)


def test_tab_visits_every_control(page, long_video):
    check_keyboard(page)
    choose(page, long_video)
    expect_result(page)
    page.locator("h1").click()  # the focus returns to the beginning
    check_keyboard(page)


# ------------------------------------------------------------------ choosing a video


def test_picker_shows_the_probabilities_of_the_classifier(page, folders, clips):
    choose(page, clips[0])
    expect_result(page)
    for number, name in enumerate(("xvit", "stam")):
        result = jaxvid.Classifier(folders / name).predict(clips[0], top_k=5)
        percentages = [f"{100 * probability:.1f} %" for probability in result.probabilities]
        assert top_classes(page, number) == [*zip(result.labels, percentages, strict=True)]


def test_file_is_dropped(page, long_video):
    assert transfer(page, "dragover", long_video)
    expect(page.locator("#drop")).to_have_class("over")
    assert transfer(page, "drop", long_video)
    expect(page.locator("#drop")).not_to_have_class("over")
    expect_result(page)
    expect(page.get_by_role("heading", name=long_video.name)).to_be_visible()


def test_file_is_pasted(page, clips):
    transfer(page, "paste", Path(clips[0]))
    expect_result(page)


def test_sample_is_chosen_with_the_keyboard(page):
    sample = page.get_by_role("button", name="counter-clockwise")
    tab_to(page, sample)
    page.keyboard.press("Enter")
    expect_result(page)
    expect(sample).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#curl")).to_contain_text("counter-clockwise.mp4")


def test_second_video_replaces_the_first(page, long_video, clips):
    choose(page, long_video)
    choose(page, clips[0])
    expect_result(page)
    expect(page.get_by_role("heading", name=Path(clips[0]).name)).to_be_visible()
    expect(page.get_by_role("heading", name="Classes over time")).to_be_hidden()
    assert len(top_classes(page)) == 5


def test_names_of_files_are_shown_as_text(page, clips, tmp_path):
    name = """'"><img src=x onerror=alert(1)>$(touch hacked)`touch hacked`.mp4"""
    shutil.copy(clips[0], tmp_path / name)
    choose(page, tmp_path / name)
    expect_result(page)
    expect(page.get_by_role("heading", name=name)).to_be_visible()
    expect(page.locator("img[onerror]")).to_have_count(0)
    # The command that the page shows classifies this file.
    command = page.locator("#curl").inner_text()
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    best = json.loads(done.stdout)["top"][0]
    label, probability = top_classes(page)[0]
    assert (best["label"], f"{100 * best['probability']:.1f} %") == (label, probability)
    assert not (tmp_path / "hacked").exists()


# ------------------------------------------------------------------ results


def test_frames_have_times_crops_and_attention(shown):
    figures = shown.locator("#pictures figure")
    expect(figures).to_have_count(8)
    expect(figures.first).to_contain_text(re.compile(r"^0\.\d\d s · frame \d+"))
    heat, weights = figures.locator("canvas.heat"), figures.locator(".weight")
    expect(heat.first).to_be_visible()
    expect(weights.first).to_be_visible()
    tab_to(shown, shown.get_by_label("attention within the frame"))
    shown.keyboard.press("Space")
    expect(heat.first).to_be_hidden()
    shown.get_by_label("attention to the frame").uncheck()
    expect(weights.first).to_be_hidden()
    crop, picture = (figures.first.locator(name).bounding_box() for name in (".crop", "img"))
    assert 0 < crop["width"] < picture["width"] + 1


def test_frame_moves_the_player(shown):
    frame = shown.locator("#pictures figure").nth(6)
    seconds = float(re.search(r"[\d.]+", frame.locator("figcaption").inner_text())[0])
    frame.get_by_role("button").press("Enter")
    assert current_time(shown) == pytest.approx(seconds, abs=0.02)
    expect(shown.get_by_role("slider")).to_have_attribute("aria-valuenow", f"{seconds:.2f}")


def current_time(page) -> float:
    """Return the time of the player in seconds."""
    return page.evaluate("document.getElementById('video').currentTime")


def test_timeline_follows_the_keyboard(shown):
    slider = shown.get_by_role("slider", name="Time in the video")
    tab_to(shown, slider)
    shown.keyboard.press("End")
    expect(slider).to_have_attribute("aria-valuetext", re.compile(r"^8\.\d\d s: .* %$"))
    end = current_time(shown)
    shown.keyboard.press("ArrowLeft")
    assert 0 < current_time(shown) < end
    shown.keyboard.press("Home")
    expect(shown.locator("#moment")).to_have_text(re.compile(r"^At 0\.\d\d s$"))
    assert current_time(shown) < 1


def test_timeline_follows_the_mouse_and_the_player(shown):
    chart, moment = shown.locator("#chart"), shown.locator("#moment")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    times = []
    for share in (0.2, 0.5, 0.8):
        shown.mouse.move(box["x"] + share * box["width"], box["y"] + 50)
        times.append(float(re.search(r"[\d.]+", moment.inner_text())[0]))
        assert current_time(shown) == pytest.approx(times[-1], abs=0.02)
    assert times == sorted(set(times))
    shown.mouse.move(box["x"], box["y"] - 40)
    before = shown.locator("#cursor").get_attribute("x1")
    shown.locator("#video").evaluate("(video) => video.play()")
    expect(shown.locator("#cursor")).not_to_have_attribute("x1", before)
    expect(shown.locator("#moment-bars").get_by_role("listitem")).to_have_count(5)


def test_timeline_follows_touch(open_page, server, long_video):
    page = open_page(f"{server.url}/", **PHONE)
    choose(page, long_video)
    expect_result(page)
    chart = page.locator("#chart")
    chart.scroll_into_view_if_needed()
    chart.tap(position={"x": 200, "y": 60})
    assert current_time(page) > 1


def test_windows_of_the_timeline_are_chosen(shown):
    note = shown.locator("#timeline-note")
    before = note.inner_text()
    shown.get_by_label("Window (s)").fill("2")
    shown.get_by_label("stride (s)").fill("1")
    shown.keyboard.press("Enter")
    expect(note).to_have_text(
        re.compile(r"^Each window of 2\.00 s .* every 1\.00 s\. \d windows\.$")
    )
    expect_result(shown)
    assert note.inner_text() != before


def test_window_that_is_too_small_is_refused_by_the_browser(shown):
    before = shown.locator("#timeline-note").inner_text()
    shown.get_by_label("Window (s)").fill("0")
    shown.get_by_role("button", name="Apply").click()
    assert shown.get_by_label("Window (s)").evaluate("(input) => !input.checkValidity()")
    assert shown.locator("#timeline-note").inner_text() == before


def test_models_are_compared(shown):
    expect(shown.locator("#agreement")).to_have_text(re.compile("^The models (dis)?agree: "))
    notes = shown.locator("#frames-note")
    before = notes.inner_text()
    choice = shown.locator("#frames-model")
    tab_to(shown, choice.get_by_label("xvit"))
    shown.keyboard.press("ArrowRight")
    expect(choice.get_by_label("stam")).to_be_checked()
    expect(choice.get_by_label("stam")).to_be_focused()
    expect(notes).not_to_have_text(before)


def test_switching_to_dark_mode_and_resizing_keep_the_results(shown):
    shown.emulate_media(color_scheme="dark")
    shown.set_viewport_size({"width": 360, "height": 740})
    check_fits(shown)
    view = shown.locator("#curves")
    expect(view).to_have_attribute("viewBox", re.compile(r"^0 0 [23]\d\d "))


# ------------------------------------------------------------------ keeping a result


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_report_opens_without_a_server(open_page, report, scheme, device):
    path, top = report
    page = open_page(path.as_uri(), offline=True, color_scheme=scheme, **device)
    expect(page.get_by_role("heading", name="eight scenes.mp4")).to_be_visible()
    assert top_classes(page) == top
    expect(page.locator("#pictures img")).to_have_count(8)
    check_fits(page)
    check_accessible(page)


def test_report_is_used_with_the_keyboard(open_page, report):
    page = open_page(report[0].as_uri(), offline=True)
    slider = page.get_by_role("slider", name="Time in the video")
    expect(slider).to_be_visible()  # the timeline is drawn after the frames
    check_keyboard(page)
    slider.press("End")
    expect(slider).to_have_attribute("aria-valuetext", re.compile(r"^8\.\d\d s: .* %$"))
    page.locator("#frames-model").get_by_label("stam").check()
    expect(page.locator("#pictures img")).to_have_count(8)


@pytest.fixture(scope="module")
def report(browser, server, long_video, tmp_path_factory):
    """Return the path of a downloaded report, and the classes that the page showed."""
    context = browser.new_context(accept_downloads=True)
    page = context.new_page()
    page.goto(f"{server.url}/")
    choose(page, long_video)
    expect_result(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download report").press("Enter")
    assert download.value.suggested_filename == "eight scenes.mp4.html"
    path = tmp_path_factory.mktemp("reports") / "report.html"
    download.value.save_as(path)
    top = top_classes(page)
    context.close()
    return path, top


def test_commands_are_copied(open_page, server, clips):
    page = open_page(f"{server.url}/", permissions=["clipboard-read", "clipboard-write"])
    choose(page, clips[0])
    expect_result(page)
    button = page.get_by_role("button", name="Copy").first
    button.press("Enter")
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    text = page.evaluate("navigator.clipboard.readText()")
    assert text == page.locator("#curl").inner_text()
