"""Real networks give the predictions of `Classifier`, and compile nothing after the start."""

import numpy as np
import pytest

import jaxvid
from jaxvid.inference import onnx_export
from jaxvid.inference.compiled_network import CompiledNetwork
from jaxvid.serving import served_model
from jaxvid.serving.limits import Settings
from jaxvid.serving.model_loading import load_models
from tests.serving.running_server import make_fake_model, running


@pytest.mark.parametrize("family", ["xvit", "stam"])
def test_answers_equal_those_of_the_classifier(folders, clips, video, family, monkeypatch):
    folder = str(folders / family)
    classifier = jaxvid.Classifier(folder)
    expected = classifier(clips[0], top_k=8)
    [model] = load_models([folder], "float32")
    with running([model], Settings(max_batch=2)) as server:
        programs = {**model.engine._network._programs}

        def compile_again(network, function, shape, dtype):
            return programs[function.__name__, shape, dtype]

        monkeypatch.setattr(CompiledNetwork, "compile", compile_again)  # a new shape: KeyError
        answer = server.post("/v1/predict?top_k=8", video)
        vector = server.post("/v1/features", video)["vector"]
        events = server.post_events("/v1/timeline?window=0.5&stride=0.25&top_k=8", video)
        server.post("/v1/predict?views=3", video)
        explained = dict(server.post_events("/v1/explain?top_k=8", video))
    monkeypatch.undo()
    assert [entry["label"] for entry in answer["top"]] == list(expected.labels)
    probabilities = [entry["probability"] for entry in answer["top"]]
    assert probabilities == pytest.approx(expected.probabilities, abs=1e-6)
    assert vector == pytest.approx(classifier.features(clips[0]).vector.tolist(), abs=1e-5)
    assert explained["prediction"]["top"] == answer["top"]
    rollout = classifier.attention(clips[0])
    assert [frame["index"] for frame in explained["frames"]["frames"]] == rollout.indices.tolist()
    assert explained["frames"]["crop_box"] == pytest.approx(rollout.crop_box)
    assert explained["attention"]["notes"] == rollout.notes
    patches, weights = explained["attention"]["patches"], explained["attention"]["weights"]
    np.testing.assert_allclose(patches, rollout.patch_attention, atol=1e-4)
    np.testing.assert_allclose(weights, rollout.frame_attention, atol=1e-4)
    windows = [data for name, data in events if name == "window"]
    rows = classifier.windows(clips[0], 0.5, 0.25).rows(8)
    assert [window["start"] for window in windows] == [row["start"] for row in rows]
    for window, row in zip(windows, rows, strict=True):
        actual = {entry["label"]: entry["probability"] for entry in window["top"]}
        top = {entry["label"]: entry["probability"] for entry in row["top"]}
        assert actual == pytest.approx(top, abs=1e-6)


def test_names_of_models(folders, tmp_path):
    for name in ("a/model", "a/best", "b/model"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folders / "xvit")
    paths = [tmp_path / "a/model", tmp_path / "a/best", folders / "stam", folders / "stam"]
    models = load_models([str(path) for path in paths], "float32")
    assert [model.name for model in models] == ["a", "a-best", "stam", "stam-2"]


def test_no_answer_before_the_networks_are_compiled(folders, video):
    [model] = load_models([str(folders / "xvit")], "float32")
    model._warm_up = lambda sizes_of: None
    model.start = lambda *_: _never_ready()
    with running([model], ready=False) as server:
        assert server.request("GET", "/readyz")[0] == 503
        status, headers, _ = server.request("POST", "/v1/predict", video)
        assert (status, headers["retry-after"]) == (503, "5")
        assert server.request("GET", "/healthz")[0] == 200


async def _never_ready():
    pass


@pytest.mark.full
def test_onnxruntime_computes_the_same_predictions(folders, clips, video, tmp_path, monkeypatch):
    for package in onnx_export.PACKAGES:
        pytest.importorskip(package, reason=f"needs {package}: pip install 'jaxvid[onnx]'")
    monkeypatch.setenv("JAXVID_CACHE", str(tmp_path))
    folder = str(folders / "xvit")
    [model] = load_models([folder], "float32", "onnxruntime")
    monkeypatch.setattr(onnx_export, "export_onnx", None)
    load_models([folder], "float32", "onnxruntime")  # from the cache
    with running([model], Settings(max_batch=2)) as server:
        answer = server.post("/v1/predict?top_k=8", video)
        vector = server.post("/v1/features", video)["vector"]
    classifier = jaxvid.Classifier(folder)
    expected = classifier(clips[0], top_k=8)
    assert [entry["label"] for entry in answer["top"]] == list(expected.labels)
    probabilities = [entry["probability"] for entry in answer["top"]]
    assert probabilities == pytest.approx(expected.probabilities, abs=1e-6)
    assert vector == pytest.approx(classifier.features(clips[0]).vector.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("seconds", "used", "compiled"),
    [
        ({1: 1.0, 2: 1.8, 4: 4.6, 8: 1.0}, 2, {1, 2, 4}),  # 4.6 / 4 is longer than 1.1 · 1.8 / 2
        ({1: 1.0, 2: 2.1, 4: 3.0, 8: 5.0}, 8, {1, 2, 4, 8}),
        ({1: 1.0, 2: 3.0}, 1, {1, 2}),
    ],
)
def test_batches_are_as_large_as_is_fastest(monkeypatch, seconds, used, compiled):
    monkeypatch.setattr(served_model, "_shortest_time", lambda _, program, size: seconds[size])
    model = make_fake_model()
    sizes = model._warm_up(Settings(max_batch=8, measure_batches=True))
    assert sizes["score"][-1] == used
    assert {size for program, size in model.engine.warm if program == "score"} == compiled
    assert model._warm_up(Settings(max_batch=8))["score"] == (1, 2, 4, 8)
