"""Chromium, driven by Playwright. Every test checks the console and the requests of its pages."""

import re
import shutil

import pytest

DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {
    "viewport": {"width": 360, "height": 740},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
TIMEOUT_MS = 20_000  # long, as the machine may be busy


@pytest.fixture(scope="session")
def playwright():
    """Yield a running Playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="make test-browser installs it")
    api.expect.set_options(timeout=TIMEOUT_MS)
    with api.sync_playwright() as running:
        yield running


@pytest.fixture(scope="session")
def browser(playwright):
    """Yield a Chromium without a window."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs chromium")
    browser = playwright.chromium.launch(executable_path=path)
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
        watch(page, site or url, errors, problems)
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not problems
