"""Draw training clips and evaluation views in one image, as the network gets them.

jaxvid browse --config CONFIG --output sheet.png [--config.FIELD=VALUE]
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from jaxvid import entry_point

    entry_point.run("jaxvid.data.browse")

import functools
import sys

from absl import app, flags

from jaxvid import cli
from jaxvid.atomic import output_path
from jaxvid.errors import InputError

CONFIG = cli.define_config()
OUTPUT = flags.DEFINE_string("output", None, "PNG file to write.")
COUNT = flags.DEFINE_integer("count", 4, "Number of videos per split.", lower_bound=1)


def run(_: list[str]) -> None:
    """Draw the image; for invalid input, print one line and exit with code 2."""
    from jaxvid.data.clip_sheet import draw_sheet, make_rows  # takes seconds

    output = output_path(OUTPUT.value)
    try:
        rows = make_rows(CONFIG.value, COUNT.value)
        draw_sheet(rows, output)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(InputError.EXIT_CODE)
    print(f"{output}: {len(rows)} clips")


def main() -> None:
    """Run the command line of this module."""
    parse = functools.partial(
        cli.parse_flags, doc=__doc__, module=__name__, needed=lambda: {"output": "FILE.png"}
    )
    app.run(run, flags_parser=parse)
