"""Flags that have no effect in the chosen mode are refused."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ("--compare=eval.json",),
            "--compare requires --mode eval; set --mode eval or remove --compare",
        ),
        (
            ("--mode=eval", "--profile=1:2"),
            "--profile requires --mode train; set --mode train or remove --profile",
        ),
    ],
)
def test_flags_of_another_mode_are_refused(flags, expected, tmp_path):
    command = [sys.executable, "main.py", "--config=configs/motion.py", "--workdir", tmp_path / "w"]
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(expected)
    assert not (tmp_path / "w").exists()
