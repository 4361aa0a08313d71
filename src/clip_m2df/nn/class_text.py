"""Videos against the prompts of classes, each on its own: class logits, their loss, their part in predictions."""

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_m2df.nn.head import Head
from clip_m2df.nn.prompts import prompt_scores

Reduction: TypeAlias = Literal["sum", "mean"]


def class_text_logits(
    head: Head, support: Tensor, query: Tensor, prompts: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """The class logits of the support, by each video's own prompt, and of the queries.

    Args:
        head: whose class logits are taken.
        support: features ``(…, n_way, n_shot, frames, dim)``.
        query: features ``(…, n_queries, frames, dim)``.
        prompts: ``(…, n_way, dim)``.
        table: ``(…, n_classes, dim)``, the prompts of all classes.

    Returns:
        ``(…, n_way, n_shot, n_classes)`` and ``(…, n_queries, n_classes)``.
    """
    own = prompts.unsqueeze(-2).expand(*support.shape[:-2], -1)
    return head.class_logits(support, own, table.unsqueeze(-3)), query_class_logits(head, query, prompts, table)


def query_class_logits(head: Head, query: Tensor, prompts: Tensor, table: Tensor) -> Tensor:
    """The class logits of queries ``(…, n_queries, n_classes)``, each by the prompt of its highest score."""
    likeliest = prompt_scores(query, prompts, head.top_k).argmax(-1, keepdim=True)
    return head.class_logits(query, torch.take_along_dim(prompts, likeliest, dim=-2), table)


def class_text_loss(
    head: Head,
    support: Tensor,
    query: Tensor,
    prompts: Tensor,
    table: Tensor,
    classes: Tensor,
    labels: Tensor,
    reduction: Reduction = "sum",
) -> Tensor:
    """A sum or mean over the support and query videos of an episode, a mean over episodes.

    Args:
        head: see :func:`class_text_logits`, as the four below.
        support: with one leading axis, ``episodes``.
        query: the same.
        prompts: the same.
        table: without it.
        classes: int64 ``(episodes, n_way)``, indices in ``table``.
        labels: int64 ``(episodes, n_queries)``, indices in the episode.
        reduction: over the videos of an episode.
    """
    of_support, of_query = class_text_logits(head, support, query, prompts, table)
    support_classes = classes.unsqueeze(-1).expand(of_support.shape[:-1])
    query_classes = classes.gather(1, labels)
    logits = torch.cat((of_support.flatten(0, -2), of_query.flatten(0, -2)))
    targets = torch.cat((support_classes.flatten(), query_classes.flatten()))
    loss = F.cross_entropy(logits, targets, reduction=reduction)
    return loss / len(classes) if reduction == "sum" else loss  # episodes have as many videos each


def fuse_text(head: Head, share: float, logits: Tensor, query: Tensor, prompts: Tensor) -> Tensor:
    """The scores by which classes are predicted, with a share of the text in them (CLIP-FSAR's evaluation).

    Args:
        head: whose class logits are the text's.
        share: β of ``p = p_text^β · p_visual^(1−β)``.
        logits: the head's ``(…, n_queries, n_way)``.
        query: features ``(…, n_queries, frames, dim)``.
        prompts: ``(…, n_way, dim)``.

    Returns:
        The logits if the share is 0; else the logarithm of p, not normalised.
    """
    if not share:
        return logits
    text = query_class_logits(head, query, prompts, prompts).log_softmax(-1)
    return share * text + (1 - share) * logits.log_softmax(-1)
