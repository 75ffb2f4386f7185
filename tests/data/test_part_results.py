"""`check --state`: results of finished parts are stored and used again."""

import os

import pytest

from jaxvid.data import check as check_module
from jaxvid.data import part_results
from jaxvid.data.check import check
from jaxvid.errors import InputError


@pytest.fixture
def folder(motion_folder, tmp_path):
    """A list of eight videos, of which the second is empty."""
    videos = sorted((motion_folder / "val").glob("*.mp4"))[:8]
    for path in videos:
        (tmp_path / "data" / "val").mkdir(parents=True, exist_ok=True)
        os.link(path, tmp_path / "data" / "val" / path.name)
    second = tmp_path / "data" / "val" / videos[1].name
    second.unlink()
    second.write_bytes(b"")
    lines = "".join(f"val/{path.name} 0\n" for path in videos)
    (tmp_path / "data" / "val.csv").write_text(lines)
    return tmp_path / "data"


@pytest.fixture
def read(monkeypatch):
    """Return the ids of the videos that `check` reads; parts have three videos."""
    ids, examine = [], check_module.examine

    def log_and_examine(record, *arguments):
        ids.append(record.id)
        return examine(record, *arguments)

    monkeypatch.setattr(check_module, "examine", log_and_examine)
    monkeypatch.setattr(part_results, "PART_VIDEOS", 3)
    return ids


def without_times(report):
    return {name: value for name, value in report.items() if name != "seconds"}


def test_finished_parts_are_not_read_again(folder, tmp_path, read, capsys):
    expected = without_times(check([folder], 1))
    state = tmp_path / "state"
    assert without_times(check([folder], 1, state=state)) == expected
    assert len(read) == 16
    (state / "part-000001.json").write_text("[")  # damaged
    (state / "part-000002.json").unlink()
    assert without_times(check([folder], 1, state=state)) == expected
    assert read[16:] == [f"val/{i:05d}.mp4" for i in (3, 4, 5, 6, 7)]
    assert "1 of 3 parts are complete" in capsys.readouterr().err


def test_repaired_videos_are_read_again(folder, tmp_path, read):
    assert len(check([folder], 1, state=tmp_path / "state")["broken"]) == 1
    (folder / "val" / "00001.mp4").write_bytes((folder / "val" / "00002.mp4").read_bytes())
    report = check([folder], 1, state=tmp_path / "state")
    assert (report["broken"], report["readable"]) == ([], 8)
    assert len(read) == 11


def test_folders_with_other_contents_are_refused(folder, tmp_path):
    check([folder], 1, state=tmp_path / "state")
    (folder / "val.csv").write_text("val/00000.mp4 0\n")
    with pytest.raises(InputError, match="state: has the results of other videos; choose another"):
        check([folder], 1, state=tmp_path / "state")
    with pytest.raises(InputError, match="data: is not an empty folder; choose another"):
        check([folder], 1, state=folder)
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match="file: is not an empty folder|file: cannot be used"):
        check([folder], 1, state=tmp_path / "file")
