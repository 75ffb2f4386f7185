"""Multi-label data from training to prediction."""

import csv
import json
import shutil

import numpy as np
import pytest

import jaxvid
from jaxvid import evaluate
from jaxvid.data import check, prepare
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.synthetic_motion import LABELS
from jaxvid.errors import InputError
from jaxvid.experiment import resolve
from jaxvid.storage import model_card
from jaxvid.train import train
from tests.conftest import shrunk_config
from tests.outputs import check_same_outputs


def classes_of(index: int) -> list[int]:
    """Return the classes for a motion class: one of 0 to 3, and 4 if it is even; 1 has none."""
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
