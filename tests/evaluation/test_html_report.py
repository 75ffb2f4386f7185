"""The HTML report: contents, size limits, and names that contain markup."""

import dataclasses
import json
import re
import time

import numpy as np
import pytest
from PIL import Image

from jaxvid import evaluate
from jaxvid.data.sources import Record, read_list
from jaxvid.evaluation import html_report, summary
from jaxvid.experiment import resolve
from tests.evaluation.report_pages import HOSTILE, parse_data, save
from tests.evaluation.test_metrics import results


def test_page_contains_the_metrics(tmp_path, config):
    scores = [[3, 1, 0], [0, 2, 1], [1, 0, 5], [9, 0, 0], [0, 0, 1]]
    evaluated = results(scores, [0, 2, 2, 0, 1], ["", "", "", "broken", ""])
    page, data = save(tmp_path, config, evaluated, ["a", "b", "c"])
    assert "<title>top-1 40.00 % on 5 videos</title>" in page
    assert (data["top1"], data["top5"]) == (40.0, 80.0)
    assert (data["seconds"], data["clips_per_second"]) == (2.0, 2.5)
    counts = [data[f"num_{name}"] for name in ("videos", "evaluated", "padded", "failed")]
    assert counts == [5, 4, 1, 1]
    assert data["failed"] == [{"id": "v3.mp4", "label": 0, "error": "broken"}]
    assert (data["count"], data["correct"]) == ([2, 1, 2], [1, 0, 1])
    assert data["failed_of_class"] == [1, 0, 0]
    # Label, prediction and count of each non-zero cell.
    assert data["confusion"] == [*(0, 0, 1), *(1, 2, 1), *(2, 1, 1), *(2, 2, 1)]
    assert sorted(data["near"]) == [0, 1, 2]
    assert sum(count for _, _, count in data["bins"]) == 4
    mistakes = [(video["id"], video["label"], video["prediction"]) for video in data["mistakes"]]
    assert mistakes == [("v1.mp4", 2, 1), ("v4.mp4", 1, 2)]  # most confident first
    assert data["mistakes"][0]["confidence"] == pytest.approx(66.52, abs=0.01)
    assert data["weights_sha256"] == "0123456789abcdef" * 4
    assert data["protocol"] == [
        "1 clip × 1 crop per video",
        "8 frames per clip, one from each of 8 equal segments of the video",
        "short side resized to 72 px with antialiasing, cropped to 64 × 64 px; converted to RGB "
        "with the matrix tagged in each file",
        "video score: sum of logits over the views, computed in float32",
    ]
    assert data["curves"] is None


def test_every_sampling_is_described():
    protocol = {"num_clips": 4, "num_crops": 3, "num_frames": 16, "image_size": 224}
    protocol |= {"short_side": 256, "resize": "torch_bilinear", "score": "x", "sampling_rate": 8}
    protocol |= {"by_time": False, "dtype": "bfloat16", "color_matrix": "bt601"}
    descriptions = [
        html_report.describe_protocol({**protocol, "sampling": name})[1]
        for name in ("segments", "dense_stride", "uniform_10s")
    ]
    assert descriptions[1] == "16 frames per clip, evenly spaced over 16 × 8 frames at 30 fps"
    assert len(set(descriptions)) == 3
    with_bt601 = html_report.describe_protocol({**protocol, "sampling": "uniform_10s"})[2]
    assert with_bt601.endswith(
        "without antialiasing, cropped to 224 × 224 px; converted to RGB with BT.601"
    )
    by_time = html_report.describe_protocol(
        {**protocol, "sampling": "uniform_10s", "by_time": True}
    )
    assert by_time[1] == f"{descriptions[2]}, sampled by timestamp"
    assert by_time[3].endswith(", computed in bfloat16")


def test_page_is_self_contained(tmp_path, config):
    page, _ = save(tmp_path, config, results([[2, 1]], [0]), ["a", "b"])
    assert "http:" not in page
    assert "https:" not in page
    assert not re.search(r"url\(|@import|<iframe|<object|<base", page)
    sources = re.findall(r"""(?:src|href)\s*[=:]\s*["'`]([^"'`]*)""", page)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "default-src 'none'" in page
    assert "innerHTML" not in page  # the script sets names as text


def test_class_names_cannot_become_markup(tmp_path, config):
    scores = np.eye(6)[[1, 0, 2, 4, 3, 5]]
    evaluated = results(scores, [0, 1, 2, 3, 4, 5], ["", "", "", "", "", HOSTILE[0]])
    evaluated = dataclasses.replace(evaluated, ids=HOSTILE)
    page, data = save(tmp_path, config, evaluated, HOSTILE)
    plain, _ = save(tmp_path, config, results([[2, 1]], [0]), ["a", "b"])
    assert data["labels"] == HOSTILE
    assert data["failed"][0]["error"] == HOSTILE[0]
    assert {video["id"] for video in data["mistakes"]} < set(HOSTILE)
    assert data["checkpoint"] == "checkpoints/</script>"
    for markup in ("<script", "</script", "<!--", "<img"):
        assert page.count(markup) == plain.count(markup)


@pytest.mark.parametrize("errors", [["", "", ""], ["a", "b", "c"]], ids=["decoded", "failed"])
def test_a_single_class_and_classes_without_videos(tmp_path, config, errors):
    _, data = save(tmp_path, config, results([[1]] * 3, [0] * 3, errors), ["only"])
    assert (data["count"], data["mistakes"]) == ([3], [])
    evaluated = results([[1, 5, 2], [1, 5, 2], [4, 1, 2]], [0, 0, 0], errors)
    _, data = save(tmp_path, config, evaluated, ["a", "b", "c"])
    assert data["count"] == [3, 0, 0]
    if any(errors):
        assert data["num_failed"] == 3
        assert data["calibration_error"] is data["loss"] is None
        assert data["confusion"] == []
        assert {tuple(row) for row in data["bins"]} == {(None, None, None)}


def test_page_of_400_classes_is_small_and_fast(tmp_path, config):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 400, 2000)
    scores = rng.normal(size=(2000, 400))  # almost all predictions are wrong
    errors = ["a broken file" if i % 5 == 0 else "" for i in range(2000)]
    names = [
        f"a class with quite a long name, longer than any of Kinetics, {i}" for i in range(400)
    ]
    evaluated = results(scores, labels, errors)
    start = time.monotonic()
    page, data = save(tmp_path, config, evaluated, names)
    assert time.monotonic() - start < 10
    assert len(page.encode()) < 500_000
    assert len(data["mistakes"]) == 12
    assert (len(data["failed"]), data["num_failed"]) == (200, 400)


def test_mistakes_have_thumbnails_unless_they_cannot_be_decoded(tmp_path, config, motion_folder):
    records = read_list(motion_folder / "val.csv", 8)[:2]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    records = [records[0], Record(broken, 0), records[1]]
    evaluated = results([[0, 9], [0, 8], [0, 7]], [0, 0, 0])
    page, data = save(tmp_path, config, evaluated, ["a", "b"], records)
    assert [bool(video["image"]) for video in data["mistakes"]] == [True, False, True]
    assert "The frame cannot be decoded." in page
    jpeg = tmp_path / "x.jpg"
    jpeg.write_bytes(html_report.draw_thumbnail(records[0]))
    with Image.open(jpeg) as picture, records[0].open() as reader:
        assert (picture.format, picture.size) == ("JPEG", (72, 72))
        middle = reader.get_frames(np.array([reader.num_frames // 2]))[0]
        assert np.abs(np.asarray(picture, float) - middle).mean() < 6


def test_thumbnails_are_small_for_any_video_size():
    class Reader:
        num_frames = 1

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def get_frames(self, indices):
            return np.zeros((len(indices), 1920, 1080, 3), np.uint8)

    class TallVideo:
        """A stub of a record; `open()` returns a reader."""

        open = Reader

    assert 0 < len(html_report.draw_thumbnail(TallVideo())) < 4000


def test_learning_curves_are_averaged_and_leave_out_missing_values(tmp_path, config):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": s, "train/loss": 2 / s, "train/top1": s / 100, "learning_rate": 0.1, "x": "y"}
        for s in range(1, 5001)
    ]
    rows += [{"step": 4000, "val/top1": None, "val/loss": None}]  # no video could be decoded
    rows += [{"step": 5000, "val/top1": 50.0, "val/top5": 90.0, "val/loss": float("nan")}]
    truncated_line = '{"step": 50'  # the run was killed while it wrote
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + truncated_line)
    _, data = save(tmp_path, config, results([[2, 1]], [0]), ["a", "b"])
    curves = data["curves"]
    assert set(curves) == {"train/loss", "train/top1", "learning_rate", "val/top1"}
    assert curves["val/top1"] == [[5000], [50]]
    steps, values = curves["train/top1"]
    assert len(steps) == len(values) == html_report.MAX_POINTS
    np.testing.assert_allclose(values, np.array(steps) / 100, rtol=1e-4)
    path.write_text("")
    assert html_report.read_curves(path) is None


def test_save_report_writes_the_page(tmp_path, config, motion_folder):
    evaluated = results([[0, 9], [3, 0]], [0, 0])
    protocol = resolve(config).protocol
    result = summary.make_report(evaluated, protocol, data="x", checkpoint="x")
    result["weights_sha256"] = "0" * 64
    records = read_list(motion_folder / "val.csv", 8)[:2]
    evaluate.save_report(tmp_path, result, evaluated, ["a", "b"], records)
    data = parse_data((tmp_path / "eval.html").read_text(encoding="utf-8"))
    assert data["top1"] == json.loads((tmp_path / "eval.json").read_text())["top1"] == 50
    assert data["mistakes"][0]["image"]
    assert not list(tmp_path.glob("*.partial"))
