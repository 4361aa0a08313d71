"""Reliability and multi-view mutual distillation (paper, section 3.5). Pure functions, float32 throughout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_m2df.nn.matching import full_precision

Condition = Literal["text", "visual"]
Direction = Literal["local_to_global", "global_to_local", "mutual"]
CONDITIONS: tuple[str, ...] = get_args(Condition)
DIRECTIONS: tuple[str, ...] = get_args(Direction)


class ViewEvidence(NamedTuple):
    """What one view says of the queries.

    Attributes:
        distances: ``(…, n_queries, n_way)``, OTAM distances to the prototypes.
        text_similarities: ``(…, n_queries, n_way)``, cosines of the text parts.
    """

    distances: Tensor
    text_similarities: Tensor


class Distillation(NamedTuple):
    """The distillation term and which queries took part.

    Attributes:
        loss: ``(…)``.
        local_to_global: bool ``(…, n_queries)``, queries on which the local view teaches the global one.
        global_to_local: bool ``(…, n_queries)``, the other way round.
    """

    loss: Tensor
    local_to_global: Tensor
    global_to_local: Tensor


@full_precision
def visual_confidence(distances: Tensor) -> Tensor:
    """``max_c softmax(−d)``: ``(…, n_queries, n_way)`` to ``(…, n_queries)``."""
    return (-distances).softmax(-1).amax(-1)


@full_precision
def text_confidence(text_similarities: Tensor) -> Tensor:
    """``max_c softmax(t)``: ``(…, n_queries, n_way)`` to ``(…, n_queries)``."""
    return text_similarities.softmax(-1).amax(-1)


def reliable_groups(
    local: ViewEvidence, global_: ViewEvidence, conditions: Sequence[str] = ("text",)
) -> tuple[Tensor, Tensor]:
    """On which queries each view is the reliable one.

    A condition says local where the local view is at least as confident, global otherwise; queries on which two
    conditions differ are in neither group. Without conditions every query is in both.

    Args:
        local: evidence of the local view.
        global_: evidence of the global view.
        conditions: any of ``text`` and ``visual``.

    Returns:
        Two bool tensors ``(…, n_queries)``, local reliable and global reliable.
    """
    says_local = []
    if "text" in conditions:
        says_local.append(text_confidence(local.text_similarities) >= text_confidence(global_.text_similarities))
    if "visual" in conditions:
        says_local.append(visual_confidence(local.distances) >= visual_confidence(global_.distances))
    if not says_local:
        everyone = torch.ones(local.distances.shape[:-1], dtype=torch.bool, device=local.distances.device)
        return everyone, everyone
    votes = torch.stack(says_local)
    return votes.all(0), ~votes.any(0)


def mutual_distillation(
    local: ViewEvidence,
    global_: ViewEvidence,
    *,
    conditions: Sequence[str] = ("text",),
    direction: Direction = "global_to_local",
    detach_teacher: bool = False,
) -> Distillation:
    """The reliable view teaches the other.

    Args:
        local: evidence of the local view.
        global_: evidence of the global view.
        conditions: what decides reliability, any of ``text`` and ``visual``. With none, every query is used in each
            direction chosen, unweighted and summed.
        direction: who may teach.
        detach_teacher: keep gradients out of the teacher's distribution and of the weights.
            Note: off as published; gradients flow through both.
    """
    local_reliable, global_reliable = reliable_groups(local, global_, conditions)
    nobody = torch.zeros_like(local_reliable)
    local_teaches = local_reliable if direction in ("local_to_global", "mutual") else nobody
    global_teaches = global_reliable if direction in ("global_to_local", "mutual") else nobody
    weighted = bool(conditions)
    loss = _teach(local, global_, local_teaches, weighted, detach_teacher)
    loss = loss + _teach(global_, local, global_teaches, weighted, detach_teacher)
    return Distillation(loss, local_teaches, global_teaches)


def _teach(teacher: ViewEvidence, student: ViewEvidence, group: Tensor, weighted: bool, detach: bool) -> Tensor:
    """``KL(teacher ‖ student)`` over a group of queries: a mean weighted by the teacher's confidence, or a sum."""
    divergence = kl_divergence(-teacher.distances.detach() if detach else -teacher.distances, -student.distances)
    weights = group.to(divergence.dtype)
    if weighted:
        confidence = visual_confidence(teacher.distances) + text_confidence(teacher.text_similarities)
        weights = weights * (confidence.detach() if detach else confidence)
        # An empty group divides by 1, not by 0: torch.where around the quotient would leave its gradient undefined.
        weights = weights / torch.where(group.any(-1), weights.sum(-1), 1.0).unsqueeze(-1)
    return (weights * divergence).sum(-1)


@full_precision
def kl_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """``KL(softmax(teacher) ‖ softmax(student))``, a sum over the classes: ``(…, n_way)`` to ``(…)``."""
    teacher, student = F.log_softmax(teacher_logits, -1), F.log_softmax(student_logits, -1)
    return (teacher.exp() * (teacher - student)).sum(-1)
