"""One run at a time in a workdir."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxvid.distributed import collectives, process_group
from jaxvid.errors import InputError
from jaxvid.locks import LockedError, locked

LOCK = ".lock"


def exclusive(program: Callable) -> Callable:
    """Make a program `(config, workdir, ...)` hold the workdir's lock while it runs.

    Training and evaluation write the same reports, so one excludes the other. The first process of
    a run holds the lock for all.

    Raises:
        InputError: Another run holds the lock. Nothing in the workdir is touched then.
    """

    @functools.wraps(program)
    def run(config: Any, workdir: str | Path, **options: Any) -> Any:
        with contextlib.ExitStack() as stack:
            collectives.raise_on_all_processes(_enter, stack, Path(workdir))
            return program(config, workdir, **options)

    return run


def _enter(stack: contextlib.ExitStack, workdir: Path) -> None:
    """Lock a workdir until the stack is closed."""
    if (peers := process_group.current()) and peers.index:
        return
    try:
        stack.enter_context(_existing(workdir))
        held = stack.enter_context(locked(workdir / LOCK))
    except LockedError as error:
        raise InputError(
            f"{workdir}: another run uses it ({error.holder}); wait for it or choose another "
            "--workdir"
        ) from None
    except OSError as error:
        if (workdir / LOCK).exists():
            raise InputError(
                f"{workdir / LOCK} cannot be opened ({error.strerror}); a run of another user may "
                "use the workdir: choose another --workdir"
            ) from None
        return  # the workdir cannot be written; a later check reports it
    if not held:
        print(f"{workdir}: its file system has no locks; start one run at a time", file=sys.stderr)


@contextlib.contextmanager
def _existing(folder: Path) -> Iterator[None]:
    """Make a folder, and remove it at the end if it is empty."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
