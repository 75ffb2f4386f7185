"""The lists that people have, in their odder forms, mean what they say or are refused."""

import json
from pathlib import Path

import pytest

from jaxvid.data import check
from jaxvid.data.lists import find_split, read_class_folders, read_labels, read_list, read_split
from jaxvid.data.motion import write_clip
from jaxvid.data.records import NO_LABEL
from jaxvid.errors import InputError
from tests.test_sources import FRAMES, write

HEADER = "label,youtube_id,time_start,time_end,split\n"
ENTRY = {"id": "7", "label": "holding a cup", "template": "Holding [something]"}


def read(folder: Path, split: str) -> list[tuple[str, int]]:
    """A split's files, relative to the folder, and their labels."""
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
def test_absurd_labels_are_refused(tmp_path, label):
    with pytest.raises(InputError, match="list.csv:1: .* is not 'path label'"):
        read_list(write(tmp_path / "list.csv", f"a.mp4 {label}\n"), None, missing="keep")


def test_a_null_character_in_a_path_is_refused(tmp_path):
    with pytest.raises(InputError, match="list.csv:1: .* cannot be read .*null"):
        read_list(write(tmp_path / "list.csv", "a\0.mp4 0\n"), 1)


@pytest.mark.parametrize(
    "text",
    [
        HEADER + "zumba,é_a,1,11,train\n",
        "\ufeff" + HEADER.replace("\n", "\r\n") + "zumba,é_a,1,11,train\r\n\r\n",
        "label, youtube_id, time_start, time_end, split\nzumba, é_a, 1, 11, train\n",
        '"label","youtube_id","time_start","time_end","split","is_cc"\n"zumba","é_a",1,11,"train",0\n',
    ],
)
def test_kinetics_lists_in_every_dialect(tmp_path, text):
    write(tmp_path / "train.csv", text)
    write(tmp_path / "train" / "é_a_000001_000011.mp4")
    assert read(tmp_path, "train") == [("train/é_a_000001_000011.mp4", 0)]


def test_kinetics_names_its_validation_list_otherwise(tmp_path):
    write(tmp_path / "validate.csv", HEADER + "zumba,a,1,11,validate\n")
    write(tmp_path / "validate" / "a_000001_000011.mp4")
    assert read(tmp_path, "val") == [("validate/a_000001_000011.mp4", 0)]
    records, labels = check.gather([tmp_path])
    assert (list(records), labels) == (["val"], ["zumba"])
    assert list(check.gather([tmp_path / "validate.csv"])[0]) == ["val"]


def test_a_short_kinetics_row_is_refused_by_its_line(tmp_path):
    write(tmp_path / "train.csv", HEADER + "zumba,a,1,11,train\n\nzumba,b\n")
    with pytest.raises(InputError, match="train.csv:4: its times are not whole seconds"):
        read(tmp_path, "train")


@pytest.mark.parametrize("name", ["train.json", "something-something-v2-train.json"])
@pytest.mark.parametrize("template", ["Holding something", "Holding [something]"])
def test_something_lists_under_both_names(tmp_path, name, template):
    write(tmp_path / "labels.json", json.dumps({template: "0"}))
    write(tmp_path / name, "\ufeff" + json.dumps([ENTRY], indent=1).replace("\n", "\r\n"))
    write(tmp_path / "20bn-something-something-v2" / "7.webm")
    assert read(tmp_path, "train") == [("20bn-something-something-v2/7.webm", 0)]
    for path in (tmp_path, tmp_path / name):  # and not a class folder
        records, labels = check.gather([path])
        assert labels == [template]
        assert [record.id for record in records["train"]] == ["7"]


def test_endless_brackets_are_refused(tmp_path):
    write(tmp_path / "train.json", "[" * 100_000)
    write(tmp_path / "labels.json", "[" * 100_000)
    with pytest.raises(InputError, match="labels.json: must be a list of names"):
        read_labels(tmp_path)
    with pytest.raises(InputError, match="train.json: is no list of entries"):
        read_split(tmp_path, "train", ["x"], "", "error")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels.json", '["x", "x"]', "labels.json: 'x' is named twice"),
        ("labels.json", '{"x": 0, "y": 1.5}', "labels.json: must be a list of names"),
        ("labels.txt", "x\n\ny\n", "labels.txt: class 1 has no name"),
    ],
)
def test_bad_names_of_classes_are_refused(tmp_path, name, text, message):
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
def test_only_check_takes_a_list_without_labels(tmp_path, kind):
    name, text, videos = UNLABELLED[kind]
    write(tmp_path / name, text)
    for video in videos:
        (tmp_path / video).parent.mkdir(exist_ok=True)
        write_clip(tmp_path / video, FRAMES)
    report = check.check([tmp_path], workers=1)
    assert (report["videos"], report["broken"]) == (len(videos), [])
    [records] = check.gather([tmp_path], labelled=False)[0].values()
    assert {record.label for record in records} == {NO_LABEL}
    message = "is not 'path label'" if kind == "paths" else "has no label.*: leave the list out"
    for labels in ("", "x\n"):
        if labels:
            write(tmp_path / "labels.txt", labels)
        with pytest.raises(InputError, match=f"{name}:?1?.*{message}") as error:
            check.gather([tmp_path])
        assert "\n" not in str(error.value)


def test_a_test_list_without_labels_does_not_disturb_the_others(tmp_path):
    write(tmp_path / "train.csv", HEADER + "zumba,a,1,11,train\n")
    write(tmp_path / "train" / "a_000001_000011.mp4")
    write(tmp_path / "test.csv", "youtube_id,time_start,time_end,split\nb,1,11,test\n")
    assert read(tmp_path, "train") == [("train/a_000001_000011.mp4", 0)]
    assert find_split(tmp_path, "val") == tmp_path / "val.csv"
    records, _ = check.gather([tmp_path], labelled=False)
    assert [len(records[split]) for split in ("train", "test")] == [1, 1]


def test_one_labelled_line_makes_the_others_wrong(tmp_path):
    write(tmp_path / "test.csv", "a.mp4\nb.mp4 0\n")
    with pytest.raises(InputError, match="test.csv:1: 'a.mp4' is not 'path label'"):
        check.check([tmp_path], workers=1)
