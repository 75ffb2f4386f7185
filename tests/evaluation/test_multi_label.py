"""Multi-label data: lists, average precision, and training to prediction end to end."""

import csv
import json
import shutil

import numpy as np
import pytest
from scipy.special import expit

import jaxvid
from jaxvid import evaluate
from jaxvid.data import check, prepare
from jaxvid.data.annotations import read_list
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.label_sets import LabelSet, count_classes
from jaxvid.data.synthetic_motion import LABELS
from jaxvid.errors import InputError
from jaxvid.evaluation import metrics
from jaxvid.experiment import resolve
from jaxvid.storage import model_card
from jaxvid.train import train
from tests.conftest import shrunk_config
from tests.outputs import check_same_outputs

NONE = np.zeros(4, bool)


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        # Values of scikit-learn 1.9.1's average_precision_score; the first is of its docstring.
        ([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], 0.8333333333333333),
        ([1, 0, 1, 0], [0.5, 0.5, 0.5, 0.5], 0.5),  # a single threshold
        ([1, 0, 1, 0], [0.9, 0.7, 0.7, 0.1], 0.8333333333333333),  # 1/2 · 1 + 1/2 · 2/3
        ([0, 0, 0, 1], [4, 3, 2, 1], 0.25),
        ([1, 1, 1, 1], [4, 3, 2, 1], 1.0),
    ],
)
def test_average_precision_equals_scikit_learn(labels, scores, expected):
    actual = metrics.average_precision(np.array(labels), np.array(scores), NONE)
    assert actual == pytest.approx(100 * expected)


def test_average_precision_of_failed_and_absent_videos():
    assert np.isnan(metrics.average_precision(np.zeros(4), np.arange(4), NONE))
    # The second of the two positives is never found; the score of a failed video is not used.
    failed = np.array([False, False, True, False])
    actual = metrics.average_precision(np.array([1, 0, 1, 0]), np.array([3, 2, 9, 1]), failed)
    assert actual == pytest.approx(50)
    assert metrics.average_precision(np.array([0, 0, 1, 0]), np.arange(4), failed) == 0


def make_results(labels, scores, errors):
    """Return multi-label results of the videos `0`, `1`, ..."""
    count, scores = len(labels), np.array(scores, np.float32)
    failed = np.array([bool(error) for error in errors])[:, None]
    return metrics.Results(
        ids=[str(i) for i in range(count)],
        labels=np.array(labels),
        scores=np.where(failed, 0, scores),
        probabilities=np.where(failed, 0, expit(scores)),
        padded=np.zeros(count, bool),
        released=np.ones(count, bool),
        errors=errors,
        seconds=1.0,
    )


def test_multi_label_metrics():
    labels = [[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0]]
    scores = [[2, 1, 0], [0, 1, -1], [3, -2, -4], [1, 0, 0]]
    results = make_results(labels, scores, ["", "", "", "broken"])
    assert results.hits(1).tolist() == [True, False, False, False]
    assert results.hits(2).tolist() == [True, False, True, False]
    # Class 0: the first positive is second, the other failed. Class 1: 1 of 2 at the first
    # threshold (two videos have the score 1), 2 of 3 at the last. Class 2: no positive.
    np.testing.assert_allclose(results.per_class(), [25, 100 * (1 / 4 + 1 / 3), np.nan], rtol=1e-6)
    p, y = expit(np.array(scores[0])), np.array(labels[0])
    expected = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    losses = results.losses()
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert np.isnan(losses[3])
    assert (results.label(0), results.label(1)) == ([0, 1], [])


# ------------------------------------------------------------------ lists


def test_lists_may_have_several_classes(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.mp4").write_text("x")
    (tmp_path / "list.csv").write_text("path,label\na.mp4,3;1\nb.mp4 2\nc.mp4,;\nd.mp4 0;0;\n")
    records = read_list(tmp_path / "list.csv", 4)
    assert [record.label for record in records] == [(1, 3), 2, (), (0,)]
    sets = [LabelSet.make(record.label, 4) for record in records]
    rows = [[0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_array_equal([np.asarray(labels) for labels in sets], rows)
    assert [*map(str, sets)] == ["1;3", "2", "", "0"]
    assert count_classes(sets, 4).tolist() == [1, 1, 1, 1]
    with pytest.raises(InputError, match="list.csv:2: label 3;1 is out of range: with 3 classes"):
        read_list(tmp_path / "list.csv", 3)
    (tmp_path / "list.csv").write_text("a.mp4 1;x\n")
    with pytest.raises(InputError, match="list.csv:1: 'a.mp4 1;x' is not 'path label'"):
        read_list(tmp_path / "list.csv", 3)


# ------------------------------------------------------------------ programs


def classes_of(index: int) -> list[int]:
    """Return the classes of the motion clips of class `index`: 0 to 3, and 4 for even ones."""
    return [index // 2, 4] if index % 2 == 0 else [index // 2] if index > 1 else []


@pytest.fixture(scope="module")
def folder(motion_folder, tmp_path_factory):
    """Return a folder with the motion clips and multi-label lists of five classes."""
    folder = shutil.copytree(motion_folder, tmp_path_factory.mktemp("multi") / "data")
    for split in ("train", "val"):
        rows = csv.reader((folder / f"{split}.csv").read_text().splitlines(), delimiter=" ")
        lines = [f"{path},{';'.join(map(str, classes_of(int(i)))) or ';'}\n" for path, i in rows]
        (folder / f"{split}.csv").write_text("".join(lines))
    (folder / "labels.txt").write_text("".join(f"class {c}\n" for c in range(5)))
    return folder


@pytest.fixture(scope="module")
def config(folder):
    config = shrunk_config(folder, num_epochs=1.0).unlock()
    config.loss.name = "sigmoid"
    config.loss.class_weights = "balanced"
    config.mixup_alpha = 0.4
    config.model.num_classes = 5
    return config.lock()


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """Return the workdir and the report of a finished run of three steps."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return workdir, train(config, workdir)


def read_rows(workdir):
    """Return the rows of `eval_videos.csv`."""
    return [*csv.DictReader((workdir / "eval_videos.csv").read_text().splitlines())]


def test_training_writes_the_average_precision(run, folder):
    workdir, report = run
    saved = json.loads((workdir / "eval.json").read_text())
    assert saved["per_class_ap"].keys() == {f"class {c}" for c in range(5)}
    assert saved["mAP"] == pytest.approx(np.mean([*saved["per_class_ap"].values()]))
    assert saved["protocol"]["activation"] == "sigmoid"
    assert not {"confusion", "class_accuracy"} & saved.keys()
    assert saved["mean_class_accuracy"] is saved["calibration_error"] is None
    assert not (workdir / "confusion.png").exists()
    rows = read_rows(workdir)
    assert {row["label"] for row in rows} >= {"[]", '["class 0", "class 4"]'}
    for row in rows:
        best = json.loads(row["top5"])[0]
        assert row["correct"] == str(int(best in json.loads(row["label"])))
    page = (workdir / "eval.html").read_text()
    assert f"<title>mAP {report['mAP']:.2f} % on 24 videos</title>" in page
    metric_rows = [*map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())]
    assert metric_rows[-1]["val/mAP"] == report["mAP"]
    best = model_card.load_card(workdir / "best")
    assert best["provenance"]["mAP"] == report["mAP"]
    assert (best["activation"], best["provenance"]["top1"]) == ("sigmoid", report["top1"])


@pytest.mark.full
def test_a_resumed_run_is_bit_identical(run, config, tmp_path):
    assert train(config, tmp_path / "w", stop_step=2) is None
    train(config, tmp_path / "w")
    check_same_outputs(tmp_path / "w", run[0])


def test_evaluation_and_prediction_use_the_sigmoid(run, config, folder, tmp_path):
    workdir, report = run
    other = config.copy_and_resolve_references().unlock()
    other.init_from = str(workdir / "model")
    other.eval.batch_size = 40  # larger than the number of videos
    again = evaluate.evaluate(other.lock(), tmp_path / "eval")
    assert again["mAP"] == report["mAP"]
    rows = {row["id"]: row for row in read_rows(workdir)}
    id_ = "val/00000.mp4"
    prediction = jaxvid.Classifier(workdir / "model").predict(folder / id_)
    assert [*prediction.labels] == json.loads(rows[id_]["top5"])
    expected = json.loads(rows[id_]["probabilities"])
    np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-4)
    assert sum(prediction.probabilities) > 1.5  # near 0.5 each after three steps


def test_single_label_options_are_refused(run, config, folder, tmp_path):
    workdir, _ = run

    def changed(**fields):
        other = config.copy_and_resolve_references().unlock()
        other.update_from_flattened_dict(fields)
        return other.lock()

    with pytest.raises(InputError, match="data.sampler='balanced': not possible with loss.name=s"):
        resolve(changed(**{"data.sampler": "balanced"}))
    with pytest.raises(InputError, match="distill.teacher='x': not possible with loss.name=sigm"):
        resolve(changed(**{"distill.teacher": "x"}))
    with pytest.raises(InputError, match="loss.name='bce': must be one of 'softmax', 'sigmoid'"):
        resolve(changed(**{"loss.name": "bce"}))
    with pytest.raises(InputError, match="set --config.loss.name=sigmoid"):
        train(changed(**{"loss.name": "softmax"}), tmp_path / "w")
    softmax = changed(**{"loss.name": "softmax", "init_from": str(workdir / "model")})
    with pytest.raises(InputError, match="was trained with loss.name=sigmoid, the config has sof"):
        evaluate.evaluate(softmax, tmp_path / "eval")
    with pytest.raises(InputError, match="loss.name: 'sigmoid' before, 'softmax' now"):
        evaluate.evaluate(changed(**{"loss.name": "softmax"}), workdir)


def test_packs_of_multi_label_data_are_refused(folder, tmp_path):
    records, names = check.gather([folder])
    assert len(records["train"]) == 48
    assert names == [f"class {c}" for c in range(5)]
    with pytest.raises(InputError, match="but a pack stores one class per video"):
        prepare.prepare([folder], tmp_path / "pack", Settings(), workers=1)


def test_single_label_lists_may_be_trained_with_the_sigmoid(motion_folder, config):
    """A list without `;` is a multi-label list in which every video has one class."""
    other = config.copy_and_resolve_references().unlock()
    other.data.folder, other.model.num_classes = str(motion_folder), 8
    dataset = resolve(other.lock()).dataset
    data = evaluate.open_dataset(dataset, 8, ("val",))
    assert data.labels == [*LABELS]
    assert {len(record.label.classes) for record in data.records["val"]} == {1}
