"""Finds the converters, in a checkout and in an installed package."""

import importlib.util
import sys
from pathlib import Path


def find_converter(module: str) -> str:
    """Return the name under which a module of `convert` can be imported.

    In an installed package, `convert` is `jaxvid.convert`. In a checkout, it is beside `jaxvid`.

    Args:
        module: E.g. `convert.flax_to_torch`.
    """
    if importlib.util.find_spec("jaxvid.convert"):
        return f"jaxvid.{module}"
    root = str(Path(__file__).parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)
    return module
