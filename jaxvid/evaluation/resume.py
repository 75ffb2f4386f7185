"""Partial results of an evaluation that was interrupted."""

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
    """Keeps the batches of an evaluation, so that it goes on where it was interrupted.

    Args:
        folder: Where to.
        key: What the batches depend on; those of another key are dropped.
    """

    def __init__(self, folder: Path, key: dict):
        self._folder, self._key = folder, json.dumps(key, sort_keys=True, default=str)
        self._count = 0

    def load(self) -> list[dict]:
        """The batches that are done, in order; all processes must call it.

        Raises:
            InputError: The folder cannot be written.
        """
        # The first process decides: what it removes, no other may read at that time.
        if not collectives.gather(self._is_same())[0]:
            collectives.raise_on_all_processes(self._begin)
            return []
        parts = []
        while part := self._read(len(parts)):
            parts.append(part)
        # On another machine, files may be seen later.
        self._count = min(collectives.gather(len(parts)))
        return parts[: self._count]

    def _begin(self) -> None:
        if not jax.process_index():
            shutil.rmtree(self._folder, ignore_errors=True)
            if next(self._folder.glob("*.npz"), None):  # it would be taken for one of this key
                raise InputError(f"{self._folder} cannot be removed; delete it")
            write_file(self._folder / "key.json", self._key.encode())

    def _is_same(self) -> bool:
        try:
            return (self._folder / "key.json").read_text(encoding="utf-8") == self._key
        except (OSError, ValueError):  # there is none, or it is damaged
            return False

    def _read(self, number: int) -> dict | None:
        """A batch; None: it is not there, or damaged, and is done again."""
        try:
            # NumPy leaves a damaged file open that it opened itself.
            file = io.BytesIO((self._folder / f"{number}.npz").read_bytes())
            with np.load(file) as arrays:
                return {**arrays, "error": arrays["error"].tolist()}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def add(self, part: dict) -> None:
        """Keeps one more batch (on the first process).

        Raises:
            InputError: It cannot be written.
        """
        path = self._folder / f"{self._count}.npz"
        self._count += 1
        if not jax.process_index():
            file = io.BytesIO()
            np.savez(file, **{**part, "error": np.array(part["error"], str)})
            write_file(path, file.getvalue())

    def remove(self) -> None:
        """Removes what is no longer needed."""
        if not jax.process_index():
            shutil.rmtree(self._folder, ignore_errors=True)
