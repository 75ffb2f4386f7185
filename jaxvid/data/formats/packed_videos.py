"""The videos of a pack or of another TFDS data set, as `pack_reader.PackRecords` lists them."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxvid.data.formats.jpeg_reader import JpegFrames
from jaxvid.data.formats.pack_index import PackedVideoInfo
from jaxvid.data.formats.tfds_api import make_example, take_frames
from jaxvid.data.formats.video_reader import DecodeError

if TYPE_CHECKING:
    from jaxvid.data.formats.pack_reader import PackRecords


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

    records: "PackRecords"
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
            for group, frames in zip(groups.values(), self._read([*groups]), strict=True):
                for i in group:
                    yield frames[i % size]

        def get_times() -> np.ndarray:
            [record] = self.records.read_data([listed.record])
            data = self._parse(0, record)["times"]
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

    def _read(self, numbers: Sequence[int]) -> Iterator[Sequence[bytes]]:
        """Yield the frames of records, which are compared with the index.

        Raises:
            DecodeError: A record is damaged, or differs from the index.
        """
        records = [self.listed.record + number for number in numbers]
        # Only the first record of a video has times, and only if its frame rate is variable.
        expected = make_example({**self._stored(0), "times": b""})
        first = expected.features.feature["first"].int64_list.value
        for number, data in zip(numbers, self.records.read_data(records), strict=True):
            first[0] = number * self.listed.frames_per_record
            frames = take_frames(data, expected)
            if frames is None or len(frames) != self._count(number):
                frames = self._parse(number, data)["frames"]
            yield frames

    def _count(self, number: int) -> int:
        """Return the number of frames in record `number` of the video."""
        size = self.listed.frames_per_record
        return min(size, self.listed.num_frames - number * size)

    def _stored(self, number: int) -> dict:
        """Return the features that record `number` of the video must contain."""
        listed = self.listed
        return {
            "id": encode_id(listed.id),
            "label": listed.label,
            "num_frames": listed.num_frames,
            "fps": np.float32(listed.fps).item(),  # records store it as float32
            "first": number * listed.frames_per_record,
        }

    def _parse(self, number: int, data: bytes) -> dict:
        """Parse record `number` of the video, and compare it with the index.

        Raises:
            DecodeError: The record is damaged, or differs from the index.
        """
        record = self.listed.record + number
        values, stored = self.records.parse(record, data), self._stored(number)
        expected = (*stored.values(), self._count(number))
        actual = (*map(values.__getitem__, stored), len(values["frames"]))
        if actual != expected:
            form = "{0!r}, label {1}, {5} of {2} frames, {3:.6g} frames/s, from frame {4}"
            texts = [
                form.format(row[0].decode(errors="replace"), *row[1:]) for row in (actual, expected)
            ]
            problem = f"contains {texts[0]}, but the index lists {texts[1]}"
            raise self.records.error(record, problem)
        return values


@dataclasses.dataclass
class TfdsVideo:
    """A labelled video that is one record of a TFDS data set. Reading the label reads the record.

    Attributes:
        records: The split that contains it.
        index: Index of its record in the split.
    """

    records: "PackRecords"
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
