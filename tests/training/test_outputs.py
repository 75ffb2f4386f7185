"""The messages at the end of a training run; the folders are tested in test_checkpoint.py."""

import shlex
import sys
from pathlib import Path

import pytest

from jaxvid.training.outputs import describe_use


@pytest.mark.parametrize("generated", [False, True])
def test_describe_use_gives_commands_for_other_videos(generated, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my venv" / "bin" / "python"))
    model = Path("runs/motion 2/model")
    lines = describe_use(model, generated=generated).splitlines()
    first, commands = lines[0], [line for line in lines if line.startswith("  ")]
    # The path is relative to the current folder, because that is shorter.
    python = ["my venv/bin/python", "-m", "jaxvid"]
    if not generated:
        assert first == "To classify your own clip:"
        expected = [[*python, "predict", "CLIP.mp4", "--model", str(model)]]
    else:
        assert first.startswith("The model knows only the generated motions. To classify")
        assert lines[2].startswith("To train on your own classes, with one folder per class")
        data = f"finetune:{model},MY_VIDEOS"
        expected = [
            [*python, "predict", "CLIP.mp4", "--model", "stam_16"],
            [*python, "train", "--config", data, "--workdir", "runs/mine"],
        ]
    assert [shlex.split(line) for line in commands] == expected


def test_describe_use_prefers_the_shorter_path(monkeypatch, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    monkeypatch.setattr(sys, "executable", "/bin/python")
    assert "  /bin/python -m jaxvid predict" in describe_use(Path("m"), generated=False)
