"""What a step leaves for callbacks: a batch of episodes as the head saw it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from clip_m2df.nn.head import HeadOutput


class Played(NamedTuple):
    """A batch of episodes as the head saw it, and what came of it.

    Attributes:
        support: features ``(episodes, n_way, n_shot, frames, dim)``.
        query: features ``(episodes, n_queries, frames, dim)``.
        prompts: ``(episodes, n_way, dim)``.
        output: what the head said.
        scores: ``(episodes, n_queries, n_way)``, by which the classes are predicted.
    """

    support: Tensor
    query: Tensor
    prompts: Tensor
    output: HeadOutput
    scores: Tensor
