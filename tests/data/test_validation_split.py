"""Division of the videos into training and validation, and checks of the splits."""

import dataclasses
import os
import unicodedata

import pytest

from jaxvid import progress
from jaxvid.data import check, prepare
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.records import Record
from jaxvid.data.sources import DatasetConfig, guess_source, has_validation, open_dataset
from jaxvid.data.split_checks import SAMPLE_BYTES, find_overlaps
from jaxvid.data.synthetic_motion import write_clip
from jaxvid.data.validation_split import ValidationSplit
from jaxvid.errors import InputError
from tests.data.test_sources import FRAMES, section, write


def make_records(names) -> list[Record]:
    return [Record(f"/data/{name}", 0, name) for name in names]


def ids(videos) -> set[str]:
    return {video.id for video in videos}


def divide(names, share=0.2, group="") -> dict[str, set[str]]:
    records, _ = ValidationSplit(share, group).divide(make_records(names), "list.csv")
    assert [r.id for r in records["train"]] == [n for n in names if n in ids(records["train"])]
    return {split: ids(videos) for split, videos in records.items()}


# ------------------------------------------------------------------ the hash


NAMES = [f"class {i % 3}/clip{i:03d}.mp4" for i in range(300)]


def test_the_split_is_the_same_on_every_machine():
    """The validation videos are those below 0.2 · 2^48 in the output of `b2sum -l 48`."""
    val = divide([f"{i}.mp4" for i in range(12)])["val"]
    assert val == {"2.mp4", "3.mp4", "5.mp4", "8.mp4"}


def test_adding_videos_does_not_move_others():
    before, after = divide(NAMES[:200]), divide(NAMES)
    assert before["val"] < after["val"]
    assert before["train"] < after["train"]
    assert 0.15 < len(after["val"]) / 300 < 0.25
    assert after["val"] < divide(NAMES, share=0.4)["val"]


def test_accented_names_are_equal_in_all_unicode_forms():
    names = [f"é{i}.mp4" for i in range(30)]
    decomposed = [unicodedata.normalize("NFD", name) for name in names]
    assert {unicodedata.normalize("NFC", n) for n in divide(decomposed)["val"]} == divide(names)[
        "val"
    ]
    divide([*names, os.fsdecode(b"caf\xe9.mp4")])  # names need not be UTF-8


@pytest.mark.parametrize("group", [r"_g\d+", r"_(g\d+)_", r"^\w+/v_\w+?_g(\d+)|never"])
def test_clips_of_a_group_stay_together(group):
    names = [
        f"{c}/v_{c}_g{g:02d}_c{i}.mp4" for c in ("run", "walk") for g in range(20) for i in "12"
    ]
    records, note = ValidationSplit(0.3, group).divide(make_records(names), "list.csv")
    groups = [{id_.split("_g")[1][:2] for id_ in ids(records[s])} for s in ("train", "val")]
    assert groups[0]
    assert groups[1]
    assert not groups[0] & groups[1]
    assert "of 80 videos in 20 groups for validation (" in note


@pytest.mark.parametrize(
    ("share", "group", "message"),
    [
        (1.0, "", "val_share=1.0: must be at least 0 and below 1"),
        (-0.1, "", "val_share=-0.1: must be"),
        (float("nan"), "", "val_share=nan: must be"),
        (0.0, "x", "group='x': has no effect without val_share"),
        (0.2, "(", r"group='\(': is not a regular expression: missing \)"),
        (0.2, r"_g\d", "group=.*: does not match 'a.mp4'; correct the expression"),
        (0.2, "mp4", "list.csv: with val_share=0.2, none of the 2 videos in 1 group is a val"),
        (0.001, "", "none of the 2 videos is a validation video"),
        (0.999, "", "none of the 2 videos is a training video"),
    ],
)
def test_impossible_splits_are_refused(share, group, message):
    with pytest.raises(InputError, match=message):
        divide(["a.mp4", "b.mp4"], share, group)


# ------------------------------------------------------------------ data sources


@pytest.fixture
def flat(tmp_path):
    """A folder with `run/*.mp4` and `walk/*.mp4`, ten videos each, and an empty folder `jump`."""
    for i in range(10):
        write(tmp_path / "videos" / "run" / f"{i}.mp4", f"run {i}")
        write(tmp_path / "videos" / "walk" / f"{i}.mp4", f"walk {i}")
    (tmp_path / "videos" / "jump").mkdir()
    return tmp_path / "videos"


def test_flat_class_folders(flat):
    assert guess_source(flat) == ("class_folders", 3)
    assert not has_validation(flat, "class_folders")
    data = dataclasses.replace(section("class_folders", flat), val_share=0.3)
    both = open_dataset(data, 3, ("train", "val"))
    assert both.labels == ["jump", "run", "walk"]
    parts = [ids(both.records[split]) for split in ("train", "val")]
    assert (len(parts[0] | parts[1]), parts[0] & parts[1]) == (20, set())
    assert both.notes == (
        f"{flat}: val_share=0.3 selects {len(parts[1])} of 20 videos for validation "
        f"({5 * len(parts[1])}.0 %)",
        "1 of 3 classes have no training videos: jump",
        "1 of 3 classes have no validation videos: jump",
    )
    only_val = open_dataset(data, 3, ("val",)).records["val"]  # as in an evaluation
    assert ids(only_val) == parts[1]
    # The same files in a folder `train` without `val` are divided in the same way.
    flat.rename(flat.with_name("train"))
    data = dataclasses.replace(data, folder=str(flat.parent))
    assert ids(open_dataset(data, 3, ("val",)).records["val"]) == parts[1]
    (flat.parent / "val").mkdir()
    with pytest.raises(InputError, match="data.val_share=0.3: .*val has the validation videos alr"):
        open_dataset(data, 3, ("train", "val"))


def test_a_single_list_is_divided(flat):
    lines = "".join(f"{c}/{i}.mp4,{c}\n" for c in ("run", "walk") for i in range(10))
    write(flat / "train.csv", f"path,label\n{lines}")
    data = section("folder", flat)
    with pytest.raises(InputError, match="val.csv does not exist; a data folder has .*val_share"):
        open_dataset(data, 2, ("train", "val"))
    data = dataclasses.replace(data, val_share=0.3)
    records = open_dataset(data, 2, ("train", "val")).records
    assert len(records["train"]) + len(records["val"]) == 20
    write(flat / "val.csv", "run/0.mp4,run\n")
    with pytest.raises(InputError, match="val.csv has the validation videos already"):
        open_dataset(data, 2, ("train", "val"))


def test_a_folder_and_a_list(flat, tmp_path, monkeypatch):
    lines = "".join(f"{c}/{i}.mp4,{c}\n" for c in ("run", "walk") for i in range(10))
    path = write(tmp_path / "lists" / "all.csv", lines)
    data = dataclasses.replace(section("folder", flat), list=str(path))
    with pytest.raises(InputError, match="all.csv: the videos are not divided into training and"):
        open_dataset(data, 2, ("train", "val"))
    assert len(open_dataset(data, 2, ("val",)).records["val"]) == 20
    data = dataclasses.replace(data, val_share=0.3)
    dataset = open_dataset(data, 2, ("train", "val"))
    assert dataset.labels == ["run", "walk"]
    assert dataset.records["val"][0].path.parent.parent == flat
    write(tmp_path / "lists" / "labels.txt", "walk\nrun\n")
    assert open_dataset(data, 2, ("train", "val")).labels == ["walk", "run"]
    write(flat / "labels.txt", "run\nwalk\n")
    assert open_dataset(data, 2, ("train", "val")).labels == ["run", "walk"]
    assert guess_source(path) == ("folder", 2)
    assert not has_validation(path, "folder")
    path.rename(flat / "all.csv")
    with pytest.raises(InputError, match="all.csv does not exist; correct --config.data.list"):
        open_dataset(data, 2, ("train", "val"))
    with pytest.raises(InputError, match="all.csv does not exist; did you mean .*videos/all.csv"):
        open_dataset(dataclasses.replace(data, list="all.csv"), 2, ("train", "val"))


def test_fields_that_do_not_apply_to_the_source_are_refused():
    for fields, message in (
        ({"source": "pack", "val_share": 0.2}, "data.val_share=0.2: needs data.source='folder' or"),
        ({"source": "class_folders", "list": "x"}, "data.list=x: needs data.source='folder'"),
        ({"source": "folder", "group": "x"}, "group='x': has no effect without val_share"),
    ):
        with pytest.raises(InputError, match=message):
            DatasetConfig(folder="data", **fields)


@pytest.mark.parametrize("name", ["a file", "nothing"])
def test_unusable_data_folders_are_refused(tmp_path, name):
    write(tmp_path / "a file")
    message = f"{name} is not a folder|{name} does not exist; choose an existing"
    for source in ("folder", "class_folders", "pack", "xvit_h5"):
        with pytest.raises(InputError, match=message):
            open_dataset(section(source, tmp_path / name), 2, ("train", "val"))
    if name == "nothing":
        for call in (guess_source, lambda path: check.gather([path])):
            with pytest.raises(InputError, match="nothing does not exist; choose"):
                call(tmp_path / name)


def test_prepare_divides_the_videos(tmp_path):
    for i in range(6):
        (tmp_path / "in" / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        write_clip(tmp_path / "in" / f"class {i % 2}" / f"{i // 2}.mp4", FRAMES)
    split = ValidationSplit(0.4)
    prepare.prepare([tmp_path / "in"], tmp_path / "pack", Settings(), workers=1, split=split)
    pack = open_dataset(section("pack", tmp_path / "pack"), 2, ("train", "val"))
    data = dataclasses.replace(section("class_folders", tmp_path / "in"), val_share=0.4)
    expected = open_dataset(data, 2, ("train", "val"))
    for name in ("train", "val"):
        assert ids(pack.records[name]) == ids(expected.records[name])
    for name in ("train", "val"):
        write(tmp_path / "lists" / f"{name}.csv", f"{name}.mp4 0\n")
    with pytest.raises(InputError, match="--val_share 0.4: the input has the splits train, val al"):
        prepare.prepare([tmp_path / "lists"], tmp_path / "p", Settings(), workers=1, split=split)


# ------------------------------------------------------------------ overlaps


def test_videos_in_both_splits_are_found(tmp_path, capsys, monkeypatch):
    big = "x" * (3 * SAMPLE_BYTES)
    files = {"train/a/same.mp4": "1", "train/a/copy.mp4": big, "train/a/head.mp4": big + "1"}
    files |= {"val/a/copied.mp4": big, "val/a/tail.mp4": big + "2", "val/a/other.mp4": "2"}
    for name, text in files.items():
        write(tmp_path / name, text)
    (tmp_path / "val/a/linked.mp4").symlink_to(tmp_path / "train/a/same.mp4")
    data = open_dataset(section("class_folders", tmp_path), 1, ("train", "val"))
    same_files, copies = find_overlaps(data.records)
    train, val = tmp_path / "train" / "a", tmp_path / "val" / "a"
    start = "1 of 4 validation videos are also training videos"
    end = "remove them from one of the splits"
    assert same_files == [f"{start}: {val}/linked.mp4 is the same file as {train}/same.mp4; {end}"]
    assert copies == [f"{start}: {val}/copied.mp4 is a copy of {train}/copy.mp4; {end}"]
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    assert check.check([tmp_path], workers=1)["overlaps"] == same_files + copies
    lines = capsys.readouterr().err
    assert lines.count("overlap: 1 of 4 validation") == 2
    assert "comparing file sizes: 7/7 files, " in lines
    assert "comparing files of the same size: 7/7 files, " in lines
