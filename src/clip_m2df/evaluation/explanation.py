"""Why one clip got its label: :func:`explain` collects it, :meth:`Explanation.figure` draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from clip_m2df.evaluation.evidence import query_evidence
from clip_m2df.evaluation.figures import alignment_maps, prompt_map
from clip_m2df.evaluation.sheet import (
    GREY,
    MARGIN,
    TEXT,
    VIEW_COLOURS,
    WRONG,
    Sheet,
    column_width,
    join,
    short_names,
    shortened,
    strip,
)
from clip_m2df.nn.head import Embedded, Head, HeadOutput

# More classes than this are counted, not drawn.
MOST_CLASSES = 10
# Pixels: of a frame's side and of the longest bar; letters of the title.
SIDE, BAR, TITLE = 64, 300, 18
ANSWER = (8, 48, 107)


class ViewVote(NamedTuple):
    """What one view alone says of a clip.

    Attributes:
        label: the closest class.
        distances: OTAM's, by class.
        text_similarities: cosines of the text parts, by class.
        visual_confidence: ``max softmax(−d)``.
        text_confidence: ``max softmax(t)``.
    """

    label: str
    distances: dict[str, float]
    text_similarities: dict[str, float]
    visual_confidence: float
    text_confidence: float


class Explanation(NamedTuple):
    """Why a clip got its label. Everything is on the CPU.

    Attributes:
        video: its path; empty for frames in memory.
        label: the answer; no class, or empty, where it is none of the classes.
        probabilities: by class, in the order of the classes.
        threshold: the distance beyond which a clip is none of the classes; None where nothing is rejected.
        distance: the fused distance to the closest class (of a head that measures none, minus its highest logit).
        prompt: the class whose prompt PPS chose; None without PPS, or where the clip got an expectation over all.
        prompt_probabilities: PPS's, by class.
        frame_scores: ``(n_way, frames)``, cosines of PPS between each class's prompt and each frame.
        counted: bool ``(n_way, frames)``, those that a prompt's score is the mean of.
        views: what each view alone says; empty for a head without views.
        teacher: the view that would teach the other in a training, by the head's conditions and direction of
            distillation; None if neither would, or each the other.
        alignments: by view, ``(n, frames, frames)``: how OTAM aligns the clip's frames, the rows, with those of the
            ``compared`` classes; empty for a head without views.
        compared: the closest class, then the runner-up if there is one.
        frames: of the clip, uint8 ``(frames, 3, height, width)``, small.
        examples: the same of an example of each compared class, as far as there are some.
    """

    video: str
    label: str
    probabilities: dict[str, float]
    threshold: float | None
    distance: float
    prompt: str | None
    prompt_probabilities: dict[str, float]
    frame_scores: Tensor
    counted: Tensor
    views: dict[str, ViewVote]
    teacher: str | None
    alignments: dict[str, Tensor]
    compared: list[str]
    frames: Tensor
    examples: dict[str, Tensor]

    @property
    def rejected(self) -> bool:
        """Whether the closest class is too far away."""
        return self.threshold is not None and self.distance > self.threshold

    def figure(self) -> Image.Image:
        """All of it on one page."""
        names = short_names(list(self.probabilities))
        left = [_answer(self, names), _probability_bars(self, names)]
        if self.views:
            left.append(_votes(self, names))
        left.append(_prompt_scores(self, names))
        if not self.alignments:
            return join(left)
        return join([join(left), _alignments(self, names)], beside=True)


def compared_classes(logits: Tensor) -> list[int]:
    """The indices of the closest class and of the runner-up, if there is one, by a query's ``logits (n_way)``."""
    indices: list[int] = logits.topk(min(2, len(logits))).indices.tolist()
    return indices


def explain(
    head: Head,
    output: HeadOutput,
    prototypes: Embedded,
    query: Tensor,
    prompts: Tensor,
    draws: Tensor | None = None,
    *,
    class_names: Sequence[str],
    label: str,
    probabilities: Tensor,
    frames: Tensor,
    examples: Mapping[str, Tensor],
    threshold: float | None = None,
    video: str = "",
) -> Explanation:
    """Collect why a clip got its label.

    Args:
        head: in eval mode.
        output: what it says of this one query: ``n_queries`` is 1, and there are no leading axes.
        prototypes: ``(n_way, …)``.
        query: features ``(frames, dim)``.
        prompts: ``(n_way, dim)``.
        draws: ``(1)``, where PPS samples.
        class_names: all different.
        label: the answer, see :class:`Explanation`.
        probabilities: ``(n_way)``, as the answer goes by them; they may hold more than the head's logits.
        frames: small ones of the clip, uint8 ``(frames, 3, height, width)``.
        examples: the same of an example of a class, by class; those of :func:`compared_classes` are kept.
        threshold: the distance beyond which a clip is none of the classes.
        video: the clip's path.
    """
    names = list(class_names)
    logits = output.logits[0]
    compared = compared_classes(logits)
    evidence = query_evidence(head, prototypes.map(lambda kept: kept[compared]), query, prompts, draws)
    return Explanation(
        video=video,
        label=label,
        probabilities=_by_class(names, probabilities),
        threshold=threshold,
        distance=-float(logits.max()),
        prompt=None if evidence.chosen in (None, -1) else names[evidence.chosen],
        prompt_probabilities=_by_class(names, output.prompt_probabilities[0]),
        frame_scores=evidence.frame_scores,
        counted=evidence.counted,
        views={
            name: ViewVote(
                label=names[int(view.distances[0].argmin())],
                distances=_by_class(names, view.distances[0]),
                text_similarities=_by_class(names, view.text_similarities[0]),
                visual_confidence=float(view.visual_confidence[0]),
                text_confidence=float(view.text_confidence[0]),
            )
            for name, view in output.views.items()
        },
        teacher=_teacher(output),
        alignments=evidence.alignments,
        compared=[names[c] for c in compared],
        frames=frames.cpu(),
        examples={names[c]: examples[names[c]].cpu() for c in compared if names[c] in examples},
    )


def _by_class(names: Sequence[str], values: Tensor) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def _teacher(output: HeadOutput) -> str | None:
    local, global_ = bool(output.distillation.local_to_global[0]), bool(output.distillation.global_to_local[0])
    if local == global_:
        return None
    return "local" if local else "global"


# ---------------------------------------------------------------------------------------- the parts of the figure


def _answer(found: Explanation, names: Mapping[str, str]) -> Image.Image:
    """The title, how far the clip is from the closest class, and the clip."""
    answer = names.get(found.label, shortened(found.label or "none of these"))
    title = f"{shortened(Path(found.video).name) or 'a clip'}: {answer}"
    if found.label in found.probabilities:
        title += f" ({100 * found.probabilities[found.label]:.0f} %)"
    said = f"distance {found.distance:.2f} from the closest class, {names[found.compared[0]]}"
    if found.threshold is not None:
        said += f", {'beyond' if found.rejected else 'within'} the threshold {found.threshold:.2f}"
    clip = strip(found.frames, SIDE)
    width = 2 * MARGIN + max(column_width([title], TITLE), column_width([said]), clip.width)
    top = 3 * MARGIN + TITLE + TEXT
    sheet = Sheet(width, top + SIDE + MARGIN)
    sheet.text((MARGIN, MARGIN), title, size=TITLE)
    sheet.text((MARGIN, 2 * MARGIN + TITLE), said, colour=WRONG if found.rejected else GREY)
    sheet.paste((MARGIN, top), clip)
    return sheet.image


def _probability_bars(found: Explanation, names: Mapping[str, str]) -> Image.Image:
    """The likeliest classes, the answer darker than the others."""
    shown = _likeliest(found.probabilities)
    more = len(found.probabilities) - len(shown)
    rest = sum(share for name, share in found.probabilities.items() if name not in shown)
    row, top, left = TEXT + 6, 2 * MARGIN + TEXT, 2 * MARGIN + max(column_width([names[n] for n in shown]), 60)
    sheet = Sheet(left + BAR + 70, top + (len(shown) + bool(more)) * row + MARGIN, "probability of each class")
    for place, name in enumerate(shown):
        y, share = top + place * row, found.probabilities[name]
        sheet.text((left - MARGIN, y + row / 2), names[name], anchor="rm")
        sheet.bar((left, y + 2), BAR, row - 4, share, ANSWER if name == found.label else GREY)
        sheet.text((left + BAR + 6, y + row / 2), f"{100 * share:.1f} %", anchor="lm")
    if more:
        said = f"and {more} more, {100 * rest:.1f} % together"
        sheet.text((left, top + (len(shown) + 0.5) * row), said, colour=GREY, anchor="lm")
    return sheet.image


def _votes(found: Explanation, names: Mapping[str, str]) -> Image.Image:
    """A line a view, and which one would teach the other."""
    row, top = TEXT + 6, 2 * MARGIN + TEXT
    first = MARGIN + 70
    room = max(column_width([names[vote.label] for vote in found.views.values()]), 90) + 2 * MARGIN
    columns = [first, first + room, first + room + 80, first + room + 210]
    sheet = Sheet(columns[-1] + 120, top + (len(found.views) + 2) * row + MARGIN, "what each view says")
    for x, head in zip(columns, ("closest class", "distance", "visual confidence", "text confidence"), strict=True):
        sheet.text((x, top), head, colour=GREY)
    for place, (view, vote) in enumerate(found.views.items(), 1):
        y = top + place * row
        sheet.text((MARGIN, y), view, colour=VIEW_COLOURS.get(view, GREY))
        numbers = (f"{vote.distances[vote.label]:.2f}", f"{vote.visual_confidence:.3f}", f"{vote.text_confidence:.3f}")
        for x, text in zip(columns, (names[vote.label], *numbers), strict=True):
            sheet.text((x, y), text)
    if len(found.views) == 2:
        said = "in a training, no single view would be the teacher"
        if found.teacher is not None:
            student = "global" if found.teacher == "local" else "local"
            said = f"in a training, the {found.teacher} view would teach the {student} one"
        sheet.text((MARGIN, top + (len(found.views) + 1) * row), said, colour=GREY)
    return sheet.image


def _prompt_scores(found: Explanation, names: Mapping[str, str]) -> Image.Image:
    """The frames' cosines with the prompts of the classes that PPS finds likeliest."""
    shown = _likeliest(found.prompt_probabilities)
    if found.prompt is None:
        said = "no single prompt was chosen"
    else:
        said = f"that of {names[found.prompt]} ({100 * found.prompt_probabilities[found.prompt]:.0f} %)"
        if found.prompt not in shown:  # an unlikely draw
            shown[-1] = found.prompt
    every = list(found.prompt_probabilities)
    rows = [every.index(name) for name in shown]
    return prompt_map(
        found.frame_scores[rows],
        found.counted[rows],
        [found.prompt_probabilities[name] for name in shown],
        [names[name] for name in shown],
        title=f"prompt selection: {said}; cosines of frames with prompts, framed where they count",
        clip=found.frames,
        chosen=None if found.prompt is None else shown.index(found.prompt),
    )


def _alignments(found: Explanation, names: Mapping[str, str]) -> Image.Image:
    """How the clip is aligned with the closest class and the runner-up, in each view."""
    captions = [
        f"{role}: {names[name]}" for role, name in zip(("closest class", "runner-up"), found.compared, strict=False)
    ]
    shots = " (its closest example)" if found.examples else ""
    return alignment_maps(
        found.alignments,
        {view: [vote.distances[name] for name in found.compared] for view, vote in found.views.items()},
        captions,
        title=f"soft alignment: rows are the clip's frames, columns those of the class{shots}",
        room=column_width(captions),
        clip=found.frames,
        examples=[found.examples.get(name) for name in found.compared],
    )


def _likeliest(probabilities: Mapping[str, float]) -> list[str]:
    return sorted(probabilities, key=lambda name: -probabilities[name])[:MOST_CLASSES]
