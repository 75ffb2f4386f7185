"""Probes on features, and the command `jaxvid probe`."""

import dataclasses
import json

import numpy as np
import pytest

from jaxvid import probe as program
from jaxvid.errors import InputError
from jaxvid.evaluation.probing import ProbeData, hold_out, probe
from jaxvid.storage.feature_file import FeatureTable, save_features

NUM_CLASSES = 6


def make_table(count, seed, *, windows=1, noise=0.1) -> FeatureTable:
    """Return features of `count` videos whose classes are directions in space."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % NUM_CLASSES
    values = 5 * np.eye(NUM_CLASSES)[labels] + 1
    values = np.repeat(values, windows, axis=0)
    values += noise * rng.normal(size=values.shape)
    return FeatureTable(
        features=values.astype(np.float32),
        ids=[f"{i}.mp4" for i in range(count) for _ in range(windows)],
        labels=np.repeat(labels, windows).astype(np.int32),
        label_names=[f"class {c}" for c in range(NUM_CLASSES)],
        padded=np.zeros(count * windows, bool),
        starts=None,
        ends=None,
        about={"format_version": 1, "model": "m", "layer": "video", "weights_sha256": "1"},
    )


def to_data(table) -> ProbeData:
    return ProbeData(features=table.features, labels=table.labels, ids=table.ids)


def run(tmp_path, train, val=None, *options) -> int:
    """Save tables and run the program on them."""
    files = []
    for name, table in (("train", train), ("val", val)):
        if table is not None:
            save_features(tmp_path / f"{name}.npz", table)
            files.append(str(tmp_path / f"{name}.npz"))
    return program.main([*files, *options])


# ------------------------------------------------------------------ scikit-learn


def test_separable_features_are_classified_without_errors():
    pytest.importorskip("sklearn")
    linear, nearest, many = probe(
        to_data(make_table(36, 0)), to_data(make_table(12, 1)), NUM_CLASSES, [1, 10]
    )
    assert linear.name.startswith("linear, C = ")
    for result in (linear, nearest, many):
        assert result.top1_hits.tolist() == [True] * 12
    assert nearest.top5_hits is None
    assert linear.top5_hits.all()
    assert linear.note == ""


def test_wrong_labels_and_unknown_classes_count_as_wrong():
    pytest.importorskip("sklearn")
    val = to_data(make_table(12, 1))
    labels = val.labels.copy()
    labels[:3] = [5, -1, 0]  # wrong, not in the training data, wrong
    val = dataclasses.replace(val, labels=labels)
    for result in probe(to_data(make_table(36, 0)), val, NUM_CLASSES, [5]):
        expected = dict(zip(val.ids, [False] * 3 + [True] * 9, strict=True))
        assert result.top1_hits.tolist() == [expected[id_] for id_ in sorted(expected)]


def test_windows_of_a_video_are_averaged():
    pytest.importorskip("sklearn")
    val = make_table(12, 1, windows=3)
    val.features[::3] = val.features[::3][::-1]  # one of three windows has another class
    for result in probe(to_data(make_table(36, 0)), to_data(val), NUM_CLASSES, [5]):
        assert result.top1_hits.tolist() == [True] * 12


def test_few_videos_get_the_default_regularisation():
    pytest.importorskip("sklearn")
    train, val = to_data(make_table(NUM_CLASSES, 0)), to_data(make_table(12, 1))
    [linear] = probe(train, val, NUM_CLASSES, [])
    assert linear.name == "linear, C = 1"
    assert linear.note == "no class has two training videos to choose C"


def test_the_program_prints_a_table_and_writes_it(tmp_path, capsys):
    pytest.importorskip("sklearn")
    train, val = make_table(36, 0), make_table(12, 1)
    val = dataclasses.replace(val, label_names=val.label_names[::-1], labels=5 - val.labels)
    val.features[0] = train.features[0]
    assert run(tmp_path, train, val, "--k", "1,100", "--json", str(tmp_path / "out.json")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "6 features; 36 training and 12 validation videos, 6 classes" in lines[0]
    assert lines[1].startswith("1 of 12 rows of ")
    assert lines[1].endswith("train.npz, so that the accuracy is too high")
    assert lines[2] == "k above 36, the number of training rows, is left out"
    assert lines[4].split()[:2] == ["probe", "top-1"]
    assert [line.split()[0] for line in lines[5:]] == ["linear,", "k-NN,"]
    report = json.loads((tmp_path / "out.json").read_text())
    linear, nearest = report["probes"]
    assert (linear["top1"], nearest["top1"], nearest["top5"]) == (100, 100, None)
    assert linear["top1_interval"] == pytest.approx([73.5, 100], abs=0.1)  # 0.025^(1/12)
    assert run(tmp_path, train, None, "--val_share", "0.2", "--json", str(tmp_path / "b.json")) == 0
    assert json.loads((tmp_path / "b.json").read_text())["num_val"] == NUM_CLASSES


# ------------------------------------------------------------------ without scikit-learn


def test_held_out_videos_do_not_depend_on_their_order_and_keep_their_windows():
    table = make_table(60, 0, windows=2)
    data = to_data(table)
    mask = hold_out(data, 0.2)
    assert mask.reshape(60, 2).all(axis=1).sum() == mask.sum() / 2 == 12
    assert np.bincount(data.labels[mask]).tolist() == [4] * NUM_CLASSES
    order = np.random.default_rng(0).permutation(120)
    shuffled = ProbeData(
        features=data.features[order],
        labels=data.labels[order],
        ids=[data.ids[i] for i in order],
    )
    assert (hold_out(shuffled, 0.2) == mask[order]).all()
    assert not hold_out(to_data(make_table(NUM_CLASSES, 0)), 0.5).any()
    assert hold_out(to_data(make_table(2 * NUM_CLASSES, 0)), 0.99).sum() == NUM_CLASSES


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, ["--val_share", "0.5"], "give either VAL, a second file of features, or --val_share"),
        ({}, ["--k", "0"], "--k 0: must be positive numbers separated by commas"),
        ({}, ["--json", "out.txt"], "--json out.txt: the file name must end in .json"),
        ({"labels": np.full(12, -1)}, [], "12 of 12 rows have no label; extract features of"),
        ({"label_names": list("abcdef")}, [], "val.npz: none of its classes is in "),
        ({"about": {"format_version": 1, "weights_sha256": "2"}}, [], "weights_sha256: 1 in "),
    ],
)
def test_unusable_input_is_refused(tmp_path, monkeypatch, capsys, change, options, message):
    monkeypatch.setattr(program, "import_or_explain", lambda *_: None)
    val = dataclasses.replace(make_table(12, 1), **change)
    assert run(tmp_path, make_table(36, 0), val, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    assert run(tmp_path, make_table(36, 0), make_table(12, 1)) == 2
    assert "jaxvid probe needs scikit-learn" in capsys.readouterr().err


def test_videos_of_one_class_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "import_or_explain", lambda *_: None)
    table = make_table(12, 0)
    table.labels[:] = 0
    save_features(tmp_path / "a.npz", table)
    args = program.parsers.probe().parse_args([str(tmp_path / "a.npz"), "--val_share=0.5"])
    with pytest.raises(InputError, match="all videos have the same class; at least two are needed"):
        program.load(args)
