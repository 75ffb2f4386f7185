"""Records that are read with the file of offsets equal those that array_record reads."""

import concurrent.futures
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jaxvid.data.formats import record_offsets
from jaxvid.data.formats.array_record_file import ArrayRecordFile
from jaxvid.data.formats.pack_reader import PackRecords
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.formats.record_offsets import (
    ROW,
    RecordOffsets,
    find_offsets,
    join_offsets,
    note_memory,
)
from jaxvid.data.prepare import prepare
from jaxvid.errors import InputError

SPLITS = ("train", "val")


def write(folder, records, options="group_size:1,uncompressed", *, files=2):
    """Write files, and the file of their offsets if they are as `prepare` writes them."""
    paths, parts = [folder / str(2 - files + i) for i in range(files)], []
    size = len(records) // files
    for i, path in enumerate(paths):
        writer = ArrayRecordWriter(str(path), options)
        for record in records[i * size : (i + 1) * size if i < files - 1 else None]:
            writer.write(record)
        writer.close()
        rows = find_offsets(path)
        if rows is not None:
            parts.append(path.with_suffix(".offsets"))
            parts[-1].write_bytes(rows.tobytes())
    join_offsets(parts, folder / "offsets.bin")
    return paths


@pytest.fixture
def no_array_record(monkeypatch):
    """Fail if array_record opens a file."""

    def fail(_):
        raise AssertionError("array_record was used")

    monkeypatch.setattr(ArrayRecordFile, "_reader", property(fail))


@pytest.mark.parametrize(("count", "max_size"), [(1, 10), (40, 30_000), (5, 400_000), (3000, 60)])
def test_records_equal_those_that_were_written(tmp_path, no_array_record, count, max_size):
    rng = np.random.default_rng(0)
    records = [rng.bytes(int(rng.integers(1, max_size))) for _ in range(count)]
    first, second = write(tmp_path, records)
    offsets = RecordOffsets.open(tmp_path / "offsets.bin", count)
    offsets = pickle.loads(pickle.dumps(offsets))
    half = count // 2
    file = ArrayRecordFile(str(first), offsets)
    assert [*file.read(range(half))] == records[:half]
    file = ArrayRecordFile(str(second), offsets, half)
    assert [*file.read(range(count - half))] == records[half:]
    assert [*file.read([0, count - half - 1])] == [records[half], records[-1]]


def try_read(file, position):
    """Return a record, or None if it is damaged."""
    try:
        return next(file.read([position]))
    except Exception:  # exceptions of array_record have no common base
        return None


@pytest.mark.parametrize(("name", "start", "num_damaged"), [("1", 100, 1), ("offsets.bin", 176, 0)])
def test_damage_is_found_and_leaves_other_records_readable(tmp_path, name, start, num_damaged):
    """Bytes of a data file, or of the rows of its records, are changed."""
    rng = np.random.default_rng(0)
    records = [rng.bytes(200) for _ in range(20)]
    _, path = write(tmp_path, records)
    intact = (tmp_path / name).read_bytes()
    for position in start + rng.integers(0, 10 * ROW.itemsize, 60):
        data = bytearray(intact)
        data[position] ^= 8
        (tmp_path / name).write_bytes(data)
        file = ArrayRecordFile(str(path), RecordOffsets.open(tmp_path / "offsets.bin", 20), 10)
        read = [try_read(file, i) for i in range(10)]
        assert all(a in (None, b) for a, b in zip(read, records[10:], strict=True))
        assert read.count(None) <= num_damaged


def test_truncated_files_are_found(tmp_path):
    records = [bytes([i]) * 200 for i in range(20)]
    _, path = write(tmp_path, records)
    path.write_bytes(path.read_bytes()[:400])
    file = ArrayRecordFile(str(path), RecordOffsets.open(tmp_path / "offsets.bin", 20), 10)
    assert [try_read(file, 0), try_read(file, 9)] == [records[10], None]


def test_files_of_other_writers_have_no_offsets(tmp_path):
    for options in ("group_size:1", "group_size:4,uncompressed"):
        write(tmp_path, [bytes(100)] * 40, options)
        assert find_offsets(tmp_path / "1") is None
    (tmp_path / "1").write_bytes((tmp_path / "1").read_bytes()[:1000])
    with pytest.raises(InputError, match="1: is damaged .*; delete it and run prepare again"):
        find_offsets(tmp_path / "1")


@pytest.fixture(scope="module")
def pack(motion_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack") / "pack"
    prepare([motion_folder], folder, Settings(frames_per_record=3, clips_per_file=20), workers=2)
    return folder


def frames_of(folder):
    return [
        video.open().get_frames([0, 5, 7]) for s in SPLITS for video in PackRecords(str(folder), s)
    ]


def test_packs_are_read_without_array_record(pack, no_array_record):
    assert len(frames_of(pack)) == 72


def test_packs_of_older_versions_are_read_and_get_offsets(pack, motion_folder, tmp_path, capsys):
    expected = {split: (pack / f"{split}_offsets.bin").read_bytes() for split in SPLITS}
    folder = shutil.copytree(pack, tmp_path / "pack")
    for path in [*folder.glob("*_offsets.bin"), *folder.glob(".parts/*.offsets")]:
        path.unlink()
    assert PackRecords(str(folder), "val").num_without_offset == 144
    np.testing.assert_array_equal(frames_of(folder), frames_of(pack))
    prepare([motion_folder], folder, Settings(frames_per_record=3, clips_per_file=20), workers=2)
    assert "reading 5 finished files for their offsets" in capsys.readouterr().err
    assert {split: (folder / f"{split}_offsets.bin").read_bytes() for split in SPLITS} == expected
    assert PackRecords(str(folder), "val").num_without_offset == 0


def test_offsets_of_another_pack_are_refused(pack, tmp_path):
    folder = shutil.copytree(pack, tmp_path / "pack")
    shutil.copy(folder / "train_offsets.bin", folder / "val_offsets.bin")
    with pytest.raises(InputError, match="val_offsets.bin: does not match the pack; delete it"):
        PackRecords(str(folder), "val")


def test_files_are_closed(pack):
    frames_of(pack)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        frames_of(pack)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_large_packs_without_offsets_are_noted(monkeypatch):
    assert note_memory("my_pack", 1000) == ()
    [line] = note_memory("my_pack", 72_000_000)
    assert line.startswith("my_pack: without SPLIT_offsets.bin, each process needs 576 MB")
    monkeypatch.setattr(record_offsets, "NOTED_MEGABYTES", 0)
    assert note_memory("my_pack", 1000)


def read_random_records(folder: Path, count: int) -> float:
    """Read records in a new process; return the growth of its memory in MB."""
    file = ArrayRecordFile(str(folder / "1"), RecordOffsets.open(folder / "offsets.bin", count))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    next(file.read([0]))
    before = resident()
    for i in np.random.default_rng(0).integers(0, count, 20_000):
        assert next(file.read([int(i)])) == b"%08d" % i
    return (resident() - before) / 1e6


@pytest.mark.full
def test_memory_does_not_depend_on_the_number_of_records(tmp_path):
    """array_record would need 8 MB for the positions."""
    count = 1_000_000
    write(tmp_path, [b"%08d" % i for i in range(count)], files=1)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        assert pool.submit(read_random_records, tmp_path, count).result(timeout=250) < 2
