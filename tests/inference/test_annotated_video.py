"""Videos with their predicted classes drawn on them."""

import dataclasses
from fractions import Fraction

import av
import numpy as np
import pytest

from jaxvid.inference.annotated_video import draw_bar, draw_panel, write_annotated
from jaxvid.inference.class_timeline import COLOURS, ClassTimeline
from jaxvid.inference.inputs import VideoInput

TIMELINE = ClassTimeline(
    video="a",
    labels=["left", "right"],
    starts=np.array([0.0, 1.0, 2.0]),
    ends=np.array([1.0, 2.0, 2.5]),
    padded=np.zeros(3, bool),
    stride=1.0,
    probabilities=np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]),
)


def write_video(path, size, times):
    """Write grey frames of a height and width, shown at these times in units of 1/12 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        (stream.height, stream.width), stream.pix_fmt = size, "yuv444p"
        stream.codec_context.time_base = Fraction(1, 12)
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 128, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 12)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path) -> tuple[np.ndarray, list[float]]:
    """Return the frames `(t, h, w, c)` of a video and their times in seconds."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.stack([f.to_ndarray(format="rgb24") for f in frames]), [f.time for f in frames]


def is_near(pixels, colour: str) -> np.ndarray:
    """Return where pixels have about a colour."""
    expected = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (abs(pixels.astype(int) - expected) < 40).all(axis=-1)


def test_classes_of_a_video_are_drawn_on_every_frame(tmp_path):
    video = write_video(tmp_path / "in.mp4", (240, 321), range(6))
    write_annotated(VideoInput(video), [("left", 0.9), ("right", 0.1)], tmp_path / "out.mp4")
    frames, times = read(tmp_path / "out.mp4")
    assert frames.shape == (6, 240, 322, 3)  # the width is even, as H.264 requires
    np.testing.assert_allclose(times, np.arange(6) / 12, atol=1e-4)
    text = is_near(frames, "#ffffff").sum(axis=(1, 2))
    assert text.min() > 100
    assert is_near(frames[:, 150:, 150:300], "#808080").all()


def test_times_of_a_variable_frame_rate_are_preserved(tmp_path):
    stamps = [0, 1, 2, 8, 9, 20]
    video = write_video(tmp_path / "in.mp4", (240, 320), stamps)
    write_annotated(VideoInput(video), [("left", 0.9)], tmp_path / "out.mp4")
    np.testing.assert_allclose(read(tmp_path / "out.mp4")[1], np.array(stamps) / 12, atol=1e-3)


def test_the_class_of_each_window_and_the_bar_are_drawn(tmp_path):
    frames = np.full((30, 30, 40, 3), 128, np.uint8)  # 2.5 s, enlarged 8 times
    write_annotated(VideoInput(frames, fps=12), TIMELINE, tmp_path / "out.mp4")
    drawn, times = read(tmp_path / "out.mp4")
    assert drawn.shape == (30, 240, 320, 3)
    left, right = COLOURS[:2]  # `left` is top-1 in two of three windows
    edges = TIMELINE.edges()
    np.testing.assert_allclose(edges, [0, 1, 1.875, 2.5])
    for frame, time in zip(drawn, times, strict=True):
        window = np.searchsorted(edges[1:-1], time, side="right")
        panel, bar = frame[:40], frame[-4:]
        squares = [np.flatnonzero(is_near(panel, colour).any(axis=1)) for colour in (left, right)]
        assert (squares[0][0] < squares[1][0]) == (window != 1)  # the top-1 class is above
        white = np.flatnonzero(is_near(bar, "#ffffff").all(axis=0))
        assert abs(white.mean() - time / 2.5 * 319) < 4
        assert is_near(bar[:, 140:150], right).mean() > 0.5 or abs(time - 1.13) < 0.2


def test_a_frame_rate_is_assumed_if_it_is_unknown(tmp_path):
    write_annotated(
        VideoInput(np.zeros((3, 8, 8, 3), np.uint8)), [("a", 1.0)], tmp_path / "out.mp4"
    )
    frames, times = read(tmp_path / "out.mp4")
    assert frames.shape == (3, 240, 240, 3)
    np.testing.assert_allclose(times, [0, 1 / 30, 2 / 30], atol=1e-3)


@pytest.mark.parametrize("size", [(240, 320), (1080, 240), (240, 240)])
def test_text_fits_into_the_frame(size):
    height, width = size
    labels = ("a", "wide Wgj " * 99)
    short, long = (draw_panel([(text, 0.5, "#ffffff")] * 3, width, height) for text in labels)
    assert short.width < long.width <= width
    assert long.height < height
    ink = np.asarray(long)[..., 0] > 128
    assert not ink[:, -1].any()
    assert not ink[[0, -1]].any()


def test_a_bar_of_more_windows_than_pixels():
    count = 1000
    probabilities = np.tile([[0.9, 0.1], [0.1, 0.9]], (count // 2, 1))
    times = np.arange(count + 1.0)
    many = dataclasses.replace(
        TIMELINE,
        starts=times[:-1],
        ends=times[1:],
        padded=np.zeros(count, bool),
        probabilities=probabilities,
    )
    assert draw_bar(many, 100, 240).size == (100, 8)
