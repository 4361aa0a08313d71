"""Known against unknown queries: scikit-learn, slow loops and cases made by hand as references."""

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from clip_m2df.errors import UserError
from clip_m2df.evaluation.open_set import (
    SCORES,
    OpenSet,
    auroc,
    aurocs_of,
    best_score,
    fpr_at_recall,
    operating_curve,
    oscr,
)


def drawn(seed: int, *, coarse: bool = False, n: int = 37, m: int = 23) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of known queries, which of these are right, and scores of unknown ones; coarse ones have many ties."""
    generator = torch.Generator().manual_seed(seed)
    known, unknown = torch.randn(n, generator=generator).double() + 0.7, torch.randn(m, generator=generator).double()
    right = torch.rand(n, generator=generator) < 0.6
    return (known.round(), right, unknown.round()) if coarse else (known, right, unknown)


def curve(known: Tensor, right: Tensor, unknown: Tensor) -> float:
    """The area under the open-set classification rate, threshold by threshold, by trapezoids."""
    points = [(Fraction(0), Fraction(0))]
    for threshold in sorted({*known.tolist(), *unknown.tolist()}, reverse=True):
        accepted = sum(u >= threshold for u in unknown.tolist())
        pairs = zip(known.tolist(), right.tolist(), strict=True)
        rightly = sum(k >= threshold and is_right for k, is_right in pairs)
        points.append((Fraction(accepted, len(unknown)), Fraction(rightly, len(known))))
    return float(sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in itertools.pairwise(points)))


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_that_of_scikit_learn(seed: int, coarse: bool) -> None:
    known, _, unknown = drawn(seed, coarse=coarse)
    labels = [1] * len(known) + [0] * len(unknown)
    expected = roc_auc_score(labels, torch.cat((known, unknown)).numpy())
    assert auroc(known, unknown) == pytest.approx(expected, abs=1e-12)
    assert 0.5 < expected < 1


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_oscr_is_the_area_under_the_curve_of_all_thresholds(seed: int, coarse: bool) -> None:
    known, right, unknown = drawn(seed, coarse=coarse)
    assert oscr(known, right, unknown) == pytest.approx(curve(known, right, unknown), abs=1e-12)
    assert oscr(known, right, unknown) < auroc(known, unknown)
    assert oscr(known, right, unknown) <= right.double().mean()


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("recall", [0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("n", [40, 33])  # 95 % of which are 38, and 32 of 31.35
def test_the_false_positive_rate_is_that_of_the_highest_threshold_of_the_recall(
    n: int, recall: float, coarse: bool
) -> None:
    known, _, unknown = drawn(1, coarse=coarse, n=n)
    reaching = [t for t in known.tolist() if (known >= t).double().mean() >= recall - 1e-9]
    expected = (unknown >= max(reaching)).double().mean().item()
    assert fpr_at_recall(known, unknown, recall) == pytest.approx(expected, abs=1e-12)


def test_cases_made_by_hand() -> None:
    known, unknown = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([1.0, -1.0])
    right = torch.tensor([True, False, True, True])
    # Of eight pairs the known win 2 + 2 + 1½ + 1; the second known query is taken for another class.
    assert auroc(known, unknown) == 6.5 / 8
    assert oscr(known, right, unknown) == 4.5 / 8
    assert fpr_at_recall(known, unknown) == 0.5  # all four are accepted, at 0
    assert fpr_at_recall(known, unknown, 0.75) == 0.5  # three, at 1
    assert fpr_at_recall(known, unknown, 0.5) == 0
    same = torch.zeros(3)
    assert auroc(same, same) == 0.5
    assert oscr(same, torch.tensor([True, False, False]), same) == pytest.approx(1 / 6)
    assert fpr_at_recall(same, same) == 1
    assert auroc(torch.tensor([torch.inf, 0.0]), torch.tensor([-torch.inf, torch.inf])) == 2 / 4 + 0.5 / 4


def test_a_point_of_the_operating_curve_is_above_the_first_unknown_query_too_many() -> None:
    known, right, unknown = torch.tensor([3.0, 1.0]), torch.tensor([True, False]), torch.tensor([0.0, 1.0])
    # The known query at 1 can't be accepted without the unknown one.
    expected = [[0.0, 0.5, 0.5], [0.5, 1.0, 0.5], [1.0, 1.0, 0.5]]
    assert operating_curve(known, right, unknown, points=3).tolist() == expected


@pytest.mark.parametrize("n", [20, 40, 60, 100, 1000, 2380])
def test_95_percent_are_as_many_as_they_are(n: int) -> None:
    known = torch.arange(n).double()
    assert fpr_at_recall(known, known) == 0.95


@pytest.mark.parametrize("measure", [auroc, fpr_at_recall, lambda k, u: oscr(k, torch.ones(len(k)).bool(), u)])
def test_what_is_no_number_is_none(measure: Any) -> None:
    some, none = torch.tensor([0.0, 1.0]), torch.zeros(0)
    for known, unknown in ((some, none), (none, some), (some, torch.tensor([math.nan])), (some * math.nan, some)):
        assert math.isnan(measure(known, unknown))


@pytest.mark.parametrize("recall", [0.0, -0.5, 1.01, math.nan])
def test_a_recall_that_there_cannot_be_is_refused(recall: float) -> None:
    with pytest.raises(UserError, match="recall is"):
        fpr_at_recall(torch.arange(3), torch.arange(3), recall)


def test_scores_of_other_precisions_are_compared_as_they_are() -> None:
    known, unknown = torch.tensor([0.5, 0.25], dtype=torch.bfloat16), torch.tensor([0.3, 0.5], dtype=torch.float64)
    assert auroc(known, unknown) == 1.5 / 4
    assert auroc(torch.tensor([1, 2]), torch.tensor([0, 2])) == 2.5 / 4


def test_scores_are_those_of_their_names() -> None:
    logits = torch.tensor([[[-3.0, -1.0, -4.0]], [[0.0, 0.0, -2.0]]]).double()
    for (e, q), row in zip(itertools.product(range(2), range(1)), logits.flatten(0, 1).tolist(), strict=True):
        summed = sum(map(math.exp, row))
        first, second, _ = sorted(row, reverse=True)
        expected = {
            "distance": max(row),
            "probability": math.exp(max(row)) / summed,
            "margin": first - second,
            "energy": math.log(summed),
        }
        assert expected.keys() == SCORES.keys()
        for name, score in SCORES.items():
            assert score(logits).shape == (2, 1)
            assert score(logits)[e, q].item() == pytest.approx(expected[name], abs=1e-12), name


def test_the_score_that_is_chosen_tells_best() -> None:
    # Known queries are as far as unknown ones, but from one class alone.
    known, unknown = torch.tensor([[-2.0, -9.0], [-8.0, -1.0]]), torch.tensor([[-1.5, -1.6], [-2.5, -2.4]])
    aurocs = aurocs_of(known.unsqueeze(0), unknown.unsqueeze(0))
    assert best_score(aurocs) == "probability"  # the first of two that are always right
    assert aurocs["probability"] == aurocs["margin"] == 1
    assert aurocs["distance"] == 0.75
    assert best_score(aurocs_of(known, unknown + torch.tensor([-20.0, -28.0]))) == "distance"
    assert best_score(aurocs_of(known * math.nan, unknown)) == "distance"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_stage_measures_the_same_to_the_bit_whatever_the_number_of_ranks(ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    known, unknown = torch.randn(50, 4, 5, generator=generator) + 1, torch.randn(50, 3, 5, generator=generator)
    right = torch.rand(50, 4, generator=generator) < 0.7
    parts = [OpenSet() for _ in range(ranks)]
    for rank, part in enumerate(parts):
        for rows in torch.arange(50)[rank::ranks].split(8):
            part.update(known[rows], right[rows], unknown[rows])
    for other in parts[1:]:
        parts[0].merge_state(other)
    found = {name: value.item() for name, value in parts[0].compute().items()}
    for name, score in SCORES.items():
        k, u = score(known.double()).flatten(), score(unknown.double()).flatten()
        assert found.pop(f"auroc/{name}") == auroc(k, u)
        assert found.pop(f"oscr/{name}") == oscr(k, right.flatten(), u)
        assert found.pop(f"fpr95/{name}") == fpr_at_recall(k, u)
    assert found == {}


def test_sharp_probabilities_are_told_apart() -> None:
    logits = torch.tensor([[0.0, -20.0], [0.0, -21.0]])  # in float32 both probabilities are 1
    metric = OpenSet()
    metric.update(logits[1:], torch.tensor([True]), logits[:1])
    assert metric.compute()["auroc/probability"] == 1
