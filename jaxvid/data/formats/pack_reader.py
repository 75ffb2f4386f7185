"""Packed frames: ArrayRecord files of JPEG pictures, of which only the wanted ones are read."""

import bisect
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxvid.data.formats.jpeg_reader import JpegFrames, import_or_explain, keep_freed_memory
from jaxvid.data.formats.pack_index import PackedVideoInfo, PackIndex, table_path
from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.errors import InputError, one_line
from jaxvid.files import check_regular, read_limited

LABEL_FILE = "label.labels.txt"  # of TFDS: the names of the classes
MAX_METADATA_BYTES = 2**26  # of each file of metadata
MAX_RECORDS = 2**40  # of a file
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


@dataclasses.dataclass(frozen=True)
class SplitFiles:
    """What a TFDS data set tells of a split.

    Attributes:
        root: The folder of the data set.
        splits: Names of all its splits.
        file_format: Of its files.
        features: Names of the features of a record.
        labels: Names of the classes; None: `label` is no ClassLabel.
        num_classes: Their number.
        paths: The files of the split; empty: there is no such split.
        lengths: Number of records in each.
    """

    root: str
    splits: list[str]
    file_format: str
    features: list[str]
    labels: list[str] | None
    num_classes: int
    paths: list[str]
    lengths: list[int]


def _read_metadata(name: str, split: str, is_folder: bool) -> SplitFiles:
    """Read the metadata of a TFDS data set.

    Raises:
        InputError: There is none, or it is damaged.
    """
    tfds = import_tfds()
    if is_folder:
        for path in [*Path(name).glob("*.json"), *Path(name).glob("*.labels.txt")]:
            with contextlib.suppress(FileNotFoundError):  # a broken link, which TFDS reports
                check_regular(path, MAX_METADATA_BYTES)
    try:
        builder = tfds.builder_from_directory(name) if is_folder else tfds.builder(name)
        features, info = dict(builder.info.features), builder.info.splits.get(split)
        label = features.get("label")
        is_label = isinstance(label, tfds.features.ClassLabel)
        found = SplitFiles(
            root=os.path.abspath(builder.data_dir),
            splits=list(builder.info.splits),
            file_format=builder.info.file_format.value,
            features=list(features),
            labels=list(label.names) if is_label and label.num_classes else None,
            num_classes=int(label.num_classes or 0) if is_label else 0,
            paths=[os.path.abspath(path) for path in info.filepaths] if info else [],
            lengths=[int(length) for length in info.shard_lengths] if info else [],
        )
        if len(found.paths) != len(found.lengths):
            raise ValueError(f"{len(found.paths)} files, but {len(found.lengths)} lengths")
        if not all(0 <= length <= MAX_RECORDS for length in found.lengths):
            raise ValueError(
                f"a file cannot have {min(found.lengths)} or {max(found.lengths)} records"
            )
        return found
    except Exception as error:  # TFDS raises anything, protobuf's errors among them
        way_out = "run jaxvid.data.prepare" if is_folder else "make it with TFDS"
        raise InputError(f"{name}: no readable pack ({one_line(error)}); {way_out}") from None


def _check_label_file(path: Path, num_classes: int) -> None:
    """Refuse a data set without names of its classes; TFDS would number them.

    Raises:
        InputError: The file of names is missing, or names another number of classes than there are.
    """
    try:
        names = {line.strip() for line in path.read_text(encoding="utf-8").split("\n")} - {""}
    except FileNotFoundError:
        names = None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); restore it") from None
    if names is None or len(names) != num_classes:
        problem = "does not exist" if names is None else f"names {len(names)} classes"
        raise InputError(
            f"{path}: {problem}, and the data has {num_classes}; write the name of each class, in "
            "order, on a line of its own, or run prepare again"
        )


def read_color_matrix(folder: str | Path) -> str | None:
    """Return the `color_matrix` that a pack was made with; None if it does not say."""
    try:
        report = json.loads(read_limited(Path(folder) / "report.json", MAX_METADATA_BYTES))
        return report["settings"].get("color_matrix", "tagged")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


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
        info = _read_metadata(name, split, is_folder)
        if split not in info.splits:
            raise InputError(f"{name}: no split {split!r} in it, only {info.splits}")
        if info.file_format != "array_record":
            raise InputError(
                f"{name}: its files are {info.file_format}; make it with TFDS as array_record"
            )
        if "frames" not in info.features or info.labels is None:
            raise InputError(
                f"{name}: its features are {sorted(info.features)}; needed are 'frames', a "
                "Sequence of Text with JPEG bytes, and 'label', a ClassLabel"
            )
        if is_folder:  # other TFDS data sets may name no class
            _check_label_file(Path(info.root) / LABEL_FILE, info.num_classes)
        self.labels, self.paths = info.labels, info.paths
        self._ends = list(itertools.accumulate(info.lengths))  # of each file's records
        root = info.root
        if outside := [path for path in self.paths if not path.startswith(root + os.sep)]:
            raise InputError(f"{name}: its file {outside[0]} lies outside {root}; make it again")
        if missing := [path for path in self.paths if not os.path.isfile(path)]:
            raise InputError(
                f"{missing[0]} and {len(missing) - 1} more of {len(self.paths)} files do not "
                "exist; run prepare again"
            )
        table = table_path(Path(root), split)
        self._table = None
        if "first" in info.features or os.path.lexists(table):  # only one: of an older layout
            self._table = PackIndex(table, self._ends[-1] if self._ends else 0, len(self.labels))
        elif not self._ends or not self._ends[-1]:
            raise InputError(f"{name}: split {split!r} is empty; make it with TFDS again")

    @property
    def has_ids(self) -> bool:
        """Whether videos have ids of their own; else an id is the place of a record."""
        return self._table is not None

    def find_broken(self) -> list[int]:
        """Return the indices of the videos that could not be decoded when the pack was made."""
        return [] if self._table is None else self._table.find_empty()

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


def encode_id(id_: str) -> bytes:
    """Return an id as a record holds it: the bytes of a path, which need not be UTF-8."""
    return id_.encode("utf-8", "surrogateescape")


@dataclasses.dataclass(frozen=True)
class PackedVideo:
    """A labelled video of a pack that has a table. Opening it reads nothing.

    Attributes:
        records: The split that it belongs to.
        listed: What the table tells of it.
    """

    records: PackRecords
    listed: PackedVideoInfo

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
        says = (encode_id(listed.id), listed.label, count, listed.num_frames, rate, first)
        told = (found["id"], found["label"], len(found["frames"]), found["num_frames"])
        told += (found["fps"], found["first"])
        if told != says:
            form = "{!r}, label {}, {} of {} frames, {:.6g} frames/s, from frame {}"
            told, says = (
                form.format(row[0].decode(errors="replace"), *row[1:]) for row in (told, says)
            )
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
        # The shortest decimal: 6.4 is 6.4000001 in float32.
        rate = float(str(np.float32(fps))) if 0.01 <= fps <= 1000 else None
        return JpegFrames(f"{self.records.name}: {self.id}", len(frames), rate, frames.__getitem__)
