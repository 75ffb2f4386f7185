"""Multiply-adds equal those of the papers and the compiler's count; the benchmarks run."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.cost import multiply_adds, print_table
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import environment, kernels, parity, speed
from benchmarks.gpu.context import Context
from benchmarks.gpu.results import Results, format_table
from benchmarks.gpu.runner import Task, limit_of, run_tasks
from benchmarks.gpu.sizes import FULL, TINY
from benchmarks.gpu.steps import STEPS
from benchmarks.turns import Side, SideError, Workload
from jaxvid.models import FAMILIES, abstract_model, make_model_config, merge_params

ROOT = Path(__file__).parents[1]
PAPER = {name: cost for f in FAMILIES.values() for name, cost in f.published_cost.items()}


@pytest.mark.parametrize("name", PAPER)
def test_multiply_adds_equal_the_published_ones(name):
    paper, config = PAPER[name], make_model_config(name)
    giga = paper.num_views * multiply_adds(config, attention=paper.counts_attention) / 1e9
    assert giga == pytest.approx(paper.giga, rel=0.01)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("stam_8", {}), ("stam_8", {"aggregator": "mean"}), ("xvit_k400", {"summary_tokens": True})],
)
def test_multiply_adds_equal_the_count_of_the_compiler(name, overrides):
    """The compiler also counts norms, softmax and GELU, which the tolerance allows for.

    `multiply_adds` counts every token of every block. So does the compiler, because it is given a
    program that computes all tokens. The model's own forward pass computes fewer tokens in the last
    block.
    """
    config = make_model_config(name, depth=2, **overrides)
    graphdef, params = abstract_model(config)
    clip = jax.ShapeDtypeStruct((1, config.num_frames, 224, 224, 3), jnp.float32)

    def all_tokens(params, clip):
        model = merge_params(graphdef, params)
        vit = model if name.startswith("stam") else model.base_model
        x = vit.embed(clip)
        for block in vit.blocks:
            x = block(x)
        frames = vit.norm(x)[:, :, 0]
        if name.startswith("stam"):
            return model.head(model.video_features(frames))
        return model.consensus(frames)

    lowered = jax.jit(all_tokens).lower(params, clip)
    flops = lowered.cost_analysis()["flops"]
    assert flops / 2 == pytest.approx(multiply_adds(config), rel=0.02)


def test_table_has_a_row_for_every_model(capsys):
    print_table()
    out = capsys.readouterr().out
    assert all(name in out for name in PAPER)


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (("forward.py", "--model", "xvit_tiny", "--pairs", "1"), "× as fast as pytorch"),
        pytest.param(
            ("forward.py", "--model", "xvit_tiny", "--pairs", "1", "--train")
            + ("--against", "unshifted"),
            "× as fast as unshifted",
            marks=pytest.mark.full,
        ),
        pytest.param(
            ("deploy.py", "--model", "xvit_tiny", "--pairs", "1")
            + ("--sides", "jax-bfloat16", "onnxruntime-int8"),
            "jax-bfloat16 ",
            marks=pytest.mark.full,
        ),
        pytest.param(
            ("data.py", "--size", "340x256", "--videos", "1", "--rounds", "1"),
            "AutoAugment",
            marks=pytest.mark.full,
        ),
        pytest.param(
            ("input_cost.py", "--videos", "1", "--rounds", "1", "--clips", "8"),
            "4 threads, 0 workers",
            marks=pytest.mark.full,
        ),
        pytest.param(
            ("pack_formats.py", "--frames", "32", "--rounds", "1"),
            "H.264, all-intra           JPEG q80: ",
            marks=pytest.mark.full,
        ),
        pytest.param(
            ("train.py", "--input", "pack", "--trace", "--turns", "1", "--steps", "2")
            + ("--config.batch_size=8", "--config.model.depth=1"),
            "pack, read at once is",  # name of the side that waits for the device at each step
            marks=pytest.mark.full,
        ),
        (
            ("windows.py", "--model", "stam_tiny", "--windows", "4", "--rounds", "1"),
            "frames to compute: 14 with sharing, 32 without",
        ),
        pytest.param(
            ("scale.py", "list", "--videos", "300", "--folder", "{folder}"),
            "kinetics       300 videos:",
            marks=pytest.mark.full,
        ),
        pytest.param(
            ("scale.py", "pack", "--videos", "300", "--folder", "{folder}"),
            "  child process",
            marks=pytest.mark.full,
        ),
        pytest.param(
            ("serve.py", "--requests", "8", "--rounds", "1", "--clients", "1", "2"),
            "server / offline loop in batches of",
            marks=pytest.mark.full,
        ),
    ],
)
def test_benchmarks_run(arguments, printed, tmp_path):
    name, *flags = [argument.format(folder=tmp_path) for argument in arguments]
    command = [sys.executable, f"benchmarks/{name}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


# ------------------------------------------------------------------ benchmarks.gpu

ROW = """
import json, sys, time
def report(**row):
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps({"table": "speed", "row": row}) + "\\n")
"""
ABOUT = {"command": "python -m benchmarks.gpu", "started": "now", "size": "tiny", "minutes": 1.0}


def make_task(folder: Path, name: str, code: str, *, least: float = 0.1) -> Task:
    """Return a task that runs Python code, which may call `report`."""
    results = folder / f"{name}.jsonl"
    command = [sys.executable, "-c", ROW + code, str(results)]
    return Task(name, "a title", 1.0, 0.5, least, lambda limit: command, "the command", results)


def run_and_read(folder: Path, tasks: list[Task], seconds: float) -> tuple[dict, str]:
    """Run tasks; return name → result from results.json, and the text of results.md."""
    run_tasks(tasks, seconds, folder, dict(os.environ), Results(folder, ABOUT).save)
    results = json.loads((folder / "results.json").read_text())
    steps = {entry["name"]: entry for entry in results["steps"]}
    return steps, (folder / "results.md").read_text()


def test_failed_steps_leave_the_results_of_others(tmp_path):
    hang = "report(side='before the hang'); import subprocess; "
    hang += f"subprocess.Popen(['bash', '-c', 'sleep 3; touch {tmp_path}/alive']); time.sleep(60)"
    codes = {
        "environment": "report(side='first', x=1.5)",
        "peaks": "report(side='before the crash'); import os; os.abort()",
        "parity": "report(side='before the error'); sys.exit('the reason')",
        "demo": hang,
        "kernels": "report(note='not run: no time left')",
        "memory": "report(side='last')",
    }
    tasks = [make_task(tmp_path, name, code) for name, code in codes.items()]
    tasks[3] = tasks[3]._replace(share=0.1)
    start = time.monotonic()
    steps, text = run_and_read(tmp_path, tasks, 20)
    assert time.monotonic() - start < 10
    statuses = {name: entry["status"] for name, entry in steps.items()}
    assert statuses == {
        "environment": "done",
        "peaks": "failed",
        "parity": "failed",
        "demo": "stopped",
        "kernels": "shortened",
        "memory": "done",
    }
    sides = [entry["tables"]["speed"][0].get("side") for entry in steps.values()]
    events = [f"before the {event}" for event in ("crash", "error", "hang")]
    assert sides == ["first", *events, None, "last"]
    assert "SIGABRT" in steps["peaks"]["error"]
    assert steps["parity"]["error"].splitlines()[-2:] == ["the reason", "exit code 1"]
    assert "| first | 1.5 |" in text
    assert "the reason" in text
    assert "| demo | a title | stopped |" in text
    time.sleep(2)
    assert not (tmp_path / "alive").exists()  # the processes of the stopped step were killed


def test_the_time_is_kept_and_steps_without_time_are_not_run(tmp_path):
    hang = "time.sleep(60)"
    tasks = [make_task(tmp_path, name, hang) for name in ("peaks", "parity")]
    tasks.append(make_task(tmp_path, "demo", "report(side='x')", least=1.0))
    start = time.monotonic()
    steps, text = run_and_read(tmp_path, tasks, 1.5)
    assert time.monotonic() - start < 2.5
    assert [steps[n]["status"] for n in ("peaks", "parity", "demo")] == ["stopped"] * 2 + [
        "not run"
    ]
    assert "no time left" in text
    # The results of an earlier run remain.
    steps, _ = run_and_read(tmp_path, [tasks[2]], 20)
    assert steps["demo"]["status"] == "done"
    steps, _ = run_and_read(tmp_path, tasks[2:], 0.5)
    assert steps["demo"]["status"] == "done"
    assert steps["peaks"]["status"] == "stopped"


def test_limits_follow_the_shares(tmp_path):
    task = make_task(tmp_path, "peaks", "", least=20.0)._replace(needed=30.0)
    tasks = [task, task._replace(share=3.0)]
    assert limit_of(tasks, 400.0) == 100.0
    assert limit_of(tasks, 40.0) == 30.0
    assert limit_of(tasks, 25.0) == 25.0
    assert limit_of(tasks, 19.0) == 0.0


def test_the_main_process_does_not_import_jax():
    code = "import sys, benchmarks.gpu.__main__; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_gpu_steps_exist_and_are_listed(capsys):
    assert gpu.main(["--list"]) == 0
    out = capsys.readouterr().out
    for step in STEPS:
        assert callable(step.load())
        assert f"{step.name} " in out
        assert step.title in out


@pytest.fixture
def ctx(tmp_path) -> Context:
    """Return the context of a step with a minute left."""
    return Context(TINY, tmp_path / "rows.jsonl", tmp_path, 60.0)


def rows_of(ctx: Context, table: str) -> list[dict]:
    """Return the rows of a table of a context."""
    entries = map(json.loads, ctx.results.read_text().splitlines())
    return [entry["row"] for entry in entries if entry["table"] == table]


def test_missing_modules_are_named(ctx, monkeypatch):
    packages = {"grain": "0.2.18", "no-such-package": "1.0", "orbax-checkpoint": "0"}
    monkeypatch.setattr(environment, "requirements", lambda: packages)
    environment.packages(ctx)
    assert rows_of(ctx, "machine") == [{"name": "missing modules", "value": "no_such_package"}]
    assert "no_such_package" in ctx.failures[0]


def test_requirements_are_those_of_this_version_of_python():
    assert environment.requirements()["jax"] == jax.__version__


def test_sides_that_fail_raise_one_line():
    for make, message in (
        (functools.partial(int, "x"), "ValueError: invalid literal"),
        (os.abort, "aborted"),
    ):
        side = Side(make)
        with pytest.raises(SideError, match=message):
            side.finish(side.start())
        side.close()


def test_a_side_that_is_not_ready_is_given_up():
    side = Side(functools.partial(time.sleep, 30))
    start = time.monotonic()
    with pytest.raises(SideError, match="not ready in time"):
        side.finish(side.start(), timeout=0.5)
    side.close()
    assert time.monotonic() - start < 5
    side.kill()


def test_rows_of_a_comparison(ctx, monkeypatch):
    """Times, ratios and shares of the peak; a side without memory is no failure, others are."""
    notes = {"failing": "ValueError: no", "large": "OutOfMemoryError: CUDA out of memory."}
    times = speed.Times(
        seconds={"jaxvid": [0.1, 0.2, 0.3], "pytorch": [0.2, 0.3, 0.9]},
        peak_bytes={"jaxvid": 5 * 10**9},
        ready={"jaxvid": 1.0, "pytorch": 2.0},
        notes=notes,
        matmul_peak=3e11,
        clip_work=10**9,
    )
    monkeypatch.setattr(speed, "measure", lambda ctx, case: times)
    sides = ("jaxvid", "pytorch", "failing", "large")
    work = Workload("stam_16", 4, "bfloat16", True)
    case = speed.Case(work, {side: speed.Variant("jaxvid") for side in sides})
    speed.run_cases(ctx, "speed", [case])
    first, second, failing, large = rows_of(ctx, "speed")
    assert first["clips/s"] == pytest.approx(20.0)
    assert first["TFLOP/s"] == pytest.approx(0.12)  # 20 clips/s · 3 passes · 2 · 10⁹
    assert first["of the peak (%)"] == pytest.approx(20.0)
    assert first["matmul peak (TFLOP/s)"] == pytest.approx(0.6)
    assert first["peak memory (GB)"] == 5.0
    assert first["command"] == (
        "python benchmarks/forward.py --model stam_16 --batch 4 --dtype bfloat16 --train"
    )
    assert (second["time / first side"], second["lowest ratio"]) == pytest.approx((2.0, 1.5))
    assert failing["note"] == "failed: ValueError: no"
    assert large["note"].startswith("out of memory")
    assert ctx.failures == ["stam_16, training step, failing: ValueError: no"]


class FakeSide:
    """A side without a process; `large` has enough memory only while no other side exists."""

    running: list[str] = []
    calls: list[str] = []

    def __init__(self, name: str):
        self.name = name
        self.running.append(name)

    def start(self):
        return "large" if self.name == "large" and len(self.running) > 1 else ""

    def finish(self, future, timeout=None):
        if future:
            raise SideError("OutOfMemoryError: CUDA out of memory")
        return "gpu", None, 1.0

    def seconds(self, count):
        self.calls.append(self.name)
        if self.name == "breaking" and self.calls.count("breaking") > 2:
            raise SideError("the process was aborted")
        return 1.0

    def peak_bytes(self):
        return 1

    def call(self, function, *arguments):
        return 100.0

    def close(self):
        self.running.remove(self.name)


def test_sides_take_turns_and_large_ones_are_measured_alone(ctx, monkeypatch):
    monkeypatch.setattr(FakeSide, "running", [])
    monkeypatch.setattr(FakeSide, "calls", [])
    monkeypatch.setattr(speed, "_make_side", lambda case, name: FakeSide(name))
    names = ("jaxvid", "breaking", "large")
    case = speed.Case(TINY.workload(-1, True), {name: speed.Variant("jaxvid") for name in names})
    times = speed.measure(ctx, case)
    together = ["jaxvid", "breaking"] * 3  # a warm-up and two rounds
    assert FakeSide.calls == together + ["large"] * 3
    assert times.seconds == {"jaxvid": [1.0] * 2, "breaking": [1.0], "large": [1.0] * 2}
    assert times.notes == {
        "breaking": "the process was aborted",
        "large": "measured alone, for lack of memory",
    }
    assert times.peak_bytes == {"jaxvid": 1, "breaking": 1, "large": 1}
    assert (times.matmul_peak, times.clip_work) == (100.0, 100.0)
    assert FakeSide.running == []


def test_comparisons_without_time_are_named(tmp_path, monkeypatch):
    ctx = Context(FULL, tmp_path / "rows.jsonl", tmp_path, 1.5)
    times = speed.Times({"jaxvid": [1.0]}, {}, {"jaxvid": 1.0}, {}, None, None)
    monkeypatch.setattr(speed, "measure", lambda ctx, case: time.sleep(0.6) or times)
    works = [Workload("stam_16", batch, "float32", False) for batch in (1, 2)]
    cases = [speed.Case(work, {"jaxvid": speed.Variant("jaxvid")}) for work in works]
    speed.run_cases(ctx, "speed", cases)
    first, second = rows_of(ctx, "speed")
    assert first["clips/s"] == 1.0
    assert (second["batch"], second["note"]) == (2, "not run: no time left")


def test_a_difference_above_the_bound_is_a_failure(ctx, monkeypatch):
    monkeypatch.setattr(parity, "DTYPES", ("float32",))
    name, (preset, fields) = next(iter(TINY.goldens.items()))
    wrong = {name: (preset, {**fields, "shift": "keys"})}
    changed = Context(TINY._replace(goldens=wrong), ctx.results, ctx.work, 60.0)
    parity.parity(changed)
    assert [failure.split(":")[0] for failure in changed.failures] == [name]
    parity.parity(ctx)
    assert ctx.failures == []


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "matmul"),
        ("gemm_fusion_dot_42", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("loop_multiply_fusion_3", "elementwise and reductions"),
        ("input_reduce_fusion", "elementwise and reductions"),
        ("triton_softmax_1", "elementwise and reductions"),
        ("loop_convert_fusion", "elementwise and reductions"),
        ("MemcpyD2D", "copies"),
        ("loop_dynamic_update_slice_fusion", "copies"),
        ("wrapped_transpose", "copies"),
        ("something_unknown", "other"),
    ],
)
def test_kernel_groups(name, group):
    assert kernels.group_of(name) == group


def test_kernel_times_are_summed():
    names, groups = kernels.sum_times([("dot_1", 2.0), ("dot_1", 3.0), ("MemcpyD2D", 1.0)])
    assert names == {"dot_1": (5.0, 2), "MemcpyD2D": (1.0, 1)}
    assert groups == {"matmul": 5.0, "copies": 1.0}


def entry(name: str, table: str, rows: list[dict]) -> dict:
    """Return a completed step with one table."""
    step = {"name": name, "title": "t", "command": "c", "status": "done", "seconds": 1.0}
    return step | {"tables": {table: rows}}


def speed_row(side: str, batch: int, **columns) -> dict:
    """Return a row of the table `speed`."""
    return {"model": "stam_16", "step": "forward pass", "batch": batch, "side": side, **columns}


def test_goals_are_read_from_the_tables(tmp_path):
    results = Results(tmp_path, ABOUT)
    speeds = [
        speed_row("jaxvid", 8, **{"of the peak (%)": 40.0, "clips/s": 1.0}),
        speed_row("pytorch", 8, **{"time / first side": 1.5, "clips/s": 1.0}),
        speed_row("jaxvid", 32, **{"of the peak (%)": 70.0, "clips/s": 1.0}),
        speed_row("pytorch", 32, **{"time / first side": 1.1, "clips/s": 1.0}),
        speed_row("jaxvid", 128, note="out of memory"),
    ]
    parity_rows = [
        {"golden file": "a", "dtype": "float32", "largest difference": 1e-6},
        {"golden file": "b", "dtype": "float32", "largest difference": None},
        {"golden file": "a", "dtype": "bfloat16", "largest difference": 1.0},
    ]
    waits = [
        {"side": "pack", "source": "pack", "threads": 16, "input wait (%)": 0.5},
        {"side": "folder", "source": "folder", "threads": 16, "input wait (%)": 50.0},
    ]
    resumed = [{"resumed run": "own", "bit-identical weights": False}]
    starts = [{"start": "cold", "from the start of Python (s)": 31.0}]
    results.save(entry("forward-stam", "speed", speeds), True)
    results.save(entry("parity", "parity", parity_rows), True)
    results.save(entry("input", "input", waits), True)
    results.save(entry("resume", "resume", resumed), True)
    results.save(entry("startup", "first step", starts), True)
    goals = json.loads((tmp_path / "results.json").read_text())["goals"]
    values = [(g["goal"].split(",")[0].split(" (")[0], g["of"], g["reached"]) for g in goals]
    assert values[:3] == [
        ("largest difference in float32", "a", "yes"),
        ("largest difference in float32", "b", "no"),  # it was not finite
        ("top-1 of the demo", "", "not measured"),
    ]
    assert ("bit-identical resume", "own", "no") in values
    assert ("forward pass", "stam_16, batch 32", "yes") in values
    assert ("training step", "", "not measured") in values
    speed_up = "time of PyTorch / time of jaxvid"
    assert (speed_up, "stam_16, forward pass, pytorch, batch 32", "no") in values
    assert ("input wait with packs", "16 threads", "yes") in values
    assert ("first step", "from the start of Python", "no") in values
    assert (tmp_path / "speed.png").exists()


def test_tables_omit_empty_columns():
    rows = [{"a": 1, "b": None, "c": "x|y"}, {"a": 0.123456, "command": "run it"}]
    assert format_table(rows) == [
        "| a | c | command |",
        "|---|---|---|",
        "| 1 | x\\|y |  |",
        "| 0.1235 |  | `run it` |",
        "",
    ]


def start_gpu_benchmark(folder: Path, *arguments: str) -> subprocess.Popen:
    """Start `benchmarks.gpu` with tiny sizes, on one CPU device."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--size", "tiny", "--output", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *arguments], **options)


def test_a_terminated_run_keeps_its_results_and_ends_its_processes(tmp_path):
    with start_gpu_benchmark(tmp_path, "--only", "environment", "forward-xvit") as process:
        for line in process.stdout:
            if line.startswith("[2/2]"):
                break
        time.sleep(0.5)
        process.terminate()
        assert process.wait(timeout=10) == 143
    (step,) = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert (step["name"], step["status"]) == ("environment", "done")
    names = [row["name"] for row in step["tables"]["machine"]]
    assert {"python", "JAX's devices", "git revision"} <= {*names}
    versions = {row["package"]: row["installed"] for row in step["tables"]["packages"]}
    assert versions["jax"] == jax.__version__
    time.sleep(0.5)
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in processes.stdout


@pytest.mark.full
@pytest.mark.timeout(900)
def test_all_gpu_steps_run_with_tiny_sizes(tmp_path):
    start_gpu_benchmark(tmp_path, "--minutes", "10").communicate()
    results = json.loads((tmp_path / "results.json").read_text())
    steps = {entry["name"]: entry for entry in results["steps"]}
    assert [*steps] == [step.name for step in STEPS]
    for name, step in steps.items():
        assert step["status"] == "done", (name, step)
        assert step["tables"], name
    measured = {goal["goal"] for goal in results["goals"] if goal["measured"] is not None}
    assert measured == {goal["goal"] for goal in results["goals"]}
    resumed = steps["resume"]["tables"]["resume"]
    assert [row["bit-identical weights"] for row in resumed] == [True]
    for name in ("speed.png", "kernels.png", "options.png"):
        assert (tmp_path / name).stat().st_size > 1000
