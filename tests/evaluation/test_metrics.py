"""Numbers out of scores: known by hand, or against a plain computation."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxvid.atomic import write_json
from jaxvid.distributed import collectives
from jaxvid.errors import InputError
from jaxvid.evaluation import metrics
from jaxvid.evaluation.comparison import check_shared, compare_tables
from jaxvid.evaluation.results import read_table, write_table
from jaxvid.evaluation.resume import PartialResults


def results(scores, labels, errors=None):
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


FOUR = results(
    [[3, 1, 0], [0, 2, 1], [1, 0, 5], [9, 0, 0], [0, 0, 1]],
    [0, 2, 2, 0, 1],
    ["", "", "", "broken", ""],
)


def test_hits_count_what_failed_as_wrong():
    assert FOUR.hits(1).tolist() == [True, False, True, False, False]
    assert FOUR.hits(2).tolist() == [True, True, True, False, False]
    assert FOUR.hits(5).tolist() == [True, True, True, False, True]  # three classes: k is 3
    assert FOUR.top(1)[:, 0].tolist() == [0, 1, 2, -1, 2]
    assert metrics.accuracy(FOUR.hits(1)) == 40.0
    assert FOUR.confusion().tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 1]]
    np.testing.assert_allclose(FOUR.per_class(), [50, 0, 50])
    assert np.isnan(results([[1, 0]], [0]).per_class()[1])
    losses = FOUR.losses()
    assert np.isnan(losses[3])
    assert losses[0] == pytest.approx(-np.log(np.exp(3) / (np.exp(3) + np.exp(1) + 1)), rel=1e-5)


def test_the_interval_holds_the_accuracy_and_narrows_with_videos():
    few, many = np.arange(40) % 4 > 0, np.arange(4000) % 4 > 0
    for hits in (few, many):
        low, high = metrics.confidence_interval(hits)
        assert low < 75 < high
        expected = 1.96 * 100 * np.sqrt(0.75 * 0.25 / len(hits))  # normal approximation
        assert (high - low) / 2 == pytest.approx(expected, rel=0.15)
    assert metrics.confidence_interval(few) == metrics.confidence_interval(few)


def test_the_interval_of_all_right_or_none_is_the_exact_one():
    # The least accuracy that gives 5 right of 5 in one of 40 draws.
    low, high = metrics.confidence_interval(np.ones(5, bool))
    assert (low / 100) ** 5 == pytest.approx(0.025)
    assert (low, high) == (pytest.approx(47.8176), 100.0)
    low, high = metrics.confidence_interval(np.zeros(300, bool))
    assert (low, high) == (0.0, pytest.approx(1.2221, abs=1e-4))
    assert (1 - high / 100) ** 300 == pytest.approx(0.025)


def test_calibration_is_the_papers_formula():
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
    assert metrics.calibration(np.ones(3), np.ones(3, bool))[1] == 0  # sure and right
    assert np.isnan(metrics.calibration(np.zeros(0), np.zeros(0, bool))[1])


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1.0), (1, 1, 1.0), (8, 0, 2 / 256), (9, 1, 22 / 1024)]
)
def test_mcnemars_test(gained, lost, p):
    before = np.array([False] * gained + [True] * lost + [True] * 10)
    after = np.array([True] * gained + [False] * lost + [True] * 10)
    found = metrics.compare_hits(before, after)
    assert (found["gained"], found["lost"]) == (gained, lost)
    assert found["p_value"] == pytest.approx(p)
    assert found["num_videos"] == len(before)
    assert found["difference"] == pytest.approx(100 * (gained - lost) / len(before))
    assert metrics.compare_hits(np.zeros(3000, bool), np.ones(3000, bool))["p_value"] < 1e-300


def test_classes_that_are_confused_stand_side_by_side():
    confusion = np.diag([9] * 6)
    confusion[0, 4] = confusion[4, 0] = 5
    confusion[1, 3] = 4
    order = metrics.order_by_confusion(confusion).tolist()
    assert sorted(order) == list(range(6))
    assert abs(order.index(0) - order.index(4)) == 1
    assert abs(order.index(1) - order.index(3)) == 1


def test_equal_scores_rank_the_first_class_first():
    scores = np.random.default_rng(0).integers(0, 4, (2, 400))
    found = results(scores, [0, 5])
    expected = [sorted(range(400), key=lambda c, row=row: (-row[c], c)) for row in scores]
    assert found.top(400).tolist() == expected
    assert found.confusion().dtype == np.int64


def test_the_intervals_ends_are_the_quantiles_and_the_seed_decides():
    hits = np.arange(100_000) % 4 > 0
    intervals = [metrics.confidence_interval(hits, seed) for seed in range(20)]
    low, high = np.mean(intervals, axis=0)
    deviation = 100 * np.sqrt(0.75 * 0.25 / len(hits))
    # 2000 resamples give a quantile to 0.06 standard deviations, 20 times that many to 0.013.
    assert (75 - low) / deviation == pytest.approx(1.96, abs=0.06)
    assert (high - 75) / deviation == pytest.approx(1.96, abs=0.06)
    assert metrics.confidence_interval(hits) == intervals[0]
    assert len(set(intervals)) == 20


@pytest.mark.parametrize("confidences", [[], [0.01, 0.02], [1.0, 1.0]])
def test_calibration_always_has_15_bins(confidences):
    bins, _ = metrics.calibration(np.array(confidences), np.ones(len(confidences), bool))
    assert bins.shape == (15, 3)
    assert bins.dtype == np.float64
    assert np.nansum(bins[:, 2]) == len(confidences)


def test_the_order_of_classes_starts_with_the_most_confused_and_follows_the_last():
    confusion = np.diag([90, 0, 0, 0, 50, 0])
    for i, j, count in ((3, 1, 10), (3, 2, 6), (1, 4, 4), (3, 5, 1)):
        confusion[i, j] = count
    # After 3 and 1: 4 is confused 4 times with the last, 2 six times with the one before.
    assert metrics.order_by_confusion(confusion).tolist() == [3, 1, 4, 2, 5, 0]
    assert metrics.order_by_confusion(confusion.T.tolist()).tolist() == [3, 1, 4, 2, 5, 0]


def write(folder, found):
    folder.mkdir()
    write_table(folder / "eval_videos.csv", found, ["ä", "b,c", "d"])
    (folder / "eval.json").write_text(
        f'{{"num_videos": {len(found.ids)}, "protocol": {{"score": "x"}}}}'
    )
    return read_table(folder / "eval.json")


def test_tables_come_back_and_are_compared_by_id(tmp_path):
    before = write(tmp_path / "a", FOUR)
    row = before["videos"]["v1.mp4"]
    assert (row["label"], row["prediction"], row["padded"]) == ("d", "b,c", "1")
    assert row["top5"] == '["b,c", "d", "ä"]'
    assert before["videos"]["v3.mp4"]["failed"] == "broken"
    assert before["videos"]["v3.mp4"]["prediction"] == ""
    better = results([[3, 1, 0], [0, 1, 2], [5, 0, 1], [9, 0, 0]], [0, 2, 2, 0])
    after = write(tmp_path / "b", better)
    lines = compare_tables(before, after, tmp_path)
    expected = "+25.00 % top-1 on 4 shared videos, 2 gained, 1 lost, 0 wrong otherwise; not signif"
    assert expected in lines[0]
    assert "1 videos only there, 0 only here" in lines[1]
    assert lines[2].startswith("gained: v1.mp4, v3.mp4")
    assert lines[3].startswith("lost: v2.mp4")
    assert len(lines) == 4
    (tmp_path / "b" / "eval_videos.csv").unlink()
    with pytest.raises(InputError, match="eval_videos.csv beside it .*name an eval.json"):
        read_table(tmp_path / "b" / "eval.json")
    check_shared(before, ["v9.mp4", "v4.mp4"])
    with pytest.raises(InputError, match=r"a/eval.json shares no video with the data; name an"):
        check_shared(before, ["v9.mp4"])
    (tmp_path / "a" / "eval.json").write_text('{"num_videos": 5, "protocol": 1}')
    with pytest.raises(InputError, match="its protocol is 1.*name an eval.json"):
        read_table(tmp_path / "a" / "eval.json")


def test_every_changed_prediction_is_listed_by_how_it_changed(tmp_path):
    names, worse = ["right", "gained", "lost", "other", "same", "breaks"], np.eye(3)[[0, 2, 1]]
    labels = [0, 0, 0, 0, 0, 0]
    was = results(worse[[0, 1, 0, 1, 1, 1]], labels)
    now = results(worse[[0, 0, 1, 2, 1, 1]], labels, [""] * 5 + ["broken"])
    tables = []
    for folder, found in (("a", was), ("b", now)):
        found.ids = names
        tables.append(write(tmp_path / folder, found))
    tables[1]["protocol"] = {"score": "x", "by_time": True}
    tables[1]["videos"]["same"]["label"] = "d"
    lines = compare_tables(*tables, tmp_path)
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["gained_videos"] == ["gained"]
    assert found["lost_videos"] == ["lost"]
    assert found["still_wrong_videos"] == ["other", "breaks"]
    assert [found[name] for name in ("gained", "lost", "still_wrong", "relabelled")] == [1, 1, 2, 1]
    assert not found["same_protocol"]
    assert "their protocols differ: by_time was None, now True" in lines
    assert "1 of the shared videos have another label now" in lines
    assert any(line.startswith("still wrong: other, breaks (all in ") for line in lines)


def test_what_is_unfinished_is_kept_for_the_same_evaluation_alone(tmp_path):
    part = {"scores": np.ones((2, 3)), "padded": np.array([True, False]), "error": ["", "ü broken"]}
    first = PartialResults(tmp_path / "u", {"a": 1})
    assert first.load() == []
    first.add(part)
    first.add(part)
    [one, two] = PartialResults(tmp_path / "u", {"a": 1}).load()
    assert one["error"] == two["error"] == ["", "ü broken"]
    np.testing.assert_array_equal(one["scores"], part["scores"])
    assert PartialResults(tmp_path / "u", {"a": 2}).load() == []
    assert PartialResults(tmp_path / "u", {"a": 1}).load() == []
    first.remove()
    assert not (tmp_path / "u").exists()


def keep(folder, count):
    unfinished = PartialResults(folder, {"a": 1})
    unfinished.load()
    for i in range(count):
        unfinished.add({"scores": np.full((2, 3), i), "error": ["", ""]})


def test_a_damaged_batch_is_done_again(tmp_path):
    keep(tmp_path, 3)
    data = (tmp_path / "1.npz").read_bytes()
    for damaged in (b"", data[:40], data[: len(data) // 2]):
        (tmp_path / "1.npz").write_bytes(damaged)
        assert len(PartialResults(tmp_path, {"a": 1}).load()) == 1
    (tmp_path / "key.json").write_bytes(b"\xff")
    assert PartialResults(tmp_path, {"a": 1}).load() == []


def test_batches_that_cannot_be_removed_are_not_mixed_with_others(tmp_path, monkeypatch):
    keep(tmp_path / "u", 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(InputError, match="u cannot be removed; delete it"):
        PartialResults(tmp_path / "u", {"a": 2}).load()


def test_the_first_process_decides_what_is_kept(tmp_path, monkeypatch):
    keep(tmp_path, 3)
    told = iter([[False, True], [None, None], [True, True], [3, 2]])
    monkeypatch.setattr(collectives, "gather", lambda value: next(told))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    # The first removes the folder meanwhile: the second must not read there, nor fail.
    read = Path.read_text
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert PartialResults(tmp_path / "gone", {"a": 1}).load() == []
    assert read(tmp_path / "key.json")
    assert len(PartialResults(tmp_path, {"a": 1}).load()) == 2  # the other sees fewer


def test_what_cannot_be_written_is_one_line(tmp_path):
    for name in ("eval_videos.csv", "key.json", "0.npz"):
        (tmp_path / name / "x").mkdir(parents=True)
    with pytest.raises(InputError, match=r"eval_videos.csv cannot be written \(Is a directory\)"):
        write_table(tmp_path / "eval_videos.csv", FOUR, ["a", "b", "c"])
    with pytest.raises(InputError, match=r"0.npz cannot be written \(Is a directory\); name"):
        PartialResults(tmp_path, {}).add({"scores": np.zeros(1), "error": [""]})
    assert not list(tmp_path.glob(".*.partial"))
    table = write(tmp_path / "a", FOUR)
    with pytest.raises(InputError, match="comparison.json cannot be written"):
        compare_tables(table, table, tmp_path / "a" / "eval.json")


def test_names_of_files_that_are_not_utf8_come_back(tmp_path):
    odd = os.fsdecode(b"caf\xe9.mp4")
    found = results([[2, 1], [2, 1]], [0, 1])
    found.ids = [odd, "b.mp4"]
    found.errors = ["", f"{odd}: broken"]
    tables = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_table(tmp_path / folder / "eval_videos.csv", found, ["x", "y"])
        failed = [{"id": odd}]
        report = {"num_videos": 2, "protocol": {}, "failed": failed}
        write_json(tmp_path / folder / "eval.json", report)
        tables.append(read_table(tmp_path / folder / "eval.json"))
        assert tables[-1]["failed"] == failed
    assert b"caf\xe9.mp4" in (tmp_path / "a" / "eval_videos.csv").read_bytes()
    tables[0]["videos"][odd]["correct"] = False
    lines = compare_tables(*tables, tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text())["gained_videos"] == [odd]
    assert "\n".join(lines).encode()  # the log is UTF-8
