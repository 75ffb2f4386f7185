"""Free disk space for a run's outputs, outputs of an earlier run, and the use of the model."""

import math
import os
import shlex
import shutil
import sys
from pathlib import Path

import jax

from jaxvid import atomic, files
from jaxvid.distributed import collectives
from jaxvid.errors import InputError
from jaxvid.logs import log
from jaxvid.storage import model_card
from jaxvid.training import checkpoint_files

# Outputs that a run writes only after its first checkpoint.
LATE_OUTPUTS = (
    *("best", "model", "eval.json", "eval_videos.csv", "eval.html", "comparison.json"),
    *("confusion.png", "checkpoints.json"),
)
OUTPUTS = (
    *("metrics.jsonl", "tensorboard", "curves.png", "profile", "skipped.jsonl"),
    *("config.json", "starts.jsonl", "training_videos.json.gz", *LATE_OUTPUTS),
)


def check_writable(workdir: Path, need_bytes: int) -> None:
    """Check, before any work is done, that the results can be written.

    Args:
        workdir: The folder, which is created.
        need_bytes: Total size of the outputs. Checkpoints and model folders that exist already are
            included: their space counts as free.

    Raises:
        InputError: The folder cannot be written, or its disk has too little free space.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe{jax.process_index()}"
        probe.write_bytes(bytes(4096))
        probe.unlink()
        need_bytes -= sum(
            sum(files.file_sizes(workdir / name).values())
            for name in ("checkpoints", "best", "model")
        )
        free = shutil.disk_usage(workdir).free
    except OSError as error:
        raise InputError(
            f"{workdir}: cannot be written to ({error.strerror}); choose another --workdir"
        ) from None
    if free < need_bytes:
        raise InputError(
            f"{workdir}: {free / 1e6:.0f} MB free, but the outputs need {need_bytes / 1e6:.0f} MB; "
            "make room or choose another --workdir"
        )


def check_room(workdir: Path, abstract_state: dict, *, keep: int) -> None:
    """Check that the checkpoints and model folders of a run can be written.

    Args:
        workdir: The run's folder.
        abstract_state: Shapes of the training state.
        keep: Number of checkpoints to keep.

    Raises:
        InputError: The folder cannot be written, or its disk has too little free space.
    """
    state_bytes, weight_bytes = map(num_bytes, (abstract_state, abstract_state["params"]))
    # The disk must hold keep + 1 checkpoints, because the oldest is deleted only after the newest
    # is saved. It must hold the weights three times: in `best`, in `model`, and in the new version
    # of one of these folders while it is saved. 1 MB is reserved for the other files.
    check_writable(workdir, state_bytes * (keep + 1) + 3 * weight_bytes + 10**6)


def num_bytes(tree: dict) -> int:
    """Return the size of a tree of arrays or shapes, at four bytes per number."""
    return sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(tree))


def starts_over(workdir: Path) -> bool:
    """Return whether the workdir has outputs of an earlier run whose checkpoints were deleted.

    Only `LATE_OUTPUTS` count. The other outputs may be those of a run that was killed before its
    first checkpoint, which the next start completes.
    """
    return not checkpoint_files.find_steps(workdir) and any(
        (workdir / name).exists() for name in LATE_OUTPUTS
    )


def tidy_outputs(workdir: Path) -> None:
    """Repair half-written model folders of a killed run, and move outputs of an earlier run aside.

    If the checkpoints of an earlier run were deleted, the other outputs of that run are moved to
    `WORKDIR/previous`. If they stayed, the new run would append to the old metrics and compare its
    models with the old best model. The files of a run that was killed before its first checkpoint
    stay, as the next start writes the same files again. All processes must call this function.

    Args:
        workdir: The run's folder.

    Raises:
        InputError: The outputs cannot be moved.
    """
    collectives.barrier("outputs")  # other processes may still read weights from `best/`
    collectives.raise_on_all_processes(_tidy_outputs, workdir)


def _tidy_outputs(workdir: Path) -> None:
    if jax.process_index():
        return
    for name in ("best", "model"):
        atomic.recover(workdir / name, model_card.CARD_NAME)
    if not starts_over(workdir):
        return
    target = checkpoint_files.free_path(workdir / "previous")
    try:
        target.mkdir()
        # LATE_OUTPUTS come last, so that the next start completes an interrupted move.
        for name in OUTPUTS:
            if (workdir / name).exists():
                (workdir / name).rename(target / name)
    except OSError as error:
        raise InputError(
            f"{workdir}: the outputs of an earlier run cannot be moved to {target} "
            f"({error.strerror}); choose another --workdir"
        ) from None
    log.info("%s: no checkpoint; the outputs of the earlier run are now in %s", workdir, target)


def describe_use(folder: Path, *, generated: bool) -> str:
    """Return the commands with which users continue after a training, on videos of their own.

    Args:
        folder: The model folder of the run.
        generated: Whether the training videos are generated, so that the classes do not occur in
            other videos.
    """
    python = min(sys.executable, os.path.relpath(sys.executable), key=len)
    command, model = f"  {shlex.quote(python)} -m jaxvid", shlex.quote(str(folder))
    if not generated:
        return f"To classify your own clip:\n{command} predict CLIP.mp4 --model {model}"
    return (
        "The model knows only the generated motions. To classify your own clip with released "
        f"weights, which are downloaded:\n{command} predict CLIP.mp4 --model stam_16\n"
        "To train on your own classes, with one folder per class (MY_VIDEOS/CLASS/*.mp4):\n"
        f"{command} train --config finetune:{model},MY_VIDEOS --workdir runs/mine"
    )
