"""When a clip shows none of the classes: a threshold on the distance to the closest, from the examples alone.

A clip of a class of its own is told from one of a known class by its distance better than by its probability, which
says how the classes compare (docs/own_videos.md has the figures).
"""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from clip_m2df.classifier.support import CELLS, QUERIES, ClassScorer, SupportClass
from clip_m2df.nn.head import Embedded, Head
from clip_m2df.nn.matching import cosine, frame_costs
from clip_m2df.nn.prompts import SelectedPrompts, prompt_probabilities, prompt_scores, select_prompts
from clip_m2df.nn.weights import check_finite
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
    head = model.model.head
    # A class is what it is beside the others, or a head of a person's own selects prompts in its own way.
    own_way = head.query_prompt in ("class", "mixture") and type(head).select_prompts is not Head.select_prompts
    belongs, strange = (_by_scorers if head.task_specific or own_way else _by_blocks)(model, classes)
    if not len(belongs):
        return float(strange.quantile(0.5)) if len(strange) else None
    if not len(strange):
        return float(belongs.max())
    return _best_cut(belongs, strange)


def _by_scorers(model: CLIPM2DF, classes: Sequence[SupportClass]) -> tuple[Tensor, Tensor]:
    """What :func:`_by_blocks` finds, each example scored against classes put together for it."""
    belongs, strange = [], [torch.empty(0)]
    for index, own in enumerate(classes):
        before, after = classes[:index], classes[index + 1 :]
        if len(classes) > 1:
            strange.append(ClassScorer(model, [*before, *after]).label(own.features)[1].amin(-1).cpu())
        if (n := len(own.features)) > 1:
            for i in range(n):
                fewer = own.only(model, [j for j in range(n) if j != i])
                scorer = ClassScorer(model, [*before, fewer, *after])
                belongs.append(float(scorer.label(own.features[i : i + 1])[1][0, index]))
    return torch.tensor(belongs), torch.cat(strange)


def _by_blocks(model: CLIPM2DF, classes: Sequence[SupportClass]) -> tuple[Tensor, Tensor]:
    """The distances of examples, all compared with all classes once.

    Returns:
        Of each example of a class with several to its own class without it, ``(n)``; and of each example to the closest
        class that is not its own, ``(n)``, or ``(0)`` where there is one class.
    """
    head, scorer = model.model.head, ClassScorer(model, classes)
    frames = classes[0].features.shape[-2]
    examples = [(index, i) for index, own in enumerate(classes) for i in range(len(own.features))]
    belongs, strange, at_once = [], [], scorer.at_once(frames)
    for block in (examples[k : k + at_once] for k in range(0, len(examples), at_once)):
        query = torch.stack([classes[index].features[i] for index, i in block])
        owner = torch.tensor([index for index, _ in block], device=query.device)
        kept = Embedded.stack([classes[index].embedded.map(itemgetter(i)) for index, i in block])
        alone, beside, selected = _embed(head, query, scorer.prompts, owner, kept)
        if len(classes) > 1:
            logits = head.match(beside, scorer.prototypes, selected).logits
            check_finite(logits, model.source)
            strange.append(logits.scatter(-1, owner.unsqueeze(-1), -torch.inf).amax(-1))
        start = 0
        for index, of_class in groupby(block, key=lambda example: example[0]):
            rows = [i for _, i in of_class]
            here = slice(start, start := start + len(rows))
            if len(classes[index].features) > 1:
                # Each example is an episode by itself, of one query and one class.
                one = [1, 1] if head.query_prompt == "each" else [1]
                episodes = alone.map(itemgetter(here)).map(partial(torch.unflatten, dim=0, sizes=(-1, *one)))
                prototypes = _without_one(head, classes[index], rows).map(lambda tensor: tensor.unsqueeze(1))
                of_query = SelectedPrompts(*(tensor[here].unsqueeze(1) for tensor in selected))
                belongs.append(head.match(episodes, prototypes, of_query).logits.flatten())
    least = head.least_distance(frames)
    own, other = (-torch.cat(logits) - least if logits else torch.empty(0) for logits in (belongs, strange))
    return own, other


def _embed(
    head: Head, query: Tensor, prompts: Tensor, owner: Tensor, kept: Embedded
) -> tuple[Embedded, Embedded, SelectedPrompts]:
    """Examples as queries.

    Args:
        head: whose.
        query: the examples, ``(n, frames, dim)``.
        prompts: of all classes, ``(n_way, dim)``.
        owner: int64 ``(n)``, the examples' own classes.
        kept: the examples, embedded with the prompts of their own classes.

    Returns:
        How they are embedded where their own class is one of the classes, to be compared with that class; how where it
        is not; and the prompts of the latter.
    """
    if head.query_prompt in ("none", "each"):
        embedded, selected = head.embed_queries(query, prompts)
        return (kept if head.query_prompt == "each" else embedded), embedded, selected
    scores = prompt_scores(query, prompts, head.top_k)
    of_others = scores.scatter(-1, owner.unsqueeze(-1), -torch.inf) if len(prompts) > 1 else scores
    among_all, among_others = (
        select_prompts(prompt_probabilities(some, head.temperature), prompts, head.selection)
        for some in (scores, of_others)
    )
    beside = head.embed(query, among_others.embeddings)
    if head.query_prompt == "mixture":
        return head.embed(query, among_all.embeddings), beside, among_others
    own = among_all.indices == owner  # else the prompt is that of the same other class
    alone = Embedded({name: tensor.index_put((own,), kept[name][own]) for name, tensor in beside.items()})
    return alone, beside, among_others


def _without_one(head: Head, own: SupportClass, rows: Sequence[int]) -> Embedded:
    """The prototypes of a class of several examples without one of them each, ``(rows, …)``."""
    everyone = torch.arange(n := len(own.features))
    parts = []
    for some in torch.tensor(rows).split(max(1, QUERIES // n)):
        others = torch.stack([everyone[everyone != i] for i in some])
        embedded = own.embedded.map(itemgetter(others))
        parts.append(head.prototype(embedded, own.prompt.expand(len(some), -1)))
    return Embedded.cat(parts)


def _best_cut(belongs: Tensor, strange: Tensor) -> float:
    """The threshold of the highest balanced accuracy, in the middle of the widest gap in which there is one.

    Where none is better than chance, what belongs being no closer than what does not, it is the largest distance seen.
    """
    belongs, strange = belongs.double().sort().values, strange.double().sort().values
    values = torch.cat((belongs, strange)).unique()
    cuts = (values[1:] + values[:-1]) / 2
    within, beyond = (torch.searchsorted(some, cuts, right=True).double() / len(some) for some in (belongs, strange))
    right = within + (1 - beyond)
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
    examples = [video for c in classes for video in c.features]
    last = 0
    for own in classes:
        first, last = last, last + len(own.features)
        costs = 1 - cosine(own.features, own.features)
        step = 2 * costs.diagonal(1, -2, -1).mean(-1)
        among = torch.cat([_distances(row, own.features) for row in own.features.split(_at_once(own.features))])
        nearest = among.fill_diagonal_(torch.inf).amin(-1)
        # A class alone has its own frames to be compared with.
        others = examples[:first] + examples[last:]
        apart = torch.full_like(nearest, torch.inf) if others else step / 2
        alike = _alike(nearest, step, apart)
        at_once = _at_once(own.features)
        for k in range(0, len(others), at_once):
            if alike.double().mean() < 0.5:  # the closer the others, the less alike: more of them change nothing
                break
            apart = apart.minimum(_distances(own.features, torch.stack(others[k : k + at_once])).amin(-1))
            alike = _alike(nearest, step, apart)
        if alike.double().mean() >= 0.5:
            found.append(own.label)
    return found


def _alike(nearest: Tensor, step: Tensor, apart: Tensor) -> Tensor:
    return (nearest <= OF_A_STEP * step) & (nearest <= OF_A_CLASS * apart) | (nearest <= HARDLY * apart)


def _at_once(videos: Tensor) -> int:
    """With how many others these ``(n, frames, dim)`` are compared together."""
    return max(1, min(QUERIES, CELLS // (len(videos) * videos.shape[-2] ** 2)))


def _distances(videos: Tensor, others: Tensor) -> Tensor:
    """Between videos by the costs of their frames, in whatever order: ``(n, m)``."""
    costs = frame_costs(videos, others)
    return costs.amin(-1).mean(-1) + costs.amin(-2).mean(-1)
