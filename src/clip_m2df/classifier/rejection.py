"""When a clip shows none of the classes: a threshold on the distance to the closest, from the examples alone.

A clip of a class of its own is told from one of a known class by its distance better than by its probability, which
says how the classes compare (docs/own_videos.md has the figures).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from clip_m2df.classifier.support import Scorer, SupportClass, averages_shots
from clip_m2df.nn.m2df import M2DFHead
from clip_m2df.nn.views import FusedSequence
from clip_m2df.training.module import CLIPM2DF


@torch.no_grad()
def calibrate(model: CLIPM2DF, classes: Sequence[SupportClass]) -> float | None:
    """The distance beyond which a clip is none of these.

    Each example of a class with several is compared with the others of its class (what belongs), and each example with
    the other classes as if its own were not there (what does not).

    - With both, the threshold is the one that sorts them best, by the mean share of right decisions on either side.
    - With one example a class, half of what does not belong lies within it: their median.
    - With one class alone, all of what belongs does: their largest.

    Args:
        model: in eval mode.
        classes: at least one.

    Returns:
        None where there is nothing to compare: one class with one example.
    """
    belongs = _own_distances(model, classes)
    strange = _strange_distances(model, classes)
    if belongs is None:
        return None if strange is None else float(strange.quantile(0.5))
    if strange is None:
        return float(belongs.max())
    return _best_cut(belongs, strange)


def _own_distances(model: CLIPM2DF, classes: Sequence[SupportClass]) -> Tensor | None:
    """Of each example to its own class without it ``(n)``."""
    found = []
    for place, own in enumerate(classes):
        if len(own.features) == 1:
            continue
        if own.fused is not None:
            found.append(_fused_distances(model, own, torch.stack([c.prompt for c in classes])))
        elif averages_shots(model):
            others, n = _mean_of_others(own.features), len(own.features)
            support, query = others.unflatten(0, (n, 1, 1)), own.features.unsqueeze(1)
            found.append(-model.model.head(support, query, own.prompt.expand(n, 1, -1)).logits.flatten())
        else:
            for i in range(len(own.features)):
                rest = own.only([j for j in range(len(own.features)) if j != i])
                scorer = Scorer(model, [*classes[:place], rest, *classes[place + 1 :]])
                found.append(-scorer.score(own.features[i : i + 1]).logits[0, place : place + 1])
    return torch.cat(found) if found else None


def _fused_distances(model: CLIPM2DF, own: SupportClass, prompts: Tensor) -> Tensor:
    """Of each example to its own class without it ``(n)``, PPS choosing among all ``prompts (n_way, dim)``."""
    head, fused = cast(M2DFHead, model.model.head), cast(Mapping[str, FusedSequence], own.fused)
    probabilities = head.prompt_probabilities(head.prompt_scores(own.features, prompts))
    query = head.fuse(own.features, head.select(probabilities, prompts).embeddings)
    # Each with a prototype of its own: n episodes of one class and one query.
    alone = {view: FusedSequence(*(part.unsqueeze(1) for part in parts)) for view, parts in query.items()}
    others = {
        view: FusedSequence(*(_mean_of_others(part).unsqueeze(1) for part in parts)) for view, parts in fused.items()
    }
    return head.fuse_distances(head.match(alone, others)).flatten()


def _mean_of_others(rows: Tensor) -> Tensor:
    """Of ``rows (n, …)``, for each the mean of all others."""
    return (rows.sum(0) - rows) / (len(rows) - 1)


def _strange_distances(model: CLIPM2DF, classes: Sequence[SupportClass]) -> Tensor | None:
    """Of each example to the closest class that is not its own ``(n)``."""
    if len(classes) == 1:
        return None
    found = []
    for place, own in enumerate(classes):
        others = Scorer(model, [*classes[:place], *classes[place + 1 :]])
        found.append(others.label(own.features)[1].amin(-1))
    return torch.cat(found)


def _best_cut(belongs: Tensor, strange: Tensor) -> float:
    """The threshold of the highest balanced accuracy, in the middle of the widest gap in which there is one.

    Where none is better than chance, what belongs being no closer than what does not, it is the largest distance seen.
    """
    values = torch.cat((belongs, strange)).double().unique()
    cuts = (values[1:] + values[:-1]) / 2
    right = (belongs <= cuts.unsqueeze(-1)).double().mean(-1) + (strange > cuts.unsqueeze(-1)).double().mean(-1)
    best = (right >= right.amax() - 1e-9) & (right > 1 + 1e-9) if len(cuts) else right.bool()
    if not best.any():
        return float(values[-1])
    return float(cuts[(values.diff() * best).argmax()])
