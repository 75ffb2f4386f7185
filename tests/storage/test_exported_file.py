"""Exported files are checked against their descriptions, and programs have dates of support."""

import datetime
import hashlib
import json
import re
import shutil
from pathlib import Path

import jax
import jaxlib
import numpy as np
import pytest
from jax import export as jax_export
from safetensors.numpy import load_file, save_file

import jaxvid
from jaxvid import export
from jaxvid.errors import InputError
from jaxvid.storage import exported_file
from jaxvid.storage.exported_file import check_exported, describe_guarantee, make_test_clips
from jaxvid.storage.preprocessing import normalize

PREPROCESSING = {"num_frames": 8, "short_side": 72, "crop": 64, "mean": 0.25, "std": 0.5}
PREPROCESSING["sampling"] = "segments"
PROGRAM, WEIGHTS = "model.stablehlo", "model.safetensors"


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Return a folder with a model folder, a program and a file of weights."""
    folder = tmp_path_factory.mktemp("exports")
    model = jaxvid.create_model("xvit_tiny", num_classes=5, width=16, depth=1)
    jaxvid.save_model(model, folder / "model", preprocessing=PREPROCESSING)
    export.export(folder / "model", folder / PROGRAM)
    export.export(folder / "model", folder / WEIGHTS, "safetensors")
    return folder


@pytest.fixture
def files(exports, tmp_path) -> Path:
    """Return a folder with copies of the exported files, which a test may change."""
    for path in exports.glob("model.*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def edit(path: Path, **changes) -> dict:
    """Change fields of a description; a value of None removes the field."""
    about_path = path.with_name(f"{path.name}.json")
    about = json.loads(about_path.read_text()) | changes
    about = {name: value for name, value in about.items() if value is not None}
    about_path.write_text(json.dumps(about))
    return about


def check_error(path: Path, capsys) -> str:
    """Return the one line that a failed check prints."""
    assert export.main(["--check", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}")
    assert error.count("\n") == 1
    return error


def test_unchanged_files_pass(exports, capsys):
    assert export.main(["--check", str(exports / PROGRAM)]) == 0
    line = capsys.readouterr().out
    assert f"runs with jax {jax.__version__} on cpu; largest difference" in line
    assert "0.0e+00" in line
    assert "guaranteed for jaxlib released" in line
    assert export.main(["--check", str(exports / WEIGHTS)]) == 0
    assert "names and shapes are those of xvit_tiny" in capsys.readouterr().out


def test_description_has_the_logits_of_the_model_for_the_test_clip(exports):
    test = json.loads((exports / f"{PROGRAM}.json").read_text())["test"]
    clips = eval(test["clips"], {"np": np})
    np.testing.assert_array_equal(clips, make_test_clips((1, 8, 64, 64, 3)))
    model = jax.jit(jaxvid.load_model(exports / "model"))
    expected = model(normalize(clips, 0.25, 0.5))
    np.testing.assert_allclose(test["logits"], expected[0], rtol=0, atol=1e-5)
    assert len({*test["logits"]}) == 5


def test_description_states_versions_and_dates(exports):
    compatibility = json.loads((exports / f"{PROGRAM}.json").read_text())["compatibility"]
    program = jax_export.deserialize(bytearray((exports / PROGRAM).read_bytes()))
    assert compatibility["calling_convention_version"] == program.calling_convention_version
    low, high = compatibility["calling_convention_versions_of_jax"]
    assert low <= program.calling_convention_version <= high
    assert compatibility["jaxlib"] == jaxlib.__version__
    assert datetime.date.fromisoformat(compatibility["written"])


def test_guarantee_is_three_weeks_before_to_six_months_after_the_release(monkeypatch):
    monkeypatch.setitem(exported_file.JAXLIB_RELEASES, "9.9", "2027-08-31")
    dates = exported_file._guarantee("9.9")
    assert dates == {
        "jaxlib_released": "2027-08-31",
        "guaranteed_from": "2027-08-10",
        "guaranteed_until": "2028-02-29",
    }
    line = "guaranteed for jaxlib released from 2027-08-10 to 2028-02-29"
    assert describe_guarantee({"compatibility": dates}) == line
    unknown = {"compatibility": {"jaxlib": "10.0", **exported_file._guarantee("10.0")}}
    assert describe_guarantee(unknown).endswith("until 6 months after jaxlib 10.0")


def test_release_dates_include_the_pinned_versions():
    text = (Path(__file__).parents[2] / "requirements.txt").read_text()
    pins = re.findall(r"^jax==([\d.]+)", text, re.MULTILINE)
    assert len(pins) == 2
    assert {*pins} <= exported_file.JAXLIB_RELEASES.keys()
    assert all(map(datetime.date.fromisoformat, exported_file.JAXLIB_RELEASES.values()))


def test_older_calling_convention_passes_while_it_is_supported(exports, tmp_path):
    option = "jax_export_calling_convention_version"
    low, default = (
        jax_export.minimum_supported_calling_convention_version,
        getattr(jax.config, option),
    )
    assert low < default
    jax.config.update(option, low)
    try:
        about = export.export(exports / "model", tmp_path / PROGRAM)
    finally:
        jax.config.update(option, default)
    assert about["compatibility"]["calling_convention_version"] == low
    assert "largest difference" in check_exported(tmp_path / PROGRAM)


@pytest.mark.parametrize(
    ("supported", "remedy"), [((98, 99), "export the model"), ((1, 2), "update jax")]
)
def test_unsupported_calling_convention_is_refused(files, capsys, monkeypatch, supported, remedy):
    monkeypatch.setattr(exported_file, "_supported_versions", lambda: supported)
    error = check_error(files / PROGRAM, capsys)
    assert f"supports {supported[0]} to {supported[1]}; {remedy}" in error


def test_program_for_other_platforms_is_refused(files, capsys, monkeypatch):
    monkeypatch.setattr(jax_export, "default_export_platform", lambda: "tpu")
    error = check_error(files / PROGRAM, capsys)
    assert "was exported for cpu, cuda, but JAX uses tpu; set JAX_PLATFORMS=cpu" in error


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS])
def test_damaged_file_is_refused(files, capsys, name):
    data = bytearray((files / name).read_bytes())
    data[len(data) // 2] ^= 1
    (files / name).write_bytes(data)
    assert "its contents have changed" in check_error(files / name, capsys)
    (files / name).write_bytes(data[:-1])
    assert f"its size ({len(data) - 1} bytes) has changed" in check_error(files / name, capsys)


@pytest.mark.parametrize(
    ("name", "message"), [(PROGRAM, "cannot be loaded or run"), (WEIGHTS, "not a safetensors file")]
)
def test_file_that_is_no_export_is_refused(files, capsys, name, message):
    data = b"\x10\0\0\0 not an exported file, although its checksum is right" * 10
    (files / name).write_bytes(data)
    edit(files / name, sha256=hashlib.sha256(data).hexdigest())
    assert message in check_error(files / name, capsys)


def test_missing_files_are_named(files, capsys):
    assert "absent: not found; choose a file" in check_error(files / "absent", capsys)
    assert "is a folder, not a regular file" in check_error(files, capsys)
    description = files / f"{PROGRAM}.json"
    assert f"description of an exported file; check {PROGRAM}" in check_error(description, capsys)
    assert export.main(["--check", "gs://bucket/file"]) == 2
    assert "gs://bucket/file: is remote; copy it" in capsys.readouterr().err
    (files / f"{PROGRAM}.json").unlink()
    error = check_error(files / PROGRAM, capsys)
    assert f"{PROGRAM}.json: not found; copy it from the folder" in error


def test_older_description_without_test_logits_passes(files):
    edit(files / PROGRAM, test=None, compatibility=None)
    line = check_exported(files / PROGRAM)
    assert "the logits are finite" in line
    assert line.endswith(f"until 6 months after jaxlib {jax.__version__}")


def test_other_logits_are_refused(files, capsys):
    test = edit(files / PROGRAM)["test"]
    edit(files / PROGRAM, test=test | {"logits": [value + 0.1 for value in test["logits"]]})
    assert "its logits differ by 1.0e-01 from those at export" in check_error(
        files / PROGRAM, capsys
    )
    edit(files / PROGRAM, test=test | {"logits": test["logits"][:-1]})
    assert f"computes 5 logits, but {PROGRAM}.json has 4" in check_error(files / PROGRAM, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "onnx2"}, "expected one of stablehlo, safetensors"),
        ({"format": ["stablehlo"]}, "does not describe an exported file"),
        ({"test": {"logits": ["a"] * 5}}, "a field is missing or invalid"),
        ({"format": None}, "does not describe an exported file"),
        ({"test": {"logits": None}}, "a field is missing or invalid"),
        ({"config": None}, "a field is missing or invalid (KeyError('config'))"),
        ({"compatibility": [1]}, "a field is missing or invalid"),
    ],
)
def test_invalid_description_is_refused(files, capsys, changes, message):
    edit(files / PROGRAM, **changes)
    assert message in check_error(files / PROGRAM, capsys)


def test_unreadable_description_is_refused(files, capsys):
    (files / f"{PROGRAM}.json").write_bytes(b"\xff{")
    assert f"{PROGRAM}.json: cannot be read" in check_error(files / PROGRAM, capsys)


def test_weights_of_another_network_are_refused(files, capsys):
    weights = load_file(files / WEIGHTS)
    name = min(weights)
    weights[name] = np.zeros((2, 3), np.float32)
    save_file(weights, files / WEIGHTS)
    digest = hashlib.sha256((files / WEIGHTS).read_bytes()).hexdigest()
    about = edit(files / WEIGHTS, sha256=digest)
    error = check_error(files / WEIGHTS, capsys)
    assert f"{name} has shape [2, 3] in the file, " in error
    assert f"in {WEIGHTS}.json" in error
    edit(files / WEIGHTS, weights=about["weights"] | {name: [2, 3]})
    assert "in xvit_tiny; export the model again" in check_error(files / WEIGHTS, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m"], "expected --model and --output, or --check"),
        (["--check", "f", "--model", "m"], "--check: cannot be combined with --model"),
    ],
)
def test_conflicting_options_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        export.main(arguments)
    assert ended.value.code == InputError.EXIT_CODE
    assert message in capsys.readouterr().err
