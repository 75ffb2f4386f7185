"""Videos whose frames are JPEG pictures, wherever these come from."""

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from jaxvid.data.formats.video_reader import MAX_PIXELS, DecodeError
from jaxvid.errors import InputError, one_line


def import_or_explain(module: str, package: str):
    """Imports a package.

    Raises:
        InputError: It is not installed; the message names the command that mends it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"packed frames need {package} ({error}): pip install {package}") from None


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

    Args:
        name: Of the video, for errors.
        num_frames: Number of frames.
        fps: Frames a second; None: unknown.
        get: Frame number → the bytes of its JPEG picture; is asked in rising order.
        get_times: Gives `times`; None: there are none.
        close: Called at the end.
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
        """Seconds to each frame, `(num_frames,)` float64, never falling; None: a constant rate.

        Raises:
            DecodeError: They cannot be read.
        """
        return self._get_times() if self._get_times else None

    def get_frames(self, indices: Iterable[int]) -> np.ndarray:
        """Decodes some frames.

        Args:
            indices: Frame numbers in any order, repeats allowed.

        Returns:
            `(t, h, w, c)` uint8, RGB, one frame for each index.

        Raises:
            DecodeError: A picture is damaged, or its size differs from another's.
        """
        indices, frames = list(indices), None
        for place, frame in self.iter_frames(indices):
            if frames is None:
                frames = np.empty((len(indices), *frame.shape), np.uint8)  # (t h w c)
            frames[place] = frame
        return frames

    def iter_frames(self, indices: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Decodes some frames one by one, so that what is not needed of one never leaves the cache.

        Arguments and errors as in `get_frames`.

        Yields:
            A place in `indices`, those of the first frames first, and its frame `(h, w, c)` uint8,
            which is overwritten by the next one.
        """
        simplejpeg = import_or_explain("simplejpeg", "simplejpeg")
        wanted = [int(i) for i in indices]
        if not 0 <= min(wanted) <= max(wanted) < self.num_frames:
            raise IndexError(f"{self._name}: {wanted} outside 0..{self.num_frames - 1}")
        frame, last = None, None
        for place in sorted(range(len(wanted)), key=wanted.__getitem__):
            i = wanted[place]
            if i != last:
                try:
                    jpeg = self._get(i)
                    h, w, *_ = simplejpeg.decode_jpeg_header(jpeg)
                    if frame is None and h * w <= MAX_PIXELS:
                        frame = np.empty((h, w, 3), np.uint8)
                    if frame is None or frame.shape[:2] != (h, w):
                        raise ValueError(f"{w}×{h} is too large or not the size of the others")
                    simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=frame)
                except DecodeError:
                    raise
                except (ValueError, OSError, RuntimeError, TypeError) as error:
                    raise DecodeError(
                        f"{self._name}: frame {i} of {self.num_frames} cannot be decoded "
                        f"({one_line(error)}); make the pack again or leave the video out"
                    ) from None
                last = i
            yield place, frame

    def close(self) -> None:
        """Closes the file behind it."""
        if self._close:
            self._close()

    def __enter__(self) -> "JpegFrames":
        return self

    def __exit__(self, *_) -> None:
        self.close()
