"""Reader of videos whose frames are JPEG images in any storage."""

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

import numpy as np

from jaxvid.data.formats.video_reader import MAX_PIXELS, DecodeError
from jaxvid.errors import InputError, one_line


def import_or_explain(module: str, package: str) -> ModuleType:
    """Import a module.

    Raises:
        InputError: It is not installed; the message has the `pip` command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"packed frames need {package} ({error}): pip install {package}") from None


@functools.cache
def keep_freed_memory() -> None:
    """Reuse the memory of a record for the next one.

    By default, glibc returns large blocks to the system when they are freed. New pages, which the
    system clears, take several times as long as reading the record.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 256 * 2**20)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes


class JpegFrames:
    """An open video whose frames are JPEG images; a `VideoReader`.

    Attributes:
        num_frames: Number of frames.
        fps: Frames per second; None: unknown.

    Args:
        name: Name of the video in error messages.
        num_frames: Number of frames.
        fps: Frames per second; None: unknown.
        get: Function from a frame number to the bytes of the JPEG image. It is called in ascending
            order.
        close: Called at the end.
        get_times: Function that returns `times`; None: the frame rate is constant.
    """

    def __init__(
        self,
        name: str,
        num_frames: int,
        fps: float | None,
        get: Callable[[int], bytes],
        close: Callable[[], None] | None = None,
        *,
        get_times: Callable[[], np.ndarray] | None = None,
    ):
        self._name, self._get, self._get_times, self._close = name, get, get_times, close
        self.num_frames, self.fps = num_frames, fps

    @functools.cached_property
    def times(self) -> np.ndarray | None:
        """Seconds from the first frame to each, `(num_frames,)` float64, non-decreasing.

        None if the frame rate is constant.

        Raises:
            DecodeError: The times cannot be read.
        """
        return self._get_times() if self._get_times else None

    def get_frames(self, indices: Iterable[int]) -> np.ndarray:
        """Decode frames.

        Args:
            indices: Frame numbers in any order, with repetitions.

        Returns:
            `(t, h, w, c)` uint8, RGB, one frame per index.

        Raises:
            DecodeError: An image is damaged, or the sizes of the images differ.
        """
        indices, frames = list(indices), None
        for position, frame in self.enumerate_frames(indices):
            if frames is None:
                frames = np.empty((len(indices), *frame.shape), np.uint8)  # (t h w c)
            frames[position] = frame
        return frames

    def enumerate_frames(self, indices: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Decode frames one at a time, so that a frame stays in the cache while it is cropped.

        Arguments and errors: `get_frames`.

        Yields:
            A position in `indices`, in the order of the frame numbers, and its frame `(h, w, c)`
            uint8, which the next one overwrites.
        """
        simplejpeg = import_or_explain("simplejpeg", "simplejpeg")
        numbers = [int(i) for i in indices]
        if not 0 <= min(numbers) <= max(numbers) < self.num_frames:
            raise IndexError(f"{self._name}: {numbers} outside 0..{self.num_frames - 1}")
        frame, last = None, None
        for position in sorted(range(len(numbers)), key=numbers.__getitem__):
            i = numbers[position]
            if i != last:
                try:
                    jpeg = self._get(i)
                    h, w, *_ = simplejpeg.decode_jpeg_header(jpeg)
                    if frame is None and h * w <= MAX_PIXELS:
                        frame = np.empty((h, w, 3), np.uint8)
                    if frame is None or frame.shape[:2] != (h, w):
                        raise ValueError(f"{w}×{h} is too large or differs from the other frames")
                    simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=frame)
                except DecodeError:
                    raise
                except (ValueError, OSError, RuntimeError, TypeError) as error:
                    raise DecodeError(
                        f"{self._name}: frame {i} of {self.num_frames} cannot be decoded "
                        f"({one_line(error)}); make the pack again or leave the video out"
                    ) from None
                last = i
            yield position, frame

    def close(self) -> None:
        """Close the underlying file."""
        if self._close:
            self._close()

    def __enter__(self) -> "JpegFrames":
        return self

    def __exit__(self, *_) -> None:
        self.close()
