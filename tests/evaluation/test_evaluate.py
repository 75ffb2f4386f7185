"""Evaluation end to end, mostly with a stub network whose predictions are known in advance."""

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import common, xvit_k600
from jaxvid import evaluate, logs, progress
from jaxvid.data import pipeline
from jaxvid.data.clips.clip import load_eval_views
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.data.prepare import prepare
from jaxvid.data.sources import Record, open_dataset
from jaxvid.distributed import sharding
from jaxvid.errors import InputError
from jaxvid.evaluation import loop, summary
from jaxvid.experiment import resolve
from jaxvid.models import create_model, split_params
from jaxvid.storage import model_folder
from jaxvid.storage.preprocessing import normalize
from jaxvid.train import train
from tests.coloured_videos import (
    NAMES,
    PREPROCESSING,
    RIGHT,
    VIDEOS,
    ColourStub,
    abstract_stub,
    check_outputs,
    make_coloured_videos,
    save_stub,
)
from tests.conftest import shrunk_config
from tests.data.test_transforms import GOLDENS
from tests.goldens import FOLDER

SIZES = {"num_classes": 4, "image_size": 32, "width": 16, "depth": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the videos of `make_coloured_videos`."""
    return make_coloured_videos(tmp_path_factory.mktemp("colours"))


def make_config(folder, **settings):
    """Return a config for the colour videos; `settings` are fields of `eval` and `mesh`."""
    config = common.default_config("xvit_tiny", **SIZES)
    config.data.update(folder=str(folder), mean=0.0, std=1.0)
    config.eval.update(short_side=32, batch_size=8)
    config.eval.update({k: v for k, v in settings.items() if k in config.eval})
    config.mesh.update({k: v for k, v in settings.items() if k in config.mesh})
    return config.lock()


def run(config, source="folder", folder=None):
    """Evaluate the stub on the validation videos; return the results and the report."""
    _, params = split_params(ColourStub())
    config = config.copy_and_resolve_references().unlock()
    config.data.update(source=source, folder=str(folder or config.data.folder))
    experiment = resolve(config)
    mesh, protocol = sharding.make_mesh(experiment.mesh), experiment.protocol
    records = open_dataset(experiment.dataset, 4, ("val",)).records["val"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "abstract_model", abstract_stub)
        step = loop.make_eval_step(experiment.model, protocol, mesh)
    results = loop.evaluate_params(
        params, records, protocol, eval_step=step, loader=experiment.loader, mesh=mesh
    )
    return results, summary.make_report(results, protocol, data="colours", checkpoint="stub")


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 8},
        {"batch_size": 24, "num_clips": 2, "num_crops": 3},
        {"batch_size": 3, "data": 1, "fsdp": 1, "tensor": 8},
        {"batch_size": 8, "score": "probabilities", "num_crops": 3, "data": 2, "fsdp": 4},
    ],
    ids=str,
)
def test_metrics_of_known_predictions(folder, settings):
    results, report = run(make_config(folder, **settings))
    assert results.ids[7].endswith("broken.mp4")
    assert report["top1"] == 100 * len(RIGHT) / 20
    assert report["top5"] == 100 * 19 / 20  # with four classes, only the broken video is wrong
    assert (report["num_videos"], report["num_evaluated"], report["num_failed"]) == (20, 19, 1)
    assert report["num_padded"] == 1
    [failed] = report["failed"]
    assert (failed["label"], "broken.mp4: cannot be decoded" in failed["error"]) == (2, True)
    # Red: 4 of 6; green: 4 of 6; blue: 4 of 7 (the broken video is blue); grey: 1 of 1.
    expected = np.mean([4 / 6, 4 / 6, 4 / 7, 1])
    assert report["mean_class_accuracy"] == pytest.approx(100 * expected)
    low, high = report["top1_interval"]
    assert low < report["top1"] < high
    views = settings.get("num_clips", 1) * settings.get("num_crops", 1)
    if settings.get("score") != "probabilities":
        expected = views * np.array([200, 30, 30]) / 255
        np.testing.assert_allclose(results.scores[0, :3], expected, atol=0.02 * views)
    np.testing.assert_allclose(results.probabilities.sum(1), np.arange(20) != 7, rtol=1e-5)


def test_packs_and_videos_agree(folder, tmp_path):
    config = make_config(folder)
    expected, expected_report = run(config)
    prepare([folder], tmp_path / "pack", Settings(quality=95), workers=1)
    packed, report = run(config, "pack", tmp_path / "pack")
    np.testing.assert_allclose(packed.scores, expected.scores, atol=0.01)
    assert packed.failed.tolist() == expected.failed.tolist()  # packs list undecodable videos
    assert "could not be decoded when it was packed" in packed.errors[7]
    for name in ("top1", "top5", "mean_class_accuracy", "num_videos", "num_padded", "num_failed"):
        assert report[name] == expected_report[name], name


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    model = create_model("xvit_tiny", **SIZES, seed=1)
    model_folder.save_model(model, folder, preprocessing=PREPROCESSING)
    return folder


@pytest.fixture
def stub(folder, tmp_path, monkeypatch):
    """Return a config whose `init_from` is a model folder of the stub."""
    monkeypatch.setattr(loop, "abstract_model", abstract_stub)
    monkeypatch.setattr(model_folder, "abstract_model", abstract_stub)
    config = make_config(folder).unlock()
    save_stub(tmp_path / "stub", **config.model)
    config.init_from = str(tmp_path / "stub")
    return config


def changed(config, **settings):
    """Return a copy of a config with some fields changed; `data__folder` is `data.folder`."""
    config = config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in settings.items()})
    return config.lock()


def test_one_and_eight_devices_give_the_same_report(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    result = evaluate.evaluate(stub, tmp_path / "eight")  # batches of 8, 8 and 4
    check_outputs(tmp_path / "eight")
    progress_lines = [
        line.split("evaluating: ")[1].partition(",")[0] + line.partition(" left,")[2]
        for line in (tmp_path / "eight" / "log.txt").read_text().splitlines()
        if "evaluating: " in line
    ]
    # One of the first 8 videos is broken; the 6 videos that the stub misclassifies come last.
    assert progress_lines == [
        "8/20 videos top-1 87.50 %, 1 failed",
        "16/20 videos top-1 81.25 %, 1 failed",
        "20/20 videos top-1 65.00 %, 1 failed",
    ]
    assert jax.device_count() == 8
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 1), sharding.AXES, axis_types, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda _: mesh)
    one_device = evaluate.evaluate(changed(stub, eval__batch_size=3), tmp_path / "one")
    check_outputs(tmp_path / "one")
    for report in (result, one_device):
        for name in ("seconds", "clips_per_second"):
            assert report.pop(name) > 0
    assert result.pop("loss") == pytest.approx(one_device.pop("loss"), rel=1e-6)
    error = one_device.pop("calibration_error")
    assert result.pop("calibration_error") == pytest.approx(error, rel=1e-6)
    assert result == one_device


def test_an_assumed_order_of_the_classes_is_logged_once(stub, tmp_path):
    source = "assumed: colours in order of brightness"
    save_stub(tmp_path / "assumed", labels_source=source, **stub.model)
    evaluate.evaluate(changed(stub, init_from=str(tmp_path / "assumed")), tmp_path / "eval")
    text = (tmp_path / "eval" / "log.txt").read_text()
    assert text.count("class names is assumed (colours in order of brightness); check it") == 1


def test_different_classes_or_a_different_order_are_refused(stub, folder, tmp_path):
    source = tmp_path / "data"
    class_folders = {name: source / "val" / name for name in NAMES}
    for path in class_folders.values():
        path.mkdir(parents=True)
    for i, (_, label) in enumerate(VIDEOS):
        (class_folders[NAMES[label]] / f"{i}.mp4").symlink_to(folder / f"{i}.mp4")
    options = {"data__source": "class_folders", "data__folder": str(source)}
    message = (
        "stub has different classes: class 0 is 'red' in the model, 'blue' in the data; .*labels"
    )
    with pytest.raises(InputError, match=message):
        evaluate.evaluate(changed(stub, **options), tmp_path / "w")
    assert not (tmp_path / "w" / "eval.json").exists()
    (source / "labels.txt").write_text("\n".join(NAMES))
    result = evaluate.evaluate(changed(stub, **options), tmp_path / "w")
    assert result["top1"] == pytest.approx(100 * len(RIGHT) / 19)
    # Class numbers instead of names in the model card are accepted.
    (source / "labels.txt").unlink()
    card = json.loads((tmp_path / "stub" / "model.json").read_text())
    card["labels"] = ["0", "1", "2", "3"]
    (tmp_path / "stub" / "model.json").write_text(json.dumps(card))
    assert evaluate.evaluate(changed(stub, **options), tmp_path / "w")["num_videos"] == 19


def interrupt(monkeypatch, config, workdir, after=2):
    """Interrupt an evaluation after `after` evaluation steps.

    All of their batches except the last are stored, as results are fetched one step late.
    """
    calls, original = [], loop.make_eval_step

    def make_failing(*args):
        def failing(params, batch):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return original(*args)(params, batch)

        return failing

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "make_eval_step", make_failing)
        with pytest.raises(KeyboardInterrupt):
            evaluate.evaluate(config, workdir)


def count_reused(workdir):
    """Return how many videos the last evaluation in a workdir took from an interrupted run."""
    lines = (workdir / "log.txt").read_text().rpartition("evaluating ")[2].splitlines()
    reused = [line for line in lines if "were evaluated before" in line]
    return int(reused[0].split()[2]) if reused else 0


def test_relabelled_or_repaired_videos_are_evaluated_again(stub, folder, tmp_path, monkeypatch):
    data = shutil.copytree(folder, tmp_path / "data")
    config, workdir = changed(stub, data__folder=str(data)), tmp_path / "w"
    interrupt(monkeypatch, config, workdir)
    text = (data / "val.csv").read_text()
    (data / "val.csv").write_text(text.replace("0.mp4 0", "0.mp4 1", 1))
    assert evaluate.evaluate(config, workdir)["top1"] == 60
    assert count_reused(workdir) == 0
    (data / "val.csv").write_text(text)
    interrupt(monkeypatch, config, workdir)
    shutil.copy(data / "2.mp4", data / "broken.mp4")
    result = evaluate.evaluate(config, workdir)
    assert (count_reused(workdir), result["top1"], result["num_failed"]) == (0, 70, 0)
    # The folder and the number of threads make no difference.
    interrupt(monkeypatch, config, workdir)
    data = data.rename(tmp_path / "elsewhere")
    moved = changed(config, data__folder=str(data), data__num_threads=1)
    assert evaluate.evaluate(moved, workdir)["top1"] == 70
    assert count_reused(workdir) == 8


def test_seconds_include_interrupted_runs(stub, tmp_path, monkeypatch):
    interrupt(monkeypatch, stub, tmp_path)
    path = tmp_path / ".unfinished_eval" / "0.npz"
    with np.load(path) as arrays:
        part = dict(arrays)
    assert 0 < part["seconds"] < 100
    np.savez(path, **{**part, "seconds": 1000.0})
    result = evaluate.evaluate(stub, tmp_path)
    assert 1000 < result["seconds"] < 1100
    assert result["clips_per_second"] == 20 / result["seconds"]


def test_protocol_is_complete_and_differences_are_logged(stub, tmp_path):
    path = tmp_path / "stub" / "model.json"
    card = json.loads(path.read_text())
    card["preprocessing"] |= {"short_side": 32, "resize": "pil_bilinear", "by_time": False}
    card["preprocessing"]["sampling_rate"] = 2  # unused by the model's sampling
    path.write_text(json.dumps(card))
    first = evaluate.evaluate(stub, tmp_path / "a")["protocol"]
    assert "preprocessing differs" not in (tmp_path / "a" / "log.txt").read_text()
    other = changed(
        stub,
        data__by_time=True,
        data__resize="torch_bilinear",
        eval__short_side=36,
        eval__dtype="bfloat16",
    )
    before = tmp_path / "a" / "eval.json"
    second = evaluate.evaluate(other, tmp_path / "b", compare_with=before)["protocol"]
    differing = {name for name in first if first[name] != second[name]}
    assert differing == {"by_time", "resize", "short_side", "dtype"}
    text = (tmp_path / "b" / "log.txt").read_text()
    assert (
        "preprocessing differs from the model's: data.by_time: False in the model card, True now; "
        "data.resize: 'pil_bilinear' in the model card, 'torch_bilinear' now; "
        "eval.short_side: 32 in the model card, 36 now"
    ) in text
    assert not json.loads((tmp_path / "b" / "comparison.json").read_text())["same_protocol"]


def test_compare_with_another_evaluation(stub, folder, tmp_path, monkeypatch):
    evaluate.evaluate(stub, tmp_path / "a")
    before = tmp_path / "a" / "eval.json"
    save_stub(tmp_path / "biased", bias=0.4, **stub.model)  # always predicts grey
    biased = changed(stub, init_from=str(tmp_path / "biased"))
    assert evaluate.evaluate(biased, tmp_path / "b", compare_with=before)["top1"] == 5
    lost = json.loads((tmp_path / "b" / "comparison.json").read_text())
    coloured = [f"{i}.mp4" for i in range(12)]
    assert (lost["lost_videos"], lost["gained_videos"]) == (coloured, [])
    # Videos 15 and 18 are wrong in both evaluations, but with the same prediction: grey.
    assert lost["still_wrong_videos"] == [f"{i}.mp4" for i in (13, 14, 16, 17)]
    assert lost["p_value"] == 2 / 2**12
    text = (tmp_path / "b" / "log.txt").read_text()
    expected = (
        "top-1 -60.00 percentage points on 20 shared videos (0 gained, 12 lost, 4 still wrong with "
        "another prediction); significant"
    )
    assert expected in text
    evaluate.evaluate(stub, tmp_path / "c", compare_with=tmp_path / "b" / "eval.json")
    gained = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert (gained["gained_videos"], gained["lost_videos"]) == (coloured, [])
    assert gained["still_wrong_videos"] == lost["still_wrong_videos"]
    monkeypatch.setattr(evaluate, "evaluate_params", None)  # must not be called
    data = shutil.copytree(folder, tmp_path / "data")
    for path in data.glob("*.mp4"):
        path.rename(data / f"x{path.name}")
    lines = (data / "val.csv").read_text().splitlines()
    (data / "val.csv").write_text("".join(f"x{line}\n" for line in lines))
    with pytest.raises(InputError, match="eval.json shares no video with the data"):
        evaluate.evaluate(
            changed(stub, data__folder=str(data)), tmp_path / "c", compare_with=before
        )


def test_file_names_that_are_not_utf8_are_evaluated_and_compared(stub, folder, tmp_path, capfd):
    names = [b"0\xe9.mp4", b"2.mp4", b"broken\xff.mp4"]
    for name, source, file in zip(NAMES, ("0", "2", "broken"), names, strict=False):
        class_folder = tmp_path / "data" / "val" / name
        class_folder.mkdir(parents=True)
        shutil.copy(folder / f"{source}.mp4", os.fsencode(class_folder) + b"/" + file)
    (tmp_path / "data" / "labels.txt").write_text("\n".join(NAMES))
    config = changed(stub, data__source="class_folders", data__folder=str(tmp_path / "data"))
    evaluate.evaluate(config, tmp_path / "a")
    result = evaluate.evaluate(config, tmp_path / "b", compare_with=tmp_path / "a" / "eval.json")
    assert (result["num_videos"], result["num_failed"]) == (3, 1)
    assert os.fsencode(result["failed"][0]["id"]).endswith(b"broken\xff.mp4")
    assert json.loads((tmp_path / "b" / "eval.json").read_text())["failed"] == result["failed"]
    assert json.loads((tmp_path / "b" / "comparison.json").read_text())["num_videos"] == 3
    assert "Logging error" not in capfd.readouterr().err
    # Class names are written to text files and must be UTF-8.
    (tmp_path / "data" / "val" / os.fsdecode(b"r\xe9d")).mkdir()
    with pytest.raises(InputError, match=r"the class folder b'r\\xe9d' has a name .*; rename it"):
        evaluate.evaluate(config, tmp_path / "c")


@pytest.mark.parametrize("name", GOLDENS)
def test_evaluation_crops_equal_the_original(name):
    with np.load(FOLDER / "data" / "spatial_crops.npz") as arrays:
        seed = int(arrays[f"{name}_seed"])
        expected = np.stack([arrays[f"{name}_crop{i}"] for i in range(3)])  # (v t h w c)
    source, size = name.split("_to_")
    h, w = (int(side) for side in source.split("x"))
    clip = np.random.RandomState(seed).randint(0, 256, (4, h, w, 3)).astype(np.uint8)

    class Reader:
        num_frames, fps, times = 16 * len(clip), 30.0, None

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def get_frames(self, indices):
            return clip[indices // 16]  # each frame of `clip` lasts for one segment: 16 frames

    class Video:
        open = Reader

    released = resolve(xvit_k600.get_config()).preprocessing.spec
    assert (released.short_side, released.crop) == (224, 224)
    sizes = {"num_frames": len(clip), "short_side": int(size), "crop": int(size)}
    views = load_eval_views(Video(), dataclasses.replace(released, **sizes))["video"]
    assert views.shape == expected.shape
    # The originals crop floats in [-1, 1]: one grey level is 2/255.
    atol = 0.003 * 2 / 255
    np.testing.assert_allclose(normalize(views, 0.5, 0.5), expected, rtol=0, atol=atol)


def test_metrics_of_an_undecodable_validation_set_are_null(motion_folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "labels.txt").write_text((motion_folder / "labels.txt").read_text())
    listed = (motion_folder / "train.csv").read_text().splitlines()[:16]
    (data / "train.csv").write_text("".join(f"{motion_folder}/{line}\n" for line in listed))
    for i in range(3):
        (data / f"{i}.mp4").write_text("no video")
    (data / "val.csv").write_text("".join(f"{i}.mp4 {i}\n" for i in range(3)))
    config = changed(shrunk_config(data, 1.0), optimizer__warmup_epochs=0.5)
    result = train(config, tmp_path / "w")
    assert result["loss"] is result["calibration_error"] is None
    assert (result["top1"], result["num_failed"]) == (0, 3)
    assert result["seconds"] > 0
    assert result["clips_per_second"] > 0

    def refuse_constant(constant):
        raise AssertionError(constant)

    text = (tmp_path / "w" / "eval.json").read_text()
    saved = json.loads(text, parse_constant=refuse_constant)
    assert saved["clips_per_second"] == result["clips_per_second"]
    assert (tmp_path / "w" / "eval.html").stat().st_size > 10_000
    assert (tmp_path / "w" / "curves.png").exists()
    (tmp_path / "w" / "eval.html").unlink()
    evaluate.evaluate(config, tmp_path / "w")  # with the learning curves of the training run
    assert (tmp_path / "w" / "eval.html").exists()
    # As with a model folder, differences in preprocessing are logged and classes are checked.
    evaluate.evaluate(
        changed(config, data__sampling="uniform_10s", eval__short_side=80), tmp_path / "w"
    )
    text = (tmp_path / "w" / "log.txt").read_text()
    assert (
        "data.sampling: 'segments' before, 'uniform_10s' now; eval.short_side: 72 before, 80 now"
        in text
    )
    names = (data / "labels.txt").read_text().split()
    (data / "labels.txt").write_text("\n".join(names[::-1]))
    with pytest.raises(InputError, match="best has different classes: class 0 is"):
        evaluate.evaluate(config, tmp_path / "w")


def test_evaluation_writes_all_outputs(folder, tiny_model, tmp_path):
    config = make_config(folder).unlock()
    config.init_from = str(tiny_model)
    result = evaluate.evaluate(config.lock(), tmp_path)
    saved = json.loads((tmp_path / "eval.json").read_text())
    assert result.items() <= saved.items()
    assert saved["clips_per_second"] == pytest.approx(20 / saved["seconds"])
    with (tmp_path / "eval_videos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert sum(int(row["correct"]) for row in rows) == round(saved["top1"] * 20 / 100)
    assert sum(int(row["padded"]) for row in rows) == saved["num_padded"] == 1
    assert [bool(row["failed"]) for row in rows] == [i == 7 for i in range(20)]
    names = ["red", "green", "blue", "grey"]
    counts = {name: sum(row["label"] == name for row in rows) for name in names}
    for name, accuracy in saved["class_accuracy"].items():
        hits = sum(row["label"] == name and row["correct"] == "1" for row in rows)
        assert accuracy == pytest.approx(100 * hits / counts[name])
    assert not (tmp_path / ".unfinished_eval").exists()


def test_interrupted_evaluation_is_resumed(folder, tiny_model, tmp_path, monkeypatch):
    config = make_config(folder).unlock()
    config.init_from = str(tiny_model)
    expected = evaluate.evaluate(config.lock(), tmp_path / "uninterrupted")
    calls = []
    original = loop.make_eval_step

    def make_failing(*args):
        step = original(*args)

        def failing(params, batch):
            calls.append(len(batch["video"]))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return step(params, batch)

        return failing

    monkeypatch.setattr(evaluate, "make_eval_step", make_failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(config, tmp_path / "w")
    assert not (tmp_path / "w" / "eval.json").exists()
    result = evaluate.evaluate(config, tmp_path / "w")
    assert len(calls) == 3 + 2  # one of three batches was stored
    names = {name for name in expected if name not in ("seconds", "clips_per_second")}
    assert {name: result[name] for name in names} == {name: expected[name] for name in names}
    # With a different protocol, the evaluation starts over.
    other = config.copy_and_resolve_references().unlock()
    other.eval.num_crops = 3
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(other.lock(), tmp_path / "w")
    assert len(calls) == 3


@pytest.mark.parametrize(
    "moment", ["first batch", "last batch", "table", "eval.json", "confusion", "page"]
)
def test_resumed_evaluation_equals_uninterrupted_evaluation(stub, tmp_path, monkeypatch, moment):
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    evaluate.evaluate(stub, uninterrupted)

    def stop(*_, **__):
        raise KeyboardInterrupt

    if "batch" in moment:
        interrupt(monkeypatch, stub, resumed, after=0 if moment == "first batch" else 2)
    else:
        name = {
            "table": "write_table",
            "eval.json": "write_json",
            "confusion": "plots.draw_confusion",
            "page": "html_report.save_page",
        }[moment]
        with monkeypatch.context() as patch:
            patch.setattr(f"jaxvid.evaluation.outputs.{name}", stop)
            with pytest.raises(KeyboardInterrupt):
                evaluate.evaluate(stub, resumed)
    evaluate.evaluate(stub, resumed)
    reports = [
        json.loads((folder / "eval.json").read_text()) for folder in (uninterrupted, resumed)
    ]
    for report in reports:
        assert report.pop("seconds") > 0
        assert report.pop("clips_per_second") > 0
    assert reports[0] == reports[1]
    for name in ("eval_videos.csv", "confusion.png"):
        assert (uninterrupted / name).read_bytes() == (resumed / name).read_bytes()
    assert {path.name for path in uninterrupted.iterdir()} == {
        path.name for path in resumed.iterdir()
    }


def test_evaluation_uses_eval_dtype(folder, tiny_model, tmp_path):
    """`model.dtype`, which training uses, has no effect; the protocol records `eval.dtype`."""
    config = changed(make_config(folder), init_from=str(tiny_model), model__dtype="bfloat16")
    tables = {}
    for dtype in ("float32", "bfloat16"):
        workdir = tmp_path / dtype
        result = evaluate.evaluate(changed(config, eval__dtype=dtype), workdir)
        assert result["protocol"]["dtype"] == dtype
        tables[dtype] = (workdir / "eval_videos.csv").read_text()
    assert tables["bfloat16"] != tables["float32"]
    evaluate.evaluate(changed(config, model__dtype="float32"), tmp_path / "other")
    assert (tmp_path / "other" / "eval_videos.csv").read_text() == tables["float32"]


@pytest.mark.parametrize(
    ("in_config", "in_card", "used"),
    [("auto", "bt601", "bt601"), ("auto", None, "tagged"), ("tagged", "bt601", "tagged")],
)
def test_color_matrix_comes_from_the_model_card_unless_configured(
    stub, tmp_path, in_config, in_card, used
):
    path = tmp_path / "stub" / "model.json"
    card = json.loads(path.read_text())
    if in_card:
        card["preprocessing"]["color_matrix"] = in_card
    path.write_text(json.dumps(card))
    result = evaluate.evaluate(changed(stub, data__color_matrix=in_config), tmp_path / "w")
    assert result["protocol"]["color_matrix"] == used
    is_logged = (
        "color_matrix: 'bt601' in the model card, 'tagged' now"
        in (tmp_path / "w" / "log.txt").read_text()
    )
    assert is_logged == (in_config == "tagged")


def test_comparison_of_equal_evaluations(folder, tiny_model, tmp_path):
    config = make_config(folder).unlock()
    config.init_from = str(tiny_model)
    evaluate.evaluate(config.lock(), tmp_path / "a")
    evaluate.evaluate(config, tmp_path / "b", compare_with=tmp_path / "a" / "eval.json")
    comparison = json.loads((tmp_path / "b" / "comparison.json").read_text())
    assert (comparison["gained"], comparison["lost"], comparison["p_value"]) == (0, 0, 1.0)
    assert comparison["same_protocol"]
    assert "not significant" in (tmp_path / "b" / "log.txt").read_text()
    with pytest.raises(InputError, match="none.json: not found; choose the eval.json of a"):
        evaluate.evaluate(config, tmp_path / "b", compare_with=tmp_path / "none.json")


def test_unknown_dtype_is_refused(folder):
    config = make_config(folder, dtype="float16")
    with pytest.raises(
        InputError, match="eval.dtype='float16': must be one of 'float32', 'tfloat32', 'bf"
    ):
        resolve(config)


def test_unknown_score_is_refused(folder):
    config = make_config(folder, score="max")
    with pytest.raises(
        InputError, match="eval.score='max': must be one of 'logits', 'probabilities'"
    ):
        resolve(config)


def test_running_accuracy_counts_failed_videos_as_wrong(folder, monkeypatch):
    """The scores of a failed video are zeros. Their argmax is class 0, the video's label here."""
    messages = []

    def load(record, spec, out):
        if record.id == "broken.mp4":
            raise DecodeError("broken.mp4: cannot be decoded")
        out[...] = 0
        indices = np.zeros((1, spec.num_frames), np.int32)
        return {"video": out, "indices": indices, "padded": False, "released": True}

    def eval_step(params, batch):
        scores = np.tile(np.float32([2, 1, 0, 0]), (len(batch["video"]), 1))
        return {"scores": scores, "probabilities": scores / 3}

    monkeypatch.setattr(pipeline, "load_eval_views", load)
    monkeypatch.setattr(logs.RunProgress, "advance", lambda _, count, text: messages.append(text))
    experiment = resolve(make_config(folder))
    records = [Record(Path(name), label) for name, label in (("broken.mp4", 0), ("a.mp4", 0))]
    results = loop.evaluate_params(
        {},
        records,
        experiment.protocol,
        eval_step=eval_step,
        loader=experiment.loader,
        mesh=sharding.make_mesh(experiment.mesh),
    )
    assert results.hits(1).tolist() == [False, True]
    assert messages == ["top-1 50.00 %, 1 failed"]


def test_missing_weights_are_refused_without_creating_the_workdir(stub, tmp_path):
    config = changed(stub, init_from="")
    with pytest.raises(InputError, match="w contains no checkpoint; choose the --workdir of a"):
        evaluate.evaluate(config, tmp_path / "runs" / "w")
    with pytest.raises(InputError, match="none does not exist; choose a folder"):
        evaluate.evaluate(changed(stub, init_from=str(tmp_path / "none")), tmp_path / "runs" / "w")
    assert not (tmp_path / "runs").exists()


def test_a_different_validation_split_is_logged(stub, lines):
    experiment = resolve(stub)
    changed = {"data.val_share": "data.val_share: 0.2 before, 0.3 now"}
    evaluate._log_source("w", experiment, changed)
    assert lines[1:] == [
        "the validation videos may include training videos of the run: " + changed["data.val_share"]
    ]
    evaluate._log_source("w", experiment, changed | {"data.folder": "data.folder: a before, b now"})
    assert lines[2:] == ["evaluating w"]


def test_the_weights_may_be_named(stub, tmp_path, monkeypatch):
    folders = {"released": Path(stub.init_from)}
    monkeypatch.setattr(evaluate, "resolve_model", lambda name, **_: folders[name])
    result = evaluate.evaluate(changed(stub, init_from="released"), tmp_path / "w")
    assert result["checkpoint"] == stub.init_from
