"""Draw the contact sheets of ``docs/motion_shapes.md``.

Usage: python scripts/motion_shapes_sheets.py [--out FOLDER]

Of ``scene``, ``order`` and ``mixed`` a video of each test class, and of one class of the first two what the knobs make
of it, at the levels of the study. Videos are those that a test plays: rendered, encoded and read back, the middle frame
of each segment.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from PIL import Image, ImageDraw, ImageFont

from clip_m2df.motion_shapes import FAMILIES, NO_KNOBS, Knobs, render
from clip_m2df.motion_shapes.scenes import OUTLIERS
from clip_m2df.video.transforms import ClipReader

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs/figures"
STUDY = ROOT / "configs/study/full.yaml"
# Of the sheet of knobs, a class of each family.
EXAMPLES = {"scene": "a green square moving up", "order": "something growing then moving up"}
CLASS_FRAMES, KNOB_FRAMES = 8, 6
SIDE, BETWEEN, GAP = 52, 2, 6  # pixels: of a frame, between frames, between strips
MARGIN, TEXT = 12, 13  # pixels: around the sheet, of letters
BLACK, GREY = (25, 25, 25), (125, 125, 125)
COLOURS = 96  # of a sheet's palette, so that it takes little room


class Row(NamedTuple):
    """What is said at the left, and the videos beside it."""

    said: str
    videos: Sequence[Path]


def class_rows(family: str, folder: Path) -> list[Row]:
    """A video of each test class."""
    videos = _render(folder, family, NO_KNOBS)
    return [Row(c.label, [videos / "test" / c.slug / "00.mp4"]) for c in FAMILIES[family] if c.split == "test"]


def knob_rows(folder: Path, levels: Mapping[str, Sequence[float]]) -> list[Row]:
    """Videos of ``EXAMPLES`` as usual, at each level of overlap and of noise, and outliers of each kind."""
    settings = [("as usual", NO_KNOBS)]
    settings += [(f"{name} {level}", Knobs(**{name: level})) for name in ("overlap", "noise") for level in levels[name]]
    places = [(said, knobs, "test", 0) for said, knobs in settings]
    # Which kind an outlier is goes by the video's number.
    places += [
        (f"outlier: {kind.replace('_', ' ')}", Knobs(outliers=1), "outliers", number)
        for number, kind in enumerate(OUTLIERS)
    ]
    rows = []
    for said, knobs, split, number in places:
        roots = {family: _render(folder / family / str(knobs), family, knobs) for family in EXAMPLES}
        slugs = {family: label.replace(" ", "_") for family, label in EXAMPLES.items()}
        rows.append(Row(said, [root / split / slugs[family] / f"{number:02d}.mp4" for family, root in roots.items()]))
    return rows


def _render(root: Path, family: str, knobs: Knobs) -> Path:
    counts = {"test": len(OUTLIERS) if knobs.outliers else 1}
    return render(root, family=family, knobs=knobs, videos_per_class=counts, workers=1, progress=False).parent


def sheet(rows: Sequence[Row], frames: int, heads: Sequence[str] = ()) -> Image.Image:
    """Draw rows of strips.

    Args:
        rows: with the same number of videos each.
        frames: of a strip.
        heads: what is said above each column of strips.

    Returns:
        A picture of few colours.
    """
    font = ImageFont.load_default(TEXT)
    left = 2 * MARGIN + round(max(font.getlength(row.said) for row in rows))
    top = 2 * MARGIN + TEXT if heads else MARGIN
    width = frames * (SIDE + BETWEEN) - BETWEEN
    columns = [left + place * (width + MARGIN) for place in range(len(rows[0].videos))]
    size = (columns[-1] + width + MARGIN, top + len(rows) * (SIDE + GAP) - GAP + MARGIN)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for x, head in zip(columns, heads, strict=False):
        draw.text((x, MARGIN), head, fill=GREY, font=font)
    for place, row in enumerate(rows):
        y = top + place * (SIDE + GAP)
        draw.text((left - MARGIN, y + SIDE / 2), row.said, fill=BLACK, font=font, anchor="rm")
        for x, video in zip(columns, row.videos, strict=True):
            for number, frame in enumerate(_frames(video, frames)):
                picture.paste(frame, (x + number * (SIDE + BETWEEN), y))
    return picture.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def _frames(video: Path, frames: int) -> list[Image.Image]:
    """Frames of a video as an evaluation reads them."""
    clip, _ = ClipReader(frames, resize=SIDE, size=SIDE, decoder="pyav").read(str(video))
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip]


def main() -> None:
    """Draw and write all sheets."""
    parser = argparse.ArgumentParser(description="Draw the contact sheets of docs/motion_shapes.md.")
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    levels = yaml.safe_load(STUDY.read_text(encoding="utf-8"))["parts"]["main"]["knobs"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sheets = {family: sheet(class_rows(family, folder / family), CLASS_FRAMES) for family in (*EXAMPLES, "mixed")}
        heads = [f"{family}: {label}" for family, label in EXAMPLES.items()]
        sheets["knobs"] = sheet(knob_rows(folder / "knobs", levels), KNOB_FRAMES, heads)
    for name, picture in sheets.items():
        picture.save(out / f"motion_shapes_{name}.png", optimize=True)


if __name__ == "__main__":
    main()
