"""List the networks that can be created by name."""

import fnmatch
import sys

from jaxvid import parsers
from jaxvid.errors import InputError
from jaxvid.models import PRESETS, family_of


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of the presets that match a shell pattern, e.g. `xvit*`."""
    return [name for name in PRESETS if fnmatch.fnmatchcase(name, pattern)]


def format_table(names: list[str]) -> str:
    """Return a table of presets: input, parameters, and multiply-adds per view."""
    lines = [f"{'name':10}  frames  pixels  classes  M parameters  G multiply-adds per view"]
    for name in names:
        config = PRESETS[name]
        giga = family_of(config).multiply_adds(config, True) / 1e9
        lines.append(
            f"{name:10}  {config.num_frames:6}  {config.image_size:6}  {config.num_classes:7}  "
            f"{config.num_params() / 1e6:12.2f}  {giga:24.2f}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the command line; return the exit code: 0, or 2 if no preset matches."""
    pattern = parsers.models().parse_args().pattern
    if not (names := list_models(pattern)):
        print(f"error: no model matches {pattern!r}; see jaxvid models", file=sys.stderr)
        return InputError.EXIT_CODE
    print(format_table(names))
    return 0
