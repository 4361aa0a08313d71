"""A white page to draw on with Pillow: text, bars, heat maps, strips of frames.

Note: Pillow, for which a label costs a tenth of what it costs a plotting library; pictures are to take next to nothing
of a run. Its font has the letters of ASCII, to which other names are brought.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

BLACK, GREY, LIGHT = (25, 25, 25), (125, 125, 125), (228, 228, 228)
RIGHT, WRONG = (30, 135, 60), (200, 35, 40)
VIEW_COLOURS = {"local": (35, 105, 185), "global": (240, 135, 20)}
# From none to all: white, then ever darker blue.
SHADES = np.array([(255, 255, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107)], dtype=float)
MARGIN = 12
TEXT = 13
# Of a class name.
MOST_LETTERS = 48


class Sheet:
    """A white page, and how things get onto it. Places are pixels from the upper left corner."""

    def __init__(self, width: float, height: float, title: str = "") -> None:
        width = max(width, 2 * MARGIN + column_width([title]))
        self.image = Image.new("RGB", (round(width), round(height)), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.text((MARGIN, MARGIN), title)

    def text(
        self,
        place: tuple[float, float],
        text: str,
        *,
        size: int = TEXT,
        colour: tuple[int, int, int] = BLACK,
        anchor: str = "la",
    ) -> float:
        """Write a line; where it ends."""
        text = ascii_letters(text)
        self.draw.text(place, text, fill=colour, font=_font(size), anchor=anchor)
        return place[0] + _font(size).getlength(text)

    def upright(self, place: tuple[float, float], text: str, *, size: int) -> None:
        """Write a line that rises from ``place``."""
        text = ascii_letters(text)
        line = Image.new("L", (round(_font(size).getlength(text)) + 2, size + 4))
        ImageDraw.Draw(line).text((0, line.height / 2), text, fill=255, font=_font(size), anchor="lm")
        line = line.transpose(Image.Transpose.ROTATE_90)
        self.image.paste(BLACK, (round(place[0] - line.width / 2), round(place[1] - line.height)), line)

    def numbers(self, place: tuple[float, float], count: int, step: tuple[int, int], *, anchor: str) -> None:
        """Number the frames along a row or a column of cells, from 1."""
        for i in range(count):
            x, y = place[0] + (i + 0.5) * step[0], place[1] + (i + 0.5) * step[1]
            self.text((x, y), str(i + 1), size=11, colour=GREY, anchor=anchor)

    def heat_map(
        self, place: tuple[int, int], values: Tensor, cell: int, texts: Sequence[Sequence[str]] | None = None
    ) -> None:
        """Colour a cell a value, from 0, white, to 1; write in them if wanted."""
        levels = np.linspace(0, 1, len(SHADES))
        array = values.double().nan_to_num(0).clamp(0, 1).numpy()
        colours = np.stack([np.interp(array, levels, SHADES[:, channel]) for channel in range(3)], -1)
        picture = Image.fromarray(colours.round().astype(np.uint8))
        self.paste(place, picture.resize((array.shape[1] * cell, array.shape[0] * cell), Image.Resampling.NEAREST))
        for i, row in enumerate(texts or ()):
            for j, text in enumerate(row):
                where = (place[0] + (j + 0.5) * cell, place[1] + (i + 0.5) * cell)
                if text:
                    colour = (255, 255, 255) if array[i, j] > 0.55 else BLACK
                    self.text(where, text, size=min(11, cell // 2), colour=colour, anchor="mm")
        right, bottom = place[0] + array.shape[1] * cell, place[1] + array.shape[0] * cell
        self.draw.rectangle((place[0] - 1, place[1] - 1, right, bottom), outline=GREY)

    def bar(
        self, place: tuple[float, float], width: int, height: int, share: float, colour: tuple[int, int, int]
    ) -> None:
        """A share of a whole, from the left."""
        x, y = place
        self.draw.rectangle((x, y, x + width, y + height), fill=LIGHT)
        if share > 0:
            self.draw.rectangle((x, y, x + share * width, y + height), fill=colour)

    def paste(self, place: tuple[float, float], picture: Image.Image) -> None:
        """Put another picture there."""
        self.image.paste(picture, (round(place[0]), round(place[1])))


def strip(clip: Tensor, side: int, *, most: int | None = 8, upright: bool = False) -> Image.Image:
    """The frames of a clip beside one another.

    Args:
        clip: uint8 ``(frames, 3, height, width)``.
        side: of each frame, in pixels.
        most: evenly chosen ones of more; None: all.
        upright: put them below one another.
    """
    frames = shown_frames(clip, most)
    step = (0, side) if upright else (side, 0)
    joined = Image.new("RGB", (side, side * len(frames)) if upright else (side * len(frames), side))
    for i, frame in enumerate(frames):
        picture = Image.fromarray(frame.permute(1, 2, 0).cpu().numpy())
        joined.paste(picture.resize((side, side), Image.Resampling.BILINEAR), (i * step[0], i * step[1]))
    return joined


def shown_frames(clip: Tensor, most: int | None = 8) -> Tensor:
    """At most so many frames of a clip ``(frames, …)``, evenly chosen, the first and the last among them."""
    if most is None or len(clip) <= most:
        return clip
    return clip[torch.linspace(0, len(clip) - 1, most).round().long()]


def join(pictures: Sequence[Image.Image], *, beside: bool = False) -> Image.Image:
    """Pictures on one white page, below one another or beside one another."""
    widths, heights = [p.width for p in pictures], [p.height for p in pictures]
    size = (sum(widths), max(heights)) if beside else (max(widths), sum(heights))
    page = Image.new("RGB", size, "white")
    for i, picture in enumerate(pictures):
        page.paste(picture, (sum(widths[:i]), 0) if beside else (0, sum(heights[:i])))
    return page


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Class names that take little room: sentences cut off, numbers where the font has no letters for them."""
    shown = {}
    for c, name in enumerate(names):
        letters = ascii_letters(name)
        shown[name] = f"class {c}" if 2 * letters.count("?") > len(letters) else shortened(name)
    return shown


def shortened(text: str) -> str:
    """The text in letters that the font has, cut off where it is longer than a class name may be."""
    text = ascii_letters(text)
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 3]}..."


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(size, 6))


def ascii_letters(text: str) -> str:
    """The same in letters that the font has: "é" as "e", what has no such letter as "?"."""
    decomposed = unicodedata.normalize("NFKD", text)
    bare = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    return bare.encode("ascii", "replace").decode()


def column_width(names: Sequence[str], size: int = TEXT) -> int:
    """Pixels that the longest name takes."""
    return round(max(_font(size).getlength(ascii_letters(name)) for name in names))
