"""Batch size and schedule that are chosen from the number of training videos.

A field of `FIELDS` is chosen if its value is `CHOSEN`. A resumed run keeps the values of its first
start.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxvid.config import CHOSEN, flatten
from jaxvid.storage.dtype_choice import AUTO
from jaxvid.training.checkpoint_files import find_steps

FIELDS = (
    *("batch_size", "num_epochs", "optimizer.warmup_epochs", "log_steps"),
    *("eval.every_epochs", "checkpoint_every_epochs"),
)
MIN_STEPS = 400
EPOCHS = (20, 100)  # minimum and maximum
BATCH_SIZES = (2, 8)  # minimum and maximum
STEPS_PER_EPOCH = 8  # with a smaller batch if there are fewer
WARMUP_SHARE = 0.1
POINTS = 20  # of each curve
MAX_LOG_STEPS = 20
PROPOSAL = (
    f"this training has fewer than {MIN_STEPS // 4} steps; to choose batch size and schedule by "
    f"the number of training videos, set {' '.join(f'--config.{name}={CHOSEN}' for name in FIELDS)}"
)


def chosen_fields(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the fields that are to be chosen.

    Args:
        config: A complete config as a nested dict.
    """
    values = flatten(config)
    return [name for name in FIELDS if values[name] == CHOSEN]


def saved_choice(config: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """Return the values of these fields, and of the dtype `auto`, in the run that is resumed.

    Args:
        config: A complete config as a nested dict.
        workdir: The run's folder. For a new run, the result is empty.
    """
    names = chosen_fields(config)
    if config["model"]["dtype"] == AUTO:
        names.append("model.dtype")
    if not names or not find_steps(workdir):
        return {}
    try:
        saved = flatten(json.loads((workdir / "config.json").read_text()))
        return {name: saved[name] for name in names}
    except (OSError, ValueError, AttributeError, KeyError):
        return {}  # a damaged file is reported when the configs are compared


def choose(config: Mapping[str, Any], *, num_clips: int, multiple: int) -> dict[str, Any]:
    """Choose the fields for a training set.

    The batch is the largest power of two, up to 8, with which an epoch has at least 8 steps. The
    training has at least 20 epochs and at least 400 steps, but at most 100 epochs, with warm-up in
    the first tenth. It evaluates and saves about 20 times, and writes at least 20 rows of metrics.

    Args:
        config: A complete config as a nested dict.
        num_clips: Clips per epoch.
        multiple: The batch size must be a multiple of this number.

    Returns:
        Name → value of each field that is to be chosen. Fields with other values stay as they are,
        and the chosen ones fit them.
    """
    given, names = flatten(config), chosen_fields(config)
    batch_size, epochs = given["batch_size"], given["num_epochs"]
    if batch_size == CHOSEN:
        batch_size = 2 ** int(math.log2(np.clip(num_clips / STEPS_PER_EPOCH, *BATCH_SIZES)))
        batch_size = multiple * math.ceil(batch_size / multiple)
    steps_per_epoch = num_clips / batch_size
    if epochs == CHOSEN:
        epochs = float(np.clip(math.ceil(MIN_STEPS / steps_per_epoch), *EPOCHS))
    chosen = {
        "batch_size": batch_size,
        "num_epochs": epochs,
        "optimizer.warmup_epochs": round(WARMUP_SHARE * epochs, 4),
        "log_steps": int(np.clip(epochs * steps_per_epoch / POINTS, 1, MAX_LOG_STEPS)),
        "eval.every_epochs": round(epochs / POINTS, 4),
        "checkpoint_every_epochs": round(epochs / POINTS, 4),
    }
    return {name: chosen[name] for name in names}


def describe(chosen: Mapping[str, Any], num_clips: int) -> str:
    """Describe the chosen values in one line, for the log."""
    values = ", ".join(f"{name}={value:g}" for name, value in chosen.items())
    return f"chosen for an epoch of {num_clips} clips: {values}"


def is_short(num_clips: int, batch_size: int, num_epochs: float) -> bool:
    """Return whether a training has so few steps that `PROPOSAL` applies."""
    return num_clips * num_epochs / batch_size < MIN_STEPS / 4
