"""The evaluation report, `eval.html`, opened from a file without a network."""

import dataclasses
import json
import re

import numpy as np
import pytest

from jaxvid.data.class_names import class_names
from jaxvid.data.sources import Record, read_list
from jaxvid.data.synthetic_motion import LABELS
from tests.browser.checks import (
    check_accessible,
    check_fits,
    check_keyboard,
    expect,
    tab_to,
)
from tests.browser.conftest import DESKTOP, PHONE
from tests.conftest import shrunk_config
from tests.evaluation.report_pages import HOSTILE, save
from tests.evaluation.test_metrics import results
from tests.waiting import wait_until

PAGE_SECONDS = 10  # for a page to be redrawn
pytestmark = pytest.mark.browser

BROKEN = "moov atom not found"
TICK = r"0|\d{1,4}(\.\d{1,2})?|0\.\d{1,4}|\d(\.\d{1,2})?e-\d+|\d{1,4}(\.\d)?k"  # label of an axis
REPORTS = ["motion", "many_classes", "multi_label", "all_failed", "one_class", "hostile_names"]


def motion_report(motion_folder):
    """Return results, class names and records: 24 videos, two of them broken, a third wrong."""
    records = read_list(motion_folder / "val.csv", len(LABELS))
    labels = np.array([record.label for record in records])
    scores = 3.0 * np.eye(len(LABELS))[np.where(np.arange(24) % 3, labels, (labels + 1) % 8)]
    errors = [BROKEN if i in (4, 5) else "" for i in range(24)]
    return results(scores, labels, errors), list(LABELS), records


def many_classes_report():
    """Return results and class names: 2000 videos of Kinetics-400's classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 400, 2000)
    scores = rng.normal(size=(2000, 400)) + 4 * np.eye(400)[labels]
    errors = [BROKEN if i % 5 == 0 else "" for i in range(2000)]
    return results(scores, labels, errors), [*class_names("kinetics400")]


def multi_label_report():
    """Return results and class names: videos with 0 to 3 of five classes; one class has none."""
    rng = np.random.default_rng(0)
    multi_hot = (rng.random((40, 5)) < 0.3).astype(int)
    multi_hot[:, 4] = 0
    scores = rng.normal(size=(40, 5)) + 2 * multi_hot
    evaluated = results(scores, [0] * 40, [BROKEN if i == 7 else "" for i in range(40)])
    return dataclasses.replace(evaluated, labels=multi_hot), [f"class {c}" for c in range(5)]


def write_curves(folder):
    """Write a `metrics.jsonl` whose learning rates are tiny."""
    rows = [
        {"step": s, "train/loss": 2 / s, "train/top1": s / 40, "learning_rate": 6.3e-9 * s / 4000}
        for s in range(10, 4001, 10)
    ]
    rows += [{"step": s, "val/loss": 2.5 / s, "val/top1": s / 50} for s in (1000, 2000, 3000, 4000)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def reports(motion_folder, tmp_path_factory):
    """Return the URL of each report in `REPORTS`."""
    config = shrunk_config(motion_folder)
    urls = {}

    def add(name, evaluated, labels, records=None):
        save(folder(name), config, evaluated, labels, records)
        urls[name] = (folder(name) / "eval.html").as_uri()

    def folder(name):
        path = tmp_path_factory.getbasetemp() / "reports" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    write_curves(folder("motion"))
    add("motion", *motion_report(motion_folder))
    add("many_classes", *many_classes_report())
    add("multi_label", *multi_label_report())
    add("all_failed", results(np.eye(3), [0, 1, 2], [BROKEN] * 3), ["a", "b", "c"])
    add("one_class", results([[1]] * 3, [0] * 3), ["only"])
    hostile = results(np.eye(6)[[1, 0, 2, 4, 3, 5]], range(6), ["", "", "", "", "", HOSTILE[0]])
    hostile = dataclasses.replace(hostile, ids=HOSTILE)
    add("hostile_names", hostile, HOSTILE, [Record(motion_folder / "missing.mp4", 0)] * 6)
    return urls


def open_details(page) -> None:
    """Open all <details> of a page, as their contents are checked too."""
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_report_is_accessible_and_fits(open_page, reports, name, scheme, device):
    page = open_page(reports[name], color_scheme=scheme, offline=True, **device)
    expect(page.locator("#tiles > div").first).to_be_visible()
    open_details(page)
    check_fits(page)
    check_accessible(page)


@pytest.mark.parametrize("name", REPORTS)
def test_tab_visits_every_control(open_page, reports, name):
    page = open_page(reports[name])
    open_details(page)
    check_keyboard(page)


# ------------------------------------------------------------------ headline


def test_failed_videos_are_listed_with_their_error(open_page, reports):
    page = open_page(reports["motion"])
    summary = page.get_by_text("2 videos failed")
    failed = page.get_by_role("list", name="Failed videos")
    expect(failed).to_be_hidden()
    tab_to(page, summary)
    page.keyboard.press("Enter")
    expect(failed.get_by_role("listitem")).to_have_count(2)
    expect(failed.get_by_role("listitem").first).to_contain_text(BROKEN)


def test_only_the_first_failed_videos_are_listed(open_page, reports):
    page = open_page(reports["many_classes"])
    page.get_by_text("400 videos failed").click()
    items = page.get_by_role("list", name="Failed videos").get_by_role("listitem")
    expect(items).to_have_count(201)
    expect(items.last).to_have_text("and 200 more, listed in eval.json")


def test_weights_are_shown_in_full_on_request(open_page, reports):
    page = open_page(reports["motion"])
    button = page.get_by_role("button", name="0123456789ab…")
    tab_to(page, button)
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="0123456789abcdef" * 4, expanded=True)).to_be_visible()


def test_names_with_markup_are_shown_as_text(open_page, reports):
    page = open_page(reports["hostile_names"])
    bars = page.locator("#bars")
    for name in HOSTILE[:4]:
        expect(bars.get_by_text(name, exact=True)).to_have_count(1)
    expect(bars.get_by_text("class 5", exact=True)).to_have_count(1)  # its name is empty
    expect(page.locator("img[onerror]")).to_have_count(0)
    expect(page.locator("script")).to_have_count(2)
    expect(page.locator("#cards .none")).to_have_count(4)  # the frames cannot be decoded


# ------------------------------------------------------------------ confusion matrix


def canvas_colours(page) -> set[str]:
    """Return the colours of the pixels on the diagonal of the confusion matrix."""
    return set(
        page.evaluate("""() => {
          const canvas = document.getElementById("canvas"), size = canvas.width;
          const {data} = canvas.getContext("2d").getImageData(0, 0, size, size);
          return Array.from({length: size}, (_, i) => 4 * i * (size + 1))
            .map((start) => data.slice(start, start + 4).join());
        }""")
    )


def test_arrow_keys_select_cells(open_page, reports):
    page = open_page(reports["motion"])
    canvas, cell = page.locator("#canvas"), page.locator("#cell")
    page.get_by_label("label order").check()
    tab_to(page, canvas)
    page.keyboard.press("ArrowDown")  # the first cell
    expect(cell).to_contain_text(f"Label {LABELS[0]}, predicted {LABELS[0]}: ")
    page.keyboard.press("ArrowRight")
    expect(cell).to_contain_text(f"Label {LABELS[0]}, predicted {LABELS[1]}: ")
    page.keyboard.press("ArrowUp")  # already in the first row
    expect(cell).to_contain_text(f"Label {LABELS[0]}, predicted {LABELS[1]}: ")
    page.keyboard.press("Enter")
    expect(page.locator("#pairs h3").first).to_have_text(LABELS[0])
    expect(page.locator("#find")).to_have_value(LABELS[0])


def test_orders_of_the_matrix_are_radio_buttons(open_page, reports):
    page = open_page(reports["many_classes"])
    tab_to(page, page.get_by_label("confused classes adjacent"))
    before = page.locator("#canvas").screenshot()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("label order")).to_be_checked()
    assert page.locator("#canvas").screenshot() != before


def test_zoom_by_keyboard_and_buttons(open_page, reports):
    page = open_page(reports["many_classes"])
    zoom_in, zoom_out = (page.get_by_role("button", name=f"Zoom {way}") for way in ("in", "out"))
    reset = page.get_by_role("button", name="Reset zoom")
    expect(zoom_out).to_be_disabled()
    tab_to(page, page.locator("#canvas"))
    page.keyboard.press("ArrowDown")
    for _ in range(8):
        page.keyboard.press("+")
    expect(zoom_in).to_be_disabled()
    page.keyboard.press("-")
    expect(zoom_in).to_be_enabled()
    reset.click()
    expect(reset).to_be_disabled()


def test_mouse_selects_a_cell_and_its_class(open_page, reports):
    page = open_page(reports["motion"])
    canvas, cell, find = (page.locator(name) for name in ("#canvas", "#cell", "#find"))
    box = canvas.bounding_box()
    corner = {"x": box["width"] - 5, "y": box["height"] - 5}
    canvas.hover(position=corner)
    expect(cell).to_contain_text("Label ")
    expect(find).to_have_value("")
    canvas.click(position=corner)
    expect(find).not_to_have_value("")


def test_touch_selects_a_class(open_page, reports):
    page = open_page(reports["motion"], **PHONE)
    box = page.locator("#canvas").bounding_box()
    page.locator("#canvas").tap(position={"x": box["width"] - 5, "y": box["height"] - 5})
    expect(page.locator("#cell")).to_contain_text("Label ")
    expect(page.locator("#find")).not_to_have_value("")


def test_zoomed_matrix_is_dragged(open_page, reports):
    page = open_page(reports["many_classes"])
    for _ in range(3):
        page.get_by_role("button", name="Zoom in").click()
    canvas = page.locator("#canvas")
    before = canvas.screenshot()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 80, y - 80, steps=4)
    page.mouse.up()
    page.mouse.move(x, box["y"] - 20)
    assert canvas.screenshot() != before
    expect(page.locator("#find")).to_have_value("")  # a drag selects no class


def test_switching_to_dark_mode_redraws_the_matrix(open_page, reports):
    # The test reads the canvas twice, which Chromium advises against.
    page = open_page(reports["motion"], errors="willReadFrequently", color_scheme="light")
    light = canvas_colours(page)
    page.emulate_media(color_scheme="dark")
    wait_until(lambda: not light & canvas_colours(page), PAGE_SECONDS)


def test_resized_window_redraws_the_page(open_page, reports):
    page = open_page(reports["motion"])
    wide = page.locator("#canvas").bounding_box()["width"]
    page.set_viewport_size({"width": 360, "height": 740})
    wait_until(
        lambda: page.evaluate("document.getElementById('canvas').clientWidth") < wide, PAGE_SECONDS
    )
    width = "document.getElementById('bins').viewBox.baseVal.width"
    wait_until(lambda: page.evaluate(width) <= 360, PAGE_SECONDS)
    check_fits(page)


# ------------------------------------------------------------------ lists of classes


def test_class_search(open_page, reports):
    page = open_page(reports["many_classes"])
    heading = page.locator("#pairs h3").first
    expect(heading).to_have_text("Most frequent confusions")
    tab_to(page, page.get_by_label("Find a class"))
    page.keyboard.type("PLAYING BA")
    expect(heading).to_have_text("playing badminton")
    expect(page.locator("#matches")).to_have_text("4 classes match; others:")
    page.get_by_role("button", name="playing bagpipes", exact=True).press("Enter")
    expect(heading).to_have_text("playing bagpipes")
    page.locator("#find").fill("no such class")
    expect(page.locator("#matches")).to_have_text("No class name matches.")
    page.locator("#find").fill("abseiling")
    page.get_by_role("button", name="All classes").press("Enter")
    expect(heading).to_have_text("Most frequent confusions")
    expect(page.locator("#panel")).to_be_focused()


def test_classes_are_sorted_and_filtered(open_page, reports):
    page = open_page(reports["many_classes"])
    bars = page.locator("#bars").get_by_role("button")
    expect(bars).to_have_count(400)
    tab_to(page, page.get_by_label("worst first").nth(1))
    for name in ("best first", "name", "number of videos"):
        page.keyboard.press("ArrowRight")
        expect(page.get_by_label(name, exact=True)).to_be_checked()
    texts = bars.locator(".share").all_inner_texts()  # "3 of 5" or "no videos"
    counts = [int(text.split()[-1]) if text != "no videos" else 0 for text in texts]
    assert counts == sorted(counts, reverse=True)
    page.get_by_label("name", exact=True).check()
    expect(bars.first).to_contain_text("abseiling")
    page.get_by_label("Filter classes by name").fill("guitar")
    expect(page.locator("#shown")).to_have_text("4 of 400 classes")
    expect(bars).to_have_count(4)


def test_arrow_keys_move_in_the_list_of_classes(open_page, reports):
    page = open_page(reports["motion"])
    bars = page.locator("#bars").get_by_role("button")
    tab_to(page, bars.first)
    page.keyboard.press("ArrowDown")
    expect(bars.nth(1)).to_be_focused()
    page.keyboard.press("End")
    expect(bars.last).to_be_focused()
    page.keyboard.press("Enter")
    expect(bars.last).to_have_attribute("aria-current", "true")
    expect(page.locator("#pairs h3").first).to_be_in_viewport()


def test_multi_label_report_has_no_confusion_matrix(open_page, reports):
    page = open_page(reports["multi_label"])
    expect(page.get_by_role("heading", name="Average precision per class")).to_be_visible()
    expect(page.get_by_role("heading", name="Confusion matrix")).to_be_hidden()
    expect(page.get_by_role("heading", name="Calibration")).to_be_hidden()
    expect(page.locator("#tiles > div").first).to_contain_text("mAP")
    bars = page.locator("#bars")
    expect(bars.get_by_role("listitem").last).to_contain_text("no videos")
    expect(bars.get_by_role("button")).to_have_count(0)  # there is no matrix to select a class in
    bars.locator("[tabindex='0']").press("ArrowDown")
    expect(bars.locator(".row").nth(1)).to_be_focused()
    expect(page.locator("#cards figure").first).to_contain_text("labels ")


# ------------------------------------------------------------------ charts


@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axis_labels_are_rounded_and_inside_the_chart(open_page, reports, device):
    page = open_page(reports["motion"], **device)
    charts = page.locator("#charts svg")
    expect(charts).to_have_count(3)
    for chart in charts.all():
        labels = [text for text in chart.locator("text").all_text_contents() if text != "step"]
        assert len(labels) > 6
        assert all(re.fullmatch(TICK, label) for label in labels), labels
        outer = chart.bounding_box()
        for label in chart.locator("text").all():
            box = label.bounding_box()
            assert box["x"] >= outer["x"]
            assert box["x"] + box["width"] <= outer["x"] + outer["width"] + 1
    rates = charts.last.locator("text").all_text_contents()
    assert {"0", "2e-9", "4e-9", "6e-9", "8e-9"} <= {*rates}


def test_pointer_reads_the_curves(open_page, reports):
    page = open_page(reports["motion"])
    readout = page.locator("#charts .readout").first
    expect(readout).to_contain_text("at step 4000")
    chart = page.locator("#charts svg").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 80)
    expect(readout).not_to_contain_text("at step 4000")
    page.mouse.move(box["x"] - 40, box["y"] - 40)
    expect(readout).to_contain_text("at step 4000")


def test_table_has_the_numbers_of_the_reliability_diagram(open_page, reports):
    page = open_page(reports["motion"], **PHONE)
    table = page.locator("#bin-table")
    expect(table).to_be_hidden()
    page.get_by_text("Numbers", exact=True).tap()
    expect(table).to_be_visible()
    counts = table.locator("tbody td:last-child").all_inner_texts()
    assert sum(map(int, counts)) == 22  # videos that were decoded
