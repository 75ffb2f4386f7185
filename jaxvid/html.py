"""Data in HTML pages that the programs write."""

import json


def embed_json(data: object) -> str:
    """Return data as JSON for a `script` element.

    The characters that could end or change the element ("</script", "<!--") are escaped.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
