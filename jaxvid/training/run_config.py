"""A run's config: saved in its workdir, and compared when the run is resumed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxvid.atomic import write_file
from jaxvid.config import differences, flatten, translate
from jaxvid.distributed import collectives
from jaxvid.errors import InputError
from jaxvid.models.implementation import CHOICES
from jaxvid.training.checkpoint import find_steps

# Fields, or prefixes of fields, that may change when a run is resumed: they do not affect the
# training itself except for rounding.
FREE_FIELDS = (
    *("mesh.", "eval.", "checkpoint_", "log_steps"),
    *("data.num_threads", "data.max_failed_share", "data.missing", "data.stall_seconds"),
    *("data.skip_broken", "data.cache_dir", "data.cache_gb"),
    *(f"model.{field}" for field in CHOICES),
)

# Fields that config.json of an older run does not contain, and the values that the run used.
ADDED_FIELDS = {
    **{"data.color_matrix": "auto", "deterministic": False, "mix_within": "batch"},
    **{"data.list": "", "data.val_share": 0.0, "data.group": ""},
    **{"data.sampler": "uniform", "data.repeats": 1, "loss.name": "softmax"},
    **{"loss.class_weights": "none", "data.cache_dir": "", "data.cache_gb": 20.0},
    **{f"data.{field}": "" for field in ("name", "tfds_dir", "splits.train", "splits.val")},
    **{"model.attention": "auto", "model.scan": "auto"},
}

# Fields that may differ between the processes of one run.
OWN_FIELDS = (
    *("data.folder", "data.tfds_dir", "data.list", "data.prefix"),
    *("data.num_threads", "data.num_workers", "data.cache_dir", "data.cache_gb"),
)


def check_same_run(config: Mapping[str, Any], workdir: Path) -> None:
    """Refuse a workdir whose checkpoints were made with a different config.

    Args:
        config: A complete config as a nested dict.
        workdir: The run's folder.

    Raises:
        InputError: Names every field that differs, with both values.
    """
    if not find_steps(workdir):
        return
    compared = compare_config(workdir, config).items()
    if changed := [text for name, text in compared if not name.startswith(FREE_FIELDS)]:
        raise InputError(
            f"{workdir} contains a run with a different config ({'; '.join(changed)}); "
            "choose another --workdir or delete this one"
        )


def check_same_everywhere(config: Mapping[str, Any]) -> None:
    """Refuse processes of one run that have different configs.

    Args:
        config: This process's config as a nested dict.

    Raises:
        InputError: Names every field that differs, with both values.
    """
    first, *others = map(flatten, collectives.gather(config))
    for process, values in enumerate(others, 1):
        changed = differences(
            first, values, there="in process 0", here=f"in process {process}", ignore=OWN_FIELDS
        )
        if changed:
            raise InputError(f"{'; '.join(changed.values())}; start all with the same flags")


def save_config(config: Mapping[str, Any], workdir: Path) -> None:
    """Write `WORKDIR/config.json` (on the first process)."""
    if not jax.process_index():
        write_file(workdir / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def compare_config(workdir: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Compare a config with the one that a run was started with.

    Args:
        workdir: The run's folder. Without a `config.json` the result is empty.
        config: A complete config as a nested dict.

    Returns:
        Each field that differs → a description, e.g. "model.width: 64 before, 32 now".

    Raises:
        InputError: `config.json` is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        return {}
    try:
        before = translate(flatten(json.loads(path.read_text())))
    except (ValueError, AttributeError):
        raise InputError(f"{path} is damaged; choose another --workdir") from None
    now = flatten(json.loads(json.dumps(config)))
    before = {name: value for name, value in ADDED_FIELDS.items() if name in now} | before
    for fields in (before, now):
        if not (fields.get("mixup_alpha") or fields.get("cutmix_alpha")):
            fields.pop("mix_within", None)  # not used
        if fields.get("data.color_matrix") == "auto":
            fields["data.color_matrix"] = "tagged"  # as training does
    return differences(before, now, there="before", here="now")
