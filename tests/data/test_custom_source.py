"""Custom data sources with only the members that CONTRIBUTING.md requires."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jaxvid.data import sources
from jaxvid.data.formats.frame_array import FrameArray
from jaxvid.data.formats.jpeg_reader import JpegFrames
from jaxvid.data.formats.packed_videos import PackedVideo, TfdsVideo
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.data.formats.xvit_hdf5 import H5Record
from jaxvid.data.protocols import VideoReader, VideoRecord
from jaxvid.data.records import LostVideo, Record
from jaxvid.data.sources import VideoDataset
from jaxvid.data.synthetic_motion import LABELS
from jaxvid.evaluate import evaluate
from jaxvid.experiment import resolve
from jaxvid.train import train
from jaxvid.training import checkpoint


class ArrayReader:
    """A reader of frames in memory, with the members of `VideoReader` and no others."""

    fps = 15.0
    times = None

    def __init__(self, frames):
        self.num_frames, self._frames = len(frames), frames

    def __enter__(self):  # noqa: D105
        return self

    def __exit__(self, *exception):  # noqa: D105
        pass

    def get_frames(self, indices):
        return self._frames[list(indices)]


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """A record of a `.npy` file, with the members of `VideoRecord` and no others."""

    id: str
    label: int
    path: Path | None

    def open(self):
        try:
            return ArrayReader(np.load(self.path))
        except (OSError, ValueError) as error:
            raise DecodeError(f"{self.path}: cannot be read ({error})") from None


def open_arrays(data, num_classes, splits):
    """Open `FOLDER/SPLIT/NUMBER.npy`; a label is NUMBER modulo the number of classes."""
    return VideoDataset(
        {
            split: [
                ArrayRecord(path.stem, int(path.stem) % num_classes, path)
                for path in sorted((Path(data.folder) / split).glob("*.npy"))
            ]
            for split in splits
        },
        list(LABELS[:num_classes]),
    )


def open_memory(data, num_classes, splits):
    """Open the videos of `open_arrays` as records in memory, which have no file."""
    dataset = open_arrays(data, num_classes, splits)
    return dataclasses.replace(
        dataset,
        records={
            split: [
                MemoryRecord(record.id, record.label, np.load(record.path)) for record in records
            ]
            for split, records in dataset.records.items()
        },
    )


@dataclasses.dataclass(frozen=True)
class MemoryRecord:
    id: str
    label: int
    frames: np.ndarray
    path = None

    def open(self):
        return ArrayReader(self.frames)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """A folder with 16 training videos and 8 validation videos of noise."""
    folder, rng = tmp_path_factory.mktemp("arrays"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        (folder / split).mkdir()
        for i in range(count):
            frames = rng.integers(0, 256, (9, 72, 72, 3), np.uint8)
            np.save(folder / split / f"{i}.npy", frames)
    return folder


@pytest.mark.parametrize("open_source", [open_arrays, open_memory])
def test_a_custom_source_trains_and_evaluates(config, arrays, tmp_path, monkeypatch, open_source):
    monkeypatch.setitem(sources.SOURCES, "arrays", open_source)
    with config.unlocked():
        config.data.source, config.data.folder = "arrays", str(arrays)
        config.batch_size, config.num_epochs = 8, 1.0
        config.data.skip_broken = True
    trained = train(config, tmp_path / "run")
    assert checkpoint.newest_step(tmp_path / "run") == 2
    with config.unlocked():
        config.init_from = str(tmp_path / "run" / "model")
    evaluated = evaluate(config, tmp_path / "eval")
    assert evaluated["num_videos"] == trained["num_videos"] == 8
    assert evaluated["top1"] == trained["top1"]


def test_decode_errors_of_a_custom_source_are_counted(config, arrays, tmp_path, monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "arrays", open_arrays)
    for path in arrays.glob("*/*.npy"):
        copy = tmp_path / "data" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "data" / "val" / "3.npy").write_bytes(b"damaged")
    with config.unlocked():
        config.data.source, config.data.folder = "arrays", str(tmp_path / "data")
        config.batch_size, config.num_epochs = 8, 1.0
    result = train(config, tmp_path / "run")
    assert (result["num_videos"], result["num_failed"]) == (8, 1)


def test_a_custom_source_with_the_wrong_number_of_classes_is_refused(
    config, arrays, tmp_path, monkeypatch
):
    monkeypatch.setitem(
        sources.SOURCES, "arrays", lambda data, num_classes, splits: open_arrays(data, 7, splits)
    )
    with config.unlocked():
        config.data.source, config.data.folder = "arrays", str(arrays)
    with pytest.raises(sources.InputError, match="the data has 7 classes, but model.num_classes=8"):
        sources.open_dataset(resolve(config).dataset, 8, ("val",))


def members(protocol) -> set[str]:
    """Return the names of a protocol's attributes, without its methods."""
    return {name for name in vars(protocol) if not name.startswith("_")} - {"open", "get_frames"}


@pytest.mark.parametrize("record", [Record, H5Record, PackedVideo, TfdsVideo, LostVideo])
def test_records_satisfy_the_protocol(record):
    fields = {field.name for field in dataclasses.fields(record)} | {*dir(record)}
    assert members(VideoRecord) | {"open"} <= fields


def test_readers_satisfy_the_protocol(motion_folder):
    video = VideoFile(motion_folder / "val" / "00000.mp4")
    array = FrameArray(np.zeros((1, 8, 8, 3), np.uint8))
    for reader in (video, JpegFrames("x", 1, None, lambda numbers: [b""]), array):
        with reader:
            for name in members(VideoReader):
                getattr(reader, name)
        assert callable(reader.get_frames)
