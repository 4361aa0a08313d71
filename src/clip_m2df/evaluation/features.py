"""Episodes played from features, for frozen weights: a video is encoded once, however many episodes it is in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from clip_m2df.evaluation.metrics import EpisodeAccuracy
from clip_m2df.nn.m2df import M2DF
from clip_m2df.nn.matching import frame_costs, otam

# ``support (…, n_way, n_shot, frames, dim)``, ``query (…, n_queries, frames, dim)`` and ``prompts (…, n_way, dim)`` to
# logits ``(…, n_queries, n_way)``.
Scorer = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def encode_clips(model: M2DF, clips: Iterable[Tensor]) -> Tensor:
    """Features of many clips.

    Args:
        model: in eval mode.
        clips: uint8 ``(n, frames, 3, size, size)``, n as large as goes through at once.

    Returns:
        ``(videos, frames, dim)``, on the model's device.
    """
    return torch.cat([model.encode_frames(batch.to(model.device)) for batch in clips])


def otam_scores(support: Tensor, query: Tensor, prompts: Tensor) -> Tensor:
    """Parameter-free OTAM: minus the distance to the mean of the support videos' raw features (see ``Scorer``)."""
    return -otam(frame_costs(query, support.mean(-3)))


@torch.no_grad()
def play_episodes(
    scorer: Scorer,
    features: Tensor,
    prompt_table: Tensor,
    support: Tensor,
    query: Tensor,
    classes: Tensor,
    *,
    batch_size: int = 64,
) -> dict[str, float]:
    """Accuracy over episodes given by the places of their videos.

    Args:
        scorer: what is measured.
        features: ``(videos, frames, dim)``.
        prompt_table: ``(n_classes, dim)``.
        support: int64 ``(episodes, n_way, n_shot)``, places in ``features``.
        query: int64 ``(episodes, n_way, n_query)``.
        classes: int64 ``(episodes, n_way)``, places in ``prompt_table``.
        batch_size: episodes at once.

    Returns:
        ``accuracy`` and ``interval``, the half-width of its 95 % interval.
    """
    metric = EpisodeAccuracy().to(features.device)
    n_way, n_query = query.shape[1:]
    labels = torch.arange(n_way, device=features.device).repeat_interleave(n_query)
    batches: Sequence[tuple[Tensor, ...]] = list(
        zip(support.split(batch_size), query.split(batch_size), classes.split(batch_size), strict=True)
    )
    for s, q, c in batches:
        logits = scorer(features[s], features[q.flatten(1)], prompt_table[c])
        metric.update(logits.argmax(-1) == labels)
    return {name: float(value) for name, value in metric.compute().items()}
