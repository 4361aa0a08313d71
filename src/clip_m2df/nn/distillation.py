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

    @classmethod
    def none(cls, logits: Tensor) -> Distillation:
        """No distillation on the queries of ``logits (…, n_queries, n_way)``: a loss of zero, and no query."""
        nobody = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        return cls(logits.new_zeros(logits.shape[:-2]), nobody, nobody)


@full_precision
def max_softmax(logits: Tensor) -> Tensor:
    """``max_c softmax(logits)``: ``(…, n_queries, n_way)`` to ``(…, n_queries)``."""
    return logits.softmax(-1).amax(-1)


class ViewOutput(NamedTuple):
    """How one view compares the queries with the classes.

    Attributes:
        distances: ``(…, n_queries, n_way)``, OTAM distances to the prototypes.
        text_similarities: ``(…, n_queries, n_way)``, cosines of the text parts; no part of the logits.
    """

    distances: Tensor
    text_similarities: Tensor

    @property
    def visual_confidence(self) -> Tensor:
        """``max_c softmax(−d)``, ``(…, n_queries)``, in float32 at least."""
        return max_softmax(-self.distances)

    @property
    def text_confidence(self) -> Tensor:
        """``max_c softmax(t)``, ``(…, n_queries)``, in float32 at least."""
        return max_softmax(self.text_similarities)


def reliable_groups(
    local: ViewOutput, global_: ViewOutput, conditions: Sequence[str] = ("text",)
) -> tuple[Tensor, Tensor]:
    """On which queries each view is the reliable one.

    A condition says local where the local view is at least as confident, global otherwise; queries on which two
    conditions differ are in neither group. Without conditions every query is in both.

    Args:
        local: the local view's comparison.
        global_: the global view's comparison.
        conditions: any of ``text`` and ``visual``.

    Returns:
        Two bool tensors ``(…, n_queries)``, local reliable and global reliable.
    """
    says_local = []
    if "text" in conditions:
        says_local.append(local.text_confidence >= global_.text_confidence)
    if "visual" in conditions:
        says_local.append(local.visual_confidence >= global_.visual_confidence)
    if not says_local:
        everyone = torch.ones(local.distances.shape[:-1], dtype=torch.bool, device=local.distances.device)
        return everyone, everyone
    votes = torch.stack(says_local)
    return votes.all(0), ~votes.any(0)


def mutual_distillation(
    local: ViewOutput,
    global_: ViewOutput,
    *,
    conditions: Sequence[str] = ("text",),
    direction: Direction = "global_to_local",
    detach_teacher: bool = False,
) -> Distillation:
    """The reliable view teaches the other.

    Args:
        local: the local view's comparison.
        global_: the global view's comparison.
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


def _teach(teacher: ViewOutput, student: ViewOutput, group: Tensor, weighted: bool, detach: bool) -> Tensor:
    """``KL(teacher ‖ student)`` over a group of queries: a mean weighted by the teacher's confidence, or a sum."""
    divergence = kl_divergence(-teacher.distances.detach() if detach else -teacher.distances, -student.distances)
    weights = group.to(divergence.dtype)
    if weighted:
        confidence = teacher.visual_confidence + teacher.text_confidence
        weights = weights * (confidence.detach() if detach else confidence)
        # An empty group divides by 1, not by 0: torch.where around the quotient would leave its gradient undefined.
        weights = weights / torch.where(group.any(-1), weights.sum(-1), 1.0).unsqueeze(-1)
    return (weights * divergence).sum(-1)


@full_precision
def kl_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """``KL(softmax(teacher) ‖ softmax(student))``, a sum over the classes: ``(…, n_way)`` to ``(…)``."""
    teacher, student = F.log_softmax(teacher_logits, -1), F.log_softmax(student_logits, -1)
    return (teacher.exp() * (teacher - student)).sum(-1)
