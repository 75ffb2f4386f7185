"""Reader of videos whose frames are stored as JPEG or PNG images, e.g. in a pack."""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import cv2
import numpy as np

from jaxvid.data.formats.video_reader import MAX_PIXELS, DecodeError
from jaxvid.errors import import_or_explain, one_line

READ_IMAGES = 32  # number of images that are in memory at the same time
PNG = b"\x89PNG\r\n\x1a\n"  # first bytes of a PNG image


@functools.cache
def keep_freed_memory() -> None:
    """Make glibc keep freed memory, so that the memory of a record is reused for the next one.

    By default, glibc returns large freed blocks to the operating system. Getting new pages, which
    the system must clear, takes several times as long as reading the record.
    """
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 256 * 2**20)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes


class JpegFrames:
    """An open video whose frames are JPEG or PNG images. It implements the protocol `VideoReader`.

    Attributes:
        num_frames: Number of frames.
        fps: Frames per second, or None if unknown.
        max_pixels: Limit of the size of a frame; set it before decoding.

    Args:
        name: Name of the video in error messages.
        num_frames: Number of frames.
        fps: Frames per second, or None if unknown.
        get: Function from ascending frame numbers to the bytes of their images.
        close: Function that closes the underlying file; None: there is nothing to close.
        fetch: Function that reads frames of a remote video into the cache, from their numbers;
            None: there is nothing to read.
        get_times: Function that returns `times`; None: no times are known.
    """

    def __init__(
        self,
        name: str,
        num_frames: int,
        fps: float | None,
        get: Callable[[Sequence[int]], Iterable[bytes]],
        close: Callable[[], None] | None = None,
        *,
        fetch: Callable[[Sequence[int]], None] | None = None,
        get_times: Callable[[], np.ndarray] | None = None,
    ):
        self._name, self._get, self._get_times, self._close = name, get, get_times, close
        self._fetch = fetch
        self.num_frames, self.fps, self.max_pixels = num_frames, fps, MAX_PIXELS

    @functools.cached_property
    def times(self) -> np.ndarray | None:
        """Time of each frame in seconds, relative to the first frame.

        `(num_frames,)` float64, non-decreasing; None if the frame rate is constant or the times
        are unknown.

        Raises:
            DecodeError: The times cannot be read.
        """
        return self._get_times() if self._get_times else None

    def fetch(self, indices: Sequence[int]) -> None:
        """Read frames of a remote video into the cache, all at the same time.

        Raises:
            InputError: The store cannot be reached or refuses access.
        """
        if self._fetch:
            self._fetch(indices)

    def get_frames(self, indices: Iterable[int]) -> np.ndarray:
        """Decode frames.

        Args:
            indices: Frame numbers in any order, possibly repeated.

        Returns:
            `(t, h, w, c)` uint8, RGB, one frame per index.

        Raises:
            DecodeError: A frame cannot be read or decoded, is too large, or has a different size
                than the other frames.
            IndexError: A frame number is out of range.
            InputError: The package simplejpeg is not installed.
        """
        indices, frames = list(indices), None
        for position, frame in self.enumerate_frames(indices):
            if frames is None:
                frames = np.empty((len(indices), *frame.shape), np.uint8)  # (t h w c)
            frames[position] = frame
        return frames

    def enumerate_frames(self, indices: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Decode frames one at a time, so that each is still in the CPU cache when it is cropped.

        Arguments and errors: as in `get_frames`.

        Yields:
            Pairs of a position in `indices` and its frame `(h, w, c)` uint8, in ascending order of
            frame numbers. All frames share one array, which the next frame overwrites.
        """
        simplejpeg = import_or_explain("simplejpeg", "simplejpeg")
        numbers = [int(i) for i in indices]
        if not 0 <= min(numbers) <= max(numbers) < self.num_frames:
            raise IndexError(f"{self._name}: {numbers} outside 0..{self.num_frames - 1}")
        self.fetch(numbers)
        images = self._iter_images(sorted({*numbers}))
        frame, last = None, None
        for position in sorted(range(len(numbers)), key=numbers.__getitem__):
            i = numbers[position]
            if i != last:
                image = next(images)
                try:
                    is_png = bytes(image[: len(PNG)]) == PNG
                    h, w = _png_size(image) if is_png else simplejpeg.decode_jpeg_header(image)[:2]
                    if frame is None and h * w <= self.max_pixels:
                        frame = np.empty((h, w, 3), np.uint8)
                    if frame is None or frame.shape[:2] != (h, w):
                        raise ValueError(f"size {w}×{h} is too large or differs from other frames")
                    if is_png:
                        frame[:] = _decode_png(image)
                    else:
                        simplejpeg.decode_jpeg(image, colorspace="RGB", buffer=frame)
                except (ValueError, OSError, RuntimeError, TypeError) as error:
                    raise DecodeError(
                        f"{self._name}: frame {i} of {self.num_frames} cannot be decoded "
                        f"({one_line(error)}); recreate the pack or leave the video out"
                    ) from None
                last = i
            yield position, frame

    def _iter_images(self, numbers: Sequence[int]) -> Iterator[bytes]:
        """Yield the bytes of images.

        They are read in groups before they are decoded, because decoding evicts the code and data
        that reading needs from the CPU caches.
        """
        for start in range(0, len(numbers), READ_IMAGES):
            yield from [*self._get(numbers[start : start + READ_IMAGES])]

    def close(self) -> None:
        """Close the underlying file."""
        if self._close:
            self._close()

    def __enter__(self) -> "JpegFrames":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _png_size(image: bytes) -> tuple[int, int]:
    """Return the height and width in the header of a PNG image."""
    return int.from_bytes(image[20:24], "big"), int.from_bytes(image[16:20], "big")


def _decode_png(image: bytes) -> np.ndarray:
    """Decode a PNG image to RGB, `(h, w, c)` uint8; grey becomes RGB, transparency is dropped.

    Raises:
        ValueError: The image is damaged.
    """
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    frame = cv2.imdecode(np.frombuffer(image, np.uint8), flags)
    if frame is None:
        raise ValueError("the PNG image is damaged")
    return frame
