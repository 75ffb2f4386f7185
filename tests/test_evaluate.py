"""Evaluation through the whole path, with a network whose answers are known in advance."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import common
from jaxvid import evaluate, model_folder, sharding
from jaxvid.data.motion import write_clip
from jaxvid.data.packing import Settings
from jaxvid.data.prepare import prepare
from jaxvid.data.sources import open_folder
from jaxvid.errors import InputError
from jaxvid.models import create_model, split_params

# Colours of the videos (their mean is what the network answers), and labels: 13 of 19 are right.
RIGHT = [((200, 30, 30), 0), ((30, 200, 30), 1), ((30, 30, 200), 2)] * 4 + [((90, 90, 90), 3)]
WRONG = [((200, 150, 30), 1), ((150, 30, 200), 0), ((30, 30, 30), 2)] * 2
VIDEOS = RIGHT + WRONG


class Colour(nnx.Module):
    """Answers with the mean of each colour, and a constant .5 for a fourth class."""

    def __init__(self):
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, video, *, key=None):
        means = video.mean(axis=(1, 2, 3))  # (b c)
        return jnp.concatenate([means, jnp.full((len(video), 1), 0.5)], axis=1) + self.bias[...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """19 videos of one colour each, of which the second is too short, and a broken one."""
    folder = tmp_path_factory.mktemp("colours")
    lines = []
    for i, (colour, label) in enumerate(VIDEOS):
        frames = np.full((4 if i == 1 else 12, 36, 48, 3), colour, np.uint8)
        write_clip(folder / f"{i}.mp4", frames)
        lines.append(f"{i}.mp4 {label}")
    (folder / "broken.mp4").write_text("no video")
    lines.insert(7, "broken.mp4 2")
    (folder / "val.csv").write_text("\n".join(lines) + "\n")
    (folder / "train.csv").write_text(lines[0] + "\n")
    (folder / "labels.txt").write_text("red\ngreen\nblue\ngrey\n")
    return folder


def make_config(folder, **settings):
    config = common.train_section()
    config.model = common.model_section("xvit_tiny", num_classes=4, image_size=32)
    config.data = common.data_section(folder=str(folder), mean=0.0, std=1.0)
    config.eval = common.eval_section(short_side=32, batch_size=8)
    config.eval.update({k: v for k, v in settings.items() if k in config.eval})
    config.mesh.update({k: v for k, v in settings.items() if k in config.mesh})
    return config.lock()


def run(config, source="folder", folder=None):
    """The stub's results on the validation videos."""
    graphdef, params = split_params(Colour())
    config = config.copy_and_resolve_references().unlock()
    config.data.update(source=source, folder=str(folder or config.data.folder))
    mesh = sharding.make_mesh(config.mesh)
    records = open_folder(config.data, 4, ("val",)).records["val"]
    step = evaluate.make_eval_step(config, graphdef, mesh)
    results = evaluate.evaluate_params(params, records, config, eval_step=step, mesh=mesh)
    return results, evaluate.make_report(results, config, checkpoint="stub")


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
def test_known_answers_give_known_numbers(folder, settings):
    results, report = run(make_config(folder, **settings))
    assert results.ids[7].endswith("broken.mp4")
    assert report["top1"] == 100 * len(RIGHT) / 20
    assert report["top5"] == 100 * 19 / 20  # four classes: all but the broken one
    assert (report["num_videos"], report["num_evaluated"], report["num_failed"]) == (20, 19, 1)
    assert report["num_padded"] == 1
    [failed] = report["failed"]
    assert (failed["label"], "broken.mp4: cannot be decoded" in failed["error"]) == (2, True)
    # Red: 4 of 6; green: 4 of 6; blue: 4 of 7, the broken one is blue; grey: 1 of 1.
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
    expected, reported = run(config)
    prepare([folder], tmp_path / "pack", Settings(quality=95), workers=1)
    found, report = run(config, "pack", tmp_path / "pack")
    np.testing.assert_allclose(found.scores, expected.scores, atol=0.01)
    assert found.failed.tolist() == expected.failed.tolist()  # a pack still lists what is broken
    assert "could not be decoded when it was packed" in found.errors[7]
    for name in ("top1", "top5", "mean_class_accuracy", "num_videos", "num_padded", "num_failed"):
        assert report[name] == reported[name], name


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    how = {"sampling": "segments", "sampling_rate": 16, "mean": 0.0, "std": 1.0}
    model = create_model("xvit_tiny", num_classes=4, image_size=32, seed=1)
    model_folder.save_model(model, folder, preprocessing=how)
    return folder


def test_the_files_of_an_evaluation(folder, tiny_model, tmp_path):
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


def test_an_interrupted_evaluation_goes_on_where_it_was(folder, tiny_model, tmp_path, monkeypatch):
    config = make_config(folder).unlock()
    config.init_from = str(tiny_model)
    whole = evaluate.evaluate(config.lock(), tmp_path / "whole")
    calls = []
    original = evaluate.make_eval_step

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
    found = evaluate.evaluate(config, tmp_path / "w")
    assert len(calls) == 3 + 2  # of three batches one was done and kept
    same = {name for name in whole if name not in ("seconds", "clips_per_second")}
    assert {name: found[name] for name in same} == {name: whole[name] for name in same}
    # Another protocol begins anew.
    other = config.copy_and_resolve_references().unlock()
    other.eval.num_crops = 3
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(other.lock(), tmp_path / "w")
    assert len(calls) == 3


def test_two_models_are_compared_video_by_video(folder, tiny_model, tmp_path):
    config = make_config(folder).unlock()
    config.init_from = str(tiny_model)
    evaluate.evaluate(config.lock(), tmp_path / "a")
    evaluate.evaluate(config, tmp_path / "b", compare_with=tmp_path / "a" / "eval.json")
    found = json.loads((tmp_path / "b" / "comparison.json").read_text())
    assert (found["gained"], found["lost"], found["p_value"]) == (0, 0, 1.0)
    assert found["same_protocol"]
    assert "not significant" in (tmp_path / "b" / "log.txt").read_text()
    with pytest.raises(InputError, match="name an eval.json that --mode eval wrote"):
        evaluate.evaluate(config, tmp_path / "b", compare_with=tmp_path / "none.json")


def test_unknown_scores_are_refused(folder):
    config = make_config(folder, score="max")
    with pytest.raises(
        InputError, match="eval.score='max': there are 'logits' and 'probabilities'"
    ):
        evaluate.check_protocol(config, sharding.make_mesh(config.mesh))
    assert jax.device_count() == 8
