"""Metrics, per-video tables and comparisons of an evaluation."""

import json
import math
import os

import numpy as np
import pytest
from scipy.special import expit

from jaxvid.atomic import write_json
from jaxvid.errors import InputError
from jaxvid.evaluation import metrics
from jaxvid.evaluation.comparison import (
    _parse_row,
    check_shared,
    compare_tables,
    describe,
    format_tables,
    read_table,
    save_comparison,
)
from jaxvid.evaluation.outputs import write_table
from jaxvid.storage.partial_results import PartialResults


def results(scores, labels, errors=None):
    """Return the results of videos `v0.mp4`, `v1.mp4`, ...; `v1.mp4` is padded and not released."""
    scores = np.asarray(scores, np.float32)
    errors = errors or [""] * len(labels)
    exp = np.exp(scores)
    probabilities = exp / exp.sum(1, keepdims=True)
    failed = np.array([bool(e) for e in errors])[:, None]
    return metrics.Results(
        ids=[f"v{i}.mp4" for i in range(len(labels))],
        labels=np.array(labels),
        scores=np.where(failed, 0, scores),
        probabilities=np.where(failed, 0, probabilities),
        padded=np.arange(len(labels)) == 1,
        released=np.arange(len(labels)) != 1,
        errors=errors,
        seconds=2.0,
    )


# Five videos, of which the fourth cannot be decoded.
RESULTS = results(
    [[3, 1, 0], [0, 2, 1], [1, 0, 5], [9, 0, 0], [0, 0, 1]],
    [0, 2, 2, 0, 1],
    ["", "", "", "broken", ""],
)


def test_failed_videos_count_as_wrong():
    assert RESULTS.hits(1).tolist() == [True, False, True, False, False]
    assert RESULTS.hits(2).tolist() == [True, True, True, False, False]
    # With three classes, the five best classes are all classes.
    assert RESULTS.hits(5).tolist() == [True, True, True, False, True]
    assert RESULTS.top(1)[:, 0].tolist() == [0, 1, 2, -1, 2]
    assert metrics.accuracy(RESULTS.hits(1)) == 40.0
    assert RESULTS.confusion().tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 1]]
    np.testing.assert_allclose(RESULTS.per_class(), [50, 0, 50])
    assert np.isnan(results([[1, 0]], [0]).per_class()[1])
    losses = RESULTS.losses()
    assert np.isnan(losses[3])
    assert losses[0] == pytest.approx(-np.log(np.exp(3) / (np.exp(3) + np.exp(1) + 1)), rel=1e-5)


def test_interval_contains_accuracy_and_narrows_with_more_videos():
    few, many = np.arange(40) % 4 > 0, np.arange(4000) % 4 > 0
    for hits in (few, many):
        low, high = metrics.confidence_interval(hits)
        assert low < 75 < high
        expected = 1.96 * 100 * np.sqrt(0.75 * 0.25 / len(hits))  # normal approximation
        assert (high - low) / 2 == pytest.approx(expected, rel=0.15)


def test_interval_bound_is_exact_if_all_or_no_videos_are_correct():
    # At the lower bound, 5 of 5 are correct with a probability of 2.5 %.
    low, high = metrics.confidence_interval(np.ones(5, bool))
    assert (low / 100) ** 5 == pytest.approx(0.025)
    assert (low, high) == (pytest.approx(47.8176), 100.0)
    low, high = metrics.confidence_interval(np.zeros(300, bool))
    assert (low, high) == (0.0, pytest.approx(1.2221, abs=1e-4))
    assert (1 - high / 100) ** 300 == pytest.approx(0.025)


def test_calibration_error_matches_its_definition():
    rng = np.random.default_rng(0)
    confidences = rng.uniform(size=500)
    hits = rng.uniform(size=500) < confidences**2
    bins, error = metrics.calibration(confidences, hits)
    expected = 0.0
    for i in range(15):
        inside = (confidences >= i / 15) & (confidences < (i + 1) / 15)
        gap = abs(confidences[inside].mean() - hits[inside].mean())
        expected += 100 * inside.mean() * gap
        assert bins[i, 2] == inside.sum()
    assert error == pytest.approx(expected)
    assert metrics.calibration(np.ones(3), np.ones(3, bool))[1] == 0  # certain and correct
    assert np.isnan(metrics.calibration(np.zeros(0), np.zeros(0, bool))[1])


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1.0), (1, 1, 1.0), (8, 0, 2 / 256), (9, 1, 22 / 1024)]
)
def test_mcnemars_exact_test(gained, lost, p):
    before = np.array([False] * gained + [True] * lost + [True] * 10)
    after = np.array([True] * gained + [False] * lost + [True] * 10)
    comparison = metrics.compare_hits(before, after)
    assert (comparison["gained"], comparison["lost"]) == (gained, lost)
    assert comparison["p_value"] == pytest.approx(p)
    assert comparison["num_videos"] == len(before)
    assert comparison["difference"] == pytest.approx(100 * (gained - lost) / len(before))
    assert metrics.compare_hits(np.zeros(3000, bool), np.ones(3000, bool))["p_value"] < 1e-300


def test_confused_classes_are_adjacent():
    confusion = np.diag([9] * 6)
    confusion[0, 4] = confusion[4, 0] = 5
    confusion[1, 3] = 4
    order = metrics.order_by_confusion(confusion).tolist()
    assert sorted(order) == list(range(6))
    assert abs(order.index(0) - order.index(4)) == 1
    assert abs(order.index(1) - order.index(3)) == 1


def test_ties_rank_lower_class_index_first():
    scores = np.random.default_rng(0).integers(0, 4, (2, 400))
    tied = results(scores, [0, 5])
    expected = [sorted(range(400), key=lambda c, row=row: (-row[c], c)) for row in scores]
    assert tied.top(400).tolist() == expected
    assert tied.confusion().dtype == np.int64


def test_interval_bounds_leave_tails_of_2_5_percent():
    # Clopper-Pearson: at each bound, the observed or a more extreme count has probability 2.5 %.
    num_correct, n = 15, 20
    low, high = metrics.confidence_interval(np.arange(n) < num_correct)
    assert (low, high) == (pytest.approx(50.8954, abs=1e-4), pytest.approx(91.3429, abs=1e-4))

    def probability(count, p):
        return math.comb(n, count) * p**count * (1 - p) ** (n - count)

    upper_tail = sum(probability(k, low / 100) for k in range(num_correct, n + 1))
    lower_tail = sum(probability(k, high / 100) for k in range(num_correct + 1))
    assert upper_tail == pytest.approx(0.025)
    assert lower_tail == pytest.approx(0.025)
    # With many videos, the interval approaches the normal approximation.
    many = np.arange(100_000) % 4 > 0
    low, high = metrics.confidence_interval(many)
    deviation = 100 * np.sqrt(0.75 * 0.25 / len(many))
    assert (75 - low) / deviation == pytest.approx(1.96, abs=0.01)
    assert (high - 75) / deviation == pytest.approx(1.96, abs=0.01)


@pytest.mark.parametrize("confidences", [[], [0.01, 0.02], [1.0, 1.0]])
def test_calibration_always_has_15_bins(confidences):
    bins, _ = metrics.calibration(np.array(confidences), np.ones(len(confidences), bool))
    assert bins.shape == (15, 3)
    assert bins.dtype == np.float64
    assert np.nansum(bins[:, 2]) == len(confidences)


def test_class_order_starts_with_most_confused_class_and_favours_recent_ones():
    confusion = np.diag([90, 0, 0, 0, 50, 0])
    for i, j, count in ((3, 1, 10), (3, 2, 6), (1, 4, 4), (3, 5, 1)):
        confusion[i, j] = count
    # The order starts with 3 and 1. Class 4 is next: it has a weight of 4, from the confusions with
    # 1. Class 2 has a weight of 3: its 6 confusions with 3 count half, as 3 is not the last class.
    assert metrics.order_by_confusion(confusion).tolist() == [3, 1, 4, 2, 5, 0]
    assert metrics.order_by_confusion(confusion.T.tolist()).tolist() == [3, 1, 4, 2, 5, 0]


def write(folder, evaluated):
    """Write the outputs of an evaluation; return them as `read_table` does."""
    folder.mkdir()
    write_table(folder / "eval_videos.csv", evaluated, ["ä", "b,c", "d"])
    (folder / "eval.json").write_text(
        f'{{"num_videos": {len(evaluated.ids)}, "protocol": {{"score": "x"}}}}'
    )
    return read_table(folder / "eval.json")


def test_tables_are_read_back_and_compared_by_id(tmp_path):
    before = write(tmp_path / "a", RESULTS)
    row = before["videos"]["v1.mp4"]
    assert (row["label"], row["prediction"], row["padded"]) == ("d", "b,c", "1")
    assert row["top5"] == '["b,c", "d", "ä"]'
    assert before["videos"]["v3.mp4"]["failed"] == "broken"
    assert before["videos"]["v3.mp4"]["prediction"] == ""
    better = results([[3, 1, 0], [0, 1, 2], [5, 0, 1], [9, 0, 0]], [0, 2, 2, 0])
    after = write(tmp_path / "b", better)
    comparison = compare_tables(before, after)
    lines = describe(comparison)
    expected = (
        "top-1 +25.00 percentage points on 4 shared videos (2 gained, 1 lost, 0 still wrong with "
        "another prediction); not significant"
    )
    assert expected in lines[0]
    paths = [tmp_path / folder / "eval.json" for folder in "ab"]
    assert lines[1:] == [
        f"videos not shared: 1 only in {paths[0]}, 0 only in {paths[1]}",
        "gained: v1.mp4, v3.mp4",
        "lost: v2.mp4",
    ]
    # v3.mp4 was not decoded before, so its label was not among five predicted classes.
    assert comparison["accuracies"] == {
        "top1": [50, 75],
        "top5": [75, 100],
        "mean_class_accuracy": [50, 75],
    }
    assert comparison["classes"] == {
        "d": {"num_videos": 2, "before": 50, "after": 50},
        "ä": {"num_videos": 2, "before": 50, "after": 100},
    }


def test_missing_and_damaged_evaluations_are_refused(tmp_path):
    write(tmp_path / "a", RESULTS)
    table, report = tmp_path / "a" / "eval_videos.csv", tmp_path / "a" / "eval.json"
    assert read_table(tmp_path / "a")["path"] == str(report)
    with pytest.raises(InputError, match="none: not found; choose the eval.json of a finished"):
        read_table(tmp_path / "none")
    text = table.read_text(encoding="utf-8")
    table.write_text(text.rpartition("\n")[0].rpartition("\n")[0])
    with pytest.raises(InputError, match="damaged .eval_videos.csv has 4 videos, eval.json has 5"):
        read_table(report)
    table.write_text(text)
    report.write_text('{"num_videos": 5, "protocol": 1}')
    with pytest.raises(InputError, match="protocol: expected a dict, got 1.*choose another"):
        read_table(report)
    table.unlink()
    with pytest.raises(InputError, match="eval_videos.csv: not found; choose the eval.json"):
        read_table(report)


def test_evaluations_of_other_videos_or_classes_are_refused(tmp_path):
    before = write(tmp_path / "a", RESULTS)
    check_shared(before, ["v9.mp4", "v4.mp4"], ["x", "y"])  # the file has no class names
    with pytest.raises(InputError, match=r"a/eval.json shares no video with the data; choose an"):
        check_shared(before, ["v9.mp4"], ["x", "y"])
    before["labels"] = ["left", "rihgt"]
    check_shared(before, ["v4.mp4"], ["left", "right"])
    with pytest.raises(InputError, match="a/eval.json has 2 classes, b has 3; choose an"):
        check_shared(before, ["v4.mp4"], ["left", "right", "up"], name="b")
    with pytest.raises(InputError, match="a/eval.json shares no class name with b; choose an"):
        check_shared(before, ["v4.mp4"], ["up", "down"], name="b")


def test_changed_predictions_are_listed_by_kind_of_change(tmp_path):
    ids, scores = ["right", "gained", "lost", "other", "same", "breaks"], np.eye(3)[[0, 2, 1]]
    labels = [0, 0, 0, 0, 0, 0]
    before = results(scores[[0, 1, 0, 1, 1, 1]], labels)
    after = results(scores[[0, 0, 1, 2, 1, 1]], labels, [""] * 5 + ["broken"])
    tables = []
    for folder, evaluated in (("a", before), ("b", after)):
        evaluated.ids = ids
        tables.append(write(tmp_path / folder, evaluated))
    tables[1]["protocol"] = {"score": "x", "by_time": True}
    tables[1]["videos"]["same"]["label"] = "d"
    comparison = compare_tables(*tables)
    lines = describe(comparison)
    assert comparison["gained_videos"] == ["gained"]
    assert comparison["lost_videos"] == ["lost"]
    assert comparison["still_wrong_videos"] == ["other", "breaks"]
    counts = [comparison[name] for name in ("gained", "lost", "still_wrong", "relabelled")]
    assert counts == [1, 1, 2, 1]
    assert not comparison["same_protocol"]
    assert "the protocols differ: by_time: missing before, True after" in lines
    assert "labels differ for 1 of the shared videos" in lines
    assert "still wrong: other, breaks" in lines
    comparison["lost_videos"] = [f"v{i}" for i in range(12)]
    assert describe(comparison)[-2].endswith(" v8, v9 and 2 more")


def test_multi_label_evaluations_are_compared_by_average_precision():
    def make(predictions, precisions):
        videos = {
            id_: _parse_row({"label": label, "prediction": top, "correct": hit, "top5": "[]"}, True)
            for id_, (label, top, hit) in predictions.items()
        }
        names = dict(zip("xyz", precisions, strict=True))
        report = {"protocol": {}, "path": "a", "videos": videos, "per_class_ap": names}
        return report | {"mAP": np.mean([value for value in precisions if value is not None])}

    before = make({"a": ('["x", "y"]', "z", "0"), "b": ("[]", "x", "0")}, [50.0, 40.0, None])
    after = make({"a": ('["x", "y"]', "y", "1"), "b": ("[]", "x", "0")}, [100.0, 40.0, None])
    comparison = compare_tables(before, after)
    assert comparison["gained_videos"] == ["a"]
    assert comparison["classes"] == {
        "x": {"num_videos": 1, "before": 50.0, "after": 100.0},
        "y": {"num_videos": 1, "before": 40.0, "after": 40.0},
    }
    assert comparison["accuracies"]["mAP"] == [45.0, 70.0]
    assert "mAP" in format_tables(comparison)
    del after["videos"]["b"]
    comparison = compare_tables(before, after)
    assert not comparison["classes"]
    assert comparison["accuracies"].keys() == {"top1", "top5"}
    del after["mAP"]
    with pytest.raises(InputError, match="only one of them is of multi-label data"):
        compare_tables(before, after)


def test_unwritable_files_are_refused(tmp_path):
    for name in ("eval_videos.csv", "key.json", "0.npz"):
        (tmp_path / name / "x").mkdir(parents=True)
    with pytest.raises(InputError, match=r"eval_videos.csv cannot be written \(Is a directory\)"):
        write_table(tmp_path / "eval_videos.csv", RESULTS, ["a", "b", "c"])
    with pytest.raises(InputError, match=r"0.npz cannot be written \(Is a directory\); choose"):
        PartialResults(tmp_path, {}).add({"scores": np.zeros(1), "error": [""]})
    assert not list(tmp_path.glob(".*.partial"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="comparison.json cannot be written"):
        save_comparison(tmp_path / "file", {})


def test_file_names_that_are_not_utf8_are_read_back(tmp_path):
    non_utf8 = os.fsdecode(b"caf\xe9.mp4")
    evaluated = results([[2, 1], [2, 1]], [0, 1])
    evaluated.ids = [non_utf8, "b.mp4"]
    evaluated.errors = ["", f"{non_utf8}: broken"]
    tables = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_table(tmp_path / folder / "eval_videos.csv", evaluated, ["x", "y"])
        failed = [{"id": non_utf8}]
        report = {"num_videos": 2, "protocol": {}, "failed": failed}
        write_json(tmp_path / folder / "eval.json", report)
        tables.append(read_table(tmp_path / folder / "eval.json"))
        assert tables[-1]["failed"] == failed
    assert b"caf\xe9.mp4" in (tmp_path / "a" / "eval_videos.csv").read_bytes()
    tables[0]["videos"][non_utf8]["correct"] = False
    comparison = compare_tables(*tables)
    lines = describe(comparison)
    path = save_comparison(tmp_path, comparison)
    assert json.loads(path.read_text())["gained_videos"] == [non_utf8]
    assert "\n".join(lines).encode()  # the log is UTF-8


# ------------------------------------------------------------------ multi-label data

NONE_FAILED = np.zeros(4, bool)


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        # Values of scikit-learn 1.9.1's average_precision_score; the first is of its docstring.
        ([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], 0.8333333333333333),
        ([1, 0, 1, 0], [0.5, 0.5, 0.5, 0.5], 0.5),  # a single threshold
        ([1, 0, 1, 0], [0.9, 0.7, 0.7, 0.1], 0.8333333333333333),  # 1/2 · 1 + 1/2 · 2/3
        ([0, 0, 0, 1], [4, 3, 2, 1], 0.25),
        ([1, 1, 1, 1], [4, 3, 2, 1], 1.0),
    ],
)
def test_average_precision_equals_scikit_learn(labels, scores, expected):
    actual = metrics.average_precision(np.array(labels), np.array(scores), NONE_FAILED)
    assert actual == pytest.approx(100 * expected)


def test_average_precision_of_failed_and_absent_videos():
    assert np.isnan(metrics.average_precision(np.zeros(4), np.arange(4), NONE_FAILED))
    # The second of the two positives is never found; the score of a failed video is not used.
    failed = np.array([False, False, True, False])
    actual = metrics.average_precision(np.array([1, 0, 1, 0]), np.array([3, 2, 9, 1]), failed)
    assert actual == pytest.approx(50)
    assert metrics.average_precision(np.array([0, 0, 1, 0]), np.arange(4), failed) == 0


def multi_label_results(labels, scores, errors):
    """Return multi-label results of the videos `0`, `1`, ..."""
    count, scores = len(labels), np.array(scores, np.float32)
    failed = np.array([bool(error) for error in errors])[:, None]
    return metrics.Results(
        ids=[str(i) for i in range(count)],
        labels=np.array(labels),
        scores=np.where(failed, 0, scores),
        probabilities=np.where(failed, 0, expit(scores)),
        padded=np.zeros(count, bool),
        released=np.ones(count, bool),
        errors=errors,
        seconds=1.0,
    )


def test_multi_label_metrics():
    labels = [[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0]]
    scores = [[2, 1, 0], [0, 1, -1], [3, -2, -4], [1, 0, 0]]
    results = multi_label_results(labels, scores, ["", "", "", "broken"])
    assert results.hits(1).tolist() == [True, False, False, False]
    assert results.hits(2).tolist() == [True, False, True, False]
    # Class 0: the first positive is second, the other failed. Class 1: 1 of 2 at the first
    # threshold (two videos have the score 1), 2 of 3 at the last. Class 2: no positive.
    np.testing.assert_allclose(results.per_class(), [25, 100 * (1 / 4 + 1 / 3), np.nan], rtol=1e-6)
    p, y = expit(np.array(scores[0])), np.array(labels[0])
    expected = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    losses = results.losses()
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert np.isnan(losses[3])
    assert (results.label(0), results.label(1)) == ([0, 1], [])
    assert results.count_labels(np.array([True, True, True, False])).tolist() == [1, 2, 0]


def test_multi_label_losses_of_certain_and_wrong_networks_are_finite():
    results = multi_label_results([[1, 0], [0, 1]], [[99, -999], [99, -999]], ["", ""])
    right, wrong = results.losses()
    assert 0 < right < 1.1e-7  # probabilities are limited to [1e-7, 1 - 1e-7]
    assert wrong == pytest.approx(-np.log(1e-7))
