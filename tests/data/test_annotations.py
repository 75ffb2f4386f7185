"""Annotation lists: all supported formats, and the errors for invalid lists."""

import json
import os
from pathlib import Path

import pytest

from jaxvid.data import check, file_checks
from jaxvid.data.annotations import (
    find_split,
    read_class_folders,
    read_records,
    read_split,
)
from jaxvid.data.class_names import read_labels
from jaxvid.data.folder_scan import Skipped
from jaxvid.data.records import NO_LABEL
from jaxvid.data.sources import open_dataset
from jaxvid.data.synthetic_motion import write_clip
from jaxvid.data.video_lists import read_list
from jaxvid.errors import InputError
from tests.data.test_sources import FRAMES, section, write

KINETICS_HEADER = "label,youtube_id,time_start,time_end,split\n"
SOMETHING_ENTRY = {"id": "7", "label": "holding a cup", "template": "Holding [something]"}


def read(folder: Path, split: str) -> list[tuple[str, int]]:
    """Return the path, relative to the folder, and the label of each video of a split."""
    records = read_split(folder, split, read_labels(folder)[0], "", "error")
    return [(str(record.path.relative_to(folder)), record.label) for record in records]


@pytest.mark.parametrize(
    "text",
    [
        '"a.mp4","0"\n"b c.mp4","1"\n',
        '"path","label"\na.mp4,0\nb c.mp4,1\n',
        "\nPath , Label\r\na.mp4 , 0\r\nb c.mp4 , 1\r\n",
    ],
)
def test_quotes_and_blank_lines_in_lists(tmp_path, text):
    for name in ("a.mp4", "b c.mp4"):
        write(tmp_path / name)
    records = read_list(write(tmp_path / "list.csv", text), 2)
    assert [(record.id, record.label) for record in records] == [("a.mp4", 0), ("b c.mp4", 1)]


@pytest.mark.parametrize("label", ["9" * 5000, "1000000"])
def test_labels_out_of_range_are_refused(tmp_path, label):
    with pytest.raises(InputError, match="list.csv:1: .* is not 'path label'"):
        read_list(write(tmp_path / "list.csv", f"a.mp4 {label}\n"), None, missing="keep")


def test_a_null_character_in_a_path_is_refused(tmp_path):
    with pytest.raises(InputError, match="list.csv:1: .* cannot be read .*null"):
        read_list(write(tmp_path / "list.csv", "a\0.mp4 0\n"), 1)


@pytest.mark.parametrize(
    "text",
    [
        KINETICS_HEADER + "zumba,é_a,1,11,train\n",
        "\ufeff" + KINETICS_HEADER.replace("\n", "\r\n") + "zumba,é_a,1,11,train\r\n\r\n",
        "label, youtube_id, time_start, time_end, split\nzumba, é_a, 1, 11, train\n",
        '"label","youtube_id","time_start","time_end","split","is_cc"\n"zumba","é_a",1,11,"train",0\n',
    ],
)
def test_kinetics_list_formats(tmp_path, text):
    write(tmp_path / "train.csv", text)
    write(tmp_path / "train" / "é_a_000001_000011.mp4")
    assert read(tmp_path, "train") == [("train/é_a_000001_000011.mp4", 0)]


def test_kinetics_validation_list_names(tmp_path):
    write(tmp_path / "validate.csv", KINETICS_HEADER + "zumba,a,1,11,validate\n")
    write(tmp_path / "validate" / "a_000001_000011.mp4")
    assert read(tmp_path, "val") == [("validate/a_000001_000011.mp4", 0)]
    records, labels = check.gather([tmp_path])
    assert (list(records), labels) == (["val"], ["zumba"])
    assert list(check.gather([tmp_path / "validate.csv"])[0]) == ["val"]


def test_incomplete_kinetics_rows_are_refused_with_the_line_number(tmp_path):
    write(tmp_path / "train.csv", KINETICS_HEADER + "zumba,a,1,11,train\n\nzumba,b\n")
    with pytest.raises(InputError, match="train.csv:4: time_start and time_end are not"):
        read(tmp_path, "train")


@pytest.mark.parametrize("name", ["train.json", "something-something-v2-train.json"])
@pytest.mark.parametrize("template", ["Holding something", "Holding [something]"])
def test_something_something_list_names(tmp_path, name, template):
    write(tmp_path / "labels.json", json.dumps({template: "0"}))
    write(tmp_path / name, "\ufeff" + json.dumps([SOMETHING_ENTRY], indent=1).replace("\n", "\r\n"))
    write(tmp_path / "20bn-something-something-v2" / "7.webm")
    assert read(tmp_path, "train") == [("20bn-something-something-v2/7.webm", 0)]
    for path in (tmp_path, tmp_path / name):  # the folder is not read as class folders
        records, labels = check.gather([path])
        assert labels == [template]
        assert [record.id for record in records["train"]] == ["7"]


def test_deeply_nested_json_is_refused(tmp_path):
    write(tmp_path / "train.json", "[" * 100_000)
    write(tmp_path / "labels.json", "[" * 100_000)
    with pytest.raises(InputError, match="labels.json: must be a list of names"):
        read_labels(tmp_path)
    with pytest.raises(InputError, match="train.json: is not a list of entries"):
        read_split(tmp_path, "train", ["x"], "", "error")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels.json", '["x", "x"]', "labels.json: 'x' occurs more than once"),
        ("labels.json", '{"x": 0, "y": 1.5}', "labels.json: must be a list of names"),
        ("labels.txt", "x\n\ny\n", "labels.txt: class 1 has no name"),
    ],
)
def test_invalid_class_names_are_refused(tmp_path, name, text, message):
    write(tmp_path / name, text)
    with pytest.raises(InputError, match=message):
        read_labels(tmp_path)


def test_labels_json_orders_class_folders(tmp_path):
    for name in ("a/1.mp4", "b/2.mp4"):
        write(tmp_path / name)
    write(tmp_path / "labels.json", '["b", "a"]')
    labels, records = read_class_folders(tmp_path, ("val",))
    assert labels == ["b", "a"]
    assert [(record.id, record.label) for record in records["val"]] == [
        ("a/1.mp4", 1),
        ("b/2.mp4", 0),
    ]


# ------------------------------------------------------------------ lists without labels

UNLABELLED = {
    "paths": ("test.csv", "a b.mp4\n\nc.mp4\n", ["a b.mp4", "c.mp4"]),
    "kinetics": (
        "test.csv",
        "youtube_id,time_start,time_end,split\na,1,11,test\n",
        ["test/a_000001_000011.mp4"],
    ),
    "something": ("test.json", '[{"id": "7"}]', ["7.mp4"]),
}


@pytest.mark.parametrize("kind", UNLABELLED)
def test_only_check_accepts_lists_without_labels(tmp_path, kind):
    name, text, videos = UNLABELLED[kind]
    write(tmp_path / name, text)
    for video in videos:
        (tmp_path / video).parent.mkdir(exist_ok=True)
        write_clip(tmp_path / video, FRAMES)
    report = check.check([tmp_path], workers=1)
    assert (report["videos"], report["broken"]) == (len(videos), [])
    [records] = check.gather([tmp_path], labelled=False)[0].values()
    assert {record.label for record in records} == {NO_LABEL}
    message = "is not 'path label'" if kind == "paths" else "has no label.*; remove the list"
    for labels in ("", "x\n"):
        if labels:
            write(tmp_path / "labels.txt", labels)
        with pytest.raises(InputError, match=f"{name}:?1?.*{message}") as error:
            check.gather([tmp_path])
        assert "\n" not in str(error.value)


def test_a_test_list_without_labels_does_not_affect_other_splits(tmp_path):
    write(tmp_path / "train.csv", KINETICS_HEADER + "zumba,a,1,11,train\n")
    write(tmp_path / "train" / "a_000001_000011.mp4")
    write(tmp_path / "test.csv", "youtube_id,time_start,time_end,split\nb,1,11,test\n")
    assert read(tmp_path, "train") == [("train/a_000001_000011.mp4", 0)]
    assert find_split(tmp_path, "val") == tmp_path / "val.csv"
    records, _ = check.gather([tmp_path], labelled=False)
    assert [len(records[split]) for split in ("train", "test")] == [1, 1]


def test_lists_with_some_labels_need_all_labels(tmp_path):
    write(tmp_path / "test.csv", "a.mp4\nb.mp4 0\n")
    with pytest.raises(InputError, match="test.csv:1: 'a.mp4' is not 'path label'"):
        check.check([tmp_path], workers=1)


# ------------------------------------------------------------------ invalid lists


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 0\n" + "x" * 200_000 + ",1\n", "list.csv:2: the line has 200002 characters"),
        ('a.mp4 0\n"' + "x" * 200_000 + '",1\n', "list.csv:2: the line has 200004 characters"),
        (
            KINETICS_HEADER + "zumba,a,1,2,train\n" + "x" * 140_000 + ",b,1,2,train\n",
            "list.csv:3: the line",
        ),
        (KINETICS_HEADER + '"' + "x\n" * 140_000, "list.csv:.*: is not valid CSV: field larger"),
        # Splitting a line of many separators must not take cubic time.
        ("a.mp4" + " " * 9000 + "\n", "list.csv:1: .* is not 'path label'"),
        ("x" + "a" * 2**20, "list.csv: the first line has over 1048576 bytes"),
        ("clips\\a.mp4,0\n", r"list.csv:1: .*does not exist \(separate folders with /\); restore"),
    ],
)
def test_invalid_lines_are_refused_with_the_line_number(tmp_path, text, message):
    write(tmp_path / "a.mp4")
    path = write(tmp_path / "list.csv", text)
    with pytest.raises(InputError, match=message) as error:
        read_records(path, ["zumba"], prefix="", missing="error")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a.mp4 0\n".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("a.mp4 0\n".encode("utf-16-be"), "not text: it contains null bytes"),
        (bytes(1000), "not text: it contains null bytes"),
    ],
)
def test_files_that_are_not_utf8_text_are_refused(tmp_path, data, message):
    (tmp_path / "list.csv").write_bytes(data)
    with pytest.raises(InputError, match=f"list.csv: cannot be read: {message}"):
        read_list(tmp_path / "list.csv", 1)


def test_file_names_need_not_be_utf8_but_class_names_must(tmp_path):
    name = os.fsdecode(b"caf\xe9, 1.mp4")
    write(tmp_path / name)
    (tmp_path / "list.csv").write_bytes(b"caf\xe9, 1.mp4 0\n")
    [record] = read_list(tmp_path / "list.csv", 1)
    assert (record.id, record.path) == (name, tmp_path / name)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"list.csv:1: .*/caf\\udce9, 1.mp4 does not exist"):
        read_list(tmp_path / "list.csv", 1)
    (tmp_path / "labels.txt").write_bytes(b"a\nb\xe9\n")
    with pytest.raises(InputError, match="labels.txt:2: cannot be read: not UTF-8"):
        read_labels(tmp_path)


@pytest.mark.parametrize("name", ["train.csv", "labels.txt", "labels.json", "train.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link"])
def test_lists_that_are_not_regular_files_are_refused_without_blocking(tmp_path, name, kind):
    path = tmp_path / name
    {
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "folder": Path.mkdir,
        "link": lambda path: path.symlink_to("nowhere"),
    }[kind](path)
    reason = "does not exist" if kind == "link" else f"is a {kind}, not a regular file"
    with pytest.raises(InputError, match=f"{name}:? {reason}"):
        read_labels(tmp_path) if "labels" in name else check.gather([tmp_path])
    if "train" in name and kind != "folder":
        with pytest.raises(InputError, match=f"{name}:? {reason}"):
            check.gather([path])


def test_reading_stops_after_too_many_missing_files(tmp_path, monkeypatch):
    lines = "".join(f"clips/{i}.mp4 0\n" for i in range(50_000))
    checked = []

    def report_missing(path):
        checked.append(path)
        return "does not exist"

    monkeypatch.setattr(file_checks, "file_state", report_missing)
    with pytest.raises(InputError, match="list.csv:1: .*; and 15995 more .the rest of the list"):
        read_list(write(tmp_path / "list.csv", lines), 1)
    assert len(checked) == file_checks.CHECK_FILES


def test_kinetics_folders_are_listed_once(tmp_path, monkeypatch):
    rows = "".join(f"zumba,{i},1,11,train\n" for i in range(50))
    write(tmp_path / "train.csv", KINETICS_HEADER + rows)
    for i in range(50):
        write(tmp_path / "train" / "zumba" / f"{i}_000001_000011.mp4")
    listed, listdir = [], os.listdir

    def log_and_list(path):
        listed.append(path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", log_and_list)
    monkeypatch.setattr(os.path, "exists", None)  # looking up a single file would raise a TypeError
    assert len(read(tmp_path, "train")) == 50
    # train, train/zumba, the folder itself and zumba
    assert len(listed) == len(set(listed)) == 4


def test_class_folder_scans_count_skipped_files(tmp_path):
    names = ("a/1.mp4", "a/2.GIF", "a/3.ts", "a/notes.txt", "a/x.json", "a/README", "a/.hid.mp4")
    for name in (*names, "a/sub/4.mp4", ".git/5.mp4", "readme.md", "labels.txt"):
        write(tmp_path / name, "a" if name == "labels.txt" else "x")
    (tmp_path / "a" / "gone.mp4").symlink_to("nowhere")
    (tmp_path / "a" / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(tmp_path / "a" / "pipe.mp4")
    skipped = Skipped()
    _, records = read_class_folders(tmp_path, ("train",), skipped)
    assert [record.id for record in records["train"]] == ["a/1.mp4", "a/2.GIF", "a/3.ts"]
    summary = str(skipped)
    for part in (
        "3 files without a video suffix (.json 1, .txt 1, no suffix 1)",
        "3 broken links or not regular files",
        "2 hidden",
        "1 sub-folder",
        "1 file beside the class folders",
    ):
        assert part in summary
    data = section("class_folders", tmp_path)
    [note] = open_dataset(data, 1, ("train",)).notes
    assert note == f"{tmp_path}: skipped {summary}"


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m"])
def test_class_names_with_control_characters_are_refused(tmp_path, name):
    write(tmp_path / name / "1.mp4")
    with pytest.raises(
        InputError, match="has a name that contains a line break or a control"
    ) as error:
        read_class_folders(tmp_path, ("train",))
    assert "\n" not in str(error.value)
    write(tmp_path / "labels.json", json.dumps([name]))
    with pytest.raises(InputError, match="labels.json: the name of class 0 contains a line break"):
        read_labels(tmp_path)
