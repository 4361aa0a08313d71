"""What a validation shows beside its numbers: its hardest episodes, how a query was aligned, what prompts saw in it.

All of it on the CPU and in plain types, so that ranks can hand it to one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from clip_m2df.episode import FeatureEpisode
from clip_m2df.evaluation.open_set import OpenSetCurve
from clip_m2df.nn.head import Embedded, Head, HeadOutput
from clip_m2df.nn.matching import at_least_float32


class Alignment(NamedTuple):
    """How OTAM aligns a clip with a class.

    Attributes:
        role: what the class is to the clip.
        class_name: its name.
        weights: of each view, ``(frames, frames)``, the clip's frames first.
        distances: of each view.
        example: frames of a video of the class, uint8 ``(frames, 3, height, width)``; None where there are none.
    """

    role: str
    class_name: str
    weights: dict[str, Tensor]
    distances: dict[str, float]
    example: Tensor | None

    @property
    def largest(self) -> float:
        """The largest weight of all views."""
        return max(float(weights.nan_to_num(0).max()) for weights in self.weights.values())


class PromptScore(NamedTuple):
    """How much the frames of a clip look like a class's prompt.

    Attributes:
        class_name: of the class.
        probability: PPS's.
        cosines: of each frame.
        counted: whether the prompt's score has the frame in its mean.
        chosen: whether the clip got this prompt.
    """

    class_name: str
    probability: float
    cosines: list[float]
    counted: list[bool]
    chosen: bool


class HardQuery(NamedTuple):
    """A query of a hard episode.

    Attributes:
        loss: its cross-entropy.
        right: whether its class was predicted.
        class_names: of its own class and of the predicted one.
        clips: frames of the query, of its class's first shot and of the predicted class's; None where they can't be
            had.
    """

    loss: float
    right: bool
    class_names: tuple[str, str]
    clips: tuple[Tensor | None, Tensor | None, Tensor | None]


class QueryEvidence(NamedTuple):
    """Why a query was taken for what it was.

    Attributes:
        alignments: of each view, ``(n, frames, frames)``: how OTAM aligns the query's frames, the rows, with those of
            some classes: for a hard query its own and the rival.
        distances: of each view, OTAM's to the same classes, above the least that there can be.
        frame_scores: ``(n_way, frames)``, cosines of PPS between each class's prompt and each frame.
        counted: bool ``(n_way, frames)``, those that a prompt's score is the mean of.
        probabilities: ``(n_way)``, PPS's.
        chosen: the class whose prompt the query got; -1 where it got an expectation over all, or each; None without
            PPS.
    """

    alignments: dict[str, Tensor]
    distances: dict[str, tuple[float, ...]]
    frame_scores: Tensor
    counted: Tensor
    probabilities: Tensor
    chosen: int | None


class HardEpisode(NamedTuple):
    """An episode on which the loss is high.

    Attributes:
        number: of the episode.
        class_names: its classes.
        labels: of each query, its class as an index in ``class_names``.
        predicted: of each query, the class that it was taken for.
        rivals: of each query, the likeliest class but its own.
        losses: cross-entropy of each query.
        support: uint8 frames ``(n_way, frames, 3, height, width)``, the first shot of each class; None where they can't
            be had.
        query: the same of the queries, ``(n_queries, frames, 3, height, width)``.
        evidence: on the query of the highest loss, if the head has views.
    """

    number: int
    class_names: list[str]
    labels: list[int]
    predicted: list[int]
    rivals: list[int]
    losses: list[float]
    support: Tensor | None = None
    query: Tensor | None = None
    evidence: QueryEvidence | None = None

    @property
    def loss(self) -> float:
        """The episode's, a mean over its queries."""
        return sum(self.losses) / len(self.losses)

    @property
    def hardest(self) -> int:
        """The query of the highest loss."""
        return self.losses.index(max(self.losses))

    def queries(self) -> list[HardQuery]:
        """The queries, that of the highest loss first."""
        support = [None] * len(self.class_names) if self.support is None else list(self.support)
        query = [None] * len(self.labels) if self.query is None else list(self.query)
        found = []
        for q in sorted(range(len(self.labels)), key=lambda q: -self.losses[q]):
            own, predicted = self.labels[q], self.predicted[q]
            names = (self.class_names[own], self.class_names[predicted])
            found.append(
                HardQuery(self.losses[q], own == predicted, names, (query[q], support[own], support[predicted]))
            )
        return found

    def alignments(self) -> list[Alignment]:
        """Those of the hardest query with its own class and with the rival; empty without evidence."""
        if self.evidence is None:
            return []
        own, rival = self.labels[self.hardest], self.rivals[self.hardest]
        role = "taken for" if self.predicted[self.hardest] == rival else "runner-up"
        return [
            Alignment(
                role,
                self.class_names[c],
                {view: weights[i] for view, weights in self.evidence.alignments.items()},
                {view: distances[i] for view, distances in self.evidence.distances.items()},
                None if self.support is None else self.support[c],
            )
            for i, (role, c) in enumerate({"its class": own, role: rival}.items())
        ]

    def prompt_scores(self) -> list[PromptScore]:
        """Those of the hardest query with the prompts of all classes; empty without evidence, or without PPS."""
        found = self.evidence
        if found is None or found.chosen is None:
            return []
        columns = (self.class_names, found.probabilities.tolist(), found.frame_scores.tolist(), found.counted.tolist())
        return [PromptScore(*row, c == found.chosen) for c, row in enumerate(zip(*columns, strict=True))]


class Reliabilities(NamedTuple):
    """How sure the views were of the queries of a validation.

    Attributes:
        confidences: by what is compared (``visual``, ``text``) and by view, ``(n)``.
        teaches: the share of queries on which a view teaches the other, by the direction's name.
    """

    confidences: dict[str, dict[str, Tensor]]
    teaches: dict[str, float]

    @classmethod
    def of(cls, outputs: Mapping[str, Tensor]) -> Reliabilities:
        """From what :func:`reliability_columns` gave, joined."""
        confidences: dict[str, dict[str, Tensor]] = {}
        teaches: dict[str, float] = {}
        for name, column in outputs.items():
            kind, _, view = name.partition(" ")
            known = column[column.isfinite()]
            if kind == "teaches":
                teaches[view] = float(column.mean())
            elif len(known):
                confidences.setdefault(kind, {})[view] = known
        return cls(confidences, teaches)


class ValidationEvidence(NamedTuple):
    """All that is shown of a validation.

    Attributes:
        class_names: of the split, as its prompts say them.
        confusion: int64 ``(n_classes, n_classes)``, queries by their own and by the predicted class.
        hardest: the episodes of the highest loss, the hardest first.
        reliabilities: of the views.
        open_set: by score, where there were unknown queries.
    """

    class_names: list[str]
    confusion: Tensor
    hardest: list[HardEpisode]
    reliabilities: Reliabilities
    open_set: Mapping[str, OpenSetCurve] = MappingProxyType({})


def reliability_columns(output: HeadOutput) -> dict[str, Tensor]:
    """The confidences of each view, and whom it teaches, a float32 column ``(n)`` each, as far as the head has them."""
    columns = {f"visual {name}": view.visual_confidence for name, view in output.views.items()}
    columns |= {f"text {name}": view.text_confidence for name, view in output.views.items()}
    if len(output.views) == 2:
        columns["teaches local_to_global"] = output.distillation.local_to_global
        columns["teaches global_to_local"] = output.distillation.global_to_local
    return {name: column.flatten().float().cpu() for name, column in columns.items()}


@torch.no_grad()
def query_evidence(
    head: Head,
    prototypes: Embedded,
    compared: Sequence[int],
    query: Tensor,
    prompts: Tensor,
    draws: Tensor | None = None,
) -> QueryEvidence:
    """Score one query once more, and keep what its output doesn't hold.

    Args:
        head: in eval mode.
        prototypes: ``(n, …)``, of the classes to align the query with.
        compared: the indices of these classes among all.
        query: features ``(frames, dim)``.
        prompts: ``(n_way, dim)``, of all classes that PPS chooses among.
        draws: ``(1)``, where PPS samples.
    """
    embedded, selected = head.embed_queries(query.unsqueeze(0), prompts, draws)
    if head.query_prompt == "each":
        embedded = embedded.map(lambda kept: kept[:, list(compared)])
    views = head.match(embedded, prototypes, selected).views
    scores, counted = head.frame_scores(query, prompts)
    chosen = {"none": None, "mixture": -1, "each": -1, "class": int(selected.indices[0])}
    return QueryEvidence(
        alignments={view: alignment[0].cpu() for view, alignment in head.align(embedded, prototypes).items()},
        distances={
            name: tuple((view.distances[0] - head.least_distance(len(query), name)).tolist())
            for name, view in views.items()
        },
        frame_scores=at_least_float32(scores).cpu(),
        counted=counted.cpu(),
        probabilities=at_least_float32(selected.probabilities[0]).cpu(),
        chosen=chosen[head.query_prompt],
    )


class Played(NamedTuple):
    """A batch of episodes as the head saw it, and its output.

    Attributes:
        episode: the batch, as features.
        prompts: ``(episodes, n_way, dim)``.
        output: the head's.
        scores: ``(episodes, n_queries, n_way)``, by which the classes are predicted.
        unknown: ``(episodes, n_unknown, n_way)``, the same of the unknown queries, where there are any.
    """

    episode: FeatureEpisode
    prompts: Tensor
    output: HeadOutput
    scores: Tensor
    unknown: Tensor | None = None
