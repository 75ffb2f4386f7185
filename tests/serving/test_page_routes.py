"""The page, and the routes that it uses in addition to the API."""

import json
import re

import numpy as np
import pytest
import simplejpeg

from jaxvid.serving import page_events
from jaxvid.serving.limits import Limits, Settings
from jaxvid.serving.page_routes import FILES
from jaxvid.serving.report import PAGE
from tests.serving.running_server import make_attentive_model, make_fake_model, running
from tests.serving.test_api import make_form


@pytest.fixture(scope="module")
def server():
    models = [make_attentive_model("a"), make_attentive_model("b", num_clips=2, num_crops=3)]
    with running(models, Settings(allow_urls=True)) as server:
        yield server


@pytest.fixture(scope="module")
def tour(server):
    """Return a video of 18 seconds."""
    return server.request("GET", "/samples/all_in_turn.mp4")[2]


# ------------------------------------------------------------------ files of the page


def test_files_of_the_page_are_served(server):
    status, headers, body = server.request("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    names = re.findall(r'(?:href|src)="static/([\w.]+)"', body.decode())
    assert {*names} == {*FILES}
    for name in names:
        status, headers, _ = server.request("GET", f"/static/{name}")
        assert (status, headers["content-type"]) == (200, f"{FILES[name]}; charset=utf-8")
    assert server.request("GET", "/static/report.py")[0] == 404
    assert server.request("GET", "/static/..%2freport.py")[0] == 404


def test_the_page_needs_nothing_that_its_content_security_policy_forbids():
    page = (PAGE / "index.html").read_text()
    assert "style=" not in page
    assert "<style" not in page
    assert not re.search(r"\son\w+=", page)
    assert re.findall(r"<script[^>]*>", page) == re.findall(r'<script src="[^"]+" defer>', page)
    sources = page + "".join((PAGE / name).read_text() for name in FILES)
    assert {*re.findall(r"https?://[\w./]+", sources)} <= {
        "http://www.w3.org/2000/svg",
        "http://localhost",
    }
    assert "innerHTML" not in sources  # names are set as text
    assert "eval(" not in sources


def test_every_element_that_the_scripts_use_is_in_the_page():
    ids = re.findall(r'id="([\w-]+)"', (PAGE / "index.html").read_text())
    assert len({*ids}) == len(ids)
    scripts = "".join((PAGE / name).read_text() for name in FILES if name.endswith("js"))
    made = {*re.findall(r'id: "([\w-]+)"', scripts), "window", "stride", "data"}
    assert {*re.findall(r'\$\("([\w-]+)"\)', scripts)} <= {*ids} | made


def test_page_data(server):
    data = server.get("/v1/page")
    assert [card["name"] for card in data["cards"]] == ["a", "b"]
    assert data["cards"][0]["description"][0] == "1 clip × 1 crop per video"
    assert data["cards"][1]["description"][0] == "2 clips × 3 crops per video"
    assert data["cards"][0]["clip_seconds"] == pytest.approx(17 / 15)
    assert data["allow_urls"] is True
    assert [sample["title"] for sample in data["samples"]][-1] == "all in turn"
    assert "meaningless" in data["samples_note"]
    for sample in data["samples"]:
        status, headers, body = server.request("GET", f"/{sample['url']}")
        assert (status, headers["content-type"]) == (200, "video/mp4")
        assert body[4:8] == b"ftyp"
    assert server.request("GET", "/samples/other.mp4")[0] == 404


def test_other_models_have_no_samples():
    model = make_fake_model()
    model.labels = ["a", "b"]
    with running([model]) as server:
        data = server.get("/v1/page")
        assert data["samples"] == []
        assert data["samples_note"] == ""
        assert server.request("GET", "/samples/left.mp4")[0] == 404


# ------------------------------------------------------------------ events


def test_a_short_video_is_explained_without_a_timeline(server, video):
    events = server.post_events("/v1/explain?top_k=3", video)
    assert [name for name, _ in events] == ["prediction", "info", "frames", "attention", "done"]
    data = dict(events)
    answer = server.post("/v1/predict?top_k=3", video)
    assert data["prediction"]["top"] == answer["top"]
    assert data["info"]["bytes"] == len(video)
    assert (data["info"]["width"], data["info"]["frames"]) == (72, 17)
    assert data["frames"]["crop_box"] == pytest.approx([4 / 72, 4 / 72, 68 / 72, 68 / 72])
    assert [frame["index"] for frame in data["frames"]["frames"]] == [1, 3, 5, 7, 9, 11, 13, 15]
    assert np.shape(data["attention"]["patches"]) == (8, 4, 4)
    assert data["attention"]["patches"][0][0] == [1, 0, 0, 0]
    assert data["attention"]["weights"] == [0, 0, 0, 0, 0, 0, 0, 1]


def test_a_long_video_has_a_timeline(server, tour):
    events = server.post_events("/v1/explain", tour)
    plan, windows = dict(events)["plan"], [data for name, data in events if name == "window"]
    assert plan["windows"] == len(windows) == 61
    assert plan["window"] == pytest.approx(17 / 15)
    assert plan["seconds"] == pytest.approx(272 / 15, abs=1e-3)
    assert len(windows[0]["top"]) == 8
    assert events[-1] == ("done", {})
    requested = server.post_events("/v1/explain?window=6&stride=3", tour)
    windows = [data for name, data in requested if name == "window"]
    direct = server.post_events("/v1/timeline?window=6&stride=3&top_k=8", tour)
    assert windows == [data for name, data in direct if name == "window"]


def test_a_requested_timeline_is_made_for_short_videos_too(server, video):
    events = server.post_events("/v1/explain?window=0.5", video)
    assert dict(events)["plan"]["windows"] == 6


def test_several_views_are_described(server, video):
    note = dict(server.post_events("/v1/explain?model=b", video))["frames"]["note"]
    assert "saw 2 clips; this is the first one" in note
    assert "outlined crop and 2 others" in note


def test_an_engine_without_attention(video):
    with running([make_fake_model()]) as server:
        events = server.post_events("/v1/explain", video)
    assert [name for name, _ in events] == ["prediction", "info", "frames", "done"]


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("model=c", 400, "model='c': must be one of 'a', 'b'"),
        ("window=0", 400, "window='0': must be a number of seconds above 0"),
        ("", 422, "video: "),
    ],
)
def test_explain_refuses(server, query, status, message):
    actual, _, body = server.request("POST", f"/v1/explain?{query}", b"not a video")
    assert actual == status
    assert json.loads(body)["error"]["message"].startswith(message)


def test_too_many_windows_end_with_an_error(tour):
    settings = Settings(limits=Limits(windows=5))
    with running([make_fake_model()], settings) as server:
        events = server.post_events("/v1/explain?window=4&stride=1", tour)
    assert [name for name, _ in events] == ["prediction", "info", "frames", "error"]
    assert events[-1][1]["message"] == "stride=1: gives more than 5 windows; use a longer stride"


@pytest.mark.parametrize(
    ("window", "seconds", "stride"), [(10, None, 2.5), (10, 60, 2.5), (10, 1200, 10), (1, 3600, 30)]
)
def test_timelines_of_long_videos_have_a_limited_number_of_windows(window, seconds, stride):
    assert page_events.choose_stride(window, seconds) == stride


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"sampling": "uniform_10s"}, 10),
        ({"sampling": "dense_stride", "num_frames": 16, "sampling_rate": 4}, 64 / 30),
        ({"sampling": "segments", "num_frames": 16}, 4),
    ],
)
def test_duration_of_a_clip(fields, seconds):
    model = make_fake_model(**fields)
    model.labels = ["a", "b"]
    assert page_events.clip_seconds(model) == pytest.approx(seconds)


# ------------------------------------------------------------------ report and live frames


def read_data(page: str) -> dict:
    """Return the data of a report; as in a browser, they end at the first `</script`."""
    return json.loads(re.search(r'<script[^>]*id="data">(.*?)</script', page, re.DOTALL)[1])


def test_report_of_all_models(server, video):
    name = "</title><script>alert(1)</script>"
    query = f"name={name}&top_k=2".replace("<", "%3C").replace(">", "%3E").replace("/", "%2F")
    status, headers, body = server.request("POST", f"/v1/report?{query}", video)
    page = body.decode()
    assert status == 200
    assert headers["content-disposition"] == 'attachment; filename="report.html"'
    assert "<script>alert" not in page
    assert page.count("&lt;/title&gt;&lt;script&gt;") == 2
    data = read_data(page)
    assert [card["name"] for card in data["cards"]] == ["a", "b"]
    events = server.post_events("/v1/explain?top_k=2", video)
    expected = {event: fields for event, fields in events if event != "prediction"}
    actual = {event: fields for model, event, fields in data["events"] if model == "a"}
    assert actual.pop("prediction")["top"] == dict(events)["prediction"]["top"]
    assert actual == expected
    assert {model for model, *_ in data["events"]} == {"a", "b"}


def test_report_of_one_model(server, video):
    _, _, body = server.request("POST", "/v1/report?model=b", video)
    assert [card["name"] for card in read_data(body.decode())["cards"]] == ["b"]


def test_a_report_needs_no_other_file(server, video):
    page = server.request("POST", "/v1/report", video)[2].decode()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    for section in ("classes", "frames", "timeline", "cards"):
        assert f'id="{section}"' in page
    assert 'id="use"' not in page


def make_pictures(count, shade=200, side=72):
    picture = np.full((side, side, 3), shade, np.uint8)
    return {f"video{i}": simplejpeg.encode_jpeg(picture) for i in range(count)}


def post_pictures(server, pictures, query=""):
    form, headers = make_form(pictures)
    for name in pictures:  # all fields have the same name
        form = form.replace(f'name="{name}"'.encode(), b'name="video"')
    status, _, body = server.request("POST", f"/v1/frames{query}", form, headers)
    return status, json.loads(body)


def test_live_frames_are_classified_as_one_clip(server):
    status, answer = post_pictures(server, make_pictures(8), "?top_k=8")
    assert status == 200
    assert {*answer} == {"model", "top", "padded", "seconds", "warnings"}
    logits = 200 / 255 * np.arange(8)
    expected = np.exp(logits) / np.exp(logits).sum()
    assert answer["top"][0]["probability"] == pytest.approx(expected[-1], abs=1e-3)
    assert not answer["padded"]
    assert post_pictures(server, make_pictures(5))[1]["padded"]


def test_live_frames_are_refused(server):
    pictures = make_pictures(4) | {"other": make_pictures(1, side=40)["video0"]}
    for body in (pictures, {"a": b"not a JPEG"}):
        status, answer = post_pictures(server, body)
        assert status == 422
        assert "expected JPEG images of one size" in answer["error"]["message"]
    assert post_pictures(server, {f"v{i}": b"x" for i in range(257)})[0] == 400
