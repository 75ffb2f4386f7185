"""The routes of the API, with a model that needs no compilation."""

import json

import pytest

from jaxvid.serving.limits import Limits, Settings
from tests.serving.running_server import make_fake_model, running


def test_predict_raw_and_form_give_the_same_classes(server, video):
    raw = server.post("/v1/predict", video, {"Content-Type": "video/mp4"})
    form, headers = make_form({"video": video})
    assert server.post("/v1/predict", form, headers)["top"] == raw["top"]
    assert raw["model"] == "fake"
    assert len(raw["top"]) == 5
    assert [*raw["top"][0]] == ["label", "index", "probability"]
    probabilities = [entry["probability"] for entry in raw["top"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert {*raw["seconds"]} == {"decode", "network", "total"}
    assert raw["padded"] is False
    assert raw["warnings"] == []


def make_form(fields: dict[str, bytes], name: str = "a.mp4") -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of a form; `name` is the client's file name."""
    body = b""
    for field, value in fields.items():
        disposition = f'form-data; name="{field}"; filename="{name}"'
        body += f"--XX\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + value + b"\r\n"
    return body + b"--XX--\r\n", {"Content-Type": "multipart/form-data; boundary=XX"}


def test_options_of_predict(server, video):
    assert len(server.post("/v1/predict?top_k=2", video)["top"]) == 2
    assert len(server.post("/v1/predict?top_k=100&model=fake", video)["top"]) == 8
    before = len(server.service.models["fake"].engine.batches)
    server.post("/v1/predict?views=3", video)
    sizes = [size for _, size in server.service.models["fake"].engine.batches[before:]]
    assert sum(sizes) >= 3


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("top_k=0", "top_k='0': must be a whole number from 1 to 1000"),
        ("top_k=two", "top_k='two': must be a whole number from 1 to 1000"),
        ("top_k=1&top_k=2", "top_k: is given twice; give it once"),
        ("topk=1", "'topk': unknown parameter; expected model, top_k, views"),
        ("views=65", "views='65': must be a whole number from 1 to 64"),
        ("model=other", "model='other': must be one of 'fake'"),
    ],
)
def test_bad_options_are_refused(server, video, query, message):
    status, _, body = server.request("POST", f"/v1/predict?{query}", video)
    assert status == 400
    assert json.loads(body) == {"error": {"status": 400, "message": message}}


def test_views_of_the_model_card_and_others():
    model = make_fake_model(sampling="dense_stride", num_clips=2, num_crops=3)
    assert model.spec_for(None) is model.spec
    assert [model.spec_for(v).num_clips for v in (3, 6, 4)] == [1, 2, 4]
    assert [model.spec_for(v).num_crops for v in (3, 6, 4)] == [3, 3, 1]


def test_views_that_the_sampling_does_not_allow_are_refused(video):
    with running([make_fake_model(sampling="segments")]) as server:
        status, _, body = server.request("POST", "/v1/predict?views=7", video)
    assert status == 400
    assert json.loads(body)["error"]["message"].startswith("views=7: num_clips=7: must be")


def test_features(server, video):
    answer = server.post("/v1/features", video)
    assert answer["model"] == "fake"
    assert len(answer["vector"]) == 4


def test_timeline_events(server, video):
    events = server.post_events("/v1/timeline?window=0.5&stride=0.25&top_k=1", video)
    names = [name for name, _ in events]
    plan, done = events[0][1], events[-1][1]
    assert names[0] == "plan"
    assert names[-1] == "done"
    assert names.count("window") == plan["windows"] == done["windows"]
    starts = [data["start"] for name, data in events if name == "window"]
    assert starts == sorted(starts)
    progress = [data for name, data in events if name == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == plan["windows"]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("window=1", "stride: is missing; expected a number of seconds"),
        ("window=0&stride=1", "window='0': must be a number of seconds above 0"),
        ("window=nan&stride=1", "window='nan': must be a number of seconds above 0"),
    ],
)
def test_bad_windows_are_refused(server, video, query, message):
    status, _, body = server.request("POST", f"/v1/timeline?{query}", video)
    assert (status, json.loads(body)["error"]["message"]) == (400, message)


def test_too_many_windows_are_refused(video):
    settings = Settings(limits=Limits(windows=2))
    with running([make_fake_model()], settings) as server:
        status, _, body = server.request("POST", "/v1/timeline?window=0.2&stride=0.1", video)
    assert status == 400
    assert "gives more than 2 windows; use a longer stride" in json.loads(body)["error"]["message"]


def test_a_broken_video_is_refused(server, video):
    for path in ("/v1/predict", "/v1/features", "/v1/timeline?window=1&stride=1"):
        status, _, body = server.request("POST", path, video[:500])
        error = json.loads(body)["error"]
        assert (status, error["status"]) == (422, 422)
        assert error["message"].startswith("video: ")


def test_model_cards(server):
    [card] = server.get("/v1/model")
    assert card["name"] == "fake"
    assert len(card["labels"]) == 8
    assert card["preprocessing"]["num_frames"] == 8
    assert card["protocol"] == {"num_clips": 1, "num_crops": 1, "views": 1}
    assert card["limits"]["upload_bytes"] == Limits().upload_bytes


def test_health_page_and_unknown_paths(server):
    assert server.get("/healthz") == {"status": "ok"}
    assert server.get("/readyz") == {"status": "ready"}
    assert server.request("GET", "/")[0] == 200
    for method, path, expected in (
        ("GET", "/v2", 404),
        ("GET", "/v1/predict", 405),
        ("GET", "/static/secret", 404),
        ("POST", "/v1/model", 405),
    ):
        status, _, body = server.request(method, path)
        assert (status, json.loads(body)["error"]["status"]) == (expected, expected)


def test_metrics_count_requests_and_batches(server, video):
    server.post("/v1/predict", video)
    server.request("GET", "/invented/by/client")
    text = server.request("GET", "/metrics")[2].decode()
    assert 'jaxvid_requests_total{method="POST",route="/v1/predict",status="200"}' in text
    assert 'route="other",status="404"' in text
    assert "invented" not in text
    assert 'jaxvid_batch_items_count{model="fake"}' in text
    assert "jaxvid_requests_in_progress 0.0" in text
    assert 'jaxvid_stage_seconds_count{stage="decode"}' in text
