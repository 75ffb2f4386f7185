"""Labels with several classes."""

import numpy as np
import pytest

from jaxvid.data.label_sets import LabelSet, count_classes
from jaxvid.data.video_lists import read_list, read_names
from jaxvid.errors import InputError


def test_lists_may_have_several_classes(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.mp4").write_text("x")
    (tmp_path / "list.csv").write_text("path,label\na.mp4,3;1\nb.mp4 2\nc.mp4,;\nd.mp4 0;0;\n")
    records = read_list(tmp_path / "list.csv", 4)
    assert [record.label for record in records] == [(1, 3), 2, (), (0,)]
    sets = [LabelSet.make(record.label, 4) for record in records]
    rows = [[0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_array_equal([np.asarray(labels) for labels in sets], rows)
    assert [*map(str, sets)] == ["1;3", "2", "", "0"]
    assert count_classes(sets, 4).tolist() == [1, 1, 1, 1]
    with pytest.raises(InputError, match="list.csv:2: label 3 is out of range: with 3 classes"):
        read_list(tmp_path / "list.csv", 3)
    (tmp_path / "list.csv").write_text("a.mp4 1;x\n")
    with pytest.raises(InputError, match="list.csv:1: 'a.mp4 1;x' is not 'path label'"):
        read_list(tmp_path / "list.csv", 3)


def test_lists_may_have_several_class_names(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.mp4").write_text("x")
    path = tmp_path / "list.csv"
    path.write_text("a.mp4,;\nb.mp4,running; jumping high\nc.mp4,running\n")
    names = read_names([path])
    assert names == ["jumping high", "running"]
    records = read_list(path, 2, labels=names)
    assert [record.label for record in records] == [(), (0, 1), 1]
    path.write_text("a.mp4,;\nb.mp4,running;jumping\nc.mp4,3;1\n")
    with pytest.raises(
        InputError, match="list.csv:3: has the index 1, but line 2 has the class na"
    ):
        read_names([path])
