"""Episodes played from features, for frozen weights: a video is encoded once, however many episodes it is in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from clip_m2df.episode import VideoTable, named_videos
from clip_m2df.evaluation.metrics import EpisodeAccuracy
from clip_m2df.nn.m2df import M2DF
from clip_m2df.nn.matching import frame_costs, otam

# ``support (…, n_way, n_shot, frames, dim)``, ``query (…, n_queries, frames, dim)`` and ``prompts (…, n_way, dim)`` to
# logits ``(…, n_queries, n_way)``.
Scorer = Callable[[Tensor, Tensor, Tensor], Tensor]

# How many are read and encoded together.
VIDEOS = 16


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


def encode_videos(
    model: M2DF, table: VideoTable, numbers: Sequence[int], *, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Features of the videos that episodes name, each read and encoded once, by one of the ranks.

    What goes through the tower together is the same whatever the number of ranks, and so is every bit. Videos that
    can't be read are replaced, or end it, as the table has it.

    Args:
        model: in eval mode.
        table: of the episodes.
        numbers: the episodes that count.
        rank: of this process.
        world_size: number of processes.

    Returns:
        ``(videos, frames, dim)`` in the order of the table's videos, on the model's device; zero where no episode
        names the video.
    """
    encoded: dict[int, Tensor] = {}
    while places := [place for place in named_videos(table.episodes, numbers) if place not in encoded]:
        mine: dict[int, Tensor] = {}
        unusable: dict[str, str] = {}
        for clips in table.clips(
            [places[k : k + VIDEOS] for k in range(rank * VIDEOS, len(places), world_size * VIDEOS)]
        ):
            unusable |= clips.unusable
            if clips.frames is not None:
                mine |= dict(
                    zip(clips.places.tolist(), model.encode_frames(clips.frames.to(model.device)), strict=True)
                )
        if world_size > 1:
            everything: list[Any] = [None] * world_size
            torch.distributed.all_gather_object(everything, ({place: f.cpu() for place, f in mine.items()}, unusable))
            for features, reasons in everything:
                mine |= features
                unusable |= reasons
        encoded |= mine
        if unusable:
            table.replace(unusable)
    some = next(iter(encoded.values()))
    features = torch.zeros((len(table.videos), *some.shape), dtype=some.dtype, device=model.device)
    for place, feature in encoded.items():
        features[place] = feature.to(model.device)
    return features


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
