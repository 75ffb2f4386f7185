"""Training, evaluation, packs, models and features in object stores on this machine.

The servers of S3 and Google Cloud Storage inject faults. The tests need s3fs, moto, gcsfs and
gcp-storage-emulator; `make test-remote` installs them into an environment of their own.
"""

import dataclasses
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

import fsspec
import numpy as np
import pytest
from PIL import Image

from benchmarks import remote as remote_benchmark
from jaxvid import object_store, remote_folder, remote_lock, signed_urls
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
from jaxvid.models import create_model
from jaxvid.storage import model_folder
from jaxvid.storage.feature_file import (
    FeatureTable,
    check_feature_file,
    load_features,
    save_features,
)
from jaxvid.train import train
from jaxvid.training.checkpoint import newest_step
from jaxvid.weights.resolve import load_model
from tests.conftest import shrunk_config
from tests.data.packs import read_pack
from tests.distributed.test_processes import FIELDS
from tests.object_servers import Faults, serve_gcs, serve_s3
from tests.xla_flags import fake_devices

# aiohttp's warning about uploads by gcsfs of more than 1 MiB
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
SPEC = ClipSpec(num_frames=4, crop=56, short_side=64, train_short_side=(64, 64))
ROOT = Path(__file__).parents[1]
BUCKET = "bucket"
S3_VARIABLES = {
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
}
# gcsfs uses no credentials with this server. Without the last variable, it would ask Google's gRPC
# service for the kind of the bucket.
GCS_VARIABLES = {"GOOGLE_CLOUD_PROJECT": "test", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
PACKAGES = {"s3": ("s3fs", "moto.server"), "gs": ("gcsfs", "gcp_storage_emulator")}


@dataclasses.dataclass
class Store:
    """A bucket of a server on this machine.

    Attributes:
        root: Address of the bucket.
        faults: The faults that the server injects.
    """

    root: str
    faults: Faults

    def upload(self, folder, key):
        """Upload the files of a local folder."""
        for path in folder.rglob("*"):
            if path.is_file():
                object_store.upload(path, f"{self.root}/{key}/{path.relative_to(folder)}")

    def contents(self, key):
        """Return the contents of the files in a folder."""
        address = f"{self.root}/{key}"
        return {
            name: object_store.read_ranges(f"{address}/{name}", [(0, info.size)])[0]
            for name, info in object_store.find(address).items()
        }


@pytest.fixture(params=PACKAGES)
def store(request, tmp_path, monkeypatch):
    """Yield an empty bucket of a server that resets 5 % and delays 1 % of the requests.

    Requests are repeated without waiting.
    """
    scheme = request.param
    for name, value in (S3_VARIABLES if scheme == "s3" else GCS_VARIABLES).items():
        monkeypatch.setenv(name, value)  # gcsfs reads a variable when it is imported
    for package in PACKAGES[scheme]:
        pytest.importorskip(package, reason=f"{package} is not installed; run make test-remote")
    monkeypatch.setenv("JAXVID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "BACKOFF", 0.0)
    monkeypatch.setattr(signed_urls, "_paused_until", 0.0)
    signed_urls._sign.cache_clear()
    fs_class = fsspec.get_filesystem_class(scheme)
    fs_class.clear_instance_cache()
    store = Store(f"{scheme}://{BUCKET}", Faults(0.05, 0.01, 0.5))
    if scheme == "s3":
        with serve_s3(store.faults) as endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            object_store.call(store.root, lambda fs, _: fs.exists(BUCKET) or fs.mkdir(BUCKET))
            yield store
            # All of moto's servers in a process have the same buckets.
            object_store.call(store.root, lambda fs, _: fs.rm(BUCKET, recursive=True))
    else:
        with serve_gcs(store.faults, BUCKET) as endpoint:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
            yield store
    fs_class.clear_instance_cache()


def test_training_and_evaluation_equal_local_ones(store, motion_folder, tmp_path):
    store.upload(motion_folder, "motion")
    expected = train(shrunk_config(motion_folder), tmp_path / "run")
    config = shrunk_config(f"{store.root}/motion")
    workdir = f"{store.root}/runs/a"
    assert train(config, workdir, stop_step=3) is None
    shutil.rmtree(tmp_path / "cache")  # continue on another machine
    report = train(config, workdir)
    compared = ("weights_sha256", "loss", "top1", "top5")
    assert {name: report[name] for name in compared} == {name: expected[name] for name in compared}
    assert report["checkpoint"] == f"{workdir}/checkpoints/6"
    assert store.faults.resets > 10

    files = store.contents("runs/a")
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
    again = evaluate(config, f"{store.root}/runs/eval")
    assert again["loss"] == expected["loss"]
    assert again["checkpoint"] == f"{workdir}/model"
    assert {"eval.json", "eval_videos.csv", "eval.html"} <= store.contents("runs/eval").keys()


def test_batches_of_worker_processes_equal_local_ones(store, motion_folder, tmp_path):
    prepare([motion_folder], tmp_path / "pack", Settings(clips_per_file=8), workers=2)
    store.upload(tmp_path / "pack", "pack")
    store.upload(motion_folder, "motion")
    order = VideoOrder(seed=0)
    for source, folder, key in (
        ("pack", tmp_path / "pack", "pack"),
        ("folder", motion_folder, "motion"),
    ):
        batches = []
        for place, workers in ((str(folder), 0), (f"{store.root}/{key}", 2)):
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


def test_killed_readers_leave_a_usable_cache(store, motion_folder, tmp_path):
    prepare([motion_folder], tmp_path / "pack", Settings(clips_per_file=8), workers=2)
    store.upload(tmp_path / "pack", "pack")
    spawn = multiprocessing.get_context("spawn")
    for _ in range(3):
        count = spawn.Value("i", 0)
        options = {"target": read_clips, "args": (f"{store.root}/pack", count)}
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
    for folder in (f"{store.root}/pack", str(tmp_path / "pack")):
        data = DatasetConfig(source="pack", folder=folder)
        records = open_dataset(data, 8, ("train",)).records["train"]
        clips.append([load_train_clip(r, np.random.default_rng(0), SPEC)["video"] for r in records])
    np.testing.assert_array_equal(*clips)


def test_refusals_are_one_line(store, tmp_path):
    missing = f"{store.root}-of-nobody"
    with pytest.raises(InputError, match=f"^{missing}: no such bucket; correct the address$"):
        open_dataset(DatasetConfig(source="pack", folder=f"{missing}/pack"), 8, ("train",))
    with pytest.raises(InputError, match=f"^{missing}/a.json cannot be written .*; correct the"):
        check_output("--json", output_path(f"{missing}/a.json"))
    store.faults.forbidden = True
    try:
        for action in (
            lambda: open_dataset(
                DatasetConfig(source="pack", folder=f"{store.root}/pack"), 8, ("train",)
            ),
            lambda: write_json(output_path(f"{store.root}/a.json"), {}),
        ):
            with pytest.raises(InputError, match=f"^{store.root}/.*: access refused") as refusal:
                action()
            assert "\n" not in str(refusal.value)
    finally:
        store.faults.forbidden = False


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


def test_a_killed_prepare_continues(store, motion_folder, tmp_path):
    address = f"{store.root}/packs/a"
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
    files = store.contents("packs/a")
    expected = read_pack(tmp_path / "pack")
    assert {name: files[name] for name in expected} == expected
    assert not [name for name in files if "lock" in name]


def test_several_processes_share_the_local_copy(store, motion_folder, tmp_path):
    def run(*caches):
        with socket.socket() as server:  # finds a free port
            server.bind(("localhost", 0))
            port = server.getsockname()[1]
        fields = FIELDS | {"data.folder": motion_folder, "num_epochs": 1.0, "mesh.data": 2}
        command = ["main.py", "--config=configs/motion.py", f"--workdir={store.root}/runs/two"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        command += [f"--coordinator=localhost:{port}", f"--num_processes={len(caches)}"]
        runs = [
            start(*command, f"--process_id={i}", JAXVID_CACHE=str(cache), XLA_FLAGS=fake_devices(1))
            for i, cache in enumerate(caches)
        ]
        return [finish(process) for process in runs]

    refused = run(tmp_path / "one", tmp_path / "two")
    assert [code for code, _ in refused] == [2, 2]
    assert "process 1 does not see " in refused[0][1]
    results = run(tmp_path / "one", tmp_path / "one")
    assert [code for code, _ in results] == [0, 0], results
    files = store.contents("runs/two")
    assert {"eval.json", "model/model.json", "checkpoints.json"} <= files.keys()
    assert not [name for name in files if "lock" in name]
    model = load_model(f"{store.root}/runs/two/model")
    sha256 = model_folder.fingerprint(model_folder.split_params(model)[1])
    assert json.loads(files["eval.json"])["weights_sha256"] == sha256
    assert not (tmp_path / f"one/remote/jaxvid-workdirs/s3/{BUCKET}/runs/two").exists()


def test_a_lock_is_created_only_once(store):
    address = f"{store.root}/lock"
    assert object_store.create(address, b"first")
    assert not object_store.create(address, b"second")
    assert object_store.read(address) == b"first"


def test_models_and_checkpoints_of_pytorch(store, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed; run make test-remote")
    from convert import flax_to_torch, torch_to_flax

    model = create_model("stam_tiny", seed=0)
    expected = model_folder.fingerprint(model_folder.split_params(model)[1])
    model_folder.save_model(model, f"{store.root}/model")
    arguments = ["--input", f"{store.root}/model", "--output", f"{store.root}/model.pth"]
    assert flax_to_torch.main(arguments) == 0
    arguments = ["--input", f"{store.root}/model.pth", "--output", f"{store.root}/again"]
    assert torch_to_flax.main([*arguments, "--model", "stam_tiny"]) == 0
    for name, preset in (("model", None), ("model.pth", "stam_tiny"), ("again", None)):
        loaded = load_model(f"{store.root}/{name}", preset=preset)
        assert model_folder.fingerprint(model_folder.split_params(loaded)[1]) == expected


@pytest.mark.parametrize("suffix", ["npz", "parquet", "zarr"])
def test_features_equal_local_ones(store, tmp_path, suffix):
    package = {"npz": "numpy", "parquet": "pyarrow", "zarr": "zarr"}[suffix]
    pytest.importorskip(package, reason=f"{package} is not installed; run make test-remote")
    table = FeatureTable(
        features=np.arange(2**21, dtype=np.float32).reshape(1024, -1),  # two chunks
        ids=[f"{i}.mp4" for i in range(1024)],
        labels=np.arange(1024, dtype=np.int32) % 3,
        label_names=["a", "b", "c"],
        padded=np.zeros(1024, bool),
        starts=None,
        ends=None,
        about={"format_version": 1},
    )
    smaller = dataclasses.replace(
        table, features=table.features[:, :8], about={"format_version": 1, "model": "other"}
    )
    for written in (table, smaller):  # the second replaces the first
        path = output_path(f"{store.root}/features.{suffix}")
        check_feature_file("--output", path)
        save_features(path, written)
        read = load_features(Path(str(path)))
        np.testing.assert_array_equal(read.features, written.features)
        assert (read.ids, read.label_names, read.about) == (
            *(written.ids, written.label_names, written.about),
        )
    assert not [name for name in object_store.find(store.root) if "/c/1/" in name]
    with pytest.raises(InputError, match=f"^{store.root}/none.{suffix}: no such file or folder"):
        load_features(Path(f"{store.root}/none.{suffix}"))


def test_a_run_whose_workdir_is_taken_over_stops(store, motion_folder, monkeypatch):
    """The first checkpoint after that is not uploaded, and the run ends with one line."""
    workdir, other = f"{store.root}/runs/a", {"owner": "x", "holder": "process 7 on node"}
    steps, push = [], remote_folder.push

    def take_over(local):
        steps.append(newest_step(local))
        if len(steps) == 2:
            lock = json.dumps(other | {"time": time.time()}).encode()
            object_store.write(f"{workdir}/{remote_lock.LOCK}", lock)
            files.update(store.contents("runs/a"))
        push(local)

    files = {}
    monkeypatch.setattr(remote_folder, "push", take_over)
    config = shrunk_config(motion_folder, num_epochs=20.0)
    with config.unlocked():
        config.eval.every_epochs = 20.0
        config.checkpoint_every_epochs = 0.34  # a step
    with pytest.raises(InputError, match="in use by another run .process 7 on node") as refusal:
        train(config, workdir)
    assert "\n" not in str(refusal.value)
    assert store.contents("runs/a") == files
    assert steps[:2] == [1, 2]
    assert len(steps) <= 5  # a few more steps may be done before the upload is refused


def write_noise(path, *_, seed):
    frames = np.random.default_rng(seed).integers(0, 255, (20, 64, 64, 3), np.uint8)
    write_h264(path, map(Image.fromarray, frames), Fraction(10), options={})


def test_the_benchmark_runs_on_small_input(capsys, monkeypatch):
    pytest.importorskip("s3fs", reason="s3fs is not installed; run make test-remote")
    for name in ("AWS_ENDPOINT_URL", *S3_VARIABLES):  # the benchmark sets them
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(remote_benchmark, "write_video", write_noise)
    monkeypatch.setattr("sys.argv", ["remote.py", "--videos", "8", "--rounds", "1", "--batch", "2"])
    remote_benchmark.main()
    lines = capsys.readouterr().out
    assert lines.count("clips/s") == 7
    assert lines.count("× local") == 5
