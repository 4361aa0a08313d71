"""Baselines behind the interface of a head: simpler ways to score the same episodes from the same features."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from clip_m2df.nn.distillation import Distillation
from clip_m2df.nn.head import Head, HeadOutput, check_positive
from clip_m2df.nn.matching import cosine, frame_costs, full_precision, otam


class Baseline(Head):
    """A head without views: it gives scores, and nothing to distil. PPS runs for the log alone.

    Args:
        dim: see :class:`clip_m2df.nn.head.Head`.
        top_k: the same.
        temperature: the same.
    """

    trained = False
    averages_shots = True

    def forward(self, support: Tensor, query: Tensor, prompts: Tensor, draws: Tensor | None = None) -> HeadOutput:
        """Score the queries of an episode, see :meth:`clip_m2df.nn.head.Head.forward`; nothing is drawn."""
        logits = self.score(support, query, prompts)
        probabilities = self.prompt_probabilities(self.prompt_scores(query, prompts))
        nobody = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        return HeadOutput(
            logits=logits,
            distances={},
            text_similarities={},
            visual_confidences={},
            text_confidences={},
            prompt_probabilities=probabilities,
            prompt_indices=probabilities.argmax(-1),
            distillation=Distillation(logits.new_zeros(logits.shape[:-2]), nobody, nobody),
        )

    @abstractmethod
    def score(self, support: Tensor, query: Tensor, prompts: Tensor) -> Tensor:
        """Logits ``(…, n_queries, n_way)``.

        Args:
            support: ``(…, n_way, n_shot, frames, dim)``, frame features.
            query: ``(…, n_queries, frames, dim)``.
            prompts: ``(…, n_way, dim)``.
        """


class NearestPrototypeHead(Baseline):
    """The class whose mean is nearest (Snell et al., Prototypical Networks, NeurIPS 2017), by cosine.

    A query is the mean of its frames, a class that of all frames of all its shots.
    Note: the paper measures squared Euclidean distances; CLIP's features are made to be compared by cosine.

    """

    # It leaves the predictions alone; without it a softmax over cosines, which differ by little, would hardly teach a
    # tower.
    logit_scale = 10.0

    @full_precision
    def score(self, support: Tensor, query: Tensor, prompts: Tensor) -> Tensor:
        """See :meth:`Baseline.score`; prompts don't count."""
        return self.logit_scale * cosine(query.mean(-2), support.mean((-3, -2)))


class OTAMHead(Baseline):
    """OTAM on the tower's own features (Cao et al., CVPR 2020, arXiv 1906.11415): minus the distance.

    A class's prototype is the mean of its shots, frame by frame.
    Note: a public implementation takes the mean of the shots' distances instead; here the shots are averaged as by the
    other heads, so that heads differ by what they compare alone.

    Args:
        dim: see :class:`clip_m2df.nn.head.Head`.
        smoothing: λ of OTAM's soft minimum.
        single_direction: match one way, not both.
        top_k: see :class:`clip_m2df.nn.head.Head`.
        temperature: the same.

    Raises:
        UserError: an option out of its range.
    """

    def __init__(
        self,
        *,
        dim: int,
        smoothing: float = 0.5,
        single_direction: bool = False,
        top_k: int = 4,
        temperature: float = 200.0,
    ) -> None:
        super().__init__(dim=dim, top_k=top_k, temperature=temperature)
        check_positive(smoothing=smoothing)
        self.smoothing = smoothing
        self.single_direction = single_direction

    @full_precision
    def score(self, support: Tensor, query: Tensor, prompts: Tensor) -> Tensor:
        """See :meth:`Baseline.score`; prompts don't count."""
        costs = frame_costs(query, support.mean(-3))
        return -otam(costs, smoothing=self.smoothing, single_direction=self.single_direction)


class ZeroShotHead(Baseline):
    """CLIP's prompts alone (Radford et al., ICML 2021, arXiv 2103.00020): the support is not looked at.

    A query's score is the mean, over its frames, of their cosines with the class's prompt.
    """

    # CLIP's own: its temperature was learnt up to the bound of 1/100.
    logit_scale = 100.0

    @full_precision
    def score(self, support: Tensor, query: Tensor, prompts: Tensor) -> Tensor:
        """See :meth:`Baseline.score`; the support does not count."""
        return self.logit_scale * cosine(query, prompts.unsqueeze(-3)).mean(-2)


class BiMHMHead(Baseline):
    """The bidirectional mean Hausdorff metric of HyRSM (Wang et al., CVPR 2022, arXiv 2204.13423), on raw features.

    Each frame is compared with the nearest one of the other video, whatever their order: the mean over the query's
    frames, and that over the prototype's (the mean of the shots), are added. The logits are minus that.
    Note: the published code adds up the frames. All videos having as many, the mean of the paper ranks classes alike.
    """

    @full_precision
    def score(self, support: Tensor, query: Tensor, prompts: Tensor) -> Tensor:
        """See :meth:`Baseline.score`; prompts don't count."""
        costs = frame_costs(query, support.mean(-3))
        return -(costs.amin(-1).mean(-1) + costs.amin(-2).mean(-1))
