"""Where numbers go: metrics.jsonl, TensorBoard, the log and the progress bar."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from jaxvid import progress
from jaxvid.errors import InputError
from jaxvid.files import write_file

log = logging.getLogger("jaxvid")
MAX_CLASS_SCALARS = 50
MIN_ROWS = 10  # training rows of a run, if it has as many steps


def setup_logging(workdir: Path) -> None:
    """Sends the `jaxvid` log to the console and `WORKDIR/log.txt`.

    Progress is logged as `debug`: the file gets it always, the console where there is no bar. Of
    other processes than the first, warnings alone are told, on their consoles.
    """
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    log.propagate = False
    log.setLevel(logging.DEBUG)
    if process := jax.process_index():
        warnings = logging.StreamHandler()
        warnings.setLevel(logging.WARNING)
        warnings.setFormatter(logging.Formatter(f"process {process}: %(message)s"))
        log.addHandler(warnings)
        return
    file = logging.FileHandler(workdir / "log.txt", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    file.handleError = lambda _: None  # a full disk is told by what cannot do without it
    console = logging.Handler(logging.INFO if sys.stderr.isatty() else logging.DEBUG)
    console.emit = _write_to_console
    log.addHandler(file)
    log.addHandler(console)


def _write_to_console(record: logging.LogRecord) -> None:
    """Print a line; a console that is gone must not end a run, as log.txt has everything."""
    with contextlib.suppress(SystemExit, InputError, OSError):
        tqdm.write(record.getMessage(), file=sys.stderr)


def sum_metrics(batches: list[dict]) -> dict[str, np.ndarray]:
    """Adds up the sums and counts of several steps on the host, in float64 and int64."""
    host = jax.device_get(batches)
    return {
        name: sum(
            metrics[name].astype(np.float64 if metrics[name].dtype.kind == "f" else np.int64)
            for metrics in host
        )
        for name in (host[0] if host else ())
    }


def window_steps(log_steps: int, total_steps: int) -> int:
    """Compute the length of a log window, in steps: that of the config, less for a short run."""
    return min(log_steps, max(1, total_steps // MIN_ROWS))


def training_row(sums: dict[str, np.ndarray], steps: int) -> dict[str, float | None]:
    """Compute the means of a log window.

    Args:
        sums: Sums over the window of what `steps.train_step` returns.
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


class SkippedVideos:
    """Counts the training videos that cannot be decoded and lists them in `WORKDIR/skipped.jsonl`.

    The list is that of the whole run; those that an earlier start has met do not count against the
    allowed share, for they may have been restored since.

    Args:
        workdir: The run's folder.
        num_videos: Videos that are listed for training.
        max_share: Of them, how many may fail before the run stops; 1: any but all.
        lost: Ids of videos that are no longer in the list: they do not count.
    """

    def __init__(
        self, workdir: Path, *, num_videos: int, max_share: float, lost: Collection[str] = ()
    ):
        self._path, self._lost = workdir / "skipped.jsonl", set(lost)
        self._num_videos, self._max_share = num_videos - len(lost), max_share
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        # The last line may be that of a run that was killed while it wrote.
        lines = text[: text.rfind("\n") + 1]
        if lines != text and not jax.process_index():
            write_file(self._path, lines.encode())
        self._listed = read_skipped(workdir)
        self._failed: set[str] = set()

    def note(self, failures: list[tuple[str, str]]) -> None:
        """Notes failures, each an id and a reason; each video is told and listed once.

        Raises:
            InputError: More than the allowed share has failed.
        """
        for id_, error in failures:
            if id_ not in self._lost:
                self._failed.add(id_)
            if id_ in self._listed:
                continue
            self._listed.add(id_)
            if jax.process_index():
                continue
            log.warning("skipped: %s", error)
            with _told_if_not_written(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"id": id_, "error": error}) + "\n")
        count, total = len(self._failed), self._num_videos
        if count and count == total:
            raise InputError(
                f"all {total} training videos cannot be decoded; they are listed in {self._path}; "
                "restore them"
            )
        if count > self._max_share * total:
            raise InputError(
                f"{count} of {total} training videos cannot be decoded, more than "
                f"data.max_failed_share={self._max_share} allows; they are listed in {self._path}; "
                "restore them, take them out of the list or set --config.data.skip_broken=True, "
                "then the same command continues"
            )

    def summary(self) -> str:
        """Return how many videos this start skipped; empty: none."""
        if not self._failed:
            return ""
        return (
            f"{len(self._failed)} of {self._num_videos} training videos could not be decoded and "
            f"were skipped; they are listed in {self._path}"
        )


def read_skipped(workdir: Path) -> set[str]:
    """Return the ids in `WORKDIR/skipped.jsonl`, as `pipeline.stored_id` cuts them.

    Raises:
        InputError: The file is damaged.
    """
    path = workdir / "skipped.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    try:  # the last line may be that of a run that was killed while it wrote
        return {json.loads(line)["id"] for line in text.split("\n")[:-1]}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: is damaged; delete it") from None


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


class Progress(progress.Progress):
    """Of the first process, a bar; `lines=True`: lines in the log too.

    Arguments: `jaxvid.progress.Progress`.
    """

    def __init__(self, total: int, *, done: int = 0, unit: str, title: str, lines: bool = False):
        bar, tell = not jax.process_index(), log.debug if lines else None
        super().__init__(total, title=title, unit=unit, done=done, bar=bar, tell=tell)
