"""When a clip shows none of the classes: a threshold on the distance to the closest, from the examples alone.

A clip of a class of its own is told from one of a known class by its distance better than by its probability, which
says how the classes compare (docs/own_videos.md has the figures).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from clip_m2df.classifier.support import ClassScorer, SupportClass
from clip_m2df.nn.head import Embedded
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
    """Of each example of a class with several to its own class without it ``(n)``."""
    head, prompts = model.model.head, torch.stack([c.prompt for c in classes])
    found = []
    for own in classes:
        if (n := len(own.features)) > 1:
            rest = [own.only(model, [j for j in range(n) if j != i]).prototype for i in range(n)]
            embedded, selected = head.embed_queries(own.features, prompts)
            logits = head.match(embedded, Embedded.stack(rest), selected).logits.diagonal()
            found.append(-logits - head.least_distance(own.features.shape[-2]))
    return torch.cat(found) if found else None


def _strange_distances(model: CLIPM2DF, classes: Sequence[SupportClass]) -> Tensor | None:
    """Of each example to the closest class that is not its own ``(n)``."""
    if len(classes) == 1:
        return None
    found = []
    for index, own in enumerate(classes):
        others = ClassScorer(model, [*classes[:index], *classes[index + 1 :]])
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
