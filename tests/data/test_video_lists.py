"""Lists with class names."""

import re

import pytest

from jaxvid.data import check
from jaxvid.data.sources import guess_source, has_validation, open_dataset
from jaxvid.data.video_lists import Row, read_list, read_rows
from jaxvid.errors import InputError
from tests.data.test_sources import section, write

NAMED = {
    "comma": "a.mp4,run\nb c.mp4,flip a pancake\n",
    "comma and header": "video,class\na.mp4,run\nb c.mp4,flip a pancake\n",
    "space": "a.mp4 run\nb c.mp4 flip a pancake\n",
    "space and header": "path label\na.mp4 run\nb c.mp4 flip a pancake\n",
    "tab": "a.mp4\trun\nb c.mp4\tflip a pancake\n",
    "quotes": '"path","label"\r\n"a.mp4", "run"\r\n"b c.mp4","flip a pancake"\r\n',
}


@pytest.mark.parametrize("form", NAMED)
def test_class_names_in_lists(tmp_path, form):
    for name in ("a.mp4", "b c.mp4"):
        write(tmp_path / name)
    write(tmp_path / "val.csv", NAMED[form])
    data = open_dataset(section("folder", tmp_path), 2, ("val",))
    assert data.labels == ["flip a pancake", "run"]
    assert [(r.id, r.label) for r in data.records["val"]] == [("a.mp4", 1), ("b c.mp4", 0)]
    records, labels = check.gather([tmp_path / "val.csv"])
    assert (labels, list(records["val"])) == (data.labels, list(data.records["val"]))


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("a.mp4,class 1", "a.mp4", "class 1"),
        ("a.mp4,1", "a.mp4", 1),
        ("a.mp4 (1).mp4 2", "a.mp4 (1).mp4", 2),
        ("a,b.mp4,3d render", "a,b.mp4", "3d render"),
        ('"a.mp4","push, then pull"', "a.mp4", "push, then pull"),
        ('"some, folder/a",2', "some, folder/a", 2),
        ("some, folder/a 2", "some, folder/a", 2),
        ("folder/a,run", "folder/a", "run"),
        ("影.MP4,走る", "影.MP4", "走る"),
        ("label.mp4,label", "label.mp4", "label"),  # not a header, because it names a video
    ],
)
def test_paths_and_labels_of_a_line(tmp_path, line, path, label):
    assert read_rows(write(tmp_path / "list.csv", line)) == [Row(1, path, label)]


@pytest.mark.parametrize(
    "path", ["b.mp4", "b", "b c.mp4", '"b.mp4"', "b,c.mp4", "b.mp4 d.MP4", " b.ts"]
)
@pytest.mark.parametrize("separator", [",", " ", ", ", "\t"])
@pytest.mark.parametrize("label", ["run", "push, pull", "a.mp4", "run fast", "flip (side)", "v1.0"])
@pytest.mark.parametrize("first", ["path,label\n", "", '"a, b.mp4","run"\n', "\n"])
def test_lists_are_read_as_their_lines(tmp_path, path, separator, label, first):
    """`read_list` has a faster way to read a list if all lines have the most frequent form."""
    line = f"{path}{separator}{label}"
    file = write(tmp_path / "list.csv", f"{first}{line}\n{line.replace('b', 'e', 1)}")
    try:
        rows = read_rows(file)
    except InputError as error:
        with pytest.raises(InputError, match=re.escape(str(error))):
            read_list(file, None, missing="keep")
        return
    labels = sorted({row.label for row in rows})
    videos = read_list(file, None, labels=labels, missing="keep")
    assert [(r.id, labels[r.label]) for r in videos] == [(row.path, row.label) for row in rows]


def test_line_numbers_count_headers_and_empty_lines(tmp_path):
    for first, number in (("", 1), ("path,label\n", 2), ("\n", 2), ('"x y",run\na.mp4,run\n', 3)):
        (tmp_path / "a.mp4").write_text("x")
        (tmp_path / "x y").write_text("x")
        write(tmp_path / "list.csv", f"{first}b.mp4,run\nc.mp4,walk\n")
        with pytest.raises(InputError, match=f"list.csv:{number}: .*b.mp4 does not exist"):
            read_list(tmp_path / "list.csv", None, labels=["run", "walk"])
        with pytest.raises(InputError, match=f"list.csv:{number + 1}: 'walk' is not a class"):
            read_list(tmp_path / "list.csv", None, labels=["run"])
        write(tmp_path / "list.csv", f"{first}b.mp4,run\nb.mp4,run\n")
        with pytest.raises(InputError, match=f"list.csv:{number + 1}: 'b.mp4' is already in line"):
            read_list(tmp_path / "list.csv", None, labels=["run"])


def test_names_follow_the_file_of_class_names(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / name)
    write(tmp_path / "labels.txt", "walk\nrun\n")
    write(tmp_path / "train.csv", "a.mp4,run\n")
    write(tmp_path / "val.csv", "b.mp4 0\n")  # indices and names may be used in different lists
    data = open_dataset(section("folder", tmp_path), 2, ("train", "val"))
    assert [[r.label for r in data.records[s]] for s in ("train", "val")] == [[1], [0]]
    write(tmp_path / "train.csv", "path,label\na.mp4,runn\n")
    with pytest.raises(InputError, match="train.csv:2: 'runn' is not a class .*mean 'run'"):
        open_dataset(section("folder", tmp_path), 2, ("train",))


def test_class_names_do_not_depend_on_the_split(tmp_path):
    for i, name in enumerate(("run", "walk", "jump")):
        write(tmp_path / f"{i}.mp4")
        write(tmp_path / f"{('train', 'val', 'test')[i]}.csv", f"{i}.mp4,{name}\n")
    for split, label in (("train", 1), ("val", 2)):
        data = open_dataset(section("folder", tmp_path), 3, (split,))
        assert (data.labels, data.records[split][0].label) == (["jump", "run", "walk"], label)
        assert data.notes == (
            f"2 of 3 classes have no {'training' if split == 'train' else 'validation'} videos: "
            f"jump, {'walk' if split == 'train' else 'run'}",
        )
        records, labels = check.gather([tmp_path / f"{split}.csv"])
        assert (labels, [*records[split]]) == (data.labels, [*data.records[split]])
    path = write(tmp_path / "other.csv", "0.mp4,swim\n")  # not one of the folder's splits
    assert check.gather([path])[1] == ["swim"]
    assert guess_source(path) == ("folder", 1)
    assert guess_source(tmp_path) == ("folder", 3)
    assert has_validation(tmp_path, "folder")
    with pytest.raises(InputError, match="set --config.model.num_classes=3"):
        open_dataset(section("folder", tmp_path), 8, ("train",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a.mp4,Run\nb.mp4,run\n",
            "csv:2: the class 'run' and the class 'Run' .*csv:1. differ only in case",
        ),
        ("a.mp4,0\n", "labels.txt does not exist; write one class name per line, or write class"),
        ("a.mp4,\x1b[1mrun\n", "is not 'path label'"),
    ],
)
def test_unusable_class_names_in_lists_are_refused(tmp_path, text, message):
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / name)
    write(tmp_path / "train.csv", text)
    with pytest.raises(InputError, match=message) as error:
        open_dataset(section("folder", tmp_path), 1, ("train",))
    assert "\n" not in str(error.value)


def test_an_index_that_is_a_class_name_is_explained(tmp_path):
    write(tmp_path / "labels.txt", "10\n20\n")
    write(tmp_path / "train.csv", "a.mp4,20\n")
    with pytest.raises(InputError, match="label 20 is out of range.*class names cannot contain 20"):
        open_dataset(section("folder", tmp_path), 2, ("train",))
