"""Preprocessing in model cards; unusable model folders give one-line errors."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import jaxvid
from jaxvid.errors import InputError
from jaxvid.experiment import resolve
from jaxvid.predict import main
from jaxvid.storage import model_card
from jaxvid.storage.preprocessing import (
    Preprocessing,
    check_preprocessing,
    read_preprocessing,
)


@pytest.fixture
def damaged(folders, tmp_path):
    """A copy of a model folder for a test to damage."""
    return shutil.copytree(folders / "xvit", tmp_path / "damaged")


def edit(folder: Path, **changes) -> None:
    """Change fields of `model.json`; a dict is merged into the old value."""
    card = json.loads((folder / "model.json").read_text())
    for key, value in changes.items():
        if isinstance(value, dict):
            card[key].update(value)
        else:
            card[key] = value
    (folder / "model.json").write_text(json.dumps(card))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest(folder: Path) -> Path:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "model.json").unlink(),
            "is not a model folder .no .*model.json",
        ),
        (lambda f: truncate(f / "model.json"), "model.json cannot be read"),
        (lambda f: shutil.rmtree(f / "params"), "params is damaged: .* files are missing"),
        (lambda f: truncate(largest(f / "params")), "params is damaged: 1 of "),
        (lambda f: largest(f / "params").unlink(), "params is damaged: 1 of "),
        (
            lambda f: edit(f, format_version=9),
            "has format version 9, but this jaxvid reads 1; update",
        ),
        (
            lambda f: edit(f, config={"width": 32}),
            "params does not fit the model: .*(width|kernel)",
        ),
        (lambda f: edit(f, config={"num_classes": 9}, labels=None), r"\(16, 8\) in the folder"),
        (lambda f: edit(f, config={"gears": 5}), "model.json: .* has no option 'gears'"),
        (lambda f: edit(f, config={"heads": 3}), "model.json: .*width=16 is not divisible"),
        (lambda f: edit(f, config=None), "model.json: .*export the model again"),
        (lambda f: edit(f, labels=["one"]), "labels has 1 entries, expected num_classes=8"),
        (lambda f: edit(f, labels="one"), "labels is 'one', expected a list or null"),
        (lambda f: edit(f, preprocessing=None), "preprocessing is missing"),
        (lambda f: edit(f, preprocessing={"gears": 5}), "model.json: .*'gears'"),
        (
            lambda f: edit(f, preprocessing={"mean": "0"}),
            "preprocessing has mean='0', which is inv",
        ),
        (lambda f: edit(f, preprocessing={"std": 0}), "preprocessing has std=0, which is invalid"),
        (lambda f: edit(f, preprocessing={"by_time": 1}), "preprocessing has by_time=1, which"),
        (lambda f: edit(f, preprocessing={"num_frames": 8.5}), "preprocessing has num_frames=8.5"),
        (lambda f: edit(f, preprocessing={"num_crops": 2}), "num_crops=2: must be one of 1, 3"),
        (
            lambda f: edit(f, preprocessing=[8]),
            "model.json: preprocessing is .8., expected a dict or null",
        ),
        (lambda f: edit(f, preprocessing={"crop": 65}), "short_side=72|does not fit the network"),
        (lambda f: edit(f, preprocessing={"num_frames": 9}), "9 frames are not divisible"),
        (lambda f: edit(f, preprocessing={"sampling": "x"}), "sampling='x': must be one of"),
    ],
)
def test_unusable_folders_give_one_line_errors(damaged, clips, capsys, damage, message):
    damage(damaged)
    assert main([clips[0], "--model", str(damaged)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert str(damaged) in err
    assert re.search(message, err)
    assert len(err.splitlines()) == 1


def test_missing_mean_is_refused(damaged):
    card = json.loads((damaged / "model.json").read_text())
    del card["preprocessing"]["mean"]
    (damaged / "model.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match="preprocessing has no mean"):
        jaxvid.Classifier(damaged)


def test_non_finite_weights_are_refused(folders, clips, tmp_path, capsys):
    model = jaxvid.create_model("xvit_tiny", width=16, depth=2)
    model.consensus.cls_token[...] = np.nan
    preprocessing = model_card.load_card(folders / "xvit")["preprocessing"]
    jaxvid.save_model(model, tmp_path / "nan", preprocessing=preprocessing)
    assert main([clips[0], "--model", str(tmp_path / "nan")]) == 2
    assert "the outputs of the network are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "matrix"), [("stam", "bt601"), ("xvit", "tagged"), (None, "tagged")]
)
def test_folders_without_color_matrix_use_that_of_the_original_program(damaged, kind, matrix):
    """Weights that were not converted from an original implementation (kind None) use `tagged`."""
    card = model_card.load_card(damaged)
    card["preprocessing"].pop("color_matrix", None)
    card["provenance"] = {"kind": kind} if kind else {}
    assert read_preprocessing(card, damaged / "model.json").color_matrix == matrix


def test_with_color_matrix_replaces_only_auto(config):
    experiment = resolve(config)
    assert experiment.preprocessing.color_matrix == "tagged"
    resolved = experiment.with_color_matrix("bt601")
    assert resolved.dataset.color_matrix == "bt601"
    assert resolved.preprocessing.color_matrix == resolved.train_clips.color_matrix == "bt601"
    assert resolved.with_color_matrix("tagged") == resolved  # no longer auto: unchanged
    assert experiment.dataset.color_matrix == "auto"


def test_preprocessing_round_trips_through_json():
    preprocessing = Preprocessing(num_frames=8, crop=64, short_side=72, mean=0.5, std=0.25)
    stored = json.loads(json.dumps(preprocessing.to_json()))
    assert Preprocessing.from_json(stored) == preprocessing
    assert preprocessing.spec.short_side == 72
    with pytest.raises(InputError, match="short_side=32 is smaller than the crop of 64 px"):
        dataclasses.replace(preprocessing, short_side=32)


# ------------------------------------------------------------------ statistics of the channels

SIZES = {"num_frames": 8, "crop": 64, "short_side": 72}


@pytest.mark.parametrize(
    ("value", "expected", "stored"),
    [
        (0.5, 0.5, 0.5),
        (0, 0, 0),
        ([0.5, 0.5, 0.5], 0.5, 0.5),
        ([0.1, 0.2, 0.3], (0.1, 0.2, 0.3), [0.1, 0.2, 0.3]),
        ((1, 0, 0), (1.0, 0.0, 0.0), [1.0, 0.0, 0.0]),
        ("imagenet", (0.485, 0.456, 0.406), [0.485, 0.456, 0.406]),
    ],
)
def test_mean_is_a_number_or_three(value, expected, stored):
    preprocessing = Preprocessing(**SIZES, mean=value, std="imagenet")
    assert (preprocessing.mean, preprocessing.std) == (expected, (0.229, 0.224, 0.225))
    fields = json.loads(json.dumps(preprocessing.to_json()))
    assert (fields["mean"], type(fields["mean"])) == (stored, type(stored))
    assert Preprocessing.from_json(fields) == preprocessing
    assert hash(preprocessing) == hash(Preprocessing.from_json(fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [("mean", "imagnet"), ("mean", (0.1, 0.2)), ("mean", True), ("mean", None),
     ("mean", float("nan")), ("std", 0), ("std", (1, 1, 0)), ("std", -1.0)],
)  # fmt: skip
def test_impossible_statistics_are_refused(field, value):
    with pytest.raises(
        InputError, match=rf"{field}=.*: must be a (positive )?number, three .* or 'imagenet'$"
    ):
        Preprocessing(**{**SIZES, "mean": 0.5, "std": 0.5, field: value})


def check(folder, preprocessing):
    check_preprocessing(model_card.load_card(folder), folder, preprocessing)


def test_the_statistics_of_config_and_model_card_are_compared(damaged):
    edit(damaged, preprocessing={"mean": [0.5, 0.5, 0.5]})
    fields = {**SIZES, "mean": 0.5, "std": 0.5}
    check(damaged, Preprocessing(**fields))
    edit(damaged, preprocessing={"mean": [0.485, 0.456, 0.406]})
    check(damaged, Preprocessing(**{**fields, "mean": "imagenet"}))
    message = r"mean: \[0.485, 0.456, 0.406\] in the model card, 0.5 in the config; use the"
    with pytest.raises(InputError, match=message):
        check(damaged, Preprocessing(**fields))


def test_a_config_may_name_the_statistics(config):
    for value in ("imagenet", (0.485, 0.456, 0.406), [0.485, 0.456, 0.406]):
        config.data.mean = value
        experiment = resolve(config)
        assert experiment.fields["data"]["mean"] == [0.485, 0.456, 0.406]
        assert experiment.fields["data"]["std"] == 0.5
        assert experiment.recipe.mean == experiment.preprocessing.mean == (0.485, 0.456, 0.406)
