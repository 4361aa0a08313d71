"""The class-text loss: each video on its own against the prompts of all classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_m2df.nn.head import Head


def class_text_loss(
    head: Head, support: Tensor, query: Tensor, prompts: Tensor, table: Tensor, classes: Tensor, labels: Tensor
) -> Tensor:
    """A sum over the support and query videos of an episode, a mean over episodes.

    Args:
        head: whose class logits are taken.
        support: features ``(episodes, n_way, n_shot, frames, dim)``.
        query: features ``(episodes, n_queries, frames, dim)``.
        prompts: ``(episodes, n_way, dim)``.
        table: ``(n_classes, dim)``, the prompts of all classes.
        classes: int64 ``(episodes, n_way)``, places in ``table``.
        labels: int64 ``(episodes, n_queries)``, places in the episode.
    """
    of_support, of_query = head.class_logits(support, query, prompts, table)
    support_classes = classes.unsqueeze(-1).expand(of_support.shape[:-1])
    query_classes = classes.gather(1, labels)
    logits = torch.cat((of_support.flatten(0, -2), of_query.flatten(0, -2)))
    targets = torch.cat((support_classes.flatten(), query_classes.flatten()))
    return F.cross_entropy(logits, targets, reduction="sum") / len(classes)
