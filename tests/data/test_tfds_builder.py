"""The TFDS builder of packs, compared with `jaxvid prepare`."""

import sys

import pytest
import tensorflow_datasets as tfds

from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.prepare import prepare
from jaxvid.data.sources import DatasetConfig, open_dataset
from jaxvid.data.synthetic_motion import LABELS
from jaxvid.data.tfds_builder import PackBuilder
from jaxvid.errors import InputError
from tests.data.packs import read_pack

SETTINGS = Settings(clips_per_file=20, short_side=32, frames=4)


@pytest.fixture
def builder(motion_folder, tmp_path):
    """A builder of the motion clips."""

    class MotionVideos(PackBuilder, skip_registration=True):
        VERSION = "1.0.0"
        INPUTS = (str(motion_folder),)
        SETTINGS = SETTINGS

    return MotionVideos(data_dir=tmp_path / "tfds")


def test_the_builder_writes_the_same_bytes_as_prepare(builder, motion_folder, tmp_path):
    builder.download_and_prepare()
    prepare([motion_folder], tmp_path / "pack", SETTINGS, workers=1)
    built = tmp_path / "tfds" / "motion_videos" / "1.0.0"
    without = ("dataset_info.json",)  # TFDS adds the name, version and description
    assert read_pack(built, without=without) == read_pack(tmp_path / "pack", without=without)
    assert len([*built.glob("*.array_record-*")]) == 5
    assert "tensorflow" not in sys.modules


def test_a_built_data_set_is_read_by_tfds_and_by_name(builder, tmp_path):
    builder.download_and_prepare()
    [example, *_] = tfds.data_source("motion_videos", split="val", data_dir=tmp_path / "tfds")
    assert (example["id"], example["num_frames"]) == (b"val/00000.mp4", 4)
    assert builder.info.splits["train"].num_examples == 48 * 4
    data = DatasetConfig(
        source="tfds", folder="", name="motion_videos", tfds_dir=str(tmp_path / "tfds")
    )
    dataset = open_dataset(data, len(LABELS), ("train", "val"))
    assert [len(records) for records in dataset.records.values()] == [48, 24]
    assert dataset.records["val"][0].id == "val/00000.mp4"
    sliced = DatasetConfig(**vars(data) | {"splits": {"val": "train[90%:]"}})
    with pytest.raises(InputError, match="would cut videos, because a pack has several records"):
        open_dataset(sliced, len(LABELS), ("val",))


def test_videos_of_a_built_data_set_may_be_deleted(builder, tmp_path, monkeypatch):
    builder.download_and_prepare()
    monkeypatch.setattr(type(builder), "INPUTS", (str(tmp_path / "nowhere"),))
    again = type(builder)(data_dir=tmp_path / "tfds")
    assert again.info.features["label"].names == list(LABELS)


def test_builders_refuse_wrong_inputs(builder, tmp_path, monkeypatch):
    monkeypatch.setattr(type(builder), "SETTINGS", Settings("h5"))
    with pytest.raises(InputError, match="SETTINGS.format=h5: must be 'arrayrecord'"):
        builder.download_and_prepare()
    monkeypatch.setattr(type(builder), "INPUTS", (str(tmp_path / "nowhere"),))
    with pytest.raises(InputError, match="nowhere does not exist"):
        type(builder)(data_dir=tmp_path / "other").download_and_prepare()


def test_kinetics_annotations_are_packed(builder, motion_folder, tmp_path, monkeypatch):
    folder = tmp_path / "kinetics"
    (folder / "train").mkdir(parents=True)
    lines = ["label,youtube_id,time_start,time_end,split"]
    for i, label in enumerate(("dancing", "abseiling")):
        name = f"video_{i}_000001_000011.mp4"
        (folder / "train" / name).symlink_to(motion_folder / "val" / f"{i:05d}.mp4")
        lines.append(f"{label},video_{i},1,11,train")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(type(builder), "INPUTS", (str(folder / "train.csv"),))
    kinetics = type(builder)(data_dir=tmp_path / "tfds")
    kinetics.download_and_prepare()
    assert kinetics.info.features["label"].names == ["abseiling", "dancing"]
    prepare([folder / "train.csv"], tmp_path / "pack", SETTINGS, workers=1)
    built, without = tmp_path / "tfds" / "motion_videos" / "1.0.0", ("dataset_info.json",)
    assert read_pack(built, without=without) == read_pack(tmp_path / "pack", without=without)
