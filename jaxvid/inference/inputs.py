"""Kinds of videos that a classifier accepts: path, URL, bytes, file object, array of frames."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxvid import remote
from jaxvid.data.formats.frame_array import FrameArray
from jaxvid.data.formats.video_reader import MAX_SECONDS, DecodeError, VideoFile
from jaxvid.data.protocols import VideoReader
from jaxvid.data.records import NO_LABEL
from jaxvid.errors import InputError, one_line, short_repr
from jaxvid.inference.download import download
from jaxvid.object_store import SCHEMES

MAX_BYTES = 8 * 10**9  # of a download, and of the data that is read from a file object
COPY_BYTES = 2**20

# Path, URL, bytes, file object opened in binary mode, or frames `(t, h, w, 3)` uint8.
Source = str | os.PathLike | bytes | BinaryIO | np.ndarray


class VideoInput:
    """A video to classify. It implements the protocol `VideoRecord`.

    Downloads, bytes and the data of file objects are copied to an unnamed temporary file, which the
    system deletes when it is closed, even if the process is killed. In a `with` block, the video
    may be opened repeatedly. The copy is made when the video is first opened, and is deleted at the
    end of the outermost `with` block.

    Args:
        source: Path, URL (http or https), address (gs or s3), bytes, file object opened in binary
            mode, or array of frames `(t, h, w, 3)` uint8. A file object is read from its current
            position.
        fps: Frames per second of an array; None: unknown.
        position: Position in a list of videos, which distinguishes the names of arrays.

    Attributes:
        id: Name in results and messages: the path or the URL, the name of the file object, or e.g.
            `<array>` or `<bytes 3>`.
        label: `NO_LABEL`.
        is_array: Whether the source is an array of frames.
        path: The file, or None if the source is not a path. For an address, this is the path of
            the copy in the cache.

    Raises:
        InputError: The source has a wrong type, dtype or shape, or is a URL of another kind; or
            `fps` is not positive, or is given for a source other than an array.
    """

    label = NO_LABEL

    def __init__(self, source: Source, *, fps: float | None = None, position: int | None = None):
        self.path: Path | None = None
        self._frames = self._copy = None
        self._source, self._fps, self._num_users = source, fps, 0
        self.is_array = hasattr(source, "__array__")
        suffix = "" if position is None else f" {position}"
        if isinstance(source, str | os.PathLike):
            self.id = _check_path(source)
            if remote.is_remote(self.id) and not is_web_address(self.id):
                self.path = Path(remote.join("", self.id))
            elif not is_url(self.id):
                self.path = Path(self.id)
        elif isinstance(source, bytes | bytearray | memoryview):
            self.id = f"<bytes{suffix}>"
            if not source:
                raise InputError(f"{self.id}: is empty; pass the contents of a video file")
        elif hasattr(source, "read"):
            name = getattr(source, "name", None)
            self.id = name if isinstance(name, str) and name else f"<file object{suffix}>"
        elif self.is_array:
            self.id = f"<array{suffix}>"
            self._frames = _check_frames(np.asarray(source), self.id)
        else:
            raise InputError(
                f"{short_repr(source)}: expected a path, URL, bytes, binary file object or array "
                f"(t, h, w, 3) of uint8, got {type(source).__name__}"
            )
        if fps is not None and not self.is_array:
            raise InputError(f"fps={fps}: is only for arrays of frames; omit it for {self.id}")
        if fps is not None and not 0.01 <= fps <= 1000:
            raise InputError(f"fps={fps}: must be 0.01 to 1000 frames per second")

    def open(self, max_seconds: float = MAX_SECONDS) -> VideoReader:
        """Open the video; call it in a `with` block of the `VideoInput`.

        Args:
            max_seconds: Limit of the wall time of opening and decoding together, without the
                download.

        Raises:
            DecodeError: The video cannot be read or downloaded, or is not a video.
            InputError: The file object was opened in text mode.
        """
        if self._frames is not None:
            return FrameArray(self._frames, self._fps)
        if self.path is not None:
            return VideoFile(self.path, name=self.id, max_seconds=max_seconds)
        if self._copy is None:
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(tempfile.TemporaryFile())
                self._fill(file)
                file.flush()
                stack.pop_all()  # the file is complete; `__exit__` closes it
                self._copy = file
        path = f"/proc/self/fd/{self._copy.fileno()}"
        return VideoFile(path, name=self.id, max_seconds=max_seconds)

    def _fill(self, file: BinaryIO) -> None:
        """Copy the data of the source to a file."""
        if isinstance(self._source, str):
            download(self._source, file, MAX_BYTES)
            return
        if not hasattr(self._source, "read"):
            file.write(self._source)
            return
        size = 0
        for chunk in self._read_chunks():
            size += len(chunk)
            if size > MAX_BYTES:
                limit = f"has more than {MAX_BYTES / 1e9:.0f} GB"
                raise DecodeError(f"{self.id}: {limit}; save it and pass the path")
            file.write(chunk)
        if not size:
            raise DecodeError(
                f"{self.id}: has no data from its current position on; call seek(0), or check the "
                "program that writes it"
            )

    def _read_chunks(self) -> Iterator[bytes]:
        """Yield the data of a file object in chunks."""
        while True:
            try:
                chunk = self._source.read(COPY_BYTES)
            except UnicodeDecodeError:
                chunk = ""
            except (OSError, ValueError) as error:  # ValueError: the file object is closed
                raise DecodeError(f"{self.id}: cannot be read ({one_line(error)})") from None
            if isinstance(chunk, str):
                raise InputError(f"{self.id}: is opened in text mode; open it with mode 'rb'")
            if not chunk:
                return
            yield chunk

    def __enter__(self) -> "VideoInput":
        self._num_users += 1
        return self

    def __exit__(self, *_) -> None:
        self._num_users -= 1
        if not self._num_users and self._copy is not None:
            self._copy.close()
            self._copy = None


def is_url(name: str) -> bool:
    """Return whether an input is a URL and not a path."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name)) and not os.path.lexists(name)


def is_web_address(name: str) -> bool:
    """Return whether an input is an `http://` or `https://` address."""
    return bool(re.match("https?://", name, re.IGNORECASE)) and is_url(name)


def is_single(videos: Any) -> bool:
    """Return whether an argument is one video and not several."""
    if isinstance(videos, np.ndarray) and videos.dtype.kind in "OU":  # an array of paths
        return False
    if not isinstance(videos, Iterable):
        return True
    kinds = (str, bytes, bytearray, memoryview)
    return isinstance(videos, kinds) or hasattr(videos, "read") or hasattr(videos, "__array__")


def make_input(video: Source | VideoInput, fps: float | None = None) -> VideoInput:
    """Return a single video as a `VideoInput`; see there.

    Raises:
        InputError: As in `VideoInput`, or `video` is a list of videos.
    """
    if isinstance(video, VideoInput):
        return video
    if isinstance(video, list | tuple):
        raise InputError(f"expected one video, got a {type(video).__name__}; call it for each one")
    return VideoInput(video, fps=fps)


def make_inputs(
    videos: Iterable[Source | VideoInput], fps: float | None = None
) -> Iterator[VideoInput]:
    """Yield each of several videos as a `VideoInput`, when it is requested.

    Args:
        videos: The videos.
        fps: Frames per second of the arrays among them; None: unknown.

    Raises:
        InputError: As in `VideoInput`. The message names the position of the video.
    """
    for position, video in enumerate(videos):
        if isinstance(video, VideoInput):
            yield video
            continue
        try:
            is_array = hasattr(video, "__array__")
            yield VideoInput(video, fps=fps if is_array else None, position=position)
        except InputError as error:
            raise InputError(f"video {position} of the list: {error}") from None


def _check_path(source: str | os.PathLike) -> str:
    """Return a path or URL as a string.

    Raises:
        InputError: The URL has an unsupported scheme, or was mangled by `pathlib.Path`.
    """
    name = os.fsdecode(source)
    if re.match("https?:/[^/]", name) and not os.path.lexists(name):
        raise InputError(
            f"{name}: expected // after the colon; pass a URL as a string, because pathlib.Path "
            "removes a slash"
        )
    if is_url(name) and not (is_web_address(name) or remote.is_remote(name)):
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise InputError(f"{name}: expected one of {known}; download it and pass the path")
    return name


def _check_frames(frames: np.ndarray, name: str) -> np.ndarray:
    """Return an array of frames if it is `(t, h, w, 3)` uint8.

    Raises:
        InputError: The message says how to convert the array.
    """
    shape = frames.shape
    expected = f"{name}: expected frames (t, h, w, 3) of uint8, got shape {shape}"
    if frames.dtype.kind == "f":
        raise InputError(
            f"{name}: expected uint8 pixels from 0 to 255, got {frames.dtype}; convert values in "
            "[0, 1] with (255 * frames).round().astype('uint8')"
        )
    if len(shape) == 3:
        raise InputError(f"{expected}; join frames with numpy.stack, repeat grey values 3 times")
    if len(shape) == 5:
        raise InputError(f"{expected}; pass several videos as a list, e.g. list(videos)")
    if len(shape) == 4 and shape[3] != 3:
        hints = [
            (shape[3] == 4, "drop the alpha channel with frames[..., :3]"),
            (shape[3] == 1, "repeat the grey values with frames.repeat(3, axis=-1)"),
            (shape[1] == 3, "use frames.transpose(0, 2, 3, 1)"),
            (shape[0] == 3, "use frames.transpose(1, 2, 3, 0)"),
            (True, "the last axis must be the RGB channels"),
        ]
        raise InputError(f"{expected}; {next(hint for applies, hint in hints if applies)}")
    if len(shape) != 4 or not frames.size:
        raise InputError(f"{expected}; pass at least one frame")
    if frames.dtype != np.uint8:
        raise InputError(
            f"{name}: expected uint8 pixels from 0 to 255, got {frames.dtype}; use "
            "frames.astype('uint8')"
        )
    return frames
