"""Packed frames: ArrayRecord files of JPEG pictures, of which only the wanted ones are read."""

import bisect
import contextlib
import dataclasses
import functools
import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxvid.data.decode import DecodeError
from jaxvid.data.jpegs import JpegFrames, import_or_explain, keep_freed_memory
from jaxvid.data.table import Listed, Table, table_path
from jaxvid.errors import InputError, one_line

FIELDS = ("label", "fps", "id", "first", "num_frames", "times")  # of a record, beside its frames


@functools.cache
def import_tfds():
    """TFDS, which needs no TensorFlow for what is done here.

    Raises:
        InputError: It, or one of the packages that it needs without saying so, is missing.
    """
    for module in ("importlib_resources", "array_record"):
        import_or_explain(module, module)
    tfds = import_or_explain("tensorflow_datasets", "tensorflow-datasets")
    if not hasattr(tfds, "builder_from_directory"):  # a dependency's ImportError was swallowed
        raise InputError("tensorflow-datasets is incomplete: pip install -r requirements.txt")
    return tfds


def _make_builder(name: str, is_folder: bool):
    tfds = import_tfds()
    try:
        return tfds.builder_from_directory(name) if is_folder else tfds.builder(name)
    except Exception as error:  # TFDS raises anything, protobuf's errors among them
        way_out = "run jaxvid.data.prepare" if is_folder else "make it with TFDS"
        raise InputError(f"{name}: no readable pack ({one_line(error)}); {way_out}") from None


class PackRecords(Sequence):
    """The videos of a split of a TFDS data set; its files are opened when they are first read.

    A record of what `prepare` writes is a run of frames, and a table tells which are a video's. Of
    any other data set a record is a video, with `frames`, `label` and perhaps `fps`.

    Attributes:
        labels: Names of the classes.
        paths: The files that the split lies in.

    Args:
        name: A folder that `prepare` wrote, or the name of a TFDS data set.
        split: Which split.
        is_folder: Which of the two `name` is.

    Raises:
        InputError: It is missing or damaged, has no such split or other features, a file of it is
            missing or lies outside its folder.
    """

    def __init__(self, name: str, split: str, *, is_folder: bool):
        self.name, self.split = name, split
        self._readers, self._lock = {}, threading.Lock()
        builder = _make_builder(name, is_folder)
        if split not in builder.info.splits:
            raise InputError(f"{name}: no split {split!r} in it, only {list(builder.info.splits)}")
        features, info = builder.info.features, builder.info.splits[split]
        if (kind := builder.info.file_format.value) != "array_record":
            raise InputError(f"{name}: its files are {kind}; make it with TFDS as array_record")
        if not {"frames", "label"} <= set(features) or not hasattr(features["label"], "names"):
            raise InputError(
                f"{name}: its features are {sorted(features)}; needed are 'frames', a Sequence of "
                "Text with JPEG bytes, and 'label', a ClassLabel"
            )
        self.labels = list(features["label"].names)
        root = os.path.abspath(builder.data_dir)
        self.paths = [os.path.abspath(path) for path in info.filepaths]
        self._ends = list(itertools.accumulate(info.shard_lengths))  # of each file's records
        if outside := [path for path in self.paths if not path.startswith(root + os.sep)]:
            raise InputError(f"{name}: its file {outside[0]} lies outside {root}; make it again")
        if missing := [path for path in self.paths if not os.path.isfile(path)]:
            raise InputError(
                f"{missing[0]} and {len(missing) - 1} more of {len(self.paths)} files do not "
                "exist; run prepare again"
            )
        table = table_path(Path(root), split)
        self._table = None
        if "first" in features or table.is_file():  # without the one it is of an older layout
            self._table = Table(table, info.num_examples, len(self.labels))

    def read(self, record: int) -> dict:
        """Reads a record.

        Returns:
            `frames`, JPEG bytes, `label`, and `fps` if there is one; of what `prepare` wrote also
            the others of `packing.make_features`.

        Raises:
            DecodeError: It is damaged.
        """
        try:
            file = bisect.bisect_right(self._ends, record)
            place = record - (self._ends[file - 1] if file else 0)
            # Asked for records by a list, it takes time in proportion to all that the file holds.
            [data] = self._open_file(file).read(place, place + 1)
            features = _example_type().FromString(data).features.feature
            found = {"frames": features["frames"].bytes_list.value}
            for name in ("label", "fps") if self._table is None else FIELDS:
                if kind := features[name].WhichOneof("kind"):
                    found[name] = getattr(features[name], kind).value[0]
            if not found["frames"]:
                raise ValueError("its frames are no JPEG bytes")
            if self._table is not None and len(found) <= len(FIELDS):
                raise ValueError(f"there is only {', '.join(found)} in it")
            if not 0 <= found["label"] < len(self.labels):
                raise ValueError(f"label {found['label']} is none of {len(self.labels)}")
            return found
        except Exception as error:  # array_record's and protobuf's errors share no base
            raise self.error(record, f"cannot be read ({one_line(error)})") from None

    def error(self, record: int, what: str) -> DecodeError:
        """An error about a record."""
        way_out = "make it again with TFDS" if self._table is None else "run prepare again"
        return DecodeError(
            f"{self.name}: record {record} of split {self.split!r} {what}; {way_out}"
        )

    def _open_file(self, file: int):
        if reader := self._readers.get(file):
            return reader
        with self._lock:
            if file not in self._readers:
                keep_freed_memory()
                from array_record.python.array_record_module import ArrayRecordReader

                self._readers[file] = ArrayRecordReader(
                    self.paths[file],
                    options="readahead_buffer_size:0,max_parallelism:0",
                    file_reader_buffer_size=2**15,
                )
            return self._readers[file]  # can be read from several threads

    def __len__(self) -> int:
        return self._ends[-1] if self._table is None else len(self._table)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: {index} outside 0..{len(self) - 1}")
        index = int(index) % len(self)
        return (
            TfdsVideo(self, index) if self._table is None else PackedVideo(self, self._table[index])
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_readers": {}, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


@functools.cache
def _example_type():
    """The protobuf message of a record."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


@dataclasses.dataclass(frozen=True)
class PackedVideo:
    """A labelled video of a pack that has a table. Opening it reads nothing.

    Attributes:
        records: The split that it belongs to.
        listed: What the table tells of it.
    """

    records: PackRecords
    listed: Listed

    @property
    def id(self) -> str:
        """Its id, unique in the split."""
        return self.listed.id

    @property
    def label(self) -> int:
        """Its class."""
        return self.listed.label

    def open(self) -> JpegFrames:
        """Opens the video; damage to a record is found when it is read.

        Raises:
            DecodeError: It could not be decoded when the pack was made.
        """
        if not self.listed.num_frames:
            raise DecodeError(
                f"{self.records.name}: {self.listed.id}: could not be decoded when it was packed "
                "(report.json there says why); restore it and run prepare again, or leave it out"
            )
        listed, read = self.listed, functools.lru_cache(1)(self._read)

        def get(i: int) -> bytes:
            number, place = divmod(i, listed.frames_per_record)
            return read(number)["frames"][place]

        def get_times() -> np.ndarray:
            data = read(0)["times"]
            times = np.frombuffer(data[: len(data) // 8 * 8], "<f8")
            if len(times) != listed.num_frames or not (np.diff(times) >= 0).all():
                raise self.records.error(listed.record, "does not tell the times of its frames")
            return times

        return JpegFrames(
            f"{self.records.name}: {listed.id}",
            listed.num_frames,
            listed.fps or None,
            get,
            get_times=get_times if listed.has_times else None,
        )

    def _read(self, number: int) -> dict:
        """Reads one of its records and makes sure that it is that.

        Raises:
            DecodeError: The record is damaged, or is not the one in the table.
        """
        listed = self.listed
        found = self.records.read(listed.record + number)
        first = number * listed.frames_per_record
        count = min(listed.frames_per_record, listed.num_frames - first)
        rate = np.float32(listed.fps)  # the precision that it has in the record
        says = (listed.id.encode(), listed.label, count, listed.num_frames, rate, first)
        told = (found["id"], found["label"], len(found["frames"]), found["num_frames"])
        told += (found["fps"], found["first"])
        if told != says:
            form = "{!r}, label {}, {} of {} frames, {:.6g} frames/s, from frame {}"
            told, says = (form.format(row[0].decode(), *row[1:]) for row in (told, says))
            what = f"is {told}; its table says {says}"
            raise self.records.error(listed.record + number, what)
        return found


@dataclasses.dataclass
class TfdsVideo:
    """A labelled video that is a record of a TFDS data set; its label is known by reading it.

    Attributes:
        records: The split that it belongs to.
        index: Its place in it.
    """

    records: PackRecords
    index: int
    _label: int | None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def id(self) -> str:
        """Its split and place, which need no reading."""
        return f"{self.records.split}/{self.index}"

    @property
    def label(self) -> int:
        """Its class; 0 where the record cannot be read."""
        if self._label is None:
            with contextlib.suppress(DecodeError):
                self.open()
        return self._label

    def open(self) -> JpegFrames:
        """Opens the video.

        Raises:
            DecodeError: Its record is damaged.
        """
        self._label = 0
        found = self.records.read(self.index)
        self._label = found["label"]
        frames, fps = found["frames"], found.get("fps", 0.0)
        rate = float(fps) if 0.01 <= fps <= 1000 else None
        return JpegFrames(f"{self.records.name}: {self.id}", len(frames), rate, frames.__getitem__)
