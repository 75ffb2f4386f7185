"""Videos of a list as columns."""

import pickle
from pathlib import Path

import pytest

from jaxvid.data.records import Record, VideoFiles, files_of, ids_of, labels_of

VIDEOS = VideoFiles(Path("/data"), ["a.mp4", "b.mp4", "c.mp4"], [2, 0, 1], ["x/a.mp4", "/b", "c"])


def test_records_are_made_from_the_columns():
    records = [Record(Path("/data/x/a.mp4"), 2), Record(Path("/b"), 0), Record(Path("/data/c"), 1)]
    assert list(VIDEOS) == records
    assert [record.id for record in VIDEOS] == list(ids_of(VIDEOS)) == ["a.mp4", "b.mp4", "c.mp4"]
    assert (VIDEOS[-1], len(VIDEOS)) == (records[2], 3)
    assert list(VIDEOS[1:]) == list(VIDEOS.select([1, 2])) == records[1:]
    assert list(VIDEOS[:0]) == []
    assert list(pickle.loads(pickle.dumps(VIDEOS))) == records
    with pytest.raises(IndexError):
        VIDEOS[3]


@pytest.mark.parametrize("videos", [VIDEOS, [*VIDEOS]])
def test_columns_of_tables_and_of_other_records_are_equal(videos):
    assert list(ids_of(videos)) == ["a.mp4", "b.mp4", "c.mp4"]
    assert list(labels_of(videos)) == [2, 0, 1]
    assert [*map(str, files_of(videos))] == ["/data/x/a.mp4", "/b", "/data/c"]


def test_other_labels_leave_the_videos_unchanged():
    videos = VIDEOS.with_labels([(0,), (1,), ()])
    assert [record.label for record in videos] == [(0,), (1,), ()]
    assert [record.path for record in videos] == [record.path for record in VIDEOS]
    assert VIDEOS.labels == [2, 0, 1]
    plain = VideoFiles(Path("/data"), ["a.mp4", "b.mp4"], [0, 1])
    assert [record.path for record in plain.select([1])] == [Path("/data/b.mp4")]
