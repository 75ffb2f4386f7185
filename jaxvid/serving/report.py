"""The report of `/v1/report`: one HTML file with the results of the page."""

import base64
import datetime
import hashlib
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxvid.html import embed_json

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("results.js", "timeline.js", "report.js")
RESULTS = ("<!-- results -->", "<!-- end of results -->")  # bounds of the results in index.html
TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src '{style_hash}'; script-src '{script_hash}'">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
  <h1><bdi>{title}</bdi></h1>
  <p class="small soft" id="facts"></p>
  <p class="small soft">Classified with jaxvid on {made}</p>
  <noscript><p>This report needs JavaScript.</p></noscript>
</header>
<div class="stage">
{results}
</div>
</main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def make_report(
    name: str, cards: Sequence[dict[str, Any]], events: Sequence[tuple[str, str, Any]]
) -> str:
    """Return the report as HTML.

    Args:
        name: Name of the video, for the title.
        cards: Cards of the models, as the page receives them.
        events: Model, name and data of each event of `page_events.explain`.
    """
    style, script = _read("page.css"), "".join(map(_read, SCRIPTS))
    _, _, rest = _read("index.html").partition(RESULTS[0])
    results, _, _ = rest.partition(RESULTS[1])
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return TEMPLATE.format(
        title=html.escape(name),
        made=made,
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        results=results,
        data=embed_json({"cards": cards, "events": events}),
    )


def _read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the hash of an inline element for a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
