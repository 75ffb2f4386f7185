"""Writing of pictures as an H.264 video, and the font for text in pictures."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import matplotlib
import numpy as np
from PIL import Image

# Pillow's default font lacks accented letters.
FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
TIME_BASE = Fraction(1, 90_000)  # unit of timestamps at a variable frame rate, in seconds


def write_h264(
    path: Path,
    pictures: Iterable[Image.Image],
    rate: Fraction,
    *,
    times: np.ndarray | None = None,
    options: dict[str, str],
) -> None:
    """Write pictures as an MP4 file.

    Args:
        path: The file.
        pictures: At least one; all have the same size, with even width and height.
        rate: Frames per second.
        times: Time of each picture in seconds, increasing by at least `TIME_BASE`; None: at `rate`.
        options: Options of the encoder x264.

    Raises:
        OSError: The file cannot be written.
    """
    with av.open(f"file:{path}", "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.pix_fmt, stream.options = "yuv420p", options
        if times is not None:
            stream.codec_context.time_base = TIME_BASE
        for i, picture in enumerate(pictures):
            if not i:
                stream.width, stream.height = picture.size
            frame = av.VideoFrame.from_image(picture)
            if times is not None:
                frame.pts, frame.time_base = round(times[i] / TIME_BASE), TIME_BASE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
