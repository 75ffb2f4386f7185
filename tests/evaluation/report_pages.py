"""Reports (`eval.html`) made from a few scores, for tests of their data and in a browser."""

import json
import re

from jaxvid.data.sources import Record
from jaxvid.evaluation import html_report, summary
from jaxvid.experiment import resolve

HOSTILE = [  # class names and ids that could break the page
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "it's <!-- <script> & {{data}} {{title}}",
    "ünï 太極拳 \u2028",
    "x" * 5000,
    "",
]


def parse_data(page: str) -> dict:
    """Return the JSON data in a page; as in a browser, it ends at the first `</script`."""
    return json.loads(re.search(r'<script[^>]*id="data">(.*?)</script', page, re.DOTALL)[1])


def save(folder, config, evaluated, labels, records=None):
    """Write the HTML page of an evaluation; return the page and its JSON data."""
    protocol = resolve(config).protocol
    result = summary.make_report(
        evaluated, protocol, data=config.data.folder, checkpoint="checkpoints/</script>"
    )
    result |= {"weights_sha256": "0123456789abcdef" * 4}
    records = records or [Record(folder / "missing.mp4", 0)] * len(evaluated.ids)
    data = html_report.page_data(result, evaluated, labels, records)
    html_report.save_page(folder / "eval.html", data)
    page = (folder / "eval.html").read_text(encoding="utf-8")
    return page, parse_data(page)
