"""Evaluation during training: validation metrics, the best model and the learning curves."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxvid.errors import with_addresses
from jaxvid.logs import log
from jaxvid.models import Params
from jaxvid.storage import model_folder
from jaxvid.training import checkpoint, plots
from jaxvid.training.metric_writer import MetricWriter
from jaxvid.training.signals import StopSignals
from jaxvid.training.steps import eval_params
from jaxvid.training.watchdog import Watchdog


class Results(Protocol):
    """The results of an evaluation."""

    def per_class(self) -> np.ndarray:
        """Return the accuracy or average precision of each class, in percent."""


@dataclasses.dataclass(kw_only=True)
class Validation:
    """Evaluates the weights during training, and keeps the best ones in `WORKDIR/best`.

    Attributes:
        workdir: The run's folder.
        labels: Names of the classes.
        metric: The score in the report by which the best weights are chosen: `top1` or `mAP`.
        evaluate: Function from weights to evaluation results.
        make_report: Function that makes the report from the results and the keyword `checkpoint`.
        describe: Function from a report to a description in one line.
        make_card: Function that makes the model card from the keyword `provenance`.
        manager: Saves checkpoints.
        writer: Writes the scores.
        signals: Ends an evaluation as soon as a signal is received.
        stalls: Logs a checkpoint that blocks.
        best: The highest score so far, in percent; -1: none yet.
        evaluated: The step of the newest evaluation; 0: none yet.
        failed: Ids of the videos that could not be decoded since the program started.
        results: The results of the last evaluation since the program started, or None.
        report: The report of `results`, or None.
    """

    workdir: Path
    labels: list[str]
    metric: str
    evaluate: Callable[[Params], Results]
    make_report: Callable[..., dict[str, Any]]
    describe: Callable[[dict[str, Any]], str]
    make_card: Callable[..., dict[str, Any]]
    manager: checkpoint.CheckpointManager
    writer: MetricWriter
    signals: StopSignals
    stalls: Watchdog
    best: float
    evaluated: int
    failed: set[str] = dataclasses.field(default_factory=set)
    results: Results | None = None
    report: dict[str, Any] | None = None

    def run(self, state: dict, step: int) -> None:
        """Evaluate a training state, write its metrics and keep the best weights."""
        with self.signals.end_at_once():
            self.results = self.evaluate(eval_params(state))
        self.report = self.make_report(self.results, checkpoint=f"step {step}")
        if self.report[self.metric] > self.best:
            self.best = self.report[self.metric]
            # If the process were killed with `best` on disk but no checkpoint, the next start would
            # move `best` aside as the output of an earlier run.
            with self.stalls.stage("the checkpoint"):
                checkpoint.finish_saving(self.manager)
            self.save_model(self.workdir / "best", state)
        if step != self.evaluated:  # a resumed run may repeat an evaluation
            self.evaluated = step
            names = dict.fromkeys((self.metric, "top1", "top5", "loss"))
            scalars = {f"val/{name}": self.report[name] for name in names}
            self.writer.write(step, scalars)
            self.writer.write_classes(step, self.labels, self.results.per_class(), self.metric)
        if not jax.process_index():
            plots.draw_curves(self.workdir / "metrics.jsonl", self.workdir / "curves.png")
        for video in self.report["failed"]:  # each is logged once, the line below has their number
            if video["id"] not in self.failed:
                self.failed.add(video["id"])
                log.info("counts as wrong: %s", video["error"])
        log.info("step %d: validation %s", step, self.describe(self.report))
        # `share` starts a new measuring interval, so that the next logged share of the input's time
        # excludes the evaluation.
        self.stalls.share("input")

    def save_model(self, folder: Path, state: dict) -> None:
        """Save the evaluated weights as a model folder.

        Args:
            folder: The folder; an existing model folder is replaced.
            state: The training state of the last evaluation.
        """
        provenance = {
            "workdir": with_addresses(str(self.workdir)),
            "step": int(state["step"]),
            **{name: self.report[name] for name in dict.fromkeys((self.metric, "top1"))},
        }
        card = self.make_card(provenance=provenance)
        model_folder.save_model_folder(folder, eval_params(state), card)
