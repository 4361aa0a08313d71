"""Open sets: how well a number tells queries of an episode's classes (known) from those of other classes (unknown).

Everything is pooled over episodes, as one threshold for all of them is: comparing scores within each episode alone and
taking the mean over episodes, as work on few-shot open sets does, gives other numbers. What is counted are pairs of
queries, in integers: the order of queries, and how ranks share them, changes no bit.
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from clip_m2df.errors import require

MEASURES = ("auroc", "oscr", "fpr95")


def _distance(logits: Tensor) -> Tensor:
    return logits.amax(-1)


def _probability(logits: Tensor) -> Tensor:
    return logits.softmax(-1).amax(-1)


def _margin(logits: Tensor) -> Tensor:
    largest = logits.topk(2, -1).values
    return largest[..., 0] - largest[..., 1]


def _energy(logits: Tensor) -> Tensor:
    return logits.logsumexp(-1)


# From logits (…, n_way) to scores (…), higher where a query is more likely of a known class: the largest logit, which
# is minus the distance to the closest class; the largest probability (Hendrycks and Gimpel, ICLR 2017); by how much the
# largest logit exceeds the second; minus the free energy (Liu et al., NeurIPS 2020).
SCORES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"distance": _distance, "probability": _probability, "margin": _margin, "energy": _energy}
)


def auroc(known: Tensor, unknown: Tensor) -> float:
    """The share of pairs of a known and an unknown query in which the known one scores higher; ties count half.

    This is the area under the ROC curve, 0.5 by chance.

    Args:
        known: scores of the queries of known classes ``(n)``.
        unknown: scores of the others ``(m)``.

    Returns:
        A share of 1; not a number without queries of either kind, or where a score is not a number.
    """
    return oscr(known, torch.ones_like(known, dtype=torch.bool), unknown)


def oscr(known: Tensor, right: Tensor, unknown: Tensor) -> float:
    """The area under the open-set classification rate (Dhamija et al., NeurIPS 2018).

    At each threshold, the share of known queries that are accepted *and* classified rightly, over the share of unknown
    queries that are accepted: the AUROC in which a known query that is taken for another class never wins. The accuracy
    is its upper bound.

    Args:
        known: scores of the queries of known classes ``(n)``.
        right: bool ``(n)``, which of them were classified rightly.
        unknown: scores of the others ``(m)``.

    Returns:
        A share of 1; see :func:`auroc`.
    """
    if _undefined(known, unknown):
        return math.nan
    ordered, accepted = unknown.double().sort().values, known[right].double()
    below, up_to = (torch.searchsorted(ordered, accepted, right=ties) for ties in (False, True))
    return int(below.sum() + up_to.sum()) / (2 * len(known) * len(unknown))


def fpr_at_recall(known: Tensor, unknown: Tensor, recall: float = 0.95) -> float:
    """The share of unknown queries that are accepted at the highest threshold that accepts so many known ones.

    A query is accepted if its score is at least the threshold.

    Args:
        known: scores of the queries of known classes ``(n)``.
        unknown: scores of the others ``(m)``.
        recall: the share of known queries that is accepted, at least; above 0 and at most 1.

    Returns:
        A share of 1; see :func:`auroc`.

    Raises:
        UserError: there can't be such a recall.
    """
    require(above=0, most=1, recall=recall)
    if _undefined(known, unknown):
        return math.nan
    accepted = math.ceil(Fraction(str(recall)) * len(known))  # 0.95 of 20 are 19, whatever a float makes of 0.95
    return int((unknown >= known.sort(descending=True).values[accepted - 1]).sum()) / len(unknown)


def operating_curve(known: Tensor, right: Tensor, unknown: Tensor, points: int = 101) -> Tensor:
    """How many known queries are accepted where at most some share of the unknown ones is.

    Args:
        known: scores of the queries of known classes ``(n)``.
        right: bool ``(n)``, which of them were classified rightly.
        unknown: scores of the others ``(m)``.
        points: shares of unknown queries, evenly from 0 to 1.

    Returns:
        float64 ``(points, 3)``: the share of the unknown queries, and the shares of the known ones that are accepted,
        and accepted and right.
    """
    shares = torch.linspace(0, 1, points, dtype=torch.float64)
    # All that score above the first unknown query too many are accepted.
    lowest = torch.cat((unknown.sort(descending=True).values, unknown.new_full((1,), -torch.inf)))
    thresholds = lowest[(shares * len(unknown) + 1e-9).long()]
    columns = []
    for scores in (known, known[right]):
        above = len(scores) - torch.searchsorted(scores.sort().values, thresholds, right=True)
        columns.append(above.double() / len(known))
    return torch.stack((shares, *columns), -1)


def aurocs_of(known_logits: Tensor, unknown_logits: Tensor) -> dict[str, float]:
    """The AUROC of each of :data:`SCORES`.

    Args:
        known_logits: of queries of known classes ``(…, n_way)``.
        unknown_logits: of the others; their leading axes are their own.
    """
    return {
        name: auroc(score(known_logits.double()).flatten(), score(unknown_logits.double()).flatten())
        for name, score in SCORES.items()
    }


def best_score(aurocs: Mapping[str, float]) -> str:
    """The score of the highest AUROC, the first among equals; what is not a number is below all."""
    return max(aurocs, key=lambda name: -1.0 if math.isnan(aurocs[name]) else aurocs[name])


def _undefined(known: Tensor, unknown: Tensor) -> bool:
    return not (len(known) and len(unknown)) or bool(known.isnan().any() or unknown.isnan().any())


class OpenSetCurve(NamedTuple):
    """How well a score tells unknown queries from the others, at all thresholds.

    Attributes:
        auroc: the area under the curve of the queries that are accepted.
        points: see :func:`operating_curve`.
    """

    auroc: float
    points: Tensor


class OpenSet(Metric):
    """AUROC, OSCR and the false-positive rate at 95 % recall of all :data:`SCORES`, over all queries of a stage.

    Attributes:
        curves: what was computed last, by score, those without an AUROC left out.
    """

    full_state_update = False
    curves: Mapping[str, OpenSetCurve] = MappingProxyType({})
    known: list[Tensor]
    right: list[Tensor]
    unknown: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("known", "right", "unknown"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, known: Tensor, right: Tensor, unknown: Tensor) -> None:
        """Take the queries of some episodes.

        Args:
            known: logits of queries of the episodes' classes ``(…, n_way)``.
            right: bool ``(…)``, which of them were classified rightly.
            unknown: logits of queries of other classes ``(…, n_way)``, with leading axes of their own.
        """
        for kept, logits in ((self.known, known), (self.unknown, unknown)):
            # In float64, in which fewer probabilities are rounded to 1.
            kept.append(torch.stack([score(logits.detach().double()).flatten() for score in SCORES.values()], -1))
        self.right.append(right.flatten().to(torch.uint8))  # which all backends can gather

    def compute(self) -> dict[str, Tensor]:
        """Float64 shares of 1 by ``auroc/<score>``, ``oscr/<score>`` and ``fpr95/<score>``."""
        kept = (torch.cat(k) if isinstance(k, list) else k for k in (self.known, self.right, self.unknown))
        known, right, unknown = (column.cpu() for column in kept)
        right = right.bool()
        columns = list(zip(SCORES, known.unbind(-1), unknown.unbind(-1), strict=True))
        curves = {name: OpenSetCurve(auroc(k, u), operating_curve(k, right, u)) for name, k, u in columns}
        self.curves = {name: curve for name, curve in curves.items() if not math.isnan(curve.auroc)}
        values = {f"auroc/{name}": curve.auroc for name, curve in curves.items()}
        values |= {f"oscr/{name}": oscr(k, right, u) for name, k, u in columns}
        values |= {f"fpr95/{name}": fpr_at_recall(k, u) for name, k, u in columns}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
