"""Training, evaluation and packs in an S3 server on this machine, which injects faults.

The tests need s3fs and moto; `make test-remote` installs them into an environment of their own.
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import remote as remote_benchmark
from jaxvid import object_store
from jaxvid.atomic import check_output, output_path, write_json
from jaxvid.data.clips.clip import ClipSpec, load_train_clip
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.pipeline import make_train_iter
from jaxvid.data.prepare import prepare
from jaxvid.data.sources import DatasetConfig, open_dataset
from jaxvid.data.video_order import VideoOrder
from jaxvid.errors import InputError
from jaxvid.evaluate import evaluate
from jaxvid.inference.video_writer import write_h264
from jaxvid.storage import model_folder
from jaxvid.train import train
from jaxvid.weights.resolve import load_model
from tests.conftest import shrunk_config
from tests.data.packs import read_pack
from tests.distributed.test_processes import FIELDS
from tests.s3_server import serve

s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed; run make test-remote")
pytest.importorskip("moto.server", reason="moto is not installed; run make test-remote")

SPEC = ClipSpec(num_frames=4, crop=56, short_side=64, train_short_side=(64, 64))
ROOT = Path(__file__).parents[1]
BUCKET = "bucket"
VARIABLES = (
    *("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
)


@pytest.fixture
def s3(tmp_path, monkeypatch):
    """Run a server that resets 5 % and delays 1 % of the requests; yield its faults.

    The bucket `BUCKET` is empty. Requests are repeated without waiting.
    """
    with serve(reset_share=0.05, slow_share=0.01) as (endpoint, faults):
        for name, value in zip(VARIABLES, (endpoint, "us-east-1", "key", "secret"), strict=True):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("JAXVID_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(object_store, "BACKOFF", 0.0)
        s3fs.S3FileSystem.clear_instance_cache()
        call("", lambda fs, _: fs.exists(BUCKET) or fs.mkdir(BUCKET))
        yield faults
        call("", lambda fs, _: fs.rm(BUCKET, recursive=True))
    s3fs.S3FileSystem.clear_instance_cache()


def call(key, function):
    return object_store.call(f"s3://{BUCKET}/{key}", function)


def upload(folder, key):
    for path in folder.rglob("*"):
        if path.is_file():
            object_store.upload(path, f"s3://{BUCKET}/{key}/{path.relative_to(folder)}")


def contents(key):
    address = f"s3://{BUCKET}/{key}"
    return {
        name: object_store.read_ranges(f"{address}/{name}", [(0, info.size)])[0]
        for name, info in object_store.find(address).items()
    }


def test_training_and_evaluation_equal_local_ones(s3, motion_folder, tmp_path):
    upload(motion_folder, "motion")
    expected = train(shrunk_config(motion_folder), tmp_path / "run")
    config = shrunk_config(f"s3://{BUCKET}/motion")
    workdir = f"s3://{BUCKET}/runs/a"
    assert train(config, workdir, stop_step=3) is None
    shutil.rmtree(tmp_path / "cache")  # continue on another machine
    report = train(config, workdir)
    compared = ("weights_sha256", "loss", "top1", "top5")
    assert {name: report[name] for name in compared} == {name: expected[name] for name in compared}
    assert report["checkpoint"] == f"{workdir}/checkpoints/6"
    assert s3.resets > 10

    files = contents("runs/a")
    local = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*.json*")}
    assert local <= files.keys()
    local_names = [name for name, data in files.items() if str(tmp_path).encode() in data]
    assert {os.path.basename(name) for name in local_names} == {"commit_success.txt"}  # of Orbax
    lines = [
        {k: v for k, v in json.loads(line).items() if k.split("/")[0] in ("step", "val")}
        for source in (files["metrics.jsonl"], (tmp_path / "run/metrics.jsonl").read_bytes())
        for line in source.splitlines()
    ]
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]

    with config.unlocked():
        config.init_from = f"{workdir}/model"
    again = evaluate(config, f"s3://{BUCKET}/runs/eval")
    assert again["loss"] == expected["loss"]
    assert again["checkpoint"] == f"{workdir}/model"
    assert {"eval.json", "eval_videos.csv", "eval.html"} <= contents("runs/eval").keys()


def test_batches_of_worker_processes_equal_local_ones(s3, motion_folder, tmp_path):
    prepare([motion_folder], tmp_path / "pack", Settings(clips_per_file=8), workers=2)
    upload(tmp_path / "pack", "pack")
    upload(motion_folder, "motion")
    order = VideoOrder(seed=0)
    for source, folder, key in (
        ("pack", tmp_path / "pack", "pack"),
        ("folder", motion_folder, "motion"),
    ):
        batches = []
        for place, workers in ((str(folder), 0), (f"s3://{BUCKET}/{key}", 2)):
            data = DatasetConfig(source=source, folder=place, cache_gb=1e-3)
            records = open_dataset(data, 8, ("train",)).records["train"]
            options = {"spec": SPEC, "batch_size": 8, "num_threads": 2, "num_workers": workers}
            iterator = make_train_iter(records, order=order, **options)
            batches.append([next(iterator)["video"] for _ in range(8)])
            iterator.close()
        np.testing.assert_array_equal(*batches)


def read_clips(folder, count):
    """Read clips in a random order, without end, and count them."""
    records = open_dataset(DatasetConfig(source="pack", folder=folder), 8, ("train",))
    rng = np.random.default_rng()
    while True:
        record = records.records["train"][int(rng.integers(48))]
        load_train_clip(record, rng, SPEC)
        with count.get_lock():
            count.value += 1


def test_killed_readers_leave_a_usable_cache(s3, motion_folder, tmp_path):
    prepare([motion_folder], tmp_path / "pack", Settings(clips_per_file=8), workers=2)
    upload(tmp_path / "pack", "pack")
    spawn = multiprocessing.get_context("spawn")
    for _ in range(3):
        count = spawn.Value("i", 0)
        options = {"target": read_clips, "args": (f"s3://{BUCKET}/pack", count)}
        readers = [spawn.Process(**options, daemon=True) for _ in range(2)]
        for reader in readers:
            reader.start()
        while count.value < 3:
            assert all(reader.is_alive() for reader in readers)
            time.sleep(0.01)
        for reader in readers:
            os.kill(reader.pid, signal.SIGKILL)
            reader.join()
    clips = []
    for folder in (f"s3://{BUCKET}/pack", str(tmp_path / "pack")):
        data = DatasetConfig(source="pack", folder=folder)
        records = open_dataset(data, 8, ("train",)).records["train"]
        clips.append([load_train_clip(r, np.random.default_rng(0), SPEC)["video"] for r in records])
    np.testing.assert_array_equal(*clips)


def test_refusals_are_one_line(s3, tmp_path):
    with pytest.raises(InputError, match="^s3://none: no such bucket; correct the address$"):
        open_dataset(DatasetConfig(source="pack", folder="s3://none/pack"), 8, ("train",))
    with pytest.raises(InputError, match="^s3://none/a.json cannot be written .*does not exist"):
        check_output("--json", output_path("s3://none/a.json"))
    s3.forbidden = True
    try:
        for action in (
            lambda: open_dataset(
                DatasetConfig(source="pack", folder=f"s3://{BUCKET}/pack"), 8, ("train",)
            ),
            lambda: write_json(output_path(f"s3://{BUCKET}/a.json"), {}),
        ):
            with pytest.raises(InputError, match=f"^s3://{BUCKET}/.*: access refused") as refusal:
                action()
            assert "\n" not in str(refusal.value)
    finally:
        s3.forbidden = False


def start(*arguments, **environment):
    """Start a program of this checkout; return the process."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Wait for a process; return its exit code and its messages."""
    _, errors = process.communicate()
    return process.returncode, errors


def test_a_killed_prepare_continues(s3, motion_folder, tmp_path):
    address = f"s3://{BUCKET}/packs/a"
    command = ["-m", "jaxvid.data.prepare", "--input", str(motion_folder), "--output", address]
    command += ["--clips_per_file", "4"]
    first = start(*command)
    while not any("array_record" in name for name in object_store.find(address)):
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)
    code, errors = finish(start(*command))
    assert code == 2
    assert f"error: {address}: in use by another run (process {first.pid}" in errors
    first.kill()
    finish(first)
    code, errors = finish(start(*command))
    assert code == 0, errors
    assert "parts are complete" in errors
    prepare([motion_folder], tmp_path / "pack", Settings(clips_per_file=4), workers=2)
    files = contents("packs/a")
    expected = read_pack(tmp_path / "pack")
    assert {name: files[name] for name in expected} == expected
    assert not [name for name in files if "lock" in name]


def test_several_processes_share_the_local_copy(s3, motion_folder, tmp_path):
    def run(*caches):
        with socket.socket() as server:  # finds a free port
            server.bind(("localhost", 0))
            port = server.getsockname()[1]
        fields = FIELDS | {"data.folder": motion_folder, "num_epochs": 1.0, "mesh.data": 2}
        command = ["main.py", "--config=configs/motion.py", f"--workdir=s3://{BUCKET}/runs/two"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        command += [f"--coordinator=localhost:{port}", f"--num_processes={len(caches)}"]
        flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
        runs = [
            start(*command, f"--process_id={i}", JAXVID_CACHE=str(cache), XLA_FLAGS=flags)
            for i, cache in enumerate(caches)
        ]
        return [finish(process) for process in runs]

    refused = run(tmp_path / "one", tmp_path / "two")
    assert [code for code, _ in refused] == [2, 2]
    assert "process 1 does not see " in refused[0][1]
    results = run(tmp_path / "one", tmp_path / "one")
    assert [code for code, _ in results] == [0, 0], results
    files = contents("runs/two")
    assert {"eval.json", "model/model.json", "checkpoints.json"} <= files.keys()
    assert not [name for name in files if "lock" in name]
    model = load_model(f"s3://{BUCKET}/runs/two/model")
    sha256 = model_folder.fingerprint(model_folder.split_params(model)[1])
    assert json.loads(files["eval.json"])["weights_sha256"] == sha256
    assert not (tmp_path / f"one/remote/jaxvid-workdirs/s3/{BUCKET}/runs/two").exists()


def test_a_lock_is_created_only_once(s3):
    address = f"s3://{BUCKET}/lock"
    assert object_store.create(address, b"first")
    assert not object_store.create(address, b"second")
    assert object_store.read(address) == b"first"


def write_noise(path, *_, seed):
    frames = np.random.default_rng(seed).integers(0, 255, (20, 64, 64, 3), np.uint8)
    write_h264(path, map(Image.fromarray, frames), Fraction(10), options={})


def test_the_benchmark_runs_on_small_input(capsys, monkeypatch):
    for name in VARIABLES:  # the benchmark sets them
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(remote_benchmark, "write_video", write_noise)
    monkeypatch.setattr("sys.argv", ["remote.py", "--videos", "8", "--rounds", "1", "--batch", "2"])
    remote_benchmark.main()
    lines = capsys.readouterr().out
    assert lines.count("clips/s") == 6
    assert lines.count("× local") == 4
