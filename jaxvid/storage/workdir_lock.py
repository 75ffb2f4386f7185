"""The lock that limits a workdir to one run at a time."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxvid import remote_folder, remote_lock
from jaxvid.distributed import collectives, process_group
from jaxvid.errors import InputError
from jaxvid.locks import LockedError, locked
from jaxvid.object_store import is_remote

LOCK = ".lock"


def exclusive(program: Callable) -> Callable:
    """Make a program `(config, workdir, ...)` hold the workdir's lock while it runs.

    Training and evaluation write the same files and therefore exclude each other. The first process
    of a run holds the lock for all processes of the run.

    Raises:
        InputError: Another run holds the lock, or the lock file cannot be opened. The workdir is
            then unchanged.
    """

    @functools.wraps(program)
    def run(config: Any, workdir: str | Path, **options: Any) -> Any:
        with contextlib.ExitStack() as stack:
            workdir = stack.enter_context(open_workdir(workdir))
            collectives.raise_on_all_processes(_lock, stack, workdir)
            return program(config, workdir, **options)

    return run


@contextlib.contextmanager
def open_workdir(workdir: str | Path) -> Iterator[Path]:
    """Yield the local copy of a workdir, as `remote_folder.opened`; all processes must call it.

    The processes of a run share the local copy of process 0, which copies and uploads the files.

    Raises:
        InputError: As in `remote_folder.opened`; or a process does not see the copy of process 0.
    """
    with contextlib.ExitStack() as stack:
        if not is_remote(workdir) or process_group.current() is None:
            yield stack.enter_context(remote_folder.opened(workdir))
            return
        local = collectives.raise_on_all_processes(_open_in_first_process, stack, workdir)
        owners = collectives.gather(_read_owner(local))
        for process, owner in enumerate(owners):
            if owner is None or owner != owners[0]:
                raise InputError(
                    f"{workdir}: process {process} does not see {local.parent} of process 0, the "
                    "local copy of the workdir; set JAXVID_CACHE to a folder that all processes "
                    "share"
                )
        yield local
        collectives.barrier("workdir")  # before process 0 removes the copy


def _open_in_first_process(stack: contextlib.ExitStack, workdir: str | Path) -> Path:
    """Open a workdir in process 0; return the path of its local copy in all processes."""
    if not process_group.current().index:
        stack.enter_context(remote_folder.opened(workdir))
    return remote_folder.local_folder(workdir)


def _read_owner(local: Path) -> str | None:
    """Return the id of a local copy, or None if this process does not see it."""
    with contextlib.suppress(OSError):
        return remote_lock.owner_path(local).read_text()
    return None


def _lock(stack: contextlib.ExitStack, workdir: Path) -> None:
    """Create and lock a workdir until the stack is closed; in the first process only."""
    if (peers := process_group.current()) and peers.index:
        return
    try:
        stack.enter_context(_created(workdir))
        is_locked = stack.enter_context(locked(workdir / LOCK))
    except LockedError as error:
        raise InputError(
            f"{workdir}: in use by another run ({error.holder}); wait until that run has ended or "
            "choose another --workdir"
        ) from None
    except OSError as error:
        if (workdir / LOCK).exists():
            raise InputError(
                f"{workdir / LOCK}: cannot be opened ({error.strerror}); choose another --workdir "
                "(a run of another user may be using this one)"
            ) from None
        return  # the workdir is not writable; a later check reports this
    if not is_locked:
        print(
            f"{workdir}: its file system does not support locks; start only one run at a time",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _created(folder: Path) -> Iterator[None]:
    """Create a folder if it is missing; on exit, remove it if this call created it and it is empty.

    Created parent folders are not removed.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
