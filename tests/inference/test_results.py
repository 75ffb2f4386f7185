"""Results of a classifier as text, JSON and tables."""

import json
import sys

import numpy as np
import pytest

import jaxvid
from jaxvid.errors import InputError
from jaxvid.inference.attention_rollout import AttentionRollout
from jaxvid.inference.class_timeline import ClassTimeline
from jaxvid.inference.results import Features, Prediction, ResultList

PREDICTION = Prediction(
    video="a.mp4", labels=("é", "b"), indices=(4, 1), probabilities=(0.75, 0.125), seconds=0.5
)
FAILED = Prediction(video="no.mp4", error="no.mp4 does not exist")
FEATURES = Features(
    video="a.mp4", vector=np.float32([1, 2, 3]), frames=np.zeros((2, 3), np.float32)
)
TIMELINE = ClassTimeline(
    video="a.mp4",
    labels=["x", "y"],
    starts=np.array([0.0, 1.0]),
    ends=np.array([2.0, 2.5]),
    padded=np.array([False, True]),
    stride=1.0,
    probabilities=np.array([[0.25, 0.75], [0.5, 0.5]]),
)
ROLLOUT = AttentionRollout(
    name="a.mp4",
    frames=np.zeros((2, 4, 4, 3), np.uint8),
    indices=np.array([3, 9]),
    times=np.array([0.5, 1.5]),
    crop_box=(0.0, 0.25, 1.0, 0.75),
    patch_attention=np.full((2, 1, 2), 0.5),
    frame_attention=np.array([0.25, 0.75]),
    top=[("x", 0.5)],
    notes=[],
)


def test_results_are_printed():
    assert str(PREDICTION) == "a.mp4\n   75.0 %  é\n   12.5 %  b"
    assert str(ResultList([PREDICTION, FAILED])) == f"{PREDICTION}\nfailed: no.mp4 does not exist"
    assert str(FEATURES) == "a.mp4  3 features, averaged from 2 frames per clip"
    assert str(TIMELINE).splitlines() == [
        "a.mp4",
        "     0.00 to      2.00 s  y 75.0 %, x 25.0 %",
        "     1.00 to      2.50 s  x 50.0 %, y 50.0 %",
    ]
    assert str(ROLLOUT).splitlines() == [
        "a.mp4",
        "   50.0 %  x",
        "   25.0 % of the attention  frame 3, 0.50 s",
        "   75.0 % of the attention  frame 9, 1.50 s",
    ]


def test_results_are_json():
    results = ResultList([PREDICTION, FAILED, FEATURES, TIMELINE, ROLLOUT])
    prediction, failed, features, timeline, rollout = json.loads(json.dumps(results.to_json()))
    assert prediction["top"][0] == {"label": "é", "probability": 0.75}
    assert failed == {"video": "no.mp4", "error": "no.mp4 does not exist"}
    assert features == {"video": "a.mp4", "vector": [1, 2, 3], "frames": [[0] * 3] * 2}
    assert timeline["windows"][1]["top"][0] == {"label": "x", "probability": 0.5}
    assert rollout["frames"][1] == {
        "frame": 9,
        "time": 1.5,
        "frame_attention": 0.75,
        "patch_attention": [[0.5, 0.5]],
    }
    json.dumps(Features(video="no.mp4", error="damaged").to_json())


def test_results_have_table_rows():
    columns = ("video", "rank", "label", "probability", "error")
    results = ResultList([PREDICTION, FAILED])
    rows = [tuple(row[name] for name in columns) for row in results.table_rows()]
    assert rows == [
        ("a.mp4", 1, "é", 0.75, ""),
        ("a.mp4", 2, "b", 0.125, ""),
        ("no.mp4", None, None, None, "no.mp4 does not exist"),
    ]
    assert FEATURES.table_rows() == [{"video": "a.mp4", "error": "", "f0": 1, "f1": 2, "f2": 3}]
    assert TIMELINE.table_rows()[0] == {
        "video": "a.mp4", "start": 0, "end": 2, "padded": False, "x": 0.25, "y": 0.75,
    }  # fmt: skip
    assert [row["frame"] for row in ROLLOUT.table_rows()] == [3, 9]


def test_tables_are_pandas_dataframes():
    pandas = pytest.importorskip("pandas", reason="pandas, an optional package, is not installed")
    table = ResultList([PREDICTION, FAILED]).to_dataframe()
    assert isinstance(table, pandas.DataFrame)
    assert table["probability"].tolist()[:2] == [0.75, 0.125]
    assert table["label"].isna().tolist() == [False, False, True]
    timelines = ResultList([TIMELINE, TIMELINE]).to_dataframe()
    assert timelines.groupby("start")["y"].mean().tolist() == [0.75, 0.5]
    assert FEATURES.to_dataframe().filter(like="f").shape == (1, 3)
    assert ROLLOUT.to_dataframe()["frame_attention"].sum() == 1
    assert ResultList().to_dataframe().empty


def test_missing_pandas_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"^to_dataframe needs pandas .*: pip install pandas$"):
        PREDICTION.to_dataframe()


def test_lists_of_results_are_lists(folders, clips):
    results = jaxvid.Classifier(folders / "xvit")(clips[:2])
    assert isinstance(results, list)
    assert len(results) == 2
    assert len(str(results).splitlines()) == 12
