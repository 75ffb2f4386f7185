"""Training and evaluation end to end on video files, also interrupted and resumed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxvid
from jaxvid import evaluate
from jaxvid import train as train_program
from jaxvid.errors import InputError
from jaxvid.evaluation import loop
from jaxvid.models import split_params
from jaxvid.storage import model_card
from jaxvid.train import train
from jaxvid.training import checkpoint, metric_window, signals
from tests.conftest import shrunk_config
from tests.outputs import check_same_outputs, measured, rows, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _log_windows_of_two_steps():
    """Lower `MIN_ROWS`, so that log windows of 2 steps (`log_steps` here) are not shortened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric_window, "MIN_ROWS", 2)
        yield


@pytest.fixture(scope="module")
def run(motion_folder, tmp_path_factory):
    """Return a finished run of 4 epochs (12 steps): its workdir, its config and its report."""
    config = shrunk_config(motion_folder, num_epochs=4.0)
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    return workdir, config, train(config, workdir)


def test_training_writes_all_outputs(run):
    workdir, config, result = run
    report = json.loads((workdir / "eval.json").read_text())
    assert result.items() <= report.items()
    assert report["num_videos"] == 24  # not a multiple of the batch size, 16
    assert 0 <= report["top1"] <= report["top5"] <= 100
    assert report["protocol"]["num_clips"] == 1
    assert report["checkpoint"].endswith("checkpoints/12")
    assert np.sum(report["confusion"]) == 24
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val/top1" in row] == [3, 6, 9, 12]
    assert rows[-1]["val/top1"] == report["top1"]
    train_rows = [row for row in rows if "train/loss" in row]
    assert train_rows[-1]["step"] == 12
    assert all(row["clips_per_second"] > 0 for row in train_rows)
    for name in ("curves.png", "confusion.png"):
        with Image.open(workdir / name) as picture:
            assert picture.size > (300, 200)
    assert list((workdir / "tensorboard").iterdir())
    log = (workdir / "log.txt").read_text()
    assert f"python -m jaxvid predict CLIP.mp4 --model {workdir / 'model'}\n" in log
    assert "clips/s" in log
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == config.batch_size
    assert checkpoint.find_steps(workdir) == [9, 12]  # the newest two, as checkpoint_keep=2


def test_resumed_training_is_bit_identical(run, tmp_path):
    workdir, config, result = run
    assert train(config, tmp_path / "w", stop_step=6) is None
    assert not (tmp_path / "w" / "model").exists()
    resumed = train(config, tmp_path / "w")
    assert weights(tmp_path / "w") == weights(workdir)
    assert measured(resumed) == measured(result)

    def losses(workdir):
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line).get("train/loss") for line in lines]

    assert losses(tmp_path / "w") == losses(workdir)


@pytest.mark.full  # test_signals_at_any_moment_change_no_output stops in a log window too
def test_stops_within_a_log_window_do_not_change_the_weights(run, tmp_path):
    workdir, config, _ = run
    for step in (1, 5):
        train(config, tmp_path / "w", stop_step=step)
    train(config, tmp_path / "w")
    assert weights(tmp_path / "w") == weights(workdir)


def test_a_signal_saves_and_stops_and_the_run_can_be_resumed(run, tmp_path):
    workdir, config, _ = run
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    # The signal must not end pytest if it comes before or after the run handles signals.
    signal.signal(signal.SIGTERM, lambda *_: None)

    class SignalSoon(train_program.StopSignals):
        def __enter__(self):
            timer.start()
            return super().__enter__()

    original, train_program.StopSignals = train_program.StopSignals, SignalSoon
    try:
        with pytest.raises(SystemExit) as stop:
            train(config, tmp_path / "w")
    finally:
        train_program.StopSignals = original
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 128 + signal.SIGTERM
    [step] = checkpoint.find_steps(tmp_path / "w")[-1:]
    assert 0 < step < 12
    train(config, tmp_path / "w")
    assert weights(tmp_path / "w") == weights(workdir)


@pytest.mark.parametrize("several_processes", [False, pytest.param(True, marks=pytest.mark.full)])
def test_signals_at_any_moment_change_no_output(run, tmp_path, monkeypatch, several_processes):
    """Signals stop the run in a log window, an evaluation, the last step and the last evaluation.

    A signal during the writing of the final report does not stop the run. With `several_processes`,
    the loop learns of signals only from the metrics, as in a run of several processes. Only the
    stop in the last step is tested then.
    """
    workdir, config, _ = run
    if several_processes:
        monkeypatch.setattr(signals.StopSignals, "stops_alone", False)
    # The next signal is raised in this step, or in the evaluation after this number of evaluations.
    stop_step, evaluations_before = None, None
    add, evaluate_params = metric_window.MetricWindow.add, loop.evaluate_params

    def add_and_signal(window, step, *args):
        if step == stop_step:
            signal.raise_signal(signal.SIGTERM)
            args[0]["stop"] = np.bool_(True)
        add(window, step, *args)

    def evaluate_and_signal(params, *args, **options):
        nonlocal evaluations_before
        if evaluations_before == 0:
            signal.raise_signal(signal.SIGINT)
        if evaluations_before is not None:
            evaluations_before -= 1
        return evaluate_params(params, *args, **options)

    monkeypatch.setattr(metric_window.MetricWindow, "add", add_and_signal)
    monkeypatch.setattr("jaxvid.train.evaluate_params", evaluate_and_signal)
    before = {*threading.enumerate()}
    stops = [(12, None)] if several_processes else [(5, None), (None, 1), (12, None), (None, 0)]
    for stop_step, evaluations_before in stops:  # noqa: B007
        code = 128 + (signal.SIGINT if stop_step is None else signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            train(config, tmp_path / "w")
        assert stop.value.code == code
        assert not (tmp_path / "w" / "eval.json").exists()
        assert not (tmp_path / "w" / "model").exists()
        assert not [thread for thread in {*threading.enumerate()} - before if thread.daemon]
    assert checkpoint.newest_step(tmp_path / "w") == 12
    stop_step = evaluations_before = None
    save_report = evaluate.save_report

    def signal_and_save(*args):
        signal.raise_signal(signal.SIGTERM)
        save_report(*args)

    monkeypatch.setattr("jaxvid.train.save_report", signal_and_save)
    result = train(config, tmp_path / "w", stop_step=12)  # the last step
    assert result["checkpoint"].endswith("12")
    check_same_outputs(tmp_path / "w", workdir)


def test_outputs_of_a_run_with_deleted_checkpoints_are_moved_aside(run, tmp_path, monkeypatch):
    workdir, config, _ = run
    shutil.copytree(workdir, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "checkpoints")
    card = tmp_path / "w" / "best" / "model.json"
    # Prefix the accuracy with the digits 99, so that no later model can exceed it.
    card.write_text(card.read_text().replace('"top1": ', '"top1": 99'))
    assert train(config, tmp_path / "w", stop_step=4) is None
    assert model_card.load_card(tmp_path / "w" / "best")["provenance"]["step"] == 3
    assert not (tmp_path / "w" / "eval.json").exists()
    steps = [json.loads(row)["step"] for row in rows(tmp_path / "w")]
    assert steps == [2, 3, 4]
    previous = tmp_path / "w" / "previous"
    assert rows(previous) == rows(workdir)
    assert (previous / "eval.json").read_bytes() == (workdir / "eval.json").read_bytes()
    assert weights(previous) == weights(workdir)
    lines = (tmp_path / "w" / "log.txt").read_text().splitlines()
    assert (
        sum(f"the outputs of the earlier run are now in {previous}" in line for line in lines) == 1
    )


def test_a_finished_run_is_only_evaluated_again(run):
    workdir, config, result = run
    before = weights(workdir)
    again = train(config, workdir)
    assert measured(again) == measured(result)
    assert weights(workdir) == before
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert sum("val/top1" in row and row["step"] == 12 for row in rows) == 1


def test_a_changed_config_is_refused_with_the_differences(run):
    workdir, config, _ = run
    other = config.copy_and_resolve_references().unlock()
    other.seed = 7
    other.model.width = 32
    with pytest.raises(InputError, match=r"model.width: 16 before, 32 now; seed: 0 before, 7 now"):
        train(other.lock(), workdir)


@pytest.mark.full
def test_mesh_and_logging_may_change_between_starts(run, tmp_path):
    """Threads, logging and the mesh change the weights only by rounding errors."""
    workdir, config, _ = run
    train(config, tmp_path / "w", stop_step=6)
    other = config.copy_and_resolve_references().unlock()
    other.mesh.update({"data": 4, "fsdp": 2, "tensor": 1})
    other.data.num_threads = 1
    other.log_steps = 5
    train(other.lock(), tmp_path / "w")
    params = [split_params(jaxvid.load_model(w / "model"))[1] for w in (tmp_path / "w", workdir)]
    for name, array in params[0].items():
        difference = np.linalg.norm(array - params[1][name])
        assert difference <= 1e-3 * max(1, np.linalg.norm(array)), name


@pytest.mark.parametrize(("batch_size", "mesh"), [(8, (8, 1, 1)), (40, (2, 4, 1)), (1, (1, 1, 8))])
def test_accuracy_does_not_depend_on_batch_size_and_mesh(run, tmp_path, batch_size, mesh):
    workdir, config, result = run
    other = config.copy_and_resolve_references().unlock()
    other.eval.batch_size = batch_size
    other.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    other.init_from = str(workdir / "model")
    report = evaluate.evaluate(other.lock(), tmp_path)
    for name in ("top1", "top5", "num_videos", "weights_sha256", "mean_class_accuracy"):
        assert report[name] == result[name], name
    assert (tmp_path / "confusion.png").exists()
    assert json.loads((tmp_path / "eval.json").read_text())["checkpoint"] == other.init_from


def test_eval_mode_loads_the_newest_checkpoint(run):
    workdir, config, result = run
    other = config.copy_and_resolve_references().unlock()
    other.model.update(attention="xla", scan="off", remat="none")
    report = evaluate.evaluate(other.lock(), workdir)
    assert report["top1"] == result["top1"]
    assert report["weights_sha256"] == result["weights_sha256"]
    assert report["checkpoint"].endswith("checkpoints/12")


def test_eval_mode_refuses_a_changed_model_or_preprocessing(run, tmp_path):
    workdir, config, _ = run
    for section, field, value in (("model", "shift", "none"), ("data", "mean", 0.0)):
        other = config.copy_and_resolve_references().unlock()
        other[section][field] = value
        with pytest.raises(InputError, match=rf"different model \({section}.{field}: "):
            evaluate.evaluate(other.lock(), workdir)
    other = config.copy_and_resolve_references().unlock()
    other.init_from, other.data.std = str(workdir / "model"), 0.25
    with pytest.raises(InputError, match="std: 0.5 in the model card, 0.25 in the config"):
        evaluate.evaluate(other.lock(), tmp_path)


def test_eval_mode_needs_no_training_videos(run, motion_folder, tmp_path):
    workdir, config, result = run
    folder = shutil.copytree(motion_folder, tmp_path / "data")
    (folder / "train.csv").unlink()
    shutil.rmtree(folder / "train")
    other = config.copy_and_resolve_references().unlock()
    other.init_from, other.data.folder = str(workdir / "model"), str(folder)
    assert evaluate.evaluate(other.lock(), tmp_path / "w")["top1"] == result["top1"]


def test_non_finite_weights_are_refused(run, tmp_path):
    workdir, config, _ = run
    model = jaxvid.load_model(workdir / "model")
    model.consensus.cls_token[...] = np.nan
    preprocessing = model_card.load_card(workdir / "model")["preprocessing"]
    jaxvid.save_model(model, tmp_path / "nan", preprocessing=preprocessing)
    other = config.copy_and_resolve_references().unlock()
    other.init_from = str(tmp_path / "nan")
    with pytest.raises(InputError, match="logits are not finite"):
        evaluate.evaluate(other.lock(), tmp_path / "w")
    assert not (tmp_path / "w" / "eval.json").exists()


def test_evaluation_with_several_views(run, tmp_path):
    workdir, config, _ = run
    other = config.copy_and_resolve_references().unlock()
    other.eval.update({"num_clips": 2, "num_crops": 3})
    other.init_from = str(workdir / "model")
    report = evaluate.evaluate(other.lock(), tmp_path)
    assert report["num_videos"] == 24
    assert (report["protocol"]["num_clips"], report["protocol"]["num_crops"]) == (2, 3)


def test_init_from_sets_the_initial_weights(run, tmp_path):
    workdir, config, result = run
    other = config.copy_and_resolve_references().unlock()
    other.init_from = str(workdir / "model")
    other.optimizer.learning_rate = 1e-30
    train(other.lock(), tmp_path / "w")
    assert weights(tmp_path / "w") == result["weights_sha256"]


def test_invalid_configs_are_refused_and_not_saved(config, tmp_path):
    cases = {
        "num_crops=2: must be one of 1, 3": ("eval", "num_crops", 2),
        "batch_size=3 must be a positive multiple": ("", "batch_size", 3),
        "eval.batch_size=3 must be": ("eval", "batch_size", 3),
        "do not fit 8 devices": ("mesh", "data", 3),
        "short_side=32 is smaller than the crop of 64 px": ("eval", "short_side", 32),
        "log_steps=0: must be above 0": ("", "log_steps", 0),
        "checkpoint_keep=0: must be above 0": ("", "checkpoint_keep", 0),
        "num_epochs=-3.0: must be above 0": ("", "num_epochs", -3.0),
        "eval.every_epochs=0.0: must be": ("eval", "every_epochs", 0.0),
        "warmup_epochs=9.0 .* must be 0 or more, and less": ("optimizer", "warmup_epochs", 9.0),
        "nowhere does not exist; choose a folder": ("", "init_from", "nowhere"),
    }
    for message, (section, field, value) in cases.items():
        other = config.copy_and_resolve_references().unlock()
        (other[section] if section else other)[field] = value
        with pytest.raises(InputError, match=message):
            train(other.lock(), tmp_path / "w")
        assert not (tmp_path / "w" / "config.json").exists()
        assert not (tmp_path / "w" / "metrics.jsonl").exists()


def test_a_non_finite_loss_stops_the_run(config, tmp_path):
    other = config.copy_and_resolve_references().unlock()
    other.optimizer.update({"learning_rate": 1e30, "warmup_epochs": 0.0})
    with pytest.raises(InputError, match="not finite at step .*videos .*is none; start .*lower"):
        train(other.lock(), tmp_path / "w")
    assert checkpoint.find_steps(tmp_path / "w") == []


def main_py(*arguments) -> subprocess.CompletedProcess:
    """Run `main.py` in a subprocess."""
    return subprocess.run(
        [sys.executable, "main.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_lists_the_flags():
    done = main_py("--help")
    assert done.returncode == 0
    assert "--mode eval" in done.stdout
    assert "--workdir" in done.stdout


MOTION = ("--config", "configs/motion.py", "--workdir")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config CONFIG is needed"),
        (("--config", "configs/motion.py"), "--workdir FOLDER is needed"),
        (
            ("--config", "configs/none.py", "--workdir", "w"),
            "configs/none.py does not exist; available configs: ",
        ),
        (("--config=configs/motion.py:x", "--workdir", "w"), "must be '', 'blind' or 'stam'"),
        ((*MOTION, "w", "--config.model.dept=1"), "did you mean --config.model.depth?"),
        ((*MOTION, "w", "--config.sed=1"), "did you mean --config.seed?"),
        ((*MOTION, "w", "--config.seed.x=1"), "--config.seed has no fields"),
        (
            (*MOTION, "w", "--config.batch_size=four"),
            "--config.batch_size: expected an integer, got 'four'",
        ),
        (
            (*MOTION, "w", "--mode=test"),
            "--mode=test: value should be one of <train|eval|sch",
        ),
        ((*MOTION, "w", "--wrokdir=x"), "did you mean --workdir?"),
        ((*MOTION, "w", "x"), "'x': not a flag"),
        ((*MOTION, "w", "--config.model.name=xvit_k400"), "cannot be changed; use the config"),
        (("--config", "configs/common.py", "--workdir", "w"), "has no function get_config()"),
    ],
)
def test_invalid_command_lines_give_one_line_errors(arguments, message):
    done = main_py(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (ROOT / "w").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "val.csv").write_text(""), "val.csv is empty"),
        (lambda folder: (folder / "val" / "00001.mp4").write_bytes(b""), "00001.mp4 is empty"),
    ],
)
def test_invalid_data_gives_a_one_line_error_and_exit_code_2(
    motion_folder, run, tmp_path, change, message
):
    workdir, _, _ = run
    folder = shutil.copytree(motion_folder, tmp_path / "data")
    change(folder)
    done = main_py(
        *("--config", "configs/motion.py", "--workdir", tmp_path / "w", "--mode", "eval"),
        *("--config.data.source=folder", f"--config.data.folder={folder}"),
        *(f"--config.init_from={workdir / 'model'}", "--config.model.width=16"),
        *("--config.model.depth=1", "--config.mesh.fsdp=-1"),
        "--config.mesh.data=1",
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("evaluating ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (tmp_path / "w" / "eval.json").exists()


@pytest.fixture
def with_broken(motion_folder, tmp_path):
    """Return a folder whose lists contain a broken video, followed by the motion clips."""
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "labels.txt").write_text((motion_folder / "labels.txt").read_text())
    for split, name in (("train", "broken.mp4"), ("val", "val_broken.mp4")):
        (folder / name).write_text(f"not a video of {split}")
        lines = (motion_folder / f"{split}.csv").read_text().splitlines()
        listed = [f"{name} 0", *(f"{motion_folder}/{line}" for line in lines)]
        (folder / f"{split}.csv").write_text("\n".join(listed) + "\n")
    return folder


def test_broken_videos_are_skipped_in_training_and_wrong_in_evaluation(with_broken, tmp_path):
    config = shrunk_config(with_broken)
    result = train(config, tmp_path / "w")
    [line] = (tmp_path / "w" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["id"].endswith("broken.mp4")
    assert (result["num_videos"], result["num_evaluated"], result["num_failed"]) == (25, 24, 1)
    [failed] = result["failed"]
    assert failed["label"] == 0
    assert "val_broken.mp4: cannot be decoded" in failed["error"]
    log = (tmp_path / "w" / "log.txt").read_text()
    assert log.count("counts as wrong: ") == 1  # although there are two evaluations
    assert log.count(", 1 failed)") == 3  # both evaluations and the final line
    confusion = json.loads((tmp_path / "w" / "eval.json").read_text())["confusion"]
    hits = sum(confusion[i][i] for i in range(8))
    assert result["top1"] == pytest.approx(100 * hits / 25)
    config = config.copy_and_resolve_references().unlock()
    config.data.max_failed_share = 0.01
    with pytest.raises(InputError, match="1 of 49 training videos cannot be decoded, more than"):
        train(config.lock(), tmp_path / "strict")


def test_skip_broken_keeps_the_order_of_the_remaining_videos(with_broken, tmp_path):
    for split in ("train", "val"):
        path = with_broken / f"{split}.csv"
        path.write_text(f"none.mp4 0\n{path.read_text()}")
    config = shrunk_config(with_broken, num_epochs=1.0).unlock()
    config.data.update(skip_broken=True, max_failed_share=0.0)
    skipping = train(config.lock(), tmp_path / "skipping")
    # Evaluation counts all videos.
    assert (skipping["num_videos"], skipping["num_failed"]) == (26, 2)
    log = (tmp_path / "skipping" / "log.txt").read_text()
    assert (
        "1 of 50 training videos are missing or broken and are left out; the first is none.mp4"
        in log
    )
    assert "1 of 49 training videos could not be decoded and were skipped" in log
    [start] = (tmp_path / "skipping" / "starts.jsonl").read_text().splitlines()
    assert json.loads(start)["left_out"] == {"missing or broken": 1, "no longer listed": 0}

    # Without skip_broken, the run stops. It is resumed after the broken video is taken out of the
    # list, as the error message suggests.
    listed = (with_broken / "train.csv").read_text().removeprefix("none.mp4 0\n")
    (with_broken / "train.csv").write_text(listed)
    config = config.copy_and_resolve_references().unlock()
    config.data.update(skip_broken=False, missing="keep")
    with pytest.raises(InputError, match="1 of 49 .*more than .*share=0.0 .* take them out of the"):
        train(config.lock(), tmp_path / "w")
    (with_broken / "train.csv").write_text(listed.removeprefix("broken.mp4 0\n"))
    resumed = train(config, tmp_path / "w")
    assert resumed["weights_sha256"] == skipping["weights_sha256"]
    log = (tmp_path / "w" / "log.txt").read_text()
    assert (
        "1 of the run's 49 training videos are missing from the list or left out "
        "(the first is broken.mp4)"
    ) in log


@pytest.mark.full
def test_resumed_training_with_mixup_and_erasing_is_bit_identical(motion_folder, tmp_path):
    config = shrunk_config(motion_folder, num_epochs=1.0).unlock()
    config.update(mixup_alpha=0.4, erase_prob=0.5)
    config.lock()
    uninterrupted = train(config, tmp_path / "uninterrupted")
    train(config, tmp_path / "resumed", stop_step=2)
    resumed = train(config, tmp_path / "resumed")
    assert uninterrupted["weights_sha256"] == resumed["weights_sha256"]
    assert np.isfinite(uninterrupted["loss"])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_arrays(folder: Path, damage) -> None:
    """Damage all array files of a checkpoint, because Orbax chooses which of them it reads."""
    for path in (folder / "state").rglob("d/*"):
        damage(path)


@pytest.mark.parametrize(
    "damage",
    [truncate, *(pytest.param(d, marks=pytest.mark.full) for d in (flip_bit, Path.unlink))],
)
def test_a_damaged_checkpoint_is_moved_and_the_previous_one_restored(run, tmp_path, damage):
    workdir, config, _ = run
    train(config, tmp_path / "w", stop_step=6)
    assert checkpoint.find_steps(tmp_path / "w") == [3, 6]
    damage_arrays(tmp_path / "w" / "checkpoints" / "6", damage)
    train(config, tmp_path / "w")
    assert weights(tmp_path / "w") == weights(workdir)
    assert (tmp_path / "w" / "damaged" / "6" / "state").is_dir()
    log = (tmp_path / "w" / "log.txt").read_text()
    assert "the checkpoint of step 6 is damaged" in log
    assert "step 3 of 12, continued" in log


def test_an_intact_checkpoint_is_never_moved(run, tmp_path, monkeypatch):
    _, config, _ = run
    train(config, tmp_path / "w", stop_step=2)

    def fail_to_restore(*_):
        raise ValueError("the tree has another structure")

    monkeypatch.setattr(checkpoint, "_restore", fail_to_restore)
    with pytest.raises(InputError, match="step 2 is intact, but cannot be restored .the tree has"):
        train(config, tmp_path / "w")
    assert checkpoint.find_steps(tmp_path / "w") == [2]
    assert not (tmp_path / "w" / "damaged").exists()


def test_an_interrupted_evaluation_is_repeated(run, tmp_path, monkeypatch):
    """The checksums of the newest checkpoint are written during the evaluation that follows it."""
    workdir, config, _ = run

    def signal_after_the_checksums(*_, **__):
        deadline = time.monotonic() + 30
        while not (tmp_path / "w" / "checkpoints.json").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        signal.raise_signal(signal.SIGTERM)

    other = config.copy_and_resolve_references().unlock()
    other.checkpoint_every_epochs = 4.0  # only evaluations save before the end
    monkeypatch.setattr("jaxvid.train.evaluate_params", signal_after_the_checksums)
    with pytest.raises(SystemExit) as stop:
        train(other.lock(), tmp_path / "w")
    assert stop.value.code == 128 + signal.SIGTERM
    assert checkpoint.find_steps(tmp_path / "w") == [3]
    assert [*json.loads((tmp_path / "w" / "checkpoints.json").read_text())] == ["3"]
    monkeypatch.undo()
    train(config, tmp_path / "w")
    rows = [json.loads(line) for line in (tmp_path / "w/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val/top1" in row] == [3, 6, 9, 12]
    assert weights(tmp_path / "w") == weights(workdir)


def test_a_run_with_only_damaged_checkpoints_is_refused(run, tmp_path):
    _, config, _ = run
    train(config, tmp_path / "w", stop_step=2)
    damage_arrays(tmp_path / "w" / "checkpoints" / "2", truncate)
    with pytest.raises(InputError, match="checkpoint of step 2 is damaged .*files are missing"):
        evaluate.evaluate(config, tmp_path / "w")
    with pytest.raises(InputError, match="every checkpoint is damaged"):
        train(config, tmp_path / "w")


FILLING_DISK = """
import resource, runpy, sys
from jaxvid.training import checkpoint
original = checkpoint.save_checkpoint

def save_on_a_full_disk(manager, state, resumables):
    if int(state["step"]) == 6:
        manager.wait_until_finished()
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # max. bytes of a file
    original(manager, state, resumables)
    checkpoint.finish_saving(manager)

checkpoint.save_checkpoint = save_on_a_full_disk
runpy.run_path("main.py", run_name="__main__")
"""


def test_a_full_disk_gives_a_one_line_error_and_keeps_earlier_checkpoints(run, tmp_path):
    workdir, config, _ = run
    fields = {
        f"{section}.{name}": value
        for section in ("model", "data", "eval", "optimizer", "mesh")
        for name, value in config[section].items()
    } | {name: config[name] for name in ("batch_size", "num_epochs", "log_steps")}
    fields["checkpoint_every_epochs"] = config.checkpoint_every_epochs
    flags = [
        f"--config.{name}={value}"
        for name, value in fields.items()
        if isinstance(value, str | int | float) and name != "model.name"
    ]
    done = subprocess.run(
        [sys.executable, "-c", FILLING_DISK, "--config=configs/motion.py", *flags]
        + [f"--workdir={tmp_path / 'w'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.search("^error: .* cannot be written to .*complete checkpoints: 3; free disk s", last)
    train(config, tmp_path / "w")
    assert weights(tmp_path / "w") == weights(workdir)


def test_the_best_model_is_exported_and_every_start_is_recorded(run):
    workdir, _, _ = run
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    best = max(row["val/top1"] for row in rows if "val/top1" in row)
    card = model_card.load_card(workdir / "best")
    assert card["provenance"]["top1"] == best
    [step] = [row["step"] for row in rows if row.get("val/top1") == best][:1]
    assert card["provenance"]["step"] == step
    starts = [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]
    assert starts[0]["data"]["train"]["videos"] == 48
    assert starts[0]["data"] == starts[-1]["data"]


def test_the_averaged_weights_are_evaluated_and_exported(motion_folder, tmp_path):
    config = shrunk_config(motion_folder, num_epochs=1.0).unlock()
    config.update(ema_decay=0.9, accumulate_steps=2)
    result = train(config.lock(), tmp_path / "w")
    report = evaluate.evaluate(config, tmp_path / "w")
    assert report["weights_sha256"] == result["weights_sha256"] == weights(tmp_path / "w")
    assert report["loss"] == result["loss"]


def test_distillation_trains_and_refuses_an_unsuitable_teacher(run, motion_folder, tmp_path):
    workdir, _, _ = run
    config = shrunk_config(motion_folder, num_epochs=1.0).unlock()
    config.distill.update(teacher=str(workdir / "model"), weight=1.0, temperature=2.0)
    train(config.lock(), tmp_path / "w")
    rows = [json.loads(line) for line in (tmp_path / "w/metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert 0 < losses[-1] < 2  # small, as the teacher is hardly trained
    other = config.copy_and_resolve_references().unlock()
    other.model.image_size = 48
    with pytest.raises(InputError, match="image_size: 64 in the teacher, 48 in the config"):
        train(other.lock(), tmp_path / "x")


def test_a_profiler_trace_is_written(motion_folder, tmp_path):
    train(shrunk_config(motion_folder, num_epochs=1.0), tmp_path / "w", profile_steps=(1, 2))
    assert list((tmp_path / "w" / "profile").rglob("*.xplane.pb"))
    with pytest.raises(InputError, match="steps 1 to 9: expected START < STOP <= 3, the"):
        train(shrunk_config(motion_folder, 1.0), tmp_path / "w", profile_steps=(1, 9))


def test_schedule_mode_needs_no_data(tmp_path):
    done = main_py(*MOTION, tmp_path / "s", "--mode", "schedule")
    assert done.returncode == 0, done.stderr
    with Image.open(done.stdout.strip()) as picture:
        assert picture.size > (300, 200)


def test_invalid_profile_steps_are_refused(tmp_path):
    done = main_py(*MOTION, tmp_path / "s", "--profile", "7")
    assert done.returncode == 2
    assert "--profile=7: must be START:STOP" in done.stderr
