"""Rows of metrics, TensorBoard events and skipped videos, also after the run was killed."""

import errno
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.errors import InputError
from jaxvid.training.metric_window import describe_row, sum_metrics, training_row, window_steps
from jaxvid.training.metric_writer import MetricWriter, last_evaluation
from jaxvid.training.skipped_videos import SkippedVideos, read_skipped


def test_sums_are_exact():
    big = 2**24
    steps = [(big, 0.1), (1, big)]
    sums = sum_metrics([{"n": jnp.asarray(n), "x": jnp.float32(x)} for n, x in steps])
    assert sums["n"] == big + 1
    assert (sums["n"].dtype, sums["x"].dtype) == (np.int64, np.float64)
    assert sums["x"] == pytest.approx(big + 0.1, abs=1e-6)
    matrix = sum_metrics([{"c": jnp.ones((2, 2), jnp.int32)}] * 3)["c"]
    np.testing.assert_array_equal(matrix, np.full((2, 2), 3))
    assert sum_metrics([{"n": jnp.asarray(4)}]) == {"n": 4}
    assert sum_metrics([]) == {}


@pytest.mark.parametrize(
    ("log_steps", "total", "expected"),
    [(50, 1000, 50), (50, 110, 11), (50, 115, 11), (50, 20, 2), (50, 9, 1), (3, 20, 2), (1, 1, 1)],
)
def test_short_runs_get_shorter_log_windows(log_steps, total, expected):
    assert window_steps(log_steps, total) == expected


def test_a_row_has_means_over_clips_and_over_steps():
    sums = {"loss": 6.0, "top1": 3, "count": 12, "grad_norm": 5.0}
    row = training_row(sums, 2)
    assert row == {
        "steps": 2,
        "train/loss": 0.5,
        "train/top1": 25.0,
        "train/grad_norm": 2.5,
    }
    assert describe_row(row) == "loss 0.500, top-1 25.0 %"
    row = training_row({"loss": 0.0, "top1": 0, "count": 0, "grad_norm": 0.0}, 1)
    assert (row["train/loss"], row["train/top1"], row["train/grad_norm"]) == (None, None, 0)
    assert describe_row(row) == "no video of these steps can be decoded"


def test_a_resumed_run_drops_rows_after_its_checkpoint(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    for step in (10, 20, 30):
        writer.write(step, {"loss": step / 10})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed in the middle of a line
    writer = MetricWriter(tmp_path, 20)
    writer.write(30, {"loss": 0.5})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}, {"step": 30, "loss": 0.5}]
    assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) >= 1


def test_skipped_videos_are_listed_once_even_after_a_kill(tmp_path):
    path = tmp_path / "skipped.jsonl"
    skipped = SkippedVideos(tmp_path, num_videos=4, max_share=0.5)
    skipped.note([("b", "b is broken"), ("ä", "ä is broken")])
    skipped.note([("b", "b is broken")])
    complete = path.read_text(encoding="utf-8")
    assert [json.loads(line)["id"] for line in complete.splitlines()] == ["b", "ä"]
    path.write_text(complete + '{"id": "c", "err', encoding="utf-8")
    restarted = SkippedVideos(tmp_path, num_videos=4, max_share=0.5)
    assert path.read_text(encoding="utf-8") == complete
    # Failures of the earlier start do not count: the videos may have been restored since.
    restarted.note([("c", "c is broken"), ("b", "b is broken")])
    restarted.note([])
    with pytest.raises(InputError, match="3 of 4 training videos cannot be decoded"):
        restarted.note([("d", "d is broken")])
    listed = [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert listed == ["b", "ä", "c", "d"]


def test_a_run_stops_when_all_videos_fail(tmp_path):
    """Videos that are no longer in the list are not counted."""
    assert SkippedVideos(tmp_path, num_videos=4, max_share=0.0).summary() == ""
    skipped = SkippedVideos(tmp_path, num_videos=4, max_share=1.0, lost=["d"])
    skipped.note([("a", "a is broken"), ("b", "b is broken"), ("d", "d is gone")])
    assert skipped.summary().startswith("2 of 3 training videos could not be decoded and were")
    assert read_skipped(tmp_path) == {"a", "b", "d"}
    with pytest.raises(
        InputError, match="all 3 training videos cannot be decoded; they are listed"
    ):
        skipped.note([("c", "c is broken")])
    strict = SkippedVideos(tmp_path, num_videos=4, max_share=0.0, lost=["d"])
    strict.note([("d", "d is gone")])
    (tmp_path / "skipped.jsonl").write_text("[]\n")
    with pytest.raises(InputError, match="skipped.jsonl is damaged; delete it"):
        read_skipped(tmp_path)


def test_a_full_disk_is_reported_with_the_file(tmp_path, monkeypatch):
    skipped = SkippedVideos(tmp_path, num_videos=4, max_share=0.5)
    (tmp_path / "skipped.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match="skipped.jsonl cannot be written .No space left"):
        skipped.note([("b", "b is broken")])
    writer = MetricWriter(tmp_path, 0)

    def raise_disk_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer._files[1], "write_event", raise_disk_full)
    with pytest.raises(InputError, match="tensorboard/ cannot be written .No space left"):
        writer.write(1, {"loss": 1.0})
    writer.close()


def test_the_last_evaluation_is_read_even_after_a_kill(tmp_path):
    assert last_evaluation(tmp_path) == 0
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4, "val/top1": 1.0}\n{"step": 6, "train/loss": 1.0}\n{"step": 8, "v')
    assert last_evaluation(tmp_path) == 4


def test_tensorboard_events_contain_scalars_classes_and_clips(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(1, {"val/loss": None, "val/top1": 50.0})
    writer.write_classes(1, ["red", "blue"], np.array([50.0, np.nan]))
    writer.write_classes(1, [str(i) for i in range(60)], np.arange(60.0))
    writer.write_clips(1, np.zeros((2, 3, 8, 10, 3), np.uint8))
    writer.close()
    [events] = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    written = events.read_bytes()
    for tag in (b"val/top1", b"val_class_top1/red", b"val/class_top1", b"train/clips"):
        assert tag in written, tag
    for tag in (b"val/loss", b"val_class_top1/blue"):  # None and nan are not written
        assert tag not in written, tag
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["val/loss"] is None
