"""Warnings about unusual videos."""

from collections.abc import Mapping

import numpy as np

from jaxvid.data.clips.transforms import FRACTIONS

STEP = 8  # distance in pixels of the pixels whose mean is computed
DARK = 16  # mean grey level, 0 to 255, below which a clip counts as very dark


def describe(clip: Mapping[str, np.ndarray]) -> list[str]:
    """Return one sentence for each unusual property of a video.

    Args:
        clip: The result of `load_eval_views`.
    """
    video, indices = clip["video"], clip["indices"]
    white = 255 * FRACTIONS if video.dtype == np.uint16 else 255
    sample = video[..., ::STEP, ::STEP, :]  # the mean of all pixels would delay other requests
    level = 255 * float(sample.mean()) / white
    is_still = (indices == indices.flat[0]).all()
    messages = {
        "The video is too short for a clip: frames are repeated.": clip["padded"] and not is_still,
        "The video has a single frame: there is no motion to classify.": is_still,
        f"The video is very dark: the mean grey level is {level:.0f} of 255.": level < DARK,
    }
    return [message for message, applies in messages.items() if applies]
