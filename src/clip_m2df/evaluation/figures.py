"""Pictures of a validation. Pure functions: numbers in, an image out.

Note: drawn with Pillow, for which a label costs a tenth of what it costs a plotting library; pictures are to take next
to nothing of a run. Its font has the letters of ASCII, to which other names are brought.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from clip_m2df.evaluation.evidence import HardEpisode, QueryEvidence, Reliabilities, ValidationEvidence

BLACK, GREY, LIGHT = (25, 25, 25), (125, 125, 125), (228, 228, 228)
RIGHT, WRONG = (30, 135, 60), (200, 35, 40)
VIEW_COLOURS = {"local": (35, 105, 185), "global": (240, 135, 20)}
# From none to all: white, then ever darker blue.
SHADES = np.array([(255, 255, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107)], dtype=float)
MARGIN = 12
TEXT = 13
# Of a class name.
MOST_LETTERS = 48
# More classes than this, and counts would be too small to read.
MOST_COUNTED = 40


def validation_pictures(found: ValidationEvidence) -> dict[str, Image.Image]:
    """All pictures of a validation by name, as far as there is something to show."""
    found = _with_short_names(found)
    pictures: dict[str, Image.Image] = {}
    if found.confusion.numel():
        pictures["confusion_matrix"] = confusion_matrix(found.confusion, found.class_names)
        pictures["class_accuracy"] = class_accuracies(found.confusion, found.class_names)
    for rank, episode in enumerate(found.hardest, 1):
        pictures[f"hardest_episode_{rank}"] = hard_episode(episode, rank=rank)
        if episode.evidence is not None:
            pictures["alignment"] = alignments(episode, episode.evidence)
            if episode.evidence.chosen is not None:
                pictures["prompt_scores"] = prompt_scores(episode, episode.evidence)
    if found.reliabilities.confidences:
        pictures["reliability"] = reliabilities(found.reliabilities)
    return pictures


def confusion_matrix(confusion: Tensor, class_names: Sequence[str]) -> Image.Image:
    """Queries by their own class, a row each, and by the class that they were taken for.

    Args:
        confusion: int64 ``(n_classes, n_classes)``.
        class_names: in the same order.
    """
    n = len(class_names)
    cell = max(7, min(30, 900 // n))
    size = min(TEXT, cell)
    names = _column(class_names, size)
    left, top = MARGIN + names + 6, 3 * MARGIN + TEXT + names + 6
    title = "queries by their class (rows) and by what they were taken for (columns)"
    sheet = _Sheet(left + n * cell + MARGIN, top + n * cell + MARGIN, title)
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    counts = [[str(count or "") for count in row] for row in confusion.tolist()] if n <= MOST_COUNTED else None
    sheet.heat_map((left, top), shares, cell, counts)
    for c, name in enumerate(class_names):
        sheet.text((left - 6, top + (c + 0.5) * cell), name, size=size, anchor="rm")
        sheet.upright((left + (c + 0.5) * cell, top - 6), name, size=size)
    return sheet.image


def class_accuracies(confusion: Tensor, class_names: Sequence[str]) -> Image.Image:
    """The share of each class's queries that were recognised, the hardest class first.

    Args:
        confusion: see :func:`confusion_matrix`.
        class_names: the same.
    """
    queries, right = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    shares = [r / q if q else 0.0 for r, q in zip(right, queries, strict=True)]
    row, width, left = TEXT + 6, 320, 2 * MARGIN + _column(class_names)
    top = 2 * MARGIN + TEXT
    sheet = _Sheet(left + width + 130, top + len(class_names) * row + MARGIN, "accuracy of each class")
    order = sorted(range(len(class_names)), key=lambda c: (not queries[c], shares[c]))
    for place, c in enumerate(order):
        y = top + place * row
        sheet.text((left - MARGIN, y + row / 2), class_names[c], anchor="rm")
        sheet.bar((left, y + 2), width, row - 4, shares[c], VIEW_COLOURS["local"])
        said = f"{shares[c]:.0%} of {queries[c]}" if queries[c] else "no queries"
        sheet.text((left + width + 6, y + row / 2), said, anchor="lm")
    return sheet.image


def hard_episode(episode: HardEpisode, *, rank: int = 1, most_queries: int = 10) -> Image.Image:
    """The queries of an episode, each beside videos of its own class and of the one that it was taken for.

    Args:
        episode: with its frames or without.
        rank: its place among the hardest.
        most_queries: show those of the highest losses only.
    """
    order = sorted(range(len(episode.labels)), key=lambda q: -episode.losses[q])[:most_queries]
    side, gap, label = 40, 16, TEXT + 7
    frames = 0 if episode.query is None else len(shown_frames(episode.query[0]))
    width = max(frames * side, _column(episode.class_names) + 90)
    row, top = label + (side if frames else 0) + 8, 3 * MARGIN + 2 * TEXT
    title = f"hardest episode no. {rank}: episode {episode.number}, cross-entropy {episode.loss:.2f}"
    sheet = _Sheet(2 * MARGIN + 3 * width + 2 * gap, top + len(order) * row + 4, title)
    columns = [MARGIN + place * (width + gap) for place in range(3)]
    for x, head in zip(columns, ("query", "its own class (first shot)", "what it was taken for"), strict=True):
        sheet.text((x, 2 * MARGIN + TEXT), head, colour=GREY)
    for place, q in enumerate(order):
        y = top + place * row
        own, taken = episode.labels[q], episode.predicted[q]
        colour = RIGHT if own == taken else WRONG
        sheet.text((columns[0], y), f"cross-entropy {episode.losses[q]:.2f}", colour=colour)
        sheet.text((columns[1], y), episode.class_names[own], colour=colour)
        sheet.text((columns[2], y), "the same" if own == taken else episode.class_names[taken], colour=colour)
        if episode.query is not None and episode.support is not None:
            clips = [episode.query[q], episode.support[own], episode.support[taken]]
            for x, clip in zip(columns, clips if own != taken else clips[:2], strict=False):
                sheet.paste((x, y + label), strip(clip, side))
    return sheet.image


def alignments(episode: HardEpisode, evidence: QueryEvidence) -> Image.Image:
    """How OTAM aligns the hardest query of an episode with its own class and with the rival, in each view.

    Args:
        episode: whose hardest query it is.
        evidence: on that query.
    """
    q = episode.hardest
    own, rival = episode.labels[q], episode.rivals[q]
    views = list(evidence.alignments)
    rows, columns = evidence.alignments[views[0]].shape[1:]
    cell = max(11, min(32, 400 // max(rows, columns)))
    # Of a panel: numbers and frames of the query on its left, of the class below.
    side = cell if episode.query is not None else 0
    left, head = 22 + side, 2 * (TEXT + 6)
    width = left + max(columns * cell, _column(episode.class_names) - 22) + 2 * MARGIN
    height = head + rows * cell + side + 22 + MARGIN
    title = "soft alignment: rows are the query's frames, columns those of the class (first shot)"
    sheet = _Sheet(MARGIN + len(views) * width, 2 * MARGIN + TEXT + 2 * height, title)
    darkest = max(float(a.max()) for a in evidence.alignments.values())
    rival_role = "taken for" if episode.predicted[q] == rival else "runner-up"
    for place, (role, c) in enumerate(((f"its class{' ' * 2}", own), (rival_role, rival))):
        for column, view in enumerate(views):
            x, y = MARGIN + column * width, 2 * MARGIN + TEXT + place * height
            distance = f"{view} view, distance {evidence.distances[view][place]:.2f}"
            sheet.text((x, y), distance, colour=VIEW_COLOURS.get(view, GREY))
            sheet.text((x, y + TEXT + 5), f"{role.strip()}: {episode.class_names[c]}")
            x, y = x + left, y + head
            values = evidence.alignments[view][place]
            numbers = [[f"{v:.1f}" if v >= 0.05 else "" for v in line] for line in values.tolist()]
            sheet.heat_map((x, y), values / darkest, cell, numbers if cell >= 24 else None)
            sheet.numbers((x - side - 6, y), rows, (0, cell), anchor="rm")
            sheet.numbers((x, y + rows * cell + side + 4), columns, (cell, 0), anchor="mt")
            if episode.query is not None and episode.support is not None:
                sheet.paste((x - side, y), strip(episode.query[q], cell, most=None, upright=True))
                sheet.paste((x, y + rows * cell), strip(episode.support[c], cell, most=None))
    return sheet.image


def prompt_scores(episode: HardEpisode, evidence: QueryEvidence) -> Image.Image:
    """How much each frame of the hardest query looks like each class's prompt; the frames that count are framed.

    Args:
        episode: whose hardest query it is.
        evidence: on that query.
    """
    n_way, frames = evidence.frame_scores.shape
    cell = max(14, min(42, 500 // frames))
    left = 2 * MARGIN + max(_column(episode.class_names), 60)
    side = cell if episode.query is not None else 0
    top = 2 * MARGIN + TEXT + side + 20
    title = "prompt selection: cosine of each frame with each class's prompt"
    sheet = _Sheet(left + frames * cell + 210, top + n_way * cell + MARGIN, title)
    if episode.query is not None:
        sheet.paste((left, top - side - 18), strip(episode.query[episode.hardest], cell, most=None))
    sheet.numbers((left, top - 16), frames, (cell, 0), anchor="mt")
    low, high = evidence.frame_scores.min(), evidence.frame_scores.max()
    numbers = [[f"{v:z.2f}" for v in row] for row in evidence.frame_scores.tolist()] if cell >= 30 else None
    sheet.heat_map((left, top), (evidence.frame_scores - low) / (high - low).clamp(min=1e-6), cell, numbers)
    for c in range(n_way):
        y = top + c * cell
        for t in evidence.counted[c].nonzero().flatten().tolist():
            sheet.draw.rectangle(
                (left + t * cell + 1, y + 1, left + (t + 1) * cell - 2, y + cell - 2), outline=WRONG, width=2
            )
        colour = RIGHT if c == episode.labels[episode.hardest] else BLACK
        sheet.text((left - MARGIN, y + cell / 2), episode.class_names[c], colour=colour, anchor="rm")
        said = f"probability {float(evidence.probabilities[c]):.2f}{', chosen' if c == evidence.chosen else ''}"
        sheet.text((left + frames * cell + 8, y + cell / 2), said, colour=colour, anchor="lm")
    return sheet.image


def reliabilities(found: Reliabilities, *, bins: int = 24) -> Image.Image:
    """Histograms of the views' confidences, and how often each view teaches the other."""
    bar, height, gap = 7, 160, 46
    width = len(VIEW_COLOURS) * bar * bins
    panels = list(found.confidences.items())
    top = 3 * MARGIN + 2 * TEXT
    bottom = top + height + 2 * MARGIN + TEXT
    sheet = _Sheet(2 * MARGIN + max(len(panels) * (width + gap) - gap, 620), bottom + len(found.teaches) * 24 + MARGIN)
    x: float = MARGIN
    for view in panels[0][1] if panels else ():
        sheet.draw.rectangle((x, MARGIN + 2, x + 10, MARGIN + 12), fill=VIEW_COLOURS.get(view, GREY))
        x = sheet.text((x + 16, MARGIN), f"{view} view") + 2 * MARGIN
    for place, (kind, by_view) in enumerate(panels):
        x = MARGIN + place * (width + gap)
        low, high = (float(limit) for limit in torch.cat(list(by_view.values())).aminmax())
        high = max(high, low + 1e-4)
        counts = {view: torch.histc(column, bins, low, high).tolist() for view, column in by_view.items()}
        most = max(max(column) for column in counts.values())
        sheet.text((x, 2 * MARGIN + TEXT), f"{kind} confidence, most in a bin {most:.0f}")
        for shift, (view, column) in enumerate(counts.items()):
            for b, count in enumerate(column):
                at, tall = x + (b * len(VIEW_COLOURS) + shift) * bar, round(count / most * height)
                if tall:
                    sheet.draw.rectangle(
                        (at, top + height - tall, at + bar - 1, top + height - 1), fill=VIEW_COLOURS.get(view, GREY)
                    )
        sheet.draw.line((x, top + height, x + width, top + height), fill=BLACK)
        sheet.text((x, top + height + 5), f"{low:.3f}")
        sheet.text((x + width, top + height + 5), f"{high:.3f}", anchor="ra")
    for place, (name, share) in enumerate(found.teaches.items()):
        y, view = bottom + place * 24, name.partition("_")[0]
        sheet.text((MARGIN, y + 9), f"{name.replace('_to_', ' teaches ')} on {share:.1%} of the queries", anchor="lm")
        sheet.bar((MARGIN + 300, y), 300, 18, share, VIEW_COLOURS.get(view, GREY))
    return sheet.image


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


class _Sheet:
    """A white page, and how things get onto it. Places are pixels from the upper left corner."""

    def __init__(self, width: float, height: float, title: str = "") -> None:
        width = max(width, 2 * MARGIN + _column([title]))
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
        text = _ascii(text)
        self.draw.text(place, text, fill=colour, font=_font(size), anchor=anchor)
        return place[0] + _font(size).getlength(text)

    def upright(self, place: tuple[float, float], text: str, *, size: int) -> None:
        """Write a line that rises from ``place``."""
        text = _ascii(text)
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


def _with_short_names(found: ValidationEvidence) -> ValidationEvidence:
    """With class names that take little room: sentences cut off, numbers where the font has no letters for them."""
    shown = {}
    for c, name in enumerate(found.class_names):
        letters = _ascii(name)
        text = f"class {c}" if 2 * letters.count("?") > len(letters) else letters
        shown[name] = text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 3]}..."
    hardest = [episode._replace(class_names=[shown[name] for name in episode.class_names]) for episode in found.hardest]
    return found._replace(class_names=[shown[name] for name in found.class_names], hardest=hardest)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(size, 6))


def _ascii(text: str) -> str:
    """The same in letters that the font has: "é" as "e", what has no such letter as "?"."""
    decomposed = unicodedata.normalize("NFKD", text)
    bare = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    return bare.encode("ascii", "replace").decode()


def _column(names: Sequence[str], size: int = TEXT) -> int:
    """Pixels that the longest name takes."""
    return round(max(_font(size).getlength(_ascii(name)) for name in names))
