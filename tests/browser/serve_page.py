"""Steps that tests of the server's page share."""

import re
from pathlib import Path

from tests.browser.checks import expect

# Chromium logs every answer whose status is an error.
HTTP_ERRORS = r"^Failed to load resource"


def expect_start(page) -> None:
    """Wait until the page shows what it can classify."""
    expect(page.get_by_role("heading", name="Choose a video")).to_be_visible()


def choose(page, path: Path | str) -> None:
    """Choose a file in the file picker, without waiting for its result."""
    page.get_by_label("Choose a file").set_input_files(path)


def expect_result(page) -> None:
    """Wait until a video is classified completely."""
    expect(page.locator("#status:not(.busy)")).to_have_text(re.compile("^Most likely: "))


def top_classes(page, number: int = 0) -> list[tuple[str, str]]:
    """Return the classes and the probabilities that the page shows for a model.

    Args:
        page: The page.
        number: Position of the model.
    """
    bars = page.locator("#predictions ol").nth(number).get_by_role("listitem")
    labels, numbers = (bars.locator(name).all_inner_texts() for name in (".label", ".number"))
    return list(zip(labels, numbers, strict=True))
