"""The command `jaxvid compare`."""

import json
import subprocess
import sys

import pytest

from jaxvid import compare
from tests.programs import write_evaluation

LABELS = ["down", "left", "right", "up"]


@pytest.fixture
def evaluations(tmp_path):
    """Return the folders of two evaluations of eight videos; the second is better at `up`."""
    videos = {f"{label}{i}.mp4": label for label in LABELS for i in range(2)}
    better = {id_: (label, label if label != "left" else "up") for id_, label in videos.items()}
    worse = {**better, "up0.mp4": ("up", "down"), "left1.mp4": ("left", "down")}
    return [
        write_evaluation(tmp_path / name, predictions, labels=LABELS)
        for name, predictions in (("a", worse), ("b", better))
    ]


def test_two_evaluations_are_compared(evaluations, tmp_path, capsys):
    before, after = evaluations
    assert compare.main([str(before), str(after / "eval.json"), f"--output={tmp_path}/out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"before: {before}/eval.json",
        f"after:  {after}/eval.json",
        "",
        "accuracy in %        videos  before   after  difference",
        "top-1                     8   62.50   75.00      +12.50",
        "top-5                     8   62.50   75.00      +12.50",
        "mean class accuracy       8   62.50   75.00      +12.50",
        "",
        "class                videos  before   after  difference",
        "up                        2   50.00  100.00      +50.00",
        "",
        f"compared with {before}/eval.json: top-1 +12.50 percentage points on 8 shared videos "
        "(1 gained, 0 lost, 1 still wrong with another prediction); not significant (McNemar's "
        "exact test, p = 1)",
        "gained: up0.mp4",
        "still wrong: left1.mp4",
        f"{tmp_path}/out/comparison.json",
    ]
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert comparison["gained_videos"] == ["up0.mp4"]
    assert comparison["classes"]["left"] == {"num_videos": 2, "before": 0, "after": 0}


def test_nothing_is_written_without_output(evaluations, tmp_path, capsys):
    files = {*tmp_path.rglob("*")}
    assert compare.main([*map(str, evaluations)]) == 0
    assert {*tmp_path.rglob("*")} == files
    assert "comparison.json" not in capsys.readouterr().out


def test_many_changed_classes_are_counted(tmp_path, capsys):
    videos = {f"{i:02d}.mp4": f"class {i:02d}" for i in range(30)}
    before = write_evaluation(
        tmp_path / "a", {id_: (label, "class 00") for id_, label in videos.items()}
    )
    after = write_evaluation(tmp_path / "b", {id_: (label, label) for id_, label in videos.items()})
    assert compare.main([str(before), str(after)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("+100.00") == 10
    assert "and 19 more classes" in printed
    assert "; significant" in printed


def test_different_videos_and_unwritable_outputs_are_refused(evaluations, tmp_path, capsys):
    other = write_evaluation(tmp_path / "other", {"x.mp4": ("up", "up")})
    (tmp_path / "file").touch()
    for arguments, message in (
        ([evaluations[0], other], f"shares no video with {other}/eval.json; choose an evaluation"),
        ([*evaluations, f"--output={tmp_path}/file"], "--output: "),
    ):
        assert compare.main([*map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert message in captured.err
        assert captured.err.count("\n") == 1


def test_the_comparison_does_not_import_jax():
    script = "import sys, jaxvid.compare; assert not {'jax', 'matplotlib'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", script], check=True)
