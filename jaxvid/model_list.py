"""List the networks that can be created by name."""

import fnmatch
import sys

from jaxvid import parsers
from jaxvid.errors import InputError
from jaxvid.models import PRESETS, family_of


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Return the names of presets.

    Args:
        pattern: Shell pattern of the names, e.g. `xvit*`.
        pretrained: Whether to return only presets whose authors released weights, which
            `load_model` downloads.
    """
    return [
        name
        for name in PRESETS
        if fnmatch.fnmatchcase(name, pattern)
        and (not pretrained or name in family_of(PRESETS[name]).released_weights)
    ]


def format_table(names: list[str]) -> str:
    """Return a table of presets: input, size, multiply-adds per view, accuracy and licence.

    The accuracy is top-1 / top-5. The last column has a link to the licence of released weights.
    """
    lines = [
        "name       frames   px  classes  M params  G multiply-adds per view  "
        "published % (clips × crops)  licence of the weights"
    ]
    for name in names:
        config = PRESETS[name]
        family = family_of(config)
        giga = family.multiply_adds(config, True) / 1e9
        lines.append(
            f"{name:9}  {config.num_frames:6}  {config.image_size:3}  {config.num_classes:7}  "
            f"{config.num_params() / 1e6:8.2f}  {giga:24.2f}  {_describe_accuracy(name):27}  "
            f"{family.license_url if name in family.released_weights else 'none'}"
        )
    return "\n".join(lines)


def _describe_accuracy(name: str) -> str:
    """Return the published accuracy of a preset and its views, e.g. `84.51 / 96.26 (1 × 3)`."""
    config = PRESETS[name]
    family = family_of(config)
    if not (released := family.released_classes.get(name)):
        return "none"
    views = family.released_preprocessing(config)
    top5 = "" if released.top5 is None else f" / {released.top5:.2f}"
    return f"{released.top1:.2f}{top5} ({views['num_clips']} × {views['num_crops']})"


def main() -> int:
    """Run the command line; return the exit code: 0, or 2 if no preset matches."""
    args = parsers.models().parse_args()
    if not (names := list_models(args.pattern, pretrained=args.pretrained)):
        print(f"error: no model matches {args.pattern!r}; see jaxvid models", file=sys.stderr)
        return InputError.EXIT_CODE
    print(format_table(names))
    return 0
