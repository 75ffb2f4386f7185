"""ONNX files match the network in every precision, and jaxvid evaluates them."""

import dataclasses
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxvid
from jaxvid import export
from jaxvid.data.clips.clip import load_eval_views
from jaxvid.errors import InputError
from jaxvid.evaluate import evaluate
from jaxvid.inference import onnx_export
from jaxvid.models import ModelConfig, abstract_model, make_model_config, merge_params
from jaxvid.serving.limits import Settings
from jaxvid.serving.model_loading import load_models
from jaxvid.storage import exported_file
from jaxvid.storage.onnx_network import OnnxNetwork
from jaxvid.storage.preprocessing import Preprocessing, load_model_and_preprocessing, normalize
from tests import goldens
from tests.models.test_stam import config_of as stam_config_of
from tests.models.test_xvit import config_of as xvit_config_of
from tests.serving.running_server import running

MISSING = [name for name in onnx_export.PACKAGES if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'jaxvid[onnx]'"
)
if not MISSING:
    import onnx
BOUND = 1e-4  # largest difference of the logits in float32


def run_export(folder, output, *options) -> int:
    arguments = ["--model", folder, "--output", output, "--format", "onnx", *options]
    return export.main(list(map(str, arguments)))


def golden_network(name: str) -> nnx.Module:
    """Return the network of a golden file, with its synthetic weights."""
    golden = goldens.load(f"tiny/{name}")
    family = name.partition("_")[0]
    config = {"stam": stam_config_of, "xvit": xvit_config_of}[family](golden)
    config = dataclasses.replace(config, name=f"{family}_tiny")  # a preset, for the model card
    return synthetic_network(config, int(golden["param_seed"]))


def synthetic_network(config: ModelConfig, seed: int) -> nnx.Module:
    graphdef, abstract = abstract_model(config)
    return merge_params(graphdef, goldens.params(abstract, seed))


@pytest.fixture(scope="module")
def models(folders, tmp_path_factory):
    """Return model folders: a small XViT for the motion clips, and the STAM of a golden file."""
    folder = tmp_path_factory.mktemp("models") / "stam"
    model = golden_network("stam_tiny_4f")
    sizes = {"num_frames": model.config.num_frames, "crop": model.config.image_size}
    preprocessing = {**sizes, "short_side": 72, "sampling": "uniform_10s", "mean": 0.5, "std": 0.25}
    jaxvid.save_model(model, folder, preprocessing=preprocessing)
    return {"stam": folder, "xvit": folders / "xvit"}


@pytest.fixture(scope="module")
def files(models, motion_folder, tmp_path_factory):
    """Return the ONNX files of both networks in float32, and of XViT in the other precisions."""
    from convert import flax_to_onnx

    target, made, make_onnx = tmp_path_factory.mktemp("onnx"), {}, flax_to_onnx.make_onnx

    def make_once(config, *args):  # PyTorch's exporter takes seconds
        if config.name not in made:
            made[config.name] = make_onnx(config, *args).SerializeToString()
        return onnx.ModelProto.FromString(made[config.name])

    calibrate = ["--precision", "int8", "--calibrate", motion_folder]
    files = {
        "stam": ("stam", []),
        "xvit": ("xvit", []),
        "float16": ("xvit", ["--precision", "float16"]),
        "int8": ("xvit", calibrate),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flax_to_onnx, "make_onnx", make_once)
        for name, (model, options) in files.items():
            assert run_export(models[model], target / f"{name}.onnx", *options) == 0
    return {name: target / f"{name}.onnx" for name in files}


def make_clips(count: int, frames: int = 8, size: int = 64) -> np.ndarray:
    shape = (count, frames, size, size, 3)
    return np.random.default_rng(count).integers(0, 256, shape, np.uint8)


def run_as_described(file: Path, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the outputs of an ONNX file for clips, using the lines in its description."""
    about = json.loads(file.with_name(f"{file.name}.json").read_text())
    namespace = {"clips": clips}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(file.parent)
        exec("\n".join(about["load"]), namespace)
    return namespace["logits"], namespace["probabilities"]


@needs_onnx
@pytest.mark.parametrize("name", [pytest.param("stam", marks=pytest.mark.full), "xvit"])
def test_an_onnx_file_matches_the_network_for_any_batch_size(files, models, name):
    about = json.loads(files[name].with_name(f"{name}.onnx.json").read_text())
    assert about["sha256"] == hashlib.sha256(files[name].read_bytes()).hexdigest()
    assert (about["format"], about["precision"], about["opset"]) == ("onnx", "float32", 20)
    model, std = jaxvid.load_model(models[name]), about["preprocessing"]["std"]
    frames, size = model.config.num_frames, model.config.image_size
    assert about["input"]["shape"] == ["b", frames, size, size, 3]
    for count in (1, 3):
        clips = make_clips(count, frames, size)
        logits, probabilities = run_as_described(files[name], clips)
        expected = jax.jit(model)(normalize(clips, 0.5, std))
        assert np.abs(logits - expected).max() <= BOUND
        assert np.abs(probabilities - jax.nn.softmax(expected)).max() <= BOUND
        assert np.abs(expected).max() > 0.1


@needs_onnx
def test_smaller_precisions_are_close_and_keep_their_types(files):
    clips = make_clips(4)
    expected = OnnxNetwork(files["xvit"].read_bytes(), "xvit")(clips)
    # Half of the weights of this network are in the patch embedding, which stays in float32.
    for name, bound in (("float16", 2e-3), ("int8", 0.1)):
        assert files[name].stat().st_size < 0.9 * files["xvit"].stat().st_size
        logits = OnnxNetwork(files[name].read_bytes(), name)(clips)
        np.testing.assert_array_equal(run_as_described(files[name], clips)[0], logits)
        assert logits.dtype == np.float32
        assert 0 < np.abs(logits - expected).max() <= bound * np.abs(expected).max()
        assert onnx.load(files[name]).opset_import[0].version == 20
    about = json.loads(files["int8"].with_name("int8.onnx.json").read_text())
    assert about["calibration"] == {
        "input": about["calibration"]["input"], "num_videos": 48, "num_failed": 0
    }  # fmt: skip


@needs_onnx
def test_int8_is_symmetric_and_leaves_attention_products_and_the_head_alone(files):
    graph = onnx.load(files["int8"]).graph
    constants = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    sources = {output: node for node in graph.node for output in node.output}
    quantized = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert quantized
    for node in quantized:
        assert constants[node.input[2]].dtype == np.int8
        assert not constants[node.input[2]].any()
    products = [node for node in graph.node if node.op_type == "MatMul"]
    weighted = [node for node in products if node.input[1] in sources
                and sources[node.input[1]].op_type == "DequantizeLinear"]  # fmt: skip
    assert 0 < len(weighted) < len(products)
    for node in weighted:  # one scale per output channel
        assert constants[sources[node.input[1]].input[1]].ndim == 1
    [head] = [node for node in graph.node if "logits" in node.output]
    assert all(sources[name].op_type != "DequantizeLinear" for name in head.input[:1])


@needs_onnx
@pytest.mark.full
@pytest.mark.parametrize("name", ["stam_16", "xvit_k600", "xvit_tiny_k600"])
def test_released_sizes_and_goldens_match(name):
    is_golden = "tiny" in name
    model = golden_network(name) if is_golden else synthetic_network(make_model_config(name), 0)
    size, frames = model.config.image_size, model.config.num_frames
    preprocessing = Preprocessing(
        num_frames=frames, crop=size, short_side=size, sampling="segments", mean=0.5, std=0.25
    )
    data, _ = onnx_export.export_onnx(model, preprocessing, "softmax")
    clips = make_clips(2, frames, size)
    expected = jax.jit(model)(normalize(clips, 0.5, 0.25))
    assert np.abs(OnnxNetwork(data, name)(clips) - expected).max() <= BOUND


# ------------------------------------------------------------------ evaluation


@needs_onnx
def test_evaluation_of_an_onnx_file_equals_that_of_the_model(files, folders, config, tmp_path):
    config = config.unlock()
    config.model.update({"width": 16, "depth": 2})
    config.mesh.update({"data": -1, "fsdp": 1})
    report = evaluate(config.lock(), tmp_path / "onnx", onnx=files["xvit"])
    assert report["weights_sha256"] == hashlib.sha256(files["xvit"].read_bytes()).hexdigest()
    assert report["checkpoint"] == str(files["xvit"])
    assert report["engine"].startswith("onnxruntime 1.")
    config = config.unlock()
    config.init_from = str(folders / "xvit")
    expected = evaluate(config.lock(), tmp_path / "jax")
    assert report["protocol"] == expected["protocol"]
    assert report["num_videos"] == 24
    assert report["top1"] == expected["top1"]
    assert report["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    config.init_from = ""
    int8 = evaluate(config, tmp_path / "int8", onnx=files["int8"], compare_with=tmp_path / "jax")
    assert int8["protocol"] == {**expected["protocol"], "dtype": "int8"}
    assert (tmp_path / "int8" / "comparison.json").exists()


@needs_onnx
def test_unusable_files_and_configs_are_refused(files, config, tmp_path):
    def error_of(path, **fields) -> str:
        changed = config.copy_and_resolve_references().unlock()
        changed.model.update({"width": 16, "depth": 2})
        changed.update_from_flattened_dict(fields)
        with pytest.raises(InputError) as caught:
            evaluate(changed.lock(), tmp_path / "run", onnx=path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "not found" in error_of(tmp_path / "missing.onnx")
    assert "depth: 2 in the folder, 3 in the config" in error_of(
        files["xvit"], **{"model.depth": 3}
    )
    assert "init_from" in error_of(files["xvit"], init_from="somewhere")
    assert "eval.dtype=bfloat16" in error_of(files["xvit"], **{"eval.dtype": "bfloat16"})
    about = json.loads(files["xvit"].with_name("xvit.onnx.json").read_text())
    copy = tmp_path / "copy.onnx"

    def write(data: bytes, **fields) -> None:
        copy.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        text = json.dumps({**about, "sha256": digest, "bytes": len(data), **fields})
        copy.with_name("copy.onnx.json").write_text(text)

    write(b"no model")
    assert "cannot be loaded by ONNX Runtime" in error_of(copy)
    write(files["xvit"].read_bytes(), labels=["one"])
    assert "copy.onnx.json: labels has 1 entries" in error_of(copy)
    write(files["xvit"].read_bytes(), format="safetensors")
    assert "'safetensors' file; choose a file written by" in error_of(copy)
    write(files["xvit"].read_bytes(), sha256="0")
    assert "changed since the export" in error_of(copy)
    assert not (tmp_path / "run").exists()


@needs_onnx
def test_exported_files_are_checked(files, tmp_path):
    for name in ("xvit", "float16", "int8"):
        assert "runs with onnxruntime" in exported_file.check_exported(files[name])


@needs_onnx
def test_an_exported_file_is_served(files, folders, clips):
    [model] = load_models([str(files["int8"])], "float32")
    assert model.name == "int8"
    with running([model], Settings(max_batch=2)) as server:
        video = Path(clips[0]).read_bytes()
        top = server.post("/v1/predict?top_k=8", video)["top"]
        status, _, body = server.request("POST", "/v1/features", video)
        assert server.request("GET", "/v1/model")[0] == 200
    assert (status, b"an ONNX file computes only classes" in body) == (400, True)
    spec = load_model_and_preprocessing(folders / "xvit")[2].spec
    logits = OnnxNetwork(files["int8"].read_bytes(), "int8")(
        load_eval_views(clips[0], spec)["video"]
    )
    expected = sorted(jax.nn.softmax(logits[0]).tolist(), reverse=True)
    assert [entry["probability"] for entry in top] == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------ without the packages


def test_options_of_onnx_files_are_checked(folders, tmp_path, capsys, monkeypatch):
    def error_of(*options) -> str:
        arguments = ["--model", folders / "xvit", "--output", tmp_path / "x", *options]
        try:
            status = export.main(list(map(str, arguments)))
        except SystemExit as stop:
            status = stop.code
        assert status == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "requires --format onnx" in error_of("--precision", "float16")
    int8 = ["--format", "onnx", "--precision", "int8"]
    assert "int8: requires --calibrate LIST_OR_FOLDER" in error_of(*int8)
    assert "requires --precision int8" in error_of("--format", "onnx", "--calibrate", tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    message = error_of("--format", "onnx")
    assert "--format onnx needs jaxvid[onnx]" in message
    assert message.endswith("pip install 'jaxvid[onnx]'")
    assert not [*tmp_path.iterdir()]
