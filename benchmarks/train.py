"""Measure the overhead of the training loop in `jaxvid.train.train`.

python benchmarks/train.py                       the demo's model: one repeated batch, and a pack
python benchmarks/train.py --trace               also trace the device, and add `read at once`
python benchmarks/train.py --input pack --input folder           a pack and H.264 files
python benchmarks/train.py --config FILE.py --config.FIELD=VALUE         a different model
python benchmarks/train.py --json FILE.json                      also write the table as JSON

Clips are generated and packed. The input `synthetic` repeats one batch of the pack. All inputs are
measured in one training run, whose batches come from the inputs in turns of several steps. The
first steps of a turn are not counted, because their batches were decoded during the other turns.
The side `read at once` waits for the device before each draw of a batch, like a training loop that
reads its metrics after each step.

Columns: A step lasts from one draw of a batch to the next. `of the peak` is the rate of the model's
multiply-adds as a share of the measured matmul peak. `input wait` is the share of time spent in
draws. `python` is the CPU time of the training loop's thread per step, without draws. `busy` is the
share of time in which the device runs a program (CPU), or has a kernel or a copy in a stream (GPU).
It is measured in a trace of some more steps, which slows Python more than the device.
"""

import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax
import numpy as np
from absl import app, flags, logging
from jax.profiler import TraceAnnotation

from benchmarks.cost import multiply_adds
from benchmarks.peak import matmul_peak
from benchmarks.trace import busy_time, read_trace
from benchmarks.turns import resident_peak
from jaxvid import cli
from jaxvid.atomic import write_json
from jaxvid.data import synthetic_motion
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.pipeline import make_train_iter
from jaxvid.data.prepare import prepare
from jaxvid.data.sources import DatasetConfig, open_dataset
from jaxvid.errors import InputError
from jaxvid.experiment import Config
from jaxvid.models import make_model_config
from jaxvid.train import train

CONFIG = cli.define_config()
INPUT = flags.DEFINE_multi_enum(
    "input",
    ["synthetic", "pack"],
    ["synthetic", "pack", "folder"],
    "Sources of batches; each is compared with the first.",
)
STEPS = flags.DEFINE_integer("steps", 20, "Counted steps per turn.", lower_bound=1)
TURNS = flags.DEFINE_integer("turns", 5, "Turns per side.", lower_bound=1)
TRACE = flags.DEFINE_boolean("trace", False, "Also trace, and add the side `read at once`.")
CLIPS_FOLDER = flags.DEFINE_string(
    "clips", None, "Folder of the generated clips, which is kept and reused. Default: temporary."
)
JSON = flags.DEFINE_string("json", None, "File to which the table is written as JSON.")
CLIPS = 128  # training clips of 72 px as in the demo, for models with an input of at most 72 px
VIDEOS = 4  # training videos of 340 × 256 px, for models with a larger input
TRACED_STEPS = 10  # traced steps per side
FILLING_STEPS = 3  # number of a side's first traced steps, which are not counted


# ------------------------------------------------------------------ sides and turns


class Side(NamedTuple):
    """A variant of training that is compared with others.

    Attributes:
        name: Name in the table.
        kind: Input: `synthetic`, `pack` or `folder`.
        waits: Whether training waits for the device before each draw.
        other: Name of the side that this one is compared with; equal to `name` if there is none.
    """

    name: str
    kind: str
    waits: bool
    other: str


class Plan(NamedTuple):
    """The order of the sides in the training run.

    Attributes:
        sides: The sides, in the order of their turns.
        skipped: Steps at the start of a turn that are not counted.
        steps: Counted steps per turn.
        turns: Turns per side.
    """

    sides: list[Side]
    skipped: int
    steps: int
    turns: int

    @property
    def total(self) -> int:
        """Number of steps in all turns. One more step ends the last turn, then the trace starts."""
        return self.turns * len(self.sides) * (self.skipped + self.steps)

    def side_of(self, step: int) -> Side:
        """Return the side that a step belongs to."""
        if step < self.total:
            turn = step // (self.skipped + self.steps)
        else:  # a traced step; for the step `total` itself, -1 selects the last side
            turn = (step - self.total - 1) // TRACED_STEPS
        return self.sides[turn % len(self.sides)]

    def counted(self, marks: np.ndarray) -> np.ndarray:
        """Select the counted steps: `(steps ...)` of the run → `(turns sides steps ...)`."""
        turns = marks[: self.total].reshape(self.turns, len(self.sides), -1, *marks.shape[1:])
        return turns[:, :, self.skipped :]


def make_plan(config: Config) -> Plan:
    """Make the plan that the command-line flags describe."""
    kinds = INPUT.value
    sides = [Side(kind, kind, False, kinds[0]) for kind in kinds]
    if TRACE.value:
        sides.append(Side(f"{kinds[-1]}, read at once", kinds[-1], True, kinds[-1]))
    # Upper bound of the number of batches that were decoded during other sides' turns, plus the
    # number of steps by which the device lags behind.
    skipped = (config.data.num_threads + 4) * max(1, config.data.num_workers)
    return Plan(sides, skipped, STEPS.value, TURNS.value)


# ------------------------------------------------------------------ clips


def make_clips(folder: Path, config: Config) -> None:
    """Generate videos, and write them as files and as a pack, unless the folder has the pack.

    Args:
        folder: Folder in which `folder/` and `pack/` are created.
        config: The config of the run.
    """
    if (folder / "pack" / "report.json").exists():
        return
    clips = folder / "folder"
    if config.model.image_size <= synthetic_motion.SIZE:
        synthetic_motion.make_motion(clips, num_train=CLIPS, num_val=8, seed=0)
    else:
        from benchmarks.data import write_video  # sets the number of threads when imported

        clips.mkdir(parents=True, exist_ok=True)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(VIDEOS, os.cpu_count()), mp_context=spawn) as pool:
            paths = [clips / f"{i}.mp4" for i in range(VIDEOS)]
            list(pool.map(write_video, paths, [340] * VIDEOS, [256] * VIDEOS, range(VIDEOS)))
        for split in ("train", "val"):
            (clips / f"{split}.csv").write_text("".join(f"{i}.mp4 {i}\n" for i in range(VIDEOS)))
    labels = "".join(f"class {i}\n" for i in range(config.model.num_classes))
    (clips / "labels.txt").write_text(labels)
    prepare([clips / "train.csv", clips / "val.csv"], folder / "pack", Settings(), workers=2)


# ------------------------------------------------------------------ the run


class TimedInput:
    """An iterator over training batches that follows a plan and records when batches are drawn.

    Args:
        batches: Kind of input → its iterator.
        plan: The plan of the run.

    Attributes:
        marks: For each draw, the wall time before and after it, and the thread's CPU time before
            and after it, in seconds.
        peak_bytes: The peak memory at the end of the last turn.
    """

    def __init__(self, batches: dict[str, Iterator[dict]], plan: Plan):
        """Create the input, with no draws recorded."""
        self._batches, self._plan = batches, plan
        self.marks: list[tuple[float, ...]] = []
        self.peak_bytes = 0

    def __next__(self) -> dict:
        """Draw a batch for the side whose turn it is."""
        side = self._plan.side_of(len(self.marks))
        if len(self.marks) == self._plan.total:
            self.peak_bytes = peak_memory()
        if side.waits:
            jax.block_until_ready(jax.live_arrays())
        before = time.perf_counter(), time.thread_time()
        with TraceAnnotation(side.name):
            batch = next(self._batches[side.kind])
        after = time.perf_counter(), time.thread_time()
        self.marks.append((before[0], after[0], before[1], after[1]))
        return batch

    def get_state(self) -> dict:
        """Return an empty state: the checkpoint is never restored."""
        return {}

    def close(self) -> None:
        """Stop the threads of the inputs."""
        for kind in self._batches.keys() - {"synthetic"}:
            self._batches[kind].close()


def peak_memory() -> int:
    """Return the peak memory in bytes: the device's, or the process's if the former is unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resident_peak())


def make_timed_input(
    records: Sequence, *, plan: Plan, others: dict[str, Sequence], **options
) -> TimedInput:
    """Make the input of a run.

    Args:
        records: The training videos of the pack.
        plan: The plan of the run.
        others: Other kinds of input → their training videos.
        **options: Options of `pipeline.make_train_iter`.
    """
    batches = {"pack": make_train_iter(records, **options)}
    if "synthetic" in INPUT.value:
        batches["synthetic"] = itertools.repeat(next(batches["pack"]))
    batches |= {kind: make_train_iter(videos, **options) for kind, videos in others.items()}
    return TimedInput(batches, plan)


def run(config: Config, plan: Plan, folder: Path) -> tuple[TimedInput, dict[str, float]]:
    """Train on the clips of `make_clips` as planned.

    Returns:
        The input with the times of its draws, and the result of `busy_shares`, which is empty
        without `--trace`.
    """
    config = config.copy_and_resolve_references().unlock()
    config.data.update(source="pack", folder=str(folder / "pack"), prefix="")
    first = plan.total + 1
    end = first + (len(plan.sides) * TRACED_STEPS if TRACE.value else 0)
    # Long enough that the run ends before any evaluation or checkpoint.
    config.num_epochs = max(config.num_epochs, 10 * end * config.batch_size / VIDEOS)
    config.checkpoint_every_epochs = config.eval.every_epochs = config.num_epochs
    others, inputs = {}, []
    if "folder" in INPUT.value:
        files = DatasetConfig(source="folder", folder=str(folder / "folder"))
        data = open_dataset(files, config.model.num_classes, ("train",))
        others["folder"] = data.records["train"]

    def make_batches(records: Sequence, **options) -> TimedInput:
        inputs.append(make_timed_input(records, plan=plan, others=others, **options))
        return inputs[0]

    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stderr(io.StringIO()):
        traced = (first, end) if TRACE.value else None
        train(
            config.lock(), workdir, stop_step=end, profile_steps=traced, make_batches=make_batches
        )
        return inputs[0], busy_shares(Path(workdir) / "profile", plan) if traced else {}


def busy_shares(folder: Path, plan: Plan) -> dict[str, float]:
    """Compute how busy the device is from the trace of `jax.profiler` in `folder`.

    Returns:
        Name of a side → the share of time in which the device is busy, from the first counted draw
        of the side to its last draw. Several GPUs are averaged.
    """
    trace, shares = read_trace(folder), {}
    for side in plan.sides:
        draws = sorted(event.start for event in trace.host if event.name == side.name)
        start, end = draws[FILLING_STEPS], draws[-1]
        busy = [busy_time(events, start, end) for events in trace.programs]
        shares[side.name] = float(np.mean(busy)) / (end - start)
    return shares


# ------------------------------------------------------------------ table


def make_rows(plan: Plan, timed: TimedInput, busy: dict[str, float], work: float) -> list[dict]:
    """Return the row of each side.

    Args:
        plan: The plan of the run.
        timed: The input of the run, with the times of its draws.
        busy: Side → the busy share of time; empty without a trace.
        work: Time in seconds that the model's arithmetic takes per step at the matmul peak.
    """
    before, after, cpu_before, cpu_after = np.array(timed.marks[: plan.total + 1]).T
    seconds = plan.counted(np.diff(before))  # (turns sides steps)
    waited = plan.counted((after - before)[:-1])
    python = plan.counted(cpu_before[1:] - cpu_after[:-1])
    means = {side.name: seconds[:, i].mean(axis=-1) for i, side in enumerate(plan.sides)}
    rows = []
    for i, side in enumerate(plan.sides):
        median, low, high = 1e3 * np.quantile(seconds[:, i], (0.5, 0.1, 0.9))
        rate = np.median(1 / seconds[:, i].mean(axis=-1))  # steps per second
        row = {
            "side": side.name,
            "clips/s": CONFIG.value.batch_size * rate,
            "ms per step": median,
            "10 % quantile (ms)": low,
            "90 % quantile (ms)": high,
            "of the peak (%)": 100 * work * rate,
            "input wait (%)": 100 * waited[:, i].sum() / seconds[:, i].sum(),
            "python (ms)": 1e3 * np.median(python[:, i]),
            "busy (%)": 100 * busy[side.name] if busy else None,
        }
        if side.name != side.other:
            ratios = means[side.other] / means[side.name]
            row |= {"other side": side.other, "speed-up": np.median(ratios)}
            row |= {"pairs": len(ratios), "lowest": ratios.min(), "highest": ratios.max()}
        rows.append({name: x.item() if isinstance(x, np.generic) else x for name, x in row.items()})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line per side and one per comparison."""
    titles = ("clips/s", "ms per step, 10 to 90 %", "of the peak", "input wait", "python", "busy")
    print(f"{'':20}" + "{:>8} {:>26} {:>12} {:>11} {:>9} {:>7}".format(*titles))
    for row in rows:
        spread = f"{row['ms per step']:.1f} "
        spread += f"({row['10 % quantile (ms)']:.1f} to {row['90 % quantile (ms)']:.1f})"
        line = f"{row['side']:20}{row['clips/s']:8.2f} {spread:>26}"
        line += f" {row['of the peak (%)']:10.0f} % {row['input wait (%)']:9.2f} %"
        line += f" {row['python (ms)']:6.1f} ms"
        busy = row["busy (%)"]
        print(line + (f" {'–':>7}" if busy is None else f" {busy:5.1f} %"))
    for row in rows:
        if "other side" in row:
            spread = f"median of {row['pairs']} pairs, {row['lowest']:.2f} to {row['highest']:.2f}"
            ratio = f"{row['speed-up']:.2f} × as fast as {row['other side']}"
            print(f"{row['side']} is {ratio} ({spread})")


def main(_) -> None:
    """Run the command line."""
    logging.set_verbosity(logging.FATAL)
    config = CONFIG.value
    plan = make_plan(config)
    try:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(CLIPS_FOLDER.value or folder)
            with contextlib.redirect_stderr(io.StringIO()):
                make_clips(folder, config)
            timed, busy = run(config, plan, folder)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(InputError.EXIT_CODE)

    peak = matmul_peak(config.model.dtype)
    device, count = jax.devices()[0], jax.device_count()
    print(
        f"{config.model.name}, training, {config.batch_size} clip(s) per step, "
        f"{config.model.dtype}, {device.device_kind}; {plan.turns} turn(s) of {plan.steps} steps"
    )
    print(
        f"matmul peak {peak / 1e9:.0f} · 10⁹ multiply-adds/s; "
        f"memory {timed.peak_bytes / 1e9:.2f} GB at the peak"
    )
    work = 3 * config.batch_size * multiply_adds(make_model_config(**config.model)) / peak
    rows = make_rows(plan, timed, busy, work / (1 if device.platform == "cpu" else count))
    print_table(rows)
    if JSON.value:
        write_json(Path(JSON.value), rows)


if __name__ == "__main__":
    if not any(argument.partition("=")[0] == "--config" for argument in sys.argv):
        sys.argv[1:1] = ["--config", str(ROOT / "configs" / "motion.py")]
    parse = functools.partial(cli.parse_flags, doc=__doc__, module=sys.argv[0], needed=dict)
    app.run(main, flags_parser=parse)
