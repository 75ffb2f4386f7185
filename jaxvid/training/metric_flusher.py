"""Writes the metrics of training steps to metrics.jsonl, the log and the progress bar."""

import dataclasses
from collections.abc import Callable

import jax

from jaxvid.distributed import collectives
from jaxvid.logs import RunProgress, log
from jaxvid.training.metric_window import MetricWindow, describe_row, training_row
from jaxvid.training.metric_writer import MetricWriter
from jaxvid.training.skipped_videos import SkippedVideos
from jaxvid.training.watchdog import Watchdog


@dataclasses.dataclass(kw_only=True)
class MetricFlusher:
    """Collects the metrics of training steps and writes one row per log window.

    Attributes:
        window: The open log window, which is part of each checkpoint.
        batch_size: Clips per step.
        total_steps: Steps of the whole run.
        schedule: Function from the step to the learning rate.
        writer: Writes the rows.
        skipped: Counts and lists videos that cannot be decoded.
        progress: The progress bar; it counts clips.
        stalls: Measures the share of time that is spent waiting for input.
        failures: `[id, reason]` of each video that could not be decoded since the last `read`.
    """

    window: MetricWindow
    batch_size: int
    total_steps: int
    schedule: Callable[[int], jax.Array]
    writer: MetricWriter
    skipped: SkippedVideos
    progress: RunProgress
    stalls: Watchdog
    failures: list[list[str]] = dataclasses.field(default_factory=list)

    def add(
        self, step: int, metrics: dict[str, jax.Array], ids: list[str], errors: list[str]
    ) -> None:
        """Add the metrics of a step, without waiting for the device.

        Args:
            step: The step's number.
            metrics: The metrics from `steps.train_step`, and `stop`.
            ids: The ids of the step's videos.
            errors: The decode error of each video; empty if it was decoded.
        """
        pairs = zip(ids, errors, strict=True)
        self.failures += [[id_, error] for id_, error in pairs if error]
        self.window.add(step, metrics, ids)

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        self.progress.advance(self.batch_size)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step; the first step is 1."""
        return float(self.schedule(step - 1))

    def read(self) -> None:
        """Read the metrics of all steps so far; all processes must call it at the same steps.

        Raises:
            NonFiniteLossError: A step's loss or gradient is not finite.
            InputError: Too many videos cannot be decoded.
        """
        self.skipped.note(sum(collectives.gather(self.failures), []))
        self.failures.clear()
        self.window.read()

    def write_row(self, step: int) -> None:
        """Write the log window to `metrics.jsonl`, and start the next one."""
        row = training_row(*self.window.take()) | {
            "learning_rate": self.learning_rate(step),
            "clips_per_second": self.progress.rate(),
            "input_wait_share": self.stalls.share("input"),
        }
        self.writer.write(step, row)
        line = describe_row(row)
        self.progress.advance(0, line)
        log.debug(
            "step %d/%d: %s, %.0f clips/s, %s left",
            step,
            self.total_steps,
            line,
            self.progress.rate(),
            self.progress.time_left(),
        )
