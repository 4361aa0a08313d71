"""Why one clip got its label: :func:`explain` collects it, :meth:`Explanation.figure` draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image
from torch import Tensor

from clip_m2df.evaluation.evidence import Alignment, PromptScore, query_evidence
from clip_m2df.evaluation.figures import (
    BLACK,
    GREY,
    VIEW_COLOURS,
    WRONG,
    alignment_maps,
    chart,
    draw_shares,
    picture,
    prompt_map,
    shortened,
    strip,
)
from clip_m2df.nn.head import Embedded, Head, HeadOutput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More classes than this are counted, not drawn.
MOST_CLASSES = 10
# Pixels: of a frame's side and of the longest bar.
SIDE, BAR = 64, 300
ANSWER = "#08306b"


class ViewVote(NamedTuple):
    """What one view alone says of a clip.

    Attributes:
        label: the closest class.
        distances: OTAM's, by class, above the least that there can be.
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
        distance: to the closest class, fused, above the least that there can be: 0 where all frames of both are the
            same picture. Of a head that measures none, by how much its highest logit is below the highest possible.
        prompt: the class whose prompt PPS chose; None without PPS, or where the clip got an expectation over all
            or each.
        prompt_probabilities: PPS's, by class; empty where there are no prompts, of a tower without text.
        frame_scores: ``(n_way, frames)``, cosines of PPS between each class's prompt and each frame.
        counted: bool ``(n_way, frames)``, those that a prompt's score is the mean of.
        views: what each view alone says; empty for a head without views.
        teacher: the view that would teach the other in a training, by the head's conditions and direction of
            distillation; None if neither would, or each the other.
        alignments: by view, ``(n, frames, frames)``: how OTAM aligns the clip's frames, the rows, with those of the
            ``compared`` classes; empty for a head without views.
        compared: the closest class, then the runner-up if there is one.
        frames: of the clip, uint8 ``(frames, 3, height, width)``, small; None of a clip that came as features.
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
    frames: Tensor | None
    examples: dict[str, Tensor]

    @property
    def rejected(self) -> bool:
        """Whether the closest class is too far away."""
        return self.threshold is not None and self.distance > self.threshold

    def compared_alignments(self) -> list[Alignment]:
        """With the closest class, and with the runner-up if there is one; empty for a head without views."""
        if not self.alignments:
            return []
        return [
            Alignment(
                role,
                name,
                {view: weights[i] for view, weights in self.alignments.items()},
                {view: vote.distances[name] for view, vote in self.views.items()},
                self.examples.get(name),
            )
            for i, (role, name) in enumerate(zip(("closest class", "runner-up"), self.compared, strict=False))
        ]

    def prompt_scores(self, most: int = MOST_CLASSES) -> list[PromptScore]:
        """Those of the classes that PPS finds likeliest; the chosen prompt's is always among them."""
        shown = likeliest(self.prompt_probabilities)[:most]
        if self.prompt is not None and self.prompt not in shown:
            shown[-1] = self.prompt
        rows = zip(self.prompt_probabilities, self.frame_scores.tolist(), self.counted.tolist(), strict=False)
        scores = {
            name: PromptScore(name, self.prompt_probabilities[name], cosines, counted, name == self.prompt)
            for name, cosines, counted in rows
        }
        return [scores[name] for name in shown]

    def figure(self) -> Image.Image:
        """All of it on one page."""
        left, right = parts(self)
        page = _join([picture(part) for part in left])
        return _join([page, *map(picture, right)], beside=True)


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
    frames: Tensor | None,
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
        prompts: ``(n_way, dim)``; all zero where there are none.
        draws: ``(1)``, where PPS samples.
        class_names: all different.
        label: the answer, see :class:`Explanation`.
        probabilities: ``(n_way)``, as the answer goes by them; they may hold more than the head's logits.
        frames: small ones of the clip, uint8 ``(frames, 3, height, width)``, if there are some.
        examples: the same of an example of a class, by class; those of :func:`compared_classes` are kept.
        threshold: the distance beyond which a clip is none of the classes.
        video: the clip's path.
    """
    names = list(class_names)
    logits = output.logits[0]
    compared = compared_classes(logits)
    evidence = query_evidence(head, prototypes.map(lambda kept: kept[compared]), compared, query, prompts, draws)
    return Explanation(
        video=video,
        label=label,
        probabilities=_by_class(names, probabilities),
        threshold=threshold,
        distance=-float(logits.max()) - head.least_distance(len(query)),
        prompt=None if evidence.chosen in (None, -1) else names[evidence.chosen],
        prompt_probabilities=_by_class(names, output.prompt_probabilities[0]) if prompts.any() else {},
        frame_scores=evidence.frame_scores,
        counted=evidence.counted,
        views={
            name: ViewVote(
                label=names[int(view.distances[0].argmin())],
                distances=_by_class(names, view.distances[0] - head.least_distance(len(query), name)),
                text_similarities=_by_class(names, view.text_similarities[0]),
                visual_confidence=float(view.visual_confidence[0]),
                text_confidence=float(view.text_confidence[0]),
            )
            for name, view in output.views.items()
        },
        teacher=_teacher(output),
        alignments=evidence.alignments,
        compared=[names[c] for c in compared],
        frames=None if frames is None else frames.cpu(),
        examples={names[c]: examples[names[c]].cpu() for c in compared if names[c] in examples},
    )


def _by_class(names: Sequence[str], values: Tensor) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def _teacher(output: HeadOutput) -> str | None:
    local, global_ = bool(output.distillation.local_to_global[0]), bool(output.distillation.global_to_local[0])
    return None if local == global_ else "local" if local else "global"


def likeliest(probabilities: Mapping[str, float]) -> list[str]:
    """The classes, the likeliest first."""
    return sorted(probabilities, key=lambda name: -probabilities[name])


# ---------------------------------------------------------------------------------------- the parts of the figure


def parts(found: Explanation) -> tuple[list[Figure], list[Figure]]:
    """The figures of an explanation: those of the left column, and of the right one."""
    chosen = "no single prompt was chosen"
    if found.prompt is not None:
        chosen = f"that of {shortened(found.prompt)} ({100 * found.prompt_probabilities[found.prompt]:.0f} %)"
    title = f"prompt selection: {chosen};\ncosines of frames with prompts, framed where they count"
    left = [_answer(found), _probabilities(found)]
    if found.views:
        left.append(_votes(found))
    if found.prompt_probabilities:
        left.append(prompt_map(found.prompt_scores(), found.frames, title))
    aligned = found.compared_alignments()
    shots = " (its closest example)" if found.examples else ""
    title = f"soft alignment: rows are the clip's frames, columns those of the class{shots}"
    return left, [alignment_maps(aligned, found.frames, title)] if aligned else []


def _answer(found: Explanation) -> Figure:
    """The answer, how far the clip is from the closest class, and the clip if it has frames."""
    title = f"{shortened(Path(found.video).name) or 'a clip'}: {shortened(found.label or 'none of these')}"
    if found.label in found.probabilities:
        title += f" ({100 * found.probabilities[found.label]:.0f} %)"
    said = f"distance {found.distance:.2f} from the closest class, {shortened(found.compared[0])}"
    if found.threshold is not None:
        said += f", {'beyond' if found.rejected else 'within'} the threshold {found.threshold:.2f}"
    clip = Image.new("RGB", (BAR, 1), "white") if found.frames is None else strip(found.frames, SIDE)
    figure, axes = chart(clip.width, clip.height, "")
    axes.set_title(title, size=14, loc="left", y=1, pad=24)
    axes.text(0, -8, said, color=WRONG if found.rejected else GREY)
    axes.imshow(clip)
    axes.set_axis_off()
    return figure


def _probabilities(found: Explanation) -> Figure:
    """The likeliest classes, the answer darker than the others."""
    order = likeliest(found.probabilities)
    shares = {name: found.probabilities[name] for name in order[:MOST_CLASSES]}
    figure, axes = chart(BAR, 19 * len(shares), "probability of each class")
    colours = {found.label: ANSWER}
    draw_shares(axes, [(name, p, colours.get(name, GREY), f"{100 * p:.1f} %") for name, p in shares.items()])
    if rest := [found.probabilities[name] for name in order[MOST_CLASSES:]]:
        said = f"and {len(rest)} more, {100 * sum(rest):.1f} % together"
        axes.text(0, len(shares), said, color=GREY, va="center")
    return figure


def _votes(found: Explanation) -> Figure:
    """A row a view, and which one would teach the other."""
    votes = found.views.values()
    columns = {
        "": list(found.views),
        "closest class": [shortened(vote.label) for vote in votes],
        "distance": [f"{vote.distances[vote.label]:.2f}" for vote in votes],
        "visual confidence": [f"{vote.visual_confidence:.3f}" for vote in votes],
        "text confidence": [f"{vote.text_confidence:.3f}" for vote in votes],
    }
    figure, axes = chart(BAR, 18 * (len(votes) + 1), "what each view says")
    axes.set(xlim=(0, BAR), ylim=(len(votes) + 1, 0))
    axes.set_axis_off()
    x = 0
    for head, cells in columns.items():
        axes.text(x, 0.5, head, color=GREY, va="center")
        for row, cell in enumerate(cells):
            axes.text(x, row + 1.5, cell, va="center", color=BLACK if head else VIEW_COLOURS.get(cell, GREY))
        x += 8 * max(map(len, (head, *cells))) + 8
    if len(votes) == 2:
        said = "in a training, no single view would be the teacher"
        if found.teacher is not None:
            student = "global" if found.teacher == "local" else "local"
            said = f"in a training, the {found.teacher} view would teach the {student} one"
        axes.text(0, len(votes) + 1.5, said, color=GREY, va="center")
    return figure


def _join(pictures: Sequence[Image.Image], *, beside: bool = False) -> Image.Image:
    """Pictures on one white page, below one another or beside one another."""
    widths, heights = [p.width for p in pictures], [p.height for p in pictures]
    page = Image.new("RGB", (sum(widths), max(heights)) if beside else (max(widths), sum(heights)), "white")
    for i, part in enumerate(pictures):
        page.paste(part, (sum(widths[:i]), 0) if beside else (0, sum(heights[:i])))
    return page
