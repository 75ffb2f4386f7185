"""What a pack is made of: its settings, its parts, its videos as JPEG pictures, its files."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jaxvid.data.annotations import Record
from jaxvid.data.check import MAX_SECONDS, Finding, examine, spread
from jaxvid.data.clips.sampling import frames_at_times
from jaxvid.data.formats.jpeg_reader import import_or_explain
from jaxvid.data.formats.pack_reader import encode_id, import_tfds
from jaxvid.data.formats.rgb import COLOR_MATRICES
from jaxvid.data.formats.video_reader import VideoFile
from jaxvid.errors import InputError, one_line

NAME = "jaxvid"  # of the data set that `prepare` writes, as TFDS knows it
METADATA = ("dataset_info.json", "features.json", "label.labels.txt")  # that TFDS writes
FORMATS = ("arrayrecord", "h5")
MIN_CLIPS, MAX_FILES = 64, 256  # readers keep every file open, and may open some 1000


@dataclasses.dataclass(frozen=True)
class Settings:
    """How frames are packed.

    Attributes:
        format: `arrayrecord`, which TFDS opens, or `h5`, which the original XViT program opens.
        short_side: Frames with a longer shorter side are scaled down to it; 0: none are.
        frames: Frames a video, evenly spaced; its frame rate is lowered with them. 0: all.
        quality: Of JPEG, 1 to 100; colour at half the resolution.
        clips_per_file: Videos of one ArrayRecord file, as many as a killed run does again; 0: 64,
            or more where a split would need over 256 files.
        frames_per_record: Frames that are read together. With more, more is read that is not
            wanted, and less memory is needed: array_record keeps 8 bytes of each record in every
            process that reads (0.6 GB for 240,000 videos of 300 frames, one a record).
        color_matrix: Of the conversion to RGB, one of `rgb.COLOR_MATRICES`.

    Raises:
        InputError: A value is impossible.
    """

    format: str = "arrayrecord"
    short_side: int = 256
    frames: int = 0
    quality: int = 90
    clips_per_file: int = 0
    frames_per_record: int = 1
    color_matrix: str = "tagged"

    def __post_init__(self):
        if self.format not in FORMATS:
            raise InputError(f"format={self.format!r}: there are {FORMATS[0]!r} and {FORMATS[1]!r}")
        if self.color_matrix not in COLOR_MATRICES:
            known = " and ".join(map(repr, COLOR_MATRICES))
            raise InputError(f"color_matrix={self.color_matrix!r}: there are {known}")
        bounds = {"short_side": (0, 10_000), "frames": (0, 10**6), "quality": (1, 100)}
        bounds |= {"clips_per_file": (0, 10**6), "frames_per_record": (1, 10**6)}
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name}={getattr(self, name)}: must be {low} to {high}")


@dataclasses.dataclass
class Clip:
    """A video's packed frames.

    Attributes:
        finding: What was found while reading it.
        label: Its class.
        fps: Of the packed frames; 0: unknown.
        jpegs: The frames.
        times: Seconds at which each of them is shown; None: their rate is constant, or unknown.
    """

    finding: Finding
    label: int
    fps: float = 0.0
    jpegs: list[bytes] = dataclasses.field(default_factory=list)
    times: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """Videos that are packed together: a file of ArrayRecord, or files of HDF5.

    Attributes:
        split: Their list.
        number: Among the split's parts.
        count: Of the split's parts.
        records: The videos.
        names: What their files are called, in HDF5.
    """

    split: str
    number: int
    count: int
    records: list[Record]
    names: list[str]

    def state_path(self, output: Path) -> Path:
        """The file that says that the part is complete, and what is in it."""
        return output / ".parts" / f"{self.split}-{self.number:05d}.json"


def encode(record: Record, split: str, settings: Settings) -> Clip:
    """Decodes a video and compresses its frames."""
    simplejpeg = import_or_explain("simplejpeg", "simplejpeg")
    jpegs = []

    def use(frames: np.ndarray) -> None:
        for frame in frames:
            frame = np.ascontiguousarray(_shrink(frame, settings.short_side))
            options = {"colorspace": "RGB", "colorsubsampling": "420"}
            jpegs.append(simplejpeg.encode_jpeg(frame, quality=settings.quality, **options))

    finding = examine(record, split, use, settings.frames, settings.color_matrix)
    if finding.broken:
        return Clip(finding, record.label)
    rate = (finding.fps or 0.0) * len(jpegs) / finding.num_frames
    with VideoFile(record.path, max_seconds=MAX_SECONDS) as video:
        times = video.times
    if times is not None:
        times = _uneven(times[spread(finding.num_frames, settings.frames)], rate)
    return Clip(finding, record.label, rate, jpegs, times)


def _uneven(times: np.ndarray, fps: float) -> np.ndarray | None:
    """The times, unless whoever samples by them finds the frames that a constant rate has."""
    places = np.arange(len(times))
    even = not fps or (
        round(times[-1] * fps) + 1 == len(times)
        and np.array_equal(frames_at_times(places, times, fps), places)
    )
    return None if even else times


def _shrink(frame: np.ndarray, short_side: int) -> np.ndarray:
    """Scales `(h, w, c)` uint8 down so that its shorter side is `short_side`."""
    h, w, _ = frame.shape
    if not short_side or min(h, w) <= short_side:
        return frame
    size = (round(w * short_side / min(h, w)), round(h * short_side / min(h, w)))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))


def plan(records: dict[str, list[Record]], settings: Settings) -> list[Part]:
    """Divides the videos into parts, by their places in the lists alone."""
    parts = []
    for split, found in records.items():
        names, size = _make_names(found), settings.clips_per_file
        size = size or max(MIN_CLIPS, -(-len(found) // MAX_FILES))
        starts = range(0, len(found), size)
        parts += [
            Part(split, i, len(starts), found[start : start + size], names[start : start + size])
            for i, start in enumerate(starts)
        ]
    return parts


def _make_names(records: list[Record]) -> list[str]:
    """File names that differ: each path's last part if that is enough, or else all of it."""
    paths = [os.path.splitext(record.id)[0] for record in records]
    for names in ([os.path.basename(path) for path in paths], paths):
        names = ["".join(c if c.isalnum() or c in "-_.()" else "_" for c in n) for n in names]
        names = [name.strip("._")[-200:] for name in names]
        if len(set(names)) == len(names) and all(names):
            return names
    return [f"{name[-190:]}_{i}" for i, name in enumerate(names)]


# ------------------------------------------------------------------ ArrayRecord


def make_features(labels: Sequence[str]):
    """What TFDS is told about a record: `Sequence(Text())` keeps the JPEG bytes as they are."""
    tfds = import_tfds()
    return tfds.features.FeaturesDict(
        {
            "frames": tfds.features.Sequence(tfds.features.Text()),
            "first": np.int32,  # number of the first one in its video
            "num_frames": np.int32,  # of the video
            "fps": np.float32,  # 0: unknown
            "label": tfds.features.ClassLabel(names=list(labels)),
            "id": tfds.features.Text(),
            # Seconds of all frames of the video, as float64 (TFDS would round them to float32): in
            # the first record of one whose rate is not constant, or else empty.
            "times": tfds.features.Text(),
        }
    )


def make_examples(clip: Clip, frames_per_record: int) -> Iterator[dict]:
    """The records of a video."""
    times = b"" if clip.times is None else clip.times.astype("<f8").tobytes()
    for first in range(0, len(clip.jpegs), frames_per_record):
        yield {
            "frames": clip.jpegs[first : first + frames_per_record],
            "first": first,
            "num_frames": len(clip.jpegs),
            "fps": clip.fps,
            "label": clip.label,
            "id": encode_id(clip.finding.id),
            "times": b"" if first else times,
        }


def write_array_record(path: Path, examples: Iterator[dict], labels: Sequence[str]) -> None:
    """Writes examples of `make_features` to one file, the same bytes each time.

    Raises:
        OSError: The file cannot be written.
    """
    import_tfds()
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = make_features(labels)
    serializer = ExampleSerializer(features.get_serialized_info())
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")  # JPEG does not compress
    protos = (serializer.get_tf_example(features.encode_example(e)) for e in examples)
    for proto in protos:
        with _as_os_error():
            writer.write(proto.SerializeToString(deterministic=True))
    with _as_os_error():
        writer.close()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Tells array_record's errors in writing (a full disk) from errors in what is written."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(one_line(error).split(";")[0]) from None


def array_record_name(split: str, number: int, count: int) -> str:
    """The name that TFDS expects of a split's file `number` of `count`."""
    return f"{NAME}-{split}.array_record-{number:05d}-of-{count:05d}"


def write_metadata(
    folder: Path, labels: Sequence[str], lengths: dict[str, list[int]], sizes: dict[str, int]
) -> None:
    """Writes what `tfds.builder_from_directory` reads.

    Args:
        folder: Where the files are.
        labels: Names of the classes.
        lengths: Split → number of records of each file.
        sizes: Split → bytes.
    """
    tfds = import_tfds()
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=lengths[split],
            num_bytes=sizes[split],
            filename_template=tfds.core.ShardedFileTemplate(
                dataset_name=NAME, data_dir=folder, split=split, filetype_suffix="array_record"
            ),
        )
        for split in lengths
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=make_features(labels), split_infos=infos, check_data=False
    )
