"""Reader of video files: exact random access to frames, with bounded time and memory."""

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

from jaxvid.block_cache import Pinned
from jaxvid.data.formats.packet_index import PacketIndex
from jaxvid.data.formats.rgb import to_rgb
from jaxvid.errors import DecodeError

# Limits for untrusted files, far above what clips need.
MAX_PIXELS = 64_000_000  # per frame: twice that of 8K video
MAX_FRAMES = 1_000_000  # nine hours at 30 frames/s
MAX_SECONDS = 60.0  # wall time of opening a file and decoding it
MAX_EARLY = 64  # decoded frames that may wait for an earlier one; more than any codec reorders
MAX_PACKET_BYTES = 64 * 2**20  # in a file; if there are more, packets are not kept in memory
# Containers that store their frames. Other formats can refer to other files or to addresses.
CONTAINERS = (
    "asf,avi,dv,flv,gif,h264,hevc,ivf,matroska,mov,mpeg,mpegts,mpegvideo,mxf,nut,ogg,rm,"
    "yuv4mpegpipe"
)
# Codecs that always mark frames that no other frame refers to, so that decoders can skip them.
SKIPPABLE = ("h264", "mpeg1video", "mpeg2video", "mpeg4")


class VideoFile(contextlib.AbstractContextManager):
    """An open video file: a `VideoReader` that is not thread-safe.

    Opening reads all packets of the container, without decoding, to find the number of frames and
    their timestamps. The header is not trusted.

    Args:
        path: A regular file. The copy of a remote file is completed, and kept until `close`.
        name: Name of the video in error messages; by default, the path.
        max_seconds: Limit of the wall time of opening and decoding together.
        max_pixels: Limit of the size of a frame.

    Attributes:
        num_frames: Number of frames, without hidden ones and those before the first key frame.
        fps: Average number of frames per second, or None if it is unknown or implausible.
        times: Time of each frame in seconds, relative to the first frame: `(num_frames,)` float64,
            non-decreasing; None if the file has no usable timestamps.
        oddities: Unusual properties of the file, one phrase each. Decoding may add phrases.
        color_matrix: Conversion to RGB, one of `rgb.COLOR_MATRICES`; set it before decoding.

    Raises:
        DecodeError: The file is missing, unreadable, not a video or empty, or exceeds a limit.
        InputError: A remote file cannot be reached.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str = "",
        max_seconds: float = MAX_SECONDS,
        max_pixels: int = MAX_PIXELS,
    ):
        self._path, self._name, self._max_pixels = path, name or path, max_pixels
        self._seconds_left = self._max_seconds = max_seconds
        self._container = self._readable = self._cached = None
        self._reformatter = VideoReformatter()  # shared, because its tables are made once
        self.oddities, self.color_matrix = [], "tagged"
        self._pinned = Pinned.whole_file(path)
        try:
            with self._bounded():
                self._scan()
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def _bounded(self) -> Iterator[None]:
        """Limit the time of the body, and turn its errors into DecodeErrors that name the file."""
        start = time.monotonic()
        self._deadline = start + self._seconds_left
        try:
            yield
        except av.error.ExitError:
            raise self._error(f"decoding takes longer than {self._max_seconds:g} s") from None
        # Not all of FFmpeg's errors are OSErrors, and a path may contain a null character.
        except (av.FFmpegError, OSError, ValueError) as error:
            raise error if isinstance(error, DecodeError) else self._error(error) from None
        finally:
            self._seconds_left -= time.monotonic() - start

    def _open(self) -> None:
        """Open the container and select its first video stream."""
        if self._container is not None:
            self._container.close()
        if not stat.S_ISREG(os.stat(self._path).st_mode):  # a pipe could block forever
            raise self._error("not a regular file")
        limits = {"max_pixels": str(self._max_pixels)}  # the size may change within the file
        self._container = av.open(
            f"file:{self._path}",  # otherwise, "12:30.mp4" is parsed as a network protocol
            options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file", **limits},
            metadata_errors="replace",
            timeout=max(self._deadline - time.monotonic(), 0.001),
        )
        streams, cover = self._container.streams, Disposition.attached_pic  # e.g. an album cover
        videos = [stream for stream in streams.video if not stream.disposition & cover]
        if not videos:
            raise self._error("contains no video stream")
        self._stream = videos[0]
        for stream in streams:
            stream.discard = Discard.default if stream is self._stream else Discard.all
        if (context := self._stream.codec_context) is None:
            raise self._error("no decoder for its codec")
        if context.width * context.height > self._max_pixels:
            raise self._error(f"the frame size {context.width}×{context.height} is too large")
        context.thread_count = 1  # clips are decoded in parallel, not frames
        context.options = limits

    def _packets_from(self, stamp: int | None, position: int) -> Iterator[av.Packet]:
        """Reset the decoder, and return the packets from a key frame on.

        Args:
            stamp: Timestamp of the key frame, or None for the start of the file.
            position: Position of the key frame's packet in the file.
        """
        if self._cached is not None:
            self._stream.codec_context.flush_buffers()
            return self._packets(self._cached[position:])
        if stamp is None:
            self._open()  # the result of a seek to the start depends on the container
        else:
            self._container.seek(stamp, stream=self._stream, backward=True)
        return self._packets()

    def _packets(self, packets: list[av.Packet] | None = None) -> Iterator[av.Packet]:
        """Yield the non-empty packets of a list, or of the container; raise at the deadline."""
        for packet in self._container.demux(self._stream) if packets is None else packets:
            if time.monotonic() > self._deadline:
                raise self._error(f"decoding takes longer than {self._max_seconds:g} s")
            if packet.size:  # an empty packet would flush the decoder
                yield packet

    def _scan(self) -> None:
        """Open the file and read all its packets, to index the frames and set the attributes."""
        self._open()
        is_avi = self._container.format.name == "avi"
        is_vp8 = self._stream.codec_context.name == "vp8"
        guessed, num_bytes, cached, packets = False, 0, [], []
        for packet in self._packets():
            # AVI has no timestamps. FFmpeg's guesses are wrong if frames are reordered (pts ≠ dts).
            guessed |= is_avi and packet.pts != packet.dts
            # Edit lists discard frames. A bit in a VP8 frame's header says whether it is shown.
            hidden = packet.is_discard or (is_vp8 and not memoryview(packet)[0] & 0x10)
            packets.append((packet.pts, packet.is_keyframe, hidden))
            num_bytes += packet.size
            if num_bytes <= MAX_PACKET_BYTES:
                cached.append(packet)
            if len(packets) > MAX_FRAMES:
                raise self._error(f"more than {MAX_FRAMES} frames")
        self._cached = cached if len(cached) == len(packets) else None
        self._index = index = PacketIndex(packets, ordered=not guessed)
        if not index.num_frames:
            raise self._error("no frames")
        self.num_frames, self.times = index.num_frames, index.times(self._stream.time_base)
        rate = self._stream.average_rate
        self.fps = float(rate) if rate and 0.01 <= rate <= 1000 else None
        claimed = self._stream.frames or len(packets)  # 0 in containers without this field
        num_hidden = len(packets) - index.num_headless - self.num_frames
        phrases = {  # phrase → whether it applies
            "no usable timestamps": self.times is None,
            "variable frame rate": index.is_variable(),
            f"header claims {claimed} frames, there are {len(packets)}": claimed != len(packets),
            f"{index.num_headless} frames before the first key frame, left out": index.num_headless,
            f"{num_hidden} hidden frames": num_hidden,
            "no usable frame rate": self.fps is None,
        }
        self.oddities += [phrase for phrase, applies in phrases.items() if applies]

    def get_frames(self, indices: np.ndarray) -> np.ndarray:
        """Decode frames, rotate them upright and convert them to RGB as `color_matrix` says.

        Args:
            indices: Frame numbers in any order, possibly repeated.

        Returns:
            `(t, h, w, c)` uint8, RGB, one frame per index.

        Raises:
            DecodeError: A frame is damaged, frame sizes differ, or decoding takes too long.
            IndexError: A frame number is out of range.
        """
        return np.stack(self.list_frames(indices))

    def list_frames(self, indices: np.ndarray) -> list[np.ndarray]:
        """Decode frames as `get_frames` does, without copying them into one array."""
        requested, intact = sorted({int(i) for i in indices}), set()
        self._check_indices(requested)
        with self._bounded():
            frames = self._decode_groups(requested) if self._index.stamps else {}
            if len(frames) < len(requested):  # open or interlaced GOPs, damage, no timestamps
                frames = dict(self._decode_all(requested, intact))
                frames = {i: frame for i, frame in frames.items() if i in intact}
        self._check_frames(requested, frames, {frame.shape for frame in frames.values()})
        return [frames[int(i)] for i in indices]

    def iter_frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Decode frames in one pass, which suits many frames and files without usable timestamps.

        Do not call other methods during the iteration.

        Args:
            indices: Frame numbers, ascending, without repetitions.

        Yields:
            Each frame `(h, w, c)` uint8.

        Raises:
            DecodeError, IndexError: As in `get_frames`; damaged frames may be yielded before.
        """
        requested, intact = [int(i) for i in indices], set()
        self._check_indices(requested)
        decoded, shapes = self._decode_all(requested, intact), set()
        early = {}  # index → frame that was decoded before an earlier requested one
        for i in requested:
            while i not in early and len(early) < MAX_EARLY:
                with self._bounded():
                    if (item := next(decoded, None)) is None:
                        break
                if item[0] >= i:  # a lower one: the timestamp of a yielded frame occurs again
                    early[item[0]] = item[1]
            if i not in early:  # the frame is damaged
                break
            frame = early.pop(i)
            shapes.add(frame.shape)
            if len(shapes) > 1:
                break
            yield frame
        with self._bounded():  # decode the rest, to find damage in it
            shapes |= {frame.shape for _, frame in itertools.chain(early.items(), decoded)}
        self._check_frames(requested, intact, shapes)

    def _check_indices(self, requested: list[int]) -> None:
        """Raise an IndexError if sorted frame numbers are out of range."""
        if not 0 <= requested[0] <= requested[-1] < self.num_frames:
            raise IndexError(f"{self._name}: {requested} outside 0..{self.num_frames - 1}")

    def _check_frames(self, requested: list[int], intact: Container[int], shapes: set) -> None:
        """Raise a DecodeError if requested frames are damaged or have different shapes."""
        if missing := [i for i in requested if i not in intact]:
            readable = f"{self.count_readable()} of {self.num_frames} can be read"
            raise self._error(f"frame {missing[0]} is damaged; {readable}")
        if len(shapes) > 1:
            raise self._error(f"the frame size changes within the file: {sorted(shapes)}")

    def count_readable(self) -> int:
        """Decode the whole file and count the frames that are not affected by damage.

        Damage affects all frames that are decoded after it, up to the next key frame. Without
        usable timestamps, it affects all frames up to the end of the file.

        Raises:
            DecodeError: Decoding takes too long.
        """
        if self._readable is None:
            with self._bounded():
                intact = set()
                collections.deque(self._decode_all((), intact), maxlen=0)
                self._readable = len(intact)
            if damaged := self.num_frames - self._readable:
                self.oddities.append(f"{damaged} of {self.num_frames} frames are damaged")
        return self._readable

    def _decode_groups(self, requested: list[int]) -> dict[int, np.ndarray]:
        """Decode the requested frames in groups, each from a key frame on; see `_decode_group`.

        An error of FFmpeg ends decoding: this group and the following ones are missing.
        """
        index = self._index
        keys = sorted(zip(index.key_stamps, index.key_positions, strict=True))
        # (timestamp, position) of a key frame → {timestamp: index} of requested frames from it on
        groups: dict[tuple[int, int], dict[int, int]] = {}
        for i in requested:
            if num_before := bisect.bisect(keys, (index.stamps[i], math.inf)):
                groups.setdefault(keys[num_before - 1], {})[index.stamps[i]] = i
        frames = {}
        with contextlib.suppress(av.FFmpegError):
            for key, group in groups.items():
                frames.update(self._decode_group(key, group))
        return frames

    def _decode_group(self, key: tuple[int, int], group: dict[int, int]) -> dict[int, np.ndarray]:
        """Decode requested frames from a key frame on.

        Args:
            key: Timestamp and position of the key frame.
            group: Timestamp → index of the requested frames.

        Returns:
            Index → frame; empty if a frame is damaged or, in codecs of `SKIPPABLE`, interlaced.
        """
        context = self._stream.codec_context
        skip_others = "NONREF" if context.name in SKIPPABLE else "DEFAULT"
        frames, unsent = {}, set(group)  # `unsent`: timestamps not yet sent to the decoder
        for packet in self._packets_from(*key):
            # Non-reference frames are decoded only if they are requested.
            context.skip_frame = "DEFAULT" if packet.pts in group else skip_others
            decoded = context.decode(packet)
            unsent.discard(packet.pts)
            if not unsent:
                decoded += context.decode(None)  # drain the decoder's reordering buffer
            for frame in decoded:
                # In an interlaced frame, one of the two fields may have been skipped.
                if frame.is_corrupt or (frame.interlaced_frame and skip_others == "NONREF"):
                    return {}
                if frame.pts in group:
                    frames[group[frame.pts]] = self._to_rgb(frame)
            is_past = packet.is_keyframe and packet.dts is not None and packet.dts > max(group)
            if is_past or not unsent:
                break
        return frames

    def _decode_all(
        self, requested: Sequence[int], intact: set[int]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Decode from the start of the file to the last requested frame.

        The whole file is decoded if no frame is requested or there are no usable timestamps.

        Args:
            requested: Indices of the frames to yield.
            intact: Set that is filled when the iteration ends, with the indices of all decoded
                frames that are not affected by damage.

        Yields:
            Indices and frames, in the order in which the decoder returns them. The frames may be
            affected by damage.
        """
        index = self._index
        frame_of = {stamp: i for i, stamp in enumerate(index.stamps or ())}
        needed = [index.positions[i] for i in requested] if frame_of else []
        last = max(needed, default=math.inf)  # position of the last packet that is needed
        requested, seen, count = set(requested), set(), 0
        failed = set()  # positions of damaged packets
        packets = enumerate(self._packets_from(None, 0))
        packets = itertools.takewhile(lambda item: item[0] <= last, packets)
        context = self._stream.codec_context  # after `_packets_from`, which may reopen the file
        context.skip_frame = "DEFAULT"
        for position, packet in itertools.chain(packets, [(index.num_packets, None)]):
            try:
                decoded = context.decode(packet)
            except av.FFmpegError:
                failed.add(position)
                continue
            for frame in decoded:
                i = frame_of.get(frame.pts) if frame_of else count
                count += 1
                if frame.is_corrupt:
                    failed.add(position if i is None or not frame_of else index.positions[i])
                    continue
                # Without timestamps, frames after damage cannot be identified.
                is_known = i is not None if frame_of else i < self.num_frames and not failed
                if is_known:
                    seen.add(i)
                    if i in requested:
                        yield i, self._to_rgb(frame)
        per_packet = context.name == "h264"  # other decoders may drop frames of intact packets
        intact |= index.find_intact(seen, failed, frame_per_packet=per_packet) if frame_of else seen

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """Convert a frame to upright RGB; report a rotation in `oddities`."""
        image, turn = to_rgb(frame, self._reformatter, self.color_matrix)
        if turn and turn not in self.oddities:
            self.oddities.append(turn)
        return image

    def close(self) -> None:
        """Close the file."""
        if self._container is not None:
            self._container.close()
        self._pinned.close()

    def __exit__(self, *_) -> None:
        self.close()

    def _error(self, reason: object) -> DecodeError:
        """Return a DecodeError that names the file and a reason, which may be an exception."""
        if isinstance(reason, FileNotFoundError):
            return DecodeError(f"{self._name} does not exist")
        reason = getattr(reason, "strerror", None) or reason  # PyAV's errors and OSErrors
        return DecodeError(
            f"{self._name}: cannot be decoded ({reason}); replace the file or leave it out"
        )
