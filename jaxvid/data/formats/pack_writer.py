"""Writing packs: settings, division into parts, JPEG encoding and ArrayRecord files."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jaxvid.data.check import MAX_SECONDS, Finding, examine, spread
from jaxvid.data.clips.sampling import frames_at_times
from jaxvid.data.formats import tfds_api
from jaxvid.data.formats.packed_videos import encode_id
from jaxvid.data.formats.rgb import COLOR_MATRICES
from jaxvid.data.formats.video_reader import VideoFile
from jaxvid.data.records import Record, VideoFiles
from jaxvid.errors import InputError, check_option, import_or_explain, one_line

METADATA = ("dataset_info.json", "features.json", "label.labels.txt")  # written by TFDS
FORMATS = ("arrayrecord", "h5")
MIN_CLIPS = 64  # videos per file by default, unless a split would need over MAX_FILES files
MAX_FILES = 256  # per split: readers keep all files open, and a process may open about 1000


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a pack.

    Attributes:
        format: `arrayrecord`, which TFDS reads, or `h5`, which the original XViT code reads.
        short_side: Shorter side in pixels to which larger frames are scaled down; 0: unchanged.
        frames: Maximum number of frames to pack per video. Longer videos are sampled evenly, which
            lowers the frame rate; 0: all frames.
        quality: JPEG quality, 1 to 100; the chroma subsampling is 4:2:0.
        clips_per_file: Videos per ArrayRecord file; 0: 64, or more if a split would have over 256
            files. A run that is resumed after it was killed repeats at most one file.
        frames_per_record: Frames per record; a record is always read completely.
        color_matrix: Conversion to RGB, one of `rgb.COLOR_MATRICES`.

    Raises:
        InputError: A value is out of range.
    """

    format: str = "arrayrecord"
    short_side: int = 256
    frames: int = 0
    quality: int = 90
    clips_per_file: int = 0
    frames_per_record: int = 1
    color_matrix: str = "tagged"

    def __post_init__(self):
        check_option("format", self.format, FORMATS)
        check_option("color_matrix", self.color_matrix, COLOR_MATRICES)
        bounds = {"short_side": (0, 10_000), "frames": (0, 10**6), "quality": (1, 100)}
        bounds |= {"clips_per_file": (0, 10**6), "frames_per_record": (1, 10**6)}
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name}={getattr(self, name)}: must be {low} to {high}")


@dataclasses.dataclass
class Clip:
    """The encoded frames of a video.

    Attributes:
        finding: Result of reading the video.
        label: Index of its class.
        fps: Frame rate of the packed frames; 0 if unknown.
        jpegs: JPEG bytes of each packed frame; empty if the video is broken.
        times: Time of each packed frame in seconds, relative to the first frame; None if the frame
            rate is constant or unknown.
    """

    finding: Finding
    label: int
    fps: float = 0.0
    jpegs: list[bytes] = dataclasses.field(default_factory=list)
    times: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """Videos that are packed together: into one ArrayRecord file, or into one HDF5 file per video.

    Attributes:
        split: The split of the videos.
        number: Index of the part in its split.
        count: Number of parts of the split.
        records: The videos.
        names: Names of the videos' HDF5 files.
    """

    split: str
    number: int
    count: int
    records: VideoFiles
    names: list[str]

    def state_path(self, output: Path) -> Path:
        """Return the path of the part's state file, which exists once the part is complete."""
        return output / ".parts" / f"{self.split}-{self.number:05d}.json"

    def offsets_path(self, output: Path) -> Path:
        """Return the path of the offsets of the part's records."""
        return self.state_path(output).with_suffix(".offsets")


def encode(record: Record, split: str, settings: Settings) -> Clip:
    """Decode a video and encode its frames as JPEG; the result for a broken video has no frames."""
    simplejpeg = import_or_explain("simplejpeg", "simplejpeg")
    jpegs = []

    def encode_chunk(frames: np.ndarray) -> None:
        for frame in frames:
            frame = np.ascontiguousarray(shrink(frame, settings.short_side))
            options = {"colorspace": "RGB", "colorsubsampling": "420"}
            jpegs.append(simplejpeg.encode_jpeg(frame, quality=settings.quality, **options))

    finding = examine(record, split, encode_chunk, settings.frames, settings.color_matrix)
    if finding.broken:
        return Clip(finding, record.label)
    rate = (finding.fps or 0.0) * len(jpegs) / finding.num_frames
    with VideoFile(record.path, max_seconds=MAX_SECONDS) as video:
        times = video.times
    if times is not None:
        times = _variable_times(times[spread(finding.num_frames, settings.frames)], rate)
    return Clip(finding, record.label, rate, jpegs, times)


def _variable_times(times: np.ndarray, fps: float) -> np.ndarray | None:
    """Return the times, or None if they are not needed.

    They are not needed if sampling by time and by frame number give the same frames, or if the
    frame rate is unknown (`fps` is 0).
    """
    indices = np.arange(len(times))
    is_even = not fps or (
        round(times[-1] * fps) + 1 == len(times)
        and np.array_equal(frames_at_times(indices, times, fps), indices)
    )
    return None if is_even else times


def shrink(frame: np.ndarray, short_side: int) -> np.ndarray:
    """Scale a larger frame `(h, w, c)` uint8 down to a shorter side of `short_side` pixels."""
    h, w, _ = frame.shape
    if not short_side or min(h, w) <= short_side:
        return frame
    size = (round(w * short_side / min(h, w)), round(h * short_side / min(h, w)))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))


def plan(records: dict[str, VideoFiles], settings: Settings) -> list[Part]:
    """Divide the videos into parts, which depend only on the settings and the lists."""
    parts = []
    for split, videos in records.items():
        names, size = _make_names(videos.ids), settings.clips_per_file
        size = size or max(MIN_CLIPS, -(-len(videos) // MAX_FILES))
        starts = range(0, len(videos), size)
        parts += [
            Part(split, i, len(starts), videos[start : start + size], names[start : start + size])
            for i, start in enumerate(starts)
        ]
    return parts


def _make_names(ids: Sequence[str]) -> list[str]:
    """Return unique file names without suffix: base names of the ids, or the ids if needed.

    Special characters become `_`. If even the ids are not unique, a number is appended.
    """
    paths = [os.path.splitext(id_)[0] for id_ in ids]
    for names in ([os.path.basename(path) for path in paths], paths):
        names = ["".join(c if c.isalnum() or c in "-_.()" else "_" for c in n) for n in names]
        names = [name.strip("._")[-200:] for name in names]
        if len(set(names)) == len(names) and all(names):
            return names
    return [f"{name[-190:]}_{i}" for i, name in enumerate(names)]


# ------------------------------------------------------------------ ArrayRecord


def make_examples(clip: Clip, frames_per_record: int) -> Iterator[dict]:
    """Yield the records of a video as examples of `tfds_api.make_features`."""
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
    """Write examples of `tfds_api.make_features` to one file, with reproducible bytes.

    Raises:
        OSError: The file cannot be written.
        InputError: A required package is not installed.
    """
    tfds_api.import_tfds()  # raises an InputError if a package is missing
    from array_record.python.array_record_module import ArrayRecordWriter

    # JPEG data is already compressed.
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in tfds_api.serialize_examples(examples, labels):
        with _as_os_error():
            writer.write(record)
    with _as_os_error():
        writer.close()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn array_record's write errors, e.g. because of a full disk, into OSErrors."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(one_line(error).split(";")[0]) from None


def array_record_name(split: str, number: int, count: int) -> str:
    """Return the name that TFDS expects for file `number` of `count` of a split."""
    return f"{tfds_api.NAME}-{split}.array_record-{number:05d}-of-{count:05d}"
