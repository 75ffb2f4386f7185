"""The lock that limits a workdir to one run at a time."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxvid import remote_folder
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


def open_workdir(workdir: str | Path) -> contextlib.AbstractContextManager[Path]:
    """Return a context manager of the local copy of a workdir, as in `remote_folder.opened`.

    Raises:
        InputError: The workdir is an address, and there are several processes.
    """
    if is_remote(workdir) and process_group.current():
        raise InputError(
            f"{workdir}: the processes of a run need a folder that they share; choose another "
            "--workdir, e.g. on a network drive"
        )
    return remote_folder.opened(workdir)


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
