"""A run's config: kept in its workdir, and compared with what continues it or runs beside it."""

import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxvid.atomic import write_file
from jaxvid.config import differences, flatten, translate
from jaxvid.distributed import collectives, sharding
from jaxvid.errors import InputError
from jaxvid.training import optim
from jaxvid.training.checkpoint import find_steps
from jaxvid.training.distillation import check_distill

# What may differ between a run and its continuation: how it runs, not what it computes.
FREE_FIELDS = (
    *("mesh.", "eval.", "checkpoint_", "log_steps"),
    *("data.num_threads", "data.max_failed_share", "data.missing", "data.stall_seconds"),
    "data.skip_broken",
)

# Fields that the config.json of an older run lacks, and the value that it ran with.
ADDED_FIELDS = {"data.color_matrix": "auto"}

# What the processes of one run may have of their own.
OWN_FIELDS = ("data.folder", "data.prefix", "data.num_threads", "data.num_workers")


def check_config(config, mesh) -> None:
    """Refuses what cannot be trained, before anything else is done.

    Raises:
        InputError: Names the field, its value and what is possible.
    """
    sharding.check_batch_size("batch_size", config.batch_size, mesh)
    for name in ("num_epochs", "log_steps", "checkpoint_keep", "checkpoint_every_epochs"):
        if config[name] <= 0:
            raise InputError(f"{name}={config[name]}: must be above 0")
    if config.data.stall_seconds <= 0:
        raise InputError(f"data.stall_seconds={config.data.stall_seconds}: must be above 0")
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * max(1, config.accumulate_steps)
    if config.accumulate_steps < 1 or config.batch_size % parts:
        raise InputError(
            f"accumulate_steps={config.accumulate_steps}, batch_size={config.batch_size}: the "
            f"batch must be a multiple of {parts} (mesh.data · mesh.fsdp · accumulate_steps)"
        )
    if config.mixup_alpha and config.cutmix_alpha:
        values = f"mixup_alpha={config.mixup_alpha}, cutmix_alpha={config.cutmix_alpha}"
        raise InputError(f"{values}: only one can be used")
    if not 0 <= config.ema_decay < 1:
        raise InputError(f"ema_decay={config.ema_decay}: must be at least 0 and below 1")
    optim.check_optimizer(config.optimizer)
    check_distill(config.distill)


def check_same_run(config, workdir: Path) -> None:
    """Refuses a workdir whose checkpoints were made with another config, and says what differs.

    Raises:
        InputError: Names every field that differs, with both values.
    """
    if not find_steps(workdir):
        return
    found = compare_config(workdir, config).items()
    if changed := [text for name, text in found if not name.startswith(FREE_FIELDS)]:
        raise InputError(
            f"{workdir} holds a run with another config ({'; '.join(changed)}); "
            "choose another --workdir or delete this one"
        )


def check_same_everywhere(config: ConfigDict) -> None:
    """Refuse processes of one run that have different configs.

    Raises:
        InputError: Names every field that differs, with both values.
    """
    first, *others = map(flatten, collectives.gather(config.to_dict()))
    for process, values in enumerate(others, 1):
        found = differences(
            first, values, there="in process 0", here=f"in process {process}", ignore=OWN_FIELDS
        )
        if found:
            raise InputError(f"{'; '.join(found.values())}; start all with the same flags")


def save_config(config, workdir: Path) -> None:
    """Writes `WORKDIR/config.json` (on the first process)."""
    if not jax.process_index():
        write_file(
            workdir / "config.json", (json.dumps(config.to_dict(), indent=2) + "\n").encode()
        )


def compare_config(workdir: Path, config) -> dict[str, str]:
    """How a config differs from the one that a run was started with.

    Args:
        workdir: The run's folder; without `config.json` nothing differs.
        config: A ConfigDict.

    Returns:
        Field (`model.width`) → "model.width: 64 before, 32 now".

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
    now = flatten(json.loads(json.dumps(config.to_dict())))
    before = {name: value for name, value in ADDED_FIELDS.items() if name in now} | before
    for fields in (before, now):  # training uses `tagged` for `auto`
        if fields.get("data.color_matrix") == "auto":
            fields["data.color_matrix"] = "tagged"
    return differences(before, now, there="before", here="now")
