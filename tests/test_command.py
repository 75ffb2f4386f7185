"""The command `jaxvid`: a wheel in a folder without a checkout, help, completion, near misses."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import jaxvid
from configs import motion
from jaxvid import cli, command, completion, config_files, model_list, parsers
from jaxvid.inference.feature_extraction import LAYERS
from jaxvid.models import PRESETS
from jaxvid.models.precision import DTYPES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install a wheel without a checkout on the path; return its `jaxvid` and an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    source = folder / "source"
    copy = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(copy, cwd=ROOT, capture_output=True, check=True).stdout
    for name in os.fsdecode(files).split("\0")[:-1]:
        if name.startswith(("jaxvid/", "configs/", "convert/", "pyproject", "setup", "README")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, "-w", folder, source], check=True)
    venv.create(folder / "venv", with_pip=False)
    [site] = (folder / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    [wheel] = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", folder / "venv/bin/python", "install"]
    subprocess.run([*install, "-q", "--no-deps", wheel], check=True)
    (folder / "empty").mkdir()
    return folder / "venv" / "bin" / "jaxvid", folder / "empty"


def run(installed, *arguments):
    program, folder = installed
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [program, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_an_installed_wheel_runs_outside_the_checkout(installed):
    assert run(installed, "--version").stdout == f"jaxvid {jaxvid.__version__}\n"
    listed = run(installed, "models", "stam_*")
    assert listed.stdout.splitlines()[1].split()[0] == "stam_8"


@pytest.mark.full
def test_an_installed_wheel_trains_predicts_and_converts(installed, motion_folder):
    plan = run(installed, "plan", "--config", "motion:stam", "--config.model.depth=1")
    assert plan.returncode == 0, plan.stderr
    assert plan.stdout.startswith("stam_tiny: ")
    trained = run(
        installed,
        *("train", "--config=motion", "--workdir=run", "--config.data.source=folder"),
        *(f"--config.data.folder={motion_folder}", "--config.model.width=16"),
        *("--config.model.depth=1", "--config.num_epochs=1.0", "--config.batch_size=16"),
    )
    assert trained.returncode == 0, trained.stderr
    video = next((motion_folder / "val").glob("*.mp4"))
    assert run(installed, "predict", video, "--model", "run/model").returncode == 0
    converted = run(installed, "convert-to-torch", "--input=run/model", "--output=x.pth")
    assert converted.returncode == 0, converted.stderr
    again = run(installed, "convert", "--model=xvit_tiny", "--input=x.pth", "--output=converted")
    assert again.returncode == 2  # another width than the preset's: read, and refused in one line
    assert again.stderr.startswith("error: ")


def test_users_may_copy_and_change_a_config(installed):
    _, folder = installed
    recipe = (ROOT / "configs" / "xvit_k400.py").read_text()  # it imports another config
    (folder / "mine.py").write_text(recipe.replace("num_classes=400", "num_classes=3"))
    drawn = run(installed, "schedule", "--config=mine.py:paper", "--workdir=drawn")
    assert drawn.returncode == 0, drawn.stderr
    assert (folder / "drawn" / "schedule.png").exists()


def test_help_needs_no_slow_imports():
    script = """
import sys
sys.argv = ["jaxvid", sys.argv[1], "--help"]
from jaxvid import command
try:
    command.main()
except SystemExit as error:
    assert not error.code, error
slow = {"jax", "torch", "matplotlib", "orbax", "flax", "cv2"} & {*sys.modules}
assert not slow, (sys.argv, slow)
"""
    for name in command.COMMANDS:
        done = subprocess.run(
            [sys.executable, "-c", script, name], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > 100, name


def test_wrong_options_are_refused_before_slow_imports(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["jaxvid", "predict", "clip.mp4"])
    monkeypatch.setattr(command.entry_point, "run", lambda *_: pytest.fail("the program started"))
    with pytest.raises(SystemExit) as done:
        command.main()
    assert done.value.code == 2
    assert "the following arguments are required: --model" in capsys.readouterr().err


def test_unknown_commands_are_refused(capsys, monkeypatch):
    for name, hint in (("predct", "did you mean predict?"), ("x", "see jaxvid --help")):
        monkeypatch.setattr("sys.argv", ["jaxvid", name])
        with pytest.raises(SystemExit) as done:
            command.main()
        assert done.value.code == 2
        assert capsys.readouterr().err == (
            f"error: jaxvid {name}: there is no such command; {hint}\n"
        )


def test_near_misses_are_explained(tmp_path):
    for arguments, message in (
        (["--config", "moton"], "moton does not exist; did you mean motion? available configs: "),
        (
            ["--config", "motion", "--batch_size", "4"],
            "--batch_size: is not a flag; set the field of the config with --config.batch_size=4",
        ),
        (["--config", "motion", "--wordir=x"], "--wordir: is not a flag; did you mean --workdir?"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "jaxvid", "train", *arguments],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_near_misses_of_config_fields_are_explained():
    config = motion.get_config()
    for argv, message in (
        (["--learning_rate=1"], "--config.optimizer.learning_rate=1"),
        (["--epochs", "3"], "--config.num_epochs=3"),
        (["--seed", "--workdir=x"], "--config.seed=VALUE"),
    ):
        name = argv[0].lstrip("-").partition("=")[0]
        assert cli._explain_flag(name, ["jaxvid", *argv], config) == (
            f"--{name}: is not a flag; set the field of the config with {message}"
        )
    for argv, message in (
        ([], "--config CONFIG is needed; available configs: finetune, motion"),
        (["motion:stam"], "--config CONFIG is needed; did you mean --config motion:stam?"),
        (["--config", "--workdir=x"], "--config CONFIG is needed; available"),
        (
            ["--config.data.batch_size=3"],
            "did you mean --config.batch_size or --config.eval.batch_size?",
        ),
        (["--config.eval.colour=3"], "--config.eval has the fields batch_size, "),
    ):
        flag = [] if "is needed" in message else ["--config=configs/motion.py"]
        with pytest.raises(ValueError, match=re.escape(message)):
            cli._check_config(["jaxvid", *flag, *argv])


def test_every_program_has_a_parser_with_the_same_choices():
    assert parsers.DTYPES == DTYPES
    assert parsers.LAYERS == LAYERS
    assert set(completion.SCRIPTS) == set(parsers.SHELLS)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("jaxvid pre", {"predict", "prepare"}),
        ("jaxvid train --config mot", {"motion"}),
        ("jaxvid predict --win", {"--window"}),
        ("jaxvid completion f", {"fish"}),
    ],
)
def test_completion_in_bash(line, expected, tmp_path):
    words = line.split()
    (tmp_path / "jaxvid").write_text(f'#!/bin/sh\nexec {sys.executable} -m jaxvid "$@"\n')
    (tmp_path / "jaxvid").chmod(0o755)
    script = f"""{completion.script("bash")}
COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _jaxvid; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert set(done.stdout.split()) == expected, done.stderr


def test_completion_scripts_name_all_commands():
    for shell in parsers.SHELLS:
        text = completion.script(shell)
        assert "@" not in text.replace('"${COMPREPLY[@]}"', "")
        assert " ".join(command.COMMANDS) in text


def test_config_names():
    assert {"motion", "finetune", "xvit_k600"} <= set(config_files.config_names())
    assert "common" not in config_files.config_names()
    assert config_files.find_config("motion:stam") == f"{ROOT}/configs/motion.py:stam"
    assert config_files.find_config("configs/motion.py") == "configs/motion.py"
    assert config_files.find_config("nothing") == "nothing"


def test_models_are_listed(capsys, monkeypatch):
    assert jaxvid.list_models("stam_?") == ["stam_8"]
    assert jaxvid.list_models() == list(PRESETS)
    assert jaxvid.list_models("xvit*", pretrained=True) == ["xvit_k600", "xvit_ssv2"]
    monkeypatch.setattr("sys.argv", ["jaxvid models", "xvit_k600"])
    assert model_list.main() == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        *("xvit_k600", "16", "224", "600", "93.94", "281.13", "84.51", "/", "96.26"),
        *("(1", "×", "3)", "https://github.com/1adrianb/video-transformers#license"),
    ]
    monkeypatch.setattr("sys.argv", ["jaxvid models", "vit"])
    assert model_list.main() == 2


def test_programs_do_not_import_torch_or_tensorflow():
    """Both are installed on the machines of many users, and take seconds to import."""
    script = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
loaded = {"torch", "tensorflow"} & {*sys.modules}
assert not loaded, loaded
"""
    # Not all together: two of them define the flag `config`.
    programs = ["train", "evaluate", "predict", "visualize", "export", "check_labels"]
    programs = [f"jaxvid.{name}" for name in (*programs, "data.prepare", "data.check")]
    done = subprocess.run(
        [sys.executable, "-c", script, *programs], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_public_names():
    assert {"Classifier", "create_model", "list_models", "load_model", "save_model"} <= {
        *dir(jaxvid)
    }
    for name in jaxvid.__all__:
        assert getattr(jaxvid, name) is not None
    script = "import jaxvid, sys; assert not {'jax', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("extra", ["", "dev"])
def test_pinned_versions_are_within_the_ranges_of_the_wheel(extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name_of = lambda requirement: requirement.name.lower().replace("_", "-")  # noqa: E731
    requirements = project["optional-dependencies"][extra] if extra else project["dependencies"]
    ranges = {name_of(r): r.specifier for r in map(Requirement, requirements)}
    name = f"requirements-{extra}.txt" if extra else "requirements.txt"
    lines = [line for line in (ROOT / name).read_text().splitlines() if line[:3] != "-r "]
    texts = [text for line in lines if (text := line.partition("#")[0].strip())]
    pins = list(map(Requirement, texts))
    assert {name_of(pin) for pin in pins} == ranges.keys()
    for pin in pins:
        [version] = pin.specifier
        assert version.version in ranges[name_of(pin)], pin
