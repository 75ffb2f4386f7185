"""Finds the configs that come with jaxvid, in a checkout and in an installed package."""

import importlib
import importlib.util
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent
# In an installed package, the configs are in the package. In a checkout, they are beside it.
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")


def config_names() -> list[str]:
    """Return the names of the configs that come with jaxvid, e.g. `motion`."""
    folder = _folder()
    files = folder.glob("*.py") if folder else ()
    return sorted(path.stem for path in files if path.stem not in ("common", "__init__"))


def find_config(text: str) -> str:
    """Replace the name of a config that comes with jaxvid by its file.

    Args:
        text: `NAME`, `NAME:VARIANT`, or a file, which is returned unchanged.
    """
    name, colon, variant = text.partition(":")
    if name in config_names() and not Path(name).is_file():
        return f"{_folder() / name}.py{colon}{variant}"
    return text


def provide_configs() -> None:
    """Make `from configs import common` work in config files outside a checkout."""
    folder = _folder()
    if folder is None or importlib.util.find_spec("configs") is not None:
        return
    if folder.parent == PACKAGE:
        sys.modules["configs"] = importlib.import_module("jaxvid.configs")
    else:
        sys.path.append(str(folder.parent))


def _folder() -> Path | None:
    return next((folder for folder in FOLDERS if (folder / "common.py").is_file()), None)
