"""Video sets of TFDS: `data.source=tfds`."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from jaxvid.data.formats.tfds_api import parse_record
from jaxvid.data.sources import DatasetConfig, open_dataset
from jaxvid.errors import InputError
from jaxvid.train import train
from tests.data.tfds_ucf101 import CLASSES, class_names, make_frames, write_ucf101

# Two training files and one test file: videos `(number, label)`.
SPLITS = {"train": [[(0, 0), (1, 2)], [(2, 100), (3, 2), (4, 0)]], "test": [[(5, 2), (6, 100)]]}


def to_png(frame: np.ndarray, mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    Image.fromarray(frame).convert(mode).save(data, "PNG")
    return data.getvalue()


def tfds(data_dir, name="ucf101:2.0.0", **fields) -> DatasetConfig:
    return DatasetConfig(source="tfds", folder="", name=name, tfds_dir=str(data_dir), **fields)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with a miniature of ucf101."""
    folder = tmp_path_factory.mktemp("tfds")
    write_ucf101(folder, SPLITS)
    return folder


def ids(dataset, split="train"):
    return [record.id for record in dataset.records[split]]


@pytest.mark.parametrize("name", ["ucf101:2.0.0", "ucf101", "ucf101/ucf101_1_256", "ucf101:2.*.*"])
def test_ucf101_is_opened_by_name(data_dir, name):
    dataset = open_dataset(tfds(data_dir, name), CLASSES, ("train", "val"))
    assert dataset.labels == class_names()
    assert ids(dataset) == [f"train/{i}" for i in range(5)]
    assert ids(dataset, "val") == ["test/0", "test/1"]
    assert [record.label for record in dataset.records["train"]] == [0, 2, 100, 2, 0]
    assert dataset.notes == ("data.splits.val is not set: validation uses the split 'test'",)
    with dataset.records["train"][3].open() as video:
        assert (video.num_frames, video.fps, video.times) == (8, None, None)
        frames = video.get_frames([7, 0]).astype(int)
    assert abs(frames - make_frames(3)[[7, 0]]).max() <= 3


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("feature", ["video", "frames"])
def test_png_frames_are_read_exactly(tmp_path, mode, feature):
    def encode(frame):
        return to_png(frame, mode)

    write_ucf101(tmp_path, {"train": [[(3, 1)]]}, encode, feature=feature)
    [record] = open_dataset(tfds(tmp_path), CLASSES, ("train",)).records["train"]
    with record.open() as video:
        frames = video.get_frames(range(8))
    expected = [Image.fromarray(frame).convert(mode).convert("RGB") for frame in make_frames(3)]
    np.testing.assert_array_equal(frames, np.stack(expected))


def test_features_of_a_record_are_selected_by_name_and_type():
    example = tf_example_pb2.Example()
    features = example.features.feature
    features["fps"].int64_list.value.append(25)
    features["label"].bytes_list.value.append(b"3")
    features["other"].bytes_list.value.append(b"x")
    features["video"].bytes_list.value.extend([b"a", b"b"])
    features["id"].bytes_list.value.extend([])
    names = ("video", "label", "fps", "id", "times")
    values = parse_record(example.SerializeToString(), names)
    assert [*values] == ["video", "fps"]
    assert [*values["video"]] == [b"a", b"b"]
    assert [*values["fps"]] == [25]


def test_slices_keep_the_ids_of_the_whole_split(data_dir):
    splits = {"train": "train[:60%]", "val": "train[60%:]"}
    dataset = open_dataset(tfds(data_dir, splits=splits), CLASSES, ("train", "val"))
    assert ids(dataset) == ["train/0", "train/1", "train/2"]
    assert ids(dataset, "val") == ["train/3", "train/4"]
    assert [record.label for record in dataset.records["val"]] == [2, 0]
    both = open_dataset(tfds(data_dir, splits={"train": "test+train[-1:]"}), CLASSES, ("train",))
    assert ids(both) == ["test/0", "test/1", "train/4"]
    assert [record.label for record in both.records["train"]] == [2, 100, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "ucf101:1.0.0"}, "data.name=ucf101:1.0.0: not found in .*; create it with"),
        ({"name": "a b"}, "data.name=a b: is not the name of a TFDS data set .*expected NAME"),
        ({"name": ""}, "data.name is empty; set it to a TFDS data set"),
        ({"splits": {"val": "dev"}}, r"ucf101:2.0.0: has no split 'dev', only \['train', 'test'\]"),
        ({"splits": {"val": "train[:x]"}}, "Error parsing split 'train.*; correct data.splits"),
        ({"splits": {"val": "test[:0]"}}, "has no split 'test.:0.'"),
    ],
)
def test_wrong_names_and_splits_are_refused(data_dir, fields, message):
    with pytest.raises(InputError, match=message) as error:
        open_dataset(tfds(data_dir, **fields), CLASSES, ("val",))
    assert "\n" not in str(error.value)


def test_fields_of_tfds_need_the_source_tfds():
    with pytest.raises(InputError, match="data.name=ucf101: needs data.source='tfds'"):
        DatasetConfig(source="folder", folder="data", name="ucf101")
    with pytest.raises(InputError, match="data.splits: needs data.source='tfds'"):
        DatasetConfig(source="pack", folder="data", splits={"train": "", "val": "test"})


def test_tfrecord_files_are_refused_until_they_are_converted(tmp_path):
    folder = write_ucf101(tmp_path, SPLITS, file_format="tfrecord")
    with pytest.raises(InputError) as error:
        open_dataset(tfds(tmp_path), CLASSES, ("train",))
    command = f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record"
    assert str(error.value).endswith(command)
    # The command writes the other files into the same folder and adds one field.
    for path in folder.glob("*.tfrecord-*"):
        path.rename(path.with_name(path.name.replace("tfrecord", "array_record")))
    info = folder / "dataset_info.json"
    metadata = json.loads(info.read_text()) | {"alternativeFileFormats": ["array_record"]}
    info.write_text(json.dumps(metadata))
    assert len(ids(open_dataset(tfds(tmp_path), CLASSES, ("train",)))) == 5


def test_training_from_ucf101_needs_no_tensorflow(config, data_dir, tmp_path):
    with config.unlocked():
        config.data.update(source="tfds", folder="", name="ucf101:2.0.0", tfds_dir=str(data_dir))
        config.model.num_classes, config.batch_size, config.num_epochs = CLASSES, 8, 1.0
    result = train(config, tmp_path / "run")
    assert (result["num_videos"], result["num_failed"]) == (2, 0)
    assert "tensorflow" not in sys.modules


@pytest.mark.full
def test_tfds_writes_the_same_files(tmp_path):
    """Runs where TensorFlow and ffmpeg's stand-in can be imported: `make test-tfds`."""
    pytest.importorskip("tensorflow", reason="TensorFlow, with which TFDS writes ucf101")
    written = write_ucf101(tmp_path / "here", {"train": [[(0, 0), (1, 2)]], "test": [[(2, 100)]]})
    script = Path(__file__).with_name("write_ucf101_with_tfds.py")
    subprocess.run([sys.executable, script, tmp_path / "tfds"], check=True)
    folder = tmp_path / "tfds" / written.relative_to(tmp_path / "here")
    assert {p.name for p in folder.iterdir()} == {p.name for p in written.iterdir()}
    for name in ("features.json", "label.labels.txt"):
        assert (folder / name).read_bytes() == (written / name).read_bytes()
    infos = [json.loads((path / "dataset_info.json").read_text()) for path in (folder, written)]
    assert infos[0] | infos[1] == infos[0]  # TFDS also writes a citation and a location
    for split in ("train", "test"):
        paths = [next(path.glob(f"ucf101-{split}.*")) for path in (folder, written)]
        assert sorted(read(paths[0])) == sorted(read(paths[1]))  # TFDS shuffles the records


def read(path):
    """Return the records of a file, serialized with sorted features."""
    from array_record.python.array_record_module import ArrayRecordReader
    from tensorflow_datasets.proto import tf_example_pb2

    return [
        tf_example_pb2.Example.FromString(data).SerializeToString(deterministic=True)
        for data in ArrayRecordReader(str(path)).read_all()
    ]
