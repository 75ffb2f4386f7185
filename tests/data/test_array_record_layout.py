"""Tests of jaxvid/data/formats/array_record_layout.py against files of array_record."""

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from jaxvid.data.formats.array_record_layout import BLOCK, read_layout

READER = {"options": "readahead_buffer_size:0,max_parallelism:0", "file_reader_buffer_size": 2**15}


def write(path, records, options="group_size:1,uncompressed"):
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return path.read_bytes()


def layout_of(data):
    return read_layout(lambda start, stop: data[start:stop], len(data))


@pytest.mark.parametrize(
    ("count", "max_size", "group_size"),
    [(1, 10, 1), (200, 30_000, 1), (3, 400_000, 1), (5000, 100, 1), (50, 2000, 4)],
)
def test_a_record_is_readable_from_its_range_and_the_footers(tmp_path, count, max_size, group_size):
    rng = np.random.default_rng(0)
    records = [rng.bytes(int(rng.integers(1, max_size))) for _ in range(count)]
    data = write(tmp_path / "a", records, f"group_size:{group_size},uncompressed")
    layout = layout_of(data)
    assert layout.group_size == group_size
    sparse = tmp_path / "sparse"
    for i in {0, count // 2, count - 1}:
        part = bytearray(len(data))
        for start, stop in (layout.range_of(i), (layout.tail, len(data))):
            part[start:stop] = data[start:stop]
        sparse.write_bytes(part)
        assert ArrayRecordReader(str(sparse), **READER).read(i, i + 1) == [records[i]]


def test_other_files_have_no_layout(tmp_path):
    records = [bytes(100)] * 10
    data = write(tmp_path / "a", records)
    assert layout_of(write(tmp_path / "b", records, "group_size:1")) is None  # compressed
    assert layout_of(b"") is None
    assert layout_of(bytes(2 * BLOCK)) is None
    assert layout_of(data[:-BLOCK]) is None
    rng = np.random.default_rng(0)
    for _ in range(300):  # damage: no exception other than those that mean "unknown"
        broken = bytearray(data)
        for i in rng.integers(0, 200, 3):
            start = len(data) - BLOCK if rng.random() < 0.5 else int(layout_of(data).offsets[-1])
            broken[start + i] = rng.integers(256)
        layout = layout_of(bytes(broken))
        assert layout is None or len(layout.offsets) <= 200
