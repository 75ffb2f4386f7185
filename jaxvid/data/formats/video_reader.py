"""Frames by index out of a video file, exactly and within bounds."""

import bisect
import collections
import contextlib
import itertools
import math
import os
import stat
import time
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.stream import Discard, Disposition
from av.video.reformatter import VideoReformatter

from jaxvid.data.formats.packet_index import PacketIndex
from jaxvid.data.formats.rgb import to_rgb
from jaxvid.errors import InputError, printable

# A file may claim or hold anything; these bounds are far above what clips need.
MAX_PIXELS = 64_000_000  # of a frame: twice that of 8K video
MAX_FRAMES = 1_000_000  # nine hours at 30 frames/s
MAX_SECONDS = 60.0  # of wall time for opening a file and all its decoding
MAX_EARLY = 64  # frames that are held back for one that comes late: above any codec's reordering
KEPT_BYTES = 64 * 2**20  # of compressed frames, so that they are read from the file only once

# Containers that hold their own frames. Others can name further files, or network addresses.
CONTAINERS = (
    "asf,avi,dv,flv,gif,h264,hevc,ivf,matroska,mov,mpeg,mpegts,mpegvideo,mxf,nut,ogg,rm,"
    "yuv4mpegpipe"
)
# Codecs that say of each frame whether any other refers to it, whatever the encoder's layering.
SKIPPABLE = ("h264", "mpeg1video", "mpeg2video", "mpeg4")


class DecodeError(InputError):
    """A video that cannot be decoded; the message names the file and the reason.

    It is one line whatever the file's name.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class VideoFile:
    """An open video file. Use it as a context manager, from one thread at a time.

    Opening reads the container's packets once, without decoding any, for the number of frames and
    their timestamps: what a header claims is not believed.

    Args:
        path: A regular file.
        max_seconds: Wall time for opening and all decoding together.

    Attributes:
        num_frames: Number of frames.
        fps: Average frames a second; None where it is unknown or absurd.
        times: `(num_frames,)` float64, seconds from the first frame to each, never falling; None
            where the file has no usable timestamps.
        oddities: What is unusual about the file, a phrase each; decoding may add to them.
        color_matrix: Conversion to RGB, one of `rgb.COLOR_MATRICES`; set it before decoding.

    Raises:
        DecodeError: The file is missing, is no video, holds no frame, or exceeds a bound.
    """

    def __init__(self, path: str | Path, *, max_seconds: float = MAX_SECONDS):
        self._path = path
        self._seconds_left = self._max_seconds = max_seconds
        self._container = self._readable = self._kept = None
        self._reformatter = VideoReformatter()  # one: its tables are made once
        self.oddities: list[str] = []
        self.color_matrix = "tagged"
        try:
            with self._bounded():
                self._scan()
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def _bounded(self) -> Iterator[None]:
        """Counts the time inside and gives FFmpeg's errors the file's name."""
        start = time.monotonic()
        self._deadline = start + self._seconds_left
        try:
            yield
        except av.error.ExitError:
            raise self._error(f"it takes longer than {self._max_seconds:g} s") from None
        # FFmpeg's errors are not all OSErrors, and a path may hold a null character.
        except (av.FFmpegError, OSError, ValueError) as error:
            raise error if isinstance(error, DecodeError) else self._error(error) from None
        finally:
            self._seconds_left -= time.monotonic() - start

    def _open(self) -> None:
        self.close()
        if not stat.S_ISREG(os.stat(self._path).st_mode):  # a pipe could block for ever
            raise self._error("not a regular file")
        limits = {"max_pixels": str(MAX_PIXELS)}  # the size may change on the way
        self._container = av.open(
            f"file:{self._path}",  # or else "12:30.mp4" is a network protocol
            options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file", **limits},
            metadata_errors="replace",
            timeout=max(self._deadline - time.monotonic(), 0.001),
        )
        streams, cover = self._container.streams, Disposition.attached_pic  # the cover of a song
        videos = [stream for stream in streams.video if not stream.disposition & cover]
        if not videos:
            raise self._error("no video stream in it")
        self._stream = videos[0]
        for stream in streams:
            stream.discard = Discard.default if stream is self._stream else Discard.all
        if (context := self._stream.codec_context) is None:
            raise self._error("no decoder for its codec")
        if context.width * context.height > MAX_PIXELS:
            raise self._error(f"{context.width}×{context.height} is too large a frame")
        context.thread_count = 1  # clips are decoded in parallel, not frames
        context.options = limits

    def _packets_from(self, stamp: int | None, position: int) -> Iterator[av.Packet]:
        """The packets from a key frame on, or all without `stamp`; the decoder starts afresh."""
        if self._kept is not None:
            self._stream.codec_context.flush_buffers()
            return self._packets(self._kept[position:])
        if stamp is None:
            self._open()  # what a seek to the start finds depends on the container
        else:
            self._container.seek(stamp, stream=self._stream, backward=True)
        return self._packets()

    def _packets(self, packets: list[av.Packet] | None = None) -> Iterator[av.Packet]:
        for packet in self._container.demux(self._stream) if packets is None else packets:
            if time.monotonic() > self._deadline:
                raise self._error(f"it takes longer than {self._max_seconds:g} s")
            if packet.size:  # an empty one would flush the decoder
                yield packet

    def _scan(self) -> None:
        self._open()
        is_avi = self._container.format.name == "avi"
        is_vp8 = self._stream.codec_context.name == "vp8"
        guessed, num_bytes, kept, packets = False, 0, [], []
        for packet in self._packets():
            guessed |= is_avi and packet.pts != packet.dts
            # VP8 has frames that are not for showing; a bit of their header says so.
            hidden = packet.is_discard or (is_vp8 and not memoryview(packet)[0] & 0x10)
            packets.append((packet.pts, packet.is_keyframe, hidden))
            num_bytes += packet.size
            if num_bytes <= KEPT_BYTES:
                kept.append(packet)
            if len(packets) > MAX_FRAMES:
                raise self._error(f"more than {MAX_FRAMES} frames")
        self._kept = kept if len(kept) == len(packets) else None
        # AVI has no timestamps; guesses are right only where frames are stored in the order in
        # which they are shown.
        self._line = line = PacketIndex(packets, ordered=not guessed)
        if not line.num_frames:
            raise self._error("no frame in it")
        self.num_frames, self.times = line.num_frames, line.times(self._stream.time_base)
        rate = self._stream.average_rate
        self.fps = float(rate) if rate and 0.01 <= rate <= 1000 else None
        claimed, hidden = self._stream.frames, len(packets) - line.num_headless - self.num_frames
        phrases = {
            "no usable timestamps": self.times is None,
            "variable frame rate": line.is_variable(),
            f"header claims {claimed} frames, there are {len(packets)}": claimed != len(packets),
            f"{line.num_headless} frames before the first key frame, left out": line.num_headless,
            f"{hidden} frames are not for showing": hidden,
            "no usable frame rate": self.fps is None,
        }
        self.oddities += [phrase for phrase, holds in phrases.items() if holds]

    def get_frames(self, indices: np.ndarray) -> np.ndarray:
        """Decode some frames: upright, converted to RGB by `color_matrix`.

        Args:
            indices: Frame numbers in presentation order, in any order, repeats allowed.

        Returns:
            `(t, h, w, c)` uint8, RGB, one frame for each index.

        Raises:
            DecodeError: A wanted frame is damaged, or time is up.
        """
        wanted, sound = sorted({int(i) for i in indices}), set()
        self._check_indices(wanted)
        with self._bounded():
            frames = self._decode_groups(wanted) if self._line.stamps else {}
            if len(frames) < len(wanted):  # open GOPs, damage, no timestamps
                frames = dict(self._decode_all(wanted, sound))
                frames = {i: frame for i, frame in frames.items() if i in sound}
        self._check_frames(wanted, frames, {frame.shape for frame in frames.values()})
        return np.stack([frames[int(i)] for i in indices])

    def iter_frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Decodes once, in order: for many frames, or where frames are known by their order alone.

        Args:
            indices: Frame numbers in presentation order, rising.

        Yields:
            Each frame `(h, w, c)` uint8, as `get_frames`. Decode nothing else meanwhile.

        Raises:
            DecodeError: As `get_frames`, at the latest after the last frame: damage may show only
                after a frame that it reaches was handed out.
        """
        wanted, sound = [int(i) for i in indices], set()
        self._check_indices(wanted)
        decoded, early, shapes = self._decode_all(wanted, sound), {}, set()
        for i in wanted:
            while i not in early and len(early) < MAX_EARLY:
                with self._bounded():
                    if (found := next(decoded, None)) is None:
                        break
                if found[0] >= i:  # not a second one of the same time
                    early[found[0]] = found[1]
            if i not in early:  # it is damaged, and what follows is not kept for it
                break
            frame = early.pop(i)
            shapes.add(frame.shape)
            if len(shapes) > 1:
                break
            yield frame
        with self._bounded():  # to the end, for the damage there
            shapes |= {frame.shape for _, frame in itertools.chain(early.items(), decoded)}
        self._check_frames(wanted, sound, shapes)

    def _check_indices(self, wanted: list[int]) -> None:
        if not 0 <= wanted[0] <= wanted[-1] < self.num_frames:
            raise IndexError(f"{self._path}: {wanted} outside 0..{self.num_frames - 1}")

    def _check_frames(self, wanted: list[int], sound: Container[int], shapes: set[tuple]) -> None:
        """Refuses a video of which a wanted frame is not sound, or has a shape of its own."""
        if missing := [i for i in wanted if i not in sound]:
            readable = f"{self.count_readable()} of {self.num_frames} can be read"
            raise self._error(f"frame {missing[0]} is damaged; {readable}")
        if len(shapes) > 1:
            raise self._error(f"the frame size changes within it: {sorted(shapes)}")

    def count_readable(self) -> int:
        """Decodes everything and counts the frames that no damage reaches.

        Damage reaches all frames that are decoded after it, up to the next key frame.

        Raises:
            DecodeError: Time is up.
        """
        if self._readable is None:
            with self._bounded():
                sound = set()
                collections.deque(self._decode_all((), sound), maxlen=0)
                self._readable = len(sound)
            if damaged := self.num_frames - self._readable:
                self.oddities.append(f"{damaged} of {self.num_frames} frames are damaged")
        return self._readable

    def _decode_groups(self, wanted: list[int]) -> dict[int, np.ndarray]:
        """Decodes no more than is needed; damage and interlacing are left to `_decode_all`."""
        line = self._line
        keys = sorted(zip(line.key_stamps, line.key_positions, strict=True))
        groups: dict[tuple[int, int], dict[int, int]] = {}
        for i in wanted:
            place = bisect.bisect(keys, (line.stamps[i], math.inf))
            if place:
                groups.setdefault(keys[place - 1], {})[line.stamps[i]] = i
        frames = {}
        with contextlib.suppress(av.FFmpegError):
            for key, group in groups.items():
                frames.update(self._decode_group(key, group))
        return frames

    def _decode_group(self, key: tuple[int, int], group: dict[int, int]) -> dict[int, np.ndarray]:
        """Decodes the frames of `group` (timestamp → index) from a key frame on."""
        context = self._stream.codec_context
        unwanted = "NONREF" if context.name in SKIPPABLE else "DEFAULT"
        frames, unsent = {}, set(group)
        for packet in self._packets_from(*key):
            # Frames that no other frame refers to are decoded only where they are wanted.
            context.skip_frame = "DEFAULT" if packet.pts in group else unwanted
            decoded = context.decode(packet)
            unsent.discard(packet.pts)
            if not unsent:
                decoded += context.decode(None)  # what it holds back for reordering
            for frame in decoded:
                # Of an interlaced frame one field may be left out.
                if frame.is_corrupt or (frame.interlaced_frame and unwanted == "NONREF"):
                    return {}
                if frame.pts in group:
                    frames[group[frame.pts]] = self._to_rgb(frame)
            past = packet.is_keyframe and packet.dts is not None and packet.dts > max(group)
            if past or not unsent:
                break
        return frames

    def _decode_all(
        self, wanted: Sequence[int], sound: set[int]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Decodes from the start as far as wanted frames need it; the whole file without them.

        Yields the wanted frames as they come, each with its index; damage may reach some. In the
        end `sound` gets the indices of all frames, wanted or not, that none reaches.
        """
        line = self._line
        places = {stamp: i for i, stamp in enumerate(line.stamps or ())}
        needed = [line.positions[i] for i in wanted] if places else []
        last = max(needed, default=math.inf)  # position of the last packet that is needed
        wanted, seen, failed, count = set(wanted), set(), set(), 0
        packets = enumerate(self._packets_from(None, 0))
        packets = itertools.takewhile(lambda item: item[0] <= last, packets)
        context = self._stream.codec_context  # of the file as it is opened by now
        context.skip_frame = "DEFAULT"
        for position, packet in itertools.chain(packets, [(line.num_packets, None)]):
            try:
                decoded = context.decode(packet)
            except av.FFmpegError:
                failed.add(position)
                continue
            for frame in decoded:
                i, count = places.get(frame.pts) if places else count, count + 1
                if frame.is_corrupt:
                    failed.add(position if i is None or not places else line.positions[i])
                # Without timestamps it is not known which frames those after damage are.
                elif (i is not None) if places else (i < self.num_frames and not failed):
                    seen.add(i)
                    if i in wanted:
                        yield i, self._to_rgb(frame)
        one_each = context.name == "h264"
        sound |= line.find_sound(seen, failed, one_each=one_each) if places else seen

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        image, turn = to_rgb(frame, self._reformatter, self.color_matrix)
        if turn and turn not in self.oddities:
            self.oddities.append(turn)
        return image

    def close(self) -> None:
        """Closes the file."""
        if self._container is not None:
            self._container.close()

    def __enter__(self) -> "VideoFile":
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
