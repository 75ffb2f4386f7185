"""A lock on a folder in an object store: an object that its holder renews.

A run creates `LOCK` in the folder, with an id, its process and machine, and the time. A thread
writes the time again every `RENEW_SECONDS`. Another run that finds a lock with a time of the last
`STALE_SECONDS` is refused. It takes over an older lock, whose run was killed. The clocks of the
machines must therefore agree to within about a minute.

Two runs can create a lock at the same time only in a store that ignores the condition
`If-None-Match`, or when both take over the same stale lock. Each reads the lock again after
`SETTLE_SECONDS`, and the one that wrote last holds it.
"""

import contextlib
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from jaxvid import object_store
from jaxvid.errors import InputError
from jaxvid.locks import LockedError, locked

LOCK = ".jaxvid-lock.json"
RENEW_SECONDS = 20.0
STALE_SECONDS = 120.0
SETTLE_SECONDS = 1.0


class LostLockError(InputError):
    """Another run holds the lock, or has taken it over."""


class RemoteLock:
    """The lock of one run on a folder.

    Args:
        folder: Address of the folder.
        owner: Id of the run's local copy. A lock with this id is a lock of an earlier run that was
            killed, and is taken over at once.
    """

    def __init__(self, folder: str, owner: str):
        self._folder, self._address, self._owner = folder, f"{folder}/{LOCK}", owner
        self._is_released, self._loss = threading.Event(), None
        self._thread = threading.Thread(target=self._renew, name="remote lock", daemon=True)

    def acquire(self) -> None:
        """Create the lock and start to renew it.

        Raises:
            InputError: Another run holds the lock, or the store cannot be reached or refuses
                access.
        """
        if (stored := self._read()) is not None:
            if stored["owner"] != self._owner:
                self._check_stale(stored)
            object_store.delete([self._address])
        if not object_store.create(self._address, self._content()):
            self.check()  # a repeated request finds the lock that the first one created
        time.sleep(SETTLE_SECONDS)
        self.check()
        self._thread.start()

    def _check_stale(self, stored: dict) -> None:
        """Refuse to take over a lock that was renewed recently; print a line for a stale one."""
        age = max(0.0, time.time() - stored["time"])
        if age < STALE_SECONDS:
            raise InputError(
                f"{self._folder}: in use by another run ({stored['holder']}, {age:.0f} s ago); "
                "wait until that run has ended or choose another folder. If it was killed, run "
                f"the same command again in {STALE_SECONDS - age:.0f} s"
            )
        print(
            f"{self._folder}: the run that used it ({stored['holder']}) was killed or lost its "
            f"connection {age:.0f} s ago; continuing",
            file=sys.stderr,
        )

    def check(self) -> None:
        """Check that no other run has taken over the lock. Once one has, the lock stays lost.

        Raises:
            LostLockError: Another run has; it may have ended since.
            InputError: The store cannot be reached or refuses access.
        """
        if self._loss is None:
            stored = self._read()
            if stored is None:
                self._loss = (
                    f"{self._folder}: another run has taken over the folder and has ended; run the "
                    "same command again to continue where it ended, or choose another folder"
                )
            elif stored["owner"] != self._owner:
                self._loss = (
                    f"{self._folder}: in use by another run ({stored['holder']}); wait until that "
                    "run has ended or choose another folder"
                )
        if self._loss is not None:
            raise LostLockError(self._loss)

    def release(self) -> None:
        """Delete the lock, unless another run has taken it over."""
        self._is_released.set()
        self._thread.join()
        with contextlib.suppress(InputError):  # without a connection, the lock becomes stale
            self.check()
            object_store.delete([self._address])

    def _renew(self) -> None:
        while not self._is_released.wait(RENEW_SECONDS):
            with contextlib.suppress(InputError):  # `check` raises it again before an upload
                self.check()
                object_store.write(self._address, self._content())

    def _content(self) -> bytes:
        holder = f"process {os.getpid()} on {platform.node()}"
        value = {"owner": self._owner, "holder": holder, "time": time.time()}
        return json.dumps(value).encode()

    def _read(self) -> dict | None:
        """Return the contents of the lock, or None if there is none. A damaged lock is stale."""
        if (data := object_store.read(self._address)) is None:
            return None
        try:
            value = json.loads(data)
            return {
                "owner": str(value["owner"]),
                "holder": str(value["holder"]),
                "time": float(value["time"]),
            }
        except (ValueError, KeyError, TypeError):
            return {"owner": "", "holder": "an unknown process", "time": 0.0}


def owner_path(local: Path) -> Path:
    """Return the path of the file with the owner id of a local copy, which exists while locked."""
    return local.with_name(f".{local.name}.owner")


@contextlib.contextmanager
def held(folder: str, local: Path) -> Iterator[RemoteLock]:
    """Hold the lock of a folder while the body runs.

    Args:
        folder: Address of the folder.
        local: The local copy of the folder. A lock file beside it excludes other runs on this
            machine. Therefore a lock object with the id of this copy is that of a killed run.

    Raises:
        InputError: Another run holds the lock, or the store cannot be reached or refuses access.
    """
    path = owner_path(local)
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            has_locks = stack.enter_context(locked(local.with_name(f".{local.name}.lock")))
            if not has_locks or not path.exists():
                path.write_text(uuid.uuid4().hex)
            lock = RemoteLock(folder, path.read_text())
        except LockedError as error:
            raise InputError(
                f"{folder}: in use by another run ({error.holder}); wait until that run has ended "
                "or choose another folder"
            ) from None
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); set JAXVID_CACHE to another folder"
            ) from None
        lock.acquire()
        try:
            yield lock
        finally:
            lock.release()
            path.unlink(missing_ok=True)
