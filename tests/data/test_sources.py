"""All data sources return the same kind of records; invalid data gives a one-line error."""

import dataclasses
import json
import os
import pickle
import re
from fractions import Fraction
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
import simplejpeg

from jaxvid.data.clips.clip import ClipSpec
from jaxvid.data.formats.pack_reader import PackRecords
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.data.pipeline import make_eval_iter, split_batch
from jaxvid.data.prepare import prepare
from jaxvid.data.sources import DatasetConfig, Record, open_dataset, read_list
from jaxvid.data.synthetic_motion import write_clip
from jaxvid.errors import InputError

# `(t, h, w, c)` uint8, six frames of 4 × 4 squares of 8 × 8 pixels.
FRAMES = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)


def section(source, folder, prefix=""):
    """Return the configuration of a data source."""
    fields = {"source": source, "folder": str(folder), "prefix": prefix, "missing": "error"}
    fields |= {"skip_broken": False, "color_matrix": "auto"}
    return DatasetConfig(**fields)


def write(path: Path, text: str = "x") -> Path:
    """Write a text file, creating its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def write_frames(path: Path, key: str, mode: str = "w") -> None:
    """Write FRAMES as JPEG to the data set `key` of an HDF5 file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, mode) as file:
        jpegs = [simplejpeg.encode_jpeg(frame, quality=95) for frame in FRAMES]
        frames = file.create_dataset(key, (len(jpegs),), h5py.vlen_dtype(np.uint8))
        for i, jpeg in enumerate(jpegs):
            frames[i] = np.frombuffer(jpeg, np.uint8)


@pytest.fixture
def clips(tmp_path):
    """A folder of text files named as videos, for lists whose videos are not opened."""
    for name in ("a.mp4", "b c.mp4", "d,e.mp4", "影é.mp4"):
        write(tmp_path / name)
    return tmp_path


# ------------------------------------------------------------------ lists


@pytest.mark.parametrize(
    "text",
    [
        "a.mp4 0\nb c.mp4 1\nd,e.mp4 2\n影é.mp4 3\n",
        "a.mp4,0\nb c.mp4,1\nd,e.mp4,2\n影é.mp4,3",
        "path,label\na.mp4,0\nb c.mp4,1\nd,e.mp4,2\n影é.mp4,3\n",
        "﻿path label\r\na.mp4 0\r\nb c.mp4 1\r\n\r\nd,e.mp4 2\r\n影é.mp4 3\r\n",
        '﻿a.mp4,0\nb c.mp4, 1\n"d,e.mp4",2\n影é.mp4\t3\n\n',
    ],
)
def test_list_formats(clips, text):
    records = read_list(write(clips / "list.csv", text), 4)
    assert [record.id for record in records] == ["a.mp4", "b c.mp4", "d,e.mp4", "影é.mp4"]
    assert [record.label for record in records] == [0, 1, 2, 3]
    assert records[1] == Record(clips / "b c.mp4", 1)
    assert pickle.loads(pickle.dumps(records))[3].id == "影é.mp4"


def test_file_names_may_contain_number_signs_and_unicode_separators(clips):
    for name in ("#1.mp4", "a\x85b.mp4", "a\u2028b.mp4"):
        write(clips / name)
    text = "#1.mp4 0\na\x85b.mp4 1\na\u2028b.mp4 2\n"
    assert [r.label for r in read_list(write(clips / "list.csv", text), 4)] == [0, 1, 2]


def test_prefix_replaces_the_folder_of_the_list(clips):
    write(clips / "lists" / "val.csv", "a.mp4 0\n")
    write(clips / "lists" / "labels.txt", "only\n")
    folder = clips / "lists"
    records = open_dataset(section("folder", folder, str(clips)), 1, ("val",)).records["val"]
    assert list(records) == [Record(clips / "a.mp4", 0)]
    with pytest.raises(InputError, match="val.csv:1: .*lists/a.mp4 does not exist"):
        open_dataset(section("folder", folder), 1, ("val",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 0\na.mp4 1\n", "list.csv:2: 'a.mp4' is already in line 1"),
        ("a.mp4 0\nb c.mp4 one\n", "list.csv:2: has the class name 'one', but line 1 has the ind"),
        ("a.mp4,one\n\nb c.mp4,1\n", "list.csv:3: has the index 1, but line 1 has the class na"),
        ("a.mp4,one,train\n", "list.csv:1: 'a.mp4,one,train' is not 'path label'"),
        ("path,label,split\na.mp4,one,train\n", "list.csv:1: 'path,label,split' is not"),
        ("a.mp4 17 0\n", "list.csv:1: 'a.mp4 17 0' is not 'path label'"),
        ("a.mp4,b c.mp4\n", "list.csv:1: 'a.mp4,b c.mp4' is not 'path label'"),
        ("a.mp4 1.0\n", "is not 'path label'"),
        ("a.mp4 ²\n", "is not 'path label'"),
        ("path label\n", "list.csv is empty; it needs one entry per video"),
        ("a.mp4 0\npath label\n", "list.csv:2: 'path label' is not"),
        ("loop.mp4 0\n", "list.csv:1: .*loop.mp4 cannot be read .*symbolic links"),
        ("sub 0\n", "list.csv:1: .*sub is not a file"),
    ],
)
def test_malformed_lines_are_refused(clips, text, message):
    (clips / "loop.mp4").symlink_to("loop.mp4")
    (clips / "sub").mkdir()
    with pytest.raises(InputError, match=message) as error:
        read_list(write(clips / "list.csv", text), 4)
    assert "\n" not in str(error.value)


def test_missing_files_are_refused_together_or_kept(clips):
    path = write(clips / "list.csv", "a.mp4 0\n" + "".join(f"no{i}.mp4 1\n" for i in range(8)))
    with pytest.raises(
        InputError, match=r"list.csv:2: .*no0.mp4 .*no4.mp4 .*3 more \(8 in total\)"
    ):
        read_list(path, 4)
    assert len(read_list(path, 4, missing="keep")) == 9


# ------------------------------------------------------------------ class names


@pytest.mark.parametrize(
    "names",
    ['["x", "y z"]', '{"y z": "1", "x": "0"}', '{"x": 0, "y z": 1}'],
)
def test_labels_may_be_json(clips, names):
    write(clips / "labels.json", names)
    write(clips / "val.csv", "a.mp4 1\n")
    assert open_dataset(section("folder", clips), 2, ("val",)).labels == ["x", "y z"]


@pytest.mark.parametrize("names", ['{"x": 1, "y": 2}', '{"x": "one"}', "[1, 2]", "{", "3"])
def test_malformed_label_files_are_refused(clips, names):
    write(clips / "labels.json", names)
    with pytest.raises(InputError, match="labels.json: must be a list of names or map"):
        open_dataset(section("folder", clips), 2, ("val",))


def test_duplicate_class_names_are_refused(clips):
    write(clips / "labels.txt", "x\nx\n")
    with pytest.raises(InputError, match="labels.txt: 'x' occurs more than once"):
        open_dataset(section("folder", clips), 2, ("val",))


def test_official_kinetics_lists(tmp_path):
    header = "label,youtube_id,time_start,time_end,split\n"
    write(tmp_path / "train.csv", header + "zumba,-a b,1,11,train\nair drumming,c,20,30,train\n")
    write(tmp_path / "val.csv", header + "zumba,d,0,10,val\n")
    write(tmp_path / "train" / "-a b_000001_000011.mp4")
    write(tmp_path / "train" / "air_drumming" / "c_000020_000030.mp4")
    write(tmp_path / "zumba" / "d_000000_000010.mp4")
    data = open_dataset(section("folder", tmp_path), 2, ("train", "val"))
    assert data.labels == ["air drumming", "zumba"]
    assert [record.label for record in data.records["train"]] == [1, 0]
    assert data.records["val"][0].path == tmp_path / "zumba" / "d_000000_000010.mp4"
    write(tmp_path / "labels.txt", "zumba\n")
    with pytest.raises(InputError, match="train.csv:3: 'air drumming' is not a class"):
        open_dataset(section("folder", tmp_path), 1, ("train",))


def test_official_something_something_lists(tmp_path):
    write(tmp_path / "labels.json", '{"Holding something": "1", "Bending something": "0"}')
    path = tmp_path / "something-something-v2-validation.json"
    write(path, '[{"id": "7", "label": "holding a cup", "template": "Holding [something]"}]')
    data = section("folder", tmp_path)
    with pytest.raises(InputError, match="validation.json:1: .*7.webm does not exist"):
        open_dataset(data, 2, ("val",))
    write(tmp_path / "20bn-something-something-v2" / "7.webm")
    [record] = open_dataset(data, 2, ("val",)).records["val"]
    assert (record.id, record.label) == ("7", 1)
    write(path, '[{"id": "7", "template": "Eating [something]"}]')
    with pytest.raises(InputError, match="validation.json:1: 'Eating something' is not a class"):
        open_dataset(data, 2, ("val",))
    write(path, '[{"id": "7"}]')
    with pytest.raises(InputError, match="validation.json:1: has no label, as in a test list"):
        open_dataset(data, 2, ("val",))
    write(path, '[{"template": "Holding [something]"}]')
    with pytest.raises(InputError, match="is not a list of entries"):
        open_dataset(data, 2, ("val",))


# ------------------------------------------------------------------ class folders


def test_class_folders(tmp_path):
    for name in ("train/b/1.mp4", "train/a/2.MP4", "train/a/1.avi", "val/b/9.mp4"):
        write(tmp_path / name)
    write(tmp_path / "train/a/notes.txt")
    data = open_dataset(section("class_folders", tmp_path), 2, ("train", "val"))
    assert data.labels == ["a", "b"]
    listed = [(record.id, record.label) for record in data.records["train"]]
    assert listed == [("a/1.avi", 0), ("a/2.MP4", 0), ("b/1.mp4", 1)]
    # `val` contains only class b. The classes are those of all splits.
    val_only = open_dataset(section("class_folders", tmp_path), 2, ("val",))
    assert [record.label for record in val_only.records["val"]] == [1]
    no_splits = open_dataset(section("class_folders", tmp_path / "train"), 2, ("val",))
    assert len(no_splits.records["val"]) == 3
    write(tmp_path / "labels.txt", "b\n")
    with pytest.raises(InputError, match="the folder 'a' is not a class in .*labels.txt"):
        open_dataset(section("class_folders", tmp_path), 1, ("train",))


def test_class_folders_that_loop_or_are_missing_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a").symlink_to("a")
    for folder, splits, message in (
        (tmp_path, ("train",), "train/a cannot be read .*; expected .*CLASS/"),
        (tmp_path, ("train", "val"), "val does not exist; add it, or set --config.data.val_share"),
        (tmp_path / "nothing", ("train",), "nothing does not exist; choose an existing --config"),
        ("", ("train",), "data.folder is empty; set --config.data.folder"),
    ):
        with pytest.raises(InputError, match=message):
            open_dataset(section("class_folders", folder), 1, splits)


# ------------------------------------------------------------------ HDF5 files of XViT


@pytest.mark.parametrize("packed", ["seq_h5/train", "train"])
@pytest.mark.parametrize("separator", [",", " "])
def test_xvit_kinetics_layout(tmp_path, packed, separator):
    lines = ("é 1,6,0\n" if separator == "," else "é 1 6 0\n") + f"x{separator}6{separator}2\n"
    write(tmp_path / "annotations" / "train.txt", lines)
    write(tmp_path / "annotation" / "train_fps.txt", f"x{separator}12.5\n")
    for name in ("é 1", "x"):
        write_frames(tmp_path / packed / f"{name}.h5", "anything")
    records = open_dataset(section("xvit_h5", tmp_path), 3, ("train",)).records["train"]
    assert [(record.id, record.label) for record in records] == [("é 1", 0), ("x", 2)]
    with pickle.loads(pickle.dumps(records))[1].open() as reader:
        assert (reader.num_frames, reader.fps) == (6, 12.5)
        frames = reader.get_frames(np.array([5, 0, 5]))
    assert frames.shape == (3, 32, 32, 3)
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(frames[0], frames[2])
    assert abs(frames.astype(int) - FRAMES[[5, 0, 5]]).mean() < 25  # JPEG is lossy
    with records[0].open() as reader:
        assert reader.fps is None


@pytest.mark.parametrize("single_file", [False, True])
def test_xvit_something_something_layout(tmp_path, single_file):
    write(tmp_path / "val_videofolder.txt", "123 6 1\n45 6 0\n")
    for name, mode in (("123", "w"), ("45", "a")):
        path = "Something-Something-v2-frames.h5" if single_file else f"seq_h5/{name}.h5"
        write_frames(tmp_path / path, name, mode)
    for split in ("val", "test"):
        records = open_dataset(section("xvit_h5", tmp_path), 2, (split,)).records[split]
        assert [(record.id, record.label) for record in records] == [("123", 1), ("45", 0)]
        with records[1].open() as reader:
            assert reader.get_frames([0]).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../x 6 0\n", "val_videofolder.txt:1: '../x' is outside of .*seq_h5"),
        ("/etc/x 6 0\n", "is outside of"),
        ("x 6\n", "val_videofolder.txt:1: 'x 6' is not 'name,num_frames,label'"),
        ("x 6 one\n", "is not 'name,num_frames,label'"),
        ("x 6 2\n", "label 2 is out of range"),
        ("x 6 0\nx 6 1\n", "val_videofolder.txt:2: 'x' is already in line 1"),
        ("y 6 0\n", "val_videofolder.txt:1: .*y.h5 does not exist"),
    ],
)
def test_malformed_xvit_lists_are_refused(tmp_path, line, message):
    write(tmp_path / "val_videofolder.txt", line)
    write_frames(tmp_path / "seq_h5/x.h5", "x")
    with pytest.raises(InputError, match=message):
        open_dataset(section("xvit_h5", tmp_path), 2, ("val",))


def test_decode_errors_name_damaged_h5_files(tmp_path):
    write(tmp_path / "val_videofolder.txt", "x 6 0\ny 6 0\nz 6 0\nw 6 0\n")
    write_frames(tmp_path / "seq_h5/x.h5", "other")
    write(tmp_path / "seq_h5/y.h5", "no HDF5")
    write_frames(tmp_path / "seq_h5/z.h5", "z")
    with h5py.File(tmp_path / "seq_h5/z.h5", "a") as file:
        file["z"][2] = np.frombuffer(b"no JPEG", np.uint8)
    data = section("xvit_h5", tmp_path)
    with pytest.raises(InputError, match="w.h5 does not exist"):
        open_dataset(data, 1, ("val",))
    data = dataclasses.replace(data, missing="keep")
    x, y, z, w = open_dataset(data, 1, ("val",)).records["val"]
    for record, message in (
        (x, "x.h5: contains no data set 'x'; recreate"),
        (y, "y.h5: cannot be read"),
        (w, "w.h5 does not exist"),
    ):
        with pytest.raises(DecodeError, match=message):
            record.open()
    with z.open() as reader, pytest.raises(DecodeError, match="z.h5: frame 2 of 6 cannot be"):
        reader.get_frames([0, 2])


def add_external_link(file, folder):
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"] = np.zeros((2, 5), np.uint8)
    file["x"] = h5py.ExternalLink("other.h5", "x")


def add_virtual_data_set(file, folder):
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"] = np.zeros((2, 5), np.uint8)
    layout = h5py.VirtualLayout((2, 5), np.uint8)
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "x", (2, 5))
    file.create_virtual_dataset("x", layout)


def add_external_storage(file, folder):
    write(folder / "raw.bin", "x" * 10)
    file.create_dataset("x", (2, 5), np.uint8, external=[(str(folder / "raw.bin"), 0, 10)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (add_external_link, "'x' is a link; copy the data into the file"),
        (lambda file, _: file.__setitem__("x", h5py.SoftLink("/y")), "'x' is a link; copy"),
        (add_virtual_data_set, "its data is stored in other files"),
        (add_external_storage, "its data is stored in other files"),
        (lambda file, _: file.create_dataset("x", (2**40,), "u1", chunks=(9,)), "are not a video"),
        (lambda file, _: file.create_dataset("x", (2, 2**40), "u1", chunks=(1, 9)), "not a video"),
        (lambda file, _: file.create_dataset("x", (2**19, 2**10), "u1", chunks=(2**19, 2**10)),
         "are not a video"),
        (lambda file, _: file.create_dataset("x", (2,), "V2000000000", chunks=(1,)), "not a video"),
        (lambda file, _: file.create_dataset("x", data=7), "contains no data set 'x'"),
        (lambda file, _: file.create_dataset("x", data=h5py.Empty("u1")), "no data set 'x'"),
        (lambda file, _: file.create_dataset("x", (0, 5), "u1"), "contains no frames"),
        (lambda file, _: file.create_group("x"), "contains no data set 'x'"),
        (lambda file, _: file.create_dataset("x", (3,), "f8"), "frame 0 of 3 cannot be decoded"),
        (lambda file, _: file.create_dataset("x", (3, 4), "i4"), "frame 0 of 3 cannot be decoded"),
        (lambda file, _: file.create_dataset("x", (3,), h5py.string_dtype()), "frame 0 of 3"),
        (lambda file, _: file.create_dataset("x", (3,), h5py.ref_dtype), "frame 0 of 3 cannot be"),
        (lambda file, _: file.create_dataset("x", (3,), [("a", "i4")]), "frame 0 of 3 cannot be"),
    ],
)  # fmt: skip
def test_invalid_h5_data_sets_are_refused(tmp_path, make, message):
    write(tmp_path / "val_videofolder.txt", "x 3 0\n")
    (tmp_path / "seq_h5").mkdir()
    with h5py.File(tmp_path / "seq_h5" / "x.h5", "w") as file:
        make(file, tmp_path / "seq_h5")
    [record] = open_dataset(section("xvit_h5", tmp_path), 1, ("val",)).records["val"]
    with pytest.raises(DecodeError, match=message) as error, record.open() as reader:
        reader.get_frames([0])
    assert "\n" not in str(error.value)


def test_pipes_named_as_h5_files_are_refused_without_blocking(tmp_path):
    write(tmp_path / "val_videofolder.txt", "x 3 0\n")
    (tmp_path / "seq_h5").mkdir()
    os.mkfifo(tmp_path / "seq_h5" / "x.h5")
    data = section("xvit_h5", tmp_path)
    data = dataclasses.replace(data, missing="keep")
    [record] = open_dataset(data, 1, ("val",)).records["val"]
    with pytest.raises(DecodeError, match="x.h5 is not a file; restore it"):
        record.open()


@pytest.mark.parametrize("rate", ["nan", "inf", "-inf", "1e999", "x"])
def test_invalid_frame_rates_are_refused(tmp_path, rate):
    write(tmp_path / "annotations" / "val.txt", "x,3,0\n")
    write(tmp_path / "annotations" / "val_fps.txt", f"x,{rate}\n")
    with pytest.raises(InputError, match="val_fps.txt:1: 'x,.*' is not 'name,fps'"):
        open_dataset(section("xvit_h5", tmp_path), 1, ("val",))


# ------------------------------------------------------------------ packs


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """A pack of three clips of five frames in two ArrayRecord files."""
    folder = tmp_path_factory.mktemp("pack")
    rng = np.random.default_rng(0)
    for i in range(3):
        frames = rng.integers(0, 256, (5, 4, 4, 3), np.uint8).repeat(12, 1).repeat(12, 2)
        write_clip(folder / f"{i}.mp4", frames)
    write(folder / "val.csv", "0.mp4 1\n1.mp4 0\n2.mp4 1\n")
    write(folder / "labels.txt", "a\nb, c\n")
    settings = Settings(clips_per_file=2, frames_per_record=4)
    prepare([folder / "val.csv"], folder / "pack", settings, workers=2)
    return folder / "pack"


def test_packs_keep_the_exact_frame_rate(tmp_path):
    with av.open(str(tmp_path / "ntsc.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30000, 1001), pix_fmt="yuv420p")
        stream.width, stream.height = 32, 32
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    write(tmp_path / "val.csv", "ntsc.mp4 0\n")
    for kind, source in (("arrayrecord", "pack"), ("h5", "xvit_h5")):
        prepare([tmp_path], tmp_path / kind, Settings(kind), workers=1)
        [record] = open_dataset(section(source, tmp_path / kind), 1, ("val",)).records["val"]
        with record.open() as reader, Record(tmp_path / "ntsc.mp4", 0).open() as video:
            assert reader.fps == video.fps == 30000 / 1001


@pytest.fixture
def pack_copy(pack, tmp_path):
    """A copy of the pack that the test may damage."""
    for path in pack.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_packs_are_read_as_records(pack):
    data = open_dataset(section("pack", pack), 2, ("val",))
    assert data.labels == ["a", "b, c"]
    records = pickle.loads(pickle.dumps(data.records["val"]))
    assert [(r.id, r.label) for r in records] == [("0.mp4", 1), ("1.mp4", 0), ("2.mp4", 1)]
    assert records[-1].id == records[1:][-1].id == "2.mp4"
    with Record(pack.parent / "2.mp4", 1).open() as video, records[2].open() as reader:
        assert (reader.num_frames, reader.fps) == (video.num_frames, video.fps)
        expected = video.get_frames(np.array([4, 0])).astype(int)
        assert abs(reader.get_frames(np.array([4, 0])) - expected).mean() < 12
    with pytest.raises(IndexError):
        records[3]
    with pytest.raises(InputError, match="the data has 2 classes, but model.num_classes=3"):
        open_dataset(section("pack", pack), 3, ("val",))
    with pytest.raises(InputError, match="has no split 'train', only .*val"):
        open_dataset(section("pack", pack), 2, ("train",))


def test_packs_can_be_opened_by_their_tfds_name(pack_copy, monkeypatch):
    home = pack_copy / "home" / "jaxvid" / "1.0.0"
    home.mkdir(parents=True)
    for path in list(pack_copy.iterdir()):
        if path.is_file():
            os.rename(path, home / path.name)
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(pack_copy / "home"))
    data = open_dataset(section("tfds", "jaxvid"), 2, ("val",))
    assert [(r.id, r.label) for r in data.records["val"]][2] == ("2.mp4", 1)
    with pytest.raises(InputError, match="data.name=nothing_like_it: not found in .*home"):
        open_dataset(section("tfds", "nothing_like_it"), 2, ("val",))


def frames_of(records, index) -> dict[int, np.ndarray | str]:
    """Return frame number → frame or decode error, reading each frame separately."""
    frames = {}
    with records[index].open() as reader:
        for i in range(reader.num_frames):
            try:
                frames[i] = reader.get_frames([i])[0]
            except DecodeError as error:
                frames[i] = str(error)
    return frames


def test_flipped_bytes_never_yield_wrong_frames_or_labels(pack_copy):
    path = pack_copy / "jaxvid-val.array_record-00000-of-00002"
    intact = path.read_bytes()
    expected = frames_of(open_dataset(section("pack", pack_copy), 2, ("val",)).records["val"], 0)
    reasons = []
    for position in range(40, len(intact), len(intact) // 60):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 8]) + intact[position + 1 :])
        records = open_dataset(section("pack", pack_copy), 2, ("val",)).records["val"]
        assert (records[0].id, records[0].label) == ("0.mp4", 1)
        for i, frame in frames_of(records, 0).items():
            if isinstance(frame, str):
                reasons.append(frame)
            else:
                np.testing.assert_array_equal(frame, expected[i])
    assert reasons
    assert all("of split 'val' cannot be read" in reason for reason in reasons)
    assert not any("\n" in reason for reason in reasons)


def test_damage_affects_only_its_record(pack_copy):
    path = pack_copy / "jaxvid-val.array_record-00000-of-00002"
    data = bytearray(path.read_bytes())
    records = open_dataset(section("pack", pack_copy), 2, ("val",)).records["val"]
    intact = [frames_of(records, i) for i in range(3)]
    [jpeg] = next(records.read([1]))["frames"]  # frame 4 of the first video
    data[data.index(jpeg) + len(jpeg) // 2] ^= 8
    path.write_bytes(data)
    records = open_dataset(section("pack", pack_copy), 2, ("val",)).records["val"]
    for i in range(3):
        for number, frame in frames_of(records, i).items():
            if (i, number) == (0, 4):
                assert "record 1 of split 'val' cannot be read" in frame
            else:
                np.testing.assert_array_equal(frame, intact[i][number])
    spec = ClipSpec(num_frames=2, crop=16, short_side=48)
    [batch] = make_eval_iter(records, spec=spec, batch_size=3, num_threads=2)
    assert batch["mask"].tolist() == [True] * 3  # samples only frames 1 and 3
    spec = ClipSpec(num_frames=8, crop=16, short_side=48)  # samples all five frames
    [batch] = make_eval_iter(records, spec=spec, batch_size=3, num_threads=2)
    assert batch["mask"].tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("text", "replacement", "message"),
    [
        (
            "0.mp4,1",
            "0.mp4,0",
            "record 0 .* contains '0.mp4', label 1, 4 of 5 .* index lists '0.mp4', label 0",
        ),
        ("1.mp4,0", "3.mp4,0", "record 2 of split 'val' contains '1.mp4'"),
        (
            "0.mp4,1,5",
            "0.mp4,1,6",
            "record 0 of split 'val' contains '0.mp4', label 1, 4 of 5 frames",
        ),
        (
            "5,15.0,0,4",
            "5,15.0,0,3",
            "4 of 5 frames, .* from frame 0, .* 3 of 5 frames, .* from frame 0; run",
        ),
    ],
)
def test_an_index_that_differs_from_the_records_is_a_decode_error(
    pack_copy, text, replacement, message
):
    path = pack_copy / "val_index.csv"
    path.write_text(path.read_text().replace(text, replacement))
    records = open_dataset(section("pack", pack_copy), 2, ("val",)).records["val"]
    reason = next(
        frame for i in (0, 1) for frame in frames_of(records, i).values() if isinstance(frame, str)
    )
    assert re.search(message, reason)


def test_invalid_index_files_are_refused(pack_copy):
    path = pack_copy / "val_index.csv"
    intact = path.read_text()
    for text, message in (
        (intact.replace("1.mp4,0", "1.mp4,x"), "val_index.csv: is damaged"),
        (intact.replace("1.mp4,0", "1.mp4,2"), "is damaged .label is out of range: 0 to 1"),
        (intact.replace("15.0", "nan"), "is damaged .fps is out of range: 0 to 1000"),
        (intact.replace(",2,4,0", ",3,4,0"), "is damaged .records are not contiguous"),
        (intact.replace("1.mp4,0,5", "1.mp4,0,-1"), "is damaged .num_frames is out of range"),
        (intact + "3.mp4,0,5,15.0,6,4,0\n", "lists 8 records, but the pack has 6"),
        (intact + "3.mp4,0,5\n", "is damaged"),
        (intact.splitlines()[0] + "\n", "lists no readable video"),
        ("", "lists no readable video"),
        ("id,label,num_frames,fps\n0.mp4,1,5,15.0\n", "has an older layout; run prepare again"),
        (None, "val_index.csv does not exist; run prepare again"),
    ):
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(InputError, match=message) as error:
            open_dataset(section("pack", pack_copy), 2, ("val",))
        assert "\n" not in str(error.value)


@pytest.fixture
def tfds_folder(tmp_path):
    """A TFDS data set that is not from `prepare`, without ids; its second record is damaged."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = tfds.features.FeaturesDict(
        {
            "frames": tfds.features.Sequence(tfds.features.Text()),
            "label": tfds.features.ClassLabel(names=["a", "b"]),
        }
    )
    serializer = ExampleSerializer(features.get_serialized_info())
    path = tmp_path / "other-val.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for i in range(3):
        jpegs = [simplejpeg.encode_jpeg(frame, quality=95 - i) for frame in FRAMES]
        example = features.encode_example({"frames": jpegs, "label": i % 2})
        writer.write(serializer.get_tf_example(example).SerializeToString())
        if i == 1:
            damaged = jpegs[3]
    writer.close()
    split = tfds.core.SplitInfo(
        name="val",
        shard_lengths=[3],
        num_bytes=path.stat().st_size,
        filename_template=tfds.core.ShardedFileTemplate(
            dataset_name="other", data_dir=tmp_path, split="val", filetype_suffix="array_record"
        ),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=tmp_path, features=features, split_infos=[split], check_data=False
    )
    data = bytearray(path.read_bytes())
    data[data.index(damaged) + 100] ^= 8
    path.write_bytes(data)
    return tmp_path


def test_damaged_records_of_other_tfds_data_sets_are_masked(tfds_folder, monkeypatch):
    records = open_dataset(section("pack", tfds_folder), 2, ("val",)).records["val"]
    record_numbers, read = [], PackRecords.read

    def log_and_read(self, records):
        record_numbers.extend(records)
        return read(self, records)

    monkeypatch.setattr(PackRecords, "read", log_and_read)
    spec = ClipSpec(num_frames=6, crop=32, short_side=32)
    [batch] = make_eval_iter(records, spec=spec, batch_size=3, num_threads=1)
    _, ids, errors = split_batch(batch)
    assert sorted(record_numbers) == [0, 1, 2]
    assert batch["mask"].tolist() == [True, False, True]
    assert batch["label"].tolist() == [0, 0, 0]
    assert ids == ["val/0", "val/1", "val/2"]
    assert "record 1 of split 'val' cannot be read" in errors[1]
    expected = FRAMES[batch["indices"][2, 0]]
    assert abs(batch["video"][2, 0].astype(int) - expected).mean() < 25
    assert [(record.id, record.label) for record in records] == [
        ("val/0", 0), ("val/1", 0), ("val/2", 0)
    ]  # fmt: skip


def test_damaged_packs_are_refused(pack_copy):
    data = section("pack", pack_copy)

    def refuse(message):
        with pytest.raises(InputError, match=message) as error:
            open_dataset(data, 2, ("val",))
        assert "\n" not in str(error.value)

    info = pack_copy / "dataset_info.json"
    metadata = json.loads(info.read_text())
    info.write_text(json.dumps(metadata)[:-20])
    refuse("no readable pack")
    template = "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    metadata["splits"][0]["filepathTemplate"] = template
    info.write_text(json.dumps(metadata))
    refuse("is outside of")
    metadata["splits"][0]["filepathTemplate"] = template[3:]
    info.write_text(json.dumps(metadata))
    (pack_copy / "jaxvid-val.array_record-00001-of-00002").unlink()
    refuse("1 of 2 files do not exist, first .*00001-of-00002; run prepare again")
    info.unlink()
    refuse("no readable pack .*run jaxvid.data.prepare")


def test_unknown_sources_are_refused(tmp_path):
    with pytest.raises(InputError, match="data.source='web': must be one of 'motion', 'folder', "):
        open_dataset(section("web", tmp_path), 2, ("val",))


@pytest.mark.parametrize("text", [None, "", "\n\n", "a\n", "a\nb, c\nd\n", "a\na\n"])
def test_packs_with_missing_or_wrong_class_names_are_refused(pack_copy, text):
    """If the file of class names is missing, TFDS returns the label numbers as names."""
    path = pack_copy / "label.labels.txt"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(InputError) as error:
        open_dataset(section("pack", pack_copy), 2, ("val",))
    message = str(error.value)
    assert "\n" not in message
    if text in (None, "", "\n\n"):
        state = "does not exist" if text is None else "contains 0 class names, not 2"
        assert f"label.labels.txt: {state}; write 2 class names, one per line" in message


def test_h5_packs_without_class_names_are_refused(pack, tmp_path):
    prepare([pack.parent / "val.csv"], tmp_path / "h5", Settings("h5"), workers=1)
    assert open_dataset(section("xvit_h5", tmp_path / "h5"), 2, ("val",)).labels == ["a", "b, c"]
    (tmp_path / "h5" / "labels.txt").unlink()
    with pytest.raises(
        InputError, match="labels.txt does not exist; write one class name per line"
    ):
        open_dataset(section("xvit_h5", tmp_path / "h5"), 2, ("val",))


@pytest.mark.parametrize(
    "name",
    ["dataset_info.json", "features.json", "label.labels.txt", "val_index.csv", "val_offsets.bin"],
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_metadata_files_that_are_not_regular_are_refused_without_blocking(pack_copy, name, kind):
    path = pack_copy / name
    path.unlink()
    {
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "folder": Path.mkdir,
        "loop": lambda path: path.symlink_to(name),
    }[kind](path)
    with pytest.raises(InputError) as error:
        open_dataset(section("pack", pack_copy), 2, ("val",))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"shardLengths": ["-1", "7"]},
        {"shardLengths": ["9223372036854775807", "1"]},
        {"shardLengths": ["2"]},
        {"shardLengths": "two"},
        {"filepathTemplate": "{"},
        {"filepathTemplate": "{NOTHING}"},
        {"filepathTemplate": "%s/%d"},
        {"filepathTemplate": "/etc/passwd"},
        {"filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}"},
        {"filepathTemplate": 7},
        {"name": "train"},
        {"name": ""},
        {"name": ["val"]},
        {"numBytes": "many"},
    ],
)
def test_invalid_split_metadata_is_refused(pack_copy, change):
    path = pack_copy / "dataset_info.json"
    metadata = json.loads(path.read_text())
    metadata["splits"][0] |= change
    path.write_text(json.dumps(metadata))
    with pytest.raises(InputError) as error:
        open_dataset(section("pack", pack_copy), 2, ("val",))
    assert "\n" not in str(error.value)
    assert str(pack_copy) in str(error.value)


def test_overflowing_numbers_in_an_index_are_refused(pack_copy):
    path = pack_copy / "val_index.csv"
    intact = path.read_text()
    for number in ("9223372036854775807", "9" * 400, "1e999", "4611686018427387904"):
        for old, new in (
            ("0.mp4,1,5,", f"0.mp4,1,{number},"),
            ("0.mp4,1,5,15.0", f"0.mp4,1,5,{number}"),
            ("0.mp4,1,", f"0.mp4,{number},"),
            ("15.0,0,4,", f"15.0,{number},4,"),
            ("15.0,0,4,", f"15.0,0,{number},"),
        ):
            path.write_text(intact.replace(old, new))
            assert path.read_text() != intact
            with pytest.raises(InputError, match="val_index.csv: is damaged") as error:
                open_dataset(section("pack", pack_copy), 2, ("val",))
            assert "\n" not in str(error.value)
