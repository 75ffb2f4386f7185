"""Settings and results of a step of the benchmark."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.sizes import Size
from jaxvid.errors import memory_problem

ROOT = Path(__file__).parents[2]
NOT_RUN = "not run: no time left"  # note of a row that was not measured


class Context:
    """The settings of a step, and its results so far.

    Rows are appended to a file at once, so that they remain if the step is killed.

    Args:
        size: Sizes of the measurements.
        results: The file of the step's results, one JSON object per line.
        work: Folder of intermediate files, which all steps of a run share.
        seconds: Time limit of the step.

    Attributes:
        size: Sizes of the measurements.
        results: The file of the step's results.
        work: Folder of intermediate files.
        failures: Messages of failed measurements.
    """

    def __init__(self, size: Size, results: Path, work: Path, seconds: float):
        """Remove the results of an earlier run."""
        self.size, self.results, self.work = size, results, work
        self.failures: list[str] = []
        self._end = time.monotonic() + seconds
        results.write_text("")

    @property
    def threads(self) -> int:
        """Number of decoding threads."""
        return self.size.threads or os.cpu_count() or 1

    def seconds_left(self) -> float:
        """Return the time until the limit of the step, minus a second for its end."""
        return self._end - time.monotonic() - 1.0

    def add(self, table: str, row: dict[str, Any]) -> None:
        """Append a row to a table. Values that are not finite become None."""
        row = {column: _plain(value) for column, value in row.items()}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"table": table, "row": row}) + "\n")

    def fail(self, title: str, message: str) -> str:
        """Count a failed measurement. Running out of memory is a result, not a failure.

        Args:
            title: Name of the measurement.
            message: The error.

        Returns:
            Text for the row of the measurement.
        """
        if memory_problem(RuntimeError(message)):
            return f"out of memory ({message})"
        self.failures.append(f"{title}: {message}")
        return f"failed: {message}"


def _plain(value: Any) -> Any:
    """Convert a value to one that JSON can represent."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
