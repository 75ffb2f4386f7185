"""What training's loop costs beside its arithmetic, measured on `jaxvid.train.train` itself.

python benchmarks/train.py                       the demo's model: one batch for ever, and packs
python benchmarks/train.py --trace               and how busy the device is, and what it is worth to
                                                 read metrics late
python benchmarks/train.py --input pack --input folder           packs against H.264 files
python benchmarks/train.py --config FILE.py --config.FIELD=VALUE         another model

It makes clips and packs them; `synthetic` is one batch of them for ever. The sides take turns in
one run, some steps each, of which the first do not count: buffers are full then. A step lasts from
one draw of a batch to the next. `python` is CPU time of the loop's thread in a step, draws
excluded. `busy` is the share of the time in which the device runs a program (CPU) or has a kernel
or a copy in a stream (GPU), in a trace of some further steps; it slows Python more than the device.
"""

import contextlib
import functools
import io
import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax
import numpy as np
from absl import app, flags, logging
from jax.profiler import ProfileData, TraceAnnotation

from benchmarks.cost import multiply_adds
from jaxvid import cli
from jaxvid import train as training
from jaxvid.data import synthetic_motion
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.prepare import prepare
from jaxvid.data.sources import open_dataset
from jaxvid.errors import InputError
from jaxvid.models import make_model_config

CONFIG = cli.define_config()
INPUT = flags.DEFINE_multi_enum(
    *("input", ["synthetic", "pack"], ["synthetic", "pack", "folder"]),
    "Where batches come from; the first is what the others are compared with.",
)
STEPS = flags.DEFINE_integer("steps", 20, "Counted steps of a turn.", lower_bound=1)
TURNS = flags.DEFINE_integer("turns", 5, "Turns of each side.", lower_bound=1)
TRACE = flags.DEFINE_boolean("trace", False, "Trace too, and compare with reading metrics at once.")
CLIPS, VIDEOS = 128, 4
TRACED_STEPS, FILLING_STEPS = 10, 3  # of a side in the trace; of them before the window


# ------------------------------------------------------------------ what is compared


class Side(NamedTuple):
    """One way to train.

    Attributes:
        name: For the table.
        kind: Its input.
        steps_ahead: How many steps may wait for their metrics to be read.
        other: The side that it is compared with.
    """

    name: str
    kind: str
    steps_ahead: int
    other: str


class Plan(NamedTuple):
    """Whose turn it is.

    Attributes:
        sides: They take turns.
        skipped: Steps at the start of a turn that do not count.
        steps: Steps that do.
        turns: Of each side.
    """

    sides: list[Side]
    skipped: int
    steps: int
    turns: int

    @property
    def total(self) -> int:
        """Steps of all turns; one more ends the last of them, and then comes the trace."""
        return self.turns * len(self.sides) * (self.skipped + self.steps)

    def side_of(self, step: int) -> Side:
        """The side that makes this step."""
        if step < self.total:
            turn = step // (self.skipped + self.steps)
        else:
            turn = (step - self.total - 1) // TRACED_STEPS
        return self.sides[turn % len(self.sides)]

    def counted(self, marks: np.ndarray) -> np.ndarray:
        """`marks` `(steps ...)` of all turns as `(turns sides steps ...)` of those that count."""
        turns = marks[: self.total].reshape(self.turns, len(self.sides), -1, *marks.shape[1:])
        return turns[:, :, self.skipped :]


def make_plan(config) -> Plan:
    """The plan that the flags ask for."""
    kinds, ahead = INPUT.value, training.STEPS_AHEAD
    sides = [Side(kind, kind, ahead, kinds[0]) for kind in kinds]
    if TRACE.value:
        sides.append(Side(f"{kinds[-1]}, read at once", kinds[-1], 0, kinds[-1]))
    # The batches that are made while others have their turn, and the steps ahead.
    skipped = (config.data.num_threads + 4) * max(1, config.data.num_workers)
    return Plan(sides, skipped, STEPS.value, TURNS.value)


# ------------------------------------------------------------------ clips


def make_clips(folder: Path, config) -> None:
    """Writes videos of about the size that the model looks at, as files and as a pack.

    Args:
        folder: Gets `folder/` and `pack/`.
        config: The run's.
    """
    clips = folder / "folder"
    if config.model.image_size <= synthetic_motion.SIZE:
        synthetic_motion.make_motion(clips, num_train=CLIPS, num_val=8, seed=0)
    else:
        from benchmarks.data import write_video  # it sets the number of threads when imported

        clips.mkdir()
        for i in range(VIDEOS):
            write_video(clips / f"{i}.mp4", 340, 256, seed=i)
        for split in ("train", "val"):
            (clips / f"{split}.csv").write_text("".join(f"{i}.mp4 {i}\n" for i in range(VIDEOS)))
    labels = "".join(f"class {i}\n" for i in range(config.model.num_classes))
    (clips / "labels.txt").write_text(labels)
    prepare([clips / "train.csv", clips / "val.csv"], folder / "pack", Settings(), workers=2)


# ------------------------------------------------------------------ the run


class TimedInput:
    """A training iterator that follows a plan and notes when batches are drawn.

    Args:
        batches: Kind of input → its iterator.
        plan: Whose turn it is.
    """

    def __init__(self, batches: dict[str, Iterator[dict]], plan: Plan):
        """As the class says."""
        self._batches, self._plan = batches, plan
        self.marks: list[tuple[float, ...]] = []  # of a draw: before, after; in CPU time likewise
        self.peak_bytes = 0

    def __next__(self) -> dict:
        """Draws a batch for the side whose turn it is."""
        side = self._plan.side_of(len(self.marks))
        training.STEPS_AHEAD = side.steps_ahead
        if len(self.marks) == self._plan.total:
            self.peak_bytes = peak_memory()
        before = time.perf_counter(), time.thread_time()
        with TraceAnnotation(side.name):
            batch = next(self._batches[side.kind])
        after = time.perf_counter(), time.thread_time()
        self.marks.append((before[0], after[0], before[1], after[1]))
        return batch

    def get_state(self) -> dict:
        """For the checkpoint, which nobody reads."""
        return {}

    def close(self) -> None:
        """Ends the threads."""
        for kind in self._batches.keys() - {"synthetic"}:
            self._batches[kind].close()


def peak_memory() -> int:
    """The most bytes in use so far: the device's, or this process's where it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return stats.get("peak_bytes_in_use", resident)


def run(config, plan: Plan, folder: Path) -> tuple[TimedInput, dict[str, float]]:
    """Trains as planned on the clips of `make_clips`.

    Returns:
        The input, with what it noted; and of each side the share of the time in which the device is
        busy, if a trace is asked for.
    """
    config, made = config.copy_and_resolve_references().unlock(), []
    config.data.update(source="pack", folder=str(folder / "pack"), prefix="")
    files = config.data.copy_and_resolve_references()
    files.update(source="folder", folder=str(folder / "folder"))
    first = plan.total + 1
    end = first + (len(plan.sides) * TRACED_STEPS if TRACE.value else 0)
    # A training that comes neither to its end nor to an evaluation or a checkpoint in between.
    config.num_epochs = max(config.num_epochs, 10 * end * config.batch_size / VIDEOS)
    config.checkpoint_every_epochs = config.eval.every_epochs = config.num_epochs
    make_train_iter = training.make_train_iter

    def make_timed(records, **how) -> TimedInput:
        batches = {"pack": make_train_iter(records, **how)}
        if "synthetic" in INPUT.value:
            batches["synthetic"] = itertools.repeat(next(batches["pack"]))
        if "folder" in INPUT.value:
            videos = open_dataset(files, config.model.num_classes, ("train",)).records["train"]
            batches["folder"] = make_train_iter(videos, **how)
        made.append(TimedInput(batches, plan))
        return made[0]

    # It is the program itself that runs; only its input is another.
    training.make_train_iter = make_timed
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stderr(io.StringIO()):
        traced = (first, end) if TRACE.value else None
        training.train(config.lock(), workdir, stop_step=end, profile_steps=traced)
        return made[0], busy_shares(Path(workdir) / "profile", plan) if traced else {}


def busy_shares(folder: Path, plan: Plan) -> dict[str, float]:
    """How busy the device is, by the trace of `jax.profiler` in `folder`.

    Returns:
        Side → the share of the time between its first counted draw and its last; the mean over this
        machine's GPUs, or the CPU's.
    """
    (path,) = folder.glob("**/*.xplane.pb")
    planes = {plane.name: plane for plane in ProfileData.from_file(str(path)).planes}
    host = [event for line in planes["/host:CPU"].lines for event in line.events]
    devices = [
        [e for line in plane.lines if line.name.startswith("Stream") for e in line.events]
        for name, plane in planes.items()
        if name.startswith("/device:GPU")
    ] or [[event for event in host if event.name.startswith("ThunkExecutor::Execute")]]
    spans = [np.array(sorted((e.start_ns, e.end_ns) for e in events)) for events in devices]
    shares = {}
    for side in plan.sides:
        draws = sorted(event.start_ns for event in host if event.name == side.name)
        start, end = draws[FILLING_STEPS], draws[-1]
        busy = [busy_time(np.clip(device, start, end)) for device in spans]
        shares[side.name] = float(np.mean(busy)) / (end - start)
    return shares


def busy_time(spans: np.ndarray) -> float:
    """The length of the union of spans `(n, 2)`, sorted by their starts."""
    starts, ends = spans.T
    ends = np.maximum.accumulate(ends)
    idle = np.maximum(starts[1:] - ends[:-1], 0).sum()
    return ends[-1] - starts[0] - idle


# ------------------------------------------------------------------ the table


def print_table(plan: Plan, timed: TimedInput, busy: dict[str, float], work: float) -> None:
    """One line a side, and one a comparison.

    Args:
        plan: Of the run.
        timed: What was noted.
        busy: What was traced.
        work: The model's arithmetic of a step, in seconds at the matmul peak.
    """
    before, after, cpu_before, cpu_after = np.array(timed.marks[: plan.total + 1]).T
    seconds = plan.counted(np.diff(before))  # (turns sides steps)
    waited = plan.counted((after - before)[:-1])
    python = plan.counted(cpu_before[1:] - cpu_after[:-1])
    titles = ("clips/s", "ms a step, 10 to 90 %", "of the peak", "input wait", "python", "busy")
    print(f"{'':20}" + "{:>8} {:>26} {:>12} {:>11} {:>9} {:>7}".format(*titles))
    for i, side in enumerate(plan.sides):
        median, low, high = 1e3 * np.quantile(seconds[:, i], (0.5, 0.1, 0.9))
        rate = np.median(1 / seconds[:, i].mean(axis=-1))  # steps a second
        share = waited[:, i].sum() / seconds[:, i].sum()
        spread = f"{median:.1f} ({low:.1f} to {high:.1f})"
        line = f"{side.name:20}{CONFIG.value.batch_size * rate:8.2f} {spread:>26}"
        line += f" {100 * work * rate:10.0f} % {100 * share:9.2f} %"
        line += f" {1e3 * np.median(python[:, i]):6.1f} ms"
        print(line + (f" {100 * busy[side.name]:5.1f} %" if busy else f" {'–':>7}"))
    means = {side.name: seconds[:, i].mean(axis=-1) for i, side in enumerate(plan.sides)}
    for side in plan.sides:
        if side.name != side.other:
            ratios = means[side.other] / means[side.name]
            spread = f"median of {len(ratios)} pairs, {ratios.min():.2f} to {ratios.max():.2f}"
            print(f"{side.name} is {np.median(ratios):.2f} × as fast as {side.other} ({spread})")


def main(_) -> None:
    """The command line."""
    logging.set_verbosity(logging.FATAL)
    config = CONFIG.value
    plan = make_plan(config)
    try:
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stderr(io.StringIO()):
                make_clips(Path(folder), config)
            timed, busy = run(config, plan, Path(folder))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(InputError.EXIT_CODE)
    from benchmarks.forward import matmul_peak  # it sets up memory, for what comes, when imported

    peak = matmul_peak(config.model.dtype)
    device, count = jax.devices()[0], jax.device_count()
    print(
        f"{config.model.name}, training, {config.batch_size} clip(s) a step, {config.model.dtype}, "
        f"{device.device_kind}; {plan.turns} turn(s) of {plan.steps} steps"
    )
    print(
        f"matmul peak {peak / 1e9:.0f} · 10⁹ multiply-adds/s; "
        f"memory {timed.peak_bytes / 1e9:.2f} GB at the peak"
    )
    work = 3 * config.batch_size * multiply_adds(make_model_config(**config.model)) / peak
    print_table(plan, timed, busy, work / (1 if device.platform == "cpu" else count))


if __name__ == "__main__":
    if not any(argument.partition("=")[0] == "--config" for argument in sys.argv):
        sys.argv[1:1] = ["--config", str(ROOT / "configs" / "motion.py")]
    parse = functools.partial(cli.parse_flags, doc=__doc__, module=sys.argv[0], needed={})
    app.run(main, flags_parser=parse)
