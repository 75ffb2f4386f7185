"""Model folders that cannot be used: one line each."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

import jaxvid
from jaxvid.errors import InputError
from jaxvid.predict import main
from jaxvid.storage import model_card
from jaxvid.storage.preprocessing import read_preprocessing, resolve_color_matrix


@pytest.fixture
def damaged(folders, tmp_path):
    """A copy of a model folder, to be spoiled."""
    return shutil.copytree(folders / "xvit", tmp_path / "damaged")


def edit(folder: Path, **changes) -> None:
    card = json.loads((folder / "model.json").read_text())
    for key, value in changes.items():
        if isinstance(value, dict):
            card[key].update(value)
        else:
            card[key] = value
    (folder / "model.json").write_text(json.dumps(card))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest(folder: Path) -> Path:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "model.json").unlink(),
            "is not a model folder: .*model.json does not exist",
        ),
        (lambda f: cut(f / "model.json"), "model.json cannot be read"),
        (lambda f: shutil.rmtree(f / "params"), "params is damaged: .* files are missing"),
        (lambda f: cut(largest(f / "params")), "params is damaged: 1 of "),
        (lambda f: largest(f / "params").unlink(), "params is damaged: 1 of "),
        (lambda f: edit(f, format_version=9), "has format version 9; this jaxvid reads 1: update"),
        (lambda f: edit(f, config={"width": 32}), "params does not fit the model: .*width|kernel"),
        (lambda f: edit(f, config={"num_classes": 9}, labels=None), r"\(16, 8\) in the folder"),
        (lambda f: edit(f, config={"gears": 5}), "model.json: .* has no option 'gears'"),
        (lambda f: edit(f, config={"heads": 3}), "model.json: .*width=16 does not divide"),
        (lambda f: edit(f, config=None), "model.json: .*export the model again"),
        (lambda f: edit(f, labels=["one"]), "labels has 1 entries for num_classes=8"),
        (lambda f: edit(f, labels="one"), "labels has 'one' entries for num_classes=8"),
        (lambda f: edit(f, preprocessing=None), "says nothing of preprocessing"),
        (lambda f: edit(f, preprocessing={"gears": 5}), "model.json: .*'gears'"),
        (
            lambda f: edit(f, preprocessing={"mean": "0"}),
            "preprocessing has mean='0', which it can",
        ),
        (lambda f: edit(f, preprocessing={"std": 0}), "preprocessing has std=0, which it cannot"),
        (lambda f: edit(f, preprocessing={"by_time": 1}), "preprocessing has by_time=1, which"),
        (lambda f: edit(f, preprocessing={"num_frames": 8.5}), "preprocessing has num_frames=8.5"),
        (lambda f: edit(f, preprocessing={"num_crops": 2}), "num_crops=2: must be one of 1, 3"),
        (lambda f: edit(f, preprocessing=[8]), "model.json says nothing of preprocessing"),
        (lambda f: edit(f, preprocessing={"crop": 65}), "short_side=72|does not fit the network"),
        (lambda f: edit(f, preprocessing={"num_frames": 9}), "9 frames do not divide"),
        (lambda f: edit(f, preprocessing={"sampling": "x"}), "sampling='x': must be one of"),
    ],
)
def test_bad_folders_are_one_line(damaged, clips, capsys, spoil, message):
    spoil(damaged)
    assert main([clips[0], "--model", str(damaged)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert str(damaged) in err
    assert re.search(message, err)
    assert len(err.splitlines()) == 1


def test_a_folder_without_mean_is_refused(damaged):
    card = json.loads((damaged / "model.json").read_text())
    del card["preprocessing"]["mean"]
    (damaged / "model.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match="preprocessing has no mean"):
        jaxvid.Classifier(damaged)


def test_weights_that_are_not_finite_are_no_prediction(folders, clips, tmp_path, capsys):
    model = jaxvid.create_model("xvit_tiny", width=16, depth=2)
    model.consensus.cls_token[...] = np.nan
    how = model_card.load_card(folders / "xvit")["preprocessing"]
    jaxvid.save_model(model, tmp_path / "nan", preprocessing=how)
    assert main([clips[0], "--model", str(tmp_path / "nan")]) == 2
    assert "logits that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "matrix"), [("stam", "bt601"), ("xvit", "tagged"), (None, "tagged")]
)
def test_folders_older_than_the_color_matrix_get_the_one_of_their_program(damaged, kind, matrix):
    card = model_card.load_card(damaged)
    card["preprocessing"].pop("color_matrix", None)
    card["provenance"] = {"kind": kind} if kind else {}
    assert read_preprocessing(card, damaged / "model.json")["color_matrix"] == matrix


def test_resolving_the_color_matrix_leaves_the_config_as_it_is():
    config = ConfigDict({"data": {"color_matrix": "auto"}}).lock()
    resolved = resolve_color_matrix(config, {"color_matrix": "bt601"})
    assert (resolved.data.color_matrix, config.data.color_matrix) == ("bt601", "auto")
    assert resolved.is_locked
