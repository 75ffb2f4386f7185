"""A video with its predicted classes drawn on it."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxvid.data.check import MAX_SECONDS
from jaxvid.inference.class_timeline import OTHERS, ClassTimeline
from jaxvid.inference.inputs import VideoInput
from jaxvid.inference.video_writer import FONT, TIME_BASE, write_h264
from jaxvid.progress import Progress

TOP_K = 3  # maximum number of classes that are drawn
MIN_SIDE = 240  # px; smaller videos are enlarged, so that the text can be read
MAX_SIDE = 4096  # px; limit of the enlarged videos
SIDE_PER_FONT = 20  # shorter side of the video in units of the font size
UNTIMED_RATE = 30  # frames/s if the frame rate is unknown
PANEL = (0, 0, 0, 170)  # colour and opacity behind the text
WHITE = "#ffffff"
ENCODER = {"crf": "20", "preset": "veryfast"}

Entry = tuple[str, float, str | None]  # label, probability and colour, if any, of a class
# The most likely classes of a whole video and their probabilities, or the classes of its windows.
Classes = Sequence[tuple[str, float]] | ClassTimeline


def write_annotated(video: VideoInput, classes: Classes, output: Path) -> None:
    """Write a video with its most likely classes and their probabilities, without sound.

    The frames and their times are those of the video. Videos smaller than `MIN_SIDE` are enlarged.
    For a timeline, the classes of the current window are drawn, and at the bottom a bar with the
    top-1 class over time and a marker at the current time.

    Args:
        video: The video.
        classes: Its classes.
        output: The MP4 file.

    Raises:
        DecodeError: A frame of the video is damaged.
        OSError: The file cannot be written.
    """
    with video, video.open(MAX_SECONDS) as reader:
        rate = Fraction(reader.fps or UNTIMED_RATE).limit_denominator(1001)
        stamps = times = reader.times
        if times is None:
            times = np.arange(reader.num_frames) / float(rate)
        elif reader.num_frames < 2 or np.diff(times).min() < 2 * TIME_BASE:
            stamps = None
        progress = Progress(reader.num_frames, title="drawing", unit="frame")
        frames = reader.iter_frames(np.arange(reader.num_frames))
        with contextlib.closing(progress):
            pictures = _draw_frames(frames, times, classes, progress)
            write_h264(output, pictures, rate, times=stamps, options=ENCODER)


def _draw_frames(
    frames: Iterator[np.ndarray],
    times: np.ndarray,
    classes: Classes,
    progress: Progress,
) -> Iterator[Image.Image]:
    """Yield each frame `(h, w, c)` with the classes at its time."""
    is_timeline = isinstance(classes, ClassTimeline)
    edges = classes.edges() if is_timeline else np.array([0.0, math.inf])
    shown, panel, bar = None, None, None
    for frame, time in zip(frames, times.tolist(), strict=True):
        picture = _enlarge(Image.fromarray(frame))
        width, height = picture.size
        window = int(np.searchsorted(edges[1:-1], time, side="right"))
        if window != shown:
            shown = window
            entries = _window_entries(classes, window) if is_timeline else _video_entries(classes)
            panel = draw_panel(entries, width, height)
        if is_timeline:
            bar = draw_bar(classes, width, height) if bar is None else bar
            picture.paste(bar, (0, height - bar.height))
            _draw_marker(picture, bar.height, (time - edges[0]) / (edges[-1] - edges[0]))
        picture.paste(panel, (0, 0), panel)
        progress.advance(1)
        yield picture


def _video_entries(classes: Sequence[tuple[str, float]]) -> list[Entry]:
    """Return the classes of a whole video."""
    return [(label, probability, None) for label, probability in classes[:TOP_K]]


def _window_entries(timeline: ClassTimeline, window: int) -> list[Entry]:
    """Return the classes of a window."""
    colour_of, probabilities = timeline.class_colours(), timeline.probabilities[window]
    top = np.argsort(-probabilities, kind="stable")[:TOP_K].tolist()
    return [(timeline.labels[c], float(probabilities[c]), colour_of.get(c, OTHERS)) for c in top]


def _enlarge(picture: Image.Image) -> Image.Image:
    """Enlarge a small picture, and make its width and height even, as H.264 requires."""
    width, height = picture.size
    factor = min(math.ceil(MIN_SIDE / min(width, height)), MAX_SIDE // max(width, height))
    if factor > 1:
        picture = picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    even = tuple(side + side % 2 for side in picture.size)
    if even == picture.size:
        return picture
    canvas = Image.new("RGB", even)
    canvas.paste(picture)
    return canvas


def draw_panel(entries: list[Entry], width: int, height: int) -> Image.Image:
    """Draw classes as white text on a dark, translucent panel for the top left of a frame.

    Args:
        entries: The classes. The colour of a class is drawn as a square before its probability.
        width: Width of the frame in pixels.
        height: Height of the frame in pixels.
    """
    size = max(12, min(height, width) // SIDE_PER_FONT)
    font, gap = ImageFont.truetype(FONT, size), size // 2
    line, square = sum(font.getmetrics()), size if any(colour for *_, colour in entries) else 0
    shares = [f"{100 * probability:.1f} %" for _, probability, _ in entries]
    share_right = math.ceil(gap + square + gap * bool(square) + max(map(font.getlength, shares)))
    left = share_right + gap  # of the labels
    labels = [_shorten(label, font, width - left - gap) for label, _, _ in entries]
    right = left + math.ceil(max(map(font.getlength, labels))) + gap
    panel = Image.new("RGBA", (min(right, width), len(entries) * line + 2 * gap), PANEL)
    draw = ImageDraw.Draw(panel)
    for i, (share, label, (_, _, colour)) in enumerate(zip(shares, labels, entries, strict=True)):
        top = gap + i * line
        if colour:
            y = top + (line - square) // 2
            draw.rectangle((gap, y, gap + square - 1, y + square - 1), fill=colour)
        draw.text((share_right, top), share, font=font, fill=WHITE, anchor="ra")
        draw.text((left, top), label, font=font, fill=WHITE)
    return panel


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut off the end of a text that is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def draw_bar(timeline: ClassTimeline, width: int, height: int) -> Image.Image:
    """Draw the top-1 class over time as a bar for the bottom of a frame."""
    edges = timeline.edges()
    bar = Image.new("RGB", (width, max(8, height // 30)))
    draw, spans = ImageDraw.Draw(bar), (edges - edges[0]) / (edges[-1] - edges[0]) * width
    lefts, rights = spans[:-1].round().tolist(), spans[1:].round().tolist()
    for left, right, colour in zip(lefts, rights, timeline.top1_colours(), strict=True):
        draw.rectangle((left, 0, max(left, right - 1), bar.height), fill=colour)
    return bar


def _draw_marker(picture: Image.Image, bar_height: int, share: float) -> None:
    """Draw a white line with black edges over the bar at a share of its width."""
    half = max(1, picture.width // 300)
    x = round(min(max(share, 0), 1) * (picture.width - 1))
    top, draw = picture.height - bar_height - 2 * half, ImageDraw.Draw(picture)
    draw.rectangle((x - 2 * half, top, x + 2 * half, picture.height), fill="#000000")
    draw.rectangle((x - half, top, x + half, picture.height), fill=WHITE)
