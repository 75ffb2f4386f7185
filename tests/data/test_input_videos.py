"""Videos that a command line names."""

from pathlib import Path

import pytest

from jaxvid.data.input_videos import open_input
from jaxvid.data.records import NO_LABEL
from jaxvid.errors import InputError


def write(folder: Path, *names: str) -> Path:
    """Write empty files; return the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def ids(opened) -> list[str]:
    return [record.id for record in opened.records]


def labels(opened) -> list[int]:
    return [record.label for record in opened.records]


def test_folders_directly_above_all_videos_are_classes(tmp_path):
    opened = open_input(write(tmp_path, "b/2.mp4", "a/1.mp4", "a/notes.txt"))
    assert (opened.kind, opened.labels) == ("class folders", ["a", "b"])
    assert (ids(opened), labels(opened)) == (["a/1.mp4", "b/2.mp4"], [0, 1])


@pytest.mark.parametrize("names", [["1.mp4", "2.mkv"], ["1.mp4", "a/2.mp4"], ["x/a/1.mp4"]])
def test_videos_of_other_folders_have_no_labels(tmp_path, names):
    opened = open_input(write(tmp_path, *names))
    assert (opened.kind, opened.labels) == ("folder", [])
    assert (ids(opened), {*labels(opened)}) == (names, {NO_LABEL})
    assert all(record.path.exists() for record in opened.records)


def test_a_split_must_be_chosen_if_there_are_several(tmp_path):
    write(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "val/b/3.mp4")
    with pytest.raises(InputError, match="has the splits train, val; choose one, e.g. --split tr"):
        open_input(tmp_path)
    with pytest.raises(InputError, match="--split test was not found; the input has only train, v"):
        open_input(tmp_path, "test")
    opened = open_input(tmp_path, "val")
    assert (ids(opened), labels(opened), opened.labels) == (["b/3.mp4"], [1], ["a", "b"])


def test_lists_may_have_names_numbers_or_no_labels(tmp_path):
    write(tmp_path, "videos/1.mp4")
    texts = {
        "names.csv": ("path,class\n1.mp4,walk\n2.mp4,run\n", [1, 0], ["run", "walk"]),
        "numbers.txt": ("1.mp4 0\n2.mp4 2\n", [0, 2], ["0", "1", "2"]),
        "none.txt": ("1.mp4\n2.mp4\n", [NO_LABEL, NO_LABEL], []),
        "test.csv": ("youtube_id,time_start,time_end\nabc,1,2\n", [NO_LABEL], []),
    }
    for name, (text, expected, names) in texts.items():
        (tmp_path / name).write_text(text)
        opened = open_input(tmp_path / name, prefix=str(tmp_path / "videos"))
        assert (opened.kind, labels(opened), opened.labels) == ("list", expected, names), name
        assert opened.records[0].path.is_relative_to(tmp_path / "videos")
    (tmp_path / "labels.txt").write_text("x\ny\nz\n")
    assert open_input(tmp_path / "numbers.txt").labels == ["x", "y", "z"]
    assert open_input(tmp_path / "none.txt").labels == []


def test_a_data_folder_with_lists_and_a_video_file(motion_folder):
    opened = open_input(motion_folder, "val")
    assert (opened.kind, len(opened.records), len(opened.labels)) == ("list", 24, 8)
    one = open_input(opened.records[0].path)
    assert (one.kind, labels(one), ids(one)) == ("video file", [NO_LABEL], ["00000.mp4"])


def test_missing_and_empty_inputs_are_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist; choose a folder, a list or a"):
        open_input(tmp_path / "nowhere")
    with pytest.raises(InputError, match="contains no videos"):
        open_input(tmp_path)
