"""Lock files."""

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


class LockedError(Exception):
    """Another process holds a lock.

    Attributes:
        holder: Process id and machine of the holder, if known.
    """

    def __init__(self, holder: str):
        super().__init__(holder)
        self.holder = holder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock while the body runs. The system releases it if the process dies.

    Args:
        path: The lock file. It is created, contains the process id and machine of the holder, and
            is removed at the end.

    Yields:
        True if the lock is held; False if the file system does not support locks.

    Raises:
        LockedError: Another process holds the lock.
        OSError: The file cannot be created.
    """
    file = _lock_file(path)
    try:
        yield file is not None
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        if file is not None:
            file.close()


def _lock_file(path: Path) -> TextIO | None:
    """Open and lock a file; return None if the file system does not support locks."""
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the file since it was opened.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}")
                file.flush()
                return file
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise LockedError(holder) from None
        except FileNotFoundError:
            pass  # removed between the two checks: try again
        except OSError:
            file.close()
            return None
        file.close()
