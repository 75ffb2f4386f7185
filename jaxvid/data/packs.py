"""Packed frames: JPEG pictures in HDF5 and ArrayRecord files, read frame by frame and written."""

import contextlib
import csv
import ctypes
import dataclasses
import functools
import importlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxvid.data.decode import DecodeError
from jaxvid.errors import InputError


def import_or_explain(module: str, package: str):
    """Imports a package.

    Raises:
        InputError: It is not installed; the message names the command that mends it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"packed frames need {package} ({error}): pip install {package}") from None


def one_line(error: object, length: int = 160) -> str:
    """The first line of an error's text, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:length]


@functools.cache
def keep_freed_memory() -> None:
    """Makes this process keep the memory of one record for the next.

    glibc gives blocks of megabytes back to the system when they are freed. To be given cleared
    pages for each record anew takes several times as long as to read it.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 256 * 2**20)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes


class JpegFrames:
    """An open video whose frames are JPEG pictures. A context manager, as `decode.Video` is.

    Attributes:
        num_frames: Number of frames.
        fps: Frames a second; None: unknown.
        times: None: packed frames have no times of their own.

    Args:
        name: Of the video, for errors.
        num_frames: Number of frames.
        fps: Frames a second; None: unknown.
        get: Frame number → the bytes of its JPEG picture.
        close: Called at the end.
    """

    def __init__(
        self,
        name: str,
        num_frames: int,
        fps: float | None,
        get: Callable[[int], bytes],
        close: Callable[[], None] | None = None,
    ):
        self._name, self._get, self._close = name, get, close
        self.num_frames, self.fps, self.times = num_frames, fps, None

    def get_frames(self, indices: Iterable[int]) -> np.ndarray:
        """Decodes some frames.

        Args:
            indices: Frame numbers in any order, repeats allowed.

        Returns:
            `(t, h, w, c)` uint8, RGB, one frame for each index.

        Raises:
            DecodeError: A picture is damaged, or its size differs from another's.
        """
        simplejpeg = import_or_explain("simplejpeg", "simplejpeg")
        wanted = [int(i) for i in indices]
        if not 0 <= min(wanted) <= max(wanted) < self.num_frames:
            raise IndexError(f"{self._name}: {wanted} outside 0..{self.num_frames - 1}")
        frames = {}
        for i in sorted(set(wanted)):
            try:
                frames[i] = simplejpeg.decode_jpeg(self._get(i), colorspace="RGB")
            except (ValueError, OSError, RuntimeError, TypeError) as error:
                raise DecodeError(
                    f"{self._name}: frame {i} of {self.num_frames} cannot be decoded "
                    f"({one_line(error)}); make the pack again or leave the video out"
                ) from None
        shapes = {frame.shape for frame in frames.values()}
        if len(shapes) > 1:
            raise DecodeError(f"{self._name}: the frame size changes within it: {sorted(shapes)}")
        return np.stack([frames[i] for i in wanted])  # (t h w c)

    def close(self) -> None:
        """Closes the file behind it."""
        if self._close:
            self._close()

    def __enter__(self) -> "JpegFrames":
        return self

    def __exit__(self, *_) -> None:
        self.close()


# ------------------------------------------------------------------ ArrayRecord


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


def index_path(folder: Path, split: str) -> Path:
    """The table of a split's ids and labels, so that they are known without reading frames."""
    return folder / f"{split}_index.csv"


class PackRecords(Sequence):
    """The records of a split of a TFDS data set; opened in each process when first read.

    Attributes:
        labels: Names of the classes.

    Args:
        name: A folder that `prepare` wrote, or the name of a TFDS data set.
        split: Which split.
        is_folder: Which of the two `name` is.

    Raises:
        InputError: It is missing or damaged, has no such split or other features, a file of it is
            missing or lies outside its folder.
    """

    def __init__(self, name: str, split: str, *, is_folder: bool):
        self._name, self._split, self._is_folder = name, split, is_folder
        self._source, self._lock = None, threading.Lock()
        builder = self._make_builder()
        if split not in builder.info.splits:
            raise InputError(f"{name}: no split {split!r} in it, only {list(builder.info.splits)}")
        features, info = builder.info.features, builder.info.splits[split]
        if not {"frames", "label"} <= set(features) or not hasattr(features["label"], "names"):
            raise InputError(
                f"{name}: its features are {sorted(features)}; needed are 'frames', a Sequence of "
                "Text with JPEG bytes, and 'label', a ClassLabel"
            )
        self.labels = list(features["label"].names)
        self._length = info.num_examples
        root = os.path.abspath(builder.data_dir)
        paths = [os.path.abspath(path) for path in info.filepaths]
        if outside := [path for path in paths if not path.startswith(root + os.sep)]:
            raise InputError(f"{name}: its file {outside[0]} lies outside {root}; make it again")
        if missing := [path for path in paths if not os.path.isfile(path)]:
            raise InputError(
                f"{missing[0]} and {len(missing) - 1} more of {len(paths)} files do not exist; "
                "run prepare again"
            )
        self._index = self._read_index(index_path(Path(name), split)) if is_folder else None

    def _make_builder(self):
        tfds = import_tfds()
        try:
            if self._is_folder:
                return tfds.builder_from_directory(self._name)
            return tfds.builder(self._name)
        except Exception as error:  # TFDS raises anything, protobuf's errors among them
            way_out = "run jaxvid.data.prepare" if self._is_folder else "make it with TFDS"
            reason = one_line(error)
            raise InputError(f"{self._name}: no readable pack ({reason}); {way_out}") from None

    def _read_index(self, path: Path) -> list[tuple[str, int, float]] | None:
        if not path.is_file():
            return None
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = csv.DictReader(file)
                index = [(row["id"], int(row["label"]), float(row["fps"])) for row in rows]
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise InputError(f"{path}: is damaged ({one_line(error)}); run prepare again") from None
        if len(index) != self._length:
            raise InputError(
                f"{path}: lists {len(index)} videos, the pack holds {self._length}; "
                "run prepare again"
            )
        return index

    def read(self, index: int) -> dict:
        """Reads a record: `frames`, JPEG bytes, and the others of `make_features`.

        Raises:
            DecodeError: The record is damaged, or is not the one in the table of ids.
        """
        where = f"{self._name}: record {index} of split {self._split!r}"
        try:
            with self._lock:
                if self._source is None:
                    keep_freed_memory()
                    self._source = self._make_builder().as_data_source(self._split)
            example = self._source[index]
            frames, label = example["frames"], int(example["label"])
            name = example["id"].decode() if "id" in example else f"{self._split}/{index}"
            fps = float(example["fps"]) if "fps" in example else 0.0
            if not len(frames) or not isinstance(frames[0], bytes):
                raise ValueError("its frames are no JPEG bytes")
        except Exception as error:  # array_record's, protobuf's and TFDS's errors share no base
            raise DecodeError(
                f"{where} cannot be read ({one_line(error)}); run prepare again"
            ) from None
        if self._index is not None:
            *listed, exact_fps = self._index[index]
            if [name, label] != listed or not math.isclose(fps, exact_fps, rel_tol=1e-6):
                raise DecodeError(
                    f"{where} is {name!r}, label {label}, {fps} frames/s; its table says "
                    f"{self._index[index]}: run prepare again"
                )
            fps = exact_fps  # the record has single precision
        return {"frames": frames, "label": label, "id": name, "fps": fps}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self._name}: {index} outside 0..{len(self) - 1}")
        index = int(index) % len(self)
        return PackRecord(self, index, None if self._index is None else self._index[index][:2])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_source": None, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


@dataclasses.dataclass(frozen=True)
class PackRecord:
    """A labelled video of `PackRecords`.

    Attributes:
        records: The split that it belongs to.
        index: Its place in it.
        listed: Its id and label, where a table tells them; otherwise they are read.
    """

    records: PackRecords
    index: int
    listed: tuple[str, int] | None

    @functools.cached_property
    def _known(self) -> tuple[str, int]:
        if self.listed is not None:
            return self.listed
        example = self.records.read(self.index)
        return example["id"], example["label"]

    @property
    def id(self) -> str:
        """Its id, unique in the split."""
        return self._known[0]

    @property
    def label(self) -> int:
        """Its class."""
        return self._known[1]

    def open(self) -> JpegFrames:
        """Opens the video.

        Raises:
            DecodeError: Its record is damaged.
        """
        example = self.records.read(self.index)
        frames = example["frames"]
        return JpegFrames(
            f"{self.records._name}: {example['id']}",
            len(frames),
            example["fps"] or None,
            frames.__getitem__,
        )
