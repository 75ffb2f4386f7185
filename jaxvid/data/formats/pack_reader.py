"""Reader of packs and other TFDS data sets whose ArrayRecord files contain encoded frames."""

import bisect
import contextlib
import itertools
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxvid.block_cache import address_of
from jaxvid.data.formats.array_record_file import ArrayRecordFile
from jaxvid.data.formats.pack_index import LABEL_FILE, PackIndex, check_label_file, table_path
from jaxvid.data.formats.packed_videos import PackedVideo, TfdsVideo
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
        for record, data in zip(records, self.read_data(records), strict=True):
            yield self.parse(record, data)

    def read_data(self, records: Sequence[int]) -> Iterator[bytes]:
        """Yield records as they are stored. Errors: as in `read`."""
        for file, group in itertools.groupby(records, self._file_of):
            numbers = [*group]
            contents = self._open_file(file).read([self._position(file, i) for i in numbers])
            for record in numbers:
                try:
                    data = next(contents)
                except InputError:  # the store of a remote pack cannot be reached
                    raise
                except Exception as error:  # exceptions of array_record have no common base
                    raise self._unreadable(record, error) from None
                yield data

    def parse(self, record: int, data: bytes) -> dict:
        """Parse a record. Result and errors: as in `read`."""
        try:
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
        except Exception as error:  # exceptions of protobuf have no common base
            raise self._unreadable(record, error) from None

    def _unreadable(self, record: int, error: Exception) -> DecodeError:
        """Return an error that names a record that cannot be read, and the reason."""
        return self.error(record, f"cannot be read ({one_line(error)})")

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

    def __getitem__(self, index: int | slice) -> PackedVideo | TfdsVideo | list:
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
