"""When a clip shows none of the classes: a threshold on the distance to the closest, from the examples alone.

A clip of a class of its own is told from one of a known class by its distance better than by its probability, which
says how the classes compare (docs/own_videos.md has the figures).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from clip_m2df.classifier.support import ClassScorer, SupportClass
from clip_m2df.nn.head import Embedded
from clip_m2df.nn.matching import frame_costs
from clip_m2df.training.module import CLIPM2DF

# Examples are nearly the same if one differs from another by less than its own frames do from one to the next, and than
# half of what it differs by from another class; or by hardly anything, beside the latter.
OF_A_STEP, OF_A_CLASS, HARDLY = 0.75, 0.5, 0.05


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
    for index, own in enumerate(classes):
        if (n := len(own.features)) > 1:
            rest = [own.only(model, [j for j in range(n) if j != i]) for i in range(n)]
            if head.task_specific:  # a class is what it is beside the others
                for example, fewer in zip(own.features, rest, strict=True):
                    scorer = ClassScorer(model, [*classes[:index], fewer, *classes[index + 1 :]])
                    found.append(scorer.label(example.unsqueeze(0))[1][:, index])
                continue
            if head.query_prompt == "each":  # the class's own prompt, with which its examples are embedded already
                embedded = own.embedded.map(lambda kept: kept.unsqueeze(1))
                selected = head.select_prompts(own.features, prompts)
            else:
                embedded, selected = head.embed_queries(own.features, prompts)
            logits = head.match(embedded, Embedded.stack([c.prototype for c in rest]), selected).logits.diagonal()
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


@torch.no_grad()
def near_identical(classes: Sequence[SupportClass]) -> list[str]:
    """The classes of which half the examples or more are nearly the same as another, as if cut from one video.

    A threshold that is learnt from such examples rejects whatever is filmed otherwise. They are compared by the tower's
    features, each frame with the closest of the other video.
    """
    found = []
    for own in classes:
        costs = frame_costs(own.features, own.features)
        same = torch.eye(len(costs), dtype=torch.bool, device=costs.device)
        nearest = _distances(costs).masked_fill(same, torch.inf).amin(-1)
        step = 2 * costs[same].diagonal(1, -2, -1).mean(-1)
        others = [c.features for c in classes if c is not own]
        # A class alone has its own frames to be compared with.
        apart = _distances(frame_costs(own.features, torch.cat(others))).amin(-1) if others else step / 2
        alike = (nearest <= OF_A_STEP * step) & (nearest <= OF_A_CLASS * apart) | (nearest <= HARDLY * apart)
        if alike.double().mean() >= 0.5:
            found.append(own.label)
    return found


def _distances(costs: Tensor) -> Tensor:
    """Between videos by the costs of their frames ``(n, m, frames, frames)``, in whatever order: ``(n, m)``."""
    return costs.amin(-1).mean(-1) + costs.amin(-2).mean(-1)
