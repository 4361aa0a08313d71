import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clip_m2df.episode import select_episodes
from clip_m2df.evaluation.metrics import EpisodeAccuracy, Mean, StageMetrics
from clip_m2df.nn.distillation import Distillation, ViewOutput
from clip_m2df.nn.head import HeadOutput


def random_episodes(n: int, n_queries: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, n_queries, generator=torch.Generator().manual_seed(seed)) < 0.7


def test_accuracy_and_interval_are_those_over_episodes() -> None:
    correct = random_episodes(101, 5)
    metric = EpisodeAccuracy()
    for batch in correct.split(8):
        metric.update(batch)
    result = metric.compute()
    accuracies = correct.numpy().mean(1)
    assert result["accuracy"].item() == pytest.approx(accuracies.mean(), abs=1e-15)
    assert result["interval"].item() == pytest.approx(1.96 * np.std(accuracies) / math.sqrt(101), abs=1e-15)


def test_no_episode_has_no_accuracy_and_equal_ones_no_interval() -> None:
    metric = EpisodeAccuracy()
    with pytest.warns(UserWarning, match="before"):
        assert math.isnan(metric.compute()["accuracy"])
    metric.reset()
    metric.update(torch.tensor([[True, False], [False, True]]))
    assert metric.compute() == {"accuracy": 0.5, "interval": 0.0}


def test_episodes_of_another_size_are_refused() -> None:
    metric = EpisodeAccuracy()
    metric.update(random_episodes(2, 5))
    with pytest.raises(ValueError, match="episodes of 4 queries after episodes of 5"):
        metric.update(random_episodes(2, 4))


def test_a_mean_is_the_same_to_the_bit_in_whatever_order() -> None:
    values = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 10
    results = []
    for order in (range(500), range(499, -1, -1), torch.randperm(500, generator=torch.Generator().manual_seed(1))):
        mean = Mean()
        for k in order:
            mean.update(values[k], 1)
        results.append(mean.compute())
    assert results[0] == results[1] == results[2]
    torch.testing.assert_close(results[0], values.double().mean(), rtol=1e-8, atol=0)


def test_a_mean_of_what_is_no_number_is_none() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        mean = Mean()
        mean.update(torch.tensor(1.0), 2)
        assert mean.compute() == 1
        mean.update(torch.tensor(bad), 2)
        mean.update(torch.tensor(1.0), 2)
        assert mean.compute().isnan()
        mean.reset()
        mean.update(torch.tensor(3.0), 1)
        assert mean.compute() == 3


# Those of a stage


def stage_of(output: HeadOutput, predicted: Tensor, batch: Any, n: int, ranks: int = 1, rank: int = 0) -> StageMetrics:
    """What a rank counts, in batches of n episodes; the loss ``match`` is the mean of the episodes' numbers."""
    stage = StageMetrics()
    for rows in torch.arange(len(predicted))[rank::ranks].split(n):
        views = {name: ViewOutput(*(part[rows] for part in view)) for name, view in output.views.items()}
        part = HeadOutput(
            output.logits[rows],
            views,
            output.prompt_probabilities[rows],
            output.prompt_indices[rows],
            Distillation(*(part[rows] for part in output.distillation)),
        )
        stage.count(part, predicted[rows], select_episodes(batch, rows), {"match": rows.double().mean()})
    return stage


def outcome(n: int, views: Sequence[str] = ("local", "global")) -> tuple[HeadOutput, Tensor, Any]:
    """Of n episodes, 3-way with 4 queries, of a split of 5 classes."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator)

    seen = {view: ViewOutput(drawn(4, 3), drawn(4, 3)) for view in views}
    distillation = Distillation(drawn(), drawn(4) < 0.4, drawn(4) < 0.2)
    indices = drawn(4, 3).argmax(-1)
    output = HeadOutput(drawn(4, 3), seen, drawn(4, 3), indices, distillation)
    batch = {
        "query_labels": drawn(4, 3).argmax(-1),
        "class_indices": drawn(5).argsort(-1)[:, :3],
        "class_names": [f"class {c}" for c in range(5)],
        "replaced": (3 * drawn()).long(),
    }
    return output, output.logits.argmax(-1), batch


def test_a_stage_counts_what_its_names_say() -> None:
    output, predicted, batch = outcome(40)
    numbers, confusion, _ = stage_of(output, predicted, batch, 16).take()
    labels, classes = batch["query_labels"], batch["class_indices"]
    local, global_ = (output.views[view].distances.argmin(-1) for view in ("local", "global"))
    expected = {
        "accuracy": predicted == labels,
        "pps_accuracy": output.prompt_indices == labels,
        "local_accuracy": local == labels,
        "global_accuracy": global_ == labels,
        "view_agreement": local == global_,
        "local_to_global": output.distillation.local_to_global,
        "global_to_local": output.distillation.global_to_local,
    }
    for name, queries in expected.items():
        assert numbers.pop(name).item() == pytest.approx(queries.sum().item() / 160, abs=1e-7), name
    accuracies = (predicted == labels).double().mean(-1)
    assert numbers.pop("interval").item() == pytest.approx(1.96 * accuracies.std(correction=0).item() / math.sqrt(40))
    assert numbers.pop("replaced_videos").item() == batch["replaced"].sum()
    assert numbers.pop("loss/match").item() == pytest.approx(39 / 2)
    assert numbers == {}
    counted = [[0] * 5 for _ in range(5)]
    for e, q in itertools.product(range(40), range(4)):
        counted[classes[e, labels[e, q]]][classes[e, predicted[e, q]]] += 1
    assert confusion.tolist() == counted


def test_a_stage_without_two_views_says_nothing_of_them() -> None:
    output, predicted, batch = outcome(5, ["local"])
    del batch["replaced"]
    numbers, *_ = stage_of(output, predicted, batch, 5).take()
    assert numbers.keys() == {"accuracy", "interval", "pps_accuracy", "loss/match"}


def test_queries_with_a_twin_are_counted_apart() -> None:
    output, predicted, batch = outcome(40)
    batch["twins"] = torch.rand(40, 4, generator=torch.Generator().manual_seed(1)) < 0.2
    right = predicted == batch["query_labels"]
    numbers, *_ = stage_of(output, predicted, batch, 16).take()
    twins = [(e, q) for e, q in itertools.product(range(40), range(4)) if batch["twins"][e, q]]
    others = [(e, q) for e, q in itertools.product(range(40), range(4)) if not batch["twins"][e, q]]
    assert 0 < len(twins) < 80
    assert numbers["twin_share"] == len(twins) / 160
    assert numbers["accuracy_twins"] == sum(bool(right[e, q]) for e, q in twins) / len(twins)
    assert numbers["accuracy_without_twins"] == sum(bool(right[e, q]) for e, q in others) / len(others)
    assert numbers["accuracy"] == right.double().mean()
    # What there are no queries for is left out.
    for share, absent in ((0, "accuracy_twins"), (1, "accuracy_without_twins")):
        batch["twins"] = torch.full((40, 4), bool(share))
        numbers, *_ = stage_of(output, predicted, batch, 16).take()
        assert numbers["twin_share"] == share
        assert absent not in numbers
        present = ({"accuracy_twins", "accuracy_without_twins"} - {absent}).pop()
        assert numbers[present] == numbers["accuracy"]


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_a_stage_is_the_same_to_the_bit_whatever_the_number_of_ranks(ranks: int) -> None:
    output, predicted, batch = outcome(1000)
    batch["twins"] = torch.rand(1000, 4, generator=torch.Generator().manual_seed(1)) < 0.2
    numbers, confusion, _ = stage_of(output, predicted, batch, 8).take()
    merged, *others = (stage_of(output, predicted, batch, 8, ranks, rank) for rank in range(ranks))
    for other in others:
        for name, metric in other.items():
            counted: Any = merged[name]
            counted.merge_state(metric)
    shared, shared_confusion, _ = merged.take()
    assert shared == numbers
    assert shared_confusion.equal(confusion)


def test_a_stage_starts_anew_outside_the_inference_mode_that_it_was_used_in() -> None:
    output, predicted, batch = outcome(10)
    with torch.inference_mode():
        stage = stage_of(output, predicted, batch, 5)
        first, *_ = stage.take()
    numbers, confusion, _ = stage.take()
    assert numbers == {}
    assert confusion.numel() == 0
    stage.count(output, predicted, batch, {"match": torch.tensor(4.5)})
    again, confusion, _ = stage.take()
    assert again == first
    assert confusion.sum() == 40
