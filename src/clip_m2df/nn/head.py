"""What every head is (:class:`Head`): frame features and prompt embeddings in, a :class:`HeadOutput` out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from clip_m2df.errors import UserError
from clip_m2df.nn.distillation import Distillation
from clip_m2df.nn.matching import cosine, full_precision
from clip_m2df.nn.prompts import closest_frames, prompt_probabilities, prompt_scores


class HeadOutput(NamedTuple):
    """What a head says of the queries. Mappings are keyed by view (``local``, ``global``), those in use only.

    Attributes:
        logits: ``(…, n_queries, n_way)``; of a head that measures distances, minus the (fused) distance.
        distances: OTAM distances of each view ``(…, n_queries, n_way)``.
        text_similarities: cosines of the text parts in each view ``(…, n_queries, n_way)``; no part of the logits.
        visual_confidences: ``max softmax(−d)`` of each view ``(…, n_queries)``.
        text_confidences: ``max softmax(t)`` of each view ``(…, n_queries)``.
        prompt_probabilities: PPS's distribution π ``(…, n_queries, n_way)``.
        prompt_indices: int64 ``(…, n_queries)``, whose prompt each query got (``expectation``: the likeliest).
        distillation: the term's value ``(…)`` and the queries ``(…, n_queries)`` distilled each way.
    """

    logits: Tensor
    distances: dict[str, Tensor]
    text_similarities: dict[str, Tensor]
    visual_confidences: dict[str, Tensor]
    text_confidences: dict[str, Tensor]
    prompt_probabilities: Tensor
    prompt_indices: Tensor
    distillation: Distillation

    @property
    def distillation_loss(self) -> Tensor:
        """The distillation term ``(…)``, one an episode."""
        return self.distillation.loss


class Head(nn.Module, ABC):
    """Scores the queries of episodes on frame features and prompt embeddings. Any leading axes: B episodes at once.

    Args:
        dim: width of the features.
        top_k: frames that count in a prompt's score.
        temperature: of PPS's softmax.

    Attributes:
        trained: whether it has anything to train; one that has not is measured without a checkpoint.
        averages_shots: whether the shots of a class count by their mean alone, and each class by itself.

    Raises:
        UserError: an option out of its range, with what it may be.
    """

    trained: ClassVar[bool] = True
    averages_shots: ClassVar[bool] = False

    def __init__(self, *, dim: int, top_k: int = 4, temperature: float = 200.0) -> None:
        super().__init__()
        if top_k < 1:
            raise UserError(f"top_k {top_k}: at least 1 frame must count")
        check_positive(temperature=temperature)
        self.dim = dim
        self.top_k = top_k
        self.temperature = temperature
        # Scale of the class logits, learnt where their loss is used.
        self.scale = nn.Parameter(torch.ones(1))

    @abstractmethod
    def forward(self, support: Tensor, query: Tensor, prompts: Tensor, draws: Tensor | None = None) -> HeadOutput:
        """Score the queries of an episode.

        Args:
            support: ``(…, n_way, n_shot, frames, dim)``, frame features.
            query: ``(…, n_queries, frames, dim)``.
            prompts: ``(…, n_way, dim)``, the prompt embeddings of the episode's classes.
            draws: ``(…, n_queries)``, uniforms in [0, 1) for a head that samples.
        """

    def prompt_scores(self, query: Tensor, prompts: Tensor) -> Tensor:
        """Scores of ``query (…, n_queries, frames, dim)`` by ``prompts (…, n_way, dim)``: ``(…, n_queries, n_way)``."""
        return prompt_scores(query, prompts, self.top_k)

    def prompt_probabilities(self, scores: Tensor) -> Tensor:
        """PPS's distribution over an episode's classes, from their scores ``(…, n_queries, n_way)``."""
        return prompt_probabilities(scores, self.temperature)

    def class_logits(
        self, support: Tensor, query: Tensor, prompts: Tensor, prompt_table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """How each video's raw features compare with the prompts of all classes of the split (METHOD, section 7).

        A video stands by the mean of its ``top_k`` frames closest to a prompt: a support video's own, for a query that
        of the highest score.

        Args:
            support: ``(…, n_way, n_shot, frames, dim)``.
            query: ``(…, n_queries, frames, dim)``.
            prompts: ``(…, n_way, dim)``.
            prompt_table: ``(…, n_classes, dim)``.

        Returns:
            ``(…, n_way, n_shot, n_classes)`` and ``(…, n_queries, n_classes)``.
        """
        likeliest = self.prompt_scores(query, prompts).argmax(-1, keepdim=True)
        query_prompts = torch.take_along_dim(prompts, likeliest, dim=-2)
        support_prompts = prompts.unsqueeze(-2).expand(*support.shape[:-2], -1)
        table = prompt_table.unsqueeze(-3)
        return (
            self._class_logits(support, support_prompts, table),
            self._class_logits(query, query_prompts, prompt_table),
        )

    def _class_logits(self, videos: Tensor, prompts: Tensor, prompt_table: Tensor) -> Tensor:
        """``videos (…, n, frames, dim)`` with a prompt each ``(…, n, dim)``: ``(…, n, n_classes)``."""
        places = closest_frames(videos, prompts.unsqueeze(-2), self.top_k)[1].squeeze(-2)
        best = torch.take_along_dim(videos, places.unsqueeze(-1), dim=-2)
        return self._scaled_cosine(best, prompt_table)

    @full_precision
    def _scaled_cosine(self, frames: Tensor, prompt_table: Tensor) -> Tensor:
        """The mean of ``frames (…, n, frames, dim)`` with each prompt: ``(…, n, n_classes)``."""
        return self.scale * cosine(frames.mean(-2), prompt_table)


def fuse_text(head: Head, share: float, logits: Tensor, support: Tensor, query: Tensor, prompts: Tensor) -> Tensor:
    """The scores by which classes are predicted, with a share of the text in them (CLIP-FSAR's evaluation).

    Args:
        head: whose class logits are the text's.
        share: β of ``p = p_text^β · p_visual^(1−β)``.
        logits: the head's ``(…, n_queries, n_way)``.
        support: features ``(…, n_way, n_shot, frames, dim)``.
        query: features ``(…, n_queries, frames, dim)``.
        prompts: ``(…, n_way, dim)``.

    Returns:
        The logits if the share is 0; else the logarithm of p, not normalised.
    """
    if not share:
        return logits
    text = head.class_logits(support, query, prompts, prompts)[1].log_softmax(-1)
    return share * text + (1 - share) * logits.log_softmax(-1)


def check_positive(**options: float) -> None:
    """Refuse options that are not above 0.

    Raises:
        UserError: names the first.
    """
    for option, value in options.items():
        if not value > 0:
            raise UserError(f"{option} is {value}; it must be positive")


def check_shares(**options: float) -> None:
    """Refuse options that are no share of a whole, or all of it.

    Raises:
        UserError: names the first.
    """
    for option, value in options.items():
        if not 0 <= value < 1:
            raise UserError(f"{option} is {value}; it must be from 0 to below 1")
