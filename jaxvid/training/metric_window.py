"""Sums of training metrics between two rows of metrics.jsonl."""

import math
from collections import deque

import jax
import numpy as np

MIN_ROWS = 10  # minimum number of training rows of a run with at least as many steps


def sum_metrics(batches: list[dict]) -> dict[str, np.ndarray]:
    """Sum the metrics of several steps on the host, in float64 and int64."""
    host = jax.device_get(batches)
    return {
        name: sum(
            metrics[name].astype(np.float64 if metrics[name].dtype.kind == "f" else np.int64)
            for metrics in host
        )
        for name in (host[0] if host else ())
    }


def window_steps(log_steps: int, total_steps: int) -> int:
    """Return the number of steps per log window: `log_steps`, or fewer if the run is short."""
    return min(log_steps, max(1, total_steps // MIN_ROWS))


def training_row(sums: dict[str, np.ndarray], steps: int) -> dict[str, float | None]:
    """Compute the means of a log window.

    Args:
        sums: The sums of `steps.train_step`'s metrics over the window.
        steps: The window's number of training steps.

    Returns:
        Fields of a row of `metrics.jsonl`. Loss and accuracy (in percent) are means over clips;
        None if no clip could be decoded. The gradient norm is a mean over steps.
    """
    clips = sums["count"]
    return {
        "steps": steps,
        "train/loss": float(sums["loss"] / clips) if clips else None,
        "train/top1": float(100 * sums["top1"] / clips) if clips else None,
        "train/grad_norm": float(sums["grad_norm"] / steps),
    }


def describe_row(row: dict[str, float | None]) -> str:
    """Describe a training row for the log and the progress bar."""
    if row["train/loss"] is None:
        return "no video of these steps can be decoded"
    return f"loss {row['train/loss']:.3f}, top-1 {row['train/top1']:.1f} %"


class NonFiniteLossError(Exception):
    """A step's loss or gradient is not finite.

    Attributes:
        step: The step.
        ids: The ids of the step's videos.
    """

    def __init__(self, step: int, ids: list[str]):
        super().__init__(f"step {step}")
        self.step, self.ids = step, ids


class MetricWindow:
    """Sums of training metrics, which are read late, so that Python seldom waits for the device.

    The sums are over the steps since the last `take`. They become the next row of `metrics.jsonl`.
    Checkpoints include them, so that a resumed run writes the same row.

    Attributes:
        stop: Whether any process had received a signal by the newest step that was read.
    """

    def __init__(self):
        self._waiting: deque[tuple[int, dict, list[str]]] = deque()
        self._sums: dict[str, np.ndarray] = {}
        self._count = 0
        self.stop = False

    def add(self, step: int, metrics: dict[str, jax.Array], ids: list[str]) -> None:
        """Add a step's metrics, including `stop`, and the ids of its videos."""
        self._waiting.append((step, metrics, ids))

    def read(self, leave: int = 0) -> None:
        """Add the metrics of all but the newest `leave` steps to the sums; wait for the device.

        Raises:
            NonFiniteLossError: A step's loss or gradient is not finite.
        """
        while len(self._waiting) > leave:
            step, metrics, ids = self._waiting.popleft()
            host = jax.device_get(metrics)
            self.stop = self.stop or bool(host.pop("stop"))
            if not math.isfinite(host["loss"] + host["grad_norm"]):
                raise NonFiniteLossError(step, ids)
            self._sums = sum_metrics([self._sums, host] if self._count else [host])
            self._count += 1

    def take(self) -> tuple[dict[str, np.ndarray], int]:
        """Return the sums and the number of their steps, and reset both."""
        taken = self._sums, self._count
        self._sums, self._count = {}, 0
        return taken

    def get_state(self) -> dict:
        """Return the sums of the steps that were read, for a checkpoint."""
        return {
            "steps": self._count,
            "sums": {name: value.item() for name, value in self._sums.items()},
        }

    def set_state(self, state: dict) -> None:
        """Restore a state. JSON represents int64 and float64 exactly."""
        self._count = state["steps"]
        self._sums = {
            name: (np.float64 if isinstance(value, float) else np.int64)(value)
            for name, value in state["sums"].items()
        }
