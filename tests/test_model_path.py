"""Messages for a path that is not a model folder, and suggestions of the right one."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxvid.errors import InputError
from jaxvid.model_list import list_models
from jaxvid.model_path import NOT_PRETRAINED, PRETRAINED, check_model_path

ROOT = Path(__file__).parents[1]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Change to a folder with a run; its model folders are only marked as such."""
    for name in ("model", "best"):
        (tmp_path / "runs" / "motion" / name).mkdir(parents=True)
        (tmp_path / "runs" / "motion" / name / "model.json").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.pth").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("runs/motion", r"\(no runs/motion/model.json\); did you mean runs/motion/model\?"),
        ("runs/motoin/model", r"does not exist; did you mean runs/motion/model\?"),
        ("runs/motion/bets", r"does not exist; did you mean runs/motion/best\?"),
        ("runs/motio", r"does not exist; did you mean runs/motion/model\?"),
        ("runs/motion/model/model.json", r"\(it is a file\); did you mean runs/motion/model\?"),
        ("empty", "; choose a folder written by training or by a converter"),
        ("no/such/folder", "does not exist; choose a folder"),
    ],
)
def test_wrong_paths_are_refused(runs, path, message):
    with pytest.raises(InputError, match=f"^{path} .*{message}"):
        check_model_path(path)


def test_names_of_presets_are_those_of_the_models():
    assert [*PRETRAINED] == list_models(pretrained=True)
    assert {*PRETRAINED, *NOT_PRETRAINED} == {*list_models()}


def test_other_values_are_left_to_the_loader(runs):
    for name in ("runs/motion/model", "weights.pth", "xvit_k600", "https://host/x.pth"):
        check_model_path(name)


def test_predict_refuses_a_wrong_path_without_importing_jax(runs):
    script = (
        "import sys; from jaxvid import predict; code = predict.main(['a.mp4', '--model', 'runs']);"
        " assert not {'jax', 'matplotlib'} & {*sys.modules}; sys.exit(code)"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (
        2,
        "error: runs is not a model folder (no runs/model.json); choose a folder written by "
        "training or by a converter\n",
    )
