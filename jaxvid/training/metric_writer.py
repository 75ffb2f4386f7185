"""Where numbers go: metrics.jsonl, TensorBoard, the log and the progress bar."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxvid.errors import InputError

MAX_CLASS_SCALARS = 50


class MetricWriter:
    """Writes scalars to `WORKDIR/metrics.jsonl` and to TensorBoard events in `WORKDIR/tensorboard`.

    Args:
        workdir: The run's folder.
        step: Where the run starts. What an earlier, killed run wrote for later steps is dropped,
            so that the file tells one story.
    """

    def __init__(self, workdir: Path, step: int):
        self._files = None
        if jax.process_index():
            return
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        folder = workdir / "tensorboard"
        with _told_if_not_written(path):
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            partial.replace(path)
            folder.mkdir(exist_ok=True)
            # tensorboardX's SummaryWriter hangs for ever once its thread has met a full disk.
            self._files = path.open("a"), EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)  # hides what is there of later steps
        self._write_event(step=step + 1, session_log=start)

    def write(self, step: int, scalars: dict[str, float | None]) -> None:
        """Writes one line of scalars; None: there is no such number."""
        if self._files is None:
            return
        lines = self._files[0]
        with _told_if_not_written(lines.name):
            lines.write(json.dumps({"step": step, **scalars}) + "\n")
            lines.flush()
        for name, value in scalars.items():
            if value is not None:
                self._write_event(step=step, summary=summary.scalar(name, value))

    def write_classes(self, step: int, names: list[str], accuracies: np.ndarray) -> None:
        """Writes each class's accuracy, in percent, to TensorBoard; above 50 a histogram.

        Args:
            step: When.
            names: Of the classes.
            accuracies: `(num_classes,)`; nan: the class has no videos.
        """
        known = np.isfinite(accuracies)
        if len(names) > MAX_CLASS_SCALARS:
            bins = np.linspace(0, 100, 21)
            histogram = summary.histogram("val/class_top1", accuracies[known], bins)
            self._write_event(step=step, summary=histogram)
            return
        for i in np.flatnonzero(known):
            scalar = summary.scalar(f"val_class_top1/{names[i]}", accuracies[i])
            self._write_event(step=step, summary=scalar)

    def write_clips(self, step: int, video: np.ndarray) -> None:
        """Writes clips `(b, t, h, w, c)` uint8 to TensorBoard, each a row of its frames."""
        b, t, h, w, c = video.shape
        rows = video.transpose(0, 2, 1, 3, 4).reshape(b * h, t * w, c)  # (b h) (t w) c
        image = summary.image("train/clips", rows, dataformats="HWC")
        self._write_event(step=step, summary=image)

    def _write_event(self, **fields) -> None:
        if self._files is None:
            return
        events = self._files[1]
        with _told_if_not_written("tensorboard/"):
            events.write_event(Event(wall_time=time.time(), **fields))
            events.flush()

    def close(self) -> None:
        """Closes the files."""
        for file in self._files or ():
            with contextlib.suppress(OSError):  # what was not written is told already
                file.close()


@contextlib.contextmanager
def _told_if_not_written(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); make room, then the same command "
            "continues"
        ) from None


def last_evaluation(workdir: Path) -> int:
    """The newest step whose validation stands in `WORKDIR/metrics.jsonl`; 0: there is none."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if _step_of(line) < float("inf")]
    return max((row["step"] for row in rows if "val/top1" in row), default=0)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the last line of a run that was killed while it wrote
        return float("inf")
