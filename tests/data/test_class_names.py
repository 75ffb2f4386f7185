"""Class names of public data sets, and files of class names."""

import hashlib
import json
from pathlib import Path

import pytest

from jaxvid.data.class_names import MAX_CLASSES, PUBLIC_DATASETS, class_names, read_class_names
from jaxvid.errors import InputError
from jaxvid.models import FAMILIES, make_model_config

# SHA-256 of the names in index order, joined by line breaks.
SHA256 = {
    "kinetics400": "a8dafb93a1204d4ecfa904f943ce5ee0c62ddeeb1df71aa1f96983fca17d777e",
    "kinetics600": "5d9a560f98fcfed08f6129dd498f97e043edf729efb3c02dd96b482d2970f9c0",
    "something_something_v2": "a31a2ad624a558d609762c50f4d5d4778246d3ace6717cf24b993b0bf2d9a68b",
}
NAMES = ["holding a cup", "air, drumming", "zumba"]


@pytest.mark.parametrize("dataset", PUBLIC_DATASETS)
def test_the_names_of_public_datasets_have_the_checksum_of_the_official_lists(dataset):
    text = "\n".join(class_names(dataset))
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256[dataset]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_released_presets_have_the_number_of_classes_of_their_dataset(family):
    for name, released in family.released_classes.items():
        assert len(class_names(released.dataset)) == make_model_config(name).num_classes
    released = {name for name in family.presets if not name.endswith("_tiny")}
    assert family.released_classes.keys() == released


def test_an_unknown_dataset_is_refused():
    with pytest.raises(InputError, match="dataset='kinetics': must be one of 'kinetics400'"):
        class_names("kinetics")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.txt", "".join(f"{name}\n" for name in NAMES)),
        ("names", "\r\n".join(NAMES)),
        ("names.txt", "\ufeff" + "\n".join(NAMES) + "\n\n"),
        ("names.json", json.dumps(NAMES)),
        ("names.json", "\ufeff" + json.dumps(NAMES)),
        ("names.json", json.dumps({"zumba": 2, "air, drumming": 1, "holding a cup": 0})),
        ("names.json", json.dumps({"2": "zumba", "0": "holding a cup", "1": "air, drumming"})),
        # The official labels of Something-Something have indices as text.
        ("names.json", json.dumps({name: str(i) for i, name in enumerate(NAMES)})),
    ],
)
def test_formats(tmp_path, file, text):
    path = tmp_path / file
    path.write_bytes(text.encode())
    assert read_class_names(path, 3) == NAMES


def test_names_of_an_official_kinetics_list_are_sorted(tmp_path):
    rows = ["zumba,a,1,11,train", '"air, drumming",b,1,11,train', "zumba,c,1,11,train"]
    header = "label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "train.csv").write_text(header + "\n".join(rows))
    assert read_class_names(tmp_path / "train.csv") == ["air, drumming", "zumba"]
    (tmp_path / "test.csv").write_text("youtube_id,time_start,time_end,split\na,1,11,test\n")
    with pytest.raises(InputError, match="test.csv: has no label"):
        read_class_names(tmp_path / "test.csv")


BAD = {
    "duplicate in a list": ("a.json", b'["x", "x"]', "'x' occurs more than once"),
    "duplicate in lines": ("a.txt", b"x\ny\nx\n", "'x' occurs more than once"),
    "duplicate name in an object": ("a.json", b'{"x": 0, "x": 1}', "'x' occurs more than once"),
    "duplicate index": ("a.json", b'{"x": 0, "y": 0}', "0 to 1: no class has 1"),
    "gap": ("a.json", b'{"x": 0, "y": 2}', "the indices are not 0 to 1: no class has 1"),
    "gap in text": ("a.json", b'{"0": "x", "2": "y"}', "no class has 1"),
    "indices from 1": ("a.json", b'{"x": 1, "y": 2}', "no class has 0"),
    "negative index": ("a.json", b'{"x": -1, "y": 0}', "neither the keys nor the values"),
    "fraction": ("a.json", b'{"x": 0, "y": 1.5}', "neither the keys nor the values"),
    "huge index": ("a.json", b'{"x": 0, "y": 1' + b"0" * 5000 + b"}", "must be a list of names"),
    "both are numbers": ("a.json", b'{"0": "1", "1": "0"}', "both numbers"),
    "name that is a number": ("a.json", b'["x", 5]', "5 is not a name"),
    "nested": ("a.json", b'["x", ["y"]]', "is not a name"),
    "nested object": ("a.json", b'{"0": {"a": 1}, "1": "y"}', "is not a name"),
    "number": ("a.json", b"5", "got 5"),
    "deep": ("a.json", b"[" * 100_000, "must be a list of names"),
    "truncated": ("a.json", b'["x", ', "must be a list of names"),
    "empty object": ("a.json", b"{}", "0 names for 2 classes"),
    "empty": ("a.txt", b"", "is empty"),
    "blank lines": ("a.txt", b"\n \n", "is empty"),
    "gap in lines": ("a.txt", b"x\n\ny\n", "class 1 has no name"),
    "too few": ("a.txt", b"x\n", "1 names for 2 classes; write one per class"),
    "too many": ("a.txt", b"x\ny\nz\n", "3 names for 2 classes"),
    "not UTF-8": ("a.txt", b"x\nb\xe9\n", "a.txt:2: cannot be read: not UTF-8"),
    "JSON that is not UTF-8": ("a.json", b'["x", "b\xe9"]', "not UTF-8"),
    "UTF-16": ("a.txt", "x\ny\n".encode("utf-16"), "UTF-16 text"),
    "null bytes": ("a.txt", b"\0" * 100, "null bytes"),
    "control character": ("a.txt", b"x\ny\x1b[2J\n", "class 1 contains a line break or a control"),
    "long name": ("a.txt", b"x\n" + b"y" * 2000, "has 2000 characters"),
    "many": ("a.txt", b"x\n" * (MAX_CLASSES + 1), "the maximum is 1000000"),
    "not Kinetics": ("a.csv", b"0,x\n1,y\n", "expected the columns label, youtube_id"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path, name):
    file, data, message = BAD[name]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        read_class_names(tmp_path / file, 2)
    assert str(error.value).startswith(str(tmp_path / file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_huge_missing_and_special_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"huge.{suffix}"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="is larger than the limit of 32 MB"):
        read_class_names(path)
    with pytest.raises(InputError, match="does not exist; choose a file of class names"):
        read_class_names(tmp_path / f"none.{suffix}")
    for special in (tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match="not a regular file"):
            read_class_names(special)
