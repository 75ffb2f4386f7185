"""Files of a run's checkpoints: steps, checksums, uploads, and folders that are moved aside."""

import json
import threading
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jaxvid import files, remote_folder
from jaxvid.atomic import write_file
from jaxvid.distributed import collectives
from jaxvid.errors import InputError, one_line
from jaxvid.logs import log
from jaxvid.remote_lock import LostLockError

_write_lock = threading.Lock()


def find_steps(workdir: Path) -> list[int]:
    """Return the steps of a run's complete checkpoints, in ascending order."""
    return sorted(ocp.utils.checkpoint_steps((workdir / "checkpoints").resolve()))


def write_checksums(workdir: Path) -> None:
    """Write the checksums of all checkpoints' files to `WORKDIR/checkpoints.json`.

    They reveal damage before a checkpoint is restored. Orbax notices it late, or not at all.
    """
    with _write_lock:
        checksums = _read_checksums(workdir)
        steps = {str(step): workdir / "checkpoints" / str(step) for step in find_steps(workdir)}
        if steps.keys() != checksums.keys():
            checksums = {
                step: checksums.get(step) or files.checksums(folder)
                for step, folder in steps.items()
            }
            write_file(workdir / "checkpoints.json", json.dumps(checksums).encode())


def upload(workdir: Path) -> None:
    """Upload the changed files of a workdir in an object store; log a failure as a warning.

    Raises:
        LostLockError: Another run has taken over the workdir.
    """
    try:
        remote_folder.push(workdir)
    except LostLockError:
        raise
    except InputError as error:  # the next call tries again
        log.warning("the checkpoint was not uploaded: %s", error)


def _read_checksums(workdir: Path) -> dict[str, dict[str, int]]:
    """Return the contents of `WORKDIR/checkpoints.json`: step → file → checksum."""
    try:
        return json.loads((workdir / "checkpoints.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


def check_files(workdir: Path, step: int) -> bool:
    """Compare a checkpoint's files with their checksums.

    Returns:
        True if all files are unchanged; False if the checkpoint has no checksums.

    Raises:
        ValueError: Some files are missing or changed.
    """
    expected = _read_checksums(workdir).get(str(step))
    if expected is None:  # the run was killed before it wrote them
        return False
    actual = files.checksums(workdir / "checkpoints" / str(step))
    if wrong := [name for name, checksum in expected.items() if actual.get(name) != checksum]:
        raise ValueError(
            f"{len(wrong)} of {len(expected)} files are missing or changed: {wrong[0]}"
        )
    return True


def check_files_on_all_processes(workdir: Path, step: int) -> bool:
    """Compare a checkpoint's files with their checksums on all processes.

    All processes get the same result, so that either all restore the checkpoint or none does.

    Returns:
        True if the files are unchanged on all processes; False if a process has no checksums.

    Raises:
        ValueError: Some files are missing or changed on a process.
    """
    is_intact, reason = False, None
    try:
        is_intact = check_files(workdir, step)
    except (ValueError, OSError) as error:
        reason = one_line(error)
    checks = collectives.gather([is_intact, reason])
    for _, reason in checks:
        if reason is not None:
            raise ValueError(reason)
    return all(is_intact for is_intact, _ in checks)


def free_path(path: Path) -> Path:
    """Return the path, with `_again` appended as often as needed to get a path that is unused."""
    while path.exists():
        path = path.with_name(f"{path.name}_again")
    return path


def move_aside(workdir: Path, step: int) -> Path:
    """Move a checkpoint to `WORKDIR/damaged` and return its new path. All processes call it."""
    target = free_path(workdir / "damaged" / f"{step}")
    collectives.barrier(f"damaged {step}")
    if not jax.process_index():
        target.parent.mkdir(exist_ok=True)
        (workdir / "checkpoints" / str(step)).rename(target)
    collectives.barrier(f"moved {step}")
    return target
