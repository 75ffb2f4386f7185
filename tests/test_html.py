"""Data in HTML pages."""

import json

from jaxvid.html import embed_json


def test_json_cannot_end_or_change_its_script_element():
    data = {"name": "</script><!-- & \u00fc \u2028"}
    text = embed_json(data)
    assert not {*"<>&"} & {*text}
    assert json.loads(text) == data
