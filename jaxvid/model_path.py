"""Check of the name of a model, without JAX, so that a wrong one is reported at once."""

import contextlib
import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from jaxvid import atomic
from jaxvid.errors import InputError

CARD_NAME = "model.json"  # written last; a folder without this file is not a model folder
OF_A_RUN = ("model", "best")  # model folders in a workdir
# Names of presets, repeated from jaxvid.models, which takes seconds to import.
PRETRAINED = ("stam_8", "stam_16", "stam_32", "stam_64", "xvit_k600", "xvit_ssv2")
NOT_PRETRAINED = ("stam_tiny", "xvit_k400", "xvit_tiny")


def exists(folder: str | Path) -> bool:
    """Return whether a model folder exists, or its backup if replacing it was interrupted."""
    return (atomic.resolve(folder, CARD_NAME) / CARD_NAME).exists()


def check_model_path(model: str) -> None:
    """Refuse a name that is neither a model folder nor stands for released weights.

    The contents of files and URLs are not checked.

    Args:
        model: Value of `--model`.

    Raises:
        InputError: The message suggests a model folder nearby, if there is one.
    """
    path, is_wrong = Path(model), False
    with contextlib.suppress(OSError, ValueError):  # e.g. a name that is too long
        is_missing = model not in PRETRAINED and not os.path.lexists(path)
        is_wrong = is_missing or path.is_dir() or path.name == CARD_NAME
        is_wrong = is_wrong and "://" not in model and not exists(path)
    if is_wrong:
        raise InputError(describe_unknown(model))


def describe_unknown(model: str) -> str:
    """Return the error message for the name of a model that stands for nothing."""
    known = ", ".join(PRETRAINED)
    if model in NOT_PRETRAINED and not os.path.lexists(model):
        return (
            f"{model} has no released weights; train it and pass its model folder, or choose one "
            f"of {known}"
        )
    if near := os.sep not in model and difflib.get_close_matches(model, PRETRAINED, n=1):
        return f"{model} does not exist; did you mean {near[0]}?"
    message = describe_wrong_path(model)
    is_complete = message.endswith("?") or os.path.lexists(model)
    return message if is_complete else f"{message}, or one of {known}"


def describe_wrong_path(model: str | Path) -> str:
    """Return the error message for a path that is not a model folder."""
    path = Path(model)
    problem = "does not exist"
    if os.path.lexists(path):
        reason = "it is a file" if os.path.isfile(path) else f"no {path / CARD_NAME}"
        problem = f"is not a model folder ({reason})"
    with contextlib.suppress(OSError):  # e.g. no permission to list a folder
        for folder in _nearby(path):
            if exists(folder):
                return f"{model} {problem}; did you mean {folder}?"
    return f"{model} {problem}; choose a folder written by training or by a converter"


def _nearby(path: Path) -> Iterator[Path]:
    """Yield paths that may have been meant: of a run's models, and with similar names."""
    yield from (path / name for name in OF_A_RUN)
    if path.name == CARD_NAME:
        yield path.parent
    unknown = path  # the first part of the path that does not exist, or the path itself
    while not unknown.parent.exists():
        unknown = unknown.parent
    for name in difflib.get_close_matches(unknown.name, os.listdir(unknown.parent)):
        similar = unknown.with_name(name) / path.relative_to(unknown)
        yield from (similar, *(similar / name for name in OF_A_RUN))
