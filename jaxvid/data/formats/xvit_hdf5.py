"""HDF5 files of JPEG frames in the layout of the original XViT implementation."""

import contextlib
import dataclasses
import functools
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxvid.block_cache import Pinned
from jaxvid.data.file_checks import check_list, file_state
from jaxvid.data.formats.jpeg_reader import JpegFrames
from jaxvid.data.formats.video_reader import MAX_FRAMES, DecodeError
from jaxvid.data.records import check_line, read_lines, split_line
from jaxvid.data.video_lists import is_label
from jaxvid.errors import InputError, import_or_explain, one_line

MAX_READ_BYTES = 2**28  # limit for reading a frame: the size of the frame or of an HDF5 chunk


@dataclasses.dataclass(frozen=True)
class H5Record:
    """A labelled video in an HDF5 file.

    Attributes:
        path: The file.
        label: Index of its class.
        id: Its name in the list.
        key: Key of its data set in the file, or None for the first data set of the file.
        fps: Frames per second, or None if unknown.
    """

    path: Path
    label: int
    id: str
    key: str | None = None
    fps: float | None = None

    def open(self) -> JpegFrames:
        """Open the video.

        Raises:
            DecodeError: The file is missing or damaged, or has no valid data set of frames.
            InputError: A remote file cannot be reached.
        """
        h5py = import_or_explain("h5py", "h5py")
        if (state := file_state(self.path)) and state != "is empty":  # a pipe could block forever
            raise DecodeError(f"{self.path} {state}; restore it")
        with contextlib.ExitStack() as stack:
            stack.enter_context(Pinned.whole_file(self.path))
            try:
                # Many file systems do not support locks, and reading does not need them.
                file = stack.enter_context(h5py.File(self.path, "r", locking=False))
                frames = self._find_frames(h5py, file)
            except DecodeError:
                raise
            except Exception as error:
                raise self._unreadable(error) from None
            resources = stack.pop_all()

        def get(i: int) -> bytes:
            try:
                jpeg = frames[i]  # an array or a string of bytes
            except Exception as error:  # exceptions of h5py have no common base
                raise DecodeError(
                    f"{self.path}: frame {i} of {len(frames)} cannot be read "
                    f"({one_line(error)}); recreate the file"
                ) from None
            return jpeg.tobytes() if hasattr(jpeg, "tobytes") else jpeg

        return JpegFrames(
            str(self.path), len(frames), self.fps, functools.partial(map, get), resources.close
        )

    def _unreadable(self, error: Exception) -> DecodeError:
        """Return a DecodeError for a file that h5py cannot read."""
        return DecodeError(f"{self.path}: cannot be read ({one_line(error)}); recreate the file")

    def _find_frames(self, h5py: ModuleType, file: Any) -> Any:
        """Return the `h5py.Dataset` of the frames.

        Raises:
            DecodeError: The data set does not exist, is a link, has its data in other files, or has
                no frames or implausible sizes.
        """
        key = next(iter(file), None) if self.key is None else self.key
        name = "data set" if self.key is None else f"data set {self.key!r}"
        missing = DecodeError(f"{self.path}: contains no {name}; recreate the file")
        node, parts = file, [part for part in (key or "").split("/") if part]
        for part in parts:  # links are refused before they are followed
            link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
            if link is None:
                raise missing
            if not isinstance(link, h5py.HardLink):
                raise DecodeError(f"{self.path}: {key!r} is a link; copy the data into the file")
            node = node[part]
        frames = node
        if not isinstance(frames, h5py.Dataset) or not frames.shape:
            raise missing
        if frames.is_virtual or frames.external:
            raise DecodeError(
                f"{self.path}: its data is stored in other files; copy the data into the file"
            )
        if not frames.shape[0]:
            raise DecodeError(f"{self.path}: contains no frames; leave the video out")
        sizes = [frames.shape[1:], *([frames.chunks] if frames.chunks else [])]
        frame_bytes = max(math.prod(size) for size in sizes) * frames.dtype.itemsize
        if frames.shape[0] > MAX_FRAMES or frame_bytes > MAX_READ_BYTES:
            raise DecodeError(
                f"{self.path}: {frames.shape[0]} frames of up to {frame_bytes} bytes are not a "
                "video; recreate the file"
            )
        return frames


def write_h5(path: Path, key: str, jpegs: list[bytes]) -> None:
    """Write a video as one data set of JPEG byte strings, with reproducible bytes."""
    h5py = import_or_explain("h5py", "h5py")
    # Create the file in memory first, because HDF5 crashes the process if a disk is full.
    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        frames = np.empty(len(jpegs), object)
        frames[:] = [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs]
        file.create_dataset(key, data=frames, dtype=h5py.vlen_dtype(np.uint8))
        file.flush()
        path.write_bytes(file.id.get_file_image())


def read_xvit_list(
    folder: Path, split: str, num_classes: int | None, missing: str = "error"
) -> list[H5Record]:
    """Read the list of a split in XViT's layout of Kinetics or Something-Something.

    Kinetics: the list is `annotations/SPLIT.txt` with lines `name,num_frames,label`. The frames are
    in `seq_h5/SPLIT/NAME.h5` or `SPLIT/NAME.h5`. `annotations/SPLIT_fps.txt` is optional.
    Something-Something: the list is `SPLIT_videofolder.txt` with lines `name num_frames label`. The
    frames are the data set NAME in `seq_h5/NAME.h5`, or in `Something-Something-v2-frames.h5` for
    all videos. As in the original, `test` means `val` if there is no list of `test`.

    Args:
        folder: The data folder.
        split: Name of the split.
        num_classes: Number of classes, which labels must be below; None: any label is valid.
        missing: `error` to refuse missing files, or `keep` to list them.

    Raises:
        InputError: As in `video_lists.read_list`, the list of frame rates is malformed, or the name
            of a video is a path outside of the folder.
    """
    lists = [
        (path, name)
        for name in dict.fromkeys((split, "val" if split == "test" else split))
        for path in (
            folder / "annotations" / f"{name}.txt",
            folder / f"{name}_videofolder.txt",
        )
        if os.path.lexists(path)
    ]
    if not lists:
        raise InputError(
            f"{folder}: contains neither annotations/{split}.txt nor {split}_videofolder.txt; "
            "correct --config.data.folder"
        )
    path, split = lists[0]
    kinetics = path.parent != folder
    h5_folder = folder / "seq_h5" / split if kinetics else folder / "seq_h5"
    if kinetics and not h5_folder.is_dir():
        h5_folder = folder / split
    single = folder / "Something-Something-v2-frames.h5"
    rates = _read_frame_rates(folder, split) if kinetics else {}
    records, numbers = [], []
    for number, line in enumerate(read_lines(path, names=True), start=1):
        if not line.strip():
            continue
        check_line(path, number, line)
        rest, label = split_line(line)
        name, length = split_line(rest)
        if not (name and is_label(label) and length.isascii() and length.isdigit()):
            raise InputError(f"{path}:{number}: {line!r} is not 'name,num_frames,label'")
        label = int(label)
        if num_classes is not None and label >= num_classes:
            raise InputError(
                f"{path}:{number}: label {label} is out of range: model.num_classes={num_classes} "
                f"allows 0 to {num_classes - 1}; correct the line or the config"
            )
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise InputError(
                f"{path}:{number}: {name!r} is outside of {h5_folder}; correct the line"
            )
        if kinetics:
            file, key = h5_folder / f"{name}.h5", None
        else:
            file, key = (single if single.is_file() else h5_folder / f"{name}.h5"), name
        numbers.append(number)
        records.append(H5Record(file, label, name, key, rates.get(name)))
    check_list(path, records, numbers, missing)
    return records


def _read_frame_rates(folder: Path, split: str) -> dict[str, float | None]:
    """Return the frame rate of each video name, None if unknown; {} if there is no file of rates.

    The file is in the subfolder `annotations` or `annotation`. The original code reads the
    latter.
    """
    for subfolder in ("annotations", "annotation"):
        path = folder / subfolder / f"{split}_fps.txt"
        if os.path.lexists(path):
            break
    else:
        return {}
    rates = {}
    for number, line in enumerate(read_lines(path, names=True), start=1):
        check_line(path, number, line)
        name, text = split_line(line)
        try:
            rate = float(text)
        except ValueError:
            rate = math.nan
        if not math.isfinite(rate):
            raise InputError(f"{path}:{number}: {line!r} is not 'name,fps'")
        rates[name] = rate if 0.01 <= rate <= 1000 else None  # e.g. 0 for an unknown rate
    return rates
