"""The user's cache of weights: one slot per source, shared by concurrent processes."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jaxvid import locks, model_path
from jaxvid.atomic import write_file
from jaxvid.errors import InputError
from jaxvid.files import cache_dir, read_limited

POLL_SECONDS = 0.2
MAX_RECORD_BYTES = 10_000


@dataclasses.dataclass(frozen=True)
class Slot:
    """A folder of the cache with the converted weights of one source.

    It contains the model folder, `source.sha256` in the format of `sha256sum`, and the downloaded
    file until it is converted.

    Attributes:
        name: Name of the folder in `weights` in the cache.
        model_name: Name of the model folder in the slot.
    """

    name: str
    model_name: str = "model"

    @property
    def folder(self) -> Path:
        """The slot."""
        return cache_dir() / "weights" / self.name

    @property
    def model(self) -> Path:
        """The model folder."""
        return self.folder / self.model_name

    @property
    def record(self) -> Path:
        """The file with the SHA-256 of the source."""
        return self.folder / "source.sha256"

    def is_ready(self) -> bool:
        """Return whether the model folder exists."""
        return model_path.exists(self.model)

    @contextlib.contextmanager
    def locked_unless_ready(self) -> Iterator[bool]:
        """Hold the lock of the slot while the body runs, unless the model folder exists.

        While another process holds the lock, wait for that process.

        Yields:
            Whether the model folder exists.

        Raises:
            InputError: The cache cannot be written, or its file system does not support locks.
        """
        with contextlib.ExitStack() as stack:
            if not self.is_ready():
                self._lock(stack)
            yield self.is_ready()

    def _lock(self, stack: contextlib.ExitStack) -> None:
        """Acquire the lock, which `stack` releases."""
        remedy = "set JAXVID_CACHE to another folder"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            is_locked = self._wait_for_lock(stack)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be written ({error.strerror}); {remedy}"
            ) from None
        if not is_locked:
            raise InputError(f"{self.folder}: the file system does not support locks; {remedy}")

    def _wait_for_lock(self, stack: contextlib.ExitStack) -> bool:
        """Acquire the lock; return False if the file system does not support locks."""
        has_printed = False
        while True:
            try:
                return stack.enter_context(locks.locked(self.folder / ".lock"))
            except locks.LockedError as error:
                if not has_printed:
                    print(f"{self.name}: waiting for {error.holder}", file=sys.stderr, flush=True)
                has_printed = True
                time.sleep(POLL_SECONDS)

    def is_first_file(self, digest: str) -> bool:
        """Return whether a file is the first one of this slot, or has the same SHA-256 as that one.

        Raises:
            InputError: The record of the SHA-256 cannot be read.
        """
        try:
            text = read_limited(self.record, MAX_RECORD_BYTES).decode(errors="replace")
        except FileNotFoundError:
            return True
        return text.split()[:1] == [digest]

    def record_sha256(self, digest: str, file: str) -> None:
        """Record the SHA-256 of the file that has this name."""
        write_file(self.record, f"{digest}  {file}\n".encode("utf-8", "surrogateescape"))
