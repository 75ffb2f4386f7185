"""Numbers out of scores: known by hand, or against a plain computation."""

import numpy as np
import pytest

from jaxvid import scoring
from jaxvid.errors import InputError
from jaxvid.eval_files import Unfinished, compare_tables, read_table, write_table


def results(scores, labels, errors=None):
    scores = np.asarray(scores, np.float32)
    errors = errors or [""] * len(labels)
    exp = np.exp(scores)
    probabilities = exp / exp.sum(1, keepdims=True)
    failed = np.array([bool(e) for e in errors])[:, None]
    return scoring.Results(
        ids=[f"v{i}.mp4" for i in range(len(labels))],
        labels=np.array(labels),
        scores=np.where(failed, 0, scores),
        probabilities=np.where(failed, 0, probabilities),
        padded=np.arange(len(labels)) == 1,
        errors=errors,
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
    assert scoring.accuracy(FOUR.hits(1)) == 40.0
    assert FOUR.confusion().tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 1]]
    np.testing.assert_allclose(FOUR.per_class(), [50, 0, 50])
    assert np.isnan(results([[1, 0]], [0]).per_class()[1])
    losses = FOUR.losses()
    assert np.isnan(losses[3])
    assert losses[0] == pytest.approx(-np.log(np.exp(3) / (np.exp(3) + np.exp(1) + 1)), rel=1e-5)


def test_the_interval_holds_the_accuracy_and_narrows_with_videos():
    few, many = np.arange(40) % 4 > 0, np.arange(4000) % 4 > 0
    for hits in (few, many):
        low, high = scoring.confidence_interval(hits)
        assert low < 75 < high
        expected = 1.96 * 100 * np.sqrt(0.75 * 0.25 / len(hits))  # normal approximation
        assert (high - low) / 2 == pytest.approx(expected, rel=0.15)
    assert scoring.confidence_interval(few) == scoring.confidence_interval(few)
    assert scoring.confidence_interval(np.ones(5, bool)) == (100.0, 100.0)


def test_calibration_is_the_papers_formula():
    rng = np.random.default_rng(0)
    confidences = rng.uniform(size=500)
    hits = rng.uniform(size=500) < confidences**2
    bins, error = scoring.reliability(confidences, hits)
    expected = 0.0
    for i in range(15):
        inside = (confidences >= i / 15) & (confidences < (i + 1) / 15)
        gap = abs(confidences[inside].mean() - hits[inside].mean())
        expected += 100 * inside.mean() * gap
        assert bins[i, 2] == inside.sum()
    assert error == pytest.approx(expected)
    assert scoring.reliability(np.ones(3), np.ones(3, bool))[1] == 0  # sure and right
    assert np.isnan(scoring.reliability(np.zeros(0), np.zeros(0, bool))[1])


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1.0), (1, 1, 1.0), (8, 0, 2 / 256), (9, 1, 22 / 1024)]
)
def test_mcnemars_test(gained, lost, p):
    before = np.array([False] * gained + [True] * lost + [True] * 10)
    after = np.array([True] * gained + [False] * lost + [True] * 10)
    found = scoring.compare_hits(before, after)
    assert (found["gained"], found["lost"]) == (gained, lost)
    assert found["p_value"] == pytest.approx(p)
    assert found["difference"] == pytest.approx(100 * (gained - lost) / len(before))
    assert scoring.compare_hits(np.zeros(3000, bool), np.ones(3000, bool))["p_value"] < 1e-300


def test_classes_that_are_confused_stand_side_by_side():
    confusion = np.diag([9] * 6)
    confusion[0, 4] = confusion[4, 0] = 5
    confusion[1, 3] = 4
    order = scoring.order_by_confusion(confusion).tolist()
    assert sorted(order) == list(range(6))
    assert abs(order.index(0) - order.index(4)) == 1
    assert abs(order.index(1) - order.index(3)) == 1


def write(folder, found):
    folder.mkdir()
    write_table(folder / "eval_videos.csv", found, ["ä", "b,c", "d"])
    (folder / "eval.json").write_text(f'{{"num_videos": {len(found.ids)}, "protocol": 1}}')
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
    assert "+25.00 % top-1 on 4 shared videos, 2 gained, 1 lost; not significant" in lines[0]
    assert "1 videos only there, 0 only here" in lines[1]
    assert lines[2].startswith("gained: v1.mp4, v3.mp4")
    assert lines[3].startswith("lost: v2.mp4")
    (tmp_path / "b" / "eval_videos.csv").unlink()
    with pytest.raises(InputError, match="eval_videos.csv beside it .*name an eval.json"):
        read_table(tmp_path / "b" / "eval.json")
    with pytest.raises(InputError, match="share no video"):
        compare_tables(before, {**after, "videos": {}}, tmp_path)


def test_what_is_unfinished_is_kept_for_the_same_evaluation_alone(tmp_path):
    part = {"scores": np.ones((2, 3)), "padded": np.array([True, False]), "error": ["", "ü broken"]}
    first = Unfinished(tmp_path / "u", {"a": 1})
    assert first.load() == []
    first.add(part)
    first.add(part)
    [one, two] = Unfinished(tmp_path / "u", {"a": 1}).load()
    assert one["error"] == two["error"] == ["", "ü broken"]
    np.testing.assert_array_equal(one["scores"], part["scores"])
    assert Unfinished(tmp_path / "u", {"a": 2}).load() == []
    assert Unfinished(tmp_path / "u", {"a": 1}).load() == []
    first.remove()
    assert not (tmp_path / "u").exists()
