"""Feature extraction: `jaxvid features`."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxvid
from jaxvid import features as program
from jaxvid.data.clips.clip import cut_eval_crops, load_eval_views, resize_eval_frames
from jaxvid.data.formats.video_reader import VideoFile
from jaxvid.data.input_videos import open_input
from jaxvid.errors import InputError
from jaxvid.features import FeatureOptions, features, main
from jaxvid.inference import feature_batches, feature_extraction
from jaxvid.inference.sliding_windows import plan_windows
from jaxvid.locks import locked
from jaxvid.storage import preprocessing
from jaxvid.storage.feature_file import load_features
from tests.xla_flags import fake_devices

ROOT = Path(__file__).parents[2]
NUM_VIDEOS = 17  # three batches of 8


@pytest.fixture(scope="module")
def videos(motion_folder):
    """The first validation videos of the motion data."""
    opened = open_input(motion_folder, "val")
    return dataclasses.replace(opened, records=opened.records[:NUM_VIDEOS])


@pytest.fixture
def extract(videos, folders, tmp_path):
    """A function that extracts features of `videos` into the file `name` and returns its path."""

    def extract(name="out.npz", model="xvit", videos=videos, **options):
        features(videos, folders / model, tmp_path / name, FeatureOptions(**options))
        return tmp_path / name

    return extract


def features_of(folder, clips, layer) -> np.ndarray:
    """Compute the features of clips `(v, t, h, w, c)` of uint8, averaged over them."""
    _, model, used = preprocessing.load_model_and_preprocessing(folder)
    video = preprocessing.normalize(clips, used.mean, used.std)
    return np.asarray(jax.jit(model.features)(video)[layer]).mean(axis=0)


@pytest.mark.parametrize(
    ("model", "layer", "views"),
    [("xvit", "video", {"num_clips": 2, "num_crops": 3}), ("stam", "frames", {})],
)
def test_features_equal_those_of_the_model(extract, videos, folders, model, layer, views):
    videos = dataclasses.replace(videos, records=videos.records[:3])
    table = load_features(extract(videos=videos, model=model, layer=layer, **views))
    assert table.ids == [record.id for record in videos.records]
    assert table.labels.tolist() == [record.label for record in videos.records]
    assert table.label_names == videos.labels
    assert table.features.dtype == np.float32
    assert table.about["layer"] == layer
    assert table.about["preprocessing"]["num_clips"] == views.get("num_clips", 1)
    spec = preprocessing.read_preprocessing(
        json.loads((folders / model / "model.json").read_text()), folders / model
    ).spec
    for i in (0, 2):
        clips = load_eval_views(videos.records[i], dataclasses.replace(spec, **views))["video"]
        expected = features_of(folders / model, clips, layer)
        np.testing.assert_allclose(table.features[i], expected, rtol=1e-4, atol=1e-5)


def test_windows_are_sampled_like_separate_videos(extract, videos, folders, monkeypatch):
    monkeypatch.setattr(feature_batches, "WINDOWS_AHEAD", 1)
    selected = dataclasses.replace(videos, records=videos.records[:2])
    table = load_features(extract(videos=selected, window=0.6, stride=0.3))
    first, second = videos.records[:2]
    spec = jaxvid.Classifier(folders / "xvit").spec
    with VideoFile(first.path) as reader:
        plan = plan_windows(reader, spec, 0.6, 0.3, align=False, name="")
        frames = [reader.get_frames(row) for row in plan.indices]
    count = len(plan.indices)
    assert table.ids == [first.id] * count + [second.id] * (len(table.ids) - count)
    np.testing.assert_array_equal(table.starts[:count], plan.starts)
    np.testing.assert_array_equal(table.ends[:count], plan.ends)
    np.testing.assert_array_equal(table.padded[:count], plan.padded)
    assert len(table.ids) > count > 1
    for i in (0, count - 1):
        crops = np.stack(cut_eval_crops(resize_eval_frames(frames[i], spec), spec))
        expected = features_of(folders / "xvit", crops, "video")
        np.testing.assert_allclose(table.features[i], expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ interruptions


class KilledError(Exception):
    """Stands for the death of the process."""


@pytest.mark.parametrize("times", [{}, {"window": 0.6, "stride": 0.3}])
def test_an_interrupted_extraction_is_bit_identical(extract, monkeypatch, capsys, times):
    whole = extract("whole.npz", batch_size=8, **times)
    make_step = feature_extraction.make_feature_step

    def make_failing(*args):
        """Make a step that fails in its third call, when the first batch is stored."""
        step, calls = make_step(*args), iter([True, True])
        return lambda *args: step(*args) if next(calls, False) else raise_killed()

    def raise_killed():
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(feature_extraction, "make_feature_step", make_failing)
        for _ in range(2 if times else 1):
            with pytest.raises(KilledError):
                extract("out.npz", batch_size=8, **times)
    capsys.readouterr()
    resumed = extract("out.npz", batch_size=8, **times)
    assert " videos were finished before" in capsys.readouterr().err
    assert resumed.read_bytes() == whole.read_bytes()
    assert {path.name for path in resumed.parent.iterdir()} == {"whole.npz", "out.npz"}


def test_another_model_starts_again_with_one_line(extract, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(program, "save_features", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            extract("out.npz")
    capsys.readouterr()
    extract("out.npz", model="stam")
    [line] = [line for line in capsys.readouterr().err.splitlines() if "interrupted run" in line]
    assert line.endswith("these differ: model, protocol, weights; starting again")


def test_two_runs_cannot_write_the_same_file(extract, tmp_path):
    with locked(tmp_path / ".out.npz.lock"), pytest.raises(InputError, match="in use by another"):
        extract("out.npz")


# ------------------------------------------------------------------ command line


@pytest.fixture
def data(motion_folder, tmp_path):
    """A folder with two class folders, one of which has a broken video."""
    for i, name in enumerate(["a", "a", "b"]):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(motion_folder / "val" / f"0000{i}.mp4", tmp_path / "data" / name)
    (tmp_path / "data" / "b" / "broken.mp4").write_bytes(b"no video")
    return tmp_path / "data"


def test_broken_videos_are_left_out_and_counted(data, folders, tmp_path, capsys):
    arguments = [str(data), "--model", str(folders / "xvit"), "--output", str(tmp_path / "o.npz")]
    assert main(arguments) == 3
    out, err = capsys.readouterr()
    assert "data: class folders, 4 videos, 2 classes" in err
    assert err.splitlines()[-1] == "1 of 4 videos failed and are left out"
    assert out.endswith("o.npz: 3 videos, 16 features each, 3 with a label\n")
    table = load_features(tmp_path / "o.npz")
    assert table.ids == ["a/00000.mp4", "a/00001.mp4", "b/00002.mp4"]
    assert (table.labels.tolist(), table.label_names) == ([0, 0, 1], ["a", "b"])
    [failed] = table.about["failed"]
    assert failed["id"] == "b/broken.mp4"
    assert "broken.mp4" in failed["error"]
    shutil.rmtree(data / "a")
    (data / "b" / "00002.mp4").unlink()
    (tmp_path / "o.npz").unlink()
    assert main(arguments) == 2
    assert "none of 1 videos can be decoded" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--window 2", "--window needs --stride SECONDS"),
        ("--stride 2", "--stride needs --window SECONDS"),
        ("--window 2 --stride 0", "--stride=0: must be a number of seconds above 0"),
        ("--window 2 --stride 1 --clips 2", "--clips cannot be combined with --window"),
        ("--clips 0", "num_clips=0"),
        ("--crops 2", "num_crops=2"),
        ("--batch_size 3", "--batch_size=3: must be a positive multiple of 8, the number of dev"),
        ("--split val", "--split val was not found; the input has no splits; leave out --split"),
        ("--output out.csv", "--output out.csv: the file name must end in one of .npz, .parquet"),
        ("--output https://a.org/out.npz", "https://a.org/out.npz cannot be written; choose"),
        ("--model nowhere", "nowhere does not exist"),
    ],
)
def test_bad_options_are_refused_before_anything_is_decoded(
    data, folders, options, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "extract_features", lambda *_, **__: pytest.fail("extracted"))
    given = options.split()
    defaults = {"--model": str(folders / "xvit"), "--output": "o.npz"}
    others = [f"{name}={value}" for name, value in defaults.items() if name not in given]
    assert main([str(data), *others, *given]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_windows_of_a_pack_are_refused(motion_folder, folders, tmp_path, capsys, monkeypatch):
    from jaxvid.data import prepare

    arguments = ["prepare", "--input", str(motion_folder / "val.csv"), "--output"]
    monkeypatch.setattr("sys.argv", [*arguments, str(tmp_path / "pack")])
    with pytest.raises(SystemExit) as done:
        prepare.main()
    assert not done.value.code
    arguments = [str(tmp_path / "pack"), "--model", str(folders / "xvit"), "--output"]
    arguments += [str(tmp_path / "o.npz")]
    assert main([*arguments, "--window", "1", "--stride", "1"]) == 2
    assert "is a pack; choose a folder or list of video files" in capsys.readouterr().err
    assert main(arguments) == 0
    table = load_features(tmp_path / "o.npz")
    assert len(table.ids) == 24
    assert len(table.label_names) == 8


def test_urls_of_unknown_kinds_are_refused(folders, capsys):
    arguments = ["ftp://a.org/b.mp4", "--model", str(folders / "xvit"), "--output", "o.npz"]
    assert main(arguments) == 2
    assert "error: ftp://a.org/b.mp4: is a URL; download" in capsys.readouterr().err


def test_features_that_are_not_finite_are_refused(extract, monkeypatch):
    make_step = feature_extraction.make_feature_step
    monkeypatch.setattr(
        feature_extraction,
        "make_feature_step",
        lambda *args: lambda *inputs: make_step(*args)(*inputs) * jax.numpy.nan,
    )
    with pytest.raises(InputError, match="the features are not finite"):
        extract()


@pytest.mark.full
@pytest.mark.parametrize("times", [[], ["--window=0.6", "--stride=0.3"]])
def test_two_processes_write_the_features_of_one(motion_folder, folders, tmp_path, times):
    shutil.copytree(motion_folder / "val", tmp_path / "videos")
    (tmp_path / "videos" / "00003.mp4").write_bytes(b"no video")
    with socket.socket() as server:  # finds a free port
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    tables = []
    for count in (1, 2):
        output = tmp_path / f"{count}.npz"
        command = [sys.executable, "-m", "jaxvid.features", str(tmp_path / "videos")]
        command += [f"--model={folders / 'xvit'}", f"--output={output}", "--batch_size=8", *times]
        flags = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
        environment = os.environ | {"XLA_FLAGS": fake_devices(2)}
        runs = [
            subprocess.Popen(
                [*command, *(flags + [f"--process_id={process}"] if count > 1 else [])],
                cwd=ROOT,
                env=environment,
            )
            for process in range(count)
        ]
        assert [run.wait(timeout=150) for run in runs] == [3] * count
        tables.append(load_features(output))
    one, two = tables
    assert two.ids == one.ids
    assert len({*one.ids}) == 23
    assert two.about == one.about
    assert two.starts is None or (two.starts == one.starts).all()
    np.testing.assert_allclose(two.features, one.features, rtol=1e-4, atol=1e-5)
