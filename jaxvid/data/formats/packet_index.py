"""Packet index of a video: the packet of each frame, without decoding."""

import bisect
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


class PacketIndex:
    """The frames of a video, and the positions of their packets in the file.

    Frames are in presentation order if the timestamps are usable, otherwise in file order.

    Args:
        packets: For each packet in file order: its timestamp or None, whether it is a key frame,
            and whether its frame is hidden.
        ordered: Whether the timestamps define the presentation order.

    Attributes:
        num_packets: Number of packets.
        num_frames: Number of frames that can be decoded and are not hidden.
        num_headless: Number of packets before the first key frame. They cannot be decoded.
        positions: Position of each frame's packet in the file.
        stamps: Timestamp of each frame in units of the time base, or None if they are not usable.
        key_positions: Positions of the key frames' packets in the file.
        key_stamps: Timestamps of the key frames.
    """

    def __init__(self, packets: Sequence[tuple[int | None, bool, bool]], *, ordered: bool):
        self.num_packets = len(packets)
        self.key_positions = [position for position, packet in enumerate(packets) if packet[1]]
        self.key_stamps = [packets[position][0] for position in self.key_positions]
        self.num_headless = self.key_positions[0] if self.key_positions else len(packets)
        # Hidden frames, e.g. those that an edit list cuts off, are decoded because other frames
        # depend on them, but they are never shown.
        shown = [(p[0], i) for i, p in enumerate(packets) if i >= self.num_headless and not p[2]]
        self.num_frames, self.stamps = len(shown), None
        distinct = len(dict(shown)) == len(shown)
        if distinct and ordered and all(p[0] is not None for p in packets):
            shown.sort()
            self.stamps = [stamp for stamp, _ in shown]
        self.positions = [position for _, position in shown]

    def times(self, time_base: Fraction) -> np.ndarray | None:
        """Return the times in seconds relative to the first frame, or None without timestamps."""
        if self.stamps is None:
            return None
        stamps = np.array([stamp - self.stamps[0] for stamp in self.stamps], np.float64)
        return stamps * float(time_base)

    def is_variable(self) -> bool:
        """Return whether the frame rate is variable."""
        steps = np.diff(np.array(self.stamps or (), np.float64))
        # Even at a constant rate, steps between timestamps in rounded milliseconds differ by 1.
        return bool(len(steps) and np.ptp(steps) > max(1, np.median(steps) / 2))

    def find_intact(self, seen: set[int], failed: set[int], *, frame_per_packet: bool) -> set[int]:
        """Return the indices of the decoded frames that are not affected by damage.

        The timestamps must be usable.

        Args:
            seen: Indices of the frames that a decoder returned.
            failed: Positions of damaged packets.
            frame_per_packet: Whether the decoder returns a frame for every intact packet. If so, a
                packet without a frame is damaged.
        """
        failed = set(failed)
        starts = {}  # frame → position of the first packet that it may depend on
        for i, position in enumerate(self.positions):
            gop = bisect.bisect_right(self.key_positions, position) - 1  # group of pictures
            # A leading frame follows the key frame of its GOP in the file, but is shown before it.
            # It may depend on the previous GOP too. If there is none, decoders do not return the
            # frame, so a leading frame that is not returned does not count as damage.
            is_leading = self.stamps[i] < self.key_stamps[gop]
            starts[i] = self.key_positions[max(gop - is_leading, 0)]
            if i not in seen and not is_leading and frame_per_packet:
                failed.add(position)
        # A frame is intact if the first damaged packet from `starts` on comes after its own packet.
        failures = [*sorted(failed), math.inf]
        return {
            i for i in seen if failures[bisect.bisect(failures, starts[i] - 1)] > self.positions[i]
        }
