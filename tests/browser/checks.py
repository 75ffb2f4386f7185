"""Checks that hold for every page: accessibility, width, and use by keyboard."""

import difflib

import pytest

# Modules that import this one are skipped if Playwright is missing.
expect = pytest.importorskip("playwright.sync_api", reason="make test-browser installs it").expect
from axe_playwright_python.sync_playwright import Axe

# Returns what Tab should reach, in order: of each radio group, only the selected button.
TAB_STOPS = """() => [...document.querySelectorAll(
    "a[href], button, input, select, summary, textarea, video[controls], [tabindex]")]
  .filter((e) => e.tabIndex >= 0 && !e.disabled && e.checkVisibility({visibilityProperty: true})
    && (e.type !== "radio" || e.checked))
  .map(NAME)"""
# Returns a name of the focused element and whether an outline shows the focus. The outline of an
# input that covers its label is drawn on the text beside it.
FOCUSED = """() => {
  const e = document.activeElement;
  if (!e || e === document.body) return null;
  const outlined = (x) => x && getComputedStyle(x).outlineStyle !== "none"
    && parseFloat(getComputedStyle(x).outlineWidth) >= 2;
  return [(NAME)(e), Boolean(outlined(e) || outlined(e.nextElementSibling))];
}"""
# The position makes names unique.
NAME = """(e) => `${[...document.querySelectorAll("*")].indexOf(e)} ${e.tagName} ${e.id}
  ${e.getAttribute("aria-label") ?? ""} ${e.textContent}`.replace(/\\s+/g, " ").slice(0, 60)"""


def check_accessible(page) -> None:
    """Check that axe-core has no finding of impact `serious` or `critical`."""
    findings = Axe().run(page).response["violations"]
    texts = [
        f"{finding['impact']}: {finding['help']}: {node['html'][:200]}: {node['failureSummary']}"
        for finding in findings
        for node in finding["nodes"]
        if finding["impact"] in ("serious", "critical")
    ]
    assert not texts, "\n".join(texts)


def check_fits(page) -> None:
    """Check that the page is not wider than the window."""
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= page.viewport_size["width"]


def tab_stops(page) -> list[str]:
    """Press Tab until the focus leaves the page; return the names of the elements it visited.

    Check that an outline shows the focus on each of them.
    """
    names = []
    while len(names) < 500:
        page.keyboard.press("Tab")
        focused = page.evaluate(FOCUSED.replace("NAME", NAME))
        if focused is None:
            return names
        name, outlined = focused
        if names[-1:] == [name]:
            continue  # a control inside of a player
        assert outlined, name
        names.append(name)
    raise AssertionError("Tab does not leave the page")


def check_keyboard(page) -> None:
    """Check that Tab visits every control of the page in the order of the document."""
    stops, controls = tab_stops(page), page.evaluate(TAB_STOPS.replace("NAME", NAME))
    assert stops == controls, "\n".join(difflib.ndiff(stops, controls))


def tab_to(page, locator) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(100):
        if locator.evaluate("(e) => e === document.activeElement"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not reach {locator}")
