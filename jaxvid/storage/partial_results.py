"""Partial results of an interrupted program, from which it is resumed."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np

from jaxvid.atomic import write_file
from jaxvid.distributed import collectives
from jaxvid.errors import InputError


class PartialResults:
    """Stores the results of each batch on disk, so that an interrupted program can be resumed.

    Args:
        folder: Folder of the stored batches.
        key: Everything that the results depend on. Batches stored under another key are deleted.

    Attributes:
        note: One line that says why `load` deleted stored batches; empty if it deleted none.
    """

    def __init__(self, folder: Path, key: dict):
        self._folder, self._key = folder, json.dumps(key, sort_keys=True, default=str)
        self._count = 0
        self.note = ""

    def load(self) -> list[dict]:
        """Return the stored batches in order, or an empty list if the key differs.

        All processes must call this.

        Raises:
            InputError: The folder cannot be written, or old batches cannot be deleted.
        """
        # Process 0 decides for all: no other process may read what it deletes.
        if not collectives.gather(self._has_same_key())[0]:
            collectives.raise_on_all_processes(self._start_over)
            return []
        parts = []
        # A damaged batch and all batches after it are evaluated again.
        while part := read_batch(self._folder, len(parts)):
            parts.append(part)
        # Use only batches that all processes see: on a shared file system, new files may not be
        # visible to all machines yet.
        self._count = min(collectives.gather(len(parts)))
        return parts[: self._count]

    def _start_over(self) -> None:
        if not jax.process_index():
            if (self._folder / "0.npz").is_file():
                self.note = (
                    "the results of an interrupted run cannot be used, because these differ: "
                    f"{', '.join(self._changed_entries())}; starting again"
                )
            shutil.rmtree(self._folder, ignore_errors=True)
            # A batch that could not be deleted would be read as a result of the new key.
            if next(self._folder.glob("*.npz"), None):
                raise InputError(f"{self._folder} cannot be deleted; delete it by hand")
            write_file(self._folder / "key.json", self._key.encode())

    def _changed_entries(self) -> tuple[str, ...]:
        """Return the names of the entries of the key that differ from those of the stored key."""
        new = json.loads(self._key)
        try:
            old = json.loads((self._folder / "key.json").read_text(encoding="utf-8"))
            return tuple(name for name in new if name not in old or old[name] != new[name])
        except (OSError, ValueError, TypeError):  # missing or damaged
            return tuple(new)

    def _has_same_key(self) -> bool:
        try:
            return (self._folder / "key.json").read_text(encoding="utf-8") == self._key
        except (OSError, ValueError):  # missing or damaged
            return False

    def add(self, part: dict) -> None:
        """Store the next batch (on process 0).

        Raises:
            InputError: The file cannot be written.
        """
        number = self._count
        self._count += 1
        if not jax.process_index():
            write_batch(self._folder, number, part)

    def remove(self) -> None:
        """Delete all stored batches (on process 0)."""
        if not jax.process_index():
            shutil.rmtree(self._folder, ignore_errors=True)


def write_batch(folder: Path, number: int, batch: dict, *, writer: str = "") -> None:
    """Write a batch atomically.

    Args:
        folder: Folder of the stored batches.
        number: Number of the batch.
        batch: Name → array; `error` is a list of texts.
        writer: As in `write_file`.

    Raises:
        InputError: The file cannot be written.
    """
    file = io.BytesIO()
    np.savez(file, **{**batch, "error": np.array(batch["error"], str)})
    write_file(folder / f"{number}.npz", file.getvalue(), writer=writer)


def read_batch(folder: Path, number: int) -> dict | None:
    """Return a batch that `write_batch` wrote, or None if it is missing or damaged."""
    try:
        # np.load does not close a damaged file that it opened itself.
        file = io.BytesIO((folder / f"{number}.npz").read_bytes())
        with np.load(file) as arrays:
            return {**arrays, "error": arrays["error"].tolist()}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
