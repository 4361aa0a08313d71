"""Figures of a validation, and strips of video frames.

Note: matplotlib is imported where something is drawn, so that nothing else waits for it. Each figure has a canvas of its
own: no state of pyplot is touched.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_m2df.evaluation.evidence import HardEpisode, QueryEvidence, Reliabilities, ValidationEvidence

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
    shown = short_names(found.class_names)
    names = list(shown.values())
    pictures: dict[str, Image.Image] = {}
    if found.confusion.numel():
        pictures["confusion_matrix"] = picture(confusion_matrix(found.confusion, names))
        pictures["class_accuracy"] = picture(class_accuracies(found.confusion, names))
    for rank, episode in enumerate(found.hardest, 1):
        episode = episode._replace(class_names=[shown[name] for name in episode.class_names])
        pictures[f"hardest_episode_{rank}"] = picture(hard_episode(episode, rank=rank))
        if episode.evidence is not None:
            pictures["alignment"] = picture(alignments(episode, episode.evidence))
            if episode.evidence.chosen is not None:
                pictures["prompt_scores"] = picture(prompt_scores(episode, episode.evidence))
    if found.reliabilities.confidences:
        pictures["reliability"] = picture(reliabilities(found.reliabilities))
    return pictures


def picture(figure: Figure) -> Image.Image:
    """Draw a figure, whatever room its texts take beside the coordinate systems."""
    drawn = io.BytesIO()
    margin = 0.12  # inches
    figure.savefig(drawn, format="tiff", bbox_inches=figure.get_tightbbox().padded(margin))  # the quickest to read back
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
    axes.set_title(title, size=10, loc="left")
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
    axes.set_xticks(range(n), class_names, rotation=90, size=min(10, 0.7 * cell))
    axes.set_yticks(range(n), class_names, size=min(10, 0.7 * cell))
    return figure


def class_accuracies(confusion: Tensor, class_names: Sequence[str]) -> Figure:
    """The share of each class's queries that were recognised, the hardest class first.

    Args:
        confusion: see :func:`confusion_matrix`.
        class_names: the same.
    """
    rows = [
        (right / queries if queries else 0.0, queries, name)
        for right, queries, name in zip(
            confusion.diagonal().tolist(), confusion.sum(1).tolist(), class_names, strict=True
        )
    ]
    rows.sort(key=lambda row: (not row[1], row[0]))
    shares, _, names = zip(*rows, strict=True)
    figure, axes = chart(320, 19 * len(rows), "accuracy of each class")
    texts = [f"{share:.0%} of {queries}" if queries else "no queries" for share, queries, _ in rows]
    draw_shares(axes, names, shares, [VIEW_COLOURS["local"]] * len(rows), texts)
    return figure


def draw_shares(
    axes: Axes, names: Sequence[str], shares: Sequence[float], colours: Sequence[str], texts: Sequence[str]
) -> None:
    """Draw shares of a whole as bars, one below the other.

    Args:
        axes: where to.
        names: at the left of the bars.
        shares: from 0 to 1.
        colours: of the bars.
        texts: at the right of them.
    """
    rows = range(len(names))
    axes.bar_label(axes.barh(rows, 1, color=LIGHT), texts, padding=6)
    axes.barh(rows, shares, color=colours)
    axes.set_yticks(rows, names)
    axes.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5), xticks=[])
    axes.tick_params(length=0)
    axes.set_frame_on(False)


def hard_episode(episode: HardEpisode, *, rank: int = 1, most_queries: int = 10) -> Figure:
    """The queries of an episode, each beside videos of its own class and of the one that it was taken for.

    Args:
        episode: with its frames or without.
        rank: its number among the hardest.
        most_queries: show those of the highest losses only.
    """
    order = sorted(range(len(episode.labels)), key=lambda q: -episode.losses[q])[:most_queries]
    side, line = 40, 20  # pixels of a frame's side and of a line of text
    frames = 0 if episode.query is None else len(shown_frames(episode.query[0]))
    column = max(frames * side, 8 * max(map(len, episode.class_names)), 200) + 16
    row = line + side + 8 if frames else line
    title = f"hardest episode no. {rank}: episode {episode.number}, cross-entropy {episode.loss:.2f}"
    page = np.full((line + len(order) * row, 3 * column, 3), 255, np.uint8)
    figure, axes = chart(page.shape[1], page.shape[0], title)
    for i, head in enumerate(("query", "its own class (first shot)", "what it was taken for")):
        axes.text(i * column, line / 2, head, color=GREY, va="center")
    for y, q in zip(range(line, len(page), row), order, strict=True):
        own, taken = episode.labels[q], episode.predicted[q]
        texts = [f"cross-entropy {episode.losses[q]:.2f}", episode.class_names[own], episode.class_names[taken]]
        if own == taken:
            texts[2] = "the same"
        for i, text in enumerate(texts):
            axes.text(i * column, y + line / 2, text, color=RIGHT if own == taken else WRONG, va="center")
        if episode.query is not None and episode.support is not None:
            clips = [episode.query[q], episode.support[own], episode.support[taken]][: 2 if own == taken else 3]
            for i, clip in enumerate(clips):
                at = (slice(y + line, y + line + side), slice(i * column, i * column + frames * side))
                page[at] = np.asarray(strip(clip, side))
    axes.imshow(page)
    axes.set_axis_off()
    return figure


def alignments(episode: HardEpisode, evidence: QueryEvidence) -> Figure:
    """How OTAM aligns the hardest query of an episode with its own class and with the rival, in each view.

    Args:
        episode: whose hardest query it is.
        evidence: on that query.
    """
    q = episode.hardest
    own, rival = episode.labels[q], episode.rivals[q]
    rival_role = "taken for" if episode.predicted[q] == rival else "runner-up"
    return alignment_maps(
        evidence.alignments,
        evidence.distances,
        [f"its class: {episode.class_names[own]}", f"{rival_role}: {episode.class_names[rival]}"],
        title="soft alignment: rows are the query's frames, columns those of the class (first shot)",
        clip=None if episode.query is None else episode.query[q],
        examples=[None if episode.support is None else episode.support[c] for c in (own, rival)],
    )


def alignment_maps(
    alignments: Mapping[str, Tensor],
    distances: Mapping[str, Sequence[float]],
    captions: Sequence[str],
    *,
    title: str,
    clip: Tensor | None,
    examples: Sequence[Tensor | None],
) -> Figure:
    """How OTAM aligns a clip with some classes, a row each, in each view, a column each.

    Args:
        alignments: by view, ``(n, frames, frames)``, the clip's frames first.
        distances: by view, OTAM's to the same classes.
        captions: of each class.
        title: of all.
        clip: its frames, uint8 ``(frames, 3, height, width)``.
        examples: frames of a video of each class, where they are known.
    """
    rows, columns = next(iter(alignments.values())).shape[1:]
    cell = max(11, min(32, 400 // max(rows, columns)))
    # Pixels of a map with the frames beside and below it, and of the room for what is written around it.
    width, height, around = (columns + 1) * cell, (rows + 1) * cell, 70
    beside = max(40, 8 * max(map(len, captions)) - width)
    figure = _figure(len(alignments) * (width + beside) - beside, len(captions) * (height + around) - around)
    spaces = WHOLE | {"wspace": beside / width, "hspace": around / height}
    grid = figure.subplots(len(captions), len(alignments), squeeze=False, gridspec_kw=spaces)
    figure.text(0, 1 + 50 / figure.bbox.height, title)
    darkest = max(float(weights.nan_to_num().max()) for weights in alignments.values())
    for i, (caption, example) in enumerate(zip(captions, examples, strict=True)):
        for axes, (view, of_classes) in zip(grid[i], alignments.items(), strict=True):
            heading = f"{view} view, distance {distances[view][i]:.2f}\n{caption}"
            axes.set_title(heading, size=10, loc="left", color=VIEW_COLOURS.get(view, GREY))
            texts = [[f"{v:.1f}" if v >= 0.05 else "" for v in line] for line in of_classes[i].tolist()]
            _heat_map(axes, of_classes[i] / darkest, cell, texts if cell >= 24 else [])
            _number(axes.set_yticks, rows, cell)
            _number(axes.set_xticks, columns, cell)
            if clip is not None:
                axes.imshow(strip(clip, cell, most=None, upright=True), extent=(-1.5, -0.5, rows - 0.5, -0.5))
                if example is not None:
                    axes.imshow(strip(example, cell, most=None), extent=(-0.5, columns - 0.5, rows + 0.5, rows - 0.5))
            axes.set(xlim=(-1.5, columns - 0.5), ylim=(rows + 0.5, -0.5))
            axes.set_frame_on(False)
    return figure


def prompt_scores(episode: HardEpisode, evidence: QueryEvidence) -> Figure:
    """How much each frame of the hardest query looks like each class's prompt; the frames that count are framed.

    Args:
        episode: whose hardest query it is.
        evidence: on that query.
    """
    return prompt_map(
        evidence.frame_scores,
        evidence.counted,
        evidence.probabilities.tolist(),
        episode.class_names,
        title="prompt selection: cosine of each frame with each class's prompt",
        clip=None if episode.query is None else episode.query[episode.hardest],
        chosen=evidence.chosen,
        own=episode.labels[episode.hardest],
    )


def prompt_map(
    frame_scores: Tensor,
    counted: Tensor,
    probabilities: Sequence[float],
    class_names: Sequence[str],
    *,
    title: str,
    clip: Tensor | None,
    chosen: int | None,
    own: int | None = None,
) -> Figure:
    """How much each frame of a clip looks like the prompts of some classes; the frames that count are framed.

    Args:
        frame_scores: ``(n, frames)``, cosines.
        counted: bool ``(n, frames)``.
        probabilities: PPS's, of each class.
        class_names: the same classes.
        title: of all.
        clip: its frames, uint8 ``(frames, 3, height, width)``.
        chosen: the class whose prompt the clip got, if it got one's.
        own: the class that it is of, where that is known.
    """
    from matplotlib.patches import Rectangle

    n_way, frames = frame_scores.shape
    cell = max(14, min(42, 500 // frames))
    figure, axes = chart(frames * cell, (n_way + 1) * cell, title)
    low, high = frame_scores.min(), frame_scores.max()
    texts = [[f"{v:z.2f}" for v in row] for row in frame_scores.tolist()] if cell >= 30 else []
    _heat_map(axes, (frame_scores - low) / (high - low).clamp(min=1e-6), cell, texts)
    for c, t in counted.nonzero().tolist():
        axes.add_patch(Rectangle((t - 0.45, c - 0.45), 0.9, 0.9, fill=False, edgecolor=WRONG, linewidth=1.5))
    _number(axes.set_xticks, frames, cell)
    axes.set_yticks(range(n_way), class_names)
    for c, (label, probability) in enumerate(zip(axes.get_yticklabels(), probabilities, strict=True)):
        text = f"probability {probability:.2f}{', chosen' if c == chosen else ''}"
        said = axes.text(frames - 0.3, c, text, va="center")
        if c == own:
            label.set_color(RIGHT)
            said.set_color(RIGHT)
    if clip is not None:
        axes.imshow(strip(clip, cell, most=None), extent=(-0.5, frames - 0.5, -0.5, -1.5))
    axes.set(xlim=(-0.5, frames - 0.5), ylim=(n_way - 0.5, -1.5))
    axes.set_frame_on(False)
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
        axes.set_title(f"{kind} confidence", size=10, loc="left")
        axes.legend(title="view")
    if found.teaches:
        draw_shares(
            grid["teaches"],
            [name.replace("_to_", " teaches ") for name in found.teaches],
            list(found.teaches.values()),
            [VIEW_COLOURS.get(name.partition("_")[0], GREY) for name in found.teaches],
            [f"{share:.1%} of the queries" for share in found.teaches.values()],
        )
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


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Class names as figures show them; one that is mostly in letters that the font lacks is its number."""
    shown = {name: shortened(name) for name in names}
    return {
        name: f"class {c}" if 2 * text.count("?") > len(text) else text for c, (name, text) in enumerate(shown.items())
    }


def shortened(text: str) -> str:
    """A text in letters that the font has, cut off where it is longer than a class name may be."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    text = "".join(letter if ord(letter) in known else "?" for letter in text)
    if len(text) > MOST_LETTERS:
        text = f"{text[: MOST_LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"
    return text.replace("$", r"\$")  # between two of them would be an equation


def _figure(width: float, height: float, **options: Any) -> Figure:
    """An empty figure of so many pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width / DPI, height / DPI), DPI, **options)
    FigureCanvasAgg(figure)
    return figure


def _heat_map(axes: Axes, values: Tensor, cell: int, texts: Sequence[Sequence[str]]) -> None:
    """Colour a cell a value, from 0, white, to 1; write in them if wanted."""
    from matplotlib.patches import Rectangle

    axes.imshow(values.nan_to_num(0), cmap="Blues", vmin=0, vmax=1)
    axes.add_patch(Rectangle((-0.5, -0.5), values.shape[1], len(values), fill=False, edgecolor=GREY))
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            if text:
                colour = "white" if values[i, j] > 0.55 else BLACK
                axes.text(j, i, text, ha="center", va="center", size=min(8, 0.35 * cell), color=colour)
    axes.tick_params(length=0)


def _number(set_ticks: Callable[..., Any], count: int, cell: int) -> None:
    """Number frames along an axis, from 1."""
    set_ticks(range(count), range(1, count + 1), size=min(8, 0.5 * cell), color=GREY)
