"""Shows where a network looks: python -m jaxvid.visualize VIDEO --model FOLDER --output FILE.

Attention rollout (Abnar & Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020,
arXiv:2005.00928) twice: of each frame's class token over that frame's patches, as heat on the
frame, and of the video's class token over the frames, as bars. OUT.png is a contact sheet, OUT.mp4
a slide show of the frames that the network saw.

Frames are drawn whole and upright, darkened where the network's crop does not reach. Colour begins
at an even share of a frame's attention and ends at the strongest patch of the clip. Rollout follows
attention alone, not what values and MLPs make of it: where a network looks, not why it decides.

Some networks take keys and values in part from the neighbouring frames. Their rollout ignores that
and leaves out summary tokens: the heat is approximate in time.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from jaxvid import entry_point

    entry_point.run("jaxvid.visualize")

import argparse
import contextlib
import math
import os
import sys
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from jaxvid.errors import InputError
from jaxvid.inference.attention_rollout import Look, look_at

COLUMNS = 8  # frames in a row of a contact sheet
SHEET_PANEL, SLIDE_PANEL = (152, 152), (480, 360)  # px; the most width and height of a frame
MIN_WIDTH, BAR_HEIGHT, GAP = 480, 44, 8  # px
RATES, UNTIMED_RATE = (1.0, 4.0), 2.0  # frames/s of a slide show; where no time is known
FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")  # Pillow's has no accents
COLOURS = matplotlib.colormaps["plasma"]
ALPHA, DARKENED = 0.75, 0.4  # opacity of the strongest heat; brightness outside the crop
PAPER, INK, FAINT, BAR, PALE_BAR = "#ffffff", "#222222", "#777777", "#0b6fb8", "#a9c9e2"


def paint(look: Look, place: int, bounds: tuple[int, int], *, heat: bool = True) -> Image.Image:
    """Draws a frame of a clip and outlines the network's crop.

    Args:
        look: The clip.
        place: Which frame.
        bounds: The most width and height in pixels; the frame's aspect ratio is kept.
        heat: Draw the heat, and darken what lies outside the crop.
    """
    _, h, w, _ = look.frames.shape
    scale = min(bounds[0] / w, bounds[1] / h)
    width, height = max(1, round(w * scale)), max(1, round(h * scale))
    picture = Image.fromarray(look.frames[place]).resize((width, height), Image.Resampling.BICUBIC)
    top, left, bottom, right = look.box
    if heat:
        _, rows, columns = look.heat.shape
        # From the centre of a pixel to the patch that it lies in, if any.
        x = (columns / (right - left) / width, 0, -left * columns / (right - left))
        y = (0, rows / (bottom - top) / height, -top * rows / (bottom - top))
        even = 1 / (rows * columns)
        most = max(look.heat.max(), 2 * even)  # noise about an even share stays pale
        strength = ((look.heat[place] - even) / (most - even)).clip(0, 1).astype(np.float32)
        move = (picture.size, Image.Transform.AFFINE, x + y)
        strength = Image.fromarray(strength).transform(*move, fillcolor=-1)
        strength = np.asarray(strength)[..., None]  # (h w 1)
        alpha = ALPHA * np.sqrt(strength.clip(0, 1))
        pixels = np.asarray(picture) * np.where(strength < 0, DARKENED, 1)
        pixels = (1 - alpha) * pixels + alpha * 255 * COLOURS(strength[..., 0])[..., :3]
        picture = Image.fromarray(np.rint(pixels).astype(np.uint8))
    # The first pixel whose centre lies in the crop, and the first behind it: the line is around it.
    x0, x1 = (math.ceil(edge * width - 0.5) for edge in (left, right))
    y0, y1 = (math.ceil(edge * height - 0.5) for edge in (top, bottom))
    ImageDraw.Draw(picture).rectangle((x0 - 1, y0 - 1, x1, y1), outline=PAPER)
    return picture


def draw_sheet(look: Look) -> Image.Image:
    """Draws all frames of a clip as a contact sheet, each with its heat, bar, number and time."""
    cells, side = [], SHEET_PANEL[0]
    for place, weight in enumerate(look.weights):
        cell = [paint(look, place, SHEET_PANEL), _draw_bar(look, place, side, BAR)]
        texts = (f"{100 * weight:.1f} %", 13, INK), (_tell(look, place), 11, FAINT)
        cells.append(_arrange([*cell, *(_write(*text, side) for text in texts)], gap=4))
    width = max(MIN_WIDTH, _arrange(cells, COLUMNS).width)
    header, notes = _describe(look, width)
    return _frame([header, _arrange(cells, COLUMNS), notes])


def draw_slide(look: Look, place: int) -> Image.Image:
    """Draws one frame of a clip, without and with its heat, over the bars of all."""
    pair = _arrange([paint(look, place, SLIDE_PANEL, heat=heat) for heat in (False, True)], 2)
    width, count = max(MIN_WIDTH, pair.width), len(look.frames)
    colours = [BAR if i == place else PALE_BAR for i in range(count)]
    bars = [_draw_bar(look, i, width // count - 2, colour) for i, colour in enumerate(colours)]
    weight = f"{100 * look.weights[place]:.1f} % of the attention"
    told = _write(f"{place + 1} of {count}, {_tell(look, place)}: {weight}", 14, INK, width)
    header, notes = _describe(look, width)
    return _frame([header, pair, _arrange(bars, count, 2), told, notes])


def _describe(look: Look, width: int) -> tuple[Image.Image, Image.Image]:
    """The video and its classes; the notes."""
    top = [_write(f"{100 * share:.1f} %  {label}", 15, INK, width) for label, share in look.top]
    header = _arrange([_write(look.name, 18, INK, width), *top], gap=2)
    return header, _arrange([_write(note, 12, FAINT, width) for note in look.notes], gap=2)


def _tell(look: Look, place: int) -> str:
    time = "" if look.times is None else f", {look.times[place]:.2f} s"
    return f"frame {look.indices[place]}{time}"


def _draw_bar(look: Look, place: int, width: int, colour: str) -> Image.Image:
    """A frame's weight: as high as the picture for the greatest; a line marks an even share."""
    picture = Image.new("RGB", (width, BAR_HEIGHT), PAPER)
    draw, shares = ImageDraw.Draw(picture), np.array((look.weights[place], look.weights.mean()))
    top, even = ((1 - shares / look.weights.max()) * (BAR_HEIGHT - 1)).round().tolist()
    draw.rectangle((0, top, width, BAR_HEIGHT), fill=colour)
    draw.line((0, even, width, even), fill=INK)
    return picture


def _write(text: str, size: int, colour: str, width: int) -> Image.Image:
    """Text, broken into lines that fit into a width in pixels."""
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
    """Pictures in rows of `columns`, `gap` pixels apart."""
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


def _frame(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a column, with a margin; width and height are even, as yuv420p needs them."""
    sheet = _arrange(pictures)
    border = (GAP, GAP, GAP + sheet.width % 2, GAP + sheet.height % 2)
    return ImageOps.expand(sheet, border, PAPER)


def save_slides(look: Look, output: Path) -> None:
    """Writes a clip's frames as an H.264 slide show, in real time within the bounds of `RATES`."""
    slides = [draw_slide(look, place) for place in range(len(look.frames))]
    span = 0 if look.times is None else look.times[-1] - look.times[0]
    rate = np.clip((len(slides) - 1) / span, *RATES).item() if span else UNTIMED_RATE
    options = {"movflags": "faststart"}
    with av.open(f"file:{output}", "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000))
        (stream.width, stream.height), stream.pix_fmt = slides[0].size, "yuv420p"
        stream.options = {"crf": "18", "tune": "stillimage"}
        for slide in slides:
            container.mux(stream.encode(av.VideoFrame.from_image(slide)))
        container.mux(stream.encode())


def visualize(
    video: str | Path, folder: str | Path, output: str | Path, *, clip: int = 0, num_clips: int = 3
) -> None:
    """Writes a contact sheet (.png) or a slide show (.mp4) of where a network looks.

    An existing `output` is replaced; the other arguments are those of `look_at`.

    Raises:
        InputError: As in `look_at`, or the output cannot be written.
    """
    output = Path(output)
    if (suffix := output.suffix.lower()) not in (".png", ".mp4"):
        raise InputError(f"{output}: the output's name must end in .png or .mp4")
    if not output.parent.is_dir():
        raise InputError(f"{output}: {output.parent} is no folder; make it or name another")
    if output.exists() and Path(video).exists() and output.samefile(video):
        raise InputError(f"{output} is the video itself; name another file")
    look = look_at(video, folder, clip=clip, num_clips=num_clips)
    partial = output.with_name(f".{output.name}.partial")
    try:
        draw_sheet(look).save(partial, "png") if suffix == ".png" else save_slides(look, partial)
        partial.replace(output)
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}); name another") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 if some input was unusable."""
    parser = argparse.ArgumentParser(prog="python -m jaxvid.visualize", description=__doc__)
    parser.add_argument("video", metavar="VIDEO")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a model folder")
    parser.add_argument("--output", required=True, metavar="FILE", help="OUT.png or OUT.mp4")
    parser.add_argument("--clip", type=int, default=0, help="which clip of the video (default 0)")
    parser.add_argument("--num_clips", type=int, default=3, help="of how many (default 3)")
    args = parser.parse_args(argv)
    try:
        visualize(args.video, args.model, args.output, clip=args.clip, num_clips=args.num_clips)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE
    print(os.fsencode(args.output).decode(errors="replace"))
    return 0
