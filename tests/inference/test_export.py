"""Exported programs run without jaxvid and match the model; weights are exported unchanged."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export as jax_export
from safetensors import safe_open
from safetensors.numpy import load_file

import jaxvid
from jaxvid import export
from jaxvid.models import make_model_config, split_params
from jaxvid.storage.preprocessing import load_model_and_preprocessing, normalize

PREPROCESSING = {"num_frames": 8, "short_side": 72, "crop": 64, "mean": 0.25, "std": 0.5}
LABELS = [f"class {i}" for i in range(5)]
MEANS = {"stam_tiny": 0.25, "xvit_tiny": [0.2, 0.25, 0.3]}
# Runs an exported program as its description says; arguments: the program, an .npz file of clips.
SCRIPT = """
import json, sys
import jax
import numpy as np
about = json.load(open(sys.argv[1] + ".json"))
clips = dict(np.load(sys.argv[2]))
for name in clips:
    namespace = {"clips": clips[name]}
    exec("\\n".join(about["load"]), namespace)
    assert namespace["logits"].dtype == about["output"]["dtype"]
    np.save(f"{sys.argv[2]}.{name}.npy", namespace["logits"])
loaded = {"flax", "jaxvid", "orbax", "grain"} & {*sys.modules}
assert not loaded, loaded
"""


@pytest.fixture(scope="module", params=["stam_tiny", "xvit_tiny"])
def folder(request, tmp_path_factory):
    model = jaxvid.create_model(request.param, num_classes=5, depth=2)
    folder = tmp_path_factory.mktemp("model") / "model"
    preprocessing = {**PREPROCESSING, "sampling": "uniform_10s", "mean": MEANS[request.param]}
    jaxvid.save_model(model, folder, preprocessing=preprocessing, labels=LABELS)
    return folder


def mean_of(folder: Path) -> float | list[float]:
    return MEANS[json.loads((folder / "model.json").read_text())["name"]]


def make_clips(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 8, 64, 64, 3), np.uint8)


def test_exported_program_matches_the_model_without_jaxvid(folder, tmp_path, capsys):
    file = tmp_path / "new" / "model.stablehlo"
    assert export.main(["--model", str(folder), "--output", str(file)]) == 0
    assert "logits = model.call(clips)" in capsys.readouterr().out
    clips = {"one": make_clips(1), "three": make_clips(3)}
    np.savez(tmp_path / "clips.npz", **clips)
    command = [sys.executable, "-c", SCRIPT, file, tmp_path / "clips.npz"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent)
    assert done.returncode == 0, done.stderr
    model = jax.jit(jaxvid.load_model(folder))
    for name, batch in clips.items():
        logits = np.load(tmp_path / f"clips.npz.{name}.npy")
        expected = np.asarray(model(normalize(batch, mean_of(folder), 0.5)))
        assert logits.shape == expected.shape == (len(batch), 5)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
        assert np.abs(expected).max() > 0.1
    about = json.loads((tmp_path / "new" / "model.stablehlo.json").read_text())
    assert about["input"]["shape"] == ["b", 8, 64, 64, 3]
    assert about["input"]["dtype"] == "uint8"
    assert about["output"]["shape"] == ["b", 5]
    assert about["labels"] == LABELS
    defaults = {"sampling_rate": 16, "by_time": False, "resize": "pil_bilinear"}
    defaults |= {"color_matrix": "tagged", "num_clips": 1, "num_crops": 1}
    expected = {**PREPROCESSING, "sampling": "uniform_10s", "mean": mean_of(folder), **defaults}
    assert about["preprocessing"] == expected
    assert about["platforms"] == ["cpu", "cuda"]
    assert about["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_program_is_lowered_for_cpu_and_cuda(folder):
    _, model, preprocessing = load_model_and_preprocessing(folder)
    spec = preprocessing.spec
    data = export.export_stablehlo(model, spec, mean=0.0, std=1.0)
    program = jax_export.deserialize(bytearray(data))
    assert program.platforms == ("cpu", "cuda")
    assert str(program.in_avals[0].shape) == "(b, 8, 64, 64, 3)"
    assert program.nr_devices == 1


def test_safetensors_equal_the_weights_of_the_model(folder, tmp_path):
    file = tmp_path / "weights.safetensors"
    arguments = ["--model", str(folder), "--output", str(file), "--format", "safetensors"]
    assert export.main(arguments) == 0
    with safe_open(file, "numpy") as opened:
        card = json.loads(opened.metadata()["model.json"])
    assert card["labels"] == LABELS
    assert card["preprocessing"]["mean"] == mean_of(folder)
    assert not {"files", "checksums"} & card.keys()  # these describe the files of the model folder
    original = jaxvid.load_model(folder)
    weights = load_file(file)
    params = split_params(original)[1]
    assert weights.keys() == params.keys()
    for name, leaf in params.items():
        assert weights[name].dtype == np.float32
        np.testing.assert_array_equal(weights[name], leaf)
    assert make_model_config(**card["config"]) == original.config
    about = json.loads((tmp_path / "weights.safetensors.json").read_text())
    assert about["weights"] == {name: list(leaf.shape) for name, leaf in params.items()}
    assert about["parameters"] == sum(leaf.size for leaf in params.values())
    assert "kernels (in, 3, d)" in about["layout"]


def test_output_name_with_invalid_utf8_is_accepted(folder, tmp_path, capsys):
    output = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    arguments = ["--model", str(folder), "--output", output, "--format", "safetensors"]
    assert export.main(arguments) == 0
    assert "caf\ufffd.json: description of the exported file" in capsys.readouterr().out
    about = json.loads(Path(f"{output}.json").read_text(encoding="utf-8"))
    assert about["file"] == Path(output).name


def test_bad_input_gives_one_line_error_and_no_files(folder, tmp_path, capsys, monkeypatch):
    def export_error(output, **changes) -> str:
        arguments = {"--model": folder, "--output": tmp_path / output, **changes}
        command = [str(part) for pair in arguments.items() for part in pair]
        assert export.main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1
        return error

    (tmp_path / "folder").mkdir()
    assert "folder cannot be written (Is a directory)" in export_error("folder")
    assert "is not a model folder" in export_error("x", **{"--model": tmp_path})
    monkeypatch.setattr(export, "MAX_BYTES", 1000)
    assert "use --format safetensors" in export_error("large")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
