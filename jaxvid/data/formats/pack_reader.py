"""Reader of packs and other TFDS data sets whose ArrayRecord files contain encoded frames."""

import bisect
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxvid.block_cache import address_of
from jaxvid.data.formats.array_record_file import ArrayRecordFile
from jaxvid.data.formats.jpeg_reader import JpegFrames
from jaxvid.data.formats.pack_index import (
    LABEL_FILE,
    PackedVideoInfo,
    PackIndex,
    check_label_file,
    table_path,
)
from jaxvid.data.formats.record_offsets import RecordOffsets, offsets_path
from jaxvid.data.formats.tfds_api import (
    MAX_METADATA_BYTES,
    PREPARE,
    RECREATE,
    parse_record,
    read_metadata,
)
from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.errors import InputError, one_line
from jaxvid.files import read_limited

FRAMES = ("video", "frames")  # features that may contain the frames
# Features besides `frames` of a record that `prepare` wrote.
FIELDS = ("label", "fps", "id", "first", "num_frames", "times")


def read_color_matrix(folder: str | Path) -> str | None:
    """Return the `color_matrix` that a pack was made with, or None if it is unknown."""
    try:
        report = json.loads(read_limited(Path(folder) / "report.json", MAX_METADATA_BYTES))
        # Reports without this setting are of older packs, which were made with "tagged".
        return report["settings"].get("color_matrix", "tagged")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


class PackRecords(Sequence):
    """The videos of a split of a TFDS data set. Each file is opened when it is first read.

    In a pack of `prepare`, a record contains consecutive frames of a video, and an index file lists
    the records of each video. In other data sets, a record is a video with the features `video` or
    `frames`, `label` and optionally `fps`.

    Attributes:
        labels: Names of the classes.
        paths: Files of the split.
        is_remote: Whether the files are copies in the cache of remote files.

    Args:
        folder: Folder of a pack or of another TFDS data set.
        split: Name of the split; of a data set that is not a pack, also a slice as in
            `train[:90%]`.
        name: Name of the TFDS data set for messages; empty: the folder is a pack.

    Raises:
        InputError: The data set is missing or damaged, does not have the required features or the
            split, or a file is missing or outside of the folder.
    """

    def __init__(self, folder: str, split: str, name: str = ""):
        self.name, self.split = name or folder, split
        self._readers, self._lock = {}, threading.Lock()
        info = read_metadata(folder, split, RECREATE if name else PREPARE)
        if not info.ranges:
            raise InputError(f"{self.name}: has no split {split!r}, only {info.splits}")
        if info.file_format != "array_record":
            raise InputError(
                f"{self.name}: the files are in the format {info.file_format}; convert them once, "
                "where tensorflow, apache-beam and mlcroissant are installed: tfds convert_format "
                f"--dataset_version_dir={folder} --out_file_format=array_record"
            )
        self._feature = next((name for name in FRAMES if name in info.features), None)
        if self._feature is None or info.labels is None:
            raise InputError(
                f"{self.name}: the features are {sorted(info.features)}; expected 'video' or "
                "'frames' with JPEG or PNG bytes, and 'label', a ClassLabel"
            )
        if not name:  # other TFDS data sets may have classes without names
            check_label_file(Path(info.root) / LABEL_FILE, info.num_classes)
        self.labels, self._ranges = info.labels, info.ranges
        self.paths = [part.path for part in info.ranges]
        self.is_remote = address_of(self.paths[0]) is not None
        # First record after each file.
        self._ends = list(itertools.accumulate(part.length for part in info.ranges))
        root, remedy = info.root, "recreate it with TFDS" if name else "run prepare again"
        if outside := [path for path in self.paths if not path.startswith(root + os.sep)]:
            raise InputError(f"{self.name}: file {outside[0]} is outside of {root}; {remedy}")
        if missing := [path for path in self.paths if not os.path.isfile(path)]:
            raise InputError(
                f"{len(missing)} of {len(self.paths)} files do not exist, first {missing[0]}; "
                f"{remedy}"
            )
        index_file = table_path(Path(root), split)
        self._index = self._offsets = None
        # A pack has both the feature `first` and an index file. If it has only one of them, its
        # layout is older or the index is missing, and PackIndex raises an error.
        if "first" in info.features or os.path.lexists(index_file):
            if not info.is_whole:
                raise InputError(
                    f"{self.name}: {split!r} would cut videos, because a pack has several records "
                    "per video; choose a whole split, or prepare it with --val_share"
                )
            self._index = PackIndex(index_file, self._ends[-1], len(self.labels))
            self._offsets = RecordOffsets.open(offsets_path(Path(root), split), self._ends[-1])
        elif not self._ends[-1]:
            raise InputError(f"{self.name}: split {split!r} is empty; recreate it with TFDS")
        # Features that are read from a record.
        self._features = (self._feature, *(("label", "fps") if self._index is None else FIELDS))

    @property
    def has_ids(self) -> bool:
        """Whether videos have ids of their own. Otherwise, ids are derived from record numbers."""
        return self._index is not None

    @property
    def num_without_offset(self) -> int:
        """Number of records that are read with array_record, which keeps their positions."""
        return 0 if self._offsets else self._ends[-1]

    def find_broken(self) -> list[int]:
        """Return the indices of the videos that could not be decoded when the pack was made."""
        return [] if self._index is None else self._index.find_empty()

    def read(self, records: Sequence[int]) -> Iterator[dict]:
        """Read records.

        Yields:
            For each record, a dict of `frames` (JPEG or PNG bytes), `label`, and `fps` if the
            record has it. For packs of `prepare`, all features of `tfds_api.make_features`.

        Raises:
            DecodeError: A record is damaged, or a feature is missing or invalid.
            InputError: The store of a remote pack cannot be reached or refuses access.
        """
        for file, group in itertools.groupby(records, self._file_of):
            numbers = [*group]
            contents = self._open_file(file).read([self._position(file, i) for i in numbers])
            for record in numbers:
                try:
                    values = self._parse(next(contents))
                except InputError:  # the store of a remote pack cannot be reached
                    raise
                except Exception as error:  # those of array_record and protobuf have no common base
                    raise self.error(record, f"cannot be read ({one_line(error)})") from None
                yield values

    def _parse(self, data: bytes) -> dict:
        """Parse a record; see `read`."""
        features = parse_record(data, self._features)
        if not (frames := features.pop(self._feature, None)):
            raise ValueError(f"the feature {self._feature!r} is missing, empty or not bytes")
        values = {"frames": frames, **{name: data[0] for name, data in features.items()}}
        if self._index is not None and len(values) <= len(FIELDS):
            raise ValueError(f"it has only the features {', '.join(values)}")
        if not 0 <= values["label"] < len(self.labels):
            raise ValueError(
                f"label {values['label']} is out of range: 0 to {len(self.labels) - 1}"
            )
        return values

    def error(self, record: int, problem: str) -> DecodeError:
        """Return an error that names the data set, a record and its problem."""
        remedy = "recreate it with TFDS" if self._index is None else "run prepare again"
        return DecodeError(
            f"{self.name}: record {record} of split {self.split!r} {problem}; {remedy}"
        )

    def id_of(self, record: int) -> str:
        """Return the split and the index of a record in it, which are the same in every slice."""
        file = self._file_of(record)
        part = self._ranges[file]
        return f"{part.split}/{part.first + record - (self._ends[file - 1] if file else 0)}"

    def path_of(self, record: int) -> Path:
        """Return the file that contains a record.

        Videos without frames at the end of a split have a record index past the last record. The
        last file is returned for them.
        """
        return Path(self.paths[min(self._file_of(record), len(self.paths) - 1)])

    def _file_of(self, record: int) -> int:
        """Return the index of the file that contains a record."""
        return bisect.bisect_right(self._ends, record)

    def fetch(self, records: Sequence[int]) -> None:
        """Read records of a remote pack into the cache, with concurrent requests.

        Raises:
            InputError: The store cannot be reached or refuses access.
        """
        positions: dict[int, list[int]] = {}
        for record in records:
            file = self._file_of(record)
            positions.setdefault(file, []).append(self._position(file, record))
        with contextlib.suppress(FileNotFoundError):  # reported by `read`
            for file, numbers in positions.items():
                self._open_file(file).fetch(numbers)

    def _position(self, file: int, record: int) -> int:
        """Return the position of a record in the file that contains it."""
        return record - (self._ends[file - 1] if file else 0) + self._ranges[file].start

    def _open_file(self, file: int) -> ArrayRecordFile:
        """Return a file; open it only once."""
        if opened := self._readers.get(file):
            return opened
        with self._lock:
            if file not in self._readers:
                first = self._ends[file - 1] if file else 0
                self._readers[file] = ArrayRecordFile(self.paths[file], self._offsets, first)
            return self._readers[file]

    def __len__(self) -> int:
        return self._ends[-1] if self._index is None else len(self._index)

    def __getitem__(self, index: int | slice) -> "PackedVideo | TfdsVideo | list":
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: {index} outside 0..{len(self) - 1}")
        index = int(index) % len(self)
        return (
            TfdsVideo(self, index) if self._index is None else PackedVideo(self, self._index[index])
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_readers": {}, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def encode_id(id_: str) -> bytes:
    """Encode an id as records store it: as the bytes of a file name, which need not be UTF-8."""
    return id_.encode("utf-8", "surrogateescape")


@dataclasses.dataclass(frozen=True)
class PackedVideo:
    """A labelled video of a pack with an index. Opening the video does not read any record.

    Attributes:
        records: The split that contains it.
        listed: Its row in the index.
    """

    records: PackRecords
    listed: PackedVideoInfo

    @property
    def id(self) -> str:
        """Its id, unique in the split."""
        return self.listed.id

    @property
    def label(self) -> int:
        """Index of its class."""
        return self.listed.label

    @property
    def path(self) -> Path:
        """The file that contains its first record."""
        return self.records.path_of(self.listed.record)

    def open(self) -> JpegFrames:
        """Open the video. Damage is found only when a record is read.

        Raises:
            DecodeError: The video could not be decoded when the pack was made.
        """
        if not self.listed.num_frames:
            raise DecodeError(
                f"{self.records.name}: {self.listed.id}: could not be decoded when it was packed "
                "(see report.json in that folder); restore it and run prepare again, or leave it "
                "out"
            )
        listed, size = self.listed, self.listed.frames_per_record

        def get(numbers: Sequence[int]) -> Iterator[bytes]:
            groups = {
                part: [*group] for part, group in itertools.groupby(numbers, lambda i: i // size)
            }
            for group, values in zip(groups.values(), self._read([*groups]), strict=True):
                for i in group:
                    yield values["frames"][i % size]

        def get_times() -> np.ndarray:
            [record] = self._read([0])
            data = record["times"]
            # Drop an incomplete last value, so that the check below reports truncated data.
            times = np.frombuffer(data[: len(data) // 8 * 8], "<f8")
            if len(times) != listed.num_frames or not (np.diff(times) >= 0).all():
                raise self.records.error(listed.record, "has no valid frame times")
            return times

        def fetch(numbers: Sequence[int]) -> None:
            parts = {int(i) // size for i in numbers}
            self.records.fetch([listed.record + number for number in parts])

        return JpegFrames(
            f"{self.records.name}: {listed.id}",
            listed.num_frames,
            listed.fps or None,
            get,
            fetch=fetch if self.records.is_remote else None,
            get_times=get_times if listed.has_times else None,
        )

    @functools.cached_property
    def _stored(self) -> tuple[bytes, int, int, float]:
        """Id, label, number of frames and frame rate as all its records contain them."""
        listed = self.listed
        rate = np.float32(listed.fps).item()  # records store it as float32
        return encode_id(listed.id), listed.label, listed.num_frames, rate

    def _read(self, numbers: Sequence[int]) -> Iterator[dict]:
        """Yield records of the video, compared with the index.

        Raises:
            DecodeError: A record is damaged, or differs from the index.
        """
        records = self.records.read([self.listed.record + number for number in numbers])
        for number, values in zip(numbers, records, strict=True):
            self._check(number, values)
            yield values

    def _check(self, number: int, values: dict) -> None:
        """Compare record `number` of the video with the index."""
        listed = self.listed
        first = number * listed.frames_per_record
        count = min(listed.frames_per_record, listed.num_frames - first)
        expected = (*self._stored, first, count)
        names = ("id", "label", "num_frames", "fps", "first")
        actual = (*map(values.__getitem__, names), len(values["frames"]))
        if actual != expected:
            form = "{0!r}, label {1}, {5} of {2} frames, {3:.6g} frames/s, from frame {4}"
            texts = [
                form.format(row[0].decode(errors="replace"), *row[1:]) for row in (actual, expected)
            ]
            problem = f"contains {texts[0]}, but the index lists {texts[1]}"
            raise self.records.error(listed.record + number, problem)


@dataclasses.dataclass
class TfdsVideo:
    """A labelled video that is one record of a TFDS data set. Reading the label reads the record.

    Attributes:
        records: The split that contains it.
        index: Index of its record in the split.
    """

    records: PackRecords
    index: int
    _label: int | None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def id(self) -> str:
        """Split and index of its record: an id that is known without reading the record."""
        return self.records.id_of(self.index)

    @property
    def path(self) -> Path:
        """The file that contains it."""
        return self.records.path_of(self.index)

    @property
    def label(self) -> int:
        """Index of its class; 0 if the record cannot be read."""
        if self._label is None:
            with contextlib.suppress(DecodeError):
                self.open()
        return self._label

    def fetch(self) -> None:
        """Read the record of a remote data set into the cache.

        Raises:
            InputError: The store cannot be reached or refuses access.
        """
        self.records.fetch([self.index])

    def open(self) -> JpegFrames:
        """Open the video.

        Raises:
            DecodeError: Its record is damaged.
        """
        self._label = 0  # remains if reading the record fails
        [values] = self.records.read([self.index])
        self._label = values["label"]
        frames, fps = values["frames"], values.get("fps", 0.0)
        # The shortest decimal gives back 6.4, which float32 stores as 6.4000001.
        rate = float(str(np.float32(fps))) if 0.01 <= fps <= 1000 else None
        get = functools.partial(map, frames.__getitem__)
        return JpegFrames(f"{self.records.name}: {self.id}", len(frames), rate, get)
