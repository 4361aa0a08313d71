"""Figures of a validation, and strips of video frames.

Note: matplotlib is imported where something is drawn, so that nothing else waits for it. No state of pyplot is touched.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_m2df.errors import printable
from clip_m2df.evaluation.evidence import Alignment, HardEpisode, PromptScore, Reliabilities, ValidationEvidence
from clip_m2df.evaluation.metrics import class_results
from clip_m2df.evaluation.open_set import OpenSetCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# At this resolution text of matplotlib's usual size, 10 points, is 12.5 pixels high.
DPI = 90
BLACK, GREY, LIGHT = "#191919", "#7d7d7d", "#e4e4e4"
RIGHT, WRONG = "#1e873c", "#c82328"
VIEW_COLOURS = {"local": "#2369b9", "global": "#f08714"}
# More classes than this, and counts would be too small to read.
MOST_COUNTED = 40
# Longer class names are cut off.
MOST_LETTERS = 48
# Coordinate systems take the whole figure; what is written around them comes on top.
WHOLE = {"left": 0.0, "right": 1.0, "bottom": 0.0, "top": 1.0}


def validation_pictures(found: ValidationEvidence) -> dict[str, Image.Image]:
    """All pictures of a validation by name, as far as there is something to show."""
    pictures: dict[str, Image.Image] = {}
    if found.confusion.numel():
        pictures["confusion_matrix"] = picture(confusion_matrix(found.confusion, found.class_names))
        pictures["class_accuracy"] = picture(class_accuracies(found.confusion, found.class_names))
    for rank, episode in enumerate(found.hardest, 1):
        pictures[f"hardest_episode_{rank}"] = picture(hard_episode(episode, rank=rank))
        clip = None if episode.query is None else episode.query[episode.hardest]
        if aligned := episode.alignments():
            title = "soft alignment: rows are the query's frames, columns those of the class (first shot)"
            pictures["alignment"] = picture(alignment_maps(aligned, clip, title))
        if scores := episode.prompt_scores():
            title = "prompt selection: cosine of each frame with each class's prompt"
            own = episode.labels[episode.hardest]
            pictures["prompt_scores"] = picture(prompt_map(scores, clip, title, own=own))
    if found.reliabilities.confidences:
        pictures["reliability"] = picture(reliabilities(found.reliabilities))
    if found.open_set:
        pictures["open_set"] = picture(open_set_curves(found.open_set))
    return pictures


def picture(figure: Figure) -> Image.Image:
    """Draw a figure, whatever room its texts take beside the coordinate systems."""
    drawn = io.BytesIO()
    bounds = figure.get_tightbbox().padded(0.12)  # inches
    figure.savefig(drawn, format="tiff", bbox_inches=bounds)  # nothing is compressed, which takes time
    return Image.open(drawn).convert("RGB")


def chart(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """A figure with a single coordinate system.

    Args:
        width: of the coordinate system in pixels; labels come on top.
        height: the same.
        title: above it.
    """
    figure = _figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_title(title, size=10, loc="left", y=1)
    return figure, axes


def confusion_matrix(confusion: Tensor, class_names: Sequence[str]) -> Figure:
    """Queries by their own class, a row each, and by the class that they were taken for.

    Args:
        confusion: int64 ``(n_classes, n_classes)``.
        class_names: in the same order.
    """
    n = len(class_names)
    cell = max(8, min(30, 900 // n))
    figure, axes = chart(n * cell, n * cell, "queries by their class (rows) and by what they were taken for (columns)")
    counts = [[str(count or "") for count in row] for row in confusion.tolist()] if n <= MOST_COUNTED else []
    _heat_map(axes, confusion / confusion.sum(1, keepdim=True).clamp(min=1), cell, counts)
    names = [shortened(name) for name in class_names]
    axes.set_xticks(range(n), names, rotation=90, size=min(10, 0.7 * cell))
    axes.set_yticks(range(n), names, size=min(10, 0.7 * cell))
    return figure


def class_accuracies(confusion: Tensor, class_names: Sequence[str]) -> Figure:
    """The share of each class's queries that were recognised, the hardest class first.

    Args:
        confusion: see :func:`confusion_matrix`.
        class_names: the same.
    """
    results = sorted(class_results(class_names, confusion), key=lambda r: (not r.queries, r.accuracy))
    figure, axes = chart(320, 19 * len(results), "accuracy of each class")
    said = [f"{result.accuracy:.0%} of {result.queries}" if result.queries else "no queries" for result in results]
    bars = zip(results, said, strict=True)
    draw_shares(axes, [(result.name, result.accuracy, VIEW_COLOURS["local"], text) for result, text in bars])
    return figure


def draw_shares(axes: Axes, shares: Sequence[tuple[str, float, str, str]]) -> None:
    """Draw shares of a whole as bars, one below the other.

    Args:
        axes: where to.
        shares: what is written at the left of each bar, the share, the bar's colour, and what is written at its right.
    """
    names, lengths, colours, texts = zip(*shares, strict=True)
    rows = range(len(shares))
    axes.bar_label(axes.barh(rows, 1, color=LIGHT), texts, padding=6)
    axes.barh(rows, lengths, color=colours)
    axes.set_yticks(rows, [shortened(name) for name in names])
    axes.set(xlim=(0, 1), ylim=(len(shares) - 0.5, -0.5), xticks=[])
    axes.tick_params(length=0)
    axes.set_frame_on(False)


def hard_episode(episode: HardEpisode, *, rank: int = 1, most_queries: int = 10) -> Figure:
    """The queries of an episode, each beside videos of its own class and of the one that it was taken for.

    Args:
        episode: with its frames or without.
        rank: its number among the hardest.
        most_queries: show those of the highest losses only.
    """
    queries = episode.queries()[:most_queries]
    side, line = 40, 20  # pixels of a frame's side and of a line of text
    frames = 0 if episode.query is None else len(shown_frames(episode.query[0]))
    column = max(frames * side, 8 * max(len(shortened(name)) for name in episode.class_names), 200) + 16
    row = line + side + 8 if frames else line
    page = np.full((line + len(queries) * row, 3 * column, 3), 255, np.uint8)
    title = f"hardest episode no. {rank}: episode {episode.number}, cross-entropy {episode.loss:.2f}"
    figure, axes = chart(page.shape[1], page.shape[0], title)
    for i, head in enumerate(("query", "its own class (first shot)", "what it was taken for")):
        axes.text(i * column, line / 2, head, color=GREY, va="center")
    for y, query in zip(range(line, len(page), row), queries, strict=True):
        own, predicted = map(shortened, query.class_names)
        texts = (f"cross-entropy {query.loss:.2f}", own, "the same" if query.right else predicted)
        for i, (text, clip) in enumerate(zip(texts, query.clips, strict=True)):
            axes.text(i * column, y + line / 2, text, color=RIGHT if query.right else WRONG, va="center")
            if clip is not None and not (query.right and i == 2):
                at = (slice(y + line, y + line + side), slice(i * column, i * column + frames * side))
                page[at] = np.asarray(strip(clip, side))
    axes.imshow(page)
    axes.set_axis_off()
    return figure


def alignment_maps(alignments: Sequence[Alignment], clip: Tensor | None, title: str) -> Figure:
    """How OTAM aligns a clip with some classes, a row each, in each view, a column each.

    Args:
        alignments: with each class.
        clip: its frames, uint8 ``(frames, 3, height, width)``.
        title: of all.
    """
    views = alignments[0].weights
    rows, columns = next(iter(views.values())).shape
    cell = max(11, min(32, 400 // max(rows, columns)))
    captions = [f"{found.role}: {shortened(found.class_name)}" for found in alignments]
    # Pixels of a map with the frames beside and below it, and of the room for what is written around it.
    width, height, around = (columns + 1) * cell, (rows + 1) * cell, 70
    beside = max(40, 8 * max(28, *map(len, captions)) - width)
    figure = _figure(len(views) * (width + beside) - beside, len(captions) * (height + around) - around)
    spaces = WHOLE | {"wspace": beside / width, "hspace": around / height}
    grid = figure.subplots(len(captions), len(views), squeeze=False, gridspec_kw=spaces)
    figure.text(0, 1 + 50 / figure.bbox.height, title)
    largest = max(found.largest for found in alignments)
    for line, found, caption in zip(grid, alignments, captions, strict=True):
        for axes, (view, weights) in zip(line, found.weights.items(), strict=True):
            heading = f"{view} view, distance {found.distances[view]:.2f}\n{caption}"
            axes.set_title(heading, size=10, loc="left", y=1, color=VIEW_COLOURS.get(view, GREY))
            texts = [[f"{v:.1f}" if v >= 0.05 else "" for v in row] for row in weights.tolist()]
            _heat_map(axes, weights / largest, cell, texts if cell >= 24 else [])
            _number(axes.set_yticks, rows, cell)
            _number(axes.set_xticks, columns, cell)
            if clip is not None:
                axes.imshow(strip(clip, cell, most=None, upright=True), extent=(-1.5, -0.5, rows - 0.5, -0.5))
            if found.example is not None:
                extent = (-0.5, columns - 0.5, rows + 0.5, rows - 0.5)
                axes.imshow(strip(found.example, cell, most=None), extent=extent)
            axes.set(xlim=(-1.5, columns - 0.5), ylim=(rows + 0.5, -0.5))
    return figure


def prompt_map(scores: Sequence[PromptScore], clip: Tensor | None, title: str, *, own: int | None = None) -> Figure:
    """How much each frame of a clip looks like the prompts of some classes; the frames that count are framed.

    Args:
        scores: of each class.
        clip: its frames, uint8 ``(frames, 3, height, width)``.
        title: of all.
        own: the index of the class that it is of, where that is known.
    """
    from matplotlib.patches import Rectangle

    cosines = torch.tensor([score.cosines for score in scores])
    n_way, frames = cosines.shape
    cell = max(14, min(42, 500 // frames))
    figure, axes = chart(frames * cell, (n_way + 1) * cell, title)
    low, high = cosines.min(), cosines.max()
    texts = [[f"{v:z.2f}" for v in score.cosines] for score in scores] if cell >= 30 else []
    _heat_map(axes, (cosines - low) / (high - low).clamp(min=1e-6), cell, texts)
    _number(axes.set_xticks, frames, cell)
    axes.set_yticks(range(n_way), [shortened(score.class_name) for score in scores])
    for c, (score, label) in enumerate(zip(scores, axes.get_yticklabels(), strict=True)):
        for t in np.flatnonzero(score.counted):
            axes.add_patch(Rectangle((t - 0.45, c - 0.45), 0.9, 0.9, fill=False, edgecolor=WRONG, linewidth=1.5))
        colour = RIGHT if c == own else BLACK
        label.set_color(colour)
        said = f"probability {score.probability:.2f}{', chosen' if score.chosen else ''}"
        axes.text(frames - 0.3, c, said, va="center", color=colour)
    if clip is not None:
        axes.imshow(strip(clip, cell, most=None), extent=(-0.5, frames - 0.5, -0.5, -1.5))
    axes.set(xlim=(-0.5, frames - 0.5), ylim=(n_way - 0.5, -1.5))
    return figure


def reliabilities(found: Reliabilities, *, bins: int = 24) -> Figure:
    """Histograms of the views' confidences, and how often each view teaches the other."""
    kinds = list(found.confidences)
    layout: Any = [kinds]
    heights = [160]  # pixels of each row
    if found.teaches:
        layout.append(["teaches"] * len(kinds))
        heights.append(20 * len(found.teaches))
    figure = _figure(380 * len(kinds) - 60, sum(heights) + 35 * (len(heights) - 1))
    spaces = WHOLE | {"wspace": 60 / 320, "hspace": 35 * len(heights) / sum(heights)}
    grid = figure.subplot_mosaic(layout, height_ratios=heights, gridspec_kw=spaces)
    for kind, by_view in found.confidences.items():
        axes = grid[kind]
        colours = [VIEW_COLOURS.get(view, GREY) for view in by_view]
        axes.hist([column.numpy() for column in by_view.values()], bins, color=colours, label=list(by_view))
        axes.set_title(f"{kind} confidence", size=10, loc="left", y=1)
        axes.legend(title="view")
    if found.teaches:
        shares = []
        for direction, share in found.teaches.items():
            teacher, student = direction.split("_to_")
            shares.append((f"{teacher} teaches {student}", share, VIEW_COLOURS[teacher], f"{share:.1%} of the queries"))
        draw_shares(grid["teaches"], shares)
    return figure


def open_set_curves(found: Mapping[str, OpenSetCurve]) -> Figure:
    """The shares of known queries that are accepted, and accepted and right, over that of the unknown ones.

    Args:
        found: of each score.
    """
    figure = _figure(660, 280)
    titles = ("known queries that are accepted", "accepted and classified rightly")
    grid = figure.subplots(1, 2, gridspec_kw=WHOLE | {"wspace": 100 / 280})
    for column, (axes, title) in enumerate(zip(grid, titles, strict=True), 1):
        for (name, curve), line in zip(found.items(), ("-", "--", "-.", ":"), strict=False):
            axes.plot(curve.points[:, 0], curve.points[:, column], line, label=f"{name}, AUROC {curve.auroc:.3f}")
        axes.set_title(title, size=10, loc="left", y=1)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="unknown queries that are accepted")
    grid[0].legend(loc="best")
    return figure


def strip(clip: Tensor, side: int, *, most: int | None = 8, upright: bool = False) -> Image.Image:
    """The frames of a clip beside one another.

    Args:
        clip: uint8 ``(frames, 3, height, width)``.
        side: of each frame, in pixels.
        most: evenly chosen ones of more; None: all.
        upright: put them below one another.
    """
    frames = [Image.fromarray(frame) for frame in shown_frames(clip, most).permute(0, 2, 3, 1).cpu().numpy()]
    small = [np.asarray(frame.resize((side, side), Image.Resampling.BILINEAR)) for frame in frames]
    return Image.fromarray(np.concatenate(small, axis=0 if upright else 1))


def shown_frames(clip: Tensor, most: int | None = 8) -> Tensor:
    """At most so many frames of a clip ``(frames, …)``, evenly chosen, the first and the last among them."""
    if most is None or len(clip) <= most:
        return clip
    return clip[torch.linspace(0, len(clip) - 1, most).round().long()]


def shortened(text: str) -> str:
    """A text as figures show it: cut off where it is long, letters that matplotlib's font lacks by their numbers.

    Marks of direction, which the font has, are numbers too: none turns what is drawn around.
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    text = "".join(x if font.get_char_index(ord(x)) else f"\\u{ord(x):04x}" for x in printable(text))
    if len(text) > MOST_LETTERS:
        text = f"{text[: MOST_LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"
    return text.replace("$", r"\$")  # between two of them would be an equation


def _figure(width: float, height: float) -> Figure:
    """An empty figure of so many pixels."""
    from matplotlib.figure import Figure

    return Figure((width / DPI, height / DPI), DPI)


def _heat_map(axes: Axes, values: Tensor, cell: int, texts: Sequence[Sequence[str]]) -> None:
    """Colour a cell a value, from 0, white, to 1; write in them if wanted."""
    from matplotlib.patches import Rectangle

    axes.imshow(values.nan_to_num(0).numpy(), cmap="Blues", vmin=0, vmax=1)
    size = (values.shape[1], len(values))
    axes.add_patch(Rectangle((-0.5, -0.5), *size, fill=False, edgecolor=GREY, clip_on=False))
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            if text:
                colour = "white" if values[i, j] > 0.55 else BLACK
                axes.text(j, i, text, size=min(8, 0.35 * cell), color=colour, ha="center", va="center", in_layout=False)
    axes.tick_params(length=0)
    axes.set_frame_on(False)


def _number(set_ticks: Callable[..., Any], count: int, cell: int) -> None:
    """Number frames along an axis, from 1."""
    set_ticks(range(count), range(1, count + 1), size=min(8, 0.5 * cell), color=GREY)
