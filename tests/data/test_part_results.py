"""`check`: results of finished parts are stored and used again."""

import json
import os
import sys
import time

import pytest

from jaxvid.data import check as check_module
from jaxvid.data import part_results
from jaxvid.data.check import check, main
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


class Killed(BaseException):
    """Raised instead of killing the process."""


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Return a function that runs `jaxvid check` with `--json`, and its exit code; 3: broken."""
    monkeypatch.setenv("JAXVID_CACHE", str(tmp_path / "cache"))
    arguments = [str(folder), "--json", str(tmp_path / "out.json"), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["check", *arguments])

    def run_main():
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code

    return run_main


def interrupt(run, monkeypatch, at):
    """Run the check until it reads the video with this number."""
    read_video, numbers = check_module.examine, iter(range(100))

    def examine(*arguments):
        if next(numbers) == at:
            raise Killed
        return read_video(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(check_module, "examine", examine)
        with pytest.raises(Killed):
            run()


def test_an_interrupted_check_continues(folder, tmp_path, run, read, monkeypatch, capsys):
    expected = without_times(check([folder], 1))
    del read[:]
    interrupt(run, monkeypatch, 7)
    assert not (tmp_path / "out.json").exists()
    assert run() == 3
    assert read[7:] == [f"val/{i:05d}.mp4" for i in (6, 7)]
    error = capsys.readouterr().err
    assert f"continuing the interrupted check in {tmp_path / 'cache'}" in error
    assert "2 of 3 parts are complete" in error
    assert without_times(json.loads((tmp_path / "out.json").read_text())) == expected
    assert not any((tmp_path / "cache" / "check").iterdir())
    assert run() == 3  # reads all videos again
    assert len(read) == 17


def test_changed_videos_and_lists_are_read_again(folder, run, read, monkeypatch):
    interrupt(run, monkeypatch, 7)
    video = folder / "val" / "00004.mp4"
    data = video.read_bytes()
    video.unlink()
    video.write_bytes(data)  # the same size, but a later time
    os.utime(video, (time.time() + 5,) * 2)
    assert run() == 3
    assert read[7:] == [f"val/{i:05d}.mp4" for i in (3, 4, 5, 6, 7)]
    interrupt(run, monkeypatch, 7)
    lines = (folder / "val.csv").read_text()
    (folder / "val.csv").write_text(lines.replace("val/00000.mp4 0\n", ""))
    del read[:]
    assert run() == 3
    assert len(read) == 7


def test_results_of_long_ago_are_removed(tmp_path, run, read):
    for age, name in ((31, "old"), (29, "new")):
        (tmp_path / "cache" / "check" / name).mkdir(parents=True)
        os.utime(tmp_path / "cache" / "check" / name, (time.time() - age * 86_400,) * 2)
    assert run() == 3
    assert os.listdir(tmp_path / "cache" / "check") == ["new"]


@pytest.mark.parametrize("problem", ["cache", "lock"])
def test_a_check_that_cannot_store_results_runs(folder, tmp_path, run, read, capsys, problem):
    if problem == "cache":
        (tmp_path / "cache").write_text("a file")
        assert run() == 3
    else:
        videos, _ = check_module.list_videos([folder], "")
        with part_results.open_folder(None, videos):
            assert run() == 3
    message = "results are not stored, so an interrupted check starts over"
    assert message in capsys.readouterr().err
    assert len(read) == 8
    assert json.loads((tmp_path / "out.json").read_text())["videos"] == 8


def test_results_remain_if_the_report_cannot_be_written(run, read, monkeypatch):
    def write(*_):
        raise InputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(check_module, "write_json", write)
        assert run() == 2
    assert run() == 3
    assert len(read) == 8
