"""Writes metrics to metrics.jsonl and TensorBoard."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxvid.errors import InputError

# tensorboardX imports PyTorch if it is installed. This takes two seconds, and nothing here uses it.
_has_torch = "torch" in sys.modules
sys.modules.setdefault("torch", None)
from tensorboardX import summary  # noqa: E402
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402

if not _has_torch:
    del sys.modules["torch"]

MAX_CLASS_SCALARS = 50


class MetricWriter:
    """Writes scalars to `WORKDIR/metrics.jsonl` and to TensorBoard events in `WORKDIR/tensorboard`.

    Args:
        workdir: The run's folder.
        step: The step that the run starts or resumes at. Rows of later steps come from an earlier
            start that was killed; they are dropped.
    """

    def __init__(self, workdir: Path, step: int):
        self._files = None
        if jax.process_index():
            return
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        lines = [line for line in lines if _step_of(line) <= step]
        folder = workdir / "tensorboard"
        with disk_errors_as_input_errors(path):
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in lines))
            partial.replace(path)
            folder.mkdir(exist_ok=True)
            # tensorboardX's SummaryWriter hangs for ever once its thread has failed to write.
            self._files = path.open("a"), EventsWriter(str(folder / "events"))
        # This makes TensorBoard hide the events of later steps that an earlier start wrote.
        start = SessionLog(status=SessionLog.START)
        self._write_event(step=step + 1, session_log=start)

    def write(self, step: int, scalars: dict[str, float | None]) -> None:
        """Write one row of scalars; None stands for a missing value."""
        if self._files is None:
            return
        lines = self._files[0]
        with disk_errors_as_input_errors(lines.name):
            lines.write(json.dumps({"step": step, **scalars}) + "\n")
            lines.flush()
        for name, value in scalars.items():
            if value is not None:
                self._write_event(step=step, summary=summary.scalar(name, value))

    def write_classes(
        self, step: int, names: list[str], scores: np.ndarray, metric: str = "top1"
    ) -> None:
        """Write the score of each class to TensorBoard; above 50 classes, only a histogram.

        Args:
            step: The training step.
            names: Names of the classes.
            scores: `(num_classes,)` in percent; nan if the class has no videos.
            metric: Name of the score over all classes: `top1`, or `mAP` for average precisions.
        """
        known = np.isfinite(scores)
        kind = "ap" if metric == "mAP" else metric
        if len(names) > MAX_CLASS_SCALARS:
            bins = np.linspace(0, 100, 21)
            histogram = summary.histogram(f"val/class_{kind}", scores[known], bins)
            self._write_event(step=step, summary=histogram)
            return
        for i in np.flatnonzero(known):
            scalar = summary.scalar(f"val_class_{kind}/{names[i]}", scores[i])
            self._write_event(step=step, summary=scalar)

    def write_clips(self, step: int, video: np.ndarray) -> None:
        """Write clips `(b, t, h, w, c)` uint8 to TensorBoard, as one row of frames per clip."""
        b, t, h, w, c = video.shape
        rows = video.transpose(0, 2, 1, 3, 4).reshape(b * h, t * w, c)  # (b h) (t w) c
        image = summary.image("train/clips", rows, dataformats="HWC")
        self._write_event(step=step, summary=image)

    def _write_event(self, **fields: Any) -> None:
        if self._files is None:
            return
        events = self._files[1]
        with disk_errors_as_input_errors("tensorboard/"):
            events.write_event(Event(wall_time=time.time(), **fields))
            events.flush()

    def close(self) -> None:
        """Close the files."""
        for file in self._files or ():
            with contextlib.suppress(OSError):  # the error was raised when the row was written
                file.close()


@contextlib.contextmanager
def disk_errors_as_input_errors(path: str | Path) -> Iterator[None]:
    """Raise an InputError that names the file if it cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); free disk space, then run the same "
            "command to resume"
        ) from None


def last_evaluation(workdir: Path) -> int:
    """Return the newest step with validation metrics in `WORKDIR/metrics.jsonl`, or 0."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if _step_of(line) < float("inf")]
    return max((row["step"] for row in rows if "val/top1" in row), default=0)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # an incomplete last line: the run was killed while writing it
        return float("inf")
