"""Frames by index out of a video file."""

import bisect
from pathlib import Path

import av
import numpy as np

from jaxvid.errors import InputError


class DecodeError(InputError):
    """A video that cannot be decoded; the message names the file and the reason."""


class Video:
    """An open video file. Use it as a context manager, from one thread at a time.

    Opening reads the container's packets once, without decoding any, for the number of frames and
    their timestamps: what a header claims is not believed.

    Attributes:
        num_frames: Number of frames.

    Raises:
        DecodeError: The file is missing, is no video, or holds no frame.
    """

    def __init__(self, path: str | Path):
        self._path = path
        try:
            self._container = av.open(str(path))
        except (av.FFmpegError, OSError) as error:
            raise self._error(error) from None
        try:
            self._scan()
        except BaseException:
            self.close()
            raise

    def _scan(self) -> None:
        streams = self._container.streams.video
        if not streams:
            raise self._error("no video stream in it")
        self._stream = streams[0]
        self._stream.codec_context.thread_count = 1  # clips are decoded in parallel, not frames
        try:
            packets = [
                (packet.pts, packet.is_keyframe, packet.is_discard)
                for packet in self._container.demux(self._stream)
                if packet.size
            ]
        except (av.FFmpegError, OSError) as error:
            raise self._error(error) from None
        # Frames before the first key frame cannot be decoded; those that an edit list cuts off are
        # decoded on the way to others and never shown.
        first_key = next((i for i, packet in enumerate(packets) if packet[1]), len(packets))
        shown = [pts for pts, _, discarded in packets[first_key:] if not discarded]
        if not shown:
            raise self._error("no frame in it")
        self.num_frames = len(shown)
        # Without distinct timestamps (some AVI files) frames are known by their order alone.
        self._times = sorted(shown) if None not in shown and len({*shown}) == len(shown) else None
        self._key_times = sorted(pts for pts, is_key, _ in packets if is_key and pts is not None)

    def get_frames(self, indices: np.ndarray) -> np.ndarray:
        """Decodes some frames.

        Args:
            indices: Frame numbers in presentation order, in any order, repeats allowed.

        Returns:
            `(t, h, w, c)` uint8, RGB, one frame for each index.

        Raises:
            DecodeError: A wanted frame cannot be decoded.
        """
        wanted = sorted({int(i) for i in indices})
        if not 0 <= wanted[0] <= wanted[-1] < self.num_frames:
            raise IndexError(f"{self._path}: {wanted} outside 0..{self.num_frames - 1}")
        try:
            frames = self._decode_groups(wanted) if self._times else {}
            if len(frames) < len(wanted):  # open GOPs, damage, no timestamps
                frames = self._decode_all(wanted)
        except (av.FFmpegError, OSError) as error:
            raise self._error(error) from None
        if missing := [i for i in wanted if i not in frames]:
            raise self._error(f"frame {missing[0]} of {self.num_frames} cannot be decoded")
        shapes = {frame.shape for frame in frames.values()}
        if len(shapes) > 1:
            raise self._error(f"the frame size changes within it: {sorted(shapes)}")
        return np.stack([frames[int(i)] for i in indices])

    def _decode_groups(self, wanted: list[int]) -> dict[int, np.ndarray]:
        """Seeks to each key frame that wanted frames follow and decodes no more than they need."""
        groups: dict[int, dict[int, int]] = {}
        for i in wanted:
            place = bisect.bisect_right(self._key_times, self._times[i])
            if not place:
                return {}
            groups.setdefault(self._key_times[place - 1], {})[self._times[i]] = i
        frames = {}
        for key_time, group in groups.items():
            self._container.seek(key_time, stream=self._stream, backward=True)
            context = self._stream.codec_context
            last, found = max(group), 0
            for packet in self._container.demux(self._stream):
                # Frames that no other frame refers to are decoded only where they are wanted.
                context.skip_frame = "DEFAULT" if packet.pts in group else "NONREF"
                for frame in packet.decode():
                    if frame.pts in group:
                        frames[group[frame.pts]] = frame.to_ndarray(format="rgb24")
                        found += 1
                if found == len(group):
                    break
                if packet.dts is not None and packet.dts > last and packet.is_keyframe:
                    break  # past the group: the rest is for _decode_all
        return frames

    def _decode_all(self, wanted: list[int]) -> dict[int, np.ndarray]:
        """Decodes from the start; knows frames by their timestamps, or else by their order."""
        frames, remaining = {}, set(wanted)
        places = {time: i for i, time in enumerate(self._times or ())}
        self._container.seek(0, backward=True, any_frame=False)
        self._stream.codec_context.skip_frame = "DEFAULT"
        for count, frame in enumerate(self._container.decode(self._stream)):
            i = places.get(frame.pts) if places else count
            if i in remaining:
                frames[i] = frame.to_ndarray(format="rgb24")
                remaining.remove(i)
            if not remaining:
                break
        return frames

    def close(self) -> None:
        """Closes the file."""
        self._container.close()

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _error(self, reason: object) -> DecodeError:
        if isinstance(reason, FileNotFoundError):
            return DecodeError(f"{self._path} does not exist")
        reason = getattr(reason, "strerror", None) or reason  # PyAV's errors, and the system's
        return DecodeError(
            f"{self._path}: cannot be decoded ({reason}); replace the file or leave it out"
        )
