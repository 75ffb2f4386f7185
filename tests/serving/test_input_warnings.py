"""Warnings about unusual videos."""

import numpy as np
import pytest

from jaxvid.data.clips.transforms import FRACTIONS
from jaxvid.serving.input_warnings import describe

BRIGHT = np.full((3, 4, 32, 32, 3), 100, np.uint8)
MOVING = np.array([[0, 1, 2, 3]])
SHORT = "The video is too short for a clip: frames are repeated."
STILL = "The video has a single frame: there is no motion to classify."


@pytest.mark.parametrize(
    ("video", "indices", "padded", "expected"),
    [
        (BRIGHT, MOVING, False, []),
        (BRIGHT, np.array([[0, 0, 1, 1]]), True, [SHORT]),
        (BRIGHT, np.zeros((2, 4), int), True, [STILL]),
        (
            BRIGHT // 10,
            MOVING,
            False,
            ["The video is very dark: the mean grey level is 10 of 255."],
        ),
        (BRIGHT.astype(np.uint16) * FRACTIONS, MOVING, False, []),
        (BRIGHT.astype(np.uint16), np.zeros((1, 4), int), True, [STILL, "The video is very dark"]),
    ],
)
def test_unusual_videos_are_described(video, indices, padded, expected):
    messages = describe({"video": video, "indices": indices, "padded": np.bool_(padded)})
    assert len(messages) == len(expected)
    for message, start in zip(messages, expected, strict=True):
        assert message.startswith(start)
