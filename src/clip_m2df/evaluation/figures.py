"""Pictures of a validation. Pure functions: numbers in, an image out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from clip_m2df.evaluation.evidence import HardEpisode, QueryEvidence, Reliabilities, ValidationEvidence
from clip_m2df.evaluation.sheet import (
    BLACK,
    GREY,
    MARGIN,
    RIGHT,
    TEXT,
    VIEW_COLOURS,
    WRONG,
    Sheet,
    column_width,
    short_names,
    shown_frames,
    strip,
)

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
    names = column_width(class_names, size)
    left, top = MARGIN + names + 6, 3 * MARGIN + TEXT + names + 6
    title = "queries by their class (rows) and by what they were taken for (columns)"
    sheet = Sheet(left + n * cell + MARGIN, top + n * cell + MARGIN, title)
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
    row, width, left = TEXT + 6, 320, 2 * MARGIN + column_width(class_names)
    top = 2 * MARGIN + TEXT
    sheet = Sheet(left + width + 130, top + len(class_names) * row + MARGIN, "accuracy of each class")
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
    width = max(frames * side, column_width(episode.class_names) + 90)
    row, top = label + (side if frames else 0) + 8, 3 * MARGIN + 2 * TEXT
    title = f"hardest episode no. {rank}: episode {episode.number}, cross-entropy {episode.loss:.2f}"
    sheet = Sheet(2 * MARGIN + 3 * width + 2 * gap, top + len(order) * row + 4, title)
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
    rival_role = "taken for" if episode.predicted[q] == rival else "runner-up"
    return alignment_maps(
        evidence.alignments,
        evidence.distances,
        [f"its class: {episode.class_names[own]}", f"{rival_role}: {episode.class_names[rival]}"],
        title="soft alignment: rows are the query's frames, columns those of the class (first shot)",
        room=column_width(episode.class_names),
        clip=None if episode.query is None else episode.query[q],
        examples=[None if episode.support is None else episode.support[c] for c in (own, rival)],
    )


def alignment_maps(
    alignments: Mapping[str, Tensor],
    distances: Mapping[str, Sequence[float]],
    captions: Sequence[str],
    *,
    title: str,
    room: int,
    clip: Tensor | None,
    examples: Sequence[Tensor | None],
) -> Image.Image:
    """How OTAM aligns a clip with some classes, a row each, in each view, a column each.

    Args:
        alignments: by view, ``(n, frames, frames)``, the clip's frames first.
        distances: by view, OTAM's to the same classes.
        captions: what to say of each class.
        title: of all.
        room: pixels to leave for a caption.
        clip: its frames, uint8 ``(frames, 3, height, width)``.
        examples: frames of a video of each class, where they are known.
    """
    rows, columns = next(iter(alignments.values())).shape[1:]
    cell = max(11, min(32, 400 // max(rows, columns)))
    # Of a panel: numbers and frames of the clip on its left, of the class below.
    side = cell if clip is not None else 0
    left, head = 22 + side, 2 * (TEXT + 6)
    width = left + max(columns * cell, room - 22) + 2 * MARGIN
    height = head + rows * cell + side + 22 + MARGIN
    sheet = Sheet(MARGIN + len(alignments) * width, 2 * MARGIN + TEXT + len(captions) * height, title)
    darkest = max(float(a.max()) for a in alignments.values())
    for place, (caption, example) in enumerate(zip(captions, examples, strict=True)):
        for column, (view, of_classes) in enumerate(alignments.items()):
            x, y = MARGIN + column * width, 2 * MARGIN + TEXT + place * height
            distance = f"{view} view, distance {distances[view][place]:.2f}"
            sheet.text((x, y), distance, colour=VIEW_COLOURS.get(view, GREY))
            sheet.text((x, y + TEXT + 5), caption)
            x, y = x + left, y + head
            numbers = [[f"{v:.1f}" if v >= 0.05 else "" for v in line] for line in of_classes[place].tolist()]
            sheet.heat_map((x, y), of_classes[place] / darkest, cell, numbers if cell >= 24 else None)
            sheet.numbers((x - side - 6, y), rows, (0, cell), anchor="rm")
            sheet.numbers((x, y + rows * cell + side + 4), columns, (cell, 0), anchor="mt")
            if clip is not None:
                sheet.paste((x - side, y), strip(clip, cell, most=None, upright=True))
                if example is not None:
                    sheet.paste((x, y + rows * cell), strip(example, cell, most=None))
    return sheet.image


def prompt_scores(episode: HardEpisode, evidence: QueryEvidence) -> Image.Image:
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
) -> Image.Image:
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
    n_way, frames = frame_scores.shape
    cell = max(14, min(42, 500 // frames))
    left = 2 * MARGIN + max(column_width(class_names), 60)
    side = cell if clip is not None else 0
    top = 2 * MARGIN + TEXT + side + 20
    sheet = Sheet(left + frames * cell + 210, top + n_way * cell + MARGIN, title)
    if clip is not None:
        sheet.paste((left, top - side - 18), strip(clip, cell, most=None))
    sheet.numbers((left, top - 16), frames, (cell, 0), anchor="mt")
    low, high = frame_scores.min(), frame_scores.max()
    numbers = [[f"{v:z.2f}" for v in row] for row in frame_scores.tolist()] if cell >= 30 else None
    sheet.heat_map((left, top), (frame_scores - low) / (high - low).clamp(min=1e-6), cell, numbers)
    for c in range(n_way):
        y = top + c * cell
        for t in counted[c].nonzero().flatten().tolist():
            sheet.draw.rectangle(
                (left + t * cell + 1, y + 1, left + (t + 1) * cell - 2, y + cell - 2), outline=WRONG, width=2
            )
        colour = RIGHT if c == own else BLACK
        sheet.text((left - MARGIN, y + cell / 2), class_names[c], colour=colour, anchor="rm")
        said = f"probability {probabilities[c]:.2f}{', chosen' if c == chosen else ''}"
        sheet.text((left + frames * cell + 8, y + cell / 2), said, colour=colour, anchor="lm")
    return sheet.image


def reliabilities(found: Reliabilities, *, bins: int = 24) -> Image.Image:
    """Histograms of the views' confidences, and how often each view teaches the other."""
    bar, height, gap = 7, 160, 46
    width = len(VIEW_COLOURS) * bar * bins
    panels = list(found.confidences.items())
    top = 3 * MARGIN + 2 * TEXT
    bottom = top + height + 2 * MARGIN + TEXT
    sheet = Sheet(2 * MARGIN + max(len(panels) * (width + gap) - gap, 620), bottom + len(found.teaches) * 24 + MARGIN)
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


def _with_short_names(found: ValidationEvidence) -> ValidationEvidence:
    """With class names that take little room."""
    shown = short_names(found.class_names)
    hardest = [episode._replace(class_names=[shown[name] for name in episode.class_names]) for episode in found.hardest]
    return found._replace(class_names=[shown[name] for name in found.class_names], hardest=hardest)
