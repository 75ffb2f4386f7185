"""Visualise attention: the command `jaxvid visualize`."""

if __name__ == "__main__":  # before the slow imports below
    from jaxvid import entry_point

    entry_point.run("jaxvid.visualize")

import math
import os
import sys
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from jaxvid import parsers
from jaxvid.atomic import check_output, is_same_file, output_path, replacing
from jaxvid.errors import InputError
from jaxvid.inference.attention_rollout import AttentionRollout
from jaxvid.inference.classifier import Classifier
from jaxvid.inference.video_writer import FONT, write_h264

COLUMNS = 8  # frames per row of a contact sheet
SHEET_PANEL, SLIDE_PANEL = (152, 152), (480, 360)  # px; maximum width and height of a frame
MIN_WIDTH, BAR_HEIGHT, GAP = 480, 44, 8  # px
RATES = (1.0, 4.0)  # lowest and highest frame rate of a slide show, in frames/s
UNTIMED_RATE = 2.0  # frame rate if the times of the frames are unknown or all equal
COLOURS = matplotlib.colormaps["plasma"]
ALPHA, DARKENED = 0.75, 0.4  # opacity of the strongest heat; brightness outside the crop
PAPER, INK, FAINT, BAR, PALE_BAR = "#ffffff", "#222222", "#777777", "#0b6fb8", "#a9c9e2"


def draw_frame(
    rollout: AttentionRollout, t: int, bounds: tuple[int, int], *, heat: bool = True
) -> Image.Image:
    """Draw a frame with its heat map and the outline of the network's crop.

    Args:
        rollout: The clip.
        t: Index of the frame in the clip.
        bounds: Maximum width and height in pixels. The aspect ratio is preserved.
        heat: Draw the heat map and darken the frame outside the crop.
    """
    _, h, w, _ = rollout.frames.shape
    scale = min(bounds[0] / w, bounds[1] / h)
    width, height = max(1, round(w * scale)), max(1, round(h * scale))
    picture = Image.fromarray(rollout.frames[t]).resize((width, height), Image.Resampling.BICUBIC)
    top, left, bottom, right = rollout.crop_box
    if heat:
        attention = rollout.patch_attention
        _, rows, columns = attention.shape
        # Affine map from the centre of a pixel to the patch that contains it.
        x = (columns / (right - left) / width, 0, -left * columns / (right - left))
        y = (0, rows / (bottom - top) / height, -top * rows / (bottom - top))
        uniform = 1 / (rows * columns)
        # At least twice the uniform share, so that almost uniform attention does not look strong.
        peak = max(attention.max(), 2 * uniform)
        strength = ((attention[t] - uniform) / (peak - uniform)).clip(0, 1).astype(np.float32)
        to_patches = (picture.size, Image.Transform.AFFINE, x + y)
        # -1 marks pixels outside the crop.
        strength = Image.fromarray(strength).transform(*to_patches, fillcolor=-1)
        strength = np.asarray(strength)[..., None]  # (h w 1)
        alpha = ALPHA * np.sqrt(strength.clip(0, 1))
        pixels = np.asarray(picture) * np.where(strength < 0, DARKENED, 1)
        pixels = (1 - alpha) * pixels + alpha * 255 * COLOURS(strength[..., 0])[..., :3]
        picture = Image.fromarray(np.rint(pixels).astype(np.uint8))
    # Pixels x0 to x1 - 1 and y0 to y1 - 1 have their centres in the crop. Outline them.
    x0, x1 = (math.ceil(edge * width - 0.5) for edge in (left, right))
    y0, y1 = (math.ceil(edge * height - 0.5) for edge in (top, bottom))
    ImageDraw.Draw(picture).rectangle((x0 - 1, y0 - 1, x1, y1), outline=PAPER)
    return picture


def draw_sheet(rollout: AttentionRollout) -> Image.Image:
    """Draw a clip as a contact sheet: each frame with its heat map, bar, share, number and time."""
    cells, cell_width = [], SHEET_PANEL[0]
    for t, share in enumerate(rollout.frame_attention):
        pictures = [
            draw_frame(rollout, t, SHEET_PANEL),
            _draw_bar(rollout, t, cell_width, BAR),
            _draw_text(f"{100 * share:.1f} %", 13, INK, cell_width),
            _draw_text(_frame_caption(rollout, t), 11, FAINT, cell_width),
        ]
        cells.append(_arrange(pictures, gap=4))
    width = max(MIN_WIDTH, _arrange(cells, COLUMNS).width)
    header, notes = _draw_header_and_notes(rollout, width)
    return _add_margin([header, _arrange(cells, COLUMNS), notes])


def draw_slide(rollout: AttentionRollout, t: int) -> Image.Image:
    """Draw one frame of a clip without and with its heat map, above the bars of all frames."""
    pair = _arrange([draw_frame(rollout, t, SLIDE_PANEL, heat=heat) for heat in (False, True)], 2)
    width, count = max(MIN_WIDTH, pair.width), len(rollout.frames)
    colours = [BAR if i == t else PALE_BAR for i in range(count)]
    bars = [_draw_bar(rollout, i, width // count - 2, colour) for i, colour in enumerate(colours)]
    share = f"{100 * rollout.frame_attention[t]:.1f} % of the attention"
    caption = f"{t + 1} of {count}, {_frame_caption(rollout, t)}: {share}"
    header, notes = _draw_header_and_notes(rollout, width)
    bars, caption = _arrange(bars, count, 2), _draw_text(caption, 14, INK, width)
    return _add_margin([header, pair, bars, caption, notes])


def _draw_header_and_notes(
    rollout: AttentionRollout, width: int
) -> tuple[Image.Image, Image.Image]:
    """Draw the header (file name and classes) and the notes."""
    top = [
        _draw_text(f"{100 * probability:.1f} %  {label}", 15, INK, width)
        for label, probability in rollout.top
    ]
    header = _arrange([_draw_text(rollout.name, 18, INK, width), *top], gap=2)
    return header, _arrange([_draw_text(note, 12, FAINT, width) for note in rollout.notes], gap=2)


def _frame_caption(rollout: AttentionRollout, t: int) -> str:
    time = "" if rollout.times is None else f", {rollout.times[t]:.2f} s"
    return f"frame {rollout.indices[t]}{time}"


def _draw_bar(rollout: AttentionRollout, t: int, width: int, colour: str) -> Image.Image:
    """Draw a frame's attention as a bar, relative to the largest; a line marks a uniform share."""
    picture, attention = Image.new("RGB", (width, BAR_HEIGHT), PAPER), rollout.frame_attention
    draw, shares = ImageDraw.Draw(picture), np.array((attention[t], attention.mean()))
    top, uniform = ((1 - shares / attention.max()) * (BAR_HEIGHT - 1)).round().tolist()
    draw.rectangle((0, top, width, BAR_HEIGHT), fill=colour)
    draw.line((0, uniform, width, uniform), fill=INK)
    return picture


def _draw_text(text: str, size: int, colour: str, width: int) -> Image.Image:
    """Draw text, wrapped to a width in pixels."""
    font = ImageFont.truetype(FONT, size)
    for columns in range(len(text), 0, -1):
        lines = textwrap.wrap(text, columns)
        if all(font.getlength(line) <= width for line in lines):
            break
    height = sum(font.getmetrics())
    picture = Image.new("RGB", (width, height * len(lines)), PAPER)
    for i, line in enumerate(lines):
        ImageDraw.Draw(picture).text((0, i * height), line, font=font, fill=colour)
    return picture


def _arrange(pictures: Sequence[Image.Image], columns: int = 1, gap: int = GAP) -> Image.Image:
    """Arrange pictures in rows of `columns`, `gap` pixels apart."""
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    width = max(sum(picture.width + gap for picture in row) for row in rows) - gap
    heights = [max(picture.height for picture in row) + gap for row in rows]
    canvas, y = Image.new("RGB", (width, sum(heights) - gap), PAPER), 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for picture in row:
            canvas.paste(picture, (x, y))
            x += picture.width + gap
        y += height
    return canvas


def _add_margin(pictures: Sequence[Image.Image]) -> Image.Image:
    """Stack pictures and add a margin that makes width and height even, as yuv420p requires."""
    sheet = _arrange(pictures)
    border = (GAP, GAP, GAP + sheet.width % 2, GAP + sheet.height % 2)
    return ImageOps.expand(sheet, border, PAPER)


def save_slides(rollout: AttentionRollout, output: Path) -> None:
    """Write a clip as an H.264 slide show, at the rate of its frames, clipped to `RATES`."""
    slides = [draw_slide(rollout, t) for t in range(len(rollout.frames))]
    span = 0 if rollout.times is None else rollout.times[-1] - rollout.times[0]
    rate = np.clip((len(slides) - 1) / span, *RATES).item() if span else UNTIMED_RATE
    rate = Fraction(rate).limit_denominator(1000)
    write_h264(output, slides, rate, options={"crf": "18", "tune": "stillimage"})


def visualize(
    video: str | Path, folder: str | Path, output: str | Path, *, clip: int = 0, num_clips: int = 3
) -> None:
    """Write the attention rollout of a clip as a contact sheet (.png) or slide show (.mp4).

    Args:
        video: Video file or URL.
        folder: Model folder, or another name of a model; see `resolve_model`.
        output: File to write, which may be in an object store; an existing one is replaced.
        clip: Index of the clip.
        num_clips: Number of clips, which are spread over the video as in evaluation.

    Raises:
        InputError: The model folder or the video is unusable, `clip` is out of range, or the output
            has a different suffix or cannot be written.
    """
    if is_same_file(output, video):
        raise InputError(f"{output} is the video itself; choose another file")
    output = output_path(output)
    if (suffix := output.suffix.lower()) not in (".png", ".mp4"):
        raise InputError(f"{output}: the suffix must be .png or .mp4; choose another file name")
    if not isinstance(output, Path):
        check_output("--output", output)
    elif not output.parent.is_dir():
        raise InputError(f"{output}: {output.parent} is not a folder; create it or choose another")
    rollout = Classifier(folder).attention(video, clip=clip, num_clips=num_clips)
    with replacing(output) as partial:
        if suffix == ".png":
            draw_sheet(rollout).save(partial, "png")
        else:
            save_slides(rollout, partial)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 if the input is unusable."""
    args = parsers.visualize().parse_args(argv)
    try:
        visualize(args.video, args.model, args.output, clip=args.clip, num_clips=args.num_clips)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE
    print(os.fsencode(args.output).decode(errors="replace"))
    return 0
