"""Download released weights, and convert them into model folders in the cache."""

if __name__ == "__main__":  # before the slow imports below
    from jaxvid import entry_point

    entry_point.run("jaxvid.download")

import sys
from collections.abc import Sequence

from jaxvid import parsers
from jaxvid.errors import InputError
from jaxvid.weights.resolve import resolve_model


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 if a model cannot be downloaded."""
    args = parsers.download().parse_args(argv)
    try:
        for name in args.models:
            print(resolve_model(name, preset=args.preset), flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE
    return 0
