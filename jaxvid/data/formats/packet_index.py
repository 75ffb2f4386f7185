"""Which packet of a video holds which frame, and what damage to one spoils; nothing is decoded."""

import bisect
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


class PacketIndex:
    """The frames of a video in the order in which they are shown.

    Args:
        packets: In the file's order, of each: its timestamp or None, whether it is a key frame,
            whether it is not for showing.
        ordered: Whether frames with distinct timestamps are shown in their order.

    Attributes:
        num_packets: Number of packets.
        num_frames: Number of frames that can be decoded and are shown.
        num_headless: Frames before the first key frame, which cannot be decoded.
        positions: Of each frame's packet in the file.
        stamps: Timestamp of each frame; None: frames are known by their order alone.
        key_positions: Of the key frames' packets in the file.
        key_stamps: Their timestamps.
    """

    def __init__(self, packets: Sequence[tuple[int | None, bool, bool]], *, ordered: bool):
        self.num_packets = len(packets)
        self.key_positions = [position for position, packet in enumerate(packets) if packet[1]]
        self.key_stamps = [packets[position][0] for position in self.key_positions]
        # Those that an edit list cuts off are decoded on the way to others and never shown.
        self.num_headless = self.key_positions[0] if self.key_positions else len(packets)
        shown = [(p[0], i) for i, p in enumerate(packets) if i >= self.num_headless and not p[2]]
        self.num_frames, self.stamps = len(shown), None
        distinct = len(dict(shown)) == len(shown)
        if distinct and ordered and all(p[0] is not None for p in packets):
            shown.sort()
            self.stamps = [stamp for stamp, _ in shown]
        self.positions = [position for _, position in shown]

    def times(self, time_base: Fraction) -> np.ndarray | None:
        """Seconds from the first frame to each, where there are timestamps."""
        if self.stamps is None:
            return None
        stamps = np.array([stamp - self.stamps[0] for stamp in self.stamps], np.float64)
        return stamps * float(time_base)

    def is_variable(self) -> bool:
        """Whether some frames are shown for longer than others."""
        steps = np.diff(np.array(self.stamps or (), np.float64))
        # Timestamps in whole milliseconds differ by one.
        return bool(len(steps) and np.ptp(steps) > max(1, np.median(steps) / 2))

    def find_sound(self, seen: set[int], failed: set[int], *, one_each: bool) -> set[int]:
        """Of the frames that a decoder gave, those that no damage can reach.

        Args:
            seen: Those frames.
            failed: Positions of packets that are damaged.
            one_each: Whether every sound packet gives a frame; then those that gave none failed.
        """
        failed, starts = set(failed), {}  # of each frame: the first packet that it may refer to
        for i, position in enumerate(self.positions):
            run = bisect.bisect_right(self.key_positions, position) - 1
            # Shown before the key frame that precedes it in the file, it also refers to earlier
            # ones; where there are none, no decoder hands it out, and nothing is wrong.
            leads = self.stamps[i] < self.key_stamps[run]
            starts[i] = self.key_positions[max(run - leads, 0)]
            if i not in seen and not leads and one_each:
                failed.add(position)
        failures = [*sorted(failed), math.inf]
        return {
            i for i in seen if failures[bisect.bisect(failures, starts[i] - 1)] > self.positions[i]
        }
